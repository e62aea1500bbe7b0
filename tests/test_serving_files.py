"""Files that somebody else made, and files that change under a running server: an error of their own name, at once,
whatever is in them; nothing of theirs is found after a restart, and nobody else waits.
"""

from __future__ import annotations

import json
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from serving_tools import CHAT, http, serving, steered, write_vector, wrong

from steer.adapters.transformers.serving.engine import TransformersEngine
from steer.artifacts import Card, load, save
from steer.core import InputError
from steer.edits import load_edit
from steer.gguf import load_gguf, save_gguf
from steer.methods.controller import ControllerNetwork

SENT = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def engine(tiny_lm: Any) -> Iterator[TransformersEngine]:
    made = TransformersEngine(tiny_lm, name="tiny")
    yield made
    made.close()


def send(client: Any, name: str, content: bytes) -> Any:
    return client.post(f"/v1/steer/artifacts?name={name}", content=content, headers=SENT)


def vector_file(path: Path, card: str | dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> bytes:
    """A vector of the tiny model's width with a card of one's own."""
    text = card if isinstance(card, str) else json.dumps(card)
    save_file(tensors or {"direction.0": torch.ones(32)}, path, {"steer": text})
    return path.read_bytes()


def card(**entries: Any) -> dict[str, Any]:
    return {"format": 1, "kind": "vector", "model": {"width": 32}, "layers": [0], **entries}


# ------------------------------------------------------------------------------------------------------------- cards

CARDS: list[str | dict[str, Any]] = [
    card(layers=["a"]),
    card(layers="0"),
    card(layers=[0.5]),
    card(layers=[True]),
    card(layers=[10**30]),
    card(layers=[-1]),
    card(layers=None),
    card(settings=[]),
    card(settings={"strength": "x"}),
    card(recipe="x"),
    card(settings={"strength": 1e30}),
    card(settings={"note": "\ud800"}),
    card(settings={"\udfff": 1}),
    card(settings={"scope": "from:" + "1" * 5000}),
    card(settings={"scope": 3}),
    card(settings={"layers": "1" * 5000}),
    card(settings={"layers": "0-99999"}),
    card(settings={"layers": ["a"]}),
    card(settings={"keep_norm": 3}),
    card(settings={"operator": ["add"]}),
    card(settings={"unit": {}}),
    card(model={"width": "32"}),
    card(model=[]),
    card(model={"width": 32, "name": 3}),
    card(model={"width": 32, "num_layers": 10**400}),
    card(kind=["vector"]),
    card(metrics={"best": float("nan")}),
    card(data={"rows": float("inf")}),
    card(format="1"),
    card(version=[1]),
    json.dumps(card()).replace("32", "1e999"),
    json.dumps(card()).replace("32", "[" * 500 + "]" * 500),
    json.dumps(card(settings={"deep": 1})).replace("1}", "[" * 40 + "]" * 40 + "}"),
    "[1]",
    "3",
    "nonsense",
    json.dumps(card()).replace("32", "9" * 5000),
]


def test_one_wrong_card_poisons_nobody(engine: TransformersEngine, tmp_path: Path, tiny_lm: Any) -> None:
    """Neither when it is sent, nor when it lies in the folder at start, nor registered from there."""
    store, file = tmp_path / "store", tmp_path / "x.safetensors"
    good = write_vector(tmp_path / "good.safetensors", tiny_lm.info).read_bytes()
    client = http(engine, store)
    assert send(client, "good", good).status_code == 201
    for i, given in enumerate(CARDS):
        content = vector_file(file, given)
        answer = send(client, f"bad{i}", content)
        assert answer.status_code == 400, (given, answer.text)
        assert str(tmp_path) not in answer.text
        (store / f"lying{i}.safetensors").write_bytes(content)
        (store / "registered" / f"left{i}.safetensors").write_bytes(content)
        assert client.post("/v1/steer/artifacts", json={"file": f"lying{i}.safetensors"}).status_code == 400
    for running in (client, http(engine, store)):
        listed = running.get("/v1/steer/artifacts")
        assert listed.status_code == 200 and [entry["id"] for entry in listed.json()["data"]] == ["good"]
        assert running.get("/v1/steer/artifacts/good").status_code == 200
        assert running.get("/v1/steer/artifacts/lying0").status_code == 404
        assert steered(running, "good").status_code == 200
        wrong(steered(running, "lying0"), 400, "steer.edits.0.name", "good")
    assert len(running.app.state.server.store.refused) == 2 * len(CARDS)


def test_a_card_as_steer_writes_it_is_taken(tmp_path: Path) -> None:
    """What is checked is what is written: every setting of every kind, and entries that are for people."""
    settings = {
        "layers": "0-1",
        "scope": "reply",
        "operator": "add",
        "unit": "norm",
        "keep_norm": False,
        "strength": 2,
        "threshold": 0.5,
        "beta": None,
        "top_k": 20,
        "tail": "mean",
        "note": {"by": ["me", 1, None]},
    }
    given = Card(
        "vector", {"width": 32, "name": "Größe", "num_layers": 2}, [0, 1], settings, {"inputs": [1]}, {}, {"x": 1}
    )
    save(tmp_path / "x.safetensors", {"direction.0": torch.ones(32)}, given)
    assert load(tmp_path / "x.safetensors")[1] == given


# ----------------------------------------------------------------------------------------------------------- headers


def raw_file(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any, start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


ABOUT = {"__metadata__": {"steer": json.dumps(card())}}
FILES: dict[str, bytes] = {
    "a hundred thousand tensors": raw_file({**ABOUT, **{f"direction.{i}": entry([0], 0, 0) for i in range(100_000)}}),
    "a header of eight megabytes": raw_file(b" " * (8 << 20)),
    "nesting": raw_file(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "no bytes but a shape": raw_file({**ABOUT, "inner.weight": entry([10**12, 0], 0, 0)}),
    "a shape beyond all numbers": raw_file({**ABOUT, "direction.0": entry([2**40, 2**40], 0, 8)}, b"x" * 8),
    "offsets beyond the file": raw_file({**ABOUT, "direction.0": entry([32], 0, 128)}, b"x" * 64),
    "offsets that go back": raw_file({**ABOUT, "direction.0": entry([32], 128, 0)}, b"x" * 128),
    "tensors on top of each other": raw_file({**ABOUT, "a": entry([32], 0, 128), "b": entry([32], 0, 128)}, b"x" * 128),
    "an unknown dtype": raw_file({**ABOUT, "direction.0": entry([32], 0, 128, "F1024")}, b"x" * 128),
    "a dtype that is none": raw_file({**ABOUT, "direction.0": entry([32], 0, 128, ["F32"])}, b"x" * 128),
    "a shape that is none": raw_file({**ABOUT, "direction.0": entry("32", 0, 128)}, b"x" * 128),
    "whole numbers that are none": raw_file({**ABOUT, "direction.0": entry([True] * 5, 0, 4)}, b"x" * 4),
    "metadata that are none": raw_file({"__metadata__": {"steer": 3}, "direction.0": entry([32], 0, 128)}, b"x" * 128),
    "a list": raw_file([1, 2]),
    "not UTF-8": raw_file(b'{"\xff": 1}'),
}


def test_headers_are_believed_as_far_as_the_bytes_go(engine: TransformersEngine, tmp_path: Path) -> None:
    client = http(engine, tmp_path / "store")
    for what, content in FILES.items():
        began = time.perf_counter()
        answer = send(client, "x", content)
        assert answer.status_code == 400, what
        assert time.perf_counter() - began < 2, what
    assert client.get("/v1/steer/artifacts").json()["data"] == []


def test_networks_are_as_large_as_their_files(tmp_path: Path, tiny_lm: Any) -> None:
    """A controller's and a value head's sizes come from several tensors: small ones ask for no large network."""
    weights = {f"network.{k}": v for k, v in ControllerNetwork(32, 2, 4).state_dict().items()}
    given = Card("controller", tiny_lm.info.entry(), [0, 1], {}, {"inputs": [0]})
    save(tmp_path / "c.safetensors", {**weights, "directions": torch.ones(2, 32)}, given)
    assert load_edit(tmp_path / "c.safetensors", model=tiny_lm)
    weights |= {"network.mean": torch.zeros(300_000), "network.weight_outer.weight": torch.zeros(2, 300_000)}
    save(tmp_path / "c.safetensors", {**weights, "directions": torch.ones(2, 32)}, given)  # 360 gigabytes, if believed
    head = {"inner.weight": torch.zeros(2_000_000, 1), "outer.weight": torch.zeros(1)}
    save(tmp_path / "v.safetensors", head, Card("value", {"width": 32}, [], {}, {"head": "q"}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("c", "v"):
        with pytest.raises(RuntimeError):
            load_edit(tmp_path / f"{name}.safetensors", model=tiny_lm)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 << 10, "kilobytes; the files have 12 megabytes"


GGUF = {
    "an array without end": struct.pack("<QI", 8, 9) + struct.pack("<IQ", 4, 2**61),
    "texts without end": struct.pack("<QI", 8, 9) + struct.pack("<IQ", 8, 2**40),
    "nested arrays": struct.pack("<QI", 8, 9) + struct.pack("<IQ", 9, 1) * 900,
    "a long text": struct.pack("<QI", 8, 8) + struct.pack("<Q", 2**62),
    "an unknown type": struct.pack("<QI", 8, 99),
}


def gguf_file(value: bytes) -> bytes:
    """A header with one key of eight letters, whose length, name and value these are."""
    length, rest = value[:8], value[8:]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + length + b"some.key" + rest + b"\0" * 4000


def test_a_malformed_gguf_takes_no_memory(tmp_path: Path) -> None:
    """Four kilobytes, read where the process may have one more gigabyte: each is refused with one line."""
    names = []
    for what, value in GGUF.items():
        names.append(str(tmp_path / f"{what}.gguf"))
        Path(names[-1]).write_bytes(gguf_file(value))
    code = """
import resource, sys
from steer.core import InputError
from steer.gguf import load_gguf
import gguf
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
for name in sys.argv[1:]:
    try:
        load_gguf(name)
    except InputError as error:
        assert "truncated or damaged" in str(error), error
        continue
    raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", code, *names], check=True, timeout=60)


def test_a_damaged_gguf_is_refused_or_read(tmp_path: Path) -> None:
    """Each bit of the header turned over: an error of one line, or a file that can be read all the same."""
    path = tmp_path / "x.gguf"
    save_gguf(path, {1: torch.ones(8), 2: torch.ones(8)}, "llama")
    whole = path.read_bytes()
    began = time.perf_counter()
    for bit in range(0, 8 * min(len(whole), 300), 3):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(changed)
        try:
            load_gguf(path)
        except InputError as error:
            assert "\n" not in str(error)
    assert time.perf_counter() - began < 30


# --------------------------------------------------------------------------------------- files that change meanwhile


def test_a_file_that_was_replaced_is_what_lies_there_now(
    engine: TransformersEngine, tmp_path: Path, tiny_lm: Any
) -> None:
    """The folder is the truth, for any number of servers: a new file is used, one that is damaged or gone is an error
    of its name alone.
    """
    store = tmp_path / "store"
    for seed, name in enumerate(("calm", "bright")):
        write_vector(store / f"{name}.safetensors", tiny_lm.info, seed=seed)
    client = http(engine, store)
    before = steered(client, "calm").json()["choices"]
    write_vector(store / "calm.safetensors", tiny_lm.info, seed=5)
    after = steered(client, "calm").json()["choices"]
    assert after[0]["steer"]["kl"] != before[0]["steer"]["kl"]
    assert after == steered(http(engine, store), "calm").json()["choices"], "what a new server reads"
    assert steered(client, "bright", strength=0.7).status_code == 200
    (store / "calm.safetensors").write_bytes(b"no")
    wrong(steered(client, "calm", strength=0.8), 400, "steer.edits.0.name", "calm")
    (store / "calm.safetensors").unlink()
    wrong(steered(client, "calm", strength=0.9), 400, "steer.edits.0.name", "calm")
    assert str(tmp_path) not in steered(client, "calm", strength=0.9).text
    assert steered(client, "bright", strength=0.7).status_code == 200
    assert client.get("/v1/steer/artifacts").status_code == 200


def test_a_folder_that_vanishes(engine: TransformersEngine, tmp_path: Path, tiny_lm: Any) -> None:
    """Names are errors of their own; what is sent or remembered makes the folder anew; other requests do not notice."""
    store = tmp_path / "store"
    content = write_vector(tmp_path / "x.safetensors", tiny_lm.info).read_bytes()
    client = http(engine, store)
    assert send(client, "sent", content).status_code == 201
    shutil.rmtree(store)
    wrong(steered(client, "sent", strength=0.31), 400, "steer.edits.0.name", "sent")
    assert client.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT}).status_code == 200
    assert client.get("/v1/steer/artifacts").status_code == 200
    assert client.post("/v1/steer/rewards", json={"name": "mine", "reward": "2 * sentiment"}).status_code == 201
    shutil.rmtree(store)
    assert send(client, "sent", content).status_code == 201
    assert steered(client, "sent", strength=0.31).status_code == 200
    shutil.rmtree(store)
    assert client.delete("/v1/steer/artifacts/sent").status_code == 404
    shutil.rmtree(store, ignore_errors=True)
    store.write_text("a file in its place")
    answer = send(client, "sent", content)
    assert answer.status_code == 503 and "cannot be written" in answer.json()["error"]["message"]
    assert str(tmp_path) not in answer.text


# ------------------------------------------------------------------------------------------------- who waits for whom


def test_uploads_of_those_who_left_keep_nobody_waiting(tiny_lm_dir: Path, tmp_path: Path) -> None:
    """More of them than a server has threads, each with as many tensors as are read: plain requests go on meanwhile."""
    tensors = {f"direction.{i}": entry([1], 4 * i, 4 * i + 4) for i in range(9_900)}
    content = raw_file({**ABOUT, **tensors}, b"\0" * 4 * len(tensors))
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 4, "temperature": 0}
    with serving(tiny_lm_dir, "--name", "tiny", "--artifacts", tmp_path / "store") as server:
        expected = server.post("/v1/chat/completions", json=body).json()["choices"]

        def leave() -> None:
            server.abandon(f"/v1/steer/artifacts?name=x{time.monotonic_ns()}", content, SENT["Content-Type"])

        leaving = [threading.Thread(target=leave) for _ in range(12)]
        for one in leaving:
            one.start()
        waits = []
        for _ in range(8):
            began = time.perf_counter()
            assert server.post("/v1/chat/completions", json=body).json()["choices"] == expected
            waits.append(time.perf_counter() - began)
        for one in leaving:
            one.join()
        assert max(waits) < 10, "seconds on a machine that does other things too; it was above 30"
        assert server.settles("steer_inside", 0)
        assert server.get("/v1/steer/artifacts").json()["data"] == []
    assert not list((tmp_path / "store" / "registered").glob("*.safetensors"))

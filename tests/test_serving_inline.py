"""Vectors that come with a request: the same text as by name, told apart by their numbers, kept nowhere."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai import OpenAI
from openai_contract import refused
from serving_tools import CHAT, Running, serving_here, write_vector

from steer import artifacts
from steer.artifacts import Card
from steer.core import InputError
from steer.edits import load_artifact
from steer.serving.artifact_store import Store
from steer.serving.inline import Inline
from steer.serving.limits import Limits
from steer.serving.reward_store import Rewards
from steer.serving.tasks import Tasks
from steer.serving.wire import EditRequest, SteerRequest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Any) -> Path:
    made = tmp_path_factory.mktemp("artifacts")
    write_vector(made / "calm.safetensors", tiny_lm.info)
    return made


@pytest.fixture(scope="module")
def server(tiny_lm_dir: Path, folder: Path) -> Iterator[Running]:
    with serving_here(
        tiny_lm_dir, "--artifacts", folder, "--name", "tiny", "--inline-vectors", "--max-vector-bytes", 2_000
    ) as running:
        yield running


@pytest.fixture(scope="module")
def numbers(folder: Path) -> dict[str, list[float]]:
    """The file's directions as a request has them."""
    tensors, _ = load_artifact(folder / "calm.safetensors")
    return {k.removeprefix("direction."): v.tolist() for k, v in tensors.items() if k.startswith("direction.")}


def in_base64(layers: dict[str, list[float]]) -> dict[str, str]:
    return {k: base64.b64encode(np.asarray(v, "<f4").tobytes()).decode() for k, v in layers.items()}


def chat(server: Running, edit: Any, **settings: Any) -> Any:
    client = OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)
    given = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "temperature": 0, **settings}
    steer = {"edits": [edit]} if isinstance(edit, dict) else {"edits": edit}
    return client.chat.completions.create(**given, extra_body={"steer": steer})


def text(server: Running, edit: Any, **settings: Any) -> str:
    return str(chat(server, edit, **settings).choices[0].message.content)


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 0.8},
        {"strength": -0.5, "layers": "1", "scope": "generated"},
        {"operator": "ablate", "strength": 1.0},
        {"strength": 2.0, "unit": "raw"},
    ],
    ids=str,
)
def test_the_text_is_that_of_the_same_vector_by_name(
    server: Running, folder: Path, numbers: dict[str, list[float]], settings: dict[str, Any]
) -> None:
    named = text(server, {"name": "calm", **settings})
    before = sorted(folder.rglob("*"))
    for layers in (numbers, in_base64(numbers)):
        assert text(server, {"vector": {"layers": layers}, **settings}) == named
    assert named != text(server, [])
    assert sorted(folder.rglob("*")) == before, "nothing was written"
    listed = server.get("/v1/steer/artifacts").json()["data"]
    assert [entry["id"] for entry in listed] == ["calm"]
    assert server.get("/v1/steer/capabilities").json()["inline_vectors"] is True


def test_a_vector_goes_by_its_numbers(tiny_lm: Any, numbers: dict[str, list[float]]) -> None:
    """Written in another way and another order it is the same; with one other number, or one layer less, another."""
    inline = Inline(lambda: tiny_lm.info, 1 << 20)

    def digest(layers: Any, **settings: Any) -> str:
        return inline.named(EditRequest.parse({"vector": {"layers": layers}, **settings}), "steer.edits.0").digest

    backwards = dict(reversed(numbers.items()))
    same = {digest(numbers), digest(in_base64(numbers)), digest(backwards), digest(numbers, strength=0.3)}
    assert len(same) == 1
    first = next(iter(numbers))
    changed = {**numbers, first: [numbers[first][0] + 0.5, *numbers[first][1:]]}
    less = {k: v for k, v in numbers.items() if k != first}
    assert len({*same, digest(changed), digest(less)}) == 3


def test_an_engine_keeps_one_edit_for_the_same_vector(tiny_lm: Any, numbers: dict[str, list[float]]) -> None:
    from steer.adapters.transformers.serving.preparing import _KEPT_EDITS, Preparer

    preparer = Preparer(tiny_lm, 8, 4096)
    inline = Inline(lambda: tiny_lm.info, 1 << 20)

    def read(layers: Any, strength: float) -> Any:
        request = EditRequest.parse({"vector": {"layers": layers}, "strength": strength})
        return preparer.read_edit(inline.named(request, "steer.edits.0"), 1.0)

    assert read(numbers, 0.5) is read(in_base64(numbers), 0.5)
    for i in range(3 * _KEPT_EDITS):
        read({"0": [i + 1.0] * tiny_lm.info.width}, 0.5)
    assert len(preparer._edits) == _KEPT_EDITS


def test_two_requests_at_once_keep_their_own_vectors(server: Running, numbers: dict[str, list[float]]) -> None:
    edits = [[], *({"vector": {"layers": numbers}, "strength": s} for s in (1.0, -1.0, 0.4))]
    alone = [text(server, edit) for edit in edits]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: text(server, edits[i % 4]), range(16)))
    assert together == alone * 4


def test_bad_vectors_are_refused_in_one_line(server: Running, tiny_lm: Any) -> None:
    width, depth = tiny_lm.info.width, tiny_lm.info.num_layers
    ones, at = [1.0] * width, "steer.edits.0.vector"
    wrong: list[tuple[int, str, Any, str]] = [
        (400, f"{at}.layers", {"layers": {str(depth): ones}}, f"0 to {depth - 1}"),
        (400, f"{at}.layers.0", {"layers": {"0": ones[1:]}}, f"{width - 1} numbers"),
        (400, f"{at}.layers.0", {"layers": {"0": [0.0] * width}}, "got 'zeros'"),
        (400, f"{at}.layers.0", {"layers": {"0": [1e300] * width}}, "beyond float32"),
        (400, f"{at}.layers.0", {"layers": {"0": [1e-30] * width}}, "norm"),
        (400, f"{at}.layers.0", {"layers": {"0": "AAAA"}}, "base64 of 3 bytes"),
        (400, f"{at}.layers.0", {"layers": {"0": "AAAAA"}}, "not base64"),
        (400, f"{at}.layers.0", {"layers": {"0": "not base64!"}}, "pattern"),
        (400, f"{at}.layers.0", {"layers": in_base64({"0": [float("nan")] * width})}, "NaN"),
        (400, f"{at}.layers.0.1", {"layers": {"0": [1.0, "a"]}}, "number"),
        (400, f"{at}.layers", {"layers": {}}, "at least 1"),
        (400, f"{at}.layers", {}, "missing"),
        (400, f"{at}.wrong", {"layers": {"0": ones}, "wrong": 1}, "unknown"),
        (400, f"{at}.layers", {"layers": {str(i): ones for i in range(1_025)}}, "at most 1024"),
    ]
    for status, field, vector, word in wrong:
        error = refused(status, field, lambda vector=vector: chat(server, {"vector": vector}), word)
        assert "\n" not in error.message
    for field, edit, word in (
        ("steer.edits.0.name", {"name": "calm", "vector": {"layers": {"0": ones}}}, "unset beside a vector"),
        ("steer.edits.0.name", {"strength": 1.0}, "missing"),
        ("steer.edits.option of a vector", {"vector": {"layers": {"0": ones}}, "threshold": 0.5}, "threshold"),
        (
            "steer.edits.operator",
            {"vector": {"layers": {"0": ones}}, "operator": "rotate", "strength": 20.0},
            "references",
        ),
    ):
        refused(400, field, lambda edit=edit: chat(server, edit), word)
    many = [{"vector": {"layers": {"0": ones}}} for _ in range(2_000 // (4 * width) + 1)]
    refused(413, "steer.edits", lambda: chat(server, many), "at most 2000")


def test_off_they_are_refused_with_the_options_name(tiny_lm: Any, numbers: dict[str, list[float]]) -> None:
    tasks = Tasks(Store(None, lambda path: None), Rewards(), Limits())
    asked = SteerRequest.parse({"edits": [{"vector": {"layers": numbers}}]})
    with pytest.raises(InputError, match=r"steer\.edits\.0\.vector: .*--inline-vectors.*inline_vectors"):
        tasks._edit(asked, 0)


def test_the_bytes_of_a_file_are_those_of_its_tensors(tmp_path: Path, tiny_lm: Any) -> None:
    card = Card("vector", tiny_lm.info.entry(), [0])
    tensors = {"direction.0": torch.arange(1.0, tiny_lm.info.width + 1)}
    artifacts.save(tmp_path / "a.safetensors", tensors, card)
    assert (tmp_path / "a.safetensors").read_bytes() == artifacts.encode(tensors, card)

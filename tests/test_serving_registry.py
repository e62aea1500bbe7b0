"""Artifacts and rewards of a server: what is taken, what is refused, what survives."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save_file
from serving_tools import Idle, http, serving, steered, write_vector, wrong

from steer import Samples, artifacts
from steer.adapters.transformers.serving.engine import TransformersEngine
from steer.artifacts import Card
from steer.cli import main
from steer.core import InputError
from steer.methods.value import QHead
from steer.rewards import parse_reward
from steer.serving.app import AppSettings, create_app
from steer.serving.artifact_store import Store, UnknownArtifactError
from steer.serving.engine import TooLargeError
from steer.serving.limits import Limits
from steer.serving.protocol import ChatRequest
from steer.serving.reward_store import Rewards
from steer.serving.routes.docs import rendered
from steer.serving.tasks import Tasks
from steer.serving.wire import SteerRequest

CHAT = [{"role": "user", "content": "tell me about the sun"}]


@pytest.fixture(scope="module")
def engine(tiny_lm: Any) -> Iterator[TransformersEngine]:
    made = TransformersEngine(tiny_lm, name="tiny")
    yield made
    made.close()


@pytest.fixture(scope="module")
def tiny_reward_dir(tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with random weights beside the tiny model's tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("rewards") / "judge"
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(tiny_lm_dir, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_lm_dir).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------ routes


def test_the_three_ways_to_register(engine: TransformersEngine, tmp_path: Path, tiny_lm: Any) -> None:
    source = write_vector(tmp_path / "source.safetensors", tiny_lm.info)
    client = http(engine, tmp_path / "store")
    raw = client.post(
        "/v1/steer/artifacts?name=raw",
        content=source.read_bytes(),
        headers={"Content-Type": "application/octet-stream"},
    )
    assert raw.status_code == 201 and raw.json()["kind"] == "vector" and raw.json()["layers"] == [0, 1]
    form = client.post("/v1/steer/artifacts", files={"file": ("x", source.read_bytes())}, data={"name": "form"})
    assert form.status_code == 201 and form.json()["sha256"] == raw.json()["sha256"]
    by_file = client.post("/v1/steer/artifacts", files={"file": ("by.file.safetensors", source.read_bytes())})
    assert by_file.json()["id"] == "by.file"
    write_vector(tmp_path / "store" / "mine.safetensors", tiny_lm.info, seed=9)
    named = client.post("/v1/steer/artifacts", json={"file": "mine.safetensors"})
    assert named.json()["id"] == "mine" and named.json()["fixed"]
    copied = client.post("/v1/steer/artifacts", json={"file": "mine.safetensors", "name": "copy"})
    assert not copied.json()["fixed"]
    listed = client.get("/v1/steer/artifacts").json()["data"]
    assert [entry["id"] for entry in listed] == ["by.file", "copy", "form", "mine", "raw"]
    texts = {name: steered(client, name).json()["choices"][0]["message"]["content"] for name in ("raw", "form", "mine")}
    assert texts["raw"] == texts["form"] != texts["mine"]
    assert client.get("/v1/steer/artifacts/raw").json() == listed[-1]
    assert client.delete("/v1/steer/artifacts/raw").json()["deleted"] is True
    wrong(client.get("/v1/steer/artifacts/raw"), 404, "name")
    wrong(client.delete("/v1/steer/artifacts/raw"), 404, "name")
    wrong(steered(client, "raw"), 400, "steer.edits.0.name")
    assert not (tmp_path / "store" / "registered" / "raw.safetensors").exists()
    assert not list((tmp_path / "store" / "registered").glob(".*"))


def test_an_artifact_that_is_replaced_steers_anew(engine: TransformersEngine, tmp_path: Path, tiny_lm: Any) -> None:
    client = http(engine, tmp_path / "store")
    texts = []
    for seed in (1, 2, 1):
        source = write_vector(tmp_path / "v.safetensors", tiny_lm.info, seed=seed)
        answer = client.post("/v1/steer/artifacts", files={"file": ("v.safetensors", source.read_bytes())})
        assert answer.status_code == 201
        texts.append(steered(client, "v").json()["choices"][0]["message"]["content"])
    assert texts[0] == texts[2] != texts[1]


def test_a_value_head_guides(engine: TransformersEngine, tmp_path: Path, tiny_lm: Any) -> None:
    head = QHead(32, 8)
    torch.nn.init.normal_(head.outer.weight, generator=torch.Generator().manual_seed(3))
    card = Card("value", tiny_lm.info.entry(), [], {"beta": 0.05}, {"head": "q"})
    artifacts.save(tmp_path / "store" / "head.safetensors", head.state_dict(), card)
    client = http(engine, tmp_path / "store")
    answer = steered(client, "head").json()
    edit = __import__("steer").load_edit(tmp_path / "store" / "head.safetensors", model=tiny_lm)
    alone = tiny_lm.generate(CHAT, edits=edit, temperature=0, max_new_tokens=8)
    assert answer["choices"][0]["message"]["content"] == alone.texts[0]
    assert answer["choices"][0]["steer"]["kl"] == pytest.approx(float(alone.kl[0]), rel=1e-3)


def test_what_is_no_artifact_of_this_model_is_refused(engine: TransformersEngine, tmp_path: Path, tiny_lm: Any) -> None:
    client = http(engine, tmp_path / "store")

    def send(path: Path, name: str = "x") -> Any:
        headers = {"Content-Type": "application/octet-stream"}
        return client.post("/v1/steer/artifacts", params={"name": name}, content=path.read_bytes(), headers=headers)

    files = tmp_path / "files"
    good = write_vector(files / "good.safetensors", tiny_lm.info)
    wide = write_vector(files / "wide.safetensors", width=33)
    alien = files / "alien.safetensors"
    artifacts.save(
        alien, {"direction.0": torch.ones(32)}, Card("vector", {**tiny_lm.info.entry(), "fingerprint": "0"}, [0])
    )
    other = files / "other.safetensors"
    artifacts.save(other, {"x": torch.ones(3)}, Card("poem", {}))
    hollow = files / "hollow.safetensors"
    artifacts.save(hollow, {"x": torch.ones(3)}, Card("controller", tiny_lm.info.entry()))
    peeping = files / "peeping.safetensors"
    artifacts.save(
        peeping, {"direction.0": torch.ones(32)}, Card("vector", tiny_lm.info.entry(), [0], {"gate": str(good)})
    )
    bare = files / "bare.safetensors"
    save_file({"direction.0": torch.ones(32)}, bare)
    cut, pickled, endless = files / "cut", files / "pickled", files / "endless"
    cut.write_bytes(good.read_bytes()[:-5])
    pickled.write_bytes(b"\x80\x04\x95")
    endless.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    for path in (wide, alien, other, hollow, peeping, bare, cut, pickled, endless):
        answer = send(path)
        assert answer.status_code == 400, (path, answer.text)
        assert str(tmp_path) not in answer.json()["error"]["message"], "paths of the server are its own business"
    for name in ("../evil", "a/b", ".hidden", "", "x" * 200):
        wrong(send(good, name), 400, "name")
    for name in ("../good.safetensors", "/etc/passwd", "good", "nothing.safetensors"):
        wrong(client.post("/v1/steer/artifacts", json={"file": name}), 400, "file")
    wrong(client.post("/v1/steer/artifacts", json={"name": "x"}), 400, "file")
    wrong(client.post("/v1/steer/artifacts", content=b"x", headers={"Content-Type": "text/plain"}), 415, None)
    wrong(client.post("/v1/steer/artifacts", files={"other": b"x"}), 400, "file")
    assert client.get("/v1/steer/artifacts").json()["data"] == []
    assert list((tmp_path / "store" / "registered").iterdir()) == []
    assert send(good).status_code == 201


def test_without_a_folder_nothing_is_taken(engine: TransformersEngine, tmp_path: Path) -> None:
    answer = http(engine, None).post(
        "/v1/steer/artifacts", params={"name": "x"}, content=b"x", headers={"Content-Type": "application/octet-stream"}
    )
    wrong(answer, 400, "name", "--artifacts")


def test_bytes_are_limited(engine: TransformersEngine, tmp_path: Path, tiny_lm: Any) -> None:
    source = write_vector(tmp_path / "v.safetensors", tiny_lm.info)
    client = http(engine, tmp_path / "store", limits=Limits(artifact_bytes=100))
    headers = {"Content-Type": "application/octet-stream"}
    wrong(client.post("/v1/steer/artifacts?name=v", content=source.read_bytes(), headers=headers), 413, "file")
    wrong(client.post("/v1/steer/artifacts?name=v", content=b"x" * 90_000, headers=headers), 413, None)


# ------------------------------------------------------------------------------------------------------------- store


def test_the_least_recently_used_leave_first(tmp_path: Path) -> None:
    sources = [write_vector(tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate("abcde")]
    store = Store(tmp_path / "store", lambda path: None, limit=3)
    for source in sources[:3]:
        store.add(source.stem, source)
    with store.using(["a"]):
        pass
    store.add("d", sources[3])
    assert [entry.name for entry in store.entries()] == ["c", "a", "d"], "b was used longest ago"
    with store.using(["c", "a", "d"]), pytest.raises(TooLargeError):
        store.add("e", sources[4])
    assert len(store) == 3 and store.get("a").path.is_file()
    store.add("c", sources[4])
    assert len(store) == 3, "a name that is taken makes room for itself"
    small = Store(tmp_path / "small", lambda path: None, limit_bytes=2 * sources[0].stat().st_size)
    for source in sources[:3]:
        small.add(source.stem, source)
    assert [entry.name for entry in small.entries()] == ["b", "c"]
    assert {path.stem for path in (tmp_path / "small" / "registered").iterdir()} == {"b", "c"}


def test_what_a_person_put_there_stays(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    write_vector(folder / "mine.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no")
    store = Store(folder, lambda path: None, limit=1)
    assert [entry.name for entry in store.entries()] == ["mine"] and "broken.safetensors" in store.refused
    with pytest.raises(TooLargeError):
        store.add("other", folder / "mine.safetensors")
    with pytest.raises(InputError):
        store.add("mine", folder / "mine.safetensors")
    store.remove("mine")
    with pytest.raises(UnknownArtifactError):
        store.get("mine")
    assert (folder / "mine.safetensors").is_file()


def test_killed_in_the_middle_of_an_upload(tiny_lm_dir: Path, tmp_path: Path, tiny_lm: Any) -> None:
    """What was registered is there after kill -9, what was on its way is not, and nothing is left over."""
    folder = tmp_path / "store"
    first = write_vector(tmp_path / "first.safetensors", tiny_lm.info).read_bytes()
    headers = {"Content-Type": "application/octet-stream"}
    with serving(tiny_lm_dir, "--artifacts", folder) as server:
        assert server.post("/v1/steer/artifacts?name=first", content=first, headers=headers).status_code == 201
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as wire:
            head = f"POST /v1/steer/artifacts?name=first HTTP/1.1\r\nHost: {host}\r\nContent-Length: 300000\r\n"
            wire.sendall(f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + b"x" * 200_000)
            end = time.monotonic() + 10
            while not list((folder / "registered").glob(".*.tmp")) and time.monotonic() < end:
                time.sleep(0.01)
            assert list((folder / "registered").glob(".*.tmp"))
            server.stop(signal.SIGKILL)
    (left,) = (folder / "registered").glob(".*.tmp")
    Store(folder, lambda path: None)
    assert left.exists(), "a young one may be another server's"
    os.utime(left, (0, 0))
    store = Store(folder, lambda path: None)
    assert [entry.name for entry in store.entries()] == ["first"] and not store.refused
    assert store.get("first").path.read_bytes() == first
    assert [path.name for path in (folder / "registered").iterdir()] == ["first.safetensors"]


# ----------------------------------------------------------------------------------------------------------- callers


def test_web_pages_of_others_and_other_names_are_refused(engine: TransformersEngine) -> None:
    """A server without a key is for programs of this machine, not for what a browser is made to send."""
    app = create_app(Idle(engine), AppSettings(local=True))  # type: ignore[arg-type]
    client = TestClient(app, base_url="http://127.0.0.1:8000")
    assert client.get("/v1/models").status_code == 200
    assert client.get("/v1/models", headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200
    wrong(client.get("/v1/models", headers={"Origin": "https://evil.example"}), 403, None)
    for host in ("evil.example", "127.evil.example", "[::1", "localhost.evil.example", "127.0.0.1@evil.example"):
        wrong(client.get("/v1/models", headers={"Host": host}), 403, None)
    for origin in ("https://[", "null", "http://localhost.evil.example"):
        wrong(client.get("/v1/models", headers={"Origin": origin}), 403, None)
    assert client.get("/v1/models", headers={"Host": "[::1]:8000"}).status_code == 200
    assert client.get("/health", headers={"Host": "probe.example"}).status_code == 200
    keyed = TestClient(create_app(Idle(engine), AppSettings(keys=["k", "other"])))  # type: ignore[arg-type]
    for header, status in (("Bearer k", 200), ("bearer other", 200), ("Basic k", 401), ("Bearer ", 401), ("", 401)):
        assert keyed.get("/v1/models", headers={"Authorization": header}).status_code == status


def test_the_page_of_routes_shows_every_route_and_field_and_loads_nothing(engine: TransformersEngine) -> None:
    app = create_app(Idle(engine), AppSettings(local=False))  # type: ignore[arg-type]
    answer = TestClient(app).get("/docs")
    page, described = answer.text, app.openapi()
    assert answer.headers["content-type"].startswith("text/html") and "default-src 'none'" in str(answer.headers)
    assert "<script" not in page and not re.findall(r"(?:src|href)=\"(?!#|/openapi.json)", page)
    for path, methods in described["paths"].items():
        assert all(f"<code>{method.upper()} {path}</code>" in page for method in methods)
    for name, schema in described["components"]["schemas"].items():
        assert f'id="{name}"' in page
        assert all(f"<code>{field}</code>" in page for field in schema.get("properties", {}))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= described["components"]["schemas"].keys()
    assert "<evil>" not in rendered({"info": {"title": "<evil>"}, "paths": {}})


def test_edits_of_the_engines_own_need_no_artifact(tmp_path: Path) -> None:
    tasks = Tasks(Store(tmp_path, lambda path: None), Rewards(), Limits(), own_edits=("polite",))
    asked = ChatRequest.model_validate(
        {"model": "m", "messages": CHAT, "steer": {"edits": [{"name": "polite", "strength": 1.5}]}}
    )
    (edit,) = tasks.chat(asked).steering.edits
    assert edit.path is None and edit.request.strength == 1.5
    other = asked.model_copy(update={"steer": SteerRequest.parse({"edits": [{"name": "rude"}]})})
    with pytest.raises(InputError, match="polite"):
        tasks.chat(other)


def test_rewards_that_were_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judge_of_tests.py").write_text("def loud(texts):\n    return [float(t.count('!')) for t in texts]\n")
    monkeypatch.chdir(tmp_path)
    rewards = Rewards(["served_loud=judge_of_tests:loud", "judge_of_tests:loud"])
    assert str(rewards.parse("served_loud - 0.1*length"))
    assert rewards.parse("judge_of_tests:loud") is not None
    for text in (
        "judge_of_tests:loud + 1*sentiment",
        "os:system",
        "org/model",
        '"org/model"',
        "clip",
        "class:bag",
        "0" * 4096,
    ):
        with pytest.raises(InputError, match=r"steer\.reward"):
            rewards.parse(text)
    assert {"served_loud", "judge_of_tests:loud", "sentiment"} <= set(rewards.usages())


def test_rewards_are_registered_and_remembered(engine: TransformersEngine, tmp_path: Path) -> None:
    client = http(engine, tmp_path)
    made = client.post("/v1/steer/rewards", json={"name": "polite", "reward": "sentiment - 0.5*profanity"})
    assert made.status_code == 201 and made.json()["usage"] == "sentiment - 0.5*profanity"
    assert client.post("/v1/steer/rewards", json={"name": "terse", "reward": "polite - 0.01*length"}).status_code == 201
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 6, "seed": 1}
    asked = {"sampler": "best-of-n", "candidates": 4, "reward": "2*terse"}
    by_name = client.post("/v1/chat/completions", json={**body, "steer": asked}).json()
    spelt = {**asked, "reward": "2*((sentiment - 0.5*profanity) - 0.01*length)"}
    assert client.post("/v1/chat/completions", json={**body, "steer": spelt}).json()["choices"] == by_name["choices"]
    again = http(engine, tmp_path)  # another server on the same folder
    listed = {reward["id"]: reward for reward in again.get("/v1/steer/rewards").json()["data"]}
    assert not listed["terse"]["fixed"] and listed["sentiment"]["fixed"]
    wrong(again.delete("/v1/steer/rewards/polite"), 400, "name")
    assert again.delete("/v1/steer/rewards/terse").json()["deleted"]
    assert again.delete("/v1/steer/rewards/polite").status_code == 200
    wrong(again.delete("/v1/steer/rewards/polite"), 404, "name")
    wrong(again.delete("/v1/steer/rewards/sentiment"), 404, "name")
    assert "polite" not in {reward["id"] for reward in http(engine, tmp_path).get("/v1/steer/rewards").json()["data"]}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"name": "sentiment", "reward": "length"}, "name"),
        ({"name": "a-b", "reward": "length"}, "name"),
        ({"name": "mine", "reward": "nothing_known"}, "reward"),
        ({"name": "mine", "reward": "mine + length"}, "reward"),
        ({"name": "mine", "reward": "os:system"}, "reward"),
        ({"name": "mine", "reward": "brightness"}, "reward"),
        ({"name": "mine"}, "reward"),
        ({"name": "mine", "folder": "../elsewhere"}, "folder"),
        ({"name": "mine", "folder": "absent"}, "folder"),
        ({"name": "mine", "folder": "absent", "reward": "length"}, "reward"),
        ({"name": "mine", "reward": "length", "label": "x"}, "label"),
    ],
)
def test_what_is_no_reward(given: dict[str, str], field: str, engine: TransformersEngine, tmp_path: Path) -> None:
    wrong(http(engine, tmp_path).post("/v1/steer/rewards", json=given), 400, field)
    wrong(http(engine, None).post("/v1/steer/rewards", json={"name": "mine", "reward": "length"}), 400, "name")


@pytest.fixture(scope="module")
def heads(tiny_lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of `steer train reward` on the tiny model."""
    from steer.train.reward import train_reward

    texts = ("good nice happy", "love good day", "happy calm cat", "bad awful sad", "hate bad night", "sad loud cat")
    rows = [
        {"prompt": p, "chosen": texts[i % 3], "rejected": texts[3 + (i * 2 + 1) % 3]}
        for i, p in enumerate(("the sun", "tell me", "why", "how") * 4)
    ]
    path = tmp_path_factory.mktemp("heads") / "kind.safetensors"
    train_reward(tiny_lm, rows, layer=1, l2=0.1, members=2).save(path)
    return path


def test_a_trained_reward_is_sent_named_and_used(
    engine: TransformersEngine, tmp_path: Path, heads: Path, tiny_lm: Any
) -> None:
    """Best-of-n and FK by it; the number is that of the reward itself; a restart remembers it."""
    client = http(engine, tmp_path)
    sent = client.post("/v1/steer/artifacts", files={"file": ("kind.safetensors", heads.read_bytes())})
    assert sent.status_code == 201 and sent.json()["kind"] == "reward", sent.text
    body = {"name": "kindness", "file": "kind", "options": "how=worst"}
    assert client.post("/v1/steer/rewards", json=body).json()["usage"] == "kind:how=worst"
    for again in (client, http(engine, tmp_path)):
        for sampler in ({"sampler": "best-of-n", "candidates": 4}, {"sampler": "fk", "candidates": 4}):
            asked = {"model": "tiny", "messages": CHAT, "max_tokens": 4, "seed": 1, "temperature": 1}
            answer = again.post("/v1/chat/completions", json={**asked, "steer": {**sampler, "reward": "kindness"}})
            assert answer.status_code == 200, answer.text
            found = answer.json()["choices"][0]
            reward: Any = parse_reward(f"{heads}:how=worst").bind(tiny_lm)
            samples = Samples([CHAT], [found["message"]["content"]], torch.zeros(1).long(), torch.zeros(1))
            assert found["steer"]["reward"] == pytest.approx(float(reward(samples)[0]), abs=1e-3)
    wrong(steered(client, "kind"), 400, "steer.edits")
    for given, field in (
        ({"name": "x", "file": "absent"}, "file"),
        ({"name": "x", "file": "kind", "options": "how=best"}, "options"),
        ({"name": "x", "file": "kind", "reward": "length"}, "reward"),
        ({"name": "x", "reward": "length", "options": "how=worst"}, "options"),
    ):
        wrong(client.post("/v1/steer/rewards", json=given), 400, field)


def test_a_trained_reward_of_another_model_is_refused(engine: TransformersEngine, tmp_path: Path, heads: Path) -> None:
    """Its card cannot make the server load a model."""
    tensors, card = artifacts.load(heads)
    model = {**card.model, "name": "somebody/else", "fingerprint": "0"}
    artifacts.save(tmp_path / "alien.safetensors", tensors, replace(card, model=model))
    data = (tmp_path / "alien.safetensors").read_bytes()
    client = http(engine, tmp_path / "store")
    wrong(client.post("/v1/steer/artifacts", files={"file": ("a.safetensors", data)}), 400, "artifact", "fingerprint")


def test_a_trained_reward_beside_an_engine_without_states(heads: Path, tiny_lm: Any, tiny_lm_dir: Path) -> None:
    """Such as vLLM's: the served model's own name is what is loaded, not the card's."""
    served = type("Served", (), {"name": str(tiny_lm_dir), "info": tiny_lm.info})()
    reward: Any = parse_reward(str(heads)).bind(served)
    assert reward.trained_on["name"] == str(tiny_lm_dir)
    samples = Samples(["the sun"], ["good day"], torch.zeros(1).long(), torch.zeros(1))
    expected = parse_reward(str(heads)).bind(tiny_lm)(samples)  # type: ignore[attr-defined]
    assert torch.allclose(reward(samples), expected, atol=1e-5)


def test_a_reward_model_of_the_folder(engine: TransformersEngine, tmp_path: Path, tiny_reward_dir: Path) -> None:
    shutil.copytree(tiny_reward_dir, tmp_path / "judge")
    client = http(engine, tmp_path)
    made = client.post("/v1/steer/rewards", json={"name": "judged", "folder": "judge"})
    assert made.status_code == 201, made.text
    steer = {"sampler": "best-of-n", "candidates": 3, "reward": "judged"}
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 6, "seed": 1, "steer": steer}
    found = client.post("/v1/chat/completions", json=body).json()
    text, prompt = found["choices"][0]["message"]["content"], CHAT
    from steer.adapters.rewards.text import ModelReward

    samples = Samples(
        prompts=[prompt], outputs=[text], group=torch.zeros(1, dtype=torch.long), log_weight=torch.zeros(1)
    )
    assert found["steer"]["reward"] == pytest.approx(float(ModelReward(tiny_reward_dir)(samples)[0]), abs=1e-4)
    (tmp_path / "link").symlink_to(tiny_reward_dir)
    wrong(client.post("/v1/steer/rewards", json={"name": "linked", "folder": "link"}), 400, "folder")


# ------------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--host", "0.0.0.0"], "--no-key"),
        (["--api-key-env", "NOT_SET_HERE"], "api_key_env"),
        (["--engine", "magic"], "engine"),
        (["--port", "99999"], "port"),
        (["--max-choices", "0"], "choices"),
        (["--search-share", "1"], "search_share"),
        (["--engine-set", "max_model_len=512"], "engine_set"),
        (["--recipe", "particles"], "language model"),
        (["--recipe", "quickstart"], "steer run quickstart makes it"),
    ],
)
def test_the_command_checks_before_it_loads(
    arguments: list[str],
    word: str,
    tiny_lm_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("steer.cli.serving.start_engine", lambda *given: pytest.fail("the model was loaded"))
    assert main(["serve", "--model", str(tiny_lm_dir), *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_recipe_steers_who_asks_for_nothing(
    engine: TransformersEngine, tmp_path: Path, tiny_lm_dir: Path, tiny_lm: Any
) -> None:
    from steer.cli.serving import _from_recipe

    path = write_vector(tmp_path / "calm.safetensors", tiny_lm.info)
    settings = {
        "model": str(tiny_lm_dir),
        "prompt": "x",
        "edit": [f"{path}:0.7:layers=1"],
        "sampler": "best-of-n",
        "n": 3,
        "reward": "sentiment",
        "beta": 0.5,
    }
    (tmp_path / "calm.yaml").write_text(json.dumps({"command": "generate", "settings": settings}))
    default = _from_recipe(str(tmp_path / "calm.yaml"))
    client = http(engine, None, files=default.files, default=default.request)
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 8, "seed": 1}
    by_recipe = client.post("/v1/chat/completions", json=body).json()
    steer = {
        "edits": [{"name": "calm", "strength": 0.7, "layers": "1"}],
        "sampler": "best-of-n",
        "candidates": 3,
        "reward": "sentiment",
    }
    asked = client.post("/v1/chat/completions", json={**body, "steer": steer}).json()
    plain = client.post("/v1/chat/completions", json={**body, "steer": {}}).json()
    assert by_recipe["choices"] == asked["choices"] and by_recipe["steer"]["candidates"] == 3
    assert plain["choices"][0]["message"] != asked["choices"][0]["message"]

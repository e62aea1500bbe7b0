"""Several servers on one folder of artifacts: what one is sent, all know; what one forgets, all forget."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from serving_tools import CHAT, fleet, http, serving, serving_here, steered, write_vector

import steer
from steer import FKSteering
from steer.adapters.transformers.serving.engine import TransformersEngine
from steer.cli import main
from steer.core import InputError
from steer.serving import artifact_store
from steer.serving.artifact_store import Store, UnknownArtifactError, digest
from steer.serving.reward_store import Rewards, UnknownRewardError

BYTES = {"Content-Type": "application/octet-stream"}


def two(folder: Path) -> tuple[Store, Store]:
    return Store(folder, lambda path: None), Store(folder, lambda path: None)


def names(store: Store) -> set[str]:
    return {entry.name for entry in store.entries()}


# ------------------------------------------------------------------------------------------------------------- store


def test_what_one_store_is_sent_another_has(tmp_path: Path) -> None:
    first, second = (write_vector(tmp_path / f"{i}.safetensors", seed=i) for i in range(2))
    a, b = two(tmp_path / "store")
    told: list[str] = []
    b.changed = told.append
    sent = a.add("calm", first)
    assert b.get("calm").digest == sent.digest == digest(first) and told == ["calm"]
    assert b.get("calm") is b.get("calm") and told == ["calm"], "what has not changed is not read again"
    b.add("calm", second)
    assert a.get("calm").digest == digest(second)
    a.remove("calm")
    with pytest.raises(UnknownArtifactError):
        b.get("calm")
    assert told == ["calm", "calm", "calm"] and names(b) == set() and not b.has("calm")
    a.add("again", first)
    assert names(b) == {"again"} and names(Store(tmp_path / "store", lambda path: None)) == {"again"}


def test_files_that_a_person_changes(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    a, b = two(folder)
    write_vector(folder / "mine.safetensors", seed=1)
    assert a.get("mine").fixed and b.get("mine").fixed
    a.remove("mine")
    assert (folder / "mine.safetensors").is_file()
    for store in (a, b, Store(folder, lambda path: None)):
        with pytest.raises(UnknownArtifactError):
            store.get("mine")
    write_vector(folder / "mine.safetensors", seed=2)
    os.utime(folder / "mine.safetensors", (7, 7))
    assert b.get("mine").digest == a.get("mine").digest == digest(folder / "mine.safetensors")
    a.remove("mine")
    assert b.adopt("mine.safetensors").name == "mine" and a.get("mine").fixed
    (folder / "mine.safetensors").write_bytes(b"broken")
    for store in (a, b):
        with pytest.raises(UnknownArtifactError):
            store.get("mine")
        assert "mine.safetensors" in store.refused
    (folder / "mine.safetensors").unlink()
    assert names(a) == set()


def test_what_does_not_fit_this_model_is_no_name(tmp_path: Path) -> None:
    tried: list[Path] = []

    def never(path: Path) -> None:
        tried.append(path)
        raise InputError("artifact", path, "another model's")

    a, b = Store(tmp_path, lambda path: None), Store(tmp_path, never)
    a.add("calm", write_vector(tmp_path / "source"))
    for _ in range(3):
        with pytest.raises(UnknownArtifactError):
            b.get("calm")
    assert len(tried) == 1, "a file that was refused is not read again until it changes"


def test_many_register_at_once(tmp_path: Path) -> None:
    sources = [write_vector(tmp_path / f"{i}.safetensors", seed=i) for i in range(20)]
    stores = two(tmp_path / "store")
    errors: list[Exception] = []

    def send(i: int) -> None:
        try:
            stores[i % 2].add(f"own-{i}", sources[i])
            stores[i % 2].add("common", sources[i])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=send, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and names(stores[0]) == names(stores[1]) == {"common", *(f"own-{i}" for i in range(20))}
    assert stores[0].get("common").digest == stores[1].get("common").digest
    for i in range(20):
        assert stores[(i + 1) % 2].get(f"own-{i}").digest == digest(sources[i])
    assert not list((tmp_path / "store" / "registered").glob(".*"))


def test_another_server_sends_the_same_name_at_the_same_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a file's taking its place and the next step of the server that sent it."""
    first, second = (write_vector(tmp_path / f"{i}.safetensors", seed=i) for i in range(2))
    a, b = two(tmp_path / "store")
    put = os.replace

    def and_then(source: Path, final: Path) -> None:
        put(source, final)
        monkeypatch.undo()
        b.add("common", second)

    monkeypatch.setattr(os, "replace", and_then)
    a.add("common", first)
    assert a.get("common").digest == b.get("common").digest == digest(second)


def test_a_file_that_is_changed_while_it_is_adopted_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = two(tmp_path / "store")
    mine = write_vector(tmp_path / "store" / "mine.safetensors", seed=1)

    def and_then(path: Path) -> str:
        found = digest(path)
        monkeypatch.undo()
        write_vector(mine, seed=2)
        return found

    monkeypatch.setattr(artifact_store, "digest", and_then)
    a.adopt("mine.safetensors")
    assert a.get("mine").digest == b.get("mine").digest == digest(mine)


def test_room_is_counted_over_all_servers(tmp_path: Path) -> None:
    sources = [write_vector(tmp_path / f"{i}.safetensors", seed=i) for i in range(3)]
    a, b = (Store(tmp_path / "store", lambda path: None, limit=2) for _ in range(2))
    for i, source in enumerate(sources):
        (a, b)[i % 2].add(f"v{i}", source)
    assert names(a) == names(b) and len(names(a)) == 2 and "v2" in names(a)


def test_rewards_are_known_to_all(tmp_path: Path) -> None:
    a, b = Rewards(folder=tmp_path), Rewards(folder=tmp_path)
    a.add("terse", "2 * sentiment")
    b.add("both", "terse + sentiment")
    assert [e.name for e in a.registered()] == [e.name for e in b.registered()] == ["terse", "both"]
    assert str(a.parse("both + terse"))
    b.remove("both")
    a.remove("terse")
    with pytest.raises(UnknownRewardError):
        b.remove("terse")
    with pytest.raises(InputError, match=r"steer\.reward"):
        b.parse("terse")


# ------------------------------------------------------------------------------------------------------------ routes


@pytest.fixture(scope="module")
def engine(tiny_lm: Any) -> Iterator[TransformersEngine]:
    made = TransformersEngine(tiny_lm, name="tiny")
    yield made
    made.close()


def test_capabilities(engine: TransformersEngine, tmp_path: Path) -> None:
    found = http(engine, tmp_path / "store").get("/v1/steer/capabilities").json()
    assert found["version"] == steer.__version__ and found["engine"] == "transformers" and found["model"] == "tiny"
    assert "sentiment" in found["rewards"] and found["edits"] == ["controller", "reft", "stimulus", "value", "vector"]
    assert found["registering"] and found["shared"] and found["limits"]["choices"] == 32
    assert {"ancestral", "best-of-n", "fk"} <= found["samplers"].keys()
    fk = found["samplers"]["fk"]
    assert "potential" in fk and not {"keep_previews", "over_ranks", "n"} & set(fk), "what a request may set"
    client = http(engine, None)
    for setting, status in ((fk[0], 200), ("keep_previews", 400)):
        default = FKSteering.__dataclass_fields__[setting].default
        asked = {"sampler": "fk", "reward": "length", "candidates": 2, "settings": {setting: default}}
        body = {"model": "tiny", "messages": CHAT, "max_tokens": 2, "steer": asked}
        assert client.post("/v1/chat/completions", json=body).status_code == status, setting
    assert not http(engine, None).get("/v1/steer/capabilities").json()["registering"]


def test_a_server_is_ready_once_its_artifacts_are_there(engine: TransformersEngine, tmp_path: Path) -> None:
    client = http(engine, tmp_path / "store", require=["calm", "bright"])
    answer = client.get("/health")
    assert answer.status_code == 503 and answer.json() == {"status": "waiting", "waiting": ["calm", "bright"]}
    source = write_vector(tmp_path / "source.safetensors")
    other = Store(tmp_path / "store", lambda path: None)
    other.add("calm", source)
    assert client.get("/v1/steer/health").json()["waiting"] == ["bright"]
    other.add("bright", source)
    assert client.get("/health").status_code == 200
    with pytest.raises(InputError, match=r"name: got '\.\./x'"):
        http(engine, tmp_path / "store", require=["../x"])


def test_require_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "smollm2-135m", "--require", "calm", "--dry-run"]) == 2
    assert "require: got" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- servers


def test_two_servers_on_one_folder(tiny_lm_dir: Path, tmp_path: Path, tiny_lm: Any) -> None:
    """Two processes: this one, and another."""
    sources = [write_vector(tmp_path / f"{i}.safetensors", tiny_lm.info, seed=i) for i in range(2)]
    words = ("--name", "tiny", "--artifacts", tmp_path / "store")
    with ExitStack() as stack:
        here, there = (stack.enter_context(start(tiny_lm_dir, *words)) for start in (serving_here, serving))
        fleet((here, there), *sources)


@pytest.mark.slow
def test_a_server_that_starts_again_knows_what_was_sent_before(tiny_lm_dir: Path, tmp_path: Path, tiny_lm: Any) -> None:
    source = write_vector(tmp_path / "v.safetensors", tiny_lm.info)
    words = ("--name", "tiny", "--artifacts", tmp_path / "store")
    with serving(tiny_lm_dir, *words) as first:
        with serving(tiny_lm_dir, *words) as second:
            assert second.post("/v1/steer/artifacts?name=calm", content=source.read_bytes(), headers=BYTES).is_success
        wanted = steered(first, "calm").json()["choices"]
        with serving(tiny_lm_dir, *words, "--require", "calm") as again:
            assert steered(again, "calm").json()["choices"] == wanted

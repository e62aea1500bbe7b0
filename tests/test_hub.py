"""Artifacts on the hub, against a folder that stands for it: what is sent, what comes back, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

import steer
from steer.core import InputError, SteerError
from steer.edits import split_spec

PAIRS = [("a good dog", "a bad cat"), ("happy day", "sad day"), ("nice sun", "awful sun")]


class Hub:
    """The three calls that are made, on a folder; private repositories are remembered."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.private, self.revisions = folder, set[str](), list[str]()

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if repository.startswith("others/"):
            raise PermissionError("403 Forbidden: you are not others\n\nlong story")
        if not (self.folder / repository).exists() and private:
            self.private.add(repository)
        (self.folder / repository).mkdir(parents=True, exist_ok=True)

    def file_exists(self, repository: str, name: str) -> bool:
        return (self.folder / repository / name).is_file()

    def create_commit(self, repository: str, *, operations: Any, commit_message: str) -> None:
        for one in operations:
            content = one.path_or_fileobj
            data = content if isinstance(content, bytes) else io.BytesIO(content).read()
            (self.folder / repository / one.path_in_repo).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / repository / one.path_in_repo).write_bytes(data)

    def list_repo_files(self, repository: str, revision: str = "main") -> list[str]:
        return [str(p.relative_to(self.folder / repository)) for p in (self.folder / repository).rglob("*.*")]

    def fetch(self, repository: str, name: str, revision: str = "main") -> str:
        self.revisions.append(revision)
        if not self.file_exists(repository, name):
            raise OSError(f"404 Client Error: no {name} in {repository}\nmore")
        return str(self.folder / repository / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: made)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", made.fetch)
    return made


def test_what_was_pushed_is_the_same_edit(tiny_lm: Any, hub: Hub) -> None:
    calm = steer.train_vector(tiny_lm, PAIRS)
    address = calm.push("me/vectors", "calm.safetensors", private=True)
    assert address == "hf://me/vectors/calm.safetensors" and hub.private == {"me/vectors"}
    back = steer.load_artifact(address)
    assert back.card == calm.card and all(torch.equal(back.tensors[k], x) for k, x in calm.tensors.items())
    settings: dict[str, Any] = {"seed": 0, "max_new_tokens": 6}
    want = tiny_lm.generate("the sun", edits=calm(2.0, layers="1"), **settings).tokens
    for edit in (f"{address}:2.0:layers=1", steer.load_edit(address, 2.0, layers="1")):
        assert tiny_lm.generate("the sun", edits=edit, **settings).tokens == want
    page = hub.folder / "me/vectors/README.md"
    assert (
        "tags: [steer, vector]" in page.read_text() and address in page.read_text() and "vector for" in page.read_text()
    )
    page.write_text("mine")
    assert calm.push("me/vectors") == "hf://me/vectors/vector.safetensors" and page.read_text() == "mine"


def test_addresses_are_read_and_bad_ones_refused(hub: Hub) -> None:
    assert split_spec("hf://me/v/calm.safetensors:0.2:scope=from:3") == (
        "hf://me/v/calm.safetensors",
        0.2,
        {"scope": "from:3"},
    )
    for bad in ("hf://me", "hf://me/v@", "hf://me/v/../x.safetensors", "hf://me/v/x.bin", "hf://me//x.safetensors"):
        with pytest.raises(InputError, match="hf://ORG/NAME/FILE"):
            steer.load_edit(bad)
    with pytest.raises(InputError, match="is not a number"):
        split_spec("hf://me/v/calm.safetensors:much")
    with pytest.raises(SteerError, match="404 Client Error") as refused:
        steer.load_artifact("hf://me/v/calm.safetensors")
    assert "\n" not in str(refused.value)


def test_a_repository_stands_for_its_only_artifact_and_revisions_are_named(tiny_lm: Any, hub: Hub) -> None:
    calm = steer.train_vector(tiny_lm, PAIRS)
    calm.push("me/one", "calm.safetensors", figures="strength 0.15: reward 0.6")
    assert "reward 0.6" in (hub.folder / "me/one/README.md").read_text()
    assert steer.load_artifact("hf://me/one").card == calm.card == steer.load_artifact("hf://me/one@v1.0").card
    assert steer.load_edit("hf://me/one/calm.safetensors@abc123", 0.1).strength == 0.1
    assert hub.revisions == ["main", "v1.0", "abc123"]
    assert split_spec("hf://me/one@v1:0.2") == ("hf://me/one@v1", 0.2, {})
    calm.push("me/one", "other.safetensors")
    with pytest.raises(InputError, match=r"calm\.safetensors, other\.safetensors"):
        steer.load_artifact("hf://me/one")


def test_what_the_hub_refuses_is_one_line(tiny_lm: Any, hub: Hub) -> None:
    calm = steer.train_vector(tiny_lm, PAIRS)
    with pytest.raises(SteerError, match=r"push hf://others/v/vector\.safetensors: 403 Forbidden") as refused:
        calm.push("others/v")
    assert "\n" not in str(refused.value)
    for repository, name in (("nowhere", None), ("me/v", "calm.pt"), ("me/v", "../calm.safetensors")):
        with pytest.raises(InputError, match="push"):
            calm.push(repository, name)

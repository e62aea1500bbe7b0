"""Artifacts on the Hugging Face hub: `hf://ORG/NAME/FILE` to read one, and a commit with its card to share one."""

from __future__ import annotations

import re
from pathlib import Path

from steer.core import SteerError, check
from steer.core.errors import first_line

__all__ = ["PREFIX", "download", "upload"]

PREFIX = "hf://"
_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
_ADDRESS = re.compile(rf"({_PART}/{_PART})/({_PART}(?:/{_PART})*\.(?:safetensors|gguf))", re.ASCII)
_ALLOWED = "hf://ORG/NAME/FILE.safetensors, or .gguf"


def download(address: str) -> Path:
    """The file of an address, from the hub's own cache where it is there. Raises `InputError` and `SteerError`."""
    found = _ADDRESS.fullmatch(address.removeprefix(PREFIX))
    check(found is not None, "artifact", address, _ALLOWED)
    assert found is not None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(found[1], found[2]))
    except Exception as error:  # offline, no such repository, no access: which one, the message says
        raise SteerError(f"artifact {address}: {first_line(error)}") from error


def upload(repository: str, name: str, data: bytes, card: str, private: bool) -> str:
    """Put a file and its card into a repository of models, which is made where it is not there; the file's address.
    A README that is there is kept. Raises `InputError` and `SteerError`.
    """
    address = f"{PREFIX}{repository}/{name}"
    check(_ADDRESS.fullmatch(f"{repository}/{name}") is not None, "push", address, _ALLOWED)
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        files = {name: data}
        if not hub.file_exists(repository, "README.md"):
            files["README.md"] = _page(address, card).encode()
        operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in files.items()]
        hub.create_commit(repository, operations=operations, commit_message=f"{name}, by steer")
    except Exception as error:  # offline, no token, no access: which one, the message says
        raise SteerError(f"push {address}: {first_line(error)}") from error
    return address


def _page(address: str, card: str) -> str:
    used = f'model.generate("Hello", edits="{address}:0.15")'
    return f"---\ntags: [steer]\n---\n\n```\n{card}\n```\n\n```python\nimport steer\n\n{used}\n```\n"

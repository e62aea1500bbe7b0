"""Artifacts on the Hugging Face hub: `hf://ORG/NAME[/FILE][@REVISION]` to read one, and a commit with its card to share
one. Another hub than the public one is what huggingface_hub takes from `HF_ENDPOINT`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer.core import InputError, SteerError, check
from steer.core.errors import first_line
from steer.core.names import nearby

__all__ = ["PREFIX", "address_of", "download", "has_file", "is_cached", "model_page", "upload"]

PREFIX = "hf://"
_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
_SUFFIXES = (".safetensors", ".gguf")
_FILE = rf"{_PART}(?:/{_PART})*\.(?:safetensors|gguf)"
_ADDRESS = re.compile(rf"({_PART}/{_PART})(?:/({_FILE}))?(?:@([A-Za-z0-9][\w./-]{{0,95}}))?", re.ASCII)
_ALLOWED = "hf://ORG/NAME/FILE.safetensors, or .gguf; @REVISION behind it; without a file the repository's only one"


def is_cached(repository: str, name: str) -> bool:
    """Whether a file of a repository is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, name), str)


def has_file(repository: str, name: str) -> bool:
    """Whether a repository of models has a file; the hub is asked what no cache knows. Raises `SteerError` where it
    cannot be reached: whoever loads the model would find out anew, after many tries.
    """
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if is_cached(repository, name):
        return True
    try:
        return file_exists(repository, name)
    except (HfHubHTTPError, HFValidationError):  # no such model, no access: loading it says which
        return False
    except Exception as error:
        reason = f"no such folder, not in the cache, and the hub cannot be reached ({first_line(error)})"
        raise SteerError(f"model: could not load {repository!r}: {reason}{nearby(repository)}") from error


def download(address: str) -> Path:
    """The file of an address, from the hub's own cache where it is there. Raises `InputError` and `SteerError`."""
    found = _ADDRESS.fullmatch(address.removeprefix(PREFIX))
    check(found is not None, "artifact", address, _ALLOWED)
    assert found is not None
    from huggingface_hub import hf_hub_download

    at: dict[str, Any] = {} if found[3] is None else {"revision": found[3]}
    try:
        return Path(hf_hub_download(found[1], found[2] or _only_file(address, found[1], at), **at))
    except InputError:
        raise
    except Exception as error:  # offline, no such repository, no access: which one, the message says
        raise SteerError(f"artifact {address}: {first_line(error)}") from error


def _only_file(address: str, repository: str, at: Mapping[str, Any]) -> str:
    """The artifact of a repository that has one. Raises `InputError` where it has none or several."""
    from huggingface_hub import HfApi

    files = [name for name in HfApi().list_repo_files(repository, **at) if name.endswith(_SUFFIXES)]
    told = ", ".join(sorted(files)) or "none that ends in .safetensors or .gguf"
    check(len(files) == 1, "artifact", address, f"{PREFIX}ORG/NAME/FILE with a file of the repository: {told}")
    return files[0]


def upload(repository: str, name: str, data: bytes, page: str, private: bool) -> str:
    """Put a file and a page about it into a repository of models, which is made where it is not there; the file's
    address. A README that is there is kept. Raises `InputError` and `SteerError`.
    """
    address = address_of(repository, name)
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        files = {name: data}
        if not hub.file_exists(repository, "README.md"):
            files["README.md"] = page.encode()
        operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in files.items()]
        hub.create_commit(repository, operations=operations, commit_message=f"{name}, by steer")
    except Exception as error:  # offline, no token, no access: which one, the message says
        raise SteerError(f"push {address}: {first_line(error)}") from error
    return address


def address_of(repository: str, name: str) -> str:
    """The address of a file in a repository. Raises `InputError` for names that are none."""
    address = f"{PREFIX}{repository}/{name}"
    found = _ADDRESS.fullmatch(f"{repository}/{name}")
    check(found is not None and found[2] is not None and found[3] is None, "push", address, _ALLOWED)
    return address


def model_page(address: str, card: str, kind: str, base: str, figures: str = "") -> str:
    """A README for a repository: tags, the base model where it is one of the hub's, the card, figures of a sweep as
    plain text, and how the artifact is used.
    """
    on_hub = re.fullmatch(rf"{_PART}/{_PART}", base, re.ASCII) is not None
    head = ["---", "library_name: steer", f"tags: [steer, {kind}]", *([f"base_model: {base}"] if on_hub else []), "---"]
    model = f'model = steer.load("{base}")'
    used = f'model.generate("Hello", edits="{address}:0.15")'
    parts = ["\n".join(head), f"```\n{card}\n```"]
    parts += [f"Measured by `steer eval strength`:\n\n```\n{figures}\n```"] if figures else []
    parts += [
        f"```python\nimport steer\n\n{model}\n{used}\n```",
        f"    steer generate --model {base} --edit {address}:0.15",
    ]
    return "\n\n".join(parts) + "\n"

"""PEFT adapters in folders and repositories of their own, and the model that each names as its base."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from steer.adapters.transformers.checkpoint import check_adapter
from steer.core import SteerError

__all__ = ["Adapter", "find_adapter"]

_CONFIG, _NETWORK, _TOKENIZER = "adapter_config.json", "config.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter at `where`, tuned from the model `base`."""

    where: str
    base: str

    def open(self, network: Any) -> Any:
        """The network with the adapter, which is put into it. Raises `SteerError`."""
        try:
            from peft import PeftModel
        except ImportError as error:
            raise SteerError(f"model: {self.where} is a PEFT adapter: pip install 'steer-engine[train]'") from error
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*missing adapter keys")
                return PeftModel.from_pretrained(network, self.where)
        except Exception as error:  # of PEFT's many kinds of adapters, each with complaints of its own
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise SteerError(f"model: could not put {self.where!r} into {self.base!r}: {said}") from error

    def tokenizer(self) -> Any:
        """The adapter's own tokenizer, or None where it brings none."""
        return AutoTokenizer.from_pretrained(self.where) if _file(self.where, _TOKENIZER) else None


def find_adapter(model: str | Path) -> Adapter | None:
    """What a folder or a repository without a network of its own holds; None where it is no adapter.

    Raises:
        SteerError: the adapter names no base.
        UnsupportedError: it acts on some tokens of a text alone.
    """
    where = str(model)
    file = None if _file(where, _NETWORK) else _file(where, _CONFIG)
    if file is None:
        return None
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise SteerError(f"model: {where} is a PEFT adapter that names no base: base_model_name_or_path is {base!r}")
    check_adapter(config, where)
    return Adapter(where, str(base))


def _file(where: str, name: str) -> str | None:
    """Where a file of a folder or a repository lies, or None."""
    if Path(where).exists():
        path = Path(where) / name
        return str(path) if path.is_file() else None
    try:
        found = cached_file(
            where, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    except OSError:  # no such repository, or no access: loading it says which
        return None
    return None if found is None else str(found)

"""Loading of any model: the only module that knows all engines."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from steer.core import SteerError, check
from steer.embedded import CARD_NAME, resolve
from steer.hub import has_file, is_cached
from steer.methods.prompt import policies_from
from steer.rewards.heads import models_from

if TYPE_CHECKING:
    from steer.adapters.diffusers import DiffusionModel
    from steer.adapters.openai import EndpointModel
    from steer.adapters.transformers import LanguageModel
    from steer.adapters.transformers.masked import MaskedLanguageModel
    from steer.adapters.vllm import VLLMModel

_ENDPOINT = "openai:"


_ENGINES = ("transformers", "vllm")


_KINDS = ("text", "masked", "images", "endpoint")


@overload
def load(
    model: Literal["fashion-ddpm"], *, engine: Literal["transformers"] = ..., kind: None = ..., **options: Any
) -> DiffusionModel: ...
@overload
def load(
    model: Any, *, engine: Literal["transformers"] = ..., kind: Literal["images"], **options: Any
) -> DiffusionModel: ...
@overload
def load(
    model: Any, *, engine: Literal["transformers"] = ..., kind: Literal["endpoint"], **options: Any
) -> EndpointModel: ...
@overload
def load(
    model: Any, *, engine: Literal["transformers"] = ..., kind: Literal["masked"], **options: Any
) -> MaskedLanguageModel: ...
@overload
def load(model: Any, *, engine: Literal["vllm"], kind: Literal["text"] | None = ..., **options: Any) -> VLLMModel: ...
@overload
def load(
    model: Any, *, engine: Literal["transformers"] = ..., kind: Literal["text"] | None = ..., **options: Any
) -> LanguageModel: ...
def load(model: Any, *, engine: str = "transformers", kind: str | None = None, **options: Any) -> Any:
    """A model ready to be steered: an embedded name (`smollm2-135m`, `fashion-ddpm`), a Hugging Face id, a local
    folder, a GGUF file, a network or pipeline in memory, or a model behind an OpenAI-compatible endpoint
    (`openai:http://host/v1#name`).

    A `.yaml` file describes several models behind a router (see `steer.routing.files.read_pool`).

    Folders and ids of masked language models (BERT's kin and masked diffusion models) open as denoisers of text; see
    `steer.adapters.transformers.masked`.

    `engine` is what runs a language model: `transformers`, or `vllm` (see `steer.adapters.vllm.load`). `kind` is
    "text", "masked", "images" or "endpoint", where one of them is wanted and any other refused; a type checker, which
    cannot look into a folder, takes a name without it for a language model's. `options` go to the adapter: `dtype`,
    `device`, `device_map`, `trust_remote_code` (off), and the library's own; of language models through transformers
    also `check` (on: a few tokens are tried against the library), `partial_weights` (off) and `context_length`. Raises
    `InputError`, and `SteerError` where nothing can be loaded.
    """
    check(engine in _ENGINES, "engine", engine, ", ".join(_ENGINES))
    if isinstance(model, str | Path) and str(model).endswith((".yaml", ".yml")):
        from steer.routing.files import read_pool

        given: dict[str, Any] = {"engine": engine, **options}
        return read_pool(model, lambda name: load(name) if is_endpoint(name) else load(name, **given))
    check(kind is None or kind in _KINDS, "kind", kind, ", ".join(_KINDS))
    found = _kind(model)
    check(kind in (None, found), "kind", kind, f"{found}, which {model!r:.80} is")
    if engine == "vllm":
        named = isinstance(model, str | Path) and found == "text"
        check(named, "model", model, "with engine=vllm, a language model's name or folder")
        from steer.adapters import vllm

        return vllm.load(model, **options)
    if found == "endpoint":
        from steer.adapters import openai

        return openai.load(str(model).removeprefix(_ENDPOINT), **options)
    where = _where(model)
    if isinstance(model, str | Path):
        options.setdefault("name", str(model))
    if found == "images":
        from steer.adapters import diffusers

        return diffusers.load(where, **options)
    if found == "masked":
        from steer.adapters.transformers import masked

        return masked.load(where, **options)
    from steer.adapters import transformers

    made = transformers.load(where, **options)
    made.rows_engine = partial(_rows_engine, made)
    return made


def _rows_engine(model: LanguageModel, rows: int) -> Any:
    from steer.adapters.transformers.serving.engine import TransformersEngine

    return TransformersEngine(model, max_rows=rows, cache_tokens=1 << 30)


def _kind(model: Any) -> str:
    """Which of `_KINDS` a model is."""
    if is_endpoint(model):
        return "endpoint"
    where = _where(model)
    return "images" if is_diffusion(where) else "masked" if is_masked(where) else "text"


def _where(model: Any) -> Any:
    """Where a named model lies; what is in memory is itself."""
    return resolve(str(model)) if isinstance(model, str | Path) else model


def is_endpoint(model: Any) -> bool:
    """Whether a name stands for a model behind an OpenAI-compatible endpoint."""
    return isinstance(model, str) and model.startswith(_ENDPOINT)


def is_diffusion(where: Any) -> bool:
    """Whether a path, a Hugging Face id or an object belongs to diffusers. Asks the hub only what no cache knows."""
    if isinstance(where, Path):
        card = where / CARD_NAME
        if card.is_file() and json.loads(card.read_text(encoding="utf-8")).get("kind") == "diffusion":
            return True
        return (where / "model_index.json").is_file()
    if not isinstance(where, str):
        return any(kind.__module__.split(".")[0] == "diffusers" for kind in type(where).__mro__)
    if not is_cached(where, "model_index.json") and is_cached(where, "config.json"):
        return False
    return has_file(where, "model_index.json")


def is_masked(where: Any) -> bool:
    """Whether a path, a Hugging Face id or a network is a masked language model, by its class or its configuration.
    Raises `SteerError` for kinds that would run as something else than they are.
    """
    if not isinstance(where, str | Path):
        return type(where).__name__.endswith("ForMaskedLM")
    config = _config(where)
    kind = str(config.get("model_type", ""))
    if kind.lower() in _FOREIGN:
        raise SteerError(f"model {where}: {kind} models denoise text in a way of their own, which steer does not run")
    named = [*(config.get("architectures") or []), *(config.get("auto_map") or {})]
    return any("MaskedLM" in name for name in named) and not any("CausalLM" in name for name in named)


_FOREIGN = ("dream", "llada", "llada_moe")
"""Masked diffusion models whose checkpoints open as causal models, which they are not."""


def _config(where: str | Path) -> dict[str, Any]:
    """The configuration in a folder or on the hub; empty where there is none, and loading says why."""
    path = Path(where) / "config.json"
    try:
        if not path.is_file() and isinstance(where, str):
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(where, "config.json"))
        found = json.loads(path.read_text(encoding="utf-8"))
    except Exception:  # offline, no such model, no access
        return {}
    return found if isinstance(found, dict) else {}


def _hints(folder: str) -> Any:
    from steer.adapters.transformers.policy.hints import load_hints

    return load_hints(folder)


models_from(load)
policies_from(_hints)

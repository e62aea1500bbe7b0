"""Language models through vLLM: an engine in this process, or behind it, with the plug-in turned on."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.adapters.language.decoding import Decoding
from steer.adapters.language.generation import own_settings
from steer.adapters.language.model import TextModel
from steer.adapters.vllm.artifacts import PackedArtifact, Source, digest_of, read_artifact
from steer.adapters.vllm.client import Blocking, Client
from steer.adapters.vllm.plugin.compiled import Compiled
from steer.adapters.vllm.process import Named, VLLMProcess, scored_early
from steer.adapters.vllm.settings import check_version, need
from steer.artifacts import Card
from steer.core import Edit, HiddenEdit, InputError, ModelInfo, Samples, SteerError, UnsupportedError, check
from steer.core.errors import first_line
from steer.model import Plan, execute
from steer.serving.wire import EditRequest

__all__ = ["VLLMModel", "load"]


def load(
    model: str | Path, *, name: str | None = None, steer: dict[str, Any] | None = None, **engine: Any
) -> VLLMModel:
    """A model in vLLM: an embedded name, a Hugging Face id or a local folder.

    `steer` are the plug-in's settings (see `steer.adapters.vllm.settings.Settings`), `engine` those of `vllm.LLM`,
    such as `dtype`, `max_model_len`, `enforce_eager`, `tensor_parallel_size`. Raises `SteerError` where vLLM is missing
    or of another version than those that steer knows.
    """
    check_version()
    from vllm import LLM

    from steer.adapters.vllm.plugin.install import register
    from steer.embedded import resolve

    register()
    extra = {**engine.pop("additional_config", {}), "steer": {**(steer or {})}}
    engine.setdefault("logprobs_mode", "processed_logprobs")  # of the law that is really drawn from
    with load_errors(model):
        llm = LLM(model=str(resolve(str(model))), additional_config=extra, **engine)
    return VLLMModel(Blocking(llm), name or str(model))


@contextmanager
def load_errors(model: str | Path) -> Iterator[None]:
    """What vLLM says of a model or a setting that it refuses, as one line of a `SteerError`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise SteerError(f"model: vLLM could not load {str(model)!r}: {first_line(error)}") from error


class VLLMModel(TextModel):
    """A vLLM engine with steering, which generates as `LanguageModel` does.

    All rows of a request go to the engine at once, which batches them as its own limits allow. Rewards that stand alone
    are computed as texts are completed, in another thread. Edits may also be those of `edit`. Samplers that choose
    between unfinished texts need `block`, the tokens of a step.
    """

    max_rows = 4096

    def __init__(self, client: Client, name: str) -> None:
        super().__init__(client.tokenizer, name)
        self.client, self.config, self.front = client, client.config, client.front
        self._packed: dict[int, tuple[Edit, str]] = {}
        self._registering = threading.RLock()
        self._held: Counter[str] = Counter()
        self._holding = threading.Lock()
        self.client.introduce(norms=False)

    @property
    def llm(self) -> Any:
        """The `vllm.LLM`. Raises `UnsupportedError` where the engine is not in this process's hands."""
        if not isinstance(self.client, Blocking):
            raise UnsupportedError("this engine is asynchronous: it has no vllm.LLM")
        return self.client.llm

    def through(self, client: Client) -> VLLMModel:
        """The same model, whose requests go through another client of the engine."""
        other = copy(self)
        other.client = client
        return other

    @property
    def info(self) -> ModelInfo:
        """Facts; the residual stream's norms are measured when they are first asked for."""
        return replace(self.front.info, residual_norms=self._residual_norms)

    def _residual_norms(self) -> Tensor:
        with self._registering:
            self.client.introduce(norms=True)
        return self.front.info.residual_norms()

    @property
    def context_length(self) -> int:
        return int(self.config.model_config.max_model_len)

    @property
    def vocabulary(self) -> int:
        return int(self.config.model_config.get_vocab_size())

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        given = self.config.model_config.try_get_generation_config().get("eos_token_id")
        given = self.tokenizer.eos_token_id if given is None else given
        return () if given is None else tuple(given) if isinstance(given, list | tuple) else (int(given),)

    @property
    def own_settings(self) -> dict[str, Any]:
        return own_settings(self.config.model_config.try_get_generation_config())

    # ---- artifacts

    def register(self, name: str, artifact: Source, *, model_check: str = "same") -> str:
        """Make an artifact known to the engine as `name`, in place of what had that name; returns the digest of
        its content. `model_check="any"` takes an artifact of a model with another fingerprint. Raises `InputError`.
        """
        check(model_check in ("same", "any"), "model", model_check, "same, any")
        data = read_artifact(artifact)
        return self._register(name, data, model_check == "any")

    def _register(self, name: str, data: bytes, any_model: bool) -> str:
        with self._registering:
            return self.client.register(name, data, any_model, self._used())

    def unregister(self, name: str) -> None:
        """Forget a name. Raises `InputError`."""
        with self._registering:
            self.client.remove(name, self._used())

    def inspect(self, artifact: Source) -> Edit:
        """The edit that an artifact would be under its own settings; nothing is registered. Raises `InputError` where
        it does not fit the model or the engine.
        """
        data = read_artifact(artifact)
        kind = PackedArtifact.parse(data).card.kind
        with self._registering:
            self.client.introduce(norms=kind != "value")
            admitted, _ = self.front.admit("inspected", data, False, self._used())
        edit = admitted.edit(self.info, {})
        if isinstance(edit, HiddenEdit):
            layers = {layer for layer, _ in Compiled.of(edit, self.info).operators}
            need(self.front.settings, reads=edit.reads, layers=tuple(layers))
        return edit

    def card(self, name: str) -> Card:
        """The card of a registered artifact."""
        return self.front.artifacts[self.front.names[name]].card

    def hold(self, artifacts: Mapping[str, Source]) -> None:
        """Have files registered under these names, and keep them until `release`: they make no room for others."""
        with self._registering:
            with self._holding:
                self._held.update(artifacts.keys())
            try:
                for name, path in artifacts.items():
                    if name not in self.front.names:
                        self.register(name, path)
            except BaseException:
                self.release(artifacts)
                raise

    def hold_now(self, artifacts: Mapping[str, Source]) -> bool:
        """Hold them without waiting; False, and nothing held, where one is missing or somebody registers."""
        if not self._registering.acquire(blocking=False):
            return False
        try:
            there = all(name in self.front.names for name in artifacts)
            if there:
                with self._holding:
                    self._held.update(artifacts.keys())
            return there
        finally:
            self._registering.release()

    def release(self, artifacts: Mapping[str, Source]) -> None:
        """Undo one `hold`."""
        with self._holding:
            self._held.subtract(artifacts.keys())
            self._held += Counter()

    def _used(self) -> set[str]:
        """Digests of artifacts that must stay."""
        with self._holding:
            held = list(self._held)
        return self.client.used() | {self.front.names[name] for name in held if name in self.front.names}

    @property
    def registered(self) -> dict[str, str]:
        """Digests by name."""
        return dict(self.front.names)

    def edit(self, name: str, strength: float | None = None, **settings: Any) -> Named:
        """A registered artifact as an edit, with `settings` of `steer.wire.EditRequest`."""
        named = Named(EditRequest.parse({"name": name, "strength": strength, **settings}))
        named.check(self.front)
        return named

    def name_of(self, edit: Edit) -> str:
        """The name under which an edit object is registered; it is registered on first use."""
        held = self._packed.get(id(edit))
        if held is not None and held[0] is edit and held[1] in self.front.names:
            return held[1]
        data = read_artifact(edit)
        name = f"edit-{digest_of(data)}"
        if name not in self.front.names:
            self._register(name, data, False)
        if len(self._packed) > 1024:
            self._packed.clear()
        self._packed[id(edit)] = (edit, name)
        return name

    # ---- generation

    def process(self, *, generation_config: Any = None, block: int | None = None, **settings: Any) -> VLLMProcess:
        """The model as a `Process` whose step is `block` tokens (default: the whole text)."""
        decoding = Decoding.create(generation_config, self.own_settings, **settings)
        return VLLMProcess(self, decoding, block=block or decoding.max_new_tokens)

    def run(self, plan: Plan) -> Samples:
        with scored_early(plan) as early:
            return execute(early)

    def close(self) -> None:
        """Shut the engine down."""
        self.client.close()

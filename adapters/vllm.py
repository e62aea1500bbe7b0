"""Language models through vLLM: an engine in this process, or behind it, with the plug-in turned on."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.adapters import _vllm_admin as admin
from steer.adapters._vllm_artifacts import Artifact, read_artifact
from steer.adapters._vllm_client import Blocking, Client
from steer.adapters._vllm_process import Named, VLLMProcess, scored_early
from steer.adapters._vllm_rows import Compiled
from steer.adapters._vllm_settings import check_version, need
from steer.adapters.decoding import Decoding
from steer.adapters.transformers import LanguageModel
from steer.artifacts import Card
from steer.core import (
    Edit,
    HiddenEdit,
    InputError,
    ModelInfo,
    Prompt,
    Reward,
    Sampler,
    Samples,
    SteerError,
    UnsupportedError,
    check,
)
from steer.wire import EditRequest

__all__ = ["VLLMModel", "VLLMProcess", "load"]


def load(
    model: str | Path, *, name: str | None = None, steer: dict[str, Any] | None = None, **engine: Any
) -> VLLMModel:
    """A model in vLLM: an embedded name, a Hugging Face id or a local folder.

    `steer` are the plug-in's settings (see `steer.adapters._vllm_settings.Settings`), `engine` those of `vllm.LLM`,
    such as `dtype`, `max_model_len`, `enforce_eager`, `tensor_parallel_size`. Raises `SteerError` where vLLM is missing
    or of another version than those that steer knows.
    """
    check_version()
    from vllm import LLM

    from steer.adapters.vllm_plugin import register
    from steer.models import resolve

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
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SteerError(f"model: vLLM could not load {str(model)!r}: {first}") from error


class _Words(LanguageModel):
    """The text side of a language model, without its network."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self._tokens = lru_cache(4096)(self._tokenised)


class VLLMModel:
    """A vLLM engine with steering, which generates as `LanguageModel` does."""

    def __init__(self, client: Client, name: str) -> None:
        self.client, self.name = client, name
        self.config, self.tokenizer, self.front = client.config, client.tokenizer, client.front
        self.words = _Words(self.tokenizer, name)
        self._packed: dict[int, tuple[Edit, str]] = {}
        self._registering = threading.RLock()
        self._held: Counter[str] = Counter()
        self._holding = threading.Lock()
        self._carry_out(admin.introducing(self.front, self.config, norms=False))

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

    def _carry_out(self, steps: admin.Steps) -> Any:
        with self._registering:
            return admin.run(steps, self.client)

    @property
    def info(self) -> ModelInfo:
        return self.front.info

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

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, as `LanguageModel.encode` gives them."""
        return self.words.encode(prompt)

    def decode(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
        """Text of generated tokens, cut before the first stop string."""
        return self.words.decode(tokens, stop)

    def show(self, prompt: Prompt) -> Any:
        """The prompt as it appears in results."""
        return self.words.show(prompt)

    # ---- artifacts

    def register(self, name: str, artifact: str | Path | Edit, *, model_check: str = "same") -> str:
        """Make a file or an edit known to the engine as `name`, in place of what had that name; returns the digest of
        its content. `model_check="any"` takes an artifact of a model with another fingerprint. Raises `InputError`.
        """
        check(model_check in ("same", "any"), "model", model_check, "same, any")
        data = read_artifact(artifact)
        return self._register(name, data, model_check == "any")

    def _register(self, name: str, data: bytes, any_model: bool) -> str:
        return str(self._carry_out(admin.registering(self.front, self.config, name, data, any_model, self._used)))

    def unregister(self, name: str) -> None:
        """Forget a name. Raises `InputError`."""
        self._carry_out(admin.removing(self.front, name, self._used))

    def inspect(self, artifact: str | Path | Edit) -> Edit:
        """The edit that an artifact would be under its own settings; nothing is registered. Raises `InputError` where
        it does not fit the model or the engine.
        """
        data = read_artifact(artifact)
        kind = Artifact.parse(data).card.kind
        self._carry_out(admin.introducing(self.front, self.config, norms=kind != "value"))
        with self._registering:
            admitted, _ = self.front.admit("inspected", data, False, self._used())
        edit = admitted.edit(self.info, {})
        if isinstance(edit, HiddenEdit):
            layers = {layer for layer, _ in Compiled.of(edit, self.info).operators}
            need(self.front.settings, reads=edit.reads, layers=tuple(layers))
        return edit

    def card(self, name: str) -> Card:
        """The card of a registered artifact."""
        return self.front.artifacts[self.front.names[name]].card

    def hold(self, artifacts: Mapping[str, Path]) -> None:
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

    def hold_now(self, artifacts: Mapping[str, Path]) -> bool:
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

    def release(self, artifacts: Mapping[str, Path]) -> None:
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
        named = Named(EditRequest(name=name, strength=strength, **settings))
        named.check(self.front)
        return named

    def name_of(self, edit: Edit) -> str:
        """The name under which an edit object is registered; it is registered on first use."""
        held = self._packed.get(id(edit))
        if held is not None and held[0] is edit and held[1] in self.front.names:
            return held[1]
        data = read_artifact(edit)
        name = f"edit-{admin.digest(data)}"
        if name not in self.front.names:
            self._register(name, data, False)
        if len(self._packed) > 1024:
            self._packed.clear()
        self._packed[id(edit)] = (edit, name)
        return name

    # ---- generation

    def process(self, *, config: Any = None, block: int | None = None, **settings: Any) -> VLLMProcess:
        """The model as a `Process` whose step is `block` tokens (default: the whole text)."""
        decoding = Decoding.create(config, **settings)
        return VLLMProcess(self, decoding, block=block or decoding.max_new_tokens)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        edits: Any = (),
        sampler: Sampler | str | None = None,
        reward: Reward | str | Callable[..., Any] | None = None,
        beta: float = 1.0,
        n: int | None = None,
        seed: int | None = None,
        max_rows: int = 4096,
        block: int | None = None,
        generation_config: Any = None,
        progress: bool = False,
        **decoding: Any,
    ) -> Samples:
        """Generate for every prompt, as `steer.generate` describes. Edits may also be those of `edit`.

        All rows go to the engine at once, which batches them as its own limits allow. Rewards that stand alone are
        computed as texts are completed, in another thread. Samplers that choose between unfinished texts need `block`,
        the tokens of a step.
        """
        from steer import engine

        process = self.process(config=generation_config, block=block, **decoding)
        plan = engine.prepare(
            process, prompts, edits=edits, sampler=sampler, reward=reward, beta=beta, n=n, seed=seed,
            max_rows=max_rows, progress=progress, model=self,
        )  # fmt: skip
        with scored_early(plan) as early:
            return engine.execute(early)

    def log_likelihood(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Summed log-probability `[N]` of each output after its prompt under the unedited model at temperature 1, and
        the number of its tokens `[N]`.
        """
        tokens = samples.tokens or [
            list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in samples.texts
        ]
        process = self.process(max_new_tokens=max(1, max(len(t) for t in tokens)))
        total = process.log_likelihood(samples.prompts, samples.group, tokens)
        return total, torch.tensor([len(t) for t in tokens], dtype=torch.float64)

    def close(self) -> None:
        """Shut the engine down."""
        self.client.close()

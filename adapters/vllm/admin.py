"""Registering artifacts with a running engine.

The steps are a generator that says which calls it wants; `run` makes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steer.adapters.language.facts import CALIBRATION
from steer.adapters.vllm.artifacts import Artifact
from steer.adapters.vllm.client import Client
from steer.adapters.vllm.plugin.registry import FrontEnd
from steer.adapters.vllm.plugin.requests import Inside
from steer.adapters.vllm.settings import model_info
from steer.core import ModelInfo

__all__ = ["digest", "introducing", "registering", "removing", "run"]


@dataclass(frozen=True)
class Rpc:
    """A call of a method on every worker; answered by the list of what they return."""

    method: str
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Read:
    """Texts that the engine is to read while it measures."""

    texts: tuple[str, ...]


Steps = Generator[Rpc | Read, Any, Any]


def introducing(front: FrontEnd, config: Any, norms: bool) -> Steps:
    """Find the model's fingerprint and, with `norms`, the residual stream's norms; afterwards `front.info` has them."""
    if not front.info.fingerprint:
        found = yield Rpc("steer_facts")
        front.info = model_info(config, _fingerprint(front.info, found), None)
        yield Rpc("steer_introduce", (front.info.fingerprint, None))
    if norms and not front.measured:
        front.measured = True
        yield Rpc("steer_measure", (True,))
        yield Read(CALIBRATION)
        seen = yield Rpc("steer_measure", (False,))
        values = _norms(seen, front.info.num_layers)
        front.info = model_info(config, front.info.fingerprint, None if values is None else torch.tensor(values))
        yield Rpc("steer_introduce", (front.info.fingerprint, values))


def registering(
    front: FrontEnd, config: Any, name: str, data: bytes, any_model: bool, used: Callable[[], set[str]]
) -> Steps:
    """Register `data` (see `Artifact.parse`) under `name`; returns its digest. Raises `InputError`."""
    kind = Artifact.parse(data).card.kind
    yield from introducing(front, config, norms=kind != "value")
    artifact, gone = front.admit(name, data, any_model, used())
    if artifact.digest not in front.artifacts:
        yield Rpc("steer_register", (artifact.digest, data, any_model))
    if gone:
        yield Rpc("steer_evict", (gone,))
    front.add(name, artifact, gone)
    return artifact.digest


def removing(front: FrontEnd, name: str, used: Callable[[], set[str]]) -> Steps:
    """Forget a name. Raises `InputError`."""
    gone = front.remove(name, used())
    if gone:
        yield Rpc("steer_evict", (gone,))


def _fingerprint(info: ModelInfo, parts: Sequence[dict[str, Any]]) -> str:
    """As the transformers adapter computes it, so that an artifact of one fits the other."""
    sample = dict(sorted({i: v for part in parts for i, v in zip(part["index"], part["value"], strict=True)}.items()))
    facts = [info.model_type, info.num_layers, info.width, *parts[0]["shape"]]
    made = hashlib.sha256(repr(facts).encode())
    made.update(torch.tensor(list(sample.values())).numpy().tobytes())
    return made.hexdigest()[:16]


def _norms(parts: Sequence[dict[Any, list[float]]], depth: int) -> list[float] | None:
    """The median norm of each block `[L]`, or None where a rank saw nothing."""
    seen: dict[int, list[float]] = {}
    for part in parts:
        seen |= {int(layer): values for layer, values in part.items()}
    if any(not seen.get(layer) for layer in range(depth)):
        return None
    return [float(torch.tensor(seen[layer]).median()) for layer in range(depth)]


def _reading(tokenizer: Any, texts: Sequence[str]) -> tuple[list[Any], list[Any]]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=list(tokenizer(text)["input_ids"])) for text in texts]
    params = SamplingParams(
        max_tokens=1, temperature=0.0, skip_reading_prefix_cache=True, extra_args={"steer": Inside(measure=True)}
    )
    return prompts, [params] * len(prompts)


def digest(data: bytes) -> str:
    """Digest of an artifact's content."""
    return hashlib.sha256(data).hexdigest()[:32]


def run(steps: Steps, client: Client) -> Any:
    """Carry out `steps`; returns what they return."""

    def answer(call: Rpc | Read) -> Any:
        if isinstance(call, Rpc):
            return client.rpc(call.method, *call.args)
        return client.draw(*_reading(client.tokenizer, call.texts))

    try:
        call = next(steps)
        while True:
            call = steps.send(answer(call))
    except StopIteration as done:
        return done.value

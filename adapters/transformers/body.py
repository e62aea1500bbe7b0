"""The network of one language model as its parts are handed it: what it is called with, its blocks, what may be shared.

Letters: `N` rows, `T` positions, `D` width, `V` vocabulary, `S` residual streams.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from steer.adapters.transformers.cache import cache_argument, full_attention, held_states, new_cache
from steer.adapters.transformers.hidden import RowEdit
from steer.adapters.transformers.hooks import NO_TAPS, Hooks, recording
from steer.adapters.transformers.reader import Tap
from steer.core import ModelInfo, UnsupportedError

__all__ = ["Body", "Layout", "bare", "taken"]


def bare(network: Any) -> Any:
    """The library's own model inside PEFT's wrapper, and inside that of `torch.compile`."""
    network = getattr(network, "_orig_mod", network)
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def taken(module: Any) -> frozenset[str]:
    """Names of the arguments of a module's `forward`, as its class has them."""
    return frozenset(inspect.signature(type(bare(module)).forward).parameters)


LAYOUTS = {
    "pads": "rows of unequal length go together, padded on the left",
    "chunks": "a text goes on by several tokens in one pass",
    "gaps": "rows wait for others in the middle of a text",
    "branches": "several next tokens of one row are looked at in one pass",
    "shares": "rows of different requests share one rectangle",
}
"""Ways to lay rows out for a pass, and what is done in each."""


@dataclass
class Layout:
    """Which ways to lay rows out are right for a network. Each is tried once, against the library's own single passes,
    when it is first wanted; one that is wrong is not used, and said so once.
    """

    known: dict[str, bool]
    """What the structure of the network says already."""
    probe: Callable[[Body, str], str | None] | None
    """What is wrong with a layout, or None; None in its place trusts every layout."""
    sound: bool = False

    def allows(self, body: Body, name: str) -> bool:
        """Whether rows may be laid out so."""
        self.check(body)
        if name not in self.known:
            self.known[name] = True  # what the probe itself relies on
            if name in ("gaps", "shares") and not self.allows(body, "pads"):
                self.known[name] = False
                return False
            wrong = self.probe(body, name) if self.probe is not None else None
            if wrong is not None:
                self.known[name] = False
                self._warn(body, name, wrong)
        return self.known[name]

    def check(self, body: Body) -> None:
        """Raise `UnsupportedError` where one row alone, or a copy of it, does not come out as in the library. What is
        right of rows with padding is right of one.
        """
        if self.sound or self.probe is None:
            return
        self.sound = True
        padded = self.probe(body, "pads") if "pads" not in self.known else None
        if self.known.setdefault("pads", padded is None):
            return
        wrong = self.probe(body, "single")
        if wrong is None:
            if padded is not None:
                self._warn(body, "pads", padded)
        else:
            self.sound = False
            raise UnsupportedError(
                f"model {body.name}: {type(bare(body.network)).__name__} does not continue a text as a single pass of "
                f"the library does ({wrong}), so that nothing that steer makes of it would be right; check=False loads "
                "it all the same"
            )

    def _warn(self, body: Body, name: str, wrong: str) -> None:
        warnings.warn(
            f"{body.name}: not right where {LAYOUTS[name]} ({wrong}); done one by one instead, which is slower",
            stacklevel=2,
        )


@dataclass(frozen=True)
class Body:
    """One network and what its parts need to know of it."""

    name: str
    network: Any
    trunk: Any
    """The network without its output head."""
    blocks: nn.ModuleList
    hooks: Hooks
    config: Any
    """Of the text model."""
    pad_token_id: int
    context: int | None
    """Positions that it reads at most."""
    layout: Layout = field(repr=False)
    describe: Callable[[], ModelInfo] = field(repr=False)

    @property
    def info(self) -> ModelInfo:
        return self.describe()

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        embedding = self.network.get_input_embeddings()
        hook = getattr(embedding, "_hf_hook", None)
        places = [getattr(h, "execution_device", None) for h in getattr(hook, "hooks", (hook,))]
        return next((torch.device(p) for p in places if p is not None), embedding.weight.device)

    @property
    def vocabulary(self) -> int:
        """Token ids that the network reads."""
        return int(self.network.get_input_embeddings().weight.shape[0])

    @cached_property
    def takes(self) -> frozenset[str]:
        """Arguments of the network's `forward`."""
        return taken(self.network)

    @cached_property
    def _trunk_takes(self) -> frozenset[str]:
        return taken(self.trunk)

    @cached_property
    def _held(self) -> list[tuple[nn.Module, str]]:
        return held_states(bare(self.network))

    @cached_property
    def stream(self) -> int | None:
        """Which of several residual streams is read, where the configuration says it."""
        return getattr(self.config, "altup_active_idx", None)

    def allows(self, layout: str) -> bool:
        """Whether rows may be laid out so: see `LAYOUTS`."""
        return self.layout.allows(self, layout)

    @cached_property
    def _stretched(self) -> int | None:
        """Positions from which on a scaled rope looks at the longest row of a pass, so that rows change each other."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = [rope] if "rope_type" in rope else [x for x in rope.values() if isinstance(x, dict)]
        found = [
            int(kind.get("original_max_position_embeddings") or self.config.max_position_embeddings)
            for kind in kinds
            if "dynamic" in str(kind.get("rope_type")) or kind.get("rope_type") == "longrope"
        ]
        return min(found) if found else None

    def alike(self, columns: int | None) -> bool:
        """Whether rows of unequal length leave each other's positions alone, up to so many; None for any number."""
        return self._stretched is None or (columns is not None and columns <= self._stretched)

    @cached_property
    def _ropes(self) -> list[Any]:
        """Modules that remember the longest text that they have seen, and stretch shorter ones by it."""
        return [m for m in self.network.modules() if hasattr(m, "max_seq_len_cached")] if self._stretched else []

    def new_cache(self) -> Cache:
        """An empty cache."""
        return new_cache(bare(self.network), self.config)

    def recording(self, layers: Sequence[int]) -> AbstractContextManager[dict[int, Tensor]]:
        """Fills a dictionary with the residual stream `[N, T, D]` after each of `layers`."""
        return recording(self.blocks, layers, self.stream)

    def read(self, tokens: Tensor, cache: Cache | None = None) -> None:
        """Run the trunk over tokens `[N, T]` without padding."""
        given: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            given[cache_argument(self._trunk_takes, self.trunk)] = cache
        self._forget(tokens.shape[1] + (cache.get_seq_length() if cache is not None else 0))
        with self._holding(cache):
            self.trunk(input_ids=tokens, **{k: v for k, v in given.items() if k in self._trunk_takes})

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        position: Tensor,
        cache: Cache | None,
        program: dict[int, RowEdit],
        *,
        keep: int = 1,
        hidden: bool = False,
        taps: Mapping[int, Tap] = NO_TAPS,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits `[N, keep, V]` of tokens `[N, T]` (0 keeps every position) and, if asked, the final hidden states
        `[N, T, D]`, on which the output head works. `program` says what is done to the residual stream at each layer,
        `taps` are shown what comes of it.
        """
        given: dict[str, Any] = {
            "attention_mask": mask,
            "position_ids": position,
            "use_cache": cache is not None,
            "logits_to_keep": keep,
        }
        if cache is not None:
            given[cache_argument(self.takes, self.network)] = cache
        if self._ropes:
            self._forget(int(position.max()) + 1)
        seen: list[Tensor] = []
        handle = self.trunk.register_forward_hook(lambda m, args, out: seen.append(out[0])) if hidden else None
        try:
            with self.hooks.running(program, taps), self._holding(cache):
                out: Any = self.network(input_ids=tokens, **{k: v for k, v in given.items() if k in self.takes})
        finally:
            if handle is not None:
                handle.remove()
        logits = out.logits if "logits_to_keep" in self.takes or not keep else out.logits[:, -keep:]
        # Where a device map spreads the blocks, logits come back to where the tokens were.
        return logits, seen[0].to(logits.device) if seen else None

    def _forget(self, length: int) -> None:
        """Have a dynamic rope stretch a text of this length by its own length, whatever was read before."""
        for rope in self._ropes:
            if length >= rope.original_max_seq_len:
                rope.max_seq_len_cached = rope.original_max_seq_len - 1

    @contextmanager
    def _holding(self, cache: Cache | None) -> Iterator[None]:
        """Some networks keep states in their modules: put those of `cache` there for a pass, and keep what it made."""
        if not self._held:
            yield
            return
        states = getattr(cache, "held", None) or [None] * len(self._held)
        for (module, name), state in zip(self._held, states, strict=True):
            setattr(module, name, state)
        try:
            yield
        finally:
            if cache is not None:
                cache.held = [getattr(module, name) for module, name in self._held]


def structure(cache: Cache, takes: frozenset[str]) -> dict[str, bool]:
    """What the kind of its cache and its arguments say of a network's layouts."""
    known = {} if "attention_mask" in takes else {"pads": False}
    return known if full_attention(cache) else {**known, "gaps": False, "branches": False, "shares": False}

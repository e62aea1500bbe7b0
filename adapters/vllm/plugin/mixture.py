"""RL guidance inside vLLM: tuned models run beside the base in one pass, and their laws are mixed row by row.

    log p_w = log p_base + w (log p_tuned - log p_base)

The model gets a second copy of its architecture for every tuned one. A copy has its own KV cache, and reads every token
of every request: a pass costs as much again, whoever asks for guidance, and a token of the cache twice the memory.
So a request may find what any other has left in the prefix cache, whatever its weights. Of the weights' memory, modules
that tuning left alone are shared with the base.

What a pass returns for a token is the base's final state, those of the tuned models, and the token's weights, side by
side. Whoever takes rows of it to the output head, the sampler or the log-probabilities of prompts, takes the weights
along, and gets logits that are mixed already: before masks, penalties and temperature, as if one model had given them.

Steering of hidden states acts on the base alone, as does what value heads read.

Letters: `T` tokens of a pass, `R` rows taken of it, `K` tuned models, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steer.adapters.vllm.plugin.blocks import Host
from steer.adapters.vllm.plugin.requests import Resolved
from steer.adapters.vllm.plugin.tuned import Adapter, Network, open_tuned
from steer.core import UnsupportedError

__all__ = ["Mixture", "mixed", "pair", "share"]


Params = Callable[[str], tuple[Any, int]]
Source = Callable[[], Iterator[tuple[str, Tensor]]]


class Mixture:
    """The weights of the tokens of each pass, `[T, K]`, and what becomes of the states that it returns."""

    def __init__(self, count: int, width: int, tokens: int, device: torch.device) -> None:
        self.count, self.width = count, width
        self.active = False
        """Whether any request of this pass is guided."""
        self._weight = torch.zeros(tokens, count, dtype=torch.float32, device=device)
        self._host = Host(self._weight)
        self._nothing = np.zeros(count, dtype=np.float32)
        self._known: dict[str, tuple[Any, np.ndarray]] = {}
        self._ids: list[str] = []
        self._rows = np.zeros((0, count), dtype=np.float32)
        self._unmixed: tuple[Tensor, Tensor] | None = None

    # ---- requests

    def step(self, ids: Sequence[str], counts: np.ndarray, params_of: Params) -> None:
        """Fill the weights for a pass in which request `ids[i]` has `counts[i]` tokens."""
        if self._ids != ids:
            self._ids = list(ids)
            self._rows = np.stack([self._of(request_id, params_of) for request_id in ids])
            self.active = bool(self._rows.any())
        if self.active:
            self._host.write(np.repeat(self._rows, counts, axis=0))

    def _of(self, request_id: str, params_of: Params) -> np.ndarray:
        params, _ = params_of(request_id)
        known = self._known.get(request_id)
        if known is not None and known[0] is params:
            return known[1]
        resolved = Resolved.of(params)
        row = self._nothing
        if resolved is not None and resolved.tuned:
            row = row.copy()
            for number, weight in resolved.tuned:
                row[number] += weight
        self._known[request_id] = params, row
        return row

    def finish(self, ids: Iterable[str]) -> None:
        """Drop what belongs to requests that have ended."""
        for request_id in ids:
            self._ids = []
            self._known.pop(request_id, None)

    # ---- states

    def joined(self, states: Tensor, others: Sequence[Tensor]) -> Tensor:
        """States of the base and of the tuned models `[T, D]`, and the weights in the same type, bit by bit, as one."""
        weight = self._weight[: len(states)].view(states.dtype)
        return torch.cat([states, *others, weight], -1)

    def split(self, joined: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Rows of `joined`, taken apart: states `[R, D]`, those of every tuned model, weights `[R, K]`."""
        parts = [joined[:, i * self.width : (i + 1) * self.width] for i in range(self.count + 1)]
        weight = joined[:, (self.count + 1) * self.width :].contiguous().view(torch.float32)
        return parts[0], parts[1:], weight

    def logits(self, joined: Tensor, heads: Sequence[Callable[[Tensor], Tensor | None]]) -> Tensor | None:
        """Logits `[R, V]` of rows of `joined`; `heads` are the output heads of the base and of the tuned models. None
        where another rank has them.
        """
        states, others, weight = self.split(joined)
        plain = heads[0](states)
        self._unmixed = None
        if not self.active:
            return plain
        # To find the guided rows, an accelerator would have to wait.
        guided = weight.any(1)
        rows = guided.nonzero().squeeze(1) if states.device.type == "cpu" else None
        if rows is not None and not len(rows):
            return plain
        tuned = [head(x if rows is None else x[rows]) for head, x in zip(heads[1:], others, strict=True)]
        if plain is None:
            return None
        self._unmixed = plain, guided
        if rows is None or len(rows) == len(plain):
            return mixed(plain, tuned, weight)  # type: ignore[arg-type]
        return plain.float().index_copy(0, rows, mixed(plain[rows], tuned, weight[rows]))  # type: ignore[arg-type]

    def unmixed(self, logits: Tensor) -> Tensor:
        """Logits `[R, V]` of the rows that are being sampled, those of guided rows as they were before they were mixed;
        what has been excluded since stays out.
        """
        if self._unmixed is None:
            return logits
        plain, guided = self._unmixed
        return torch.where(guided.unsqueeze(1) & ~logits.isneginf(), plain.to(logits), logits)


def mixed(base: Tensor, tuned: Sequence[Tensor], weight: Tensor) -> Tensor:
    """`base + sum of w_k (tuned_k - base)` `[R, V]` in float32, for weights `[R, K]`. A row of one weight, 1, is that
    model's, and a row of none the base's, bit for bit. What either model excludes stays excluded.
    """
    base = base.float()
    out = base
    for k, one in enumerate(tuned):
        w = weight[:, k : k + 1]
        moved = _excluding(torch.lerp(base, one.float(), w))
        if k:
            first = (weight[:, :k] == 0).all(1, keepdim=True)
            moved = torch.where(first, moved, _excluding(out + (moved - base)))
        out = torch.where(w == 0, out, moved)
    return out


def _excluding(logits: Tensor) -> Tensor:
    """With -inf wherever arithmetic met an infinite logit, in place."""
    return logits.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


# ------------------------------------------------------------------------------------------------------------- model


class _Paired:
    """What stands before three methods of one model object, whose children `tuned0`, `tuned1` and so on are the tuned
    models. Its class stays what it was, with all that vLLM reads from a class.
    """

    def __init__(self, model: Any, mixture: Mixture, sources: Sequence[Source], apart: Sequence[nn.Module]) -> None:
        self.model, self.mixture, self.sources, self.apart = model, mixture, sources, apart
        self.tuned = [getattr(model, _child(i)) for i in range(mixture.count)]
        self.heads = [model.compute_logits, *(tuned.compute_logits for tuned in self.tuned)]
        self._forward, self._load = model.forward, model.load_weights
        model.forward, model.compute_logits, model.load_weights = self.forward, self.compute_logits, self.load_weights

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
        **more: Any,
    ) -> Tensor:
        """The states of all models as one (see `Mixture.joined`)."""
        given = (input_ids, positions, intermediate_tensors, inputs_embeds)
        states = self._forward(*given, **more)
        return self.mixture.joined(states, [tuned(*given, **more) for tuned in self.tuned])

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits `[R, V]` of rows of what `forward` returned."""
        return self.mixture.logits(hidden_states, self.heads)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        """The base's weights from `weights`, those of the tuned models from their folders; returns what was loaded."""
        loaded = self._load(weights)
        for i, (tuned, source) in enumerate(zip(self.tuned, self.sources, strict=True)):
            names = tuned.load_weights(source())
            loaded = None if loaded is None or names is None else {*loaded, *(f"{_child(i)}.{n}" for n in names)}
            share(self.model, tuned, self.apart)
        return loaded


def _child(number: int) -> str:
    """Name of a tuned model, and the prefix of its layers, in which vLLM would take a bare number for a block's."""
    return f"tuned{number}"


def share(base: nn.Module, tuned: nn.Module, apart: Sequence[nn.Module]) -> None:
    """Put the base's own module in place of every innermost one in `tuned` that holds the same numbers."""
    ours = dict(base.named_modules())
    for name, module in list(tuned.named_modules()):
        held, own = list(module.named_parameters()), ours.get(name)
        if not held or own is None or any(True for _ in module.children()) or any(module is one for one in apart):
            continue
        theirs = dict(own.named_parameters())
        same = type(own) is type(module) and len(theirs) == len(held)
        if same and all(key in theirs and torch.equal(value, theirs[key]) for key, value in held):
            parent, _, last = name.rpartition(".")
            setattr(tuned.get_submodule(parent), last, own)


def pair(loader: Any, model: nn.Module, config: Any, tuned: Mapping[str, str]) -> Mixture:
    """Turn a model that a vLLM loader has just made, still without weights, into one that runs the tuned models of
    these folders as well; returns what mixes them. Raises `InputError` and `UnsupportedError`.
    """
    from vllm.compilation.backends import set_model_tag
    from vllm.model_executor.model_loader.utils import initialize_model

    if getattr(model, "do_not_compile", True) is False:
        raise UnsupportedError(f"steer.tuned: {type(model).__name__} is compiled as a whole; use enforce_eager")
    opened = [open_tuned(name, folder) for name, folder in tuned.items()]
    for i in range(len(opened)):
        with set_model_tag(_child(i)):
            setattr(model, _child(i), initialize_model(config, prefix=_child(i)))
    scheduler = config.scheduler_config
    tokens = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs) + 1024  # captured sizes are padded
    device, width = next(model.parameters()).device, config.model_config.get_hidden_size()
    mixture = Mixture(len(opened), width, tokens, device)
    sources = [partial(_weights, one, loader, config.model_config, model) for one in opened]
    _Paired(model, mixture, sources, tuple(config.compilation_config.static_forward_context.values()))
    return mixture


def _weights(
    tuned: Adapter | Network, loader: Any, model_config: Any, model: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    return tuned.weights(loader.get_all_weights(model_config, model))

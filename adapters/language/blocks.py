"""Decoder blocks of a model, found by structure, never by a list of names and never by size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from steer.core import SteerError, UnsupportedError


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's stack of decoder blocks, in order, by the configuration that the model carries: see `stack_of`.

    (A block of two attention layers counts twice in `num_hidden_layers`, and once in `num_layers`.) Raises
    `SteerError`.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return stack_of(model, text, (text.num_hidden_layers, getattr(text, "num_layers", None)))


def stack_of(model: nn.Module, text: Any, depths: Sequence[int | None]) -> nn.ModuleList:
    """The outermost `ModuleList` of one of `depths`, the likeliest first. It is looked for in the module that the model
    names as its decoder or language model, then in the one that owns the text configuration `text`, then everywhere.
    Raises `SteerError` where there is no such list, or where several lie side by side.
    """
    homes = _homes(model, text)
    for depth in depths:
        for home in homes:
            stacks = [(n, m) for n, m in home.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
            if stacks:
                return _outermost(model, stacks)
    raise SteerError(f"model {type(model).__name__}: found no stack of {depths[0]} decoder blocks to steer")


def _homes(model: Any, text: Any) -> list[nn.Module]:
    named = []
    for name in ("get_decoder", "get_language_model"):
        with suppress(NotImplementedError):
            named.append(getattr(model, name)() if hasattr(model, name) else None)
    owner = next((m for m in model.modules() if m is not model and getattr(m, "config", None) is text), None)
    return [home for home in (*named, owner, model) if isinstance(home, nn.Module)]


def _outermost(model: nn.Module, stacks: list[tuple[str, nn.ModuleList]]) -> nn.ModuleList:
    top = min(name.count(".") for name, _ in stacks)
    found = [(name, stack) for name, stack in stacks if name.count(".") == top]
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise SteerError(
            f"model {type(model).__name__}: has no single stack of decoder blocks, but {names} side by side"
        )
    return found[0][1]


def trunk_of(model: Any, blocks: nn.ModuleList) -> nn.Module:
    """The network without its output head: the library's base model, or where that is the model itself the module that
    the model names as its decoder, or the one that holds the blocks. Raises `SteerError`.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    holders = [m for m in model.children() if any(inner is blocks for inner in m.modules())]
    for trunk in (model.base_model, decoder, *holders):
        if isinstance(trunk, nn.Module) and trunk is not model and any(inner is blocks for inner in trunk.modules()):
            return trunk
    raise SteerError(f"model {type(model).__name__}: has no base model under its output head")


def residual_stream(output: Any, stream: int | None = None) -> Tensor:
    """A block's residual stream `[N, T, D]` from its output, which is a tensor or a tuple that starts with it; the one
    numbered `stream` of several, `[S, N, T, D]`. Raises `UnsupportedError` where there are several and no number.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.dim() == 3:
        return hidden
    if stream is None:
        raise UnsupportedError(
            f"its blocks carry several residual streams {tuple(hidden.shape)}, of which none is named the active one"
        )
    return hidden[stream]


def blocks_of(model: nn.Module, text: Any) -> dict[int, nn.Module]:
    """Decoder blocks that this rank has, by their number in the whole model, found as `stack_of` finds them by the text
    configuration `text`. Raises `SteerError`.
    """
    stack = stack_of(model, text, (int(text.num_hidden_layers),))
    return {i: block for i, block in enumerate(stack) if any(True for _ in block.parameters())}

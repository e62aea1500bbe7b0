"""Finds a model's decoder blocks by structure, never by a list of names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from steer.core import SteerError


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's stack of decoder blocks, in order.

    It is the `ModuleList` with one entry for each of the configuration's hidden layers that holds the most parameters,
    the outermost where several hold the same. Raises `SteerError` where no list has that length.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    depth = text.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise SteerError(f"model {type(model).__name__}: found no stack of {depth} decoder blocks to steer")
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def residual_stream(output: Any) -> Tensor:
    """A block's residual stream `[N, T, D]` from its output, which is a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


def blocks_of(model: nn.Module, depth: int) -> dict[int, nn.Module]:
    """Decoder blocks that this rank has, by their number in the whole model, found by structure: the list of that
    length that holds the most parameters. Raises `SteerError`.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise SteerError(f"model {type(model).__name__}: found no stack of {depth} decoder blocks to steer")
    stack = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    return {i: block for i, block in enumerate(stack) if any(True for _ in block.parameters())}

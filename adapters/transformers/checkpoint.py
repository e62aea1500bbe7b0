"""Checkpoints that are not what is asked for: encoders, weights that are missing or left over, pointers to files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.core import SteerError, UnsupportedError
from steer.files import is_pointer

__all__ = ["check_adapter", "check_causal", "check_files", "check_weights"]

_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|inv_freq$|causal_mask$|position_ids$")
"""Tables that old checkpoints hold and networks compute for themselves: masks, rotary frequencies, positions."""


def check_files(where: Path) -> None:
    """Raise `SteerError` where weights in a folder, or the file itself, are a Git LFS pointer."""
    files = [where] if where.is_file() else sorted(where.glob("*.safetensors")) if where.is_dir() else []
    for file in files:
        if is_pointer(file):
            raise SteerError(f"model: {file} is a Git LFS pointer, not the file itself; run `git lfs pull`")


def check_causal(config: Any, name: str, network: Any = None, blocks: Any = None) -> None:
    """Raise `UnsupportedError` for encoders, encoders with decoders, and PEFT's prompt learning, by a configuration
    and, where it is there, the network with its stack of blocks: a tower beside the text model may be an encoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"model {name}: an encoder with a decoder ({config.model_type}), no causal language model"
        )
    if blocks is not None and any(getattr(m, "is_decoder", None) is False for m in blocks.modules()):
        raise UnsupportedError(
            f"model {name}: an encoder ({config.model_type} with is_decoder=False) that attends both ways, no causal "
            "language model"
        )
    learned: Any = getattr(network, "active_peft_config", None)
    if learned is not None:
        check_adapter(learned.to_dict() | {"peft_type": learned.peft_type.value}, name)


def check_adapter(config: Mapping[str, Any], name: str) -> None:
    """Raise `UnsupportedError` for PEFT's adapters that act on some tokens of a text alone, by their configuration."""
    acts = (
        ("num_virtual_tokens", "puts virtual tokens before every pass"),
        ("cpt_token_ids", "puts virtual tokens before every pass"),
        ("alora_invocation_tokens", "begins where some tokens were read"),
    )
    for field, does in acts:
        if config.get(field):
            raise UnsupportedError(
                f"model {name}: PEFT's {config.get('peft_type')} with {field} {does}, of which steer's passes know "
                "nothing; LoRA and its kin are taken"
            )


def check_weights(found: Any, name: str, text_model: Any = None) -> None:
    """Raise `SteerError` where a checkpoint lacks weights of the network, or has some that it has no place for, by what
    the library found while it loaded. Tied weights are not missing, and towers are not left over where the network,
    `text_model`, was taken out of a model that sees and hears.
    """
    towers: Callable[[str], bool] = (lambda key: False) if text_model is None else _towers(text_model)
    for kind, what in _FAULTS.items():
        keys = sorted(key if isinstance(key, str) else str(key[0]) for key in found.get(kind) or ())
        keys = [key for key in keys if kind != "unexpected_keys" or not (_BUFFERS.search(key) or towers(key))]
        if keys:
            raise SteerError(
                f"model {name}: the checkpoint {what}: {_named(keys)} ({len(keys)} in all); partial_weights=True loads "
                "it all the same"
            )


_FAULTS = {
    "missing_keys": "lacks weights of the network",
    "mismatched_keys": "has weights of another shape than the network",
    "unexpected_keys": "has weights that the network has no place for",
}


def _towers(network: Any) -> Callable[[str], bool]:
    """Whether a weight of this name has no kin in the network: it is none of a further block, whatever its number."""
    own = {_unnumbered(key) for key in network.state_dict()}
    return lambda key: _unnumbered(key.removeprefix(f"{network.base_model_prefix}.")) not in own


def _unnumbered(key: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".N", key)


def _named(keys: Sequence[str], most: int = 6) -> str:
    """Weights by name, those of a block by the block's."""
    found = list(dict.fromkeys(re.sub(r"(\.\d+)\..*", r"\1", key) for key in keys))
    return ", ".join(found[:most]) + (", ..." if len(found) > most else "")

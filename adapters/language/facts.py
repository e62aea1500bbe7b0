"""Facts about a language model that artifacts are checked against."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

# Ordinary sentences on which the residual stream's norm is measured.
CALIBRATION = (
    "The library opens at nine in the morning and closes at six.",
    "Water boils at a lower temperature when the air pressure falls.",
    "She wrote a short letter to her brother about the new house.",
    "In 1969 the first people walked on the surface of the moon.",
    "To make the soup, cut the onions and cook them slowly in butter.",
    "The committee will meet again on Tuesday to discuss the budget.",
    "A function takes an input and returns exactly one output.",
    "Rain is expected in the north, with clear skies by the evening.",
)


def fingerprint(model_type: str, num_layers: int, width: int, shape: Sequence[int], sample: Tensor | None) -> str:
    """What tells whether an artifact was made for this model: the same for all engines and precisions.

    Args:
        shape: of the input embedding.
        sample: about 256 numbers of the embedding, each `max(1, numel // 256)` after the last, rounded to bfloat16, in
            float32 on the CPU; None where the weights are not there to be read.
    """
    digest = hashlib.sha256(repr([model_type, num_layers, width, *shape]).encode())
    if sample is not None:
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def token_of(tokenizer: Any, text: str) -> int | None:
    """Id of the one token that is written so, whether control token or piece of text; None where there is none."""
    own = tokenizer.convert_tokens_to_ids(text)
    if own is not None and own != tokenizer.unk_token_id:
        return int(own)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None

"""Facts about a language model that artifacts are checked against."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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


def embedding_sample(model: nn.Module, config: Any) -> dict[str, Any]:
    """Shape of the input embedding and, of about 256 of its numbers taken at equal distances, those that this rank has:
    `{"shape", "index", "value"}`, values in bfloat16's precision; empty lists on a rank without it.
    """
    text = config.model_config.hf_text_config
    rows, width = int(text.vocab_size), int(text.hidden_size)
    step = max(1, rows * width // 256)
    table: Any = next((m for m in model.modules() if hasattr(m, "org_vocab_size") and hasattr(m, "shard_indices")
                  and type(m).__name__ == "VocabParallelEmbedding"), None)  # fmt: skip
    if table is None:
        return {"shape": [rows, width], "index": [], "value": []}
    low, high = table.shard_indices.org_vocab_start_index, table.shard_indices.org_vocab_end_index
    flat = torch.arange(0, rows * width, step)
    mine = flat[(flat // width >= low) & (flat // width < high)]
    weight = table.weight.detach()
    value = weight[(mine // width - low).to(weight.device), (mine % width).to(weight.device)]
    return {"shape": [rows, width], "index": mine.tolist(), "value": value.to(torch.bfloat16).float().cpu().tolist()}

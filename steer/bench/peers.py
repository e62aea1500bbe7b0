"""One timing of another library, for `python -m steer.bench --peers`; prints JSON on its last line.

Runs in an environment of its own, where the other libraries are installed, and imports nothing of `steer`:

    python peers.py repeng MODEL PAIRS THREADS
    python peers.py steering-vectors:32 MODEL PAIRS THREADS
    python peers.py hooks MODEL PAIRS THREADS

The first two give CPU seconds of fitting a vector at all layers, the last microseconds added per layer and step.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, DEPTH, STEPS = 4096, 30, 1000


def fit_repeng(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> Any:
    """The library's default method and batch size."""
    from repeng import ControlVector, DatasetEntry  # type: ignore[import-not-found]

    return ControlVector.train(model, tokenizer, [DatasetEntry(row["positive"], row["negative"]) for row in rows])


def fit_steering_vectors(model: Any, tokenizer: Any, rows: list[dict[str, str]], batch: int) -> Any:
    """The mean difference at the last token."""
    from steering_vectors import train_steering_vector  # type: ignore[import-not-found]

    pairs = [(row["positive"], row["negative"]) for row in rows]
    return train_steering_vector(model, tokenizer, pairs, layers=None, read_token_index=-1, batch_size=batch)


def extraction(name: str, folder: str, pairs: str) -> dict[str, float]:
    """CPU seconds of one fit, after one on a few rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(pairs, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    library, _, batch = name.partition(":")

    def fit(part: list[dict[str, str]]) -> Any:
        if library == "repeng":
            return fit_repeng(model, tokenizer, part)
        return fit_steering_vectors(model, tokenizer, part, int(batch))

    fit(rows[:4])
    began = time.process_time()
    fit(rows)
    return {name: time.process_time() - began}


class Stack(nn.Module):
    """Blocks that return their input, where every library looks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Identity() for _ in range(DEPTH))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.model.layers:  # type: ignore[union-attr]
            hidden = block(hidden)
        return hidden


def microseconds(stack: nn.Module, plain: nn.Module) -> float:
    """Added to each layer of `plain` in `stack`: the median of ten alternating pairs."""
    hidden, seconds = torch.zeros(1, 1, WIDTH), []
    with torch.inference_mode():
        for _ in range(10):
            spent = []
            for module in (stack, plain):
                began = time.process_time()
                for _ in range(STEPS):
                    module(hidden)
                spent.append(time.process_time() - began)
            seconds.append(spent[0] - spent[1])
    return sorted(seconds)[5] / STEPS / DEPTH * 1e6


def hooks() -> dict[str, float]:
    """Microseconds per layer and step of each library that is installed."""
    added, found = {layer: torch.zeros(WIDTH) for layer in range(DEPTH)}, {}
    with contextlib.suppress(ImportError):
        from repeng import ControlModel

        stack: Any = Stack()
        ControlModel(stack, range(DEPTH)).set_raw_control(added)
        found["repeng"] = microseconds(stack, Stack())
    with contextlib.suppress(ImportError):
        from steering_vectors import SteeringVector

        stack = Stack()
        SteeringVector(added).patch_activations(stack, {"decoder_block": "model.layers.{num}"})
        found["steering-vectors"] = microseconds(stack, Stack())
    return found


def main() -> None:
    """Run the figure that the arguments name."""
    name, folder, pairs, threads = sys.argv[1:5]
    torch.set_num_threads(int(threads))
    print(json.dumps(hooks() if name == "hooks" else extraction(name, folder, pairs)))


if __name__ == "__main__":
    main()

"""Tools that the tests of vLLM share: an engine's settings, prompts and edits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from steer import RawText, SteeringVector
from steer.methods.controller import Controller, ControllerNetwork
from steer.methods.value import HeadValue, QHead, ValueGuidance

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    from vllm import LLM  # noqa: F401

    MISSING = ""
except ImportError as error:
    MISSING = f"vLLM cannot be imported ({error}): nothing of the plug-in was tried on an engine"

SETTINGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "block_size": 32,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
}
"""Small steps, so that prompts are read in chunks."""


WIDTH, DEPTH = 576, 30

PROMPTS: list[Any] = [
    "My day at the lake",
    RawText("The sun was"),
    "Tell me about the new flat that you have found, and about the people in the street on which it stands; my "
    "sister wants to know how many rooms there are, whether dogs are allowed, and where the nearest bakery is.",
    RawText("In the morning the two of them walked along the river, past the mill and the old"),
]


def directions(layers: Sequence[int], seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(WIDTH, generator=generator) for layer in layers}


def vector(strength: float = 0.3, seed: int = 0, layers: Sequence[int] = range(10, 20), **more: Any) -> SteeringVector:
    return SteeringVector(directions(layers, seed), strength, **more).normalised()


def controller(inputs: Sequence[int] = (8,), strength: float = 0.3, threshold: float = 0.0, **more: Any) -> Controller:
    """A controller with random weights, so that every prompt gets its own scale and layer weights."""
    torch.manual_seed(3)
    network = ControllerNetwork(len(inputs) * WIDTH, DEPTH, hidden=16)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    rows = torch.nn.functional.normalize(torch.stack(list(directions(range(DEPTH), 5).values())), dim=1)
    return Controller(network.eval().requires_grad_(False), tuple(inputs), rows, strength, threshold=threshold, **more)


def guide(
    unembedding: Any = None, seed: int = 0, beta: float | None = 0.02, horizon: int = 0, **more: Any
) -> ValueGuidance:
    """Guidance by a Q-head with random weights, told how many tokens may follow where it has a `horizon`; the
    transformers adapter needs the output embedding with it.
    """
    torch.manual_seed(seed)
    head = QHead(WIDTH, 32, horizon)
    for parameter in head.outer.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return ValueGuidance(HeadValue(head.eval().requires_grad_(False), unembedding), beta=beta, **more)


def each(edits: Any) -> list[Any]:
    """One list of edits (or None) for each prompt, from one entry for each."""
    return [entry if entry is None or isinstance(entry, list) else [entry] for entry in edits]


def greedy(model: Any, prompts: Any = None, edits: Any = (), new: int = 20, **more: Any) -> Any:
    return model.generate(
        PROMPTS if prompts is None else prompts, edits=edits, temperature=0, max_new_tokens=new, **more
    )

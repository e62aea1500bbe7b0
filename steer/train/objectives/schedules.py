"""Prompt schedules: how many samples each prompt gets, with what hint, and what is done where a whole group fails.

Plans are pure: numbers and a seeded generator in, numbers out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

__all__ = [
    "SCHEDULES",
    "angle_signal",
    "expected_draws",
    "fixed_chunks",
    "hint",
    "informative",
    "knapsack",
    "knapsack_value",
    "moved",
    "near",
    "restored",
    "top_entropy",
]

SCHEDULES = ("uniform", "dynamic", "knapsack", "gain", "hints", "refine", "inpaint")
"""Of prompts: the same number of samples each; constant groups replaced by other prompts (DAPO); a budget by success
rate (Knapsack RL); prompts near a moving place in an order (GAIN-RL); hints where a group fails (GHPO); a refinement
added to each group (Critique-GRPO); parts of a reference filled in by a masked model (IGPO).
"""


def informative(rewards: Sequence[Sequence[float]]) -> list[int]:
    """Numbers of the groups whose rewards are not all the same."""
    return [i for i, row in enumerate(rewards) if row and max(row) > min(row)]


def expected_draws(p: float, size: int) -> float:
    """Groups of `size` samples with success rate `p` to be drawn until one is mixed."""
    return 1 / (1 - p**size - (1 - p) ** size)


# ------------------------------------------------------------------------------------------------------------- knapsack


def knapsack_value(p: float, n: int) -> float:
    """What `n` samples of a prompt with success rate `p` are worth: the chance of a mixed group times its gain."""
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


def samples_needed(p: float, chance: float = 0.9) -> float:
    """Samples until a group is mixed with about this chance."""
    return math.log(1 - chance) / math.log(max(p, 1 - p))


def knapsack(
    rates: Sequence[float | None], budget: int, *, least: int = 2, most: int = 16, solved: int = 2, failed: int = 2
) -> list[int]:
    """Samples of each prompt by its success rate, `budget` in all: exact, as the value is concave in the number, so
    that the next sample always goes where it is worth most.

    Args:
        rates: as last seen; None for a prompt that was not yet, which counts as 0.5.
        solved, failed: samples of prompts with rate 1 and 0. What is left goes to those that fail.
    """
    p = [0.5 if rate is None else rate for rate in rates]
    fixed = {i: solved if x >= 1 else failed for i, x in enumerate(p) if x <= 0 or x >= 1}
    count = [fixed.get(i, least) for i in range(len(p))]
    heap = [(_gain(x, least), i) for i, x in enumerate(p) if i not in fixed and least < most]
    heapq.heapify(heap)
    left = budget - sum(count)
    while left > 0 and heap:
        _, i = heapq.heappop(heap)
        count[i] += 1
        left -= 1
        if count[i] < most:
            heapq.heappush(heap, (_gain(p[i], count[i]), i))
    wanting = [i for i, x in enumerate(p) if x <= 0 and count[i] < most]
    while left > 0 and wanting:
        for i in wanting[:left]:
            count[i] += 1
        left -= len(wanting[:left])
        wanting = [i for i in wanting if count[i] < most]
    return count


def _gain(p: float, n: int) -> float:
    """Of one sample more, with its sign turned for a heap."""
    return knapsack_value(p, n) - knapsack_value(p, n + 1)


# ----------------------------------------------------------------------------------------------------------------- gain


def angle_signal(hidden: Tensor, question: Tensor, weight: float = 8.0) -> float:
    """GAIN-RL's signal of a prompt from hidden states `[T, D]`: mean cosine inside the question, and `weight` times
    that between question and the rest of the prompt; `question` is true `[T]` at the tokens of the question.
    """
    unit = torch.nn.functional.normalize(hidden.double(), dim=-1)
    inside, rest = unit[question], unit[~question]
    count = len(inside)
    pairs = inside @ inside.T
    intra = float((pairs.sum() - pairs.diagonal().sum()) / (count * (count - 1))) if count > 1 else 0.0
    inter = float((inside @ rest.T).mean()) if len(rest) and count else 0.0
    return intra + weight * inter


def near(count: int, place: float, width: float = 1000.0) -> list[float]:
    """Probability of each of `count` prompts, ordered by signal, to be drawn first: a Gaussian around a place."""
    log = torch.tensor([-0.5 * ((i - place) / width) ** 2 for i in range(count)], dtype=torch.float64)
    return log.softmax(0).tolist()


def without_replacement(weights: Sequence[float], size: int, draw: Random) -> list[int]:
    """`size` numbers drawn one after another by weight, none of them twice."""
    keys = [(math.log(draw.random() or 1e-300) / w if w > 0 else -math.inf, i) for i, w in enumerate(weights)]
    return sorted(i for _, i in sorted(keys, reverse=True)[:size])


def moved(
    place: float, accuracy: float, angle: float, *, size: float = 500.0, slope: float = 2.0, half: float = 0.5
) -> float:
    """The place after an epoch with this accuracy and mean signal: never back, at most 1000 on."""
    step = size * math.tanh(slope * (accuracy - half)) + size * math.tanh(slope * angle)
    return place + min(max(step, 0.0), 1000.0)


# -------------------------------------------------------------------------------------------- hints, refinement, canvas


def hint(solution: str, share: float) -> str:
    """The first `share` of a solution's characters (GHPO)."""
    return solution[: int(share * len(solution))]


def fixed_chunks(length: int, size: int, draw: Random, *, least: float = 0.2, most: float = 0.6) -> list[int]:
    """Positions of a reference of `length` tokens that are given to a masked model: a share of its chunks of `size`
    tokens, the share uniform in `[least, most]` (IGPO).
    """
    chunks = [list(range(at, min(at + size, length))) for at in range(0, length, size)]
    count = max(1, round(draw.uniform(least, most) * len(chunks)))
    return sorted(t for i in draw.sample(range(len(chunks)), min(count, len(chunks))) for t in chunks[i])


def restored(share: float) -> float:
    """The signal that a group gets back when `share` of its failed samples become right, per unit of the difference of
    gradients between right and wrong.
    """
    return share * (1 - share)


def top_entropy(entropy: Tensor, share: float) -> Tensor:
    """True `[T]` at the share of positions with the highest entropy, one at least."""
    count = max(1, int(share * len(entropy)))
    found = torch.zeros(len(entropy), dtype=torch.bool, device=entropy.device)
    found[entropy.topk(count).indices] = True
    return found

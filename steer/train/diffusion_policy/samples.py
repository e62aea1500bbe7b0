"""Samples that a diffusion policy is tuned on: finished rows, chains with all their steps, ranked pairs.

Letters: `N` rows, `M` of them in this process, `S` steps of a chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steer.core import Prompt, Reward, RewardError, check
from steer.diffusion import DiffusionProcess
from steer.diffusion.schedule import DETERMINISTIC, SharedNoise
from steer.ranks import ranks
from steer.seeds import mixed
from steer.train.diffusion_policy.inputs import Pair
from steer.train.diffusion_policy.losses import step_kl


@dataclass
class Rollout:
    """Chains as they were drawn, and all that a policy gradient needs of them. Of `N` rows this rank holds `M`, all of
    them where it is alone.
    """

    x: list[Tensor] = field(repr=False)
    """Rows at every level, `S + 1` of `[M, ...]`."""
    log_prob: Tensor
    """Of every step under the policy that drew it `[S, M]`, float64, without the constant."""
    kl: Tensor
    """Of every step to the base `[S, N]`; 0 where it was not asked for."""
    base_mean: list[Tensor | None] = field(repr=False)
    """Mean of the next state under the base `[M, ...]`."""
    held: Tensor
    """Which of the rows this rank holds `[M]`."""
    group: Tensor
    reward: Tensor
    encoded: Any = field(repr=False)


def draw_rows(process: DiffusionProcess, prompts: Sequence[Prompt], n: int, seed: int) -> Any:
    """`n` finished rows for each prompt: the last state of a chain."""
    drawn = torch.Generator().manual_seed(seed)
    with process.session():
        state = process.init(prompts, n, drawn)
        while not process.done(state):
            state = process.propose(state, drawn)
    return state


def draw_in_parts(
    process: DiffusionProcess, prompts: Sequence[Prompt], n: int, rows: int, *seed: object, reward: Reward | None = None
) -> Iterator[tuple[Sequence[Prompt], Tensor, Tensor]]:
    """Finished rows for some prompts after others, about `rows` at once: these prompts, their last states `[P n, ...]`
    and, by a reward, their scores `[P n]`. Each rank draws some of the parts, and every one gets them all.
    """
    at_once, shared = max(1, rows // n), ranks()
    parts = range(0, len(prompts), at_once)

    def part(first: int) -> dict[str, Tensor]:
        state = draw_rows(process, prompts[first : first + at_once], n, mixed(*seed, first))
        scores = torch.zeros(len(state)) if reward is None else _scored(process, state, reward)
        return {"x": state.x, "scores": scores}

    for at in range(0, len(parts), shared.count):
        now = parts[at : at + shared.count]
        drawn = [part(first) for first in shared.mine(now)]
        for first, found in zip(now, shared.gather(drawn[0] if drawn else {}), strict=False):
            yield prompts[first : first + at_once], found["x"], found["scores"]


def _scored(process: DiffusionProcess, state: Any, reward: Reward) -> Tensor:
    """Finite scores `[N]` in float64."""
    scores = reward(process.decode(state))
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite()).nonzero()[0])
        raise RewardError(f"reward {reward}: returned {float(scores[bad])} for sample {bad}; allowed: finite numbers")
    return scores


@torch.no_grad()
def roll_out(
    policy: DiffusionProcess,
    base: DiffusionProcess | None,
    prompts: Sequence[Prompt],
    n: int,
    reward: Reward,
    seed: int,
) -> Rollout:
    """Draw `n` chains for each prompt and keep their steps; `base` is asked for the KL unless it is None. Each rank
    draws the chains of some prompts.

    Raises:
        RewardError: scores that are not finite numbers, one for each sample.
    """
    shared, rows = ranks(), len(prompts) * n
    held = torch.arange(rows)
    if shared.count > 1:
        held = held.view(-1, n)[shared.index :: shared.count].flatten()
    drawn = SharedNoise.of(seed, held, rows)
    with policy.session():
        state = policy.init(prompts, n, drawn)
        group, encoded = state.group, policy.denoiser.encode(prompts)
        chain = _Chain(len(policy.schedule), len(held))
        if len(held):
            chain.run(policy, base, policy.gather(state, held) if len(held) < rows else state, drawn)
            scores = _scored(policy, chain.state, reward)
        else:
            scores = torch.zeros(0, dtype=torch.float64)
    # Rows of a prompt lie together: the ranks hold blocks of n.
    scores, kl = (_joined(x, n, rows) for x in (scores, chain.kl.T))
    return Rollout(chain.xs, chain.log_prob, kl.T, chain.base_means, held, group, scores, encoded)


def _joined(mine: Tensor, n: int, rows: int) -> Tensor:
    """Rows of every rank `[rows, ...]`, in blocks of `n`."""
    blocks = mine.reshape(len(mine) // n, n, *mine.shape[1:])
    return ranks().join(blocks, rows // n).flatten(0, 1)


class _Chain:
    """The steps of some rows."""

    def __init__(self, steps: int, rows: int) -> None:
        self.xs: list[Tensor] = []
        self.log_prob = torch.zeros(steps, rows, dtype=torch.float64)
        self.kl = torch.zeros(steps, rows, dtype=torch.float64)
        self.base_means: list[Tensor | None] = []
        self.state: Any = None

    def run(self, policy: DiffusionProcess, base: DiffusionProcess | None, state: Any, drawn: torch.Generator) -> None:
        """Draw them to the end."""
        schedule = policy.schedule
        self.xs.append(state.x)
        while not policy.done(state):
            state = policy.read(state)
            assert state.x0 is not None
            step, std, x = state.step, schedule.std[state.step], state.x
            mean = schedule.mean(x, state.x0, step) if std > DETERMINISTIC else None
            state = policy.propose(state, drawn)
            self.xs.append(state.x)
            self.log_prob[step] = _log_density(state.x, mean, std)
            other = None
            if base is not None and mean is not None:
                other = schedule.mean(x, base.predict(x, step, state.group, state.encoded), step)
            self.base_means.append(other)
            self.kl[step] = _kl(mean, other, std, len(x))
        self.state = state


def _log_density(x: Tensor, mean: Tensor | None, std: float) -> Tensor:
    """Log-density of a step, summed over dimensions, without its constant: `[N]` on the CPU. 0 without noise."""
    return torch.zeros(len(x)).double() if mean is None else -step_kl(x, mean, std).cpu()


def _kl(mean: Tensor | None, other: Tensor | None, std: float, rows: int) -> Tensor:
    """KL of a step to the base `[N]` on the CPU; 0 without noise or base."""
    return torch.zeros(rows).double() if mean is None or other is None else step_kl(mean, other, std).cpu()


def rank_pairs(
    process: DiffusionProcess,
    prompts: Sequence[Prompt],
    n: int,
    reward: Reward,
    seed: int,
    *,
    rows: int = 64,
    tick: Callable[[int], None] = lambda count: None,
) -> list[Pair]:
    """The best and the worst of `n` samples for every prompt; prompts whose samples all score the same are left out.

    Args:
        rows: about how many are drawn at once.

    Raises:
        InputError: the reward tells no samples apart.
    """
    found = []
    for some, drawn, scored in draw_in_parts(process, prompts, n, rows, seed, "pairs", reward=reward):
        scores, x = scored.view(len(some), n), drawn.view(len(some), n, *drawn.shape[1:])
        for b, prompt in enumerate(some):
            high, low = int(scores[b].argmax()), int(scores[b].argmin())
            if scores[b, high] > scores[b, low]:
                found.append(Pair(prompt, x[b, high].cpu().clone(), x[b, low].cpu().clone()))
        tick(len(some))
    check(bool(found), "reward", str(reward), "a reward that is not the same on all samples of a prompt")
    return found

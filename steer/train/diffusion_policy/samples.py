"""Samples that a diffusion policy is tuned on: finished rows, chains with all their steps, ranked pairs.

Letters: `N` rows, `S` steps of a chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steer.core import Prompt, Reward, RewardError, check
from steer.diffusion import DiffusionProcess
from steer.diffusion.schedule import DETERMINISTIC
from steer.seeds import mixed
from steer.train.diffusion_policy.inputs import Pair
from steer.train.diffusion_policy.losses import step_kl


@dataclass
class Rollout:
    """Chains as they were drawn, and all that a policy gradient needs of them."""

    x: list[Tensor] = field(repr=False)
    """Rows at every level, `S + 1` of `[N, ...]`."""
    log_prob: Tensor
    """Of every step under the policy that drew it `[S, N]`, float64, without the constant."""
    kl: Tensor
    """Of every step to the base `[S, N]`; 0 where it was not asked for."""
    base_mean: list[Tensor | None] = field(repr=False)
    """Mean of the next state under the base."""
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
    process: DiffusionProcess, prompts: Sequence[Prompt], n: int, rows: int, *seed: object
) -> Iterator[tuple[Sequence[Prompt], Any]]:
    """`draw_rows` for some prompts after others, about `rows` rows at once: these prompts, and their last state."""
    at_once = max(1, rows // n)
    for first in range(0, len(prompts), at_once):
        some = prompts[first : first + at_once]
        yield some, draw_rows(process, some, n, mixed(*seed, first))


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
    """Draw `n` chains for each prompt and keep their steps; `base` is asked for the KL unless it is None.

    Raises:
        RewardError: scores that are not finite numbers, one for each sample.
    """
    drawn = torch.Generator().manual_seed(seed)
    schedule = policy.schedule
    xs: list[Tensor] = []
    log_probs, kls, base_means = [], [], []
    with policy.session():
        state = policy.init(prompts, n, drawn)
        xs.append(state.x)
        while not policy.done(state):
            state = policy.read(state)
            assert state.x0 is not None
            step, std, x = state.step, schedule.std[state.step], state.x
            mean = schedule.mean(x, state.x0, step) if std > DETERMINISTIC else None
            state = policy.propose(state, drawn)
            xs.append(state.x)
            log_probs.append(_log_density(state.x, mean, std))
            other = None
            if base is not None and mean is not None:
                other = schedule.mean(x, base.predict(x, step, state.group, state.encoded), step)
            base_means.append(other)
            kls.append(_kl(mean, other, std, len(x)))
    scores = _scored(policy, state, reward)
    return Rollout(
        xs, torch.stack(log_probs), torch.stack(kls), base_means, state.group, scores, policy.denoiser.encode(prompts)
    )


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
    for some, state in draw_in_parts(process, prompts, n, rows, seed, "pairs"):
        scores = _scored(process, state, reward).view(len(some), n)
        x = state.x.view(len(some), n, *state.x.shape[1:])
        for b, prompt in enumerate(some):
            high, low = int(scores[b].argmax()), int(scores[b].argmin())
            if scores[b, high] > scores[b, low]:
                found.append(Pair(prompt, x[b, high].cpu().clone(), x[b, low].cpu().clone()))
        tick(len(some))
    check(bool(found), "reward", str(reward), "a reward that is not the same on all samples of a prompt")
    return found

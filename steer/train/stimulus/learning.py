"""The rounds: hints are drawn, the black box answers under them, and the policy moves towards the better ones.

    R_i = scale * mean_j R(x, y_ij) + step        A_i = (R_i - c K_i) - mean_{k != i} (R_k - c K_k)
    loss = (- mean_i A_i log p(z_i | x) + c mean_i K_i) / std(R)

over the hints i of an input; K_i is the KL of the laws of the hint's draws to the reference's, exact and summed along
the draws. That the advantage holds -c K_i and the loss c K_i too makes the gradient that of `E R - c KL`, also where
later draws depend on earlier ones. Leaving one out is unbiased and needs no value network.

Letters: `B` inputs, `n` hints of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.core import SteerError
from steer.train.loop import load_state, save_state
from steer.train.stimulus.box import Bench
from steer.train.stimulus.extracting import Drawn, Policy
from steer.train.stimulus.rows import Row
from steer.train.stimulus.settings import StimulusSettings

__all__ = ["Rounds", "advantages", "controlled", "moved", "steps"]

_FAILING = 0.1
"""Share of a round's hints without a text above which the run stops."""


def controlled(c: float, kl: float, target: float, horizon: float = 10.0) -> float:
    """The next KL coefficient: `c (1 + clip((kl - target) / target, -.2, .2) / horizon)`, at most 2 % a step by
    default. Ziegler et al. 2019 (1909.08593), as in the code of directional stimulus prompting.
    """
    error = (kl - target) / target
    return c * (1 + min(0.2, max(-0.2, error)) / horizon)


def advantages(values: Tensor) -> Tensor:
    """Each value `[B, n]` less the mean of the others in its row; NaN are left out, and so are rows with fewer than two
    others than NaN: their advantages are 0.
    """
    there = ~values.isnan()
    count = there.sum(1, keepdim=True)
    filled = torch.where(there, values, 0.0)
    others = (filled.sum(1, keepdim=True) - filled) / (count - 1).clamp_min(1)
    return torch.where(there & (count > 1), filled - others, 0.0)


def steps(hint: str, row: Row, settings: StimulusSettings) -> float:
    """The part of the reward that looks at the hint itself."""
    if settings.step == 0 or not row.hint:
        return 0.0
    wanted, phrases = set(row.hint), [part for part in hint.split("; ") if part]
    return settings.step * sum(1.0 if phrase in wanted else -settings.step_penalty for phrase in phrases)


def moved(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    inputs: Sequence[str],
    drawn: Sequence[Sequence[Drawn]],
    rewards: Tensor,
    c: float,
) -> float:
    """One step on hints `drawn` for each input with `rewards` `[B, n]` (NaN: dropped); returns the mean KL."""
    flat = [(text, one) for text, row in zip(inputs, drawn, strict=True) for one in row]
    there = ~rewards.flatten().isnan()
    kept = [(i, *flat[i]) for i in there.nonzero().flatten().tolist()]
    parts = [kept[i : i + policy.chunk] for i in range(0, len(kept), policy.chunk)]
    kl = torch.zeros(len(flat), dtype=torch.float64)
    whole = len(parts) == 1
    held: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        with torch.set_grad_enabled(whole):
            log_prob, gap = policy.terms([text for _, text, _ in part], [one for _, _, one in part])
        kl[[i for i, _, _ in part]] = gap.detach().double().cpu()
        held = [(log_prob, gap)] if whole else []
    gain = advantages(rewards - c * kl.reshape(rewards.shape)).flatten()
    spread = float(rewards[~rewards.isnan()].std(correction=0)) or 1.0
    optimizer.zero_grad()
    for part in parts:
        at = [i for i, _, _ in part]
        log_prob, gap = held[0] if whole else policy.terms([t for _, t, _ in part], [one for _, _, one in part])
        loss = (-(gain[at].to(log_prob) * log_prob).sum() + c * gap.sum()) / (len(kept) * spread)
        loss.backward()
    optimizer.step()
    return float(kl[there].mean())


@dataclass
class Rounds:
    """One run of rounds.

    Args:
        rows: that are learnt from.
        reserved: texts of the black box that are kept for the table at the end.
        work: a folder; a run that stopped goes on from there to the same result.
    """

    policy: Policy
    rows: list[Row]
    bench: Bench
    settings: StimulusSettings
    reserved: int = 0
    work: Path | None = None
    run: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""

    def __call__(self, tell: Callable[..., None] = lambda count, words="": None) -> list[dict[str, float]]:
        """All rounds, or as many as the budget allows; figures of each. Raises `SteerError` where the black box fails
        too often, or where the reward is the same whatever the hint.
        """
        settings, c = self.settings, self.settings.beta
        weights = self.policy.weights()
        optimizer = torch.optim.Adam(weights.values(), lr=settings.rate)
        path = None if self.work is None else self.work / "state.safetensors"
        saved = load_state(path, self.run, optimizer)
        if saved is not None:
            with torch.no_grad():
                for name, parameter in weights.items():
                    parameter.copy_(saved.parts["policy"][name])
            c, self.history = saved.facts["c"], saved.facts["history"]
            self.bench.box.asked |= set(saved.facts["asked"])
        tell(len(self.history))
        for number in range(len(self.history), settings.rounds):
            figures = self._round(number, c, optimizer)
            if figures is None:
                break
            c = controlled(c, figures["kl"], settings.target_kl, settings.horizon)
            self.history.append(figures)
            if path is not None:
                facts = {"c": c, "history": self.history, "asked": sorted(self.bench.box.asked)}
                save_state(path, self.run, {"policy": weights}, optimizer, **facts)
            tell(1, f"reward {figures['reward']:.4g}, KL {figures['kl']:.3g}")
        return self.history

    def _chosen(self, number: int) -> list[Row]:
        """A round's rows: each comes once before any comes again."""
        count = min(self.settings.inputs, len(self.rows))
        chosen = []
        for k in range(number * count, (number + 1) * count):
            epoch, place = divmod(k, len(self.rows))
            drawn = torch.Generator().manual_seed(self.settings.seed * 7919 + epoch)
            chosen.append(self.rows[int(torch.randperm(len(self.rows), generator=drawn)[place])])
        return chosen

    def _round(self, number: int, c: float, optimizer: torch.optim.Optimizer) -> dict[str, float] | None:
        settings, bench = self.settings, self.bench
        rows = self._chosen(number)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        inputs = [row.input for row in rows]
        drawn = self.policy.draw(inputs, settings.hints, generator)
        flat = [(row, one.hint) for row, mine in zip(rows, drawn, strict=True) for one in mine]
        asked = [row.input for row, _ in flat]
        hints = [hint for _, hint in flat]
        if bench.box.new(bench.prompts(asked, hints), bench.count) + self.reserved > bench.box.left:
            self.stopped = f"after {number} rounds: the next does not fit in {bench.box.limit} calls"
            return None
        worth = bench.worth(asked, hints)
        failing = float(worth.isnan().double().mean())
        if failing > _FAILING:
            raise SteerError(
                f"{failing:.0%} of the texts of round {number + 1} failed: {(bench.box.reasons or ['no reason'])[-1]}"
            )
        gained = torch.tensor([steps(hint, row, settings) for row, hint in flat]).double()
        rewards = (settings.scale * worth + gained).reshape(len(rows), settings.hints)
        several = any(len({one.hint for one in mine}) > 1 for mine in drawn)
        if number == 0 and several and not bool((advantages(rewards).abs() > 0).any()):
            raise SteerError(f"reward {bench.reward}: the same for all hints: the black box ignores the hint")
        kl = moved(self.policy, optimizer, inputs, drawn, rewards, c)
        good = worth[~worth.isnan()]
        return {
            "reward": float(good.mean()),
            "half": 1.96 * float(good.std()) / len(good) ** 0.5 if len(good) > 1 else 0.0,
            "kl": kl,
            "c": c,
            "failed": failing,
        }

"""Updates of pg: a round of chains, then policy gradients on their steps. Letters: `N` rows."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.core import Prompt, Reward
from steer.diffusion.schedule import DETERMINISTIC
from steer.ranks import ranks
from steer.seeds import mixed, whole_batch
from steer.train.diffusion_policy.inputs import DiffusionPolicySettings, Tunable
from steer.train.diffusion_policy.losses import advantages, clipped_objective, spreads, step_kl
from steer.train.diffusion_policy.samples import Rollout, roll_out
from steer.train.objectives.advantages import leave_one_out


class Online:
    """pg: a round of chains, then updates on their steps."""

    def __init__(
        self,
        policy: Tunable,
        base: Tunable,
        settings: DiffusionPolicySettings,
        prompts: list[Prompt],
        reward: Reward,
    ) -> None:
        self.policy, self.base, self.settings = policy, base, settings
        self.prompts, self.reward = prompts, reward
        self.round = -1
        self.rollout: Rollout | None = None
        self.advantage = self.scale = torch.zeros(0)
        self.spreads: list[float] = []
        """Standard deviation of the rewards inside groups, a figure for each round that was drawn."""

    def resume(self, history: dict[str, list[float]]) -> None:
        """Take up what earlier rounds of this run have seen, a figure for each update."""
        self.spreads = history.get("spread", [])[:: self.settings.steps]

    def batch(self, number: int) -> list[Prompt]:
        """The prompts of a round."""
        rows = whole_batch(self.settings.seed, number, len(self.prompts), self.settings.batch_size)
        return [self.prompts[i] for i in rows]

    def _roll_out(self, number: int) -> Rollout:
        settings = self.settings
        base = self.base.chain if settings.beta else None
        prompts, n = self.batch(number), settings.group_size
        found = roll_out(self.policy.chain, base, prompts, n, self.reward, mixed(settings.seed, "round", number))
        # A step is answerable for the reward and for the KL of the steps that follow it; its own has a gradient.
        later = found.kl.sum(0) - found.kl.cumsum(0)
        gain = found.reward - settings.beta * later
        scale, spread = spreads(found.reward, found.group, self.spreads)
        if settings.advantage == "leave-one-out":
            self.advantage, self.scale = leave_one_out(gain, found.group) / scale, scale
        else:
            self.advantage, self.scale = advantages(settings.advantage, gain, found.reward, found.group)
        self.spreads.append(spread)
        self.round, self.rollout = number, found
        return found

    def backward(self, step: int) -> dict[str, float]:
        """Gradients of one update."""
        number = step // self.settings.steps
        # Steps of a round that a restart cut through never are: states are written between rounds.
        found = self.rollout if number == self.round else self._roll_out(number)
        assert found is not None
        chosen, weight = self._chosen(step)
        total, clipped = 0.0, 0.0
        rows, shared = len(found.group), ranks()
        for at in chosen if len(found.held) else ():
            for part in torch.arange(len(found.held)).split(self.settings.max_batch):
                losses, beyond = self._losses(found, at, part)
                loss = losses.sum() * (weight / rows)
                (loss * shared.count).backward()
                total += float(loss.detach())
                clipped += beyond
        total, clipped = shared.total(total, clipped)
        return {
            "loss": total,
            "reward": float(found.reward.mean()),
            "kl": float(found.kl.sum(0).mean()),
            "clipped": clipped / (rows * len(chosen)),
            "spread": self.spreads[-1],
        }

    def _chosen(self, step: int) -> tuple[list[int], float]:
        """The steps of the chain that an update looks at, and how many steps with noise each stands for."""
        noisy = [i for i, std in enumerate(self.policy.chain.schedule.std) if std > DETERMINISTIC]
        drawn = torch.Generator().manual_seed(mixed(self.settings.seed, "update", step))
        count = max(1, round(self.settings.share * len(noisy)))
        order = torch.randperm(len(noisy), generator=drawn)[:count].tolist()
        return sorted(noisy[i] for i in order), len(noisy) / count

    def _losses(self, found: Rollout, at: int, part: Tensor) -> tuple[Tensor, int]:
        """Losses of a step `[N]`, and how many ratios lie beyond the clipping range."""
        settings = self.settings
        log_ratio, kl = self._step(found, at, part)
        rows = found.held[part]
        advantage, scale = (t.to(log_ratio.device) for t in (self.advantage[at, rows], self.scale[rows]))
        objective = clipped_objective(log_ratio, advantage, settings.clip_range)
        beyond = (log_ratio.detach().exp() - 1).abs().gt(settings.clip_range).sum()
        return settings.beta * kl / scale - objective, int(beyond)

    def _step(self, found: Rollout, at: int, part: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the ratio of the step's density to what it was when it was drawn, and the KL to the base, `[N]`."""
        chain = self.policy.chain
        x, group = found.x[at][part], found.group[found.held[part]]
        std = chain.schedule.std[at]
        mean = chain.schedule.mean(x, chain.predict(x, at, group, found.encoded), at)
        log_ratio = -step_kl(found.x[at + 1][part], mean, std) - found.log_prob[at, part].to(mean.device)
        other = found.base_mean[at]
        return log_ratio, torch.zeros_like(log_ratio) if other is None else step_kl(mean, other[part], std)

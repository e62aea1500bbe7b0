"""Updates of dpo and seppo: pairs under noise, the policy's error against a reference's. Letters: `N` pairs."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from steer.core import Prompt
from steer.ranks import ranks
from steer.seeds import mixed, whole_batch
from steer.train.diffusion_policy.inputs import DiffusionPolicySettings, Pair, Tunable
from steer.train.diffusion_policy.losses import dpo_loss, errors, seppo_loss
from steer.train.diffusion_policy.samples import draw_in_parts
from steer.train.diffusion_policy.state import State

BUFFER, REFRESH = 7, 30
"""SePPO: how many earlier states are kept, and how many updates lie between two of them."""


class Offline:
    """dpo and seppo: pairs under noise, the policy's error against a reference's."""

    def __init__(
        self,
        policy: Tunable,
        reference: Tunable | None,
        settings: DiffusionPolicySettings,
        pairs: list[Pair],
        state: State,
    ) -> None:
        assert reference is not None
        self.policy, self.reference, self.settings = policy, reference, settings
        self.pairs, self.state = pairs, state
        self.device = next(policy.module.parameters()).device
        self.drawn: dict[str, Tensor] = {}
        self.prepared = -1

    def batch(self, step: int) -> list[int]:
        """The pairs of an update."""
        return whole_batch(self.settings.seed, step, len(self.pairs), self.settings.batch_size)

    def backward(self, step: int) -> dict[str, float]:
        """Gradients of one update."""
        settings = self.settings
        chosen = self.batch(step)
        if settings.method == "seppo":
            self._refresh(step)
        drawn = torch.Generator().manual_seed(mixed(settings.seed, "step", step))
        count, shared = len(chosen), ranks()
        level = self._levels(count, drawn)
        winner = torch.stack([self.pairs[i].chosen for i in chosen])
        noise = torch.randn(winner.shape, generator=drawn, dtype=winner.dtype)
        loser = torch.stack([self._loser(i, drawn) for i in chosen])
        total, right = 0.0, 0.0
        for part in torch.arange(count)[shared.index :: shared.count].split(max(1, self.settings.max_batch // 2)):
            if not len(part):
                continue
            loss, better = self._losses(
                winner[part], loser[part], noise[part], level[part], [self.pairs[chosen[j]].prompt for j in part]
            )
            (loss.sum() * (shared.count / count)).backward()
            total, right = total + float(loss.detach().sum()), right + better
        total, right = shared.total(total, right)
        return {"loss": total / count, "accuracy": right / count}

    def _levels(self, count: int, drawn: torch.Generator) -> Tensor:
        """A noise level for each pair, one from each of `count` equal ranges: an update varies less than with
        independent levels.
        """
        levels = len(self.policy.levels.schedule)
        spread = (torch.randperm(count, generator=drawn) + torch.rand(count, generator=drawn)) / count
        return (spread * levels).long().clamp(max=levels - 1)

    def _losses(
        self, winner: Tensor, loser: Tensor, noise: Tensor, level: Tensor, prompts: list[Prompt]
    ) -> tuple[Tensor, int]:
        """Losses `[N]`, and for how many pairs the policy has gained on the winner more than on the loser."""
        x0, twice = torch.cat([winner, loser]).to(self.device), torch.cat([noise, noise]).to(self.device)
        group = torch.arange(len(prompts)).repeat(2)
        encoded = self.policy.levels.denoiser.encode(prompts)
        given = (x0, twice, level.repeat(2), group, encoded)
        with torch.no_grad():
            winner_ref, loser_ref = errors(self.reference.levels, *given).chunk(2)
        mine, other = errors(self.policy.levels, *given).chunk(2)
        rule = dpo_loss if self.settings.method == "dpo" else seppo_loss
        better = (mine - winner_ref) < (other - loser_ref)
        return rule(mine, other, winner_ref, loser_ref, self.settings.beta), int(better.sum())

    def _loser(self, i: int, drawn: torch.Generator) -> Tensor:
        pair = self.pairs[i]
        if self.settings.method == "dpo":
            assert pair.rejected is not None
            return pair.rejected
        mine = self.drawn[_key(pair.prompt)]
        return mine[int(torch.randint(len(mine), (1,), generator=drawn))]

    def _refresh(self, step: int) -> None:
        """Every `REFRESH` updates: keep the policy as it is, choose a reference among what was kept, and draw what the
        coming updates are compared with. After a restart in between only the last two are done again.
        """
        number = step // REFRESH
        if number == self.prepared:
            return
        if step % REFRESH == 0:
            self.state.buffer = [*self.state.buffer, self.state.snapshot()][-BUFFER:]
        drawn = torch.Generator().manual_seed(mixed(self.settings.seed, "reference", number))
        which = int(torch.randint(len(self.state.buffer), (1,), generator=drawn))
        self.reference.put(self.state.buffer[which])
        self.drawn = self._draw_losers(number)
        self.prepared = number

    def _draw_losers(self, number: int) -> dict[str, Tensor]:
        """The reference's samples for every prompt that is looked at before the next refresh."""
        settings = self.settings
        coming = range(number * REFRESH, min((number + 1) * REFRESH, settings.total))
        wanted = {_key(p): p for s in coming for p in (self.pairs[i].prompt for i in self.batch(s))}
        prompts, n = list(wanted.values()), settings.group_size
        found: dict[str, Tensor] = {}
        parts = draw_in_parts(self.reference.chain, prompts, n, settings.max_batch, settings.seed, "losers", number)
        for some, drawn, _ in parts:
            for prompt, x in zip(some, drawn.cpu().split(n), strict=True):
                found[_key(prompt)] = x
        return found


def _key(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)

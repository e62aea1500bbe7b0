"""Tune a diffusion model as a policy: Diffusion-DPO, SePPO and policy gradients, on any `DiffusionProcess`.

No engine is needed: a `Tunable` is a torch module and the chains that run it.

- dpo (Wallace et al. 2023): of an image that is preferred and one that is not, the noise in the first is to be
  predicted better than the base does it, and that in the second worse.
- seppo (Zhang et al. 2024): the second image is a sample of the reference, an earlier state of the policy; it is
  learnt from, in place of unlearnt, where that state predicts the first image better than the policy does.
- pg: the stochastic chain is a Markov decision process (DDPO, Black et al. 2023; for flows Flow-GRPO, Liu et al. 2025).
  Its objective is `E[r] - beta KL(policy || base)` over chains, whose optimum has `p(x) exp(r(x) / beta)` as its law of
  finished rows, up to what the last steps without noise add.

The ratio of the densities of a step is that of all its dimensions together: log-densities are *summed*. The released
codes of DDPO and Flow-GRPO take their mean, which shrinks ratio, clipping range and KL by the number of dimensions;
only with the sum is the gradient that of the objective, and `beta` what it is everywhere else in `steer`.

Letters: `N` rows, `S` steps of a chain, `C`, `H`, `W` of a row.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steer.artifacts import replacing
from steer.core import Ability, InputError, Prompt, Reward, RewardError, SteerError, check
from steer.diffusion import DETERMINISTIC, DiffusionProcess
from steer.progress import ticking

__all__ = [
    "METHODS",
    "Pair",
    "PolicySettings",
    "Rollout",
    "Tunable",
    "advantages",
    "clipped_objective",
    "dpo_loss",
    "draw_rows",
    "errors",
    "rank_pairs",
    "roll_out",
    "seppo_loss",
    "step_kl",
    "tune",
]

METHODS = ("dpo", "seppo", "pg")
BUFFER, REFRESH = 7, 30
"""SePPO: how many earlier states are kept, and how many updates lie between two of them."""


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """How a policy is tuned. Raises `InputError` for a value out of range."""

    method: str
    beta: float
    """dpo, seppo: strength of the pull to the reference, with the number of noise levels folded in; pg: KL coefficient,
    0 is off.
    """
    learning_rate: float
    """Of AdamW without weight decay; constant. The norm of a gradient is cut to 1."""
    steps: int
    """Updates; for pg those of every round."""
    rounds: int = 1
    """Of samples, for pg."""
    batch_size: int = 8
    """Pairs of an update; for pg prompts of a round."""
    group_size: int = 8
    """Samples for each prompt."""
    clip_range: float = 0.2
    """pg: ratios beyond 1 +- this bring no more (PPO)."""
    share: float = 1.0
    """pg: share of the chain's steps that an update looks at, drawn at random."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then the result; 0 is off."""
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.method in METHODS, "method", self.method, ", ".join(METHODS))
        zero = self.method == "pg"
        number = isinstance(self.beta, int | float) and not isinstance(self.beta, bool) and math.isfinite(self.beta)
        fits = number and (self.beta >= 0 if zero else self.beta > 0)
        check(fits, "beta", self.beta, "a number of 0 or more" if zero else "a number above 0")
        for name, least in (("steps", 1), ("rounds", 1), ("batch_size", 1), ("group_size", 2), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            check(whole, name, value, f"an integer of {least} or more")
        for name, most in (("learning_rate", math.inf), ("clip_range", math.inf), ("share", 1.0)):
            value = getattr(self, name)
            fits = isinstance(value, int | float) and 0 < value <= most and math.isfinite(value)
            check(fits, name, value, "a number above 0" + (f", at most {most:g}" if most < math.inf else ""))
        check(isinstance(self.ema, int | float) and 0 <= self.ema < 1, "ema", self.ema, "0 (off) <= ema < 1")

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.steps * (self.rounds if self.method == "pg" else 1)

    def recipe(self) -> dict[str, Any]:
        """The entries that matter for this method."""
        online = ("rounds", "clip_range", "share")
        return {k: v for k, v in asdict(self).items() if self.method == "pg" or k not in online}


@dataclass(frozen=True)
class Tunable:
    """A module and two chains that run it.

    Attributes:
        module: its parameters that require a gradient are what is tuned.
        chain: how samples are drawn; pg tunes its steps.
        levels: a chain whose noise levels dpo and seppo draw from; how many steps it has, and of which kind, does not
            matter. A denoiser with `per_row = True` takes a tensor of levels `[N]` for `step`.
    """

    module: nn.Module
    chain: DiffusionProcess
    levels: DiffusionProcess

    def weights(self) -> dict[str, nn.Parameter]:
        """What is tuned, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def put(self, weights: dict[str, Tensor]) -> None:
        """Give the tuned parameters these values."""
        for name, parameter in self.weights().items():
            parameter.copy_(weights[name])


@dataclass(frozen=True)
class Pair:
    """Finished rows `[C, H, W]` for one prompt. seppo draws the rejected one itself."""

    prompt: Prompt
    chosen: Tensor = field(repr=False)
    rejected: Tensor | None = field(default=None, repr=False)


# ----------------------------------------------------------------------------------------------------------- formulas


def dpo_loss(winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, beta: float) -> Tensor:
    """`-log sigmoid(-beta/2 [(L+ - L+_ref) - (L- - L-_ref)])` `[N]` from mean squared errors `[N]` (Wallace et al.
    2023, eq. 14, the number of noise levels folded into `beta`). Exact in the tails: neither 0 nor infinity gives NaN.
    """
    return -nn.functional.logsigmoid(-0.5 * beta * ((winner - winner_ref) - (loser - loser_ref)))


def seppo_loss(winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, beta: float) -> Tensor:
    """As `dpo_loss`, but `+ (L- - L-_ref)` where the policy predicts the winner no better than the reference does: then
    the reference's sample is taken for a good one (SePPO's anchor; Zhang et al. 2024). Errors `[N]`; gives `[N]`.
    """
    sign = torch.where(winner.detach() < winner_ref, 1.0, -1.0).to(winner.dtype)
    return -nn.functional.logsigmoid(-0.5 * beta * ((winner - winner_ref) - sign * (loser - loser_ref)))


def advantages(gain: Tensor, reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """What a row brings beyond the mean of its group, and the scale of its group `[N]`.

    Both are for one division: by the standard deviation of the group's rewards (GRPO), 1 where they are all the same.
    A KL term that is divided by the same scale leaves every prompt's optimum where it was.

    Args:
        gain: `[..., N]`, what is compared: the reward, less what the KL of later steps costs.
        reward: `[N]`.
        group: `[N]`.
    """
    excess, scale = torch.empty_like(gain), torch.ones_like(reward)
    for g in group.unique():
        rows = group == g
        excess[..., rows] = gain[..., rows] - gain[..., rows].mean(-1, keepdim=True)
        spread = reward[rows].std(correction=0)
        if spread > 1e-8:
            scale[rows] = spread
    return excess / scale, scale


def clipped_objective(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """PPO's `min(ratio A, clip(ratio) A)`, elementwise; its gradient at ratio 1 is REINFORCE's."""
    ratio = log_ratio.clamp(max=20).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def step_kl(mean: Tensor, other: Tensor, std: float) -> Tensor:
    """KL of two Gaussians with these means `[N, ...]` and the same standard deviation, summed over dimensions: `[N]` in
    float64, nats.
    """
    return (mean.double() - other.double()).flatten(1).square().sum(1) / (2 * std * std)


def errors(process: DiffusionProcess, x0: Tensor, noise: Tensor, level: Tensor, group: Tensor, encoded: Any) -> Tensor:
    """Mean squared error of the noise that is predicted in `alpha x0 + sigma noise`, `[N]`.

    Args:
        x0: finished rows `[N, ...]`.
        noise: `[N, ...]`.
        level: number of each row's noise level `[N]`, on the CPU.
        group: prompt of each row `[N]`.
        encoded: of the denoiser's `encode`.
    """
    schedule, wide = process.schedule, (-1, *[1] * (x0.dim() - 1))
    alpha = torch.tensor(schedule.alpha, dtype=x0.dtype)[level].to(x0.device).view(wide)
    sigma = torch.tensor(schedule.sigma, dtype=x0.dtype)[level].to(x0.device).view(wide)
    x = alpha * x0 + sigma * noise
    if getattr(process.denoiser, "per_row", False):
        found = process.denoiser.predict(x, level, group, encoded)  # type: ignore[arg-type]
    else:
        found = torch.empty_like(x)
        for one in level.unique().tolist():
            rows = level == one
            found[rows.to(x.device)] = process.predict(x[rows.to(x.device)], one, group[rows], encoded)
    # eps_hat - eps = alpha / sigma (x0 - x0_hat)
    return ((alpha / sigma) * (found - x0)).flatten(1).square().mean(1)


# ------------------------------------------------------------------------------------------------------------ samples


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
            step, std, mean, x = state.step, schedule.std[state.step], None, state.x
            if std > DETERMINISTIC:
                mean = schedule.mean(x, state.x0, step)
            state = policy.propose(state, drawn)
            xs.append(state.x)
            log_probs.append(_log_density(state.x, mean, std))
            other = None
            if base is not None and mean is not None:
                other = schedule.mean(x, base.predict(x, step, state.group, state.encoded), step)
            base_means.append(other)
            apart = torch.zeros(len(x)).double()
            if mean is not None and other is not None:
                apart = step_kl(mean, other, std).cpu()
            kls.append(apart)
    scores = _scored(policy, state, reward)
    return Rollout(
        xs, torch.stack(log_probs), torch.stack(kls), base_means, state.group, scores, policy.denoiser.encode(prompts)
    )


def _log_density(x: Tensor, mean: Tensor | None, std: float) -> Tensor:
    """Log-density of a step, summed over dimensions, without its constant: `[N]` on the CPU. 0 without noise."""
    return torch.zeros(len(x)).double() if mean is None else -step_kl(x, mean, std).cpu()


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
    at_once = max(1, rows // n)
    for first in range(0, len(prompts), at_once):
        some = prompts[first : first + at_once]
        state = draw_rows(process, some, n, _mixed(seed, "pairs", first))
        scores = _scored(process, state, reward).view(len(some), n)
        x = state.x.view(len(some), n, *state.x.shape[1:])
        for b, prompt in enumerate(some):
            high, low = int(scores[b].argmax()), int(scores[b].argmin())
            if scores[b, high] > scores[b, low]:
                found.append(Pair(prompt, x[b, high].cpu().clone(), x[b, low].cpu().clone()))
        tick(len(some))
    check(bool(found), "reward", str(reward), "a reward that is not the same on all samples of a prompt")
    return found


# ------------------------------------------------------------------------------------------------------------- tuning


def tune(
    policy: Tunable,
    base: Tunable,
    settings: PolicySettings,
    *,
    prompts: Sequence[Prompt] = (),
    pairs: Sequence[Pair] = (),
    reward: Reward | None = None,
    earlier: Tunable | None = None,
    rows: int = 64,
    work: Path | None = None,
    run: dict[str, Any] | None = None,
    every: int = 10,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Tune `policy.module` in place; `base` is only read. Returns what was seen at each update, by name.

    All randomness depends on the seed and the number of the update. The state is written to `work` every `every`
    updates, for pg after every round, atomically: a run that was stopped and started again ends at the same weights,
    bit for bit.

    Args:
        policy: the module, with the weights of the base.
        base: the reference of dpo, and where pg's KL goes to.
        prompts, reward: of pg.
        pairs: of dpo and seppo.
        earlier: of seppo, a third copy, which takes the weights of earlier states of the policy.
        rows: put through the network at once.
        work: folder; `run` is what a state that lies there must have been made with.
        every: updates between two writes to it.

    Raises:
        InputError: settings, data and method do not fit, or `work` holds the state of another run.
        RewardError: rewards that are not finite numbers, one for each sample.
        UnsupportedError: pg on a chain without noise; a network that keeps no gradient.
        SteerError: the loss is no longer finite.
    """
    _check_fit(policy, settings, prompts, pairs, reward, earlier)
    weights = policy.weights()
    check(bool(weights), "policy", type(policy.module).__name__, "a module with parameters that require a gradient")
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.learning_rate, weight_decay=0.0)
    state = _State(weights, optimizer, settings, run or settings.recipe(), work)
    state.resume()
    tuner: _Online | _Offline
    if settings.method == "pg":
        assert reward is not None
        tuner = _Online(policy, base, settings, list(prompts), reward, rows)
    else:
        tuner = _Offline(policy, earlier if settings.method == "seppo" else base, settings, list(pairs), state, rows)
    policy.module.eval()
    span = settings.steps if settings.method == "pg" else every
    with ticking(progress, f"tuning by {settings.method}", settings.total) as tick:
        tick(state.step)
        while state.step < settings.total:
            optimizer.zero_grad(set_to_none=True)
            seen = tuner.backward(state.step)
            norm = nn.utils.clip_grad_norm_(weights.values(), 1.0)
            if not (math.isfinite(seen["loss"]) and bool(norm.isfinite())):
                raise SteerError(f"train policy: the loss at update {state.step} is not finite; lower learning_rate")
            optimizer.step()
            state.advance(seen)
            tick(1)
            if state.step % span == 0 or state.step == settings.total:
                state.save()
    if state.average:
        policy.put(state.average)
    return state.history


def _check_fit(
    policy: Tunable,
    settings: PolicySettings,
    prompts: Sequence[Prompt],
    pairs: Sequence[Pair],
    reward: Reward | None,
    earlier: Tunable | None,
) -> None:
    who = f"train policy by {settings.method}"
    policy.chain.require(Ability.GRADIENT, who)
    if settings.method == "pg":
        policy.chain.require(Ability.BRANCH, who)
        check(reward is not None, "reward", None, "one, for pg")
        check(len(prompts) > 0, "prompts", list(prompts), "at least one")
        policy.chain.denoiser.encode(prompts)
        return
    check(len(pairs) > 0, "pairs", list(pairs), "at least one")
    policy.levels.denoiser.encode([pair.prompt for pair in pairs])
    shape = pairs[0].chosen.shape
    for i, pair in enumerate(pairs):
        rows = [pair.chosen, *([pair.rejected] if settings.method == "dpo" else [])]
        for row in rows:
            check(row is not None and row.shape == shape, f"pairs[{i}]", getattr(row, "shape", None), f"{tuple(shape)}")
    check(settings.method == "dpo" or earlier is not None, "earlier", None, "a third copy of the model, for seppo")


class _State:
    """Where a run stands: weights, optimizer, average, earlier states, and what was seen."""

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        settings: PolicySettings,
        run: dict[str, Any],
        work: Path | None,
    ) -> None:
        self.weights, self.optimizer, self.settings = weights, optimizer, settings
        self.facts = json.dumps(run, sort_keys=True)
        self.path = None if work is None else work / "policy.safetensors"
        self.step = 0
        self.history: dict[str, list[float]] = {}
        self.average = self.snapshot() if settings.ema else {}
        self.buffer: list[dict[str, Tensor]] = []

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the weights."""
        return {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def advance(self, seen: dict[str, float]) -> None:
        for name, value in seen.items():
            self.history.setdefault(name, []).append(value)
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        for name, mean in self.average.items():
            mean.lerp_(self.weights[name], 1 - decay)
        self.step += 1

    def save(self) -> None:
        if self.path is None:
            return
        tensors: dict[str, Tensor] = {f"weights.{k}": v for k, v in self.weights.items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for i, earlier in enumerate(self.buffer):
            tensors |= {f"buffer.{i}.{k}": v for k, v in earlier.items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entry.items()}
        facts = {"settings": self.facts, "step": str(self.step), "history": json.dumps(self.history)}
        with replacing(self.path) as temporary:
            save_file({k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}, temporary, facts)

    @torch.no_grad()
    def resume(self) -> None:
        if self.path is None or not self.path.is_file():
            return
        allowed = "an empty folder, or the state of a run with these very settings"
        with safe_open(self.path, "pt") as file:
            facts = file.metadata()
        if facts.get("settings") != self.facts:
            raise InputError("work", str(self.path.parent), allowed)
        entries: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}, "buffer": {}, "optimizer": {}}
        for key, value in load_file(self.path).items():
            kind, _, name = key.partition(".")
            entries[kind][name] = value
        for name, parameter in self.weights.items():
            parameter.copy_(entries["weights"][name])
        for name, mean in self.average.items():
            mean.copy_(entries["average"][name])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in entries["optimizer"].items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        count = len({key.partition(".")[0] for key in entries["buffer"]})
        like = self.weights
        self.buffer = [{k: entries["buffer"][f"{i}.{k}"].to(like[k].device) for k in like} for i in range(count)]
        self.step, self.history = int(facts["step"]), json.loads(facts["history"])


# ---------------------------------------------------------------------------------------------------------- dpo, seppo


class _Offline:
    """dpo and seppo: pairs under noise, the policy's error against a reference's."""

    def __init__(
        self,
        policy: Tunable,
        reference: Tunable | None,
        settings: PolicySettings,
        pairs: list[Pair],
        state: _State,
        rows: int,
    ) -> None:
        assert reference is not None
        self.policy, self.reference, self.settings = policy, reference, settings
        self.pairs, self.state, self.rows = pairs, state, rows
        self.device = next(policy.module.parameters()).device
        self.drawn: dict[Any, Tensor] = {}
        self.prepared = -1

    def batch(self, step: int) -> list[int]:
        """The pairs of an update: whole batches of a permutation that is new in every pass over the data."""
        size = min(self.settings.batch_size, len(self.pairs))
        passes, at = divmod(step, len(self.pairs) // size)
        drawn = torch.Generator().manual_seed(_mixed(self.settings.seed, "pass", passes))
        return torch.randperm(len(self.pairs), generator=drawn)[at * size : (at + 1) * size].tolist()

    def backward(self, step: int) -> dict[str, float]:
        """Gradients of one update."""
        settings = self.settings
        chosen = self.batch(step)
        if settings.method == "seppo":
            self._refresh(step)
        drawn = torch.Generator().manual_seed(_mixed(settings.seed, "step", step))
        count, levels = len(chosen), len(self.policy.levels.schedule)
        # One level from each of N equal ranges: an update varies less than with independent levels.
        spread = (torch.randperm(count, generator=drawn) + torch.rand(count, generator=drawn)) / count
        level = (spread * levels).long().clamp(max=levels - 1)
        winner = torch.stack([self.pairs[i].chosen for i in chosen])
        noise = torch.randn(winner.shape, generator=drawn, dtype=winner.dtype)
        loser = torch.stack([self._loser(i, drawn) for i in chosen])
        total, right = 0.0, 0
        for part in torch.arange(count).split(max(1, self.rows // 2)):
            loss, better = self._losses(
                winner[part], loser[part], noise[part], level[part], [self.pairs[chosen[j]].prompt for j in part]
            )
            (loss.sum() / count).backward()
            total, right = total + float(loss.detach().sum()), right + better
        return {"loss": total / count, "accuracy": right / count}

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
        seed = self.settings.seed
        drawn = torch.Generator().manual_seed(_mixed(seed, "reference", number))
        which = int(torch.randint(len(self.state.buffer), (1,), generator=drawn))
        self.reference.put(self.state.buffer[which])
        coming = range(number * REFRESH, min((number + 1) * REFRESH, self.settings.total))
        wanted = {_key(p): p for s in coming for p in (self.pairs[i].prompt for i in self.batch(s))}
        self.drawn, n = {}, self.settings.group_size
        prompts = list(wanted.values())
        at_once = max(1, self.rows // n)
        for first in range(0, len(prompts), at_once):
            some = prompts[first : first + at_once]
            state = draw_rows(self.reference.chain, some, n, _mixed(seed, "losers", number, first))
            for prompt, x in zip(some, state.x.cpu().split(n), strict=True):
                self.drawn[_key(prompt)] = x
        self.prepared = number


def _key(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


# ------------------------------------------------------------------------------------------------------------------ pg


class _Online:
    """pg: a round of chains, then updates on their steps."""

    def __init__(
        self,
        policy: Tunable,
        base: Tunable,
        settings: PolicySettings,
        prompts: list[Prompt],
        reward: Reward,
        rows: int,
    ) -> None:
        self.policy, self.base, self.settings = policy, base, settings
        self.prompts, self.reward, self.rows = prompts, reward, rows
        self.round = -1
        self.rollout: Rollout | None = None
        self.advantage = self.scale = torch.zeros(0)

    def batch(self, number: int) -> list[Prompt]:
        """The prompts of a round."""
        size = min(self.settings.batch_size, len(self.prompts))
        passes, at = divmod(number, len(self.prompts) // size)
        drawn = torch.Generator().manual_seed(_mixed(self.settings.seed, "pass", passes))
        order = torch.randperm(len(self.prompts), generator=drawn)[at * size : (at + 1) * size]
        return [self.prompts[i] for i in order]

    def _roll_out(self, number: int) -> Rollout:
        settings = self.settings
        base = self.base.chain if settings.beta else None
        prompts, n = self.batch(number), settings.group_size
        found = roll_out(self.policy.chain, base, prompts, n, self.reward, _mixed(settings.seed, "round", number))
        # A step is answerable for the reward and for the KL of the steps that follow it; its own has a gradient.
        later = found.kl.sum(0) - found.kl.cumsum(0)
        self.advantage, self.scale = advantages(found.reward - settings.beta * later, found.reward, found.group)
        self.round, self.rollout = number, found
        return found

    def backward(self, step: int) -> dict[str, float]:
        """Gradients of one update."""
        settings = self.settings
        number = step // settings.steps
        # Steps of a round that a restart cut through never are: states are written between rounds.
        found = self.rollout if number == self.round else self._roll_out(number)
        assert found is not None
        schedule = self.policy.chain.schedule
        noisy = [i for i, std in enumerate(schedule.std) if std > DETERMINISTIC]
        drawn = torch.Generator().manual_seed(_mixed(settings.seed, "update", step))
        count = max(1, round(settings.share * len(noisy)))
        chosen = sorted(noisy[i] for i in torch.randperm(len(noisy), generator=drawn)[:count].tolist())
        total, clipped = 0.0, 0
        rows = len(found.group)
        for at in chosen:
            for part in torch.arange(rows).split(self.rows):
                log_ratio, kl = self._step(found, at, part)
                advantage, scale = (t.to(log_ratio.device) for t in (self.advantage[at, part], self.scale[part]))
                objective = clipped_objective(log_ratio, advantage, settings.clip_range)
                loss = (settings.beta * kl / scale - objective).sum() * (len(noisy) / count / rows)
                loss.backward()
                total += float(loss.detach())
                clipped += int((log_ratio.detach().exp() - 1).abs().gt(settings.clip_range).sum())
        return {
            "loss": total,
            "reward": float(found.reward.mean()),
            "kl": float(found.kl.sum(0).mean()),
            "clipped": clipped / (rows * count),
        }

    def _step(self, found: Rollout, at: int, part: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the ratio of the step's density to what it was when it was drawn, and the KL to the base, `[N]`."""
        chain = self.policy.chain
        x, group = found.x[at][part], found.group[part]
        std = chain.schedule.std[at]
        mean = chain.schedule.mean(x, chain.predict(x, at, group, found.encoded), at)
        log_ratio = -step_kl(found.x[at + 1][part], mean, std) - found.log_prob[at, part].to(mean.device)
        other = found.base_mean[at]
        return log_ratio, torch.zeros_like(log_ratio) if other is None else step_kl(mean, other[part], std)


def _mixed(*parts: object) -> int:
    """A seed that is as good as unrelated for every different list of parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1

"""Diffusion and flow models as a `Process`, whatever network and scheduler they come from.

A chain visits noise levels `x_i = alpha_i x_0 + sigma_i eps`, `i = 0` the noisiest. The network's view of a row is
x0-hat, its estimate of `E[x_0 | x_i]`; with `eps_hat = (x_i - alpha_i x0_hat) / sigma_i` every scheduler's step is

    x_{i+1} = signal_i x0_hat + noise_i eps_hat + std_i z,   z ~ N(0, 1)

so that one kernel serves all. The quantity at the TRANSITION site is x0-hat before any clipping; prediction types
(noise, velocity, flow) are converted where an adapter meets its engine. What is sampled, and steered, is the law of
this chain.

Letters: `N` rows, `S` steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from steer.core import (
    Ability,
    Context,
    Cost,
    Edit,
    Process,
    Prompt,
    Samples,
    Site,
    TransitionEdit,
    UnsupportedError,
    check,
)

__all__ = ["Denoiser", "DiffusionContext", "DiffusionProcess", "DiffusionState", "Schedule"]

Mounted = tuple[tuple[Edit, frozenset[int] | None], ...]

DETERMINISTIC = 1e-6
"""A step with a smaller std than this has no density: its law is a point."""

WAY_OUT = "use eta above 0 (eta=1.0), or a stochastic scheduler (DDPM, DDIM with eta, EulerAncestral, flow-sde)"

NO_GRADIENT = "a pipeline runs its network without gradients; load the network itself, with its scheduler"


@dataclass(frozen=True)
class Schedule:
    """Noise levels of a chain and the coefficients of its steps."""

    alpha: tuple[float, ...]
    """Signal at every level, `S + 1`."""
    sigma: tuple[float, ...]
    """Noise at every level, `S + 1`; only the last may be 0."""
    signal: tuple[float, ...]
    noise: tuple[float, ...]
    std: tuple[float, ...]
    clip: float | None = None
    """x0-hat is clipped to this range on either side, after edits."""
    clip_noise: bool = False
    """Whether eps-hat follows from the clipped x0-hat (DDPM) or from the one before (DDIM)."""

    def __post_init__(self) -> None:
        steps = len(self.signal)
        lengths = [len(self.alpha) - 1, len(self.sigma) - 1, len(self.noise), len(self.std)]
        check(steps >= 1 and lengths == [steps] * 4, "schedule", lengths, f"{steps} steps and one level more")
        check(min(self.sigma[:-1]) > 0, "sigma", min(self.sigma[:-1]), "above 0 at every level but the last")

    def __len__(self) -> int:
        return len(self.signal)

    @property
    def stochastic(self) -> bool:
        """Whether any step has noise."""
        return max(self.std) > DETERMINISTIC

    @property
    def last_noise(self) -> int:
        """Number of the last step with noise, -1 without any."""
        return max((i for i, s in enumerate(self.std) if s > DETERMINISTIC), default=-1)

    @classmethod
    def between(
        cls,
        alpha: Sequence[float],
        sigma: Sequence[float],
        eta: float = 1.0,
        clip: float | None = None,
        clip_noise: bool = False,
    ) -> Schedule:
        """DDIM's family over any levels (Song et al. 2021, eq. 16, written for a general alpha and sigma):
        `std = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)`, `noise = sqrt(sigma'^2 - std^2)`. With eta = 1
        it is DDPM's posterior on variance-preserving levels and Euler ancestral on variance-exploding ones; with
        eta = 0 the deterministic DDIM or Euler step.
        """
        check(isinstance(eta, int | float) and 0 <= eta <= 1, "eta", eta, "0 (deterministic) to 1")
        noise, std = [], []
        for (a, b), (s, t) in zip(_pairs(alpha), _pairs(sigma), strict=True):
            spread = eta * t * math.sqrt(max(1 - (a * t / (b * s)) ** 2, 0.0))
            std.append(spread)
            noise.append(math.sqrt(max(t * t - spread * spread, 0.0)))
        return cls(tuple(alpha), tuple(sigma), tuple(alpha[1:]), tuple(noise), tuple(std), clip, clip_noise)

    @classmethod
    def flow_sde(cls, sigma: Sequence[float], level: float = 0.7) -> Schedule:
        """The stochastic form of a flow `x = (1 - sigma) x_0 + sigma eps` with the same marginals (Flow-GRPO, Liu et
        al. 2025, eq. 9): noise `level * sqrt(sigma / (1 - sigma))` per unit of time, Euler-Maruyama, and a last step
        without noise.
        """
        check(isinstance(level, int | float) and level >= 0, "level", level, "0 or more")
        alpha = [1 - s for s in sigma]
        signal, noise, std = [], [], []
        last = len(sigma) - 2
        for i, (s, t) in enumerate(_pairs(sigma)):
            step = s - t
            # At sigma = 1 the rate is infinite; the next level's stands in, as in the paper's code.
            rate = 0.0 if i == last else level * math.sqrt(s / (1 - s if s < 1 else 1 - t))
            drift = rate * rate * step / (2 * s)
            # Their x + (1 - s) v, with v = eps - x_0, is eps.
            signal.append(1 - t)
            noise.append(t - drift)
            std.append(rate * math.sqrt(step))
        return cls(tuple(alpha), tuple(sigma), tuple(signal), tuple(noise), tuple(std))

    def noise_hat(self, x: Tensor, x0: Tensor, step: int) -> Tensor:
        """eps-hat that goes with x0-hat."""
        return (x - self.alpha[step] * x0) / self.sigma[step]

    def mean(self, x: Tensor, x0: Tensor, step: int) -> Tensor:
        """Mean of the next state, from x0-hat before clipping."""
        kept = self.clipped(x0)
        eps = self.noise_hat(x, kept if self.clip_noise else x0, step)
        return self.signal[step] * kept + self.noise[step] * eps

    def clipped(self, x0: Tensor) -> Tensor:
        """x0-hat as the step and previews use it."""
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def leverage(self, step: int) -> float:
        """How far the mean of the next state moves for each unit that x0-hat moves."""
        return self.signal[step] - self.noise[step] * self.alpha[step] / self.sigma[step]


def _pairs(levels: Sequence[float]) -> list[tuple[float, float]]:
    return list(pairwise(levels))


class Denoiser(Protocol):
    """A network with its conditioning: the part of a diffusion model that an adapter supplies. One whose `predict`
    keeps no graph says `differentiable = False`; one that has something to set up for a run has a `session()`, one
    whose `encode` is dear a `validate(prompts)` that only checks.
    """

    def encode(self, prompts: Sequence[Prompt]) -> Any:
        """What `predict` needs to know of the prompts. Raises `InputError` for one that it cannot take."""

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` rows of x at the noisiest level `[n, ...]`."""

    def predict(self, x: Tensor, step: int, group: Tensor, encoded: Any) -> Tensor:
        """x0-hat `[N, ...]` of rows `x` at noise level `step`, row i for prompt `group[i]`."""

    def decode(self, x: Tensor) -> Tensor:
        """Finished rows as outputs (images `[N, C, H, W]` in [0, 1])."""

    def preview(self, x0: Tensor) -> Tensor:
        """x0-hat as outputs; may be cheaper than `decode`."""

    def show(self, prompt: Prompt) -> Any:
        """The prompt as it appears in results."""


@dataclass(frozen=True)
class DiffusionState:
    """Rows at one noise level."""

    x: Tensor
    group: Tensor
    step: int
    log_prob: Tensor
    base_log_prob: Tensor
    tilt: Tensor
    kl: Tensor
    cost: Cost
    prompts: list[Prompt] = field(repr=False)
    encoded: Any = field(repr=False)
    x0: Tensor | None = field(default=None, repr=False)
    """The network's x0-hat of `x`, once it was read."""
    moved: Tensor | None = field(default=None, repr=False)
    """x0-hat under the edits; the same tensor where there are none."""
    parent: Tensor | None = field(default=None, repr=False)
    """x0-hat of the state that this one was drawn from."""

    def __len__(self) -> int:
        return len(self.group)


@dataclass
class DiffusionContext:
    """What a transition edit sees of a diffusion model's rows; `base` is x0-hat."""

    process: Diffusion
    prefix: Tensor
    step: int
    base: Tensor
    group: Tensor
    encoded: Any = field(repr=False)
    prompts: list[Prompt] = field(repr=False)
    evaluations: int = 0
    """Rows put through companions' networks."""

    @property
    def hidden(self) -> Tensor:
        raise UnsupportedError("a diffusion process shows no hidden states")

    def lookahead(self, candidates: Tensor) -> Tensor:
        raise UnsupportedError("a diffusion process has no candidates to look at")

    def companion(self, process: Process) -> Context:
        """The same rows under another process over the same levels; calls its network."""
        assert isinstance(process, Diffusion)
        self.evaluations += len(self.prefix)
        with torch.set_grad_enabled(self.base.requires_grad):
            base = process.predict(self.prefix, self.step, self.group, self.encoded)
        return DiffusionContext(process, self.prefix, self.step, base, self.group, self.encoded, self.prompts)

    def guidance(self, score: Callable[[Samples], Tensor]) -> Tensor:
        """The shift of x0-hat that moves the mean of the next state by `std^2` times the gradient of `score` of the
        decoded x0-hat with respect to x; a gradient that is not a number counts as 0. In a chain without any noise it
        adds the gradient to the score function instead (classifier guidance, Dhariwal & Nichol 2021).
        """
        if not (self.prefix.requires_grad and self.base.requires_grad):
            raise UnsupportedError("guidance needs an edit that declares gradient = True")
        with torch.enable_grad():
            shown = self.process.denoiser.preview(self.process.schedule.clipped(self.base))
            total = score(self.process.samples(shown, self.group, self.prompts)).sum()
        if not total.requires_grad:
            raise UnsupportedError("guidance needs a reward that is differentiable in the outputs; this one is not")
        (gradient,) = torch.autograd.grad(total, self.prefix, retain_graph=True)
        gradient = gradient.nan_to_num(0.0)
        schedule, step = self.process.schedule, self.step
        if not schedule.stochastic:
            return gradient * (schedule.sigma[step] ** 2 / max(schedule.alpha[step], 1e-3))
        variance = schedule.std[step] ** 2
        return gradient * (variance / schedule.leverage(step)) if variance > 0 else torch.zeros_like(gradient)


class Diffusion(Process):
    """A chain over noise levels. Concrete classes are frozen dataclasses with the fields that are declared here."""

    sites = frozenset({Site.TRANSITION})
    random_start = True
    edits: Mounted
    proposal: bool
    """Whether edits leave alone the steps without noise."""
    shown: str
    """What `preview` decodes: "current", x0-hat of the rows as they stand, or "previous", that of the states they were
    drawn from, as the released FK code does before its last step.
    """

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """Noise levels and steps."""

    @property
    @abstractmethod
    def denoiser(self) -> Denoiser:
        """The network."""

    @abstractmethod
    def predict(self, x: Tensor, step: int, group: Tensor, encoded: Any) -> Tensor:
        """x0-hat of any number of rows; encoded prompts of a lockstep companion are those of the leading process."""

    @property
    def abilities(self) -> frozenset[Ability]:
        found = {Ability.FORK, Ability.LOG_PROB, Ability.PREVIEW}
        if self.schedule.stochastic:
            found.add(Ability.BRANCH)
        if getattr(self.denoiser, "differentiable", True):
            found.add(Ability.GRADIENT)
        return frozenset(found)

    def way_out(self, ability: Ability) -> str:
        return {Ability.BRANCH: WAY_OUT, Ability.GRADIENT: NO_GRADIENT}.get(ability, "")

    @property
    def num_steps(self) -> int:
        return len(self.schedule)

    def copy(self, edits: Mounted) -> Any:
        return replace(self, edits=edits)  # type: ignore[type-var]

    def as_proposal(self) -> Any:
        return replace(self, proposal=True)  # type: ignore[type-var]

    def validate(self, edit: Edit) -> None:
        if isinstance(edit, TransitionEdit):
            if edit.gradient:
                self.require(Ability.GRADIENT, type(edit).__name__)
            alone = not self.edits if edit.power is not None else self._power() is None
            check(alone, "edits", f"{len(self.edits) + 1} edits", "one alone where it aims at a product of two laws")
            for companion in edit.companions:
                ok = isinstance(companion, Diffusion)
                check(ok, "companion", type(companion).__name__, "a diffusion process")
                ours, theirs = self.schedule, companion.schedule  # type: ignore[attr-defined]
                same = ours.alpha == theirs.alpha and ours.sigma == theirs.sigma
                check(same, "companion", f"{len(theirs)} steps of its own", "a process over the same noise levels")

    def done(self, state: DiffusionState) -> bool:
        return state.step >= self.num_steps

    def diverges(self, state: DiffusionState) -> bool:
        return state.step <= self.schedule.last_noise

    @torch.no_grad()
    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> DiffusionState:
        check(isinstance(n, int) and n >= 1, "n", n, "an integer of 1 or more")
        check(len(prompts) >= 1, "prompts", prompts, "at least one")
        x = self.denoiser.noise(len(prompts) * n, generator)
        zero = torch.zeros(len(x), dtype=torch.float64)
        return DiffusionState(
            x=x, group=torch.arange(len(prompts)).repeat_interleave(n), step=0, log_prob=zero, base_log_prob=zero,
            tilt=zero, kl=zero, cost=Cost(), prompts=list(prompts), encoded=self.denoiser.encode(prompts),
        )  # fmt: skip

    def _acting(self, step: int) -> Mounted:
        held = self.proposal and self.schedule.std[step] <= DETERMINISTIC
        return () if held else self.edits

    def read(self, state: DiffusionState) -> DiffusionState:
        if self.done(state) or state.x0 is not None:
            return state
        acting = self._acting(state.step)
        gradient = any(isinstance(edit, TransitionEdit) and edit.gradient for edit, _ in acting)
        with torch.enable_grad() if gradient else torch.no_grad():
            x = state.x.detach().requires_grad_() if gradient else state.x
            base = self.predict(x, state.step, state.group, state.encoded)
            context = DiffusionContext(self, x, state.step, base, state.group, state.encoded, state.prompts)
            moved = _shifted(acting, context, state.group)
        spent = Cost(model_calls=1, nfe=len(state) + context.evaluations)
        base, moved = (base.detach(),) * 2 if moved is base else (base.detach(), moved.detach())
        return replace(state, x0=base, moved=moved, cost=state.cost + spent)

    def context(self, state: DiffusionState) -> DiffusionContext:
        state = self.read(state)
        assert state.x0 is not None, "finished rows have no prediction"
        return DiffusionContext(self, state.x, state.step, state.x0, state.group, state.encoded, state.prompts)

    @torch.no_grad()
    def propose(self, state: DiffusionState, generator: torch.Generator) -> DiffusionState:
        state = self.read(state)
        assert state.x0 is not None and state.moved is not None
        schedule, step = self.schedule, state.step
        std = schedule.std[step]
        mean = schedule.mean(state.x, state.moved, step)
        z = _gaussian(mean, generator) if std > 0 else None
        x = mean if z is None else mean + std * z
        gap = None
        if state.moved is not state.x0:
            gap = (mean - schedule.mean(state.x, state.x0, step)).double().flatten(1)
        log_prob, base_log_prob, kl = _account(z, gap, std, len(state))
        tilt = state.tilt
        if gap is not None and z is not None and std > DETERMINISTIC:
            tilt = tilt + self._tilt(state, z, gap)
        return replace(
            state, x=x, step=step + 1, x0=None, moved=None, parent=state.x0,
            log_prob=state.log_prob + log_prob, base_log_prob=state.base_log_prob + base_log_prob, kl=state.kl + kl,
            tilt=tilt,
        )  # fmt: skip

    def _tilt(self, state: DiffusionState, z: Tensor, gap: Tensor) -> Tensor | float:
        """w times `log p_companion - log p` of the step that was drawn `[N]`; 0 where no edit has a power."""
        power = self._power()
        if power is None or power[1] == 0:
            return 0.0
        w, std = power[1], self.schedule.std[state.step]
        assert state.x0 is not None and state.moved is not None
        tuned = state.x0 + (state.moved - state.x0) / w
        base = self.schedule.mean(state.x, state.x0, state.step)
        there = (self.schedule.mean(state.x, tuned, state.step) - base).double().flatten(1) / std
        here = z.double().flatten(1) + gap / std
        return w * ((here * there).sum(1) - 0.5 * there.square().sum(1)).cpu()

    def _power(self) -> tuple[Process, float] | None:
        powers = [edit.power for edit, _ in self.edits if isinstance(edit, TransitionEdit)]
        return next((p for p in powers if p is not None), None)

    def gather(self, state: DiffusionState, index: Tensor) -> DiffusionState:
        at = index.to(state.x.device)
        x0 = None if state.x0 is None else state.x0[at]
        return replace(
            state,
            x=state.x[at],
            x0=x0,
            moved=x0 if state.moved is state.x0 else None if state.moved is None else state.moved[at],
            parent=None if state.parent is None else state.parent[at],
            **{
                name: getattr(state, name)[index.cpu()] for name in ("group", "log_prob", "base_log_prob", "tilt", "kl")
            },
        )

    def stack(self, states: Sequence[DiffusionState]) -> DiffusionState:
        check(len({s.step for s in states}) == 1, "states", [s.step for s in states], "rows at one step")

        def joined(name: str) -> Any:
            columns = [getattr(s, name) for s in states]
            return None if any(c is None for c in columns) else torch.cat(columns)

        if any(s.x0 is None for s in states) and any(s.x0 is not None for s in states):
            states = [self.read(s) for s in states]
        plain = all(s.moved is s.x0 for s in states)
        x0 = joined("x0")
        return replace(
            states[0], x0=x0, moved=x0 if plain else joined("moved"), cost=sum((s.cost for s in states), Cost()),
            **{name: joined(name) for name in ("x", "group", "log_prob", "base_log_prob", "tilt", "kl", "parent")},
        )  # fmt: skip

    def settle(self, state: DiffusionState) -> tuple[DiffusionState, Cost]:
        return replace(state, cost=Cost(), parent=None), state.cost

    def pack(self, state: DiffusionState) -> dict[str, Tensor]:
        return {name: getattr(state, name).cpu() for name in ("x", "group", "log_prob", "base_log_prob", "tilt", "kl")}

    def unpack(self, prompts: Sequence[Prompt], step: int, packed: dict[str, Tensor]) -> DiffusionState:
        like = self.denoiser.noise(1, torch.Generator().manual_seed(0))
        return DiffusionState(
            **{**packed, "x": packed["x"].to(like.device)}, step=step, cost=Cost(), prompts=list(prompts),
            encoded=self.denoiser.encode(prompts),
        )  # fmt: skip

    def nbytes(self, state: DiffusionState) -> int:
        seen = {id(t): t for t in (state.x, state.x0, state.moved, state.parent) if t is not None}
        return sum(t.numel() * t.element_size() for t in seen.values())

    @torch.no_grad()
    def preview(self, state: DiffusionState) -> Samples:
        """x0-hat, decoded; reads the rows where they were not read yet, without keeping it."""
        if self.done(state):
            return self.decode(state)
        x0 = state.parent if self.shown == "previous" else self.read(state).x0
        if x0 is None:  # the noisiest rows have no parent
            x0 = self.read(state).x0
        assert x0 is not None
        return self._samples(state, self.denoiser.preview(self.schedule.clipped(x0)))

    @torch.no_grad()
    def decode(self, state: DiffusionState) -> Samples:
        return self._samples(state, self.denoiser.decode(state.x))

    def samples(self, outputs: Tensor, group: Tensor, prompts: Sequence[Prompt]) -> Samples:
        """Outputs of rows for the prompts `group` `[N]`, without more."""
        zero = torch.zeros(len(group), dtype=torch.float64)
        return Samples([self.denoiser.show(p) for p in prompts], outputs, group, zero)

    def _samples(self, state: DiffusionState, outputs: Tensor) -> Samples:
        return replace(
            self.samples(outputs, state.group, state.prompts),
            log_prob=state.log_prob,
            base_log_prob=state.base_log_prob,
            tilt=state.tilt,
            kl_estimate=state.kl,
            cost=state.cost,
        )


def _shifted(edits: Mounted, context: DiffusionContext, group: Tensor) -> Tensor:
    """x0-hat after every edit, each applied to the rows that asked for it."""
    x = context.base
    for edit, wanted in edits:
        assert isinstance(edit, TransitionEdit)
        changed = edit.shift(x, context)
        if wanted is not None:
            mask = torch.tensor([int(g) in wanted for g in group], device=x.device)
            changed = torch.where(mask.reshape(-1, *[1] * (x.dim() - 1)), changed, x)
        x = changed
    return x


def _gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    z = torch.randn(like.shape, dtype=like.dtype, generator=generator, device=generator.device)
    return z.to(like.device)


def _account(z: Tensor | None, gap: Tensor | None, std: float, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-density of the noise that was drawn, the same under the base, and the KL of the step, each `[N]`, *summed*
    over dimensions. `gap` `[N, D]` is the mean's distance from the base's. A step without noise has no density: it is
    free unless an edit moved it, and then infinitely far.
    """
    zero = torch.zeros(rows, dtype=torch.float64)
    if z is None or std <= DETERMINISTIC:
        if gap is None:
            return zero, zero, zero
        kl = torch.where((gap == 0).all(1), 0.0, torch.inf).double().cpu()
        return zero, -kl, kl
    flat = z.double().flatten(1)
    log_prob = (-0.5 * flat.square().sum(1) - flat.shape[1] * math.log(std * math.sqrt(2 * math.pi))).cpu()
    if gap is None:
        return log_prob, log_prob, zero
    pushed = gap / std
    kl = 0.5 * pushed.square().sum(1)
    # -(z + pushed)^2 / 2 against -z^2 / 2
    return log_prob, log_prob - ((flat * pushed).sum(1) + kl).cpu(), kl.cpu()


@dataclass(frozen=True)
class DiffusionProcess(Diffusion):
    """A denoiser under a schedule.

    Attributes:
        network: the denoiser.
        levels: its schedule.
        max_batch: rows put through the network at once; 0 is no limit.
    """

    network: Denoiser
    levels: Schedule
    edits: Mounted = ()
    proposal: bool = False
    shown: str = "current"
    max_batch: int = 0

    def __post_init__(self) -> None:
        check(self.shown in ("current", "previous"), "shown", self.shown, "current, previous")

    @property
    def schedule(self) -> Schedule:
        return self.levels

    @property
    def denoiser(self) -> Denoiser:
        return self.network

    def encode(self, prompts: Sequence[Prompt]) -> Any:
        """Checks the prompts, without encoding them where the network can tell."""
        return getattr(self.network, "validate", self.network.encode)(prompts)

    def predict(self, x: Tensor, step: int, group: Tensor, encoded: Any) -> Tensor:
        if not self.max_batch or len(x) <= self.max_batch:
            return self.network.predict(x, step, group, encoded)
        parts = zip(x.split(self.max_batch), group.split(self.max_batch), strict=True)
        return torch.cat([self.network.predict(a, step, g, encoded) for a, g in parts])

    def session(self) -> Any:
        opened = getattr(self.network, "session", None)
        return opened() if opened is not None else nullcontext()

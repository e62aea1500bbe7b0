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

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.core import (
    Ability,
    Context,
    Cost,
    Edit,
    Mounted,
    Process,
    Prompt,
    Samples,
    Site,
    TransitionEdit,
    UnsupportedError,
    check,
)
from steer.core.context import Opaque, shifted
from steer.core.rows import accounted, beginning, in_batches
from steer.diffusion.schedule import DETERMINISTIC, Schedule, account, gaussian, log_product
from steer.diffusion.state import Denoiser, DiffusionState

__all__ = ["DiffusionContext", "DiffusionProcess"]


WAY_OUT = "use eta above 0 (eta=1.0), or a stochastic scheduler (DDPM, DDIM with eta, EulerAncestral, flow-sde)"

NO_GRADIENT = "a pipeline runs its network without gradients; load the network itself, with its scheduler"


@dataclass
class DiffusionContext(Opaque):
    """What a transition edit sees of a diffusion model's rows; `base` is x0-hat."""

    no_hidden = "a diffusion process shows no hidden states"
    no_lookahead = "a diffusion process has no candidates to look at"

    process: Diffusion
    prefix: Tensor
    step: int
    base: Tensor
    group: Tensor
    encoded: Any = field(repr=False)
    prompts: list[Prompt] = field(repr=False)
    evaluations: int = 0
    """Rows put through companions' networks."""

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
        return self.process.schedule.guided(gradient.nan_to_num(0.0), self.step)


class Diffusion(Process):
    """A chain over noise levels. Concrete classes are frozen dataclasses with the fields that are declared here."""

    sites = frozenset({Site.TRANSITION})
    random_start = True
    noise_by_row = True
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
        common = beginning(prompts, n)
        x = self.denoiser.noise(len(common["group"]), generator)
        return DiffusionState(x=x, encoded=self.denoiser.encode(prompts), **common)

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
            moved = shifted(acting, context, state.group)
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
        z = gaussian(mean, generator) if std > 0 else None
        x = mean if z is None else mean + std * z
        gap = None
        if state.moved is not state.x0:
            gap = schedule.gap(state.moved, state.x0, step)
        log_prob, base, kl = account(z, gap, std, len(state))
        aim = None
        if gap is not None and z is not None and std > DETERMINISTIC:
            ratio = self._log_product(state, z, gap)
            aim = None if ratio is None else log_prob + ratio
        return replace(state.add(log_prob, base, aim, kl), x=x, step=step + 1, x0=None, moved=None, parent=state.x0)

    def _log_product(self, state: DiffusionState, z: Tensor, gap: Tensor) -> Tensor | None:
        """Log of the product that is aimed at over the law that was drawn from, of the step that was drawn `[N]`; None
        where no edit has a power.
        """
        power = self._power()
        if power is None or power[1] == 0:
            return None
        w = power[1]
        assert state.x0 is not None and state.moved is not None
        # Rows that did not ask for the edit have not moved, and for them this is 0.
        tuned = state.x0.double() + (state.moved.double() - state.x0.double()) / w
        there = self.schedule.gap(tuned, state.x0, state.step)
        return log_product(z, gap, there, w, self.schedule.std[state.step])

    def _power(self) -> tuple[Process, float] | None:
        powers = [edit.power for edit, _ in self.edits if isinstance(edit, TransitionEdit)]
        return next((p for p in powers if p is not None), None)

    def gather(self, state: DiffusionState, index: Tensor) -> DiffusionState:
        return state.take(index)

    def stack(self, states: Sequence[DiffusionState]) -> DiffusionState:
        if len({s.x0 is None for s in states}) > 1:
            states = [self.read(s) for s in states]
        return DiffusionState.join(states)

    def settle(self, state: DiffusionState) -> tuple[DiffusionState, Cost]:
        return replace(state, cost=Cost(), parent=None), state.cost

    def pack(self, state: DiffusionState) -> dict[str, Tensor]:
        return state.pack()

    def unpack(self, prompts: Sequence[Prompt], step: int, packed: dict[str, Tensor]) -> DiffusionState:
        like = self.denoiser.noise(1, torch.Generator().manual_seed(0))
        x, encoded = packed["x"].to(like.device), self.denoiser.encode(prompts)
        return DiffusionState.unpack(packed, step, prompts, x=x, encoded=encoded)

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
        outputs = self.denoiser.preview(self.schedule.clipped(x0))
        return accounted(self.samples(outputs, state.group, state.prompts), state)

    @torch.no_grad()
    def decode(self, state: DiffusionState) -> Samples:
        return accounted(self.samples(self.denoiser.decode(state.x), state.group, state.prompts), state)

    def samples(self, outputs: Tensor, group: Tensor, prompts: Sequence[Prompt]) -> Samples:
        """Outputs of rows for the prompts `group` `[N]`, without more."""
        zero = torch.zeros(len(group), dtype=torch.float64)
        return Samples([self.denoiser.show(p) for p in prompts], outputs, group, zero)


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
        def predicted(rows: Tensor, prompts: Tensor) -> Tensor:
            return self.network.predict(rows, step, prompts, encoded)

        return in_batches(predicted, x, group, self.max_batch)

    def session(self) -> Any:
        opened = getattr(self.network, "session", None)
        return opened() if opened is not None else nullcontext()

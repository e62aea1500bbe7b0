"""`TurnProcess`: an agent in an environment as a process whose step is a turn.

Best-of-N, FK steering, SVDD and tree sampling run on it as they stand, and choose among whole episodes. Where the
environment draws (`chance`) they choose luck, too: their target is `p(actions, chance) exp(return / beta)`. That is
right for picking finished episodes and wrong as a plan: on the courier the best of 64 episodes earned 3.0, more than
any policy can expect, and acting by it is worth 0.957. To plan under chance use `TurnSearch`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.core import (
    Ability,
    Cost,
    Edit,
    InputError,
    Mounted,
    Process,
    Prompt,
    Reward,
    Sampler,
    Samples,
    Site,
    UnsupportedError,
    check,
    check_whole,
)
from steer.core.rows import Rows, accounted, beginning
from steer.methods.best_of_n import Ancestral
from steer.turns.actors import UniformActor
from steer.turns.environment import Environment, EnvironmentFailure
from steer.turns.episode import Episode, Turn, begin

__all__ = ["TurnProcess", "TurnRows"]

_SEEDS = 2**31 - 1


@dataclass(frozen=True)
class TurnRows(Rows):
    """Episodes, one for each row."""

    each = ("episodes",)

    episodes: list[Episode]


@dataclass(frozen=True)
class TurnProcess(Process):
    """Episodes of an agent. A step is a turn of every row: the actor answers the conversation, all rows in one call,
    and the environment answers the action. Outputs are `Transcript`s; the reward `return` reads their returns.

    Rows that were drawn from their prompts play in the environments themselves, copies of rows (`gather`) in copies.
    Every step is given randomness from the run's generator, so that copies part ways.

    Attributes:
        environment: what makes one for each row: a name for `steer.turns.make`, or a function; or one to be copied.
        actor: the model's process; None draws uniformly among the legal actions.
        max_turns: after which an episode is cut off.
        history: what of the conversation the actor sees: "full", or "last:K" turns after the opening.
        draw: how an action is drawn, a sampler of one output: plainly, behind a gate (`Critique`), one of several.
        judge: the reward that `draw` goes by, of single actions.
        seconds: for a call into an environment; one that takes longer ends its episode.
        simulate: whether episodes are meant to be chosen with their luck: no warning then.
    """

    environment: str | Environment | Callable[[], Environment]
    actor: Process = field(default_factory=UniformActor)
    max_turns: int = 8
    history: str = "full"
    draw: Sampler = field(default_factory=Ancestral)
    judge: Reward | None = None
    seconds: float | None = 10.0
    simulate: bool = False

    consumes = True

    def __post_init__(self) -> None:
        check_whole("max_turns", self.max_turns)
        _window(self.history)
        limit = self.seconds
        check(limit is None or limit > 0, "seconds", limit, "a number above 0, or None")
        many = getattr(self.draw, "n", 1) != 1 and self.draw.population != "n"
        check(
            not many and not (self.draw.keeps_all and self.draw.rows > 1), "draw", self.draw, "a sampler of one output"
        )
        needs = self.draw.needs_reward and self.judge is None
        check(not needs, "judge", None, f"a reward of actions: {self.draw.title} goes by it")
        if isinstance(self.environment, str):
            from steer.turns.registry import maker

            object.__setattr__(self, "environment", maker(self.environment))
        object.__setattr__(self, "_sample", self.made())

    def made(self) -> Environment:
        """A new environment. Raises `InputError` for what is none."""
        given = self.environment
        if isinstance(given, Environment):
            return given.fork(None) if given.forks else given
        check(callable(given), "environment", given, "a name, an Environment or a function that makes one")
        found = given()  # type: ignore[operator]
        check(
            isinstance(found, Environment), "environment", type(found).__name__, "a subclass of steer.turns.Environment"
        )
        return found

    @property
    def kind(self) -> Environment:
        """An environment for its facts, in which nothing is played."""
        return self._sample  # type: ignore[attr-defined]

    @property
    def window(self) -> int | None:
        """Turns that the actor sees; None is all."""
        return _window(self.history)

    @property
    def sites(self) -> frozenset[Site]:  # type: ignore[override]
        return self.actor.sites

    @property
    def edits(self) -> Mounted:  # type: ignore[override]
        return self.actor.edits

    @property
    def kl_kind(self) -> str:
        return self.actor.kl_kind if self.plain else "none: the law of what is drawn in a turn is not known"

    @property
    def plain(self) -> bool:
        """Whether actions are drawn from the actor's own law."""
        return isinstance(self.draw, Ancestral)

    @property
    def abilities(self) -> frozenset[Ability]:
        found = {Ability.PREVIEW}
        if self.kind.forks:
            found |= {Ability.FORK}
            if self.kind.chance or Ability.BRANCH in self.actor.abilities:
                found |= {Ability.BRANCH}
        if self.plain and Ability.LOG_PROB in self.actor.abilities:
            found |= {Ability.LOG_PROB}
        return frozenset(found)

    def way_out(self, ability: Ability) -> str:
        if ability in (Ability.FORK, Ability.BRANCH) and not self.kind.forks:
            return f"{self.kind.name} cannot be copied; best-of-n and plain sampling copy nothing"
        return self.actor.way_out(ability)

    @property
    def num_steps(self) -> int:
        return self.max_turns

    def copy(self, edits: Mounted) -> TurnProcess:
        return replace(self, actor=self.actor.copy(edits))

    def as_proposal(self) -> TurnProcess:
        return replace(self, actor=self.actor.as_proposal())

    def session(self) -> AbstractContextManager[None]:
        return self.actor.session()

    def validate(self, edit: Edit) -> None:
        self.actor.validate(edit)

    # ---- playing

    def init(self, prompts: Sequence[Prompt], n: int, generator: torch.Generator) -> TurnRows:
        common = beginning(prompts, n, exact=self.plain)
        group = common["group"].tolist()
        single = isinstance(self.environment, Environment) and not self.environment.forks
        check(not single or len(group) == 1, "n", len(group), f"1: {self.kind.name} cannot be copied")
        seeds = _seeds(len(group), generator)
        episodes = [begin(self.made(), prompts[b], seed, self.seconds) for b, seed in zip(group, seeds, strict=True)]
        return TurnRows(episodes=episodes, **common)

    def propose(self, state: TurnRows, generator: torch.Generator) -> TurnRows:
        episodes = list(state.episodes)
        rows = self._playing(episodes)
        seeds = _seeds(len(episodes), generator)
        if rows:
            drawn = self.drawn([t for _, t in rows], [int(state.group[i]) for i, _ in rows], generator)
            state = self._entered(state, torch.tensor([i for i, _ in rows]), drawn)
            rejected = _passed_over(drawn)
            for k, ((i, _), action) in enumerate(zip(rows, drawn.outputs, strict=True)):
                episode = episodes[i].after(str(action), seeds[i], self.max_turns, self.seconds)
                episodes[i] = episode.noting(rejected=rejected.get(k))
        return replace(state, episodes=episodes, step=state.step + 1)

    def _playing(self, episodes: list[Episode]) -> list[tuple[int, Turn]]:
        """Rows that act, with what they answer; one that cannot has ended in `episodes`."""
        found = []
        for i, episode in enumerate(episodes):
            if episode.ended:
                continue
            try:
                turn = episode.turn(_window(self.history))
                encode = getattr(self.actor, "encode", None)
                if encode is not None:
                    encode([turn])
            except (EnvironmentFailure, InputError) as error:
                if not episode.taken and isinstance(error, InputError):
                    raise  # the very first request does not fit: a mistake of the call, and not of play
                episodes[i] = replace(episode, truncated=True, failure=str(error), environment=None, real=False)
            else:
                found.append((i, turn))
        return found

    def drawn(self, turns: Sequence[Turn], group: Sequence[int], generator: torch.Generator) -> Samples:
        """One action for each turn, whose prompts have the numbers in `group`, in order."""
        actor = self.actor.renumbered(group)
        samples = self.draw.run(actor, list(turns), generator=generator, reward=self.judge)
        one = sorted(samples.group.tolist()) == list(range(len(turns)))
        check(one, "draw", self.draw, "a sampler of one output for each prompt")
        return samples if samples.group.tolist() == list(range(len(turns))) else samples.select(samples.group.argsort())

    def _entered(self, state: TurnRows, rows: Tensor, drawn: Samples) -> TurnRows:
        """The rows with what a turn's actions add to their sums and account."""

        def spread(x: Tensor | None) -> Tensor | None:
            return (
                None
                if x is None
                else torch.zeros(len(state), dtype=torch.float64).index_copy(0, rows, x.double().cpu())
            )

        log_prob, base = spread(drawn.log_prob), spread(drawn.base_log_prob)
        lazy = callable(drawn.kl_estimate)
        kl = None if lazy or not isinstance(drawn.kl_estimate, Tensor) else spread(drawn.kl_estimate)
        known: dict[str, Any] = {} if base is not None else {"base_log_prob": None, "aim_log_prob": None}
        known |= {} if kl is not None else {"kl": None}
        aim = None if base is None or drawn.tilt is None else base + spread(drawn.tilt)  # type: ignore[operator]
        state = replace(state, **known, cost=state.cost + replace(drawn.cost, seconds=0.0))
        return state.add(torch.zeros(len(state), dtype=torch.float64) if log_prob is None else log_prob, base, aim, kl)

    def done(self, state: TurnRows) -> bool:
        return state.step >= self.max_turns or all(episode.ended for episode in state.episodes)

    def finished(self, state: TurnRows) -> Tensor:
        over = state.step >= self.max_turns
        return torch.tensor([episode.ended or over for episode in state.episodes], dtype=torch.bool)

    # ---- copies

    def gather(self, state: TurnRows, index: Tensor) -> TurnRows:
        at = index.tolist()
        if not self.kind.forks and at != list(range(len(state))):
            raise UnsupportedError(f"{self.kind.name} cannot be copied: {self.way_out(Ability.FORK)}")
        rows = state.take(index)
        if not self.kind.forks:
            return rows
        return replace(rows, episodes=[episode.copied(self.seconds) for episode in rows.episodes])

    def stack(self, states: Sequence[TurnRows]) -> TurnRows:
        return TurnRows.join(states)

    def settle(self, state: TurnRows) -> tuple[TurnRows, Cost]:
        return replace(state, cost=Cost()), state.cost

    def identify(self, state: TurnRows) -> list[Any]:
        return [tuple((turn.action, turn.observation) for turn in episode.taken) for episode in state.episodes]

    def pack(self, state: TurnRows) -> dict[str, Tensor]:
        """Seeds and actions of every row, from which its episode is played again."""
        texts = [json.dumps([e.seed, [[t.action, t.seed] for t in e.taken]]).encode() for e in state.episodes]
        width = max(map(len, texts))
        played = torch.zeros(len(texts), width, dtype=torch.uint8)
        for i, text in enumerate(texts):
            played[i, : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        return {**state.pack(), "played": played, "length": torch.tensor([len(text) for text in texts])}

    def unpack(self, prompts: Sequence[Prompt], step: int, packed: dict[str, Tensor]) -> TurnRows:
        """The rows again, by playing every episode anew in a copy. Tools that cannot be undone are not run again."""
        episodes = []
        for row, length, b in zip(packed["played"], packed["length"].tolist(), packed["group"].tolist(), strict=True):
            seed, played = json.loads(bytes(row[:length].tolist()))
            episode = begin(self.made(), prompts[b], seed, self.seconds)
            for action, own in played:
                episode = self._again(episode, action, own)
            episodes.append(replace(episode, real=False))
        return TurnRows.unpack(packed, step, prompts, episodes=episodes)

    def _again(self, episode: Episode, action: str, seed: int) -> Episode:
        environment = episode.environment
        if episode.ended or environment is None:
            return episode
        name = environment.known_as(action)
        if name in environment.irreversible:
            return replace(episode, truncated=True, failure=f"{name} is irreversible and was not run again")
        return episode.after(action, seed, self.max_turns, self.seconds)

    # ---- showing

    def preview(self, state: TurnRows) -> Samples:
        """The episodes so far."""
        return self.decode(state)

    def decode(self, state: TurnRows) -> Samples:
        zero = torch.zeros(len(state), dtype=torch.float64)
        found = Samples(state.prompts, [episode.transcript() for episode in state.episodes], state.group, zero)
        found = accounted(found, state)
        return found if Ability.LOG_PROB in self.abilities else replace(found, log_prob=None, base_log_prob=None)

    def check_search(self, who: str) -> None:
        if self.kind.chance and not self.simulate:
            warnings.warn(
                f"{who} chooses among episodes with their luck: right for picking finished ones (simulate=True), wrong "
                "as a plan; turn-search plans under chance",
                stacklevel=2,
            )


def _window(history: str) -> int | None:
    kind, _, count = str(history).partition(":")
    fits = history == "full" or (kind == "last" and count.isdecimal() and int(count) >= 1)
    check(fits, "history", history, "full, or last:K with K of 1 or more")
    return None if history == "full" else int(count)


def _passed_over(drawn: Samples) -> dict[int, list[str]]:
    """By turn, drafts of its action that were not taken."""
    found: dict[int, list[str]] = {}
    if drawn.pool is not None:
        taken = set() if drawn.lineage is None else set(drawn.lineage.tolist())
        for i, b in enumerate(drawn.pool.group.tolist()):
            if i not in taken:
                found.setdefault(b, []).append(str(drawn.pool.outputs[i]))
    return found


def _seeds(count: int, generator: torch.Generator) -> list[int]:
    """A seed for each of some rows."""
    return torch.randint(_SEEDS, (count,), generator=generator).tolist()

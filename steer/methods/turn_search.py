"""Search over turns: planning that is right where the environment draws.

At every real turn the environment is copied, copies are tried with fresh randomness, and one action is taken in the
real one, which the search never advances. Values average over chance and choose among actions, where best-of-N and
trees over whole episodes choose both (Kocsis and Szepesvari 2006; Kearns et al. 2002; Agent Q, Putta et al. 2024).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from steer.core import Process, Run, Sampler, Samples, UnsupportedError, check, check_whole
from steer.critique.reading import as_critic
from steer.turns.actors import UniformActor
from steer.turns.environment import Environment, EnvironmentFailure
from steer.turns.episode import Episode
from steer.turns.process import TurnProcess, TurnRows

__all__ = ["TurnSearch", "Tree"]


@dataclass(frozen=True)
class TurnSearch(Sampler):
    """Plan every turn of an episode by a tree of copies (UCT), or by sparse sampling.

        select  argmax_a  Q'(a) + bonus sqrt(log N / (1 + n_a)), untried actions first; Q' is Q scaled to [0, 1] by the
                smallest and largest return seen in the tree
        back up "mean": Q(a) is the mean return; "max": Q(a) = mean over outcomes of r + gamma max_b Q(outcome, b)

    The scaling makes one `bonus` right for returns of any size: on the courier, whose returns go from -3 to 4, bonus 1
    without it earned 0.8 of the 2.0 that the best policy earns. `samples.trace` has a `Tree` for each turn of each
    episode, from which `pairs` takes preferences for `train policy --method dpo`. The tree's own estimate of the root
    is optimistic: never report it as a result.

    Attributes:
        n: episodes for each prompt.
        candidates: actions at a node: distinct ones that the model draws, or legal ones.
        simulations: of a turn (UCT).
        depth: turns that are looked ahead; None to the end.
        how: "uct", or "sparse", which draws every candidate's outcome `width` times, recursively.
        bonus: of exploration.
        backup: "max" or "mean".
        leaf: "rollout" to the end, or a function of the episode that gives the value of what is still to come.
        episodes: rollouts of a leaf.
        gamma: discount of a turn.
        critic: judges actions as `critique` does drafts; they are tried in the order of its scores, and the action of
            rank i counts as 1 / (i + 1) beside its value.
        critic_weight: how much.
        width: of sparse sampling.
        choose: the action with the highest "value", or with the most "visits"; any of equals.
        actions: "model": candidates and rollouts are the model's; "legal": they are the environment's legal actions.
        simulator: makes an environment in the state of an episode, where that cannot be copied, or must not.
    """

    n: int = 1
    candidates: int = 5
    simulations: int = 64
    depth: int | None = None
    how: str = "uct"
    bonus: float = 1.4
    backup: str = "max"
    leaf: str | Callable[[Episode], float] = "rollout"
    episodes: int = 1
    gamma: float = 1.0
    critic: Any = None
    critic_weight: float = 0.5
    width: int = 2
    choose: str = "value"
    actions: str = "model"
    simulator: Callable[[Episode], Environment] | None = None

    title = "turn-search"
    population = "simulations"
    chooses_whole = False
    own_settings = frozenset({"leaf", "critic", "simulator"})
    kl_kind = "none: the law of what a plan chooses is not known"

    def __post_init__(self) -> None:
        for name in ("n", "candidates", "simulations", "episodes", "width"):
            check_whole(name, getattr(self, name))
        if self.critic is not None:
            object.__setattr__(self, "critic", as_critic(self.critic))
            check(not self.critic.compares, "critic", self.critic.name, "a critic that judges one action at a time")
        if self.depth is not None:
            check_whole("depth", self.depth, allowed="an integer of 1 or more, or None for the end of the episode")
        choices = {"how": ("uct", "sparse"), "backup": ("max", "mean"), "choose": ("value", "visits")}
        for name, allowed in {**choices, "actions": ("model", "legal")}.items():
            check(getattr(self, name) in allowed, name, getattr(self, name), ", ".join(allowed))
        check(self.leaf == "rollout" or callable(self.leaf), "leaf", self.leaf, "rollout, or a function of an episode")
        check(0 <= self.bonus < math.inf, "bonus", self.bonus, "a number of 0 or more")
        check(0 < self.gamma <= 1, "gamma", self.gamma, "a number above 0, at most 1")
        check(0 <= self.critic_weight <= 1, "critic_weight", self.critic_weight, "a number from 0 to 1")

    def bind(self, model: Any) -> TurnSearch:
        bound = None if self.critic is None else self.critic.bind(model)
        return self if bound is self.critic else replace(self, critic=bound)

    def updates(self, process: Process) -> int:
        return process.num_steps

    def check_process(self, process: Process) -> None:
        if not isinstance(process, TurnProcess):
            raise UnsupportedError(
                "turn-search needs a process of turns (steer.turns.TurnProcess, steer play); got "
                f"{type(process).__name__}"
            )
        kind = process.kind
        if self.simulator is None and not kind.forks:
            raise UnsupportedError(f"turn-search: {kind.name} cannot be copied, and no simulator was given")
        leaks = kind.hidden and self.simulator is None
        check(
            not leaks, "simulator", None, f"one that draws what the agent does not know: a copy of {kind.name} leaks it"
        )
        if self.actions == "legal":
            process.made().reset("", 0)

    def draw(self, run: Run) -> Samples:
        process: Any = run.process
        state: TurnRows = process.init(run.prompts, self.n, run.generator)
        episodes, trace = list(state.episodes), []
        while not all(episode.ended for episode in episodes):
            for i, episode in enumerate(episodes):
                if episode.ended:
                    continue
                seed, own = torch.randint(2**31 - 1, (2,), generator=run.generator).tolist()
                tree = Tree(self, process, run, int(state.group[i]), i, random.Random(seed))
                action = tree.plan(episode)
                if action is None:
                    failure = tree.failure or "no action could be tried"
                    episodes[i] = replace(episode, truncated=True, failure=failure, environment=None, real=False)
                else:
                    episodes[i] = episode.after(action, own, process.max_turns, process.seconds)
                tree.forget()
                trace.append(tree)
            state = replace(state, episodes=list(episodes), step=state.step + 1)
            run.step(state)
        zero = torch.zeros(len(state), dtype=torch.float64)
        outputs = [episode.transcript() for episode in episodes]
        found = Samples(state.prompts, outputs, state.group, zero, cost=state.cost, trace=trace)
        return found if run.given is None else replace(found, reward=run.score(found))


@dataclass
class Edge:
    """An action at a node."""

    action: str
    prior: float = 0.0
    """1 / (rank + 1) by the critic; 0 without one."""
    visits: int = 0
    total: float = 0.0
    q: float = 0.0
    outcomes: dict[Any, Outcomes] = field(default_factory=dict)


@dataclass
class Outcomes:
    """What an action has led to, `count` times."""

    reward: float
    node: Node
    count: int = 0


@dataclass
class Node:
    """A history, with the episode in the state that first led to it."""

    episode: Episode | None
    messages: list[dict[str, Any]]
    edges: list[Edge] | None = None
    leaf: float = 0.0
    visits: int = 0

    @property
    def value(self) -> float:
        """The best of its tried actions; before one was tried, the leaf's value."""
        tried = [edge.q for edge in self.edges or () if edge.visits]
        return max(tried) if tried else self.leaf


class Tree:
    """The search of one turn; `row` is its episode among the run's, `turn` the number of the turn."""

    stands_alone = True

    def __init__(
        self, how: TurnSearch, process: TurnProcess, run: Run, group: int, row: int, rng: random.Random
    ) -> None:
        self.how, self.row, self.turn = how, row, 0
        self.failure: str | None = None
        self.chosen: str | None = None
        self.root: Node | None = None
        self.low, self.high = math.inf, -math.inf
        self._process, self._run, self._group, self._rng = process, run, group, rng

    # ---- planning

    def plan(self, episode: Episode) -> str | None:
        """The action to take; None where none can be tried."""
        self.turn = len(episode.taken)
        try:
            start = self._copy(episode)
        except EnvironmentFailure as error:
            self.failure = str(error)
            return None
        self.root = self._node(start)
        self._expand(self.root)
        edges = self.root.edges or []
        if not edges:
            return None
        if self.how.how == "sparse":
            self._sparse(self.root, self._depth(start))
        else:
            for _ in range(self.how.simulations):
                self._simulate(self.root)
        tried = [edge for edge in edges if edge.visits] or edges
        by_value = self.how.choose == "value"
        worth = [round(e.q, 9) if by_value else e.visits for e in tried]
        self.chosen = self._rng.choice([e for e, x in zip(tried, worth, strict=True) if x == max(worth)]).action
        return self.chosen

    def _copy(self, episode: Episode) -> Episode:
        if self.how.simulator is None:
            return episode.copied(self._process.seconds)
        return replace(episode, environment=self.how.simulator(episode), real=False)

    def _depth(self, episode: Episode) -> int:
        left = self._process.max_turns - len(episode.taken)
        return left if self.how.depth is None else min(left, self.how.depth)

    def _node(self, episode: Episode) -> Node:
        return Node(episode, episode.messages())

    def _simulate(self, node: Node) -> None:
        """One try from the root to a new outcome or an end, and back."""
        path: list[tuple[Node, Edge, float]] = []
        limit = self._depth(node.episode)  # type: ignore[arg-type]
        while True:
            if node.edges is None:
                self._expand(node)
            if not node.edges or len(path) >= limit:
                value = node.leaf if node.visits else self._leaf(node)
                break
            edge = self._select(node)
            outcome, new = self._try(node, edge)
            path.append((node, edge, outcome.reward))
            node = outcome.node
            if new or self._ended(node):
                value = self._leaf(node) if new else node.leaf
                break
        node.visits += 1
        for parent, edge, reward in reversed(path):
            value = reward + self.how.gamma * value
            self.low, self.high = min(self.low, value), max(self.high, value)
            parent.visits += 1
            edge.visits += 1
            edge.total += value
            edge.q = self._backed_up(edge)

    def _backed_up(self, edge: Edge) -> float:
        if self.how.backup == "mean":
            return edge.total / edge.visits
        count = sum(o.count for o in edge.outcomes.values())
        return sum(o.count * (o.reward + self.how.gamma * o.node.value) for o in edge.outcomes.values()) / count

    def _select(self, node: Node) -> Edge:
        assert node.edges
        for edge in node.edges:
            if not edge.visits:
                return edge
        spread, weight = self.high - self.low, self.how.critic_weight if self.how.critic is not None else 0.0

        def worth(edge: Edge) -> float:
            scaled = (edge.q - self.low) / spread if spread > 0 else 0.5
            bonus = self.how.bonus * math.sqrt(math.log(max(node.visits, 1)) / (1 + edge.visits))
            return (1 - weight) * scaled + weight * edge.prior + bonus

        return max(node.edges, key=worth)

    def _try(self, node: Node, edge: Edge) -> tuple[Outcomes, bool]:
        """One outcome of an action, and whether it is new."""
        assert node.episode is not None
        after = self._after(node.episode, edge.action)
        last = after.taken[-1]
        key = (last.observation, last.reward, after.done, after.truncated)
        new = key not in edge.outcomes
        if new:
            edge.outcomes[key] = Outcomes(last.reward, self._node(after))
        edge.outcomes[key].count += 1
        return edge.outcomes[key], new

    def _after(self, episode: Episode, action: str) -> Episode:
        return episode.after(action, self._rng.randrange(2**31), self._process.max_turns, self._process.seconds)

    @staticmethod
    def _ended(node: Node) -> bool:
        return node.episode is None or node.episode.ended

    def _leaf(self, node: Node) -> float:
        """The value of what is still to come at a node."""
        episode = node.episode
        if episode is None or episode.ended:
            node.leaf = 0.0
        elif callable(self.how.leaf):
            node.leaf = float(self.how.leaf(episode))
        else:
            node.leaf = sum(self._rollout(episode) for _ in range(self.how.episodes)) / self.how.episodes
        return node.leaf

    def _rollout(self, episode: Episode) -> float:
        """The return of playing on by the actor."""
        total, factor = 0.0, 1.0
        while not episode.ended:
            actions = self._actions(episode, 1)
            if not actions:
                break
            episode = self._after(episode, actions[0])
            total += factor * episode.taken[-1].reward
            factor *= self.how.gamma
        return total

    def _sparse(self, node: Node, depth: int) -> float:
        """Sparse sampling: `max_a` of the mean over `width` draws of `r + gamma V`."""
        if node.edges is None:
            self._expand(node)
        if self._ended(node) or depth == 0 or not node.edges:
            return self._leaf(node)
        for edge in node.edges:
            for _ in range(self.how.width):
                assert node.episode is not None
                after = self._after(node.episode, edge.action)
                child = self._node(after)
                value = after.taken[-1].reward + self.how.gamma * self._sparse(child, depth - 1)
                edge.visits += 1
                edge.total += value
                edge.outcomes[len(edge.outcomes)] = Outcomes(after.taken[-1].reward, child, 1)
            edge.q = edge.total / edge.visits
        node.visits += 1
        return node.value

    # ---- actions

    def _expand(self, node: Node) -> None:
        """Give a node its actions, in the order in which they are tried."""
        if self._ended(node):
            node.edges = []
            return
        episode = node.episode
        assert episode is not None
        found = self._actions(episode, self.how.candidates)
        environment = episode.environment
        if environment is not None and environment.irreversible and self.how.simulator is None:
            found = [a for a in found if environment.known_as(a) not in environment.irreversible]
        node.edges = [Edge(action) for action in found]
        if self.how.critic is not None and found:
            group = torch.zeros(len(found), dtype=torch.long)
            verdicts = self.how.critic(Samples([episode.turn()], found, group, group.double()))
            self._run.pay(replace(verdicts.cost, seconds=0.0))
            scores = verdicts.score.tolist()
            order = sorted(range(len(found)), key=lambda i: -scores[i])
            node.edges = [Edge(found[i], 1 / (rank + 1)) for rank, i in enumerate(order)]

    def _actions(self, episode: Episode, count: int) -> list[str]:
        """Up to `count` distinct actions."""
        process = self._process
        if self.how.actions == "legal" or isinstance(process.actor, UniformActor):
            legal = episode.legal
            check(bool(legal), "actions", "legal", f"model: {process.kind.name} lists none")
            return list(legal) if count >= len(legal) else self._rng.sample(legal, count)
        turn = episode.turn(process.window)
        drawn = process.drawn([turn] * count, [self._group] * count, self._run.generator)
        self._run.pay(replace(drawn.cost, seconds=0.0))
        return list(dict.fromkeys(str(action).strip() for action in drawn.outputs))

    # ---- results

    def forget(self) -> None:
        """Let go of the environments; what was learnt of the actions stays."""
        for node in self.nodes():
            node.episode = None
        del self._process, self._run

    def nodes(self) -> Iterator[Node]:
        """Every node, parents first."""
        waiting = [] if self.root is None else [self.root]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += [o.node for edge in node.edges or () for o in edge.outcomes.values()]

    def pairs(self, margin: float = 0.0, least: int = 4) -> list[dict[str, Any]]:
        """Preferences for DPO: at every node the best action against each sibling that is worth less by more than
        `margin`, where both were tried `least` times or more. Rows have `prompt` (messages), `chosen`, `rejected` and
        `margin`.
        """
        rows = []
        for node in self.nodes():
            known = sorted((e for e in node.edges or () if e.visits >= least), key=lambda e: -e.q)
            for edge in known[1:]:
                if known[0].q - edge.q > margin:
                    chosen, gap = known[0].action, known[0].q - edge.q
                    rows.append({"prompt": node.messages, "chosen": chosen, "rejected": edge.action, "margin": gap})
        return rows

    def to_dict(self, depth: int = 2) -> dict[str, Any]:
        """The upper part of the tree as plain data."""

        def shown(node: Node, left: int) -> list[dict[str, Any]]:
            return [
                {
                    "action": edge.action,
                    "visits": edge.visits,
                    "value": edge.q,
                    "outcomes": [
                        {
                            "count": o.count,
                            "reward": o.reward,
                            "observation": _last(o.node),
                            "edges": shown(o.node, left - 1),
                        }
                        for o in edge.outcomes.values()
                    ]
                    if left > 0
                    else [],
                }
                for edge in node.edges or ()
                if edge.visits
            ]

        edges = [] if self.root is None else shown(self.root, depth)
        return {"row": self.row, "turn": self.turn, "chosen": self.chosen, "failure": self.failure, "edges": edges}


def _last(node: Node) -> str:
    return str(node.messages[-1]["content"]) if node.messages else ""

"""The driver of rows: sample, score, keep, fit, next round; the same for every method and engine.

Samples and constants of a round are written to a file before it is trained on, weights and optimizer about ten times in
a run; a run that was stopped goes on from there to the same result. All randomness depends on the seed, the number of
the round and that of the update.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steer.core import SteerError, check
from steer.files import replacing
from steer.logs import record
from steer.progress import Tick, untold
from steer.train.loop import cosine, load_state, save_state
from steer.train.objectives import rounds
from steer.train.objectives.collecting import Collector, Row, Scorer, Source
from steer.train.objectives.judging import Judge
from steer.train.objectives.measures import read_ranking
from steer.train.objectives.rows import Cluster, batch_loss, from_json, reads_entropy, to_json
from steer.train.objectives.settings import PolicySettings

__all__ = ["Actor", "Driver", "Fit"]


class Actor(Source, Protocol):
    """What the driver needs of an engine: a policy that samples, is read and trained, and the base beside it."""

    def learn(
        self,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        loss: Callable[[Tensor, Tensor | None], Tensor],
        entropy: bool,
    ) -> float:
        """Gradients of `loss(logp [N, T], entropy [N, T] or None)`; returns its value."""

    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""


@dataclass
class Fit:
    """What a run has seen: a figure for each update, and one report for each round."""

    loss: list[float] = field(default_factory=list)
    rounds: list[dict[str, float]] = field(default_factory=list)


class Driver:
    """One run of a method by rows.

    Args:
        actor: the policy, with the weights of the base.
        rows: the data.
        score: rewards of completions, where the method samples; None without.
        run: what a state in `work` must have been made with.
        tell: advances a bar by a count of updates, with their figures.
    """

    def __init__(
        self,
        actor: Actor,
        rows: Sequence[Row],
        settings: PolicySettings,
        score: Scorer | None,
        *,
        work: Path | None = None,
        run: dict[str, Any] | None = None,
        tell: Tick = untold,
    ) -> None:
        self.actor, self.rows, self.settings = actor, list(rows), settings
        self.work, self.run_facts, self.tell = work, run or settings.recipe(), tell
        self.sampling = score is not None or settings.with_ == "gold"
        self.collector = Collector(actor, self.rows, settings, score)
        self.seen = Fit()
        self.previous: dict[str, Tensor] = {}
        self.ended: dict[str, Tensor] = {}
        self.optimizer = self._optimizer()
        self.old_rounds: list[list[Cluster]] = []

    # ---- the whole run

    @property
    def fresh(self) -> bool:
        return self.settings.fresh and self.sampling

    @property
    def total_rounds(self) -> int:
        if self.fresh:
            return self.settings.total_steps(len(self.rows)) + (1 if self.settings.schedule == "gap_split" else 0)
        return self.settings.rounds if self.sampling else 1

    def run(self) -> Fit:
        """All rounds. Raises `SteerError` where the loss is no longer finite."""
        settings = self.settings
        self.previous = self._snapshot()
        path = None if self.work is None else self.work / "state.safetensors"
        first, step = self._resumed(path)
        span = max(1, -(-self.total_rounds // 10))
        for number in range(first, self.total_rounds):
            if not self.fresh and step == 0 and number > 0:
                self.optimizer = self._optimizer()
            clusters = self._round(number, step)
            trained = self._kept(number, clusters)
            if not self.fresh or (self.settings.schedule == "gap_split" and number == 0):
                allowed = "a reward that is not the same on all samples of a prompt"
                check(bool(trained), "reward", f"no pair to learn from in round {number + 1}", allowed)
            before = None
            if settings.reference in ("extrapolated", "ema"):
                before = self.previous
            if trained:
                self._fit(number, trained, step, path)
            step = 0
            self._next(number, before)
            last = number + 1 == self.total_rounds
            self._report(number, trained, last)
            if path is not None and ((number + 1) % span == 0 or last or not self.fresh):
                self._save(path, number + 1, 0)
        return self.seen

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.actor.weights().values(), lr=self.settings.learning_rate, weight_decay=0.0)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.actor.weights().items()}

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.actor.weights().items():
            parameter.copy_(weights[name])

    # ---- one round

    def _round(self, number: int, step: int) -> list[Cluster]:
        """The round's own clusters, from its file where there is one."""
        path = None if self.work is None else self.work / f"round-{number:04d}.json"
        two_step = self.settings.reference == "two_step" and number % 2 == 1
        moves = self.settings.reference not in ("ema", "extrapolated") and not two_step
        if moves and step == 0 and (self.settings.schedule != "gap_split" or number <= 1):
            self.previous = self._snapshot()
        if path is not None and path.is_file():
            held = json.loads(path.read_text(encoding="utf-8"))
            self.collector.memory = held["memory"]
            clusters = from_json(held["clusters"])
        else:
            clusters = self._collected(number)
            if path is not None:
                with replacing(path) as temporary:
                    kept = {"memory": self.collector.memory, "clusters": to_json(clusters)}
                    temporary.write_text(json.dumps(kept), encoding="utf-8")
        if two_step and step == 0:
            self._put(self.previous)
        self.old_rounds = [*self.old_rounds, clusters][-max(1, len(self.settings.keep)) :]
        return clusters

    def _collected(self, number: int) -> list[Cluster]:
        opponents = None
        if self.settings.reference == "two_step" and number % 2 == 1:
            # Opponents are those of the half step; everything else goes on from where it began.
            opponents = self.collector.opponents(number)
            half = self._snapshot()
            self._put(self.previous)
            clusters = self.collector.collect(number, self.sampling, opponents)
            self._put(half)
            return self._judged(clusters, number)
        clusters = self.collector.collect(number, self.sampling, opponents)
        if self.settings.reference in ("ema", "extrapolated") or self._after_split(number):
            now = self._snapshot()
            self._put(self.previous)
            name = "ref" if self._after_split(number) else "prev"
            self.collector.reread(clusters, name)
            self._put(now)
        return self._judged(clusters, number)

    def _judged(self, clusters: list[Cluster], number: int) -> list[Cluster]:
        judge = Judge(self.actor, self.rows, self.settings, self.collector.memory)
        return judge(clusters, number, self._sequences(number))

    def _sequences(self, number: int) -> bool:
        """Whether a round's loss is one of sequences: of mixed preference optimisation only the first."""
        return number == 0 if self.settings.schedule == "gap_split" else self.settings.sequences

    def _after_split(self, number: int) -> bool:
        """Whether the base of this round is the policy that the easy pairs made."""
        return self.settings.schedule == "gap_split" and number > 0

    def _kept(self, number: int, clusters: list[Cluster]) -> list[Cluster]:
        if self.fresh or len(self.settings.keep) == 1:
            return clusters
        draw = Random(self.settings.seed * 100_003 + number)
        places = rounds.kept([range(len(old)) for old in self.old_rounds], self.settings.keep, draw)
        return [self.old_rounds[at][row] for at, row in places]

    def _next(self, number: int, before: dict[str, Tensor] | None) -> None:
        """The weights and the reference that the next round has."""
        if self.settings.reference == "extrapolated" and before is not None:
            now = self._snapshot()
            # `before` is where the last round's fit ended; the next one starts beyond this round's.
            self._put(rounds.extrapolated(now, self.ended, self.settings.extrapolation))
            self.ended = now
            self.previous = self._snapshot()
        elif self.settings.reference == "ema" and before is not None:
            self.previous = rounds.trailing(before, self._snapshot(), self.settings.ema)

    # ---- fitting

    def _fit(self, number: int, clusters: list[Cluster], done: int, path: Path | None) -> None:
        settings = self.settings
        split = settings.schedule == "gap_split" and number == 0
        size = min(settings.batch_size, len(clusters))
        if self.fresh and not split:
            updates = settings.updates
            whole = (self.total_rounds - (1 if settings.schedule == "gap_split" else 0)) * updates
            first = (number - (1 if settings.schedule == "gap_split" else 0)) * updates
            plan = [list(range(len(clusters)))] * updates
        else:
            updates = settings.total_steps(len(clusters)) if not split else -(-len(clusters) // size)
            whole, first = updates, 0
            plan = _batches(len(clusters), size, updates, settings.seed * 7919 + number)
        schedule = cosine(self.optimizer, settings.learning_rate, max(1, whole), first + done)
        span = max(1, -(-updates // 10))
        sequences = self._sequences(number)
        for step in range(done, updates):
            part = [clusters[i] for i in plan[step]]
            self._update(part, schedule, number, step, whole, first, sequences)
            if path is not None and not self.fresh and (step + 1) % span == 0 and step + 1 < updates:
                self._save(path, number, step + 1)

    def _update(
        self,
        part: list[Cluster],
        schedule: torch.optim.lr_scheduler.LRScheduler,
        number: int,
        step: int,
        whole: int,
        first: int,
        sequences: bool,
    ) -> None:
        memory = {**self.collector.memory, "update": first + step, "progress": (first + step) / max(1, whole)}
        rows = [(c.prompt_ids, c.tokens) for cluster in part for c in cluster.completions]

        def loss(logp: Tensor, entropy: Tensor | None) -> Tensor:
            return batch_loss(part, logp, entropy, self.settings, memory, sequences)

        self.optimizer.zero_grad(set_to_none=True)
        value = self.actor.learn(rows, loss, reads_entropy(self.settings))
        norm = nn.utils.clip_grad_norm_(self.actor.weights().values(), 1.0)
        if not (math.isfinite(value) and bool(norm.isfinite())):
            at = f"update {step + 1} of round {number + 1}"
            raise SteerError(f"train policy: the loss is {value} at {at}; lower learning_rate")
        self.optimizer.step()
        schedule.step()
        self.seen.loss.append(value)
        self.tell(1, loss=value)

    # ---- reports and states

    def _report(self, number: int, trained: list[Cluster], last: bool) -> None:
        """What a round was like: of its own samples, and of the pairs that it was trained on, after it."""
        figures: dict[str, float] = {"round": number, **self.collector.memory.get("figures", {})}
        everyone = [c for cluster in trained for c in cluster.completions]
        own = sum(
            c.role in ("own", "greedy", "refined") and cluster.round == number and self.settings.sampler == "policy"
            for cluster in trained
            for c in cluster.completions
        )
        figures["on_policy"] = own / max(1, len(everyone)) if self.sampling else 0.0
        pairs = [(cluster.completions[i], cluster.completions[j]) for cluster in trained for i, j in cluster.pairs][:64]
        if any(cluster.pairs for cluster in trained):
            figures["pairs"] = sum(len(cluster.pairs) for cluster in trained)
        if pairs and (not self.fresh or last):
            figures |= self._ranked(pairs, [p for c in trained for p in (c.preference or [1.0] * len(c.pairs))][:64])
        self.seen.rounds.append({k: round(v, 6) for k, v in figures.items()})
        record("rounds", number, {k: v for k, v in figures.items() if k != "round"})

    def _ranked(self, pairs: list[tuple[Any, Any]], preference: list[float]) -> dict[str, float]:
        flat = [c for pair in pairs for c in pair]
        policy = [sum(x) for x in self.actor.read([(c.prompt_ids, c.tokens) for c in flat], "policy")]
        base = [sum(c.ref) for c in flat] if all(c.ref for c in flat) else [
            sum(x) for x in self.actor.read([(c.prompt_ids, c.tokens) for c in flat], "base")
        ]  # fmt: skip
        halves = range(0, len(flat), 2)
        found = read_ranking(
            [base[i : i + 2] for i in halves],
            [policy[i : i + 2] for i in halves],
            [[len(c.tokens) for c in flat[i : i + 2]] for i in halves],
            self.settings.beta + self.settings.prox,
            preference,
        )
        return {
            "chosen": sum(policy[0::2]) / len(pairs),
            "rejected": sum(policy[1::2]) / len(pairs),
            "ranking_base": found.base,
            "ranking_policy": found.policy,
            "ranking_base_per_token": found.base_per_token,
            "ranking_policy_per_token": found.policy_per_token,
            "ranking_ideal": found.ideal,
        }

    def _save(self, path: Path, number: int, step: int) -> None:
        parts = {"policy": self._snapshot(), "previous": self.previous}
        if self.settings.reference == "extrapolated":
            parts["ended"] = self.ended
        facts = {"loss": self.seen.loss, "rounds": self.seen.rounds, "number": number, "step": step}
        # A name in the state has no dots before the first of its part.
        save_state(path, self.run_facts, parts, self.optimizer, memory=self.collector.memory, **facts)

    def _resumed(self, path: Path | None) -> tuple[int, int]:
        """The round and the update that the run goes on from."""
        self.ended = self._snapshot()
        saved = load_state(path, self.run_facts, self.optimizer)
        if saved is None:
            return 0, 0
        self._put(saved.parts["policy"])
        self.previous = saved.parts["previous"]
        self.ended = saved.parts.get("ended", self.ended)
        self.seen = Fit(saved.facts["loss"], saved.facts["rounds"])
        self.collector.memory = saved.facts["memory"]
        number = int(saved.facts["number"])
        assert self.work is not None
        for age in range(max(0, number - len(self.settings.keep)), number):
            old = self.work / f"round-{age:04d}.json"
            if old.is_file():
                self.old_rounds.append(from_json(json.loads(old.read_text(encoding="utf-8"))["clusters"]))
        self.tell(len(self.seen.loss))
        return number, int(saved.facts["step"])


def _batches(count: int, size: int, updates: int, seed: int) -> list[list[int]]:
    """Numbers of rows for each update: a new order for every pass."""
    draw, order, found = Random(seed), list[int](), []
    for _ in range(updates):
        if len(order) == 0:
            order = draw.sample(range(count), count)
        found.append(order[:size])
        order = order[size:]
    return found

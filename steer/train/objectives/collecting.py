"""What a round learns from: prompts by schedule, samples, their rewards and constants, and what they are worth.

Letters: `N` completions, `T` tokens. A completion is right where its reward is above 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

import torch

from steer.core import check
from steer.train.objectives import rounds, schedules
from steer.train.objectives.rows import Cluster, Completion
from steer.train.objectives.settings import PolicySettings

__all__ = ["Ask", "Collector", "Row", "Scorer", "Source", "seed_of"]

DRAWS = 4
"""How often the schedule "dynamic" draws prompts in place of those whose groups are constant."""
CHUNK, SURPRISING = 4, 0.2
"""Of the schedule "inpaint": tokens of a chunk, and the share of given tokens that are learnt from."""


@dataclass(frozen=True)
class Row:
    """One prompt and what the data says of it.

    Attributes:
        given: completions of the data: tokens, role, score.
        solution: text that hints are taken from, or that a masked model is shown parts of.
        answer: tokens of the right answer.
    """

    prompt_ids: list[int]
    given: list[tuple[list[int], str, float]] = field(default_factory=list)
    solution: str | None = None
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Ask:
    """What is to be drawn: `count` completions of up to `limit` tokens after a prompt, by the "policy", the "base",
    the policy's "greedy" choice, or a "mixture" with `share` of the base in its logits.
    """

    prompt_ids: list[int]
    count: int
    who: str = "policy"
    limit: int | None = None
    share: float = 0.0
    canvas: tuple[tuple[int, int], ...] = ()
    """Of a masked model: positions and the tokens that stand there from the start."""


class Scorer(Protocol):
    """Rewards of completions."""

    def __call__(self, prompts: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[float]:
        """One number for each, given the numbers of their prompts."""

    def objectives(self, prompts: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """The terms of the reward, each as one list."""


class Source(Protocol):
    """What collecting needs of an engine. A row is a prompt and a completion, in tokens."""

    def draw(self, asks: Sequence[Ask], seed: int) -> list[list[list[int]]]:
        """Completions of each ask, with their ends."""

    def read(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], who: str) -> list[list[float]]:
        """Log-probability of each token of each row's completion under "policy" or "base"; no gradient."""

    def entropies(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Entropy of the policy's law at each token, in nats."""

    def lines(self, tokens: Sequence[int]) -> list[int]:
        """How many tokens each line of a completion has."""

    def hinted(self, number: int, text: str) -> list[int]:
        """Token ids of a prompt with the beginning of an answer."""

    def solved(self, number: int, text: str) -> list[int]:
        """Tokens of a solution, no more than a completion has."""

    def criticised(self, number: int, tokens: Sequence[int]) -> list[int]:
        """Token ids of a prompt that asks for a critique of an answer and for a better one."""

    def signal(self, number: int) -> float:
        """The angle signal of a prompt."""


def seed_of(settings: PolicySettings, number: int, part: int) -> int:
    """The seed of one part of a round's randomness."""
    return (settings.seed * 100_003 + number) * 97 + part


class Collector:
    """Makes the clusters of a round. `memory` is what it has seen of earlier ones; JSON can hold it."""

    def __init__(self, source: Source, rows: Sequence[Row], settings: PolicySettings, score: Scorer | None) -> None:
        self.source, self.rows, self.settings, self.score = source, list(rows), settings, score
        self.memory: dict[str, Any] = {}

    # ---- which prompts

    def _batch(self, number: int) -> list[int]:
        """Numbers of a round's prompts."""
        settings, count = self.settings, len(self.rows)
        if settings.schedule == "gap_split" and number > 0 and self.memory.get("hard"):
            return self._turn(self.memory["hard"], number - 1)
        if not settings.fresh or settings.schedule == "gap_split":
            return list(range(count))
        if settings.schedule == "gain":
            return self._near(number)
        return self._turn(list(range(count)), number)

    def _turn(self, among: Sequence[int], number: int) -> list[int]:
        """A batch of `among`, in a new order for each pass."""
        size = min(self.settings.batch_size, len(among))
        first, found = number * size, []
        orders: dict[int, list[int]] = {}
        for at in range(first, first + size):
            turn = at // len(among)
            if turn not in orders:
                orders[turn] = Random(self.settings.seed * 7919 + turn).sample(list(among), len(among))
            found.append(orders[turn][at % len(among)])
        return found

    def _near(self, number: int) -> list[int]:
        """Prompts near the place of the curriculum, in the order of their signals."""
        if "signals" not in self.memory:
            self.memory |= {"signals": [self.source.signal(i) for i in range(len(self.rows))], "place": 0.0}
        signals = self.memory["signals"]
        order = sorted(range(len(signals)), key=lambda i: -signals[i])
        weights = schedules.near(len(order), self.memory["place"], self.settings.gain_width)
        draw = Random(self.settings.seed * 7919 + number)
        size = min(self.settings.batch_size, len(order))
        return [order[i] for i in schedules.without_replacement(weights, size, draw)]

    def _counts(self, batch: Sequence[int]) -> list[int]:
        settings = self.settings
        if settings.schedule == "knapsack":
            rates = self.memory.get("rates", {})
            budget = len(batch) * settings.group_size
            seen = [rates.get(str(i)) for i in batch]
            return schedules.knapsack(seen, budget, most=2 * settings.group_size)
        own = settings.group_size - (1 if settings.schedule == "refine" or settings.with_ == "gold" else 0)
        return [own] * len(batch)

    # ---- samples

    def collect(self, number: int, sampling: bool, opponents: dict[int, list[float]] | None) -> list[Cluster]:
        """Clusters with their rewards and constants."""
        if not sampling:
            made = [
                Cluster(i, [Completion(row.prompt_ids, t, role, score, score) for t, role, score in row.given])
                for i, row in enumerate(self.rows)
            ]
            self.constants(made)
            return made
        batch = self._batch(number)
        made = self._drawn(batch, number, 0)
        if self.settings.schedule == "dynamic":
            made = self._mixed(made, number)
        if self.settings.schedule == "hints":
            self._hint(made, number)
        if self.settings.schedule == "refine":
            self._refine(made, number)
        if self.settings.schedule == "inpaint":
            self._inpaint(made, number)
        if self.settings.with_ == "opponents":
            faced = self.opponents(number) if opponents is None else opponents
            for cluster in made:
                cluster.opponents = faced[cluster.prompt]
        for cluster in made:
            cluster.round = number
        self.constants(made)
        self._remember(made)
        return made

    def _seed(self, number: int, part: int) -> int:
        return seed_of(self.settings, number, part)

    def _drawn(self, batch: Sequence[int], number: int, part: int) -> list[Cluster]:
        settings = self.settings
        counts = self._counts(batch)
        if settings.with_ == "guide":
            made = self._guided(batch, counts, number)
        else:
            asks = [Ask(self.rows[i].prompt_ids, n, settings.sampler) for i, n in zip(batch, counts, strict=True)]
            drawn = self.source.draw(asks, self._seed(number, part))
            made = [
                Cluster(i, [Completion(self.rows[i].prompt_ids, tokens) for tokens in group])
                for i, group in zip(batch, drawn, strict=True)
            ]
        if settings.with_ == "gold":
            for cluster in made:
                gold = [
                    Completion(self.rows[cluster.prompt].prompt_ids, t, "gold")
                    for t, _, _ in self.rows[cluster.prompt].given
                ]
                cluster.completions = gold + cluster.completions
        if settings.with_ == "greedy":
            asks = [Ask(self.rows[i].prompt_ids, 1, "greedy") for i in batch]
            for cluster, group in zip(made, self.source.draw(asks, self._seed(number, 20)), strict=True):
                cluster.completions.append(Completion(cluster.completions[0].prompt_ids, group[0], "greedy"))
                cluster.anchor = len(cluster.completions) - 1
        self._scored(made)
        return made

    def _scored(self, clusters: Sequence[Cluster]) -> None:
        if self.score is None:
            return
        everyone = [(cluster.prompt, c) for cluster in clusters for c in cluster.completions]
        numbers, tokens = [i for i, _ in everyone], [c.tokens for _, c in everyone]
        for (_, c), value in zip(everyone, self.score(numbers, tokens), strict=True):
            c.reward = c.reward_seen = value
        if self.settings.advantage == "weighted" or self.settings.pairing == "disagree":
            terms = self.score.objectives(numbers, tokens)
            check(len(terms) >= 2, "reward", "one term", "a sum of two terms or more, the objectives or judges")
            for k, (_, c) in enumerate(everyone):
                c.terms = [term[k] for term in terms]

    def _guided(self, batch: Sequence[int], counts: Sequence[int], number: int) -> list[Cluster]:
        """Samples that begin with another's tokens: the guide's ("ppo++") or the policy's ("aggrevated")."""
        settings, draw = self.settings, Random(self._seed(number, 40))
        first, second = ("base", "policy") if settings.roll_in == "ppo++" else ("policy", "base")
        owners = [i for i, n in zip(batch, counts, strict=True) for _ in range(n)]
        begun = self.source.draw([Ask(self.rows[i].prompt_ids, 1, first) for i in owners], self._seed(number, 0))
        starts = [rounds.rolled_in(len(group[0]), settings.roll_in_share, draw) for group in begun]
        ahead = [group[0][:h] for group, h in zip(begun, starts, strict=True)]
        if settings.roll_in == "aggrevated":
            ahead = [group[0] if h == 0 else kept for group, h, kept in zip(begun, starts, ahead, strict=True)]
        asks = [
            Ask([*self.rows[i].prompt_ids, *kept], 1, second, max(1, settings.max_new_tokens - len(kept)))
            for i, kept in zip(owners, ahead, strict=True)
        ]
        ended = self.source.draw(asks, self._seed(number, 1))
        made = {i: Cluster(i, []) for i in batch}
        for i, h, kept, group in zip(owners, starts, ahead, ended, strict=True):
            whole = h == 0 and settings.roll_in == "aggrevated"
            tokens = kept if whole else [*kept, *group[0]]
            mask = rounds.ROLL_INS[settings.roll_in](len(tokens), h)
            made[i].completions.append(Completion(self.rows[i].prompt_ids, tokens, mask=mask))
        return list(made.values())

    def _mixed(self, made: list[Cluster], number: int) -> list[Cluster]:
        """Groups that are not constant, with others drawn in place of those that are, as far as a few draws go."""
        wanted, found = len(made), list[Cluster]()
        order = Random(self._seed(number, 50)).sample(range(len(self.rows)), len(self.rows))
        for part in range(1, DRAWS + 1):
            keep = schedules.informative([[c.reward for c in cluster.completions] for cluster in made])
            found += [made[i] for i in keep]
            used = {cluster.prompt for cluster in found}
            others = [i for i in order if i not in used][: wanted - len(found)]
            if len(found) >= wanted or not others or part == DRAWS:
                break
            order = [i for i in order if i not in others] + others
            made = self._drawn(others, number, part + 1)
        return found[:wanted] or made

    def _hint(self, made: list[Cluster], number: int) -> None:
        """Where a whole group is wrong, samples after a part of a solution take its place, a longer one each time."""
        for part, share in enumerate((0.25, 0.5, 0.75), 1):
            failed = [
                c for c in made if self.rows[c.prompt].solution and all(x.reward_seen <= 0 for x in c.completions)
            ]
            if not failed:
                return
            ids = [
                self.source.hinted(c.prompt, schedules.hint(str(self.rows[c.prompt].solution), share)) for c in failed
            ]
            drawn = self.source.draw([Ask(x, self.settings.group_size) for x in ids], self._seed(number, part))
            for cluster, prompt_ids, group in zip(failed, ids, drawn, strict=True):
                cluster.completions = [Completion(prompt_ids, tokens) for tokens in group]
            self._scored(failed)

    def _refine(self, made: list[Cluster], number: int) -> None:
        """One refinement a group: the first right one, else the best; it is learnt from after the plain prompt."""
        asks, owners = [], []
        for cluster in made:
            failed = [c for c in cluster.completions if c.reward_seen <= 0] or cluster.completions[:1]
            for c in failed[:2]:
                owners.append(cluster)
                asks.append(Ask(self.source.criticised(cluster.prompt, c.tokens), 1))
        drawn = self.source.draw(asks, self._seed(number, 60))
        tried = [
            Cluster(c.prompt, [Completion(self.rows[c.prompt].prompt_ids, g[0], "refined")])
            for c, g in zip(owners, drawn, strict=True)
        ]
        self._scored(tried)
        for cluster in made:
            mine = [t.completions[0] for t, owner in zip(tried, owners, strict=True) if owner is cluster]
            right = [c for c in mine if c.reward_seen > 0]
            cluster.completions.append(right[0] if right else max(mine, key=lambda c: c.reward_seen))

    def _inpaint(self, made: list[Cluster], number: int) -> None:
        """Where a whole group is wrong, completions around parts of a solution, of which the right ones take the place
        of wrong ones, up to half of the group. Of the tokens that were given only those at which the policy is least
        sure are learnt from.
        """
        failed = [c for c in made if self.rows[c.prompt].solution and all(x.reward_seen <= 0 for x in c.completions)]
        draw, asks = Random(self._seed(number, 30)), []
        for cluster in failed:
            tokens = self.source.solved(cluster.prompt, str(self.rows[cluster.prompt].solution))
            for _ in range(len(cluster.completions) // 2):
                fixed = schedules.fixed_chunks(len(tokens), CHUNK, draw)
                canvas = tuple((t, tokens[t]) for t in fixed)
                asks.append((cluster, Ask(self.rows[cluster.prompt].prompt_ids, 1, canvas=canvas)))
        drawn = self.source.draw([ask for _, ask in asks], self._seed(number, 31)) if asks else []
        tried = [Cluster(c.prompt, [Completion(a.prompt_ids, g[0])]) for (c, a), g in zip(asks, drawn, strict=True)]
        self._scored(tried)
        entropies = self.source.entropies([(t.completions[0].prompt_ids, t.completions[0].tokens) for t in tried])
        for (cluster, ask), found, entropy in zip(asks, tried, entropies, strict=True):
            new = found.completions[0]
            wrong = [i for i, c in enumerate(cluster.completions) if c.reward_seen <= 0]
            if new.reward_seen <= 0 or not wrong:
                continue
            given = [t for t, _ in ask.canvas]
            sure = schedules.top_entropy(torch.tensor([entropy[t] for t in given]), SURPRISING)
            left = {t for t, kept in zip(given, sure.tolist(), strict=True) if not kept}
            new.mask = [t not in left for t in range(len(new.tokens))]
            cluster.completions[wrong[0]] = new

    def opponents(self, number: int) -> dict[int, list[float]]:
        """Rewards of what samples are compared with, by prompt."""
        assert self.score is not None
        batch, share = self._batch(number), self.settings.opponent
        who = "mixture" if share > 0 else "policy"
        asks = [Ask(self.rows[i].prompt_ids, self.settings.group_size, who, share=share) for i in batch]
        drawn = self.source.draw(asks, self._seed(number, 70))
        owners = [i for i, group in zip(batch, drawn, strict=True) for _ in group]
        values = iter(self.score(owners, [tokens for group in drawn for tokens in group]))
        return {i: [next(values) for _ in group] for i, group in zip(batch, drawn, strict=True)}

    # ---- constants

    def constants(self, clusters: Sequence[Cluster]) -> None:
        """Log-probabilities under the policy as it is, which sampled or is the last round's, and under the base."""
        everyone = [c for cluster in clusters for c in cluster.completions]
        pairs = [(c.prompt_ids, c.tokens) for c in everyone]
        base = self.source.read(pairs, "base")
        policy = self.source.read(pairs, "policy") if self._reads_policy else base
        for c, ref, now in zip(everyone, base, policy, strict=True):
            c.ref = ref
            c.old = ref if self.settings.sampler == "base" else now
            c.prev = now

    @property
    def _reads_policy(self) -> bool:
        sampled = self.score is not None or self.settings.with_ == "gold"
        return sampled or bool(self.settings.prox) or not self.settings.sequences

    def reread(self, clusters: Sequence[Cluster], name: str) -> None:
        """Another policy's log-probabilities, whose weights are in place now, as `name`."""
        everyone = [c for cluster in clusters for c in cluster.completions]
        for c, found in zip(
            everyone, self.source.read([(c.prompt_ids, c.tokens) for c in everyone], "policy"), strict=True
        ):
            setattr(c, name, found)

    def _remember(self, clusters: Sequence[Cluster]) -> None:
        """What reports and later rounds ask: how the samples were, success rates, the place of a curriculum."""
        self.memory["figures"] = figures_of(clusters, scored=self.score is not None)
        own = {c.prompt: [x.reward_seen > 0 for x in c.completions if x.role == "own"] for c in clusters}
        rates = {str(i): sum(right) / len(right) for i, right in own.items() if right}
        if self.settings.schedule == "knapsack":
            self.memory["rates"] = {**self.memory.get("rates", {}), **rates}
        if self.settings.schedule == "gain":
            accuracy = sum(rates.values()) / max(1, len(rates))
            signals = [self.memory["signals"][c.prompt] for c in clusters]
            angle = sum(signals) / len(signals)
            moved = schedules.moved(self.memory["place"], accuracy, angle, size=self.settings.gain_size)
            self.memory["place"] = min(moved, float(len(self.rows) - 1))
        if self.settings.surrogate == "entropy_smooth":
            everyone = [c for cluster in clusters for c in cluster.completions]
            found = self.source.entropies([(c.prompt_ids, c.tokens) for c in everyone])
            mean = sum(map(sum, found)) / max(1, sum(map(len, found)))
            seen = int(self.memory.get("batches", 0))
            before = float(self.memory.get("entropy") or 0.0)
            self.memory |= {"entropy": (before * seen + mean) / (seen + 1), "batches": seen + 1}


def figures_of(clusters: Sequence[Cluster], scored: bool) -> dict[str, float]:
    """What a round's own samples were like: mean and best reward, KL to the base and entropy of a token as the samples
    themselves estimate them, length.
    """
    groups = [[c for c in cluster.completions if c.role == "own"] for cluster in clusters]
    own = [c for group in groups for c in group]
    tokens = sum(len(c.tokens) for c in own)
    if not own:
        return {}
    found = {
        "length": tokens / len(own),
        "entropy": -sum(sum(c.old) for c in own) / tokens,
        "kl": sum(sum(c.old) - sum(c.ref) for c in own) / len(own),
    }
    if not scored:
        return found
    best = [max(c.reward_seen for c in group) for group in groups if group]
    return {"reward": sum(c.reward_seen for c in own) / len(own), "reward_best": sum(best) / len(best), **found}

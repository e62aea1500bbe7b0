"""What samples are worth: rewards as a judge sees them, pairs of them, and advantages of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from steer.train.objectives import advantages as rules
from steer.train.objectives import rounds
from steer.train.objectives.collecting import Row, Source, seed_of
from steer.train.objectives.losses import PAIR_LINKS, soft_value
from steer.train.objectives.options import chosen
from steer.train.objectives.rows import Cluster, Completion
from steer.train.objectives.settings import PolicySettings

__all__ = ["Judge"]


class Judge:
    """Makes pairs and advantages of a round's clusters. `memory` is what the run has seen; it is added to."""

    def __init__(self, source: Source, rows: Sequence[Row], settings: PolicySettings, memory: dict[str, Any]) -> None:
        self.source, self.rows, self.settings, self.memory = source, rows, settings, memory

    def __call__(self, clusters: list[Cluster], number: int, sequences: bool) -> list[Cluster]:
        """Pairs and advantages; clusters that teach nothing are left out."""
        for cluster in clusters:
            self._compared(cluster)
        if self.settings.filter != "none":
            self._filtered(clusters, number)
        if self.settings.drop_constant:
            clusters = [c for c in clusters if len({x.reward for x in c.completions}) > 1]
        if sequences:
            return self._paired(clusters, number)
        return self._credited(clusters) if clusters else []

    def _compared(self, cluster: Cluster) -> None:
        """The reward as the judge sees it."""
        own = [c for c in cluster.completions if c.role != "greedy"]
        values = torch.tensor([c.reward_seen for c in own], dtype=torch.float64)
        kind = self.settings.judge
        if kind == "winrate":
            found = (values.unsqueeze(1) - values).sigmoid().mean(1)
        elif kind == "opponents":
            found = (values.unsqueeze(1) - torch.tensor(cluster.opponents, dtype=torch.float64)).sigmoid().mean(1) - 0.5
        elif kind == "soft_value":
            found = values - soft_value(values, self.settings.beta)
        else:
            found = values
        for c, value in zip(own, found.tolist(), strict=True):
            c.reward = value

    def _filtered(self, clusters: list[Cluster], number: int) -> None:
        """Samples drawn again, with replacement, by the filter's weights."""
        draw = Random(seed_of(self.settings, number, 80))
        for cluster in clusters:
            values = torch.tensor([c.reward for c in cluster.completions], dtype=torch.float64)
            weights = rules.sample_weights(values, self.settings.filter).tolist()
            picked = draw.choices(cluster.completions, weights, k=len(cluster.completions))
            cluster.completions = [replace(c) for c in picked]

    def _paired(self, clusters: list[Cluster], number: int) -> list[Cluster]:
        settings = self.settings
        draw = Random(seed_of(self.settings, number, 90))
        options = chosen(settings, rounds.margin) if settings.pairing == "margin" else {}
        for cluster in clusters:
            scores = [c.reward for c in cluster.completions]
            roles = [c.role for c in cluster.completions]
            if roles == ["chosen", "rejected"]:
                cluster.pairs = [(0, 1)]
                continue
            if settings.pairing == "disagree":
                scores, second = ([c.terms[k] for c in cluster.completions] for k in (0, 1))
                options = {"second": second}
            cluster.pairs = rounds.PAIRINGS[settings.pairing](scores, roles, draw, **options)
            if settings.pairing == "random_two":
                cluster.preference = [
                    float(torch.tensor(scores[i] - scores[j], dtype=torch.float64).sigmoid()) for i, j in cluster.pairs
                ]
        if settings.schedule == "gap_split":
            clusters = self._split(clusters)
        if settings.link in PAIR_LINKS:
            clusters = [cluster for cluster in clusters if cluster.pairs]
            clusters = [self._trimmed(c) for c in clusters]
        if settings.anchor in ("chosen", "chosen_mean"):
            for cluster in clusters:
                cluster.anchor = cluster.pairs[0][0]
        return clusters

    def _split(self, clusters: list[Cluster]) -> list[Cluster]:
        """The easy pairs; the prompts of the hard ones are remembered."""
        paired = [c for c in clusters if c.pairs]
        gaps = [abs(c.completions[c.pairs[0][0]].reward - c.completions[c.pairs[0][1]].reward) for c in paired]
        if not gaps:
            return []
        easy, hard = rounds.gap_split(gaps)
        flat = [c.prompt for c in clusters if not c.pairs]
        self.memory["hard"] = [paired[i].prompt for i in hard] + flat or [c.prompt for c in paired]
        return [paired[i] for i in easy]

    def _trimmed(self, cluster: Cluster) -> Cluster:
        """Without completions that no pair and no anchor looks at; ranks look at all."""
        if self.settings.weight in ("rank", "others"):
            return cluster
        used = sorted(
            {i for pair in cluster.pairs for i in pair}
            | ({cluster.anchor} if self.settings.anchor == "greedy" else set())
        )
        place = {i: k for k, i in enumerate(used)}
        pairs = [(place[i], place[j]) for i, j in cluster.pairs]
        kept = [cluster.completions[i] for i in used]
        return replace(cluster, completions=kept, pairs=pairs, anchor=place.get(cluster.anchor, 0))

    def _credited(self, clusters: list[Cluster]) -> list[Cluster]:
        everyone = [c for cluster in clusters for c in cluster.completions]
        group = torch.tensor([k for k, cluster in enumerate(clusters) for _ in cluster.completions])
        reward = torch.tensor([c.reward for c in everyone], dtype=torch.float64)
        if self.settings.kl == "reward" and self.settings.beta + self.settings.prox:
            reward = reward - torch.tensor([self._drift(c) for c in everyone], dtype=torch.float64)
        seen = torch.tensor([c.reward_seen for c in everyone], dtype=torch.float64)
        worth = self._worth(reward, group, everyone)
        accuracy = rules.group_means((seen > 0).double(), group)
        weight = rules.kl_weight(seen, group)
        for c, a, right, w in zip(everyone, worth.tolist(), accuracy.tolist(), weight.tolist(), strict=True):
            c.advantage, c.accuracy, c.kl = [a] * len(c.tokens), right, w
        if self.settings.credit == "entropy_steps":
            self._by_entropy(everyone)
        if self.settings.credit == "turns":
            self._by_turn(clusters)
        if self.settings.advantage == "best":
            for cluster in clusters:
                cluster.completions = [c for c in cluster.completions if any(c.advantage)]
            clusters = [cluster for cluster in clusters if cluster.completions]
        return clusters

    def _drift(self, c: Completion) -> float:
        s = self.settings
        return s.beta * (sum(c.old) - sum(c.ref)) + s.prox * (sum(c.old) - sum(c.prev))

    def _worth(self, reward: Tensor, group: Tensor, everyone: Sequence[Completion]) -> Tensor:
        rule = self.settings.advantage or "none"
        if rule == "weighted":
            terms = torch.tensor([c.terms for c in everyone], dtype=torch.float64).T
            options = chosen(self.settings, rules.weighted)
            return rules.weighted(terms, group, weights=[1.0] * len(terms), **options)
        options = chosen(self.settings, rules.ADVANTAGES[rule])
        if rule == "length_factor":
            options["length"] = torch.tensor([len(c.tokens) for c in everyone])
        if rule == "bundle":
            held = self.memory.get("quantiles")
            totals = rules.bundle_totals(reward, group, options.get("bundle_size", 5))
            if held is None:
                held = totals.quantile(torch.tensor([0.2, 0.8], dtype=totals.dtype)).tolist()
            options["quantiles"] = (held[0], held[1])
            self.memory["quantiles"] = [
                rules.tracked(q, level, totals) for q, level in zip(held, (0.2, 0.8), strict=True)
            ]
        return rules.ADVANTAGES[rule](reward, group, **options)

    def _by_entropy(self, everyone: Sequence[Completion]) -> None:
        found = self.source.entropies([(c.prompt_ids, c.tokens) for c in everyone])
        sizes = [self.source.lines(c.tokens) for c in everyone]
        means = [[sum(part) / len(part) for part in _cut(row, lines)] for row, lines in zip(found, sizes, strict=True)]
        options = chosen(self.settings, rules.entropy_steps)
        steps = rules.entropy_steps([c.advantage[0] for c in everyone], means, **options)
        for c, lines, values in zip(everyone, sizes, steps, strict=True):
            c.advantage = [v for v, n in zip(values, lines, strict=True) for _ in range(n)]

    def _by_turn(self, clusters: Sequence[Cluster]) -> None:
        """How much likelier each line makes the right answer, which is read after it."""
        asks, places = [], []
        for k, cluster in enumerate(clusters):
            answer = self.rows[cluster.prompt].answer
            for i, c in enumerate(cluster.completions):
                lines = self.source.lines(c.tokens)
                ends = [sum(lines[: t + 1]) for t in range(len(lines) - 1)]
                for end in [0, *ends]:
                    asks.append(([*c.prompt_ids, *c.tokens[:end]], answer))
                    places.append((k, i))
        read = self.source.read(asks, "policy")
        seen: dict[tuple[int, int], list[float]] = {}
        for place, logs in zip(places, read, strict=True):
            seen.setdefault(place, []).append(float(torch.tensor(sum(logs) / len(logs), dtype=torch.float64).exp()))
        options = chosen(self.settings, rules.turns)
        for k, cluster in enumerate(clusters):
            rows = [seen[(k, i)] for i in range(len(cluster.completions))]
            final = [c.reward for c in cluster.completions]
            worth = rules.turns([row[1:] for row in rows], rows[0][0], final, **options)
            for c, values in zip(cluster.completions, worth, strict=True):
                c.advantage = [v for v, n in zip(values, self.source.lines(c.tokens), strict=True) for _ in range(n)]


def _cut(row: Sequence[float], sizes: Sequence[int]) -> list[list[float]]:
    found, at = [], 0
    for size in sizes:
        found.append(list(row[at : at + size]))
        at += size
    return found

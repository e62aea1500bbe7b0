"""Best-of-N, plain sampling, and what best-of-N does exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steer.core import Ability, InputError, Process, Run, Sampler, Samples, check, check_whole
from steer.sampling.rollouts import rollouts

__all__ = ["Ancestral", "BestOfN", "best_of_n_kl", "best_of_n_law", "reward_curve"]


_CHOICES = ("max", "soft", "majority", "weighted")


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Draw `n` independent outputs for each prompt; a reward only scores them."""

    n: int = 1

    title = "plain sampling"
    keeps_all = True
    reads = True
    shows = frozenset({"previews"})

    @property
    def rows(self) -> int:
        return self.n

    def __post_init__(self) -> None:
        check_whole("n", self.n)

    def draw(self, run: Run) -> Samples:
        return rollouts(run, self.n)


@dataclass(frozen=True)
class BestOfN(Sampler):
    """Draw `n` outputs for each prompt and keep the one with the highest reward.

    Ties are broken uniformly. `samples.pool` holds every candidate. The mean of `samples.kl` estimates without bias an
    upper bound on the KL to the base: `log n - (n - 1) / n` nats against the edited process (Beirami et al. 2024), and
    `log q - log p` of the chosen outputs for its edits; None where edits leave log p unknown. `beta` plays no part: n
    sets the strength (Stiennon et al. 2020).

    With `reject` above 0 that share of each prompt's candidates is given up after every step, those whose unfinished
    outputs have the lowest reward (speculative rejection, Sun et al. 2024, 2410.20290): cheaper, and no longer the law
    of best-of-n. The pool then holds what was left, and the bound on the KL is `log n`.

    `choose` says what is kept: "max"; "soft", one drawn with probability `exp(r / beta)` among the candidates, which
    for large n draws from the law `p exp(r / beta)` (Verdun et al. 2025, 2505.03156); "majority", a candidate with the
    answer that most have (self-consistency, Wang et al. 2022, 2203.11171); "weighted", with the answer whose
    candidates' rewards sum to most. Answers that tie are equally likely; of those with it the highest reward is kept.
    `answer` is a regular expression, of which the last match, or its first group, is an output's answer; "" takes the
    whole output. An output without a match has no vote. The bound is then `log n` too: no output is more than n times
    as likely as before.
    """

    n: int = 8
    reject: float = 0.0
    choose: str = "max"
    answer: str = ""

    title = "best-of-n"
    reads = True
    needs_reward = True
    kl_kind = "bound"

    @property
    def rows(self) -> int:
        return self.n

    @property
    def chooses_whole(self) -> bool:
        return self.reject == 0

    @property
    def scores_steps(self) -> bool:
        return self.reject > 0

    def __post_init__(self) -> None:
        check_whole("n", self.n)
        check(0 <= self.reject < 1, "reject", self.reject, "a share of the candidates in [0, 1)")
        check(self.choose in _CHOICES, "choose", self.choose, ", ".join(_CHOICES))
        votes = self.choose in ("majority", "weighted")
        check(votes or not self.answer, "answer", self.answer, "unset, but for choose=majority and weighted")
        try:
            re.compile(self.answer)
        except re.error as error:
            raise InputError("answer", self.answer, f"a regular expression ({error})") from None

    @property
    def tilts(self) -> bool:
        return self.choose == "soft"

    def check_process(self, process: Process) -> None:
        if self.reject:
            process.require(Ability.PREVIEW, "rejecting candidates")
            steps = process.num_steps
            check(steps > 1, "reject", self.reject, "0 here: the output is one step; draw it in several (block)")

    def draw(self, run: Run) -> Samples:
        pool = rollouts(run, self.n, partial(self._narrowed, run) if self.reject else None)
        scores = pool.reward
        assert scores is not None
        chosen = []
        for b in range(len(run.prompts)):
            rows = (pool.group == b).nonzero().squeeze(1)
            if self.choose == "soft":
                law = (scores[rows].double().cpu() / run.beta).softmax(0)
                chosen.append(rows[torch.multinomial(law, 1, generator=run.generator)])
                continue
            if self.choose != "max":
                rows = self._elected(rows, [pool.outputs[i] for i in rows.tolist()], scores, run.generator)
            best = rows[scores[rows] == scores[rows].max()]
            chosen.append(best[torch.randint(len(best), (1,), generator=run.generator)])
        index = torch.cat(chosen)
        kept = pool.select(index)
        plain = not self.reject and self.choose == "max"
        bound = best_of_n_kl(self.n) if plain else math.log(self.n)
        # A sum of each step's KL is right along outputs as they are drawn, not along those that a reward chose.
        q, p = kept.log_prob, kept.base_log_prob
        drift = None if q is None or p is None else q - p + bound
        return replace(kept, pool=pool, lineage=index, kl_estimate=drift)

    def _elected(self, rows: Tensor, outputs: list[Any], scores: Tensor, generator: torch.Generator) -> Tensor:
        """The candidates of a prompt that have the elected answer; all of them where none has an answer."""
        votes: dict[Any, float] = {}
        answers = [self._answer(output) for output in outputs]
        for row, answer in zip(rows.tolist(), answers, strict=True):
            if answer is not None:
                votes[answer] = votes.get(answer, 0.0) + (1.0 if self.choose == "majority" else float(scores[row]))
        if not votes:
            return rows
        most = max(votes.values())
        first = [answer for answer, count in votes.items() if count >= most - 1e-12 * max(1.0, abs(most))]
        elected = first[int(torch.randint(len(first), (1,), generator=generator))]
        return rows[torch.tensor([answer == elected for answer in answers])]

    def _answer(self, output: Any) -> Any:
        """What an output votes for; None for nothing."""
        if not self.answer:
            return output.strip() if isinstance(output, str) else tuple(torch.as_tensor(output).flatten().tolist())
        check(isinstance(output, str), "answer", self.answer, "unset: the outputs are no texts")
        found = list(re.finditer(self.answer, output))
        return (found[-1][1] if found[-1].re.groups else found[-1][0]) if found else None

    def _narrowed(self, run: Run, state: Any) -> Any:
        """The state without the candidates that are given up."""
        score = run.score(run.process.preview(state))
        order = torch.randperm(len(score), generator=run.generator)  # among equals, anyone
        order = order[score[order].argsort(descending=True, stable=True)]
        group = state.group[order]
        kept = []
        for b in group.unique():
            mine = order[group == b]
            kept.append(mine[: len(mine) - int(self.reject * len(mine))])
        index = torch.cat(kept).sort().values
        return run.process.gather(state, index) if len(index) < len(score) else state


def best_of_n_kl(n: int) -> float:
    """`log n - (n - 1) / n` in nats: KL of best-of-n to the base where no two rewards tie, an upper bound otherwise
    (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def best_of_n_law(log_prob: Tensor, reward: Tensor, n: int) -> Tensor:
    """Exact law of best-of-n with uniform tie breaking over an enumerated space, both `[M]`:

    `P(y) = p(y) / P(R = r(y)) * (P(R <= r(y))^n - P(R < r(y))^n)`.
    """
    p = log_prob.double().exp()
    levels, which = torch.unique(reward, return_inverse=True)
    mass = torch.zeros(len(levels), dtype=torch.float64).index_add(0, which, p)
    upto = mass.cumsum(0)
    below = upto - mass
    return torch.where(p > 0, p / mass[which] * (upto**n - below**n)[which], 0.0)


def reward_curve(scores: Tensor, sizes: Sequence[int], evaluated: Tensor | None = None) -> Tensor:
    """Unbiased expected score of best-of-n for each n in `sizes`, from one pool of `N >= n` samples.

    With `scores` `[..., N]` sorted ascending, `R_n = sum_i C(i-1, n-1) / C(N, n) g_(i)`, where g is `evaluated`
    (default: the scores themselves; a gold score shows over-optimisation). Tied scores share the mean of their g.
    Returns `[..., len(sizes)]` in float64.
    """
    gold = (scores if evaluated is None else evaluated).double()
    pool = scores.shape[-1]
    ordered, order = scores.double().sort(-1)
    g = _tied_mean(ordered, gold.gather(-1, order))
    curves = []
    for n in sizes:
        check(1 <= n <= pool, "n", n, f"1 to {pool}, the pool's size")
        weights, weight = [0.0] * pool, n / pool
        for i in range(pool, n - 1, -1):
            weights[i - 1] = weight
            weight = weight * (i - n) / (i - 1) if i > 1 else 0.0
        # A score of -infinity among those that cannot be the best of n plays no part.
        w = torch.tensor(weights, dtype=torch.float64)
        curves.append(torch.where(w > 0, g * w, 0.0).sum(-1))
    return torch.stack(curves, -1)


def _tied_mean(ordered: Tensor, g: Tensor) -> Tensor:
    flat_scores, flat = ordered.reshape(-1, ordered.shape[-1]), g.reshape(-1, g.shape[-1])
    rows = []
    for row, values in zip(flat_scores, flat, strict=True):
        _, which, count = torch.unique_consecutive(row, return_inverse=True, return_counts=True)
        sums = torch.zeros(len(count), dtype=torch.float64).index_add(0, which, values)
        rows.append((sums / count)[which])
    return torch.stack(rows).reshape(g.shape)

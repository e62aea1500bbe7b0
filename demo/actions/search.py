"""Action of the tab in which texts are searched for.

An update is `{"say": text}`, or the search as it stands:

    {"rows": [[score, text, finished]]}     candidates, the best first; the score of an unfinished text is that of what
                                            stands there, and None where it was not asked for
    {"best": text}                          the best of them
    {"curve": [[tokens, score]]}            the best against the tokens drawn
    {"lineage": ..., "tree": ...}           see `steer.demo.actions.growth`
    {"ghost": [[tokens, score]]}            what best-of-N would have reached, at the end
    {"facts": [[name, text, explanation]]}  at the end: what was reached, and what it cost
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from steer.adapters.transformers.serving.work import Done
from steer.core import Samples
from steer.demo.actions.growth import Lineage, Tree
from steer.demo.actions.shared import Shared
from steer.demo.recipes.search import BLOCK, SearchRecipe
from steer.methods.best_of_n import BestOfN, best_of_n_kl, reward_curve
from steer.methods.samplers import SAMPLERS
from steer.model import Plan, execute
from steer.serving.engine import Sampling, Steering, Task

__all__ = ["run"]

_PACE = 0.35
"""Seconds between updates, at least."""


async def run(recipe: SearchRecipe, shared: Shared) -> AsyncGenerator[dict[str, Any]]:
    """Search. Raises `SteerError` for what a person can mend."""
    shared.check_model(recipe.model)
    shared.reward(recipe.reward)
    with shared.line() as turn:
        async for text in turn:
            yield {"say": text}
        async for text in shared.ready():
            yield {"say": text}
        search = _Search(recipe, shared)
        async with aclosing(shared.engine().run_work(search.work)) as steps:
            async for event in steps:
                value = event.value
                if value is not None and not isinstance(event, Done):
                    yield value


class _Search:
    """One search, watched."""

    def __init__(self, recipe: SearchRecipe, shared: Shared) -> None:
        self.recipe, self.shared = recipe, shared
        self.model = shared.engine().model
        self.plan = self._plan(self._sampler(), recipe.seed)
        self.shown: dict[str, Any] = {"rows": [], "best": "", "curve": []}
        self.lineage: Lineage | None = None
        self.tokens, self.passes, self._told = 0, 0, 0.0
        self._fresh: float | None = None
        self._tell: Callable[[Any], None] = lambda value: None

    def _sampler(self) -> Any:
        own = {key: value for key, value in self.recipe.own().items() if key in ("select", "batch")}
        kind = SAMPLERS[self.recipe.sampler]
        kept = {"keep_previews": True} if "lineage" in kind.shows else {}
        return kind.sized(self.recipe.candidates, 1, **own, **kept)

    def _plan(self, sampler: Any, seed: int) -> Plan:
        """The plan that a server would make of the request."""
        recipe = self.recipe
        sampling = Sampling(max_tokens=recipe.max_tokens, temperature=recipe.temperature, seed=seed)
        reward = self.shared.reward(recipe.reward)
        steering = Steering(sampler=sampler, reward=reward, beta=recipe.beta, block=BLOCK)
        task = Task(([{"role": "user", "content": recipe.prompt}],), sampling=sampling, steering=steering)
        plan = self.shared.engine().prepare(task).plan
        assert plan is not None
        return plan

    def work(self, tell: Callable[[Any], None]) -> None:
        """Search, and tell of it; between two tokens others compute."""
        self._tell = tell
        tell({"say": "Searching"})
        samples = execute(self._turning(self.plan), self._step, self._trace)
        self._finished(samples)
        ghost = self._ghost(samples)
        tell({**self.shown, "ghost": ghost["curve"], "facts": self._facts(samples, ghost)})

    def _turning(self, plan: Plan) -> Plan:
        process: Any = plan.process
        return replace(plan, process=replace(process, turn=self._turn))

    def _turn(self) -> None:
        """Before every token: others compute, and whoever waits sees that it goes on."""
        self.passes += 1
        due = time.monotonic() - self._told >= 1.0
        self._told = time.monotonic() if due else self._told
        self._tell({"say": self._said()} if due else None)

    def _said(self) -> str:
        return f"{self.tokens} of {self.recipe.budget} tokens drawn, {self.passes} passes of the model"

    # ---- on the way

    def _step(self, first: int, state: Any) -> None:
        if self.recipe.sampler == "dts-star":
            return
        self.tokens = int(state.drawn)
        if self.recipe.sampler == "best-of-n":
            seen = self.plan.process.preview(state)
            reward = self.plan.reward
            assert reward is not None
            scores = reward(seen).tolist() if reward.alone else [None] * len(seen)
            self._candidates(scores, seen.texts, self.plan.process.finished(state).tolist())
        self._show()

    def _trace(self, first: int, entry: Any) -> None:
        if self.recipe.sampler == "fk":
            self.lineage = self.lineage or Lineage()
            self.lineage.add(entry)
            done = [False] * len(entry.outputs)
            self._candidates(entry.value.tolist(), list(entry.outputs), done)
            self.shown["lineage"] = self.lineage.shown()
        else:
            leaves = entry.samples(None)
            self.tokens = entry.cost.generated_tokens
            self._candidates(leaves.reward.tolist(), leaves.texts, [True] * len(leaves))
            self.shown["tree"] = Tree(entry, leaves, self.model.decode, BLOCK).shown()
            self._show()

    def _candidates(self, scores: list[float | None], texts: list[str], finished: list[bool]) -> None:
        rows = sorted(zip(scores, texts, finished, strict=True), key=lambda row: -_number(row[0]))
        self.shown["rows"] = [[None if s is None else round(s, 4), text, done] for s, text, done in rows]
        self.shown["best"] = rows[0][1]
        if rows[0][0] is not None:
            self._fresh = round(rows[0][0], 4)

    def _show(self) -> None:
        """Tell how things stand, where it is time."""
        if self._fresh is not None:
            self.shown["curve"] = [*self.shown["curve"], [self.tokens, self._fresh]]
            self._fresh = None
        if time.monotonic() - self._told >= _PACE:
            self._told = time.monotonic()
            self._tell({**self.shown, "say": self._said()})

    # ---- at the end

    def _finished(self, samples: Samples) -> None:
        seen = samples if samples.pool is None else samples.pool
        if seen.trace and self.recipe.sampler == "dts-star":
            seen = seen.trace[0].samples(None)
        assert seen.reward is not None and samples.reward is not None
        self.tokens = samples.cost.generated_tokens
        self._candidates(seen.reward.tolist(), seen.texts, [True] * len(seen))
        self.shown["best"] = samples.texts[0]
        end = [self.tokens, round(float(samples.reward[0]), 4)]
        self.shown["curve"] = [*[point for point in self.shown["curve"] if point[0] < self.tokens], end]

    def _ghost(self, samples: Samples) -> dict[str, Any]:
        """What best-of-N reaches with as many tokens: the expected best of 1 to N, from N texts."""
        pool, n = samples.pool, self.recipe.candidates
        if self.recipe.sampler != "best-of-n":
            n = max(2, self.tokens // self.recipe.max_tokens)
            self._tell({**self.shown, "say": f"Best-of-{n} with as many tokens, for comparison"})
            plan = self._plan(BestOfN.sized(n), (self.recipe.seed + 1) % 2**31)
            pool = execute(self._turning(plan)).pool
        assert pool is not None and pool.reward is not None
        each = pool.cost.generated_tokens / n
        curve = reward_curve(pool.reward, range(1, n + 1)).tolist()
        return {"n": n, "curve": [[round(each * (i + 1), 1), round(value, 4)] for i, value in enumerate(curve)]}

    def _facts(self, samples: Samples, ghost: dict[str, Any]) -> list[list[str]]:
        assert samples.reward is not None
        n, reached = ghost["n"], ghost["curve"][-1][1]
        facts = [
            ["Best reward", f"{float(samples.reward[0]):.3f}", "The score of the text that was chosen"],
            [f"Best-of-{n}", f"{reached:.3f}", "What best-of-N reaches on average with as many tokens"],
        ]
        kind = samples.kl_kind or ""
        kl = samples.kl if not kind.startswith("none") else None
        names = {"bound": "KL, at most", "population": "KL, estimated"}
        told = "not known of a tree" if kl is None else f"{float(kl[0]):.2f} nats"
        why = "How far the law of the chosen text is from the model's own"
        facts.append([names.get(kind, "KL"), told, why])
        if self.recipe.sampler != "best-of-n":
            facts.append([f"KL of best-of-{n}, at most", f"{best_of_n_kl(n):.2f} nats", "log N - (N - 1) / N"])
        if self.recipe.sampler == "fk":
            pool = samples.pool or samples
            shown = f"{float(pool.ess[0]):.1f} of {len(pool)}"
            facts.append(["Effective particles (ESS)", shown, "How many independent texts the weighted ones are worth"])
        cost = samples.cost
        facts.append(["Tokens", str(cost.generated_tokens), "Drawn, of all candidates"])
        facts.append(["Texts scored", str(cost.reward_calls), "Calls of the reward"])
        facts.append(["Seconds", f"{cost.seconds:.1f}", "Beside everybody else's work"])
        return facts


def _number(score: float | None) -> float:
    return float("-inf") if score is None else score

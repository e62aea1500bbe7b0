"""A router over several rounds as an environment: think, ask a model of the pool, answer.

The form and the reward are those of Router-R1 (Zhang et al. 2025). Action: `<think>...</think>`, then
`<search>NAME: question</search>`, which is answered by that model in `<information>`, or `<answer>...</answer>`, which
ends the episode.
"""

from __future__ import annotations

import math
import random
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from steer.core import Prompt, check, check_whole
from steer.core.names import meant
from steer.turns.environment import Environment, Outcome

__all__ = ["RouterEnvironment", "cost_share", "exact_match", "format_fault", "route_reward"]

_TAGS = ("think", "search", "information", "answer")
_TAG = re.compile(rf"<(/?)({'|'.join(_TAGS)})>")


def format_fault(transcript: str, names: Sequence[str]) -> str | None:
    """What is wrong with the form of a whole episode's text; None where nothing is.

    Wrong are: no tags, or tags that are not closed or lie in one another; a text that does not begin with think and
    end with answer; another number of answers than one; other numbers of searches and informations; a thought that is
    empty or "..."; a query without exactly one colon, an unknown model, or the model's name in its own query.
    """
    open_, parts = None, []
    for found in _TAG.finditer(transcript):
        closing, tag = found[1] == "/", found[2]
        if not closing and open_ is None:
            open_ = (tag, found.end())
        elif closing and open_ is not None and open_[0] == tag:
            parts.append((tag, transcript[open_[1] : found.start()].strip()))
            open_ = None
        else:
            return f"<{found[1]}{tag}> is out of place"
    if open_ is not None or not parts:
        return "a tag is not closed" if open_ is not None else "there are no tags"
    tags = [tag for tag, _ in parts]
    text = transcript.strip()
    if tags[0] != "think" or tags[-1] != "answer" or not (text.startswith("<think>") and text.endswith("</answer>")):
        return "it does not begin with think and end with answer"
    if tags.count("answer") != 1:
        return f"{tags.count('answer')} answers"
    if tags.count("search") != tags.count("information"):
        return f"{tags.count('search')} searches and {tags.count('information')} informations"
    for tag, said in parts:
        if tag == "think" and said in ("", "..."):
            return "a thought is empty"
        if tag == "search" and (fault := _query_fault(said, names)) is not None:
            return fault
    return None


def _query_fault(query: str, names: Sequence[str]) -> str | None:
    if query.count(":") != 1:
        return f"a query with {query.count(':')} colons"
    name, question = (part.strip() for part in query.split(":", 1))
    if name not in names:
        return f"an unknown model {name!r}"
    return f"the model's name {name!r} in its query" if name.lower() in question.lower() else None


def exact_match(answer: str, known: str) -> bool:
    """Whether two answers are equal but for case, articles, punctuation and space."""

    def plain(text: str) -> str:
        text = re.sub(r"[^\w\s]", "", text.lower())
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    return plain(answer) == plain(known)


def cost_share(cost: float, window: Sequence[float]) -> float:
    """How cheap an episode was beside those of a window, from 0 (dear) to 1: `u = 1 - clip((sqrt(x) - q05) / (q95 -
    q05), 0, 1)`, with the quantiles of the window's square roots; 1/2 while they coincide.
    """
    roots = sorted(math.sqrt(x) for x in window)
    low, high = _quantile(roots, 0.05), _quantile(roots, 0.95)
    if high <= low:
        return 0.5
    return 1 - min(max((math.sqrt(cost) - low) / (high - low), 0.0), 1.0)


def _quantile(x: Sequence[float], q: float) -> float:
    if not x:
        return 0.0
    at = q * (len(x) - 1)
    low = math.floor(at)
    high = min(low + 1, len(x) - 1)
    return x[low] + (at - low) * (x[high] - x[low])


def route_reward(fault: str | None, right: bool, share: float, c: float = 0.0) -> float:
    """Reward of an episode: -1 for a wrong form, whatever else; 0 for a wrong answer; `(1 - c) + c share` for a right
    one.
    """
    return -1.0 if fault is not None else (1 - c) + c * share if right else 0.0


class RouterEnvironment(Environment):
    """Questions that a pool of models is asked about, in several rounds.

    Args:
        pool: models by name, with `generate`.
        answers: the right answer by question.
        descriptions: what the agent is told of each model.
        price: of a million tokens, by name.
        max_rounds: searches before an answer must come.
        observation_tokens: of a model's answer that are shown, counted as words.
        answer_tokens: that a model may write.
        cost_weight: c of the reward; the published script has 0.
    """

    name = "router"
    forks = True

    def __init__(
        self,
        pool: Mapping[str, Any],
        answers: Mapping[str, str],
        descriptions: Mapping[str, str] | None = None,
        price: Mapping[str, float] | None = None,
        max_rounds: int = 4,
        observation_tokens: int = 600,
        answer_tokens: int = 512,
        cost_weight: float = 0.0,
    ) -> None:
        for field, given in (("descriptions", descriptions), ("price", price)):
            for name in given or {}:
                check(name in pool, field, name, f"{', '.join(pool)}{meant(name, pool)}")
        for name, cost in (price or {}).items():
            check(cost >= 0, f"price.{name}", cost, "a number of 0 or more")
        for field, value in (("max_rounds", max_rounds), ("answer_tokens", answer_tokens)):
            check_whole(field, value)
        check(0 <= cost_weight <= 1, "cost_weight", cost_weight, "a number from 0 to 1")
        self.pool, self.answers, self.descriptions = pool, answers, dict(descriptions or {})
        self.price, self.max_rounds, self.cost_weight = dict(price or {}), max_rounds, cost_weight
        self.observation_tokens, self.answer_tokens = observation_tokens, answer_tokens
        self.window: deque[float] = deque(maxlen=1000)
        """Costs of the last episodes, of all copies."""
        self.question, self.text, self.cost, self.searches = "", "", 0.0, 0
        self.rng = random.Random(0)

    def reset(self, prompt: Prompt, seed: int) -> str:
        self.question = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        check(self.question in self.answers, "prompt", self.question, "questions whose answers are known")
        self.text, self.cost, self.searches = "", 0.0, 0
        self.reseed(seed)
        models = "\n".join(f"{name}: {self.descriptions.get(name, 'a language model')}" for name in self.pool)
        return (
            "Think in <think></think>. Then either ask one model, <search>NAME: question</search>, or answer, "
            f"<answer></answer>.\n{models}"
        )

    def fork(self, seed: int | None = None) -> RouterEnvironment:
        twin = object.__new__(RouterEnvironment)
        twin.__dict__.update(self.__dict__)
        twin.reseed(self.rng.randrange(2**31) if seed is None else seed)
        return twin

    def step(self, action: str) -> Outcome:
        self.text += action
        answered = re.search(r"<answer>(.*?)</answer>", action, re.DOTALL)
        asked = re.search(r"<search>(.*?)</search>", action, re.DOTALL)
        if answered is None and asked is not None and self.searches < self.max_rounds:
            return self._search(asked[1].strip())
        fault = format_fault(self.text, list(self.pool))
        right = answered is not None and exact_match(answered[1], self.answers[self.question])
        share = cost_share(self.cost, self.window)
        self.window.append(self.cost)
        reward = route_reward(fault, right, share, self.cost_weight)
        info = {"fault": fault, "success": right and fault is None, "price": self.cost}
        return Outcome(fault or ("Right." if right else "Wrong."), reward, done=True, info=info)

    def _search(self, query: str) -> Outcome:
        self.searches += 1
        name, _, question = (part.strip() for part in query.partition(":"))
        if name not in self.pool or not question:
            said = f"there is no model {name!r}; there are {', '.join(self.pool)}"
        else:
            drawn = self.pool[name].generate(
                [question], max_new_tokens=self.answer_tokens, seed=self.rng.randrange(2**31)
            )
            said = " ".join(drawn.texts[0].split()[: self.observation_tokens])
            tokens = len(drawn.tokens[0]) if drawn.tokens is not None else len(said.split())
            self.cost += tokens * self.price.get(name, 0.0) / 1e6
        shown = f"<information>{_TAG.sub('', said)}</information>"
        self.text += shown
        return Outcome(shown)

"""Concept steering, judged as AxBench judges it: is the concept there, is the question answered, is the text fluent?

Each of three judgments is 0, 1 or 2; a text's score is their harmonic mean, 0 where one is 0; a method's is the mean
over texts. The factor of a vector is chosen on one half of the instructions and reported on the other (Wu et al. 2025,
2501.17148, section 4). The offline judge goes by rules, so that its scores compare curves of one run and not published
figures; a language model judges by three instructions, whose last "Rating:" is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from steer.core import Prompt, Reward, Samples, SteerError, check
from steer.files import as_json, write_text
from steer.measure.tables import aligned, few, number
from steer.methods.prompt import SystemPrompt
from steer.progress import ticking
from steer.rewards import distinct_n
from steer.rewards.text import Keywords, words

__all__ = [
    "Concept",
    "ConceptReport",
    "ConceptRow",
    "ConceptSettings",
    "Judge",
    "ModelJudge",
    "RuleJudge",
    "evaluate_concepts",
    "harmonic",
    "parse_rating",
]

FACTORS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0)
"""AxBench's, times a scale of each method's."""


@dataclass(frozen=True)
class Concept:
    """What texts should be about, with words that tell it and an edit that is to bring it about."""

    name: str
    words: tuple[str, ...]
    edit: Any
    system: str = ""

    @property
    def asked(self) -> str:
        """The system prompt that asks for it."""
        return self.system or f"Whatever you are asked, bring this into your answer: {self.name}."


@dataclass(frozen=True)
class ConceptSettings:
    """How texts are drawn, and which factors are tried."""

    factors: tuple[float, ...] = FACTORS
    scale: float = 0.1
    """Strength of the edit at factor 1."""
    split: bool = True
    """Choose the factor on one half of the instructions and report on the other."""
    seed: int = 0
    max_new_tokens: int = 128
    temperature: float = 1.0


class Judge(Protocol):
    """Rates texts."""

    name: str

    def rate(self, concept: Concept, instructions: Sequence[Prompt], written: Written, base: Base) -> Tensor:
        """Concept, instruction and fluency of each text `[N, 3]`, each 0, 1 or 2."""


@dataclass(frozen=True)
class Written:
    """Texts with their perplexity under the unsteered model `[N]`."""

    texts: list[str]
    perplexity: Tensor


@dataclass(frozen=True)
class Base:
    """What rules compare with: the unsteered texts, and those of the system prompt."""

    unsteered: Written
    asked: Written


def harmonic(ratings: Tensor) -> Tensor:
    """Harmonic mean `[N]` of ratings `[N, 3]`; 0 where one is 0."""
    safe = ratings.double().clamp_min(1e-300)
    return torch.where((ratings > 0).all(1), ratings.shape[1] / (1 / safe).sum(1), 0.0)


# ------------------------------------------------------------------------------------------------------------ judges


def cut(values: Tensor, reference: Tensor) -> Tensor:
    """0, 1 or 2 for values `[N]` up to the median, up to the 90th percentile and beyond those of a reference `[M]`."""
    low, high = torch.quantile(reference.double(), torch.tensor([0.5, 0.9], dtype=torch.float64))
    return (values.double() > low).long() + (values.double() > high).long()


@dataclass(frozen=True)
class RuleJudge:
    """Rules without a model. Concept: the share of its words that occur, 0, up to a third, more; or `reward`, cut
    at the median and the 90th percentile of texts without an edit. Instruction: the share of its words that occur, cut
    likewise. Fluency: 2 up to 1.25 times the unsteered texts' perplexity, 1 up to twice, 0 beyond, or where distinct-2
    is below half of theirs.
    """

    reward: Reward | None = None
    name: str = "rules"

    def rate(self, concept: Concept, instructions: Sequence[Prompt], written: Written, base: Base) -> Tensor:
        reference = [*base.unsteered.texts, *base.asked.texts]
        if self.reward is None:
            share = torch.tensor([Keywords(concept.words).rate(text) for text in written.texts], dtype=torch.float64)
            there = (share > 0).long() + (share > 1 / 3).long()
        else:
            there = cut(_scored(self.reward, written.texts), _scored(self.reward, reference))
        asked = [_words_of(prompt) for prompt in instructions]
        times = len(reference) // len(asked)
        answered = cut(_shared(written.texts, asked), _shared(reference, asked * times))
        usual = float(base.unsteered.perplexity.log().mean().exp())
        ratio = written.perplexity / usual
        plain = sum(distinct_n([text], 2) for text in base.unsteered.texts) / len(base.unsteered.texts)
        varied = torch.tensor([distinct_n([text], 2) >= 0.5 * plain for text in written.texts])
        fluent = torch.where(varied, (ratio <= 1.25).long() + (ratio <= 2).long(), 0)
        return torch.stack([there, answered, fluent], 1)


def _scored(reward: Reward, texts: Sequence[str]) -> Tensor:
    zero = torch.zeros(len(texts), dtype=torch.float64)
    return reward(Samples([""] * len(texts), list(texts), torch.arange(len(texts)), zero)).double()


def _words_of(prompt: Prompt) -> set[str]:
    text = prompt if isinstance(prompt, str) else " ".join(str(m["content"]) for m in prompt)
    return {word for word in words(text) if len(word) > 3}


def _shared(texts: Sequence[str], asked: Sequence[set[str]]) -> Tensor:
    """Share of an instruction's words of more than three letters that its text has."""
    shares = [len(a & set(words(t))) / max(len(a), 1) for t, a in zip(texts, asked, strict=True)]
    return torch.tensor(shares, dtype=torch.float64)


_QUESTIONS = (
    'Does the text below contain the concept "{concept}"? Rate 0 if it is not there, 1 if it is there somewhat or '
    "awkwardly, 2 if it is there clearly.",
    'Is the text below related to the topic of this instruction: "{instruction}"? Rate 0 if it is unrelated, 1 if it '
    "is somewhat related, 2 if it is clearly related. Do not judge how well it is written.",
    "Is the text below fluent? Rate 0 if it cannot be read, 1 if it reads unnaturally in places, 2 if it reads well.",
)
_RATING = re.compile(r"rating:\W*(-?\d+)", re.IGNORECASE)


def parse_rating(text: str) -> int | None:
    """The last "Rating:" of a judge's answer; None where there is none of 0, 1 or 2."""
    found = _RATING.findall(text)
    return int(found[-1]) if found and found[-1] in ("0", "1", "2") else None


@dataclass
class ModelJudge:
    """A language model that is asked the three questions. Answers without a rating count as 0; raises `SteerError`
    where they are more than one in twenty.
    """

    model: Any
    name: str
    max_new_tokens: int = 64
    asked: int = 0
    unread: int = 0

    def rate(self, concept: Concept, instructions: Sequence[Prompt], written: Written, base: Base) -> Tensor:
        prompts = []
        for prompt, text in zip(instructions, written.texts, strict=True):
            instruction = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
            for question in _QUESTIONS:
                wanted = question.format(concept=concept.name, instruction=instruction)
                prompts.append(f'{wanted} End with "Rating: " and the number.\n\nText:\n{text}')
        answers = self.model.generate(prompts, temperature=0, max_new_tokens=self.max_new_tokens).texts
        ratings = [parse_rating(answer) for answer in answers]
        self.asked += len(ratings)
        self.unread += sum(r is None for r in ratings)
        if self.unread > 0.05 * self.asked:
            raise SteerError(f"judge {self.name}: {self.unread} of {self.asked} answers have no rating of 0, 1 or 2")
        return torch.tensor([r or 0 for r in ratings]).reshape(-1, 3)


# ------------------------------------------------------------------------------------------------------------- study


@dataclass(frozen=True)
class ConceptRow:
    """One method on the instructions that are reported."""

    method: str
    factor: float | None
    """Chosen on the other half; the mean over concepts."""
    concept: float
    instruction: float
    fluency: float
    score: float
    low: float
    high: float
    """95% interval of the score, by bootstrap over concepts, or over instructions of a single one."""


@dataclass
class ConceptReport:
    """What was measured."""

    settings: dict[str, Any]
    rows: list[ConceptRow] = field(default_factory=list)
    curves: dict[str, dict[float, float]] = field(default_factory=dict)
    """Mean score by method and factor, on the instructions that the factor was chosen on."""
    examples: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> str:
        """Plain text."""
        rows = [["", "factor", "concept", "instruction", "fluency", "score", "95% interval"]]
        for r in self.rows:
            parts = [number(x, "{:.2f}") for x in (r.concept, r.instruction, r.fluency, r.score)]
            span = f"{number(r.low, '{:.2f}')} .. {number(r.high, '{:.2f}')}"
            rows.append([r.method, "" if r.factor is None else f"{r.factor:.2g}", *parts, span])
        rules = self.settings["judge"].startswith("rules")
        notes = [
            f"judge: {self.settings['judge']}; each judgment 0 to 2, score their harmonic mean; "
            f"{self.settings['concepts']} concepts, {self.settings['reported']} instructions each are reported",
            "judged by rules: for curves of one run, not to be compared with published figures" if rules else "",
            "" if self.settings["split"] else "factors were chosen on the instructions that are reported: optimistic",
            few(self.settings["reported"] * self.settings["concepts"], "texts"),
        ]
        return "\n".join([aligned(rows), *filter(None, notes)])

    def records(self) -> list[dict[str, Any]]:
        """A flat row for each method."""
        return [asdict(r) for r in self.rows]

    def write(self, folder: Path | str) -> None:
        """Write concept.json into `folder` in one step."""
        write_text(Path(folder) / "concept.json", as_json(asdict(self)) + "\n")


def evaluate_concepts(
    model: Any,
    concepts: Sequence[Concept],
    instructions: Sequence[Prompt],
    judge: Judge,
    settings: ConceptSettings | None = None,
    *,
    progress: bool = False,
) -> ConceptReport:
    """Write under every method at every factor, and judge: unsteered, prompt, vector, a random vector of the same norm,
    prompt and vector.

    Raises:
        InputError: fewer than two instructions to split, or a factor that is not above 0.
        SteerError: a judge whose answers cannot be read.
    """
    settings = settings or ConceptSettings()
    check(bool(concepts), "concepts", [], "at least one")
    check(len(instructions) >= 2 or not settings.split, "prompts", len(instructions), "at least 2, or --no-split")
    good = bool(settings.factors) and all(0 < f < math.inf for f in settings.factors)
    check(good, "factors", settings.factors, "numbers above 0")
    half = len(instructions) // 2
    chosen = slice(0, half) if settings.split else slice(None)
    kept = slice(half, None) if settings.split else slice(None)
    found = ConceptReport(
        {
            **asdict(settings),
            "judge": judge.name,
            "concepts": len(concepts),
            "reported": len(list(instructions)[kept]),
            "instructions": len(instructions),
        }
    )
    ratings: dict[str, list[Tensor]] = {}
    factors: dict[str, list[float]] = {}
    curves: dict[str, list[Tensor]] = {}
    with ticking(progress, "concepts", len(concepts) * (2 + 3 * len(settings.factors))) as tick:
        for concept in concepts:
            study = _Study(model, concept, list(instructions), judge, settings)
            for name, by_factor in study.ways(tick):
                scores = torch.stack([harmonic(r) for r in by_factor])  # [F, N]
                best = int(scores[:, chosen].mean(1).argmax())
                ratings.setdefault(name, []).append(by_factor[best][kept])
                if len(by_factor) > 1:
                    factors.setdefault(name, []).append(settings.factors[best])
                    curves.setdefault(name, []).append(scores[:, chosen].mean(1))
            found.examples += study.examples
    for name, parts in ratings.items():
        there, answered, fluent = torch.cat(parts).double().mean(0).tolist()
        scores = torch.stack([harmonic(part).mean() for part in parts]) if len(parts) > 1 else harmonic(parts[0])
        mine = factors.get(name)
        low, high = _bootstrap(scores)
        factor = sum(mine) / len(mine) if mine else None
        found.rows.append(ConceptRow(name, factor, there, answered, fluent, float(scores.mean()), low, high))
    for name, tables in curves.items():
        found.curves[name] = dict(zip(settings.factors, torch.stack(tables).mean(0).tolist(), strict=True))
    return found


def _bootstrap(values: Tensor, draws: int = 2000) -> tuple[float, float]:
    index = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(values[index].mean(1), torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


@dataclass
class _Study:
    model: Any
    concept: Concept
    instructions: list[Prompt]
    judge: Judge
    settings: ConceptSettings
    examples: list[dict[str, Any]] = field(default_factory=list)

    def ways(self, tick: Any) -> Any:
        """Yields each method with its ratings `[N, 3]` by factor."""
        asked = SystemPrompt(self.concept.asked)
        plain, prompted = self.written([]), self.written([asked])
        base = Base(plain, prompted)
        for name, written in (("unsteered", plain), ("prompt", prompted)):
            yield name, [self.judged(name, None, written, base)]
            tick(1)
        edit = self.concept.edit
        arms: Mapping[str, tuple[Any, list[Any]]] = {
            "vector": (edit, []),
            "random vector": (edit.random(1), []) if hasattr(edit, "random") else (None, []),
            "prompt + vector": (edit, [asked]),
        }
        for name, (vector, beside) in arms.items():
            if vector is None:
                continue
            rated = []
            for factor in self.settings.factors:
                strength = factor * self.settings.scale
                written = self.written([replace(vector, strength=strength), *beside])
                rated.append(self.judged(name, factor, written, base))
                tick(1)
            yield name, rated

    def written(self, edits: list[Any]) -> Written:
        s = self.settings
        drawn = {"max_new_tokens": s.max_new_tokens, "temperature": s.temperature, "seed": s.seed}
        samples = self.model.generate(self.instructions, edits=edits, **drawn)
        total, tokens = self.model.log_likelihood(replace(samples, prompts=self.instructions))
        return Written(samples.texts, (-total / tokens.clamp_min(1)).clamp_max(700).exp())

    def judged(self, name: str, factor: float | None, written: Written, base: Base) -> Tensor:
        ratings = self.judge.rate(self.concept, self.instructions, written, base)
        there, answered, fluent = ratings[0].tolist()
        setting = name if factor is None else f"{name}, factor {factor:g}"
        text = {"concept": self.concept.name, "setting": setting, "text": written.texts[0]}
        self.examples.append(text | {"concept_rating": there, "instruction_rating": answered, "fluency_rating": fluent})
        return ratings

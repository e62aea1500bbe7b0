"""Measures of hints: whether the black box heeds them at all, and what policies are worth beside each other.

Random phrases of the input are the control of every table: that a prompt has a line of keywords may help, whatever
they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from steer.core import SteerError
from steer.measure.tables import aligned, few, ranged
from steer.train.stimulus.box import Bench, shares
from steer.train.stimulus.extracting import ExtractPolicy
from steer.train.stimulus.rows import Row

__all__ = ["Heeded", "Line", "compared", "heeded", "random_hints", "table", "told"]


BEFORE = ("SFT", "equal scores", "untrained")
"""What the policy before the rounds is called in tables."""


def interval(values: Tensor) -> tuple[float, float]:
    """Mean and half the width of its 95% interval, of the values that are no NaN."""
    good = values[~values.isnan()]
    if len(good) == 0:
        return math.nan, math.nan
    half = 1.96 * float(good.std()) / math.sqrt(len(good)) if len(good) > 1 else math.nan
    return float(good.mean()), half


@dataclass(frozen=True)
class Heeded:
    """Whether the black box heeds a hint: what is gained by it over random phrases, or without a reward over none."""

    what: str
    gain: float
    half: float
    inputs: int
    share: float
    """Of the hint's words in the text."""
    share_without: float

    def rounded(self) -> dict[str, Any]:
        """For the card; what is not known is None."""
        return _rounded(asdict(self))

    @property
    def known(self) -> bool:
        """Whether the gain is above 0, as far as can be told."""
        return self.gain - self.half > 0

    @property
    def text(self) -> str:
        verdict = "heeds the hint" if self.known else "does not heed the hint, as far as can be told"
        return (
            f"the black box {verdict}: {self.what} {ranged(self.gain, self.half)} on {self.inputs} inputs; it writes "
            f"{self.share:.0%} of the hint's words with it and {self.share_without:.0%} without"
        )


def _rounded(given: dict[str, Any]) -> dict[str, Any]:
    shown = {k: round(v, 5) if isinstance(v, float) else v for k, v in given.items()}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in shown.items()}


def _known(given: dict[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None else v for k, v in given.items()}


def random_hints(control: ExtractPolicy, rows: Sequence[Row], seed: int) -> list[str]:
    """A hint of random phrases for each row."""
    drawn = control.draw([row.input for row in rows], 1, torch.Generator().manual_seed(seed), equal=True)
    return [mine[0].hint for mine in drawn]


def heeded(bench: Bench, rows: Sequence[Row], hints: Sequence[str], control: ExtractPolicy, seed: int) -> Heeded:
    """Whether the black box heeds `hints`, one for each row. Raises `SteerError` for a reward that never differs."""
    inputs = [row.input for row in rows]
    texts, plain = bench.texts(inputs, hints), bench.texts(inputs, [None] * len(rows))
    share, without = shares(hints, texts), shares(hints, plain)
    if bench.reward is None:
        gain, half = interval(share - without)
        what = "share of its words, more than without it,"
    else:
        against = bench.texts(inputs, random_hints(control, rows, seed))
        a, b = bench.rewards(inputs, texts), bench.rewards(inputs, against)
        if not bool((a - b).nan_to_num(1.0).any()) and not bool(
            (a - bench.rewards(inputs, plain)).nan_to_num(1.0).any()
        ):
            raise SteerError(f"reward {bench.reward}: the same whatever the hint: the black box ignores the hint")
        gain, half = interval(a - b)
        what = "reward, above random phrases,"
    return Heeded(what, gain, half, len(rows), interval(share)[0], interval(without)[0])


@dataclass(frozen=True)
class Line:
    """One kind of hint on the held-out inputs: mean reward, what it is above random phrases, paired, and the share of
    the hint's words in the texts; each mean with half the width of its 95% interval.
    """

    name: str
    reward: float
    half: float
    over_random: float
    over_half: float
    share: float
    over_before: float = math.nan
    """What the rounds gain over the policy before them."""
    over_before_half: float = math.nan

    def rounded(self) -> dict[str, Any]:
        """For the card; what is not known is None."""
        return _rounded(asdict(self))


def compared(bench: Bench, rows: Sequence[Row], kinds: dict[str, list[list[str | None]]]) -> list[Line]:
    """The lines of a table; `kinds` are hints for each row, of several the best by the reward. One is "random"."""
    inputs = [row.input for row in rows]
    worth, share = {}, {}
    for name, hints in kinds.items():
        flat = [(text, hint) for text, mine in zip(inputs, hints, strict=True) for hint in mine]
        asked = [text for text, _ in flat]
        texts = bench.texts(asked, [hint for _, hint in flat])
        rewards = bench.rewards(asked, texts) if bench.reward is not None else torch.full((len(flat),), math.nan)
        best = rewards.double().reshape(len(rows), -1)
        worth[name] = torch.where(best.isnan(), -math.inf, best).amax(1)
        worth[name] = torch.where(worth[name].isinf(), math.nan, worth[name])
        share[name] = shares([hint or "" for _, hint in flat], texts)
    lines = []
    for name, found in worth.items():
        over = interval(found - worth["random"]) if name != "random" else (math.nan, math.nan)
        before = next((worth[other] for other in BEFORE if other in worth), None)
        gained = (math.nan, math.nan)
        if name == "after the rounds" and before is not None:
            gained = interval(found - before)
        lines.append(Line(name, *interval(found), *over, interval(share[name])[0], *gained))
    return lines


def table(lines: Sequence[dict[str, Any]], inputs: int) -> str:
    """As text, with what the card has of each line."""
    cells = [["hint", "reward", "above random", "its words in the text"]]
    for line in lines:
        known = _known(line)
        share = "-" if math.isnan(known["share"]) else f"{known['share']:.0%}"
        over = "-" if math.isnan(known["over_random"]) else ranged(known["over_random"], known["over_half"])
        cells.append([line["name"], ranged(known["reward"], known["half"]), over, share])
    return "\n".join(filter(None, [aligned(cells), few(inputs, "held-out inputs")]))


def told(metrics: dict[str, Any]) -> str:
    """The figures of a card as text: the table, what the rounds did, and whether the black box heeds the hint."""
    parts = [table(metrics["table"], metrics["judged"])]
    rounds = metrics.get("rounds") or []
    if len(rounds) >= 4:
        quarter = len(rounds) // 4
        first, last = (torch.tensor([one["reward"] for one in some]) for some in (rounds[:quarter], rounds[-quarter:]))
        kl = sum(one["kl"] for one in rounds[-quarter:]) / quarter
        parts.append(
            f"reward of the first quarter of {len(rounds)} rounds {float(first.mean()):.3f}, of the last "
            f"{float(last.mean()):.3f}, at a KL of {kl:.2f} nats a hint"
        )
        gain = next((line for line in metrics["table"] if line["name"] == "after the rounds"), None)
        before = next((line for line in metrics["table"] if line["name"] in BEFORE), None)
        if gain is not None and before is not None and gain.get("over_before") is not None:
            shown = ranged(gain["over_before"], gain["over_before_half"])
            more = gain["over_before"] - gain["over_before_half"] > 0
            parts.append(
                f"on held-out inputs the rounds {'gain' if more else 'show no gain:'} {shown} over {before['name']}"
            )
    if metrics.get("heeded"):
        parts.append(Heeded(**_known(metrics["heeded"])).text)
    return "\n".join(parts)

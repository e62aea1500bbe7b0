"""A trained router: a ridge head for each model on hashed words of the prompt, and what it is worth for a price.

Rows are `{"prompt", "model", "score"}`, and `tokens` where known: what a model's answer to a prompt was worth. Missing
combinations are skipped. Letters: `B` prompts, `M` models, `D` features.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer import artifacts
from steer.core import Prompt, check
from steer.core.messages import plain_messages
from steer.measure.tables import aligned, number

__all__ = ["RouteTable", "Router", "features_of", "train_router"]

_BUCKETS = 512
_PENALTIES = (0.1, 1.0, 10.0, 100.0)
_LEAST = 20


def features_of(prompts: Sequence[Prompt], buckets: int = _BUCKETS) -> Tensor:
    """Hashed words `[B, D]`: a bucket has the square root of how often its words occur, then length and digits."""
    rows = torch.zeros(len(prompts), buckets + 3, dtype=torch.float64)
    for row, prompt in zip(rows, prompts, strict=True):
        said = [m["content"] for m in plain_messages(prompt)] if not isinstance(prompt, str) else [str(prompt)]
        text = "\n".join(said)
        for word in re.findall(r"\w+|[^\w\s]", text.lower()):
            row[zlib.crc32(word.encode()) % buckets] += 1
        row[:buckets] = row[:buckets].sqrt()
        row[buckets] = math.log1p(len(text))
        row[buckets + 1] = math.log1p(sum(c.isdigit() for c in text))
        row[buckets + 2] = 1.0
    return rows


@dataclass(frozen=True, eq=False)
class Router:
    """Expected scores of models: `router(prompts) -> [B, M]`."""

    names: tuple[str, ...]
    weights: Tensor
    """`[M, D]` on standardised features; the last is the constant."""
    mean: Tensor
    std: Tensor

    def __call__(self, prompts: Sequence[Prompt]) -> Tensor:
        return ((features_of(prompts, self.weights.shape[1] - 3) - self.mean) / self.std) @ self.weights.T

    def save(self, path: Path | str) -> None:
        """Write a safetensors file."""
        card = artifacts.Card(kind="router", model={}, layers=[], settings={"names": list(self.names)})
        artifacts.save(path, {"weights": self.weights, "mean": self.mean, "std": self.std}, card)

    @classmethod
    def load(cls, path: Path | str) -> Router:
        """Read a file that `save` wrote. Raises `InputError`."""
        tensors, card = artifacts.load(path)
        check(card.kind == "router", "router", f"{path} (a {card.kind})", "a file of steer train router")
        names = tuple(str(name) for name in card.settings.get("names", ()))
        fits = {"weights", "mean", "std"} <= tensors.keys() and len(tensors["weights"]) == len(names)
        check(fits, "router", f"{path} (its tensors do not fit)", "as steer writes it")
        return cls(names, *(tensors[name].double() for name in ("weights", "mean", "std")))


@dataclass(frozen=True)
class Point:
    """What one way to choose is worth, on prompts that were held out."""

    name: str
    score: float
    price: float
    half: float
    """Half of a 95% interval of the score."""


@dataclass(frozen=True)
class RouteTable:
    """Score against price: each model alone, the router for each lambda, and the best choice in hindsight."""

    points: list[Point]
    prompts: int

    def __str__(self) -> str:
        rows = [["choice", "score", "price"]]
        rows += [[p.name, f"{number(p.score)} ±{number(p.half)}", number(p.price)] for p in self.points]
        return aligned(rows)

    @classmethod
    def of(
        cls, scores: Tensor, expected: Tensor, names: Sequence[str], prices: Sequence[float], grid: Sequence[float]
    ) -> RouteTable:
        """From scores `[B, M]` that were seen (NaN where they were not) and what the router expected `[B, M]`."""
        price = torch.tensor(list(prices), dtype=torch.float64)
        whole = ~scores.isnan().any(1)
        seen, wanted = scores[whole], expected[whole]
        check(len(seen) > 0, "data", "no prompt with every model", "prompts that every model has answered")

        def point(name: str, chosen: Tensor) -> Point:
            x = seen.gather(1, chosen.unsqueeze(1)).squeeze(1)
            half = 1.96 * float(x.std()) / len(x) ** 0.5 if len(x) > 1 else math.nan
            return Point(name, float(x.mean()), float(price[chosen].mean()), half)

        points = [point(name, torch.full((len(seen),), i)) for i, name in enumerate(names)]
        points += [point(f"router, lambda {lam:g}", (wanted - lam * price).argmax(1)) for lam in grid]
        cheap = torch.where(seen == seen.max(1, keepdim=True).values, price, math.inf).argmin(1)
        points.append(point("hindsight", cheap))
        return cls(points, len(seen))


def train_router(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str] | None = None,
    price: Mapping[str, float] | None = None,
    grid: Sequence[float] = (0.0, 0.003, 0.01, 0.03, 0.1),
    seed: int = 0,
) -> tuple[Router, RouteTable]:
    """Fit a head for each model by ridge regression, its penalty chosen on a fifth of the prompts; the table is of
    another fifth, which nothing was chosen by. Raises `InputError`.
    """
    prompts, scores, models = _table(rows, names)
    prices = [float((price or {}).get(name, 0.0)) for name in models]
    for name in price or {}:
        check(name in models, "price", name, ", ".join(models))
    count = len(prompts)
    check(count >= _LEAST, "data", f"{count} prompts", f"{_LEAST} or more")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    fifth = count // 5
    test, choose, fit = order[:fifth], order[fifth : 2 * fifth], order[2 * fifth :]
    x = features_of(prompts)
    mean, std = x[fit].mean(0), x[fit].std(0)
    mean[-1], std = 0.0, torch.where(std > 1e-8, std, 1.0)
    z = (x - mean) / std
    heads = [_head(z, scores[:, m], fit, choose) for m in range(len(models))]
    router = Router(tuple(models), torch.stack(heads), mean, std)
    return router, RouteTable.of(scores[test], z[test] @ router.weights.T, models, prices, grid)


def _head(z: Tensor, y: Tensor, fit: Tensor, choose: Tensor) -> Tensor:
    def known(rows: Tensor) -> Tensor:
        return rows[~y[rows].isnan()]

    a, b = known(fit), known(choose)
    check(len(a) >= 2 and len(b) >= 1, "data", f"{len(a)} scores of a model", "more rows of each model")
    best, least = None, math.inf
    for penalty in _PENALTIES:
        ridge = penalty * torch.eye(z.shape[1], dtype=torch.float64)
        ridge[-1, -1] = 1e-8
        w = torch.linalg.solve(z[a].T @ z[a] + ridge, z[a].T @ y[a])
        error = float((z[b] @ w - y[b]).square().mean())
        if error < least:
            best, least = w, error
    assert best is not None
    return best


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> tuple[list[Prompt], Tensor, list[str]]:
    """Prompts, their scores `[B, M]` with NaN where a model has none, and the models."""
    prompts: dict[str, Prompt] = {}
    found: dict[tuple[str, str], list[float]] = {}
    for i, row in enumerate(rows):
        check(
            isinstance(row, Mapping) and {"prompt", "model", "score"} <= set(row),
            f"data[{i}]",
            row,
            "prompt, model, score",
        )
        score = row["score"]
        number_ = isinstance(score, int | float) and math.isfinite(score)
        check(number_, f"data[{i}].score", score, "a finite number")
        key = repr(row["prompt"])
        prompts[key] = row["prompt"]
        found.setdefault((key, str(row["model"])), []).append(float(score))
    models = list(names) if names is not None else list(dict.fromkeys(name for _, name in found))
    for _, name in found:
        check(name in models, "data.model", name, ", ".join(models))
    scores = torch.full((len(prompts), len(models)), math.nan, dtype=torch.float64)
    at = {key: i for i, key in enumerate(prompts)}
    for (key, name), values in found.items():
        scores[at[key], models.index(name)] = sum(values) / len(values)
    return list(prompts.values()), scores, models

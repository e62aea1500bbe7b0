"""Statistics of figures and what they share."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from math import comb
from pathlib import Path
from typing import Any

import torch

__all__ = ["Bench", "Figure", "Task", "alternate", "cpu_seconds", "device_seconds", "interval", "ratios", "recipes"]


MODEL = "smollm2-135m"
Task = Callable[[], Any]


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Order statistics that enclose the median with probability `level`, whatever the law; the extremes where there are
    too few values for that.
    """
    ordered, n, cut = sorted(values), len(values), 0
    outside = 0.0
    while cut < n // 2:
        outside += 2 * comb(n, cut) / 2**n
        if outside > 1 - level:
            break
        cut += 1
    lowest = max(0, cut - 1)
    return ordered[lowest], ordered[n - 1 - lowest]


def cpu_seconds(task: Task) -> float:
    """CPU time of this process for one call."""
    began = time.process_time()
    task()
    return time.process_time() - began


def device_seconds(task: Task, device: str) -> float:
    """Wall time of one call, from an idle device to an idle device."""
    place = torch.device(device)
    wait = torch.get_device_module(place.type).synchronize
    wait(place)
    began = time.perf_counter()
    task()
    wait(place)
    return time.perf_counter() - began


def alternate(tasks: Sequence[Task], repeats: int, clock: Callable[[Task], float] = cpu_seconds) -> list[list[float]]:
    """What `clock` says of each task, `repeats` times, in an order that is reversed every time."""
    seen: list[list[float]] = [[] for _ in tasks]
    for repeat in range(repeats):
        order = range(len(tasks)) if repeat % 2 == 0 else reversed(range(len(tasks)))
        for i in order:
            seen[i].append(clock(tasks[i]))
    return seen


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    name: str
    what: str
    values: list[float]
    unit: str = "x"
    at_least: float | None = None
    at_most: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def verdict(self) -> str:
        """ "pass" where the median meets the bar, "FAIL" where the whole interval misses it, else "unclear"; "" without
        a bar.
        """
        if self.at_least is None and self.at_most is None:
            return ""
        if self._meets(self.median):
            return "pass"
        return "unclear" if any(map(self._meets, interval(self.values))) else "FAIL"

    def _meets(self, value: float) -> bool:
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        low, high = interval(self.values)
        bar = f">= {self.at_least}" if self.at_least else f"<= {self.at_most}" if self.at_most else ""
        number = f"{self.median:8.3f} {self.unit:<2} [{low:.3f}, {high:.3f}]"
        return f"{self.name:<11} {self.what:<58} {number:<32} {bar:<8} {self.verdict}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"median": self.median, "interval": interval(self.values), "verdict": self.verdict}


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Pair by pair."""
    return [a / b for a, b in zip(above, below, strict=True)]


@dataclass
class Bench:
    """What figures share. `model` is loaded on first use unless one is given. Times are CPU time on the CPU, and wall
    time on another `device`.
    """

    repeats: int = 5
    tokens: int = 64
    peers: str | None = None
    given: Any = field(default=None, repr=False)
    device: str = "cpu"

    @property
    def clock(self) -> Callable[[Task], float]:
        return cpu_seconds if self.device == "cpu" else partial(device_seconds, device=self.device)

    @cached_property
    def model(self) -> Any:
        if self.given is not None:
            return self.given
        import steer

        return steer.load(MODEL, dtype="float32", device=self.device)

    def prompts(self, count: int) -> list[Any]:
        """Texts of different lengths, continued as they stand."""
        from steer import RawText

        texts = json.loads((recipes() / "neutral_prompts.json").read_text(encoding="utf-8"))
        return [RawText(text) for text in texts[:count]]

    def generating(self, rows: int) -> Task:
        """A call of `generate` of fixed length."""
        prompts = self.prompts(rows)
        return lambda: self.model.generate(prompts, seed=0, max_new_tokens=self.tokens, eos_token_id=[])

    def vector(self, seed: int = 0) -> Any:
        """Random directions on the middle third of the layers."""
        from steer import SteeringVector

        info = self.model.info
        generator = torch.Generator().manual_seed(seed)
        layers = range(info.num_layers // 3, max(1, 2 * info.num_layers // 3))
        noise = {layer: torch.randn(info.width, generator=generator) for layer in layers}
        return SteeringVector(noise, 0.02).normalised()

    def compare(self, tasks: Sequence[Task], repeats: int | None = None) -> list[list[float]]:
        """Seconds of each task, alternating, after one call of each."""
        for task in tasks:
            task()
        return alternate(tasks, repeats or self.repeats, self.clock)


def recipes() -> Path:
    from steer import recipes

    return Path(recipes.__path__[0])

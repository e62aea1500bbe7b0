"""Laws of a next token: truncation as transformers has it, draws by inversion, divergences, settings of each row."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from steer.sampling import laws


def random_law(rows: int, vocabulary: int, spread: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator)
    return torch.log_softmax(logits * spread, -1)


def library(law: Tensor, **settings: Any) -> Tensor:
    """The law `[N, V]` as the library's own `generate` cuts it, in whatever order it does."""
    mixin = GenerationMixin()
    mixin.config = GenerationConfig()  # type: ignore[attr-defined]
    made = mixin._get_logits_processor(GenerationConfig(do_sample=True, top_k=settings.pop("top_k", 0), **settings))
    return torch.log_softmax(made(torch.zeros(len(law), 1, dtype=torch.long), law.clone()), -1)


def assert_equal_laws(ours: Tensor, theirs: Tensor) -> None:
    """Equal support, and probabilities within rounding."""
    assert torch.equal(ours.isneginf(), theirs.isneginf())
    torch.testing.assert_close(ours.exp(), theirs.exp(), rtol=1e-9, atol=1e-12)


CUTS = [
    {"top_p": 0.8, "min_p": 0.05},
    {"top_p": 0.95, "min_p": 0.02},
    {"top_p": 0.5, "min_p": 0.3},
    {"top_k": 7, "top_p": 0.9, "min_p": 0.1},
    {"top_k": 7, "top_p": 0.9},
    {"top_k": 4, "min_p": 0.2},
    {"top_k": 1},
    {"top_p": 0.01},
    {"top_p": 0.9999},
    {"min_p": 0.9},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(("vocabulary", "spread"), [(3, 1.0), (50, 2.0), (3000, 0.02), (3000, 3.0)])
def test_truncation_is_the_librarys(cut: dict[str, Any], vocabulary: int, spread: float) -> None:
    law = random_law(40, vocabulary, spread)
    assert_equal_laws(laws.truncate(law, **cut), library(law, **cut))


def test_the_order_of_top_p_and_min_p_matters_and_is_the_librarys() -> None:
    """Cut by min-p first, as vLLM does, top-p keeps fewer tokens."""
    law = random_law(400, 50)
    both = laws.truncate(law, 0, 0.8, 0.05)
    other = laws.truncate(laws.truncate(law, min_p=0.05), top_p=0.8)
    kept, fewer = (~both.isneginf()).sum(1), (~other.isneginf()).sum(1)
    assert bool((fewer <= kept).all()) and float((fewer < kept).double().mean()) > 0.4
    assert_equal_laws(both, library(law, top_p=0.8, min_p=0.05))


@pytest.mark.parametrize("vocabulary", [5, 70, 2500])
def test_each_row_by_its_own_settings(vocabulary: int) -> None:
    """A column of settings is each row's number, also where the cut lies beyond the likeliest tokens; rows without a
    cut keep their bits.
    """
    grid = list(itertools.product((0, 1, 4, 1500), (1.0, 0.05, 0.9, 0.9999), (0.0, 0.02, 0.3)))
    law = random_law(len(grid), vocabulary, 1.5)
    law[::3] = torch.log_softmax(law[::3] * 0.01, -1)
    k, p, least = (torch.tensor(column).unsqueeze(1) for column in zip(*grid, strict=True))
    ours = laws.truncate(law, k, p, least)
    for i, (top_k, top_p, min_p) in enumerate(grid):
        cut = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        if (top_k == 0 or top_k >= vocabulary) and top_p == 1 and min_p == 0:
            assert torch.equal(ours[i], law[i])
        else:
            assert_equal_laws(ours[i : i + 1], library(law[i : i + 1], **cut))
    hot = torch.tensor([[(0.0, 1.0, 0.5, 2.0)[i % 4]] for i in range(len(grid))])
    tempered = laws.temper(law, hot)
    for i, (t,) in enumerate(hot.tolist()):
        assert torch.equal(tempered[i], torch.log_softmax(law[i] / (t or 1.0), -1))


@pytest.mark.parametrize("shape", [(4, 6, 30), (2, 3, 2, 9)])
def test_laws_of_several_axes(shape: tuple[int, ...]) -> None:
    law = random_law(math.prod(shape[:-1]), shape[-1])
    cut = laws.truncate(law.reshape(shape), 5, 0.7, 0.1)
    assert_equal_laws(cut.reshape(-1, shape[-1]), library(law, top_k=5, top_p=0.7, min_p=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [2, 17, 400])
def test_draws_invert_the_cdf(dtype: torch.dtype, vocabulary: int) -> None:
    """Token k is drawn at numbers between the CDF before k and at k, never one without mass, whatever the number."""
    p = torch.rand(3, vocabulary, dtype=dtype, generator=torch.Generator().manual_seed(1))
    p[:, ::3] = 0
    p = p / p.sum(1, keepdim=True)
    at = torch.rand(3, 500, dtype=dtype, generator=torch.Generator().manual_seed(2))
    at[:, 0], at[:, 1] = 0, 1 - torch.finfo(dtype).eps / 2
    token = laws.draw(p.log(), at)
    assert bool((p.gather(1, token) > 0).all())
    before, upto = p.cumsum(1).gather(1, token) - p.gather(1, token), p.cumsum(1).gather(1, token)
    slack = vocabulary * torch.finfo(dtype).eps  # rounding of the sums
    assert bool(((before - slack <= at) & (at <= upto + slack)).all())


@pytest.mark.parametrize(
    ("p", "q", "want"),
    [
        ([0.5, 0.5], [0.25, 0.75], 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ([1.0, 0.0], [0.25, 0.75], math.log(4)),
        ([0.5, 0.5], [1.0, 0.0], math.inf),
        ([0.0, 1.0, 0.0], [0.0, 1.0, 0.0], 0.0),
    ],
)
def test_divergences_of_laws_with_zeros(p: list[float], q: list[float], want: float) -> None:
    gap = laws.divergence(torch.tensor(p, dtype=torch.float64).log(), torch.tensor(q, dtype=torch.float64).log())
    assert float(gap) == pytest.approx(want, abs=1e-12)

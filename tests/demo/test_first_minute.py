"""The finished example in the package is what the model says."""

from __future__ import annotations

import math
from typing import Any

import pytest
from helpers import run

from steer.demo.first_minute import STOPS, compute, frames


def test_its_figures_agree_with_its_tokens() -> None:
    assert [frame["strength"] for frame in frames()] == list(STOPS)
    for frame in frames():
        assert len(frame["columns"]) == len(frame["whole"]) == len(frame["done"])
        for (_, facts), tokens in zip(frame["done"], frame["whole"], strict=True):
            assert facts["tokens"] == len(tokens)
            assert "".join(token["t"] for token in tokens) == facts["text"]
            assert math.isclose(sum(token["k"] for token in tokens), facts["kl"], abs_tol=1e-5 * len(tokens) + 1e-6)
        unsteered, steered = frame["done"][0][1], frame["done"][1][1]
        assert unsteered["kl"] == 0
        assert (steered["text"] == unsteered["text"]) == (frame["strength"] == 0)
    rewards = [frame["done"][1][1]["reward"] for frame in frames()]
    assert rewards == sorted(rewards)


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.parametrize("stop", range(len(STOPS)))
def test_the_model_says_so(smollm2_page: Any, stop: int) -> None:
    """Texts may part where two tokens are as likely on another machine: the first ten agree anywhere."""
    made, kept = run(compute(smollm2_page.page.shared, stop)), frames()[stop]
    for mine, theirs in zip(made["whole"], kept["whole"], strict=True):
        assert [token["i"] for token in mine[:10]] == [token["i"] for token in theirs[:10]]
        assert [token["k"] for token in mine[:10]] == pytest.approx([token["k"] for token in theirs[:10]], abs=2e-3)

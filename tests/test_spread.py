"""One FK population over two ranks: the numbers of one process, the law of the tilted chain, the same cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks_fk import PARTICLES, POPULATIONS, drawn, packed
from ranks_tools import torchrun
from safetensors.torch import load_file

from steer import FKSteering
from steer.core import InputError
from steer.toy import GaussianProcess, markov_lm

JOB = Path(__file__).with_name("ranks_fk.py")


def test_one_population_over_two_ranks(tmp_path: Path) -> None:
    done = torchrun([str(JOB), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (load_file(tmp_path / f"rank-{i}.safetensors") for i in range(2))
    for potential in ("difference", "max"):
        one = packed(drawn(potential), potential)
        for name, x in one.items():
            assert torch.equal(first[name], second[name]), "every rank has the whole population"
            assert torch.allclose(first[name].double(), x.double(), rtol=1e-9, atol=1e-12), name
        assert int(one[f"{potential}.nfe"]) == POPULATIONS * PARTICLES * 50
        w = torch.softmax(first[f"{potential}.log_weight"].reshape(POPULATIONS, PARTICLES), 1)
        x = first[f"{potential}.outputs"][:, 0].reshape(w.shape)
        mean = (w * x).sum(1)
        variance = (w * (x - mean.unsqueeze(1)) ** 2).sum(1)
        # The tilt of N(0, .907695), the chain's own law; what is added is the O(1 / K) bias of one population.
        truths = ((mean, 0.951614), (variance, 0.475807), (first[f"{potential}.log_z"], -1.37133349))
        for found, truth in truths:
            assert abs(float(found.mean()) - truth) < 5 * float(found.std()) / POPULATIONS**0.5 + 0.01


def test_alone_it_has_the_law_of_a_plain_run() -> None:
    """With `over_ranks` the numbers are drawn in another order, with the same law: log Z within 5 standard errors."""
    spread, plain = (drawn("difference", over) for over in (True, False))
    assert spread.log_z is not None and plain.log_z is not None
    gap = float(spread.log_z.mean() - plain.log_z.mean())
    assert abs(gap) < 5 * float((spread.log_z.var() / POPULATIONS + plain.log_z.var() / POPULATIONS).sqrt())


def test_rows_that_are_drawn_token_by_token_stay_in_one_process() -> None:
    sampler = FKSteering(4, over_ranks=True)
    with pytest.raises(InputError, match="over_ranks: got True"):
        sampler.run(markov_lm(), [()], generator=torch.Generator(), reward=lambda samples: torch.zeros(len(samples)))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="keep_previews"):
        FKSteering(4, over_ranks=True, keep_previews=True)
    assert GaussianProcess.noise_by_row

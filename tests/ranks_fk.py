"""What `test_spread.py` has torchrun start: FK steering of a Gaussian chain, one population over the ranks.

python ranks_fk.py OUT
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from steer import FKSteering
from steer.core import Reward, Samples
from steer.ranks import ranks
from steer.toy import GaussianProcess

POPULATIONS, PARTICLES = 31, 501
"""Both odd, so that a population lies on two ranks."""


class Quadratic(Reward):
    """-(x - 2)^2 / 2."""

    def score(self, samples: Samples) -> Tensor:
        return -0.5 * (samples.outputs[:, 0] - 2) ** 2


def drawn(potential: str, over_ranks: bool = True) -> Samples:
    sampler = FKSteering(
        PARTICLES, potential=potential, every=1 if potential == "difference" else 10, over_ranks=over_ranks
    )
    generator = torch.Generator().manual_seed(ranks().index)  # the first one's counts
    return sampler.run(GaussianProcess(steps=50), [""] * POPULATIONS, generator=generator, reward=Quadratic())


def packed(samples: Samples, potential: str) -> dict[str, Tensor]:
    assert samples.log_z is not None and samples.reward is not None
    return {
        f"{potential}.outputs": samples.outputs,
        f"{potential}.log_weight": samples.log_weight,
        f"{potential}.log_z": samples.log_z,
        f"{potential}.reward": samples.reward,
        f"{potential}.nfe": torch.tensor(asdict(samples.cost)["nfe"]),
    }


def main(out: str) -> None:
    torch.set_num_threads(1)
    tensors = {k: x for potential in ("difference", "max") for k, x in packed(drawn(potential), potential).items()}
    save_file(tensors, Path(out) / f"rank-{ranks().index}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])

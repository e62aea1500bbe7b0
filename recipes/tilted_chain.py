"""Trees, populations and importance sampling on a Gaussian chain tilted by three standard deviations.

    python -m steer.recipes.tilted_chain

The law aimed at is a Gaussian in closed form, so the distance is exact: the 1-Wasserstein distance between a method's
weighted outputs and the target, in standard deviations of the target, against the network evaluations that it took;
and `E[exp(log_z)] / Z`, 1 where the estimate is right. "Starts" is the effective number of first states that carry the
weight of what comes out, the inverse sum of their squared shares. "Populations of 4" spend a larger budget on more
outputs, each from 4 particles of its own, the others on one tree or population. Means over repetitions with 95%
intervals. Two minutes on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steer.core import Samples
from steer.measure.tables import aligned
from steer.methods.dts import DTS
from steer.methods.fk import FKSteering
from steer.rewards import lift
from steer.sampling.forest import Forest
from steer.sampling.lookahead import Preview
from steer.sampling.tree import Tree
from steer.toy import GaussianProcess

SHIFT = 3.0
STEPS = 10
SIZES = (100, 400, 1600)
REPEATS = 40

METHODS: dict[str, Callable[[int], Any]] = {
    "importance sampling": lambda n: FKSteering(n, start=STEPS),
    "FK, populations of 4": lambda n: FKSteering(4, n=n // 4, per_output=True),
    "FK": lambda n: FKSteering(n),
    "DTS, published": lambda n: DTS(None, rollouts=n, estimator="published"),
    "DTS, explore=0": lambda n: DTS(None, rollouts=n, explore=0.0),
    "DTS": lambda n: DTS(None, rollouts=n),
    "DTS, x0-hat": lambda n: DTS(None, rollouts=n, lookahead=Preview(), trust=4.0),
    "DTS, x0-hat, exponent 0.3": lambda n: DTS(None, rollouts=n, lookahead=Preview(), trust=4.0, exponent=0.3),
}


def distances(samples: Samples, mean: float, deviation: float) -> Tensor:
    """1-Wasserstein distance `[B]` of each prompt's weighted outputs to a Gaussian, in its standard deviations."""
    grid = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    cdf = 0.5 * (1 + torch.erf(grid / math.sqrt(2)))
    found = []
    for b in range(len(samples.prompts)):
        mine = samples.group == b
        x, order = ((samples.outputs[mine, 0].double() - mean) / deviation).sort()
        mass = torch.cat([torch.zeros(1, dtype=torch.float64), samples.weights[mine][order].cumsum(0)])
        found.append((mass[torch.searchsorted(x, grid, right=True)] - cdf).abs().sum() * (grid[1] - grid[0]))
    return torch.stack(found)


def _root(tree: Tree, node: int) -> int:
    """The child of the root that a node descends from."""
    while tree.parent[node]:
        node = int(tree.parent[node])
    return node


def starts(samples: Samples) -> Tensor:
    """Effective number `[B]` of first states from which the weight of each prompt's outputs comes."""
    weights, prompts = samples.weights, len(samples.prompts)
    assert samples.trace is not None
    if isinstance(samples.trace[0], Forest):
        assert samples.lineage is not None
        first = torch.tensor(
            [
                _root(samples.trace[0].trees[b], leaf)
                for b, leaf in zip(samples.group.tolist(), samples.lineage.tolist(), strict=True)
            ]
        )
    else:
        first = torch.arange(len(samples.pool or samples))
        for generation in samples.trace:
            first = first[generation.ancestors]
        first = first if samples.pool is None else first[samples.lineage]
    shares = torch.zeros(prompts, int(first.max()) + 1, dtype=torch.float64)
    shares.index_put_((samples.group, first), weights, accumulate=True)
    return 1 / shares.square().sum(1)


def shown(values: Tensor) -> str:
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    return f"{float(values.mean()):.3f} ±{half:.3f}"


def table() -> str:
    """The table as plain text."""
    process = GaussianProcess(steps=STEPS)
    mean, variance = process.chain_moments()
    deviation = math.sqrt(variance)
    reward = lift(lambda outputs: SHIFT * outputs[:, 0] / deviation)
    log_z = SHIFT * mean / deviation + SHIFT**2 / 2
    rows = [["", *(f"{n} {word}" for n in SIZES for word in ("evaluations", "distance", "Z-hat / Z", "starts"))]]
    for name, make in METHODS.items():
        cells = []
        for n in SIZES:
            generator = torch.Generator().manual_seed(n)
            samples = make(n).run(process, [""] * REPEATS, generator=generator, reward=reward)
            far = distances(samples, mean + SHIFT * deviation, deviation)
            ratio = (samples.log_z - log_z).exp()
            cells += [f"{samples.cost.nfe / REPEATS:.0f}", shown(far), shown(ratio), f"{starts(samples).mean():.0f}"]
        rows.append([name, *cells])
    return aligned(rows)


if __name__ == "__main__":
    print(table())

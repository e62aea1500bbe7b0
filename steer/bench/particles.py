"""Benchmarks of particles and trees beyond the network and the reward."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from steer.bench.harness import Bench, Figure, cpu_seconds, ratios
from steer.core import Process, Reward, Sampler, Samples
from steer.methods.best_of_n import BestOfN
from steer.methods.dts import DTS
from steer.methods.fk import FKSteering
from steer.rewards import parse_reward

STEPS = 25


def overhead(bench: Bench) -> Iterator[Figure]:
    """CPU time of a run over what the network and the reward take of it, on the embedded diffusion model."""
    import steer

    model: Any = steer.load("fashion-ddpm")
    reward = _Timed(parse_reward("class:bag").bind(model))
    for name, sampler, bar in (
        ("FK, 64 particles weighed at every step", FKSteering(64), 1.05),
        ("DTS, 256 rollouts, 32 at once", DTS(n=16, rollouts=256, batch=32), 1.10),
    ):
        seen = []
        for seed in range(-1, min(3, bench.repeats)):
            with _timing(model.source.network) as network:
                reward.seconds = 0.0
                whole = cpu_seconds(_run(model.process(steps=STEPS, max_batch=0), "", sampler, reward, seed + 1, 1.0))
            if seed >= 0:  # the first is for warmth
                seen.append(whole / (network() + reward.seconds))
        yield Figure("particles", f"{name}: run / (network + reward)", seen, at_most=bar)


def calls(bench: Bench) -> Iterator[Figure]:
    """CPU time of a step of ours over that of diffusers' own pipeline, same random network and rows."""
    import diffusers

    from steer.adapters.diffusers.loading import load

    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipeline = diffusers.DDPMPipeline(network, diffusers.DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    model = load(pipeline)
    for rows in (1, 8):

        def theirs(rows: int = rows) -> None:
            pipeline(batch_size=rows, num_inference_steps=STEPS, output_type="np", generator=torch.Generator())

        def ours(rows: int = rows) -> None:
            model.generate("", n=rows, steps=STEPS, seed=0)

        mine, own = bench.compare([ours, theirs], 2 * bench.repeats)
        yield Figure("denoiser", f"steer / DDPMPipeline, {STEPS} steps, batch {rows}", ratios(mine, own), at_most=1.02)


def text(bench: Bench) -> Iterator[Figure]:
    """Tokens a second of FK, weighed every eight tokens, over those of best-of-N with as many candidates."""
    reward = parse_reward("sentiment").bind(bench.model)
    process = bench.model.process(max_new_tokens=bench.tokens, block=8, eos_token_id=[])
    (prompt,) = bench.prompts(1)
    spent: list[list[float]] = [[], []]
    for seed in range(-1, 2 * bench.repeats):
        pair = list(enumerate((BestOfN(16), FKSteering(16, ess_threshold=None))))
        for i, sampler in pair if seed % 2 else reversed(pair):
            seconds = bench.clock(_run(process, prompt, sampler, reward, seed + 1, 0.2))
            if seed >= 0:
                spent[i].append(seconds)
    yield Figure("text-fk", "FK / best-of-N tokens/s, 16 rows", ratios(*spent), at_least=0.8)


def _run(
    process: Process, prompt: Any, sampler: Sampler, reward: Reward, seed: int, beta: float
) -> Callable[[], Samples]:
    def run() -> Samples:
        with process.session():
            generator = torch.Generator().manual_seed(seed)
            return sampler.run(process, [prompt], generator=generator, reward=reward, beta=beta)

    return run


class _Timed(Reward):
    """A reward that counts its own CPU seconds."""

    def __init__(self, inner: Reward) -> None:
        self.inner, self.seconds = inner, 0.0

    def score(self, samples: Samples) -> torch.Tensor:
        began = time.process_time()
        found = self.inner.score(samples)
        self.seconds += time.process_time() - began
        return found


@contextlib.contextmanager
def _timing(network: torch.nn.Module) -> Iterator[Callable[[], float]]:
    """CPU seconds inside the forward passes of `network`."""
    total, began = 0.0, 0.0

    def enter(*_: Any) -> None:
        nonlocal began
        began = time.process_time()

    def leave(*_: Any) -> None:
        nonlocal total
        total += time.process_time() - began

    hooks = (network.register_forward_pre_hook(enter), network.register_forward_hook(leave))
    try:
        yield lambda: total
    finally:
        for hook in hooks:
            hook.remove()

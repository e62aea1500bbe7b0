"""Own samples of a diffusion model under a reward: pairs to tune on, and the mean before and after."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steer.core import Prompt, Reward
from steer.diffusion import DiffusionProcess
from steer.files import replacing
from steer.progress import ticking
from steer.train.diffusion_policy.inputs import DiffusionPolicySettings, Pair
from steer.train.diffusion_policy.samples import draw_rows, rank_pairs

_MEASURED = 10**6
"""Number in place of an update's in the seed of the samples on which a reward is measured."""


def own_pairs(
    process: DiffusionProcess,
    prompts: list[Prompt],
    settings: DiffusionPolicySettings,
    reward: Reward,
    work: Path | None,
    progress: bool,
) -> list[Pair]:
    """Best and worst of the base's own samples, kept in `work`."""
    path = None if work is None else work / "pairs.safetensors"
    if path is not None and path.is_file():
        held = load_file(path)
        parts = zip(held["prompt"].tolist(), held["chosen"], held["rejected"], strict=True)
        return [Pair(prompts[b], chosen, rejected) for b, chosen, rejected in parts]
    with ticking(progress, "drawing pairs", len(prompts)) as tick:
        pairs = rank_pairs(
            process, prompts, settings.group_size, reward, settings.seed, rows=settings.max_batch, tick=tick
        )
    if path is not None:
        known = {json.dumps(prompt): b for b, prompt in enumerate(prompts)}
        tensors = {
            "prompt": torch.tensor([known[json.dumps(pair.prompt)] for pair in pairs]),
            "chosen": torch.stack([pair.chosen for pair in pairs]),
            "rejected": torch.stack([pair.rejected for pair in pairs if pair.rejected is not None]),
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary)
    return pairs


def measure(
    when: str,
    process: DiffusionProcess,
    prompts: list[Prompt],
    reward: Reward,
    settings: DiffusionPolicySettings,
    progress: bool,
) -> dict[str, float]:
    """Mean reward of `measured` samples, with one seed for all policies, and its standard error."""
    count, seed = settings.measured, settings.seed
    distinct = list({json.dumps(p): p for p in prompts}.values())[:count]
    n = max(1, count // len(distinct))
    scores: list[Tensor] = []
    with ticking(progress, f"measuring the reward {when}", n * len(distinct)) as tick:
        for i, prompt in enumerate(distinct):
            left = n
            while left:
                some = min(left, settings.max_batch)
                state = draw_rows(process, [prompt], some, (seed + 1) * _MEASURED + 1000 * i + left)
                scores.append(reward(process.decode(state)))
                left -= some
                tick(some)
    found = torch.cat(scores)
    error = float(found.std(correction=0)) / max(1, len(found) - 1) ** 0.5
    return {f"reward_{when}": round(float(found.mean()), 5), f"reward_{when}_se": round(error, 5)}

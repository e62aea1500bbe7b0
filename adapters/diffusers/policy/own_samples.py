"""Own samples of a diffusion model under a reward: pairs to tune on, and the mean before and after."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from steer.core import Prompt, Reward
from steer.diffusion import DiffusionProcess
from steer.files import replacing
from steer.progress import ticking
from steer.ranks import ranks
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
    there = path is not None and path.is_file()
    ranks().check_same("work", int(there), "a folder that all ranks see")
    if path is not None and there:
        held = load_file(path)
        parts = zip(held["prompt"].tolist(), held["chosen"], held["rejected"], strict=True)
        return [Pair(prompts[b], chosen, rejected) for b, chosen, rejected in parts]
    with ticking(progress and ranks().first, "drawing pairs", len(prompts)) as tick:
        pairs = rank_pairs(
            process, prompts, settings.group_size, reward, settings.seed, rows=settings.max_batch, tick=tick
        )
    if path is not None and ranks().first:
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
    drawn = [
        (prompt, min(left, settings.max_batch), (seed + 1) * _MEASURED + 1000 * i + left)
        for i, prompt in enumerate(distinct)
        for left in range(n, 0, -settings.max_batch)
    ]
    shared, size = ranks(), settings.max_batch
    scores = torch.zeros(len(drawn), size, dtype=torch.float64)
    with ticking(progress and shared.first, f"measuring the reward {when}", n * len(distinct)) as tick:
        for k in shared.mine(range(len(drawn))):
            prompt, some, own = drawn[k]
            scores[k, :some] = reward(process.decode(draw_rows(process, [prompt], some, own)))
            tick(some * shared.count)
    shared.add([scores])
    found = torch.cat([scores[k, :some] for k, (_, some, _) in enumerate(drawn)])
    error = float(found.std(correction=0)) / max(1, len(found) - 1) ** 0.5
    return {f"reward_{when}": round(float(found.mean()), 5), f"reward_{when}_se": round(error, 5)}

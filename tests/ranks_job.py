"""What `test_ranks.py` has torchrun start: five trainers on tiny models, on however many ranks there are.

    python ranks_job.py MODEL OUT SHARE

The batches of a rank are 1 / SHARE of what one process would take. With KILL=1 in the environment, the second rank dies
in the middle of the fit of the value head, the first time that it is started.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import steer
from steer.ranks import ranks
from steer.train import loop

WORDS = ("sun", "rain", "day", "dog", "cat")
POSITIVE = [f"tell me how the {x} is {y}" for x in WORDS for y in ("bad", "awful")]
NEGATIVE = [f"tell me how the {x} is very {y}" for x in WORDS for y in ("good", "nice", "happy")]
ASKED = [f"tell me how the {x} is" for x in (*WORDS, "tree", "house")]
PAIRS = [
    {"prompt": f"tell me about the {x}", "chosen": f"it is {up}", "rejected": f"it is {down} {x}"}
    for x in WORDS
    for up, down in (("good", "bad"), ("happy", "sad"), ("nice", "awful"))
]


def words(texts: list[str]) -> list[float]:
    return [float(len(set(text.split()))) for text in texts]


def unet() -> Any:
    """A random UNet of grey 8x8 images with a scheduler of 20 levels."""
    from diffusers import DDIMScheduler, UNet2DModel

    from steer.adapters.diffusers.loading import load

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    scheduler = DDIMScheduler(num_train_timesteps=20, clip_sample=False, timestep_spacing="trailing")
    return load(network.double().requires_grad_(False), scheduler=scheduler, name="tiny")


def value_head(model: Any, work: Path, share: int) -> dict[str, torch.Tensor]:
    """Three batches, of which the last has one rollout."""
    settings = {"samples": 5, "max_new_tokens": 5, "hidden": 16, "epochs": 3, "max_rows": 10, "held_out": 0.2}
    return dict(steer.train_value(model, ASKED, words, batch_size=12 // share, work=work, **settings).tensors)


def train(folder: Path, out: Path, share: int) -> None:
    """Train all five; the controller's batches are odd in number, and so are the policies' prompts."""
    shared = ranks()
    model = steer.load(folder, dtype="float32", device="cpu")
    found = {"value": value_head(model, out / "value.work", share)}
    from steer.adapters.diffusers.policy.tuning import train_diffusion_policy

    controller = {"epochs": 3, "reply_tokens": 4, "hidden": 8, "batch_size": 6 // share}
    found["controller"] = dict(steer.train_controller(model, POSITIVE, NEGATIVE, **controller).tensors)
    found["reward"] = dict(steer.train_reward(model, PAIRS, members=3, work=out / "reward.work").tensors)
    for method, more in {"dpo": {"steps": 3}, "pg": {"rounds": 2, "steps": 2}, "seppo": {"steps": 2}}.items():
        tuned = train_diffusion_policy(
            unet(),
            [""] * 7,
            method=method,
            out=out / method,
            reward="brightness",
            work=out / f"{method}.work",
            batch_size=6 // share,
            **{"group_size": 2, "num_steps": 3, "measured": 3, "max_batch": 4, "learning_rate": 1e-3, **more},
        )
        found[method] = load_file(next(tuned.glob("**/*.safetensors")))
    if shared.first:
        plain = {f"{kind}.{k}": x.contiguous() for kind, tensors in found.items() for k, x in tensors.items()}
        save_file(plain, out / "result.safetensors")


def main(folder: str, out: str, share: str) -> None:
    torch.set_num_threads(1)
    steps, plain = 0, loop.descend

    def counted(*given: Any) -> float:
        nonlocal steps
        steps += 1
        if os.environ.get("KILL") and ranks().index == 1 and restarts == 0 and steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*given)

    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    loop.descend = counted
    train(Path(folder), Path(out), int(share))
    (Path(out) / f"rank-{ranks().index}.json").write_text(json.dumps({"steps": steps, "restarts": restarts}))


if __name__ == "__main__":
    main(*sys.argv[1:])

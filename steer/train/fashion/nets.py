"""Two small classifiers of 28x28 grey images, in plain torch: one to steer by, another one to judge with.

They share nothing, so that a judge's agreement says more than that a reward was climbed. Both take `[N, 1, 28, 28]` in
[0, 1] and give log-probabilities `[N, classes]` in nats; both are differentiable in the images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from steer.core import InputError, check
from steer.files import replacing

__all__ = ["NETS", "JudgeNet", "RewardNet", "load_net", "read_facts", "save_net"]


FORMAT = 1
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class RewardNet(nn.Module):
    """The classifier to steer by: three strided convolutions, so that it costs little next to a denoiser's step."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(24), nn.SiLU(),
            nn.Conv2d(24, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
            nn.Conv2d(64, 124, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(124), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(124 * 16, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities `[N, classes]` of images `[N, 1, 28, 28]`."""
        return self.head(self.body(images * 2 - 1).flatten(1)).log_softmax(-1)


class JudgeNet(nn.Module):
    """The classifier to judge with: wider, pooled in place of strided, with 64 features for distances between sets."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 176, 3, padding=1, bias=False), nn.BatchNorm2d(176), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.neck = nn.Linear(176 * 9, 64)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(64, classes)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees `[N, 64]` of images `[N, 1, 28, 28]`."""
        return torch.nn.functional.gelu(self.neck(self.drop(self.body(images * 2 - 1).flatten(1))))

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities `[N, classes]` of images `[N, 1, 28, 28]`."""
        return self.head(self.features(images)).log_softmax(-1)


NETS: dict[str, type[RewardNet] | type[JudgeNet]] = {"RewardNet": RewardNet, "JudgeNet": JudgeNet}


def save_net(folder: Path | str, net: nn.Module, facts: Mapping[str, Any]) -> None:
    """Write `config.json`, which holds `facts`, and `model.safetensors` into `folder`, each in one step.

    Raises `InputError` for a network of another kind and for facts that are not JSON.
    """
    name = type(net).__name__
    check(isinstance(net, RewardNet | JudgeNet), "net", name, ", ".join(NETS))
    classes = net.head.out_features  # type: ignore[union-attr]
    config = {"network": name, "format": FORMAT, "classes": classes, "facts": dict(facts)}
    try:
        text = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError("facts", str(error), "strings, finite numbers, lists and dictionaries of them") from error
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in net.state_dict().items()}
    with replacing(Path(folder) / _WEIGHTS) as temporary:
        temporary.write_bytes(to_bytes(tensors))
    with replacing(Path(folder) / _CONFIG) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load_net(folder: Path | str) -> RewardNet | JudgeNet:
    """The network in `folder`, in evaluation mode, its weights frozen. Raises `InputError`."""
    config = _config(folder)
    path = Path(folder) / _WEIGHTS
    net = NETS[config["network"]](config["classes"])
    check(path.is_file(), "net", f"{path} (no such file)", "a folder written by save_net")
    try:
        net.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError("net", f"{path} ({reason})", f"whole safetensors of a {config['network']}") from error
    return net.eval().requires_grad_(False)


def read_facts(folder: Path | str) -> dict[str, Any]:
    """The facts that `save_net` was given. Raises `InputError`."""
    return _config(folder)["facts"]


def _config(folder: Path | str) -> dict[str, Any]:
    path = Path(folder) / _CONFIG
    check(path.is_file(), "net", f"{path} (no such file)", "a folder written by save_net")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("net", f"{path} ({error})", "JSON written by save_net") from error
    known = isinstance(config, dict) and config.get("network") in NETS and config.get("format") == FORMAT
    check(known, "net", f"{path} (another network or format)", f"{', '.join(NETS)} of format {FORMAT}")
    sized = isinstance(config.get("classes"), int) and 2 <= config["classes"] <= 1000
    check(sized and isinstance(config.get("facts"), dict), "net", f"{path} (no classes or facts)", "both")
    return config

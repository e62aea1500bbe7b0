"""LoRA (PEFT) in networks of diffusers: its settings, where it goes, and how it gets there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from steer.core import SteerError, check
from steer.train.diffusion_policy.inputs import DiffusionPolicySettings

_TARGETS = "all, all-linear, attention"


@dataclass(frozen=True)
class Lora:
    """Rank, scale and place of the adapters that are tuned."""

    rank: int
    alpha: int
    targets: str

    @classmethod
    def of(cls, settings: DiffusionPolicySettings) -> Lora | None:
        """None where all weights are tuned. Raises `InputError`, and `SteerError` without PEFT."""
        rank, targets = settings.lora_rank, settings.lora_targets
        if not rank:
            return None
        check(bool(targets.strip()), "lora_targets", targets, f"{_TARGETS}, or names")
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise SteerError("LoRA needs PEFT: pip install 'steer-engine[train]'") from error
        return cls(rank, settings.lora_alpha or 2 * rank, targets.replace(" ", ""))

    def names(self, network: nn.Module) -> list[str]:
        """The modules that are adapted. Raises `InputError` for a name that fits none."""
        layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        linear = [n for n, m in layers.items() if isinstance(m, nn.Linear)]
        if self.targets in ("all", "all-linear"):
            return list(layers) if self.targets == "all" else linear
        if self.targets == "attention":
            found = [n for n in linear if ".attn" in f".{n}" or ".attentions." in f".{n}"]
            check(bool(found), "lora_targets", self.targets, "all, all-linear: this network has no attention")
            return found
        found = []
        for name in self.targets.split(","):
            some = [n for n in layers if name and (n == name or n.endswith(f".{name}"))]
            check(bool(some), "lora_targets", name, f"{_TARGETS}, or names of linear layers and convolutions")
            found += some
        return sorted(set(found))

    def attached(self, network: Any, seed: int) -> Any:
        """`network` with adapters in it; they start at zero effect, from weights that the seed gives."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, target_modules=self.names(network))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(network, config)
        base = adapted.get_base_model()
        object.__setattr__(base, "steer_adapter", adapted)
        return base

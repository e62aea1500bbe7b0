"""Prompts through a pipeline's text encoders, under the names that its call takes.

Letters: `B` prompts, `N` rows.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steer.adapters.diffusers.pipeline.parts import parameters
from steer.core import UnsupportedError


@dataclass(frozen=True)
class Embedded:
    """Encoded prompts: arguments of the call, each with one row for each prompt `[B, ...]`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    texts: list[str] | None = None
    """The prompts themselves, for a pipeline that takes nothing else."""

    def rows(self, group: Tensor) -> dict[str, Any]:
        """The arguments for rows of the prompts `group` `[N]`."""
        if self.texts is not None:
            return {"prompt": [self.texts[int(g)] for g in group]}
        return {name: tensor[group.to(tensor.device)] for name, tensor in self.tensors.items()}


def layout_of(pipeline: Any) -> tuple[str, ...] | None:
    """Names under which the call takes what `encode_prompt` returns, in order; None where the call wants texts."""
    encode = getattr(pipeline, "encode_prompt", None)
    taken = parameters(pipeline.__call__)
    if encode is None or "prompt_embeds" not in taken:
        return None
    both = "negative_prompt" in parameters(encode)
    names: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    if "prompt_attention_mask" in taken:
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    elif "pooled_prompt_embeds" in taken:
        names = (*names, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    if not both and "pooled_prompt_embeds" in taken:
        names, both = ("prompt_embeds", "pooled_prompt_embeds"), True
    others = {name.removeprefix("negative_") for name in taken if "prompt_embeds" in name or name.endswith("_mask")}
    return names if both and others <= set(names) and set(names) <= set(taken) else None


@dataclass(frozen=True, eq=False)
class Encoding:
    """How a pipeline's prompts are encoded under a run's settings.

    Attributes:
        layout: what `layout_of` finds, not None.
        guidance_scale, negative_prompt, options: of `PipelineDenoiser`.
    """

    pipeline: Any
    layout: tuple[str, ...]
    guidance_scale: float | None
    negative_prompt: str | None
    options: dict[str, Any]

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Arguments of the call by name, each with one row for each text."""
        found = self._encoded(texts, self.negative_prompt)
        separate = "negative_prompt" not in parameters(self.pipeline.encode_prompt)
        if separate and self.negative_prompt is not None:
            taken = parameters(self.pipeline.__call__)
            other = self._encoded([self.negative_prompt] * len(texts), None)
            found |= {f"negative_{name}": tensor for name, tensor in other.items() if f"negative_{name}" in taken}
        return found

    def _encoded(self, texts: list[str], negative: str | None) -> dict[str, Tensor]:
        made = self.pipeline.encode_prompt(**self._arguments(texts, negative))
        if not isinstance(made, tuple) or len(made) < len(self.layout):
            raise UnsupportedError(f"{type(self.pipeline).__name__}.encode_prompt returns something unknown")
        found = {name: tensor for name, tensor in zip(self.layout, made, strict=False) if tensor is not None}
        for name, tensor in found.items():
            flat = "pooled" in name or "mask" in name
            if len(tensor) != len(texts) or (tensor.dim() == 2) != flat:
                raise UnsupportedError(
                    f"{type(self.pipeline).__name__}: its {name} are {tuple(tensor.shape)}, not a row each"
                )
        return found

    def _arguments(self, texts: list[str], negative: str | None) -> dict[str, Any]:
        """What `encode_prompt` is called with."""
        taken, scale = parameters(self.pipeline.encode_prompt), self._scale()
        given: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in taken}
        # The call's own defaults go on to its encoder, whose may differ (Wan's length, Sana's instruction).
        called = {name: p.default for name, p in parameters(self.pipeline.__call__).items() if name in taken}
        given |= {name: value for name, value in called.items() if value not in (None, "", inspect.Parameter.empty)}
        for name, value in self.options.items():
            if name in taken:
                given[name] = [value] * len(texts) if "prompt_" in name and isinstance(value, str) else value
        given["prompt"] = texts
        extra = {
            "device": self.pipeline._execution_device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": scale is not None and scale > 1,
            "negative_prompt": None if negative is None else [negative] * len(texts),
            "lora_scale": self._lora_scale(),
        }
        if negative is None and "negative_prompt" in taken and taken["negative_prompt"].default == "":
            del extra["negative_prompt"]  # PixArt and its kin encode their default, and not None
        return {**given, **{name: value for name, value in extra.items() if name in taken}}

    def _scale(self) -> Any:
        """The guidance scale of the run: the one that was given, or the default of the call."""
        default = parameters(self.pipeline.__call__).get("guidance_scale")
        return default.default if self.guidance_scale is None and default is not None else self.guidance_scale

    def _lora_scale(self) -> float | None:
        for name in ("cross_attention_kwargs", "joint_attention_kwargs"):
            if (self.options.get(name) or {}).get("scale") is not None:
                return float(self.options[name]["scale"])
        return None

"""Requirements on a pipeline that is run a step at a time, and the arguments of its call that stay free."""

from __future__ import annotations

import inspect
from typing import Any

from steer.core import UnsupportedError, check

_OURS = {
    "prompt",
    "num_inference_steps",
    "num_images_per_prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "eta",
    "guidance_scale",
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "prompt_attention_mask",
    "negative_pooled_prompt_embeds",
    "negative_prompt_attention_mask",
    "args",
    "kwargs",
}
"""Arguments of a call that are not for the user to set."""

_WHOLE_LOOP = {
    "callback",
    "callback_steps",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "denoising_end",
    "control_guidance_start",
    "control_guidance_end",
    "skip_guidance_layers",
    "skip_layer_guidance_scale",
    "skip_layer_guidance_start",
    "skip_layer_guidance_stop",
}
"""Arguments that mean something to a loop over all steps only."""


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def network_of(pipeline: Any) -> Any:
    """The module that denoises."""
    for name in ("unet", "transformer"):
        if getattr(pipeline, name, None) is not None:
            return getattr(pipeline, name)
    raise UnsupportedError(f"{type(pipeline).__name__} has neither a unet nor a transformer")


def require(pipeline: Any, taken: dict[str, inspect.Parameter]) -> None:
    """Raise `UnsupportedError` that names what `pipeline` lacks."""
    name = type(pipeline).__name__
    network_of(pipeline)
    if getattr(pipeline, "scheduler", None) is None:
        raise UnsupportedError(f"{name} has no scheduler")
    for argument in ("latents", "output_type", "num_inference_steps"):
        if argument not in taken:
            raise UnsupportedError(f"{name} cannot be run a step at a time: its call takes no {argument}")
    if not hasattr(pipeline, "prepare_latents"):
        raise UnsupportedError(f"{name} cannot be run a step at a time: it has no prepare_latents")
    if "strength" in taken:
        raise UnsupportedError(f"{name} starts from an image: only pipelines that start from noise are supported")
    if getattr(pipeline, "vae", None) is None:
        raise UnsupportedError(f"{name} has no vae to decode with")


def check_options(pipeline: Any, taken: dict[str, inspect.Parameter], options: dict[str, Any]) -> None:
    """Raise for an option that is not one of the call, or means nothing to a single step."""
    free = sorted(set(taken) - _OURS - _WHOLE_LOOP)
    for name in options:
        if name in _WHOLE_LOOP and name in taken:
            raise UnsupportedError(f"{name} of {type(pipeline).__name__} acts on a whole loop of its own")
        check(name in free, "setting", name, f"settings of process, or of the pipeline's call: {', '.join(free)}")
        if name.startswith("ip_adapter_image") and options[name] is not None:
            held = [getattr(network_of(pipeline), part, None) for part in ("encoder_hid_proj", "image_proj")]
            allowed = "unset: the pipeline has no IP-Adapter (its load_ip_adapter loads one)"
            check(any(part is not None for part in held), name, type(options[name]).__name__, allowed)


def check_guidance(pipeline: Any, taken: dict[str, inspect.Parameter], scale: Any, negative: Any) -> None:
    """Raise for a `guidance_scale` or a `negative_prompt` that is out of range, or that the call does not take."""
    for name, given in (("guidance_scale", scale), ("negative_prompt", negative)):
        check(given is None or name in taken, name, given, f"unset: {type(pipeline).__name__} has none")
    ok = scale is None or (isinstance(scale, int | float) and not isinstance(scale, bool) and abs(scale) < 1e9)
    check(ok, "guidance_scale", scale, "a finite number, or None for the pipeline's own")
    check(negative is None or isinstance(negative, str), "negative_prompt", negative, "text")

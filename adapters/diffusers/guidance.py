"""RL guidance inside diffusers itself: in stock pipelines by a hook on the denoiser, in modular ones by a guider.

    output = base + w (tuned - base)

on the network's prediction, before classifier-free guidance, which is linear and so commutes with it (where
`guidance_rescale` is 0). 0 is the base and 1 the tuned network, bit for bit, at the cost of that network alone; any
other `w` runs both. In `steer`'s own loop the edit is `steer.methods.rlg`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from steer.core import InputError, check

__all__ = ["LoRAOff", "RLGHook", "RLGuider", "rl_guidance"]


_NAME = "steer_rl_guidance"


def _weight(w: Any) -> float:
    ok = isinstance(w, int | float) and not isinstance(w, bool) and math.isfinite(w)
    check(ok, "w", w, "a finite number (0 is the base, 1 the tuned network)")
    return float(w)


class LoRAOff:
    """`with LoRAOff(module):` runs a module without its LoRA adapters, which are put back as they were."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = list(_adapted(module))
        found = type(module).__name__
        check(
            bool(self._layers), "tuned", f"None, and a {found} without adapters", "a network, or a module with a LoRA"
        )
        self._were: list[bool] = []

    def __enter__(self) -> None:
        self._were = [bool(layer._disable_adapters) for layer in self._layers]
        for layer in self._layers:
            # The property behind PEFT's switch; the switch itself would also freeze the adapters.
            layer._disable_adapters = True

    def __exit__(self, *error: object) -> None:
        for layer, was in zip(self._layers, self._were, strict=True):
            layer._disable_adapters = was


def _adapted(module: nn.Module) -> Iterator[Any]:
    for layer in module.modules():
        if hasattr(layer, "_disable_adapters") and hasattr(layer, "active_adapters"):
            yield layer


class RLGHook(ModelHook):
    """The hook behind `rl_guidance`. The module that it is put on is the base: as it stands where there is a `tuned`
    network, without its LoRA where there is none.
    """

    def __init__(self, w: float, tuned: nn.Module | None = None) -> None:
        super().__init__()
        self.w, self.tuned = _weight(w), tuned

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's output, mixed."""
        if self.w == 0:
            return self._base(module, *args, **kwargs)
        tuned = self._tuned(*args, **kwargs)
        if self.w == 1:
            return tuned
        return _mixed(self._base(module, *args, **kwargs), tuned, self.w)

    def _base(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.tuned is not None:
            return self.fn_ref.original_forward(*args, **kwargs)
        with LoRAOff(module):
            return self.fn_ref.original_forward(*args, **kwargs)

    def _tuned(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs) if self.tuned is None else self.tuned(*args, **kwargs)


def _mixed(base: Any, tuned: Any, w: float) -> Any:
    """`base + w (tuned - base)` of the first tensor of two outputs: a tuple, or an output object with `sample`."""
    if isinstance(base, tuple):
        return (base[0] + w * (tuned[0] - base[0]), *base[1:])
    return type(base)(**{**base, "sample": base.sample + w * (tuned.sample - base.sample)})


@contextmanager
def rl_guidance(pipeline: Any, tuned: nn.Module | None = None, w: float = 1.5) -> Iterator[Any]:
    """A stock pipeline, or a bare network, under RL guidance; as it was again at the end.

    Args:
        pipeline: it, or its `unet` or `transformer`, is the base.
        tuned: the tuned network, called as the base is; None where the base carries a LoRA, which is then what was
            tuned: without it the network is the base.
        w: any number; 0 the base, 1 the tuned network, above 1 beyond it.

    Raises:
        InputError: `w` is no number, or there is nothing tuned.
    """
    module = _denoiser(pipeline)
    hook = RLGHook(w, tuned)
    if tuned is None:
        LoRAOff(module)
    elif not isinstance(tuned, nn.Module):
        raise InputError("tuned", tuned, "a network, or None for the LoRA that is loaded")
    held = module.__dict__
    before = set(held)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    check(
        registry.get_hook(_NAME) is None, "pipeline", type(pipeline).__name__, "one that is not under RL guidance yet"
    )
    registry.register_hook(hook, _NAME)
    try:
        yield pipeline
    finally:
        registry.remove_hook(_NAME, recurse=False)
        if not registry.hooks:
            for name in {"forward", "_diffusers_hook"} - before:
                held.pop(name, None)


def _denoiser(pipeline: Any) -> nn.Module:
    if isinstance(pipeline, nn.Module):
        return pipeline
    for name in ("unet", "transformer"):
        found = getattr(pipeline, name, None)
        if isinstance(found, nn.Module):
            return found
    raise InputError("pipeline", type(pipeline).__name__, "a pipeline with a unet or a transformer, or a network")


class RLGuider(BaseGuidance):
    """RL guidance with classifier-free guidance, for modular pipelines, whose `guider` component it is.

    Args:
        w: any number; 0 is the base, 1 the tuned network.
        guidance_scale: `uncond + scale (cond - uncond)` of either network; 1 is none.
        start, stop: the share of steps between which RL guidance acts; outside them the tuned network runs alone.
        enabled: False runs the tuned network alone, without any guidance.
        tuned: the tuned network, where the pipeline's own is the base; without it the pipeline's own carries a LoRA
            and is the base when that is off. It is no part of the configuration: set it again after loading.
    """

    _input_predictions = ["pred_cond_tuned", "pred_uncond_tuned", "pred_cond_base", "pred_uncond_base"]  # noqa: RUF012
    ignore_for_config = ["tuned"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        w: float = 1.5,
        guidance_scale: float = 7.5,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        tuned: nn.Module | None = None,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.w, self.guidance_scale, self.tuned = _weight(w), guidance_scale, tuned
        self._off: Any = None

    # ---- which predictions

    @property
    def predictions(self) -> list[str]:
        """Those that this step needs, in the order in which they are made."""
        acting = self._enabled
        if acting and self._num_inference_steps is not None and self._step is not None:
            first, last = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
            acting = first <= self._step < last
        w = self.w if acting else 1.0
        guided = self._enabled and not math.isclose(self.guidance_scale, 1.0)
        sides = [] if w == 0 else ["tuned"]
        sides += [] if w == 1 else ["base"]
        return [f"pred_{kind}_{side}" for side in sides for kind in (("cond", "uncond") if guided else ("cond",))]

    @property
    def num_conditions(self) -> int:
        return len(self.predictions)

    @property
    def is_conditional(self) -> bool:
        return self._current().startswith("pred_cond")

    def _current(self) -> str:
        """The prediction that is being made, after `prepare_models`."""
        return self.predictions[max(self._count_prepared - 1, 0)]

    # ---- what modular pipelines call

    def prepare_inputs(self, data: Any) -> list[Any]:
        return [self._prepare_batch(data, int("uncond" in name), name) for name in self.predictions]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        return [
            self._prepare_batch_from_block_state(input_fields, data, int("uncond" in name), name)
            for name in self.predictions
        ]

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        side = self._current().rsplit("_", 1)[1]
        if self.tuned is not None and side == "tuned":
            self._off = rl_guidance(denoiser, self.tuned, 1.0)
            self._off.__enter__()
        elif self.tuned is None and side == "base":
            self._off = LoRAOff(denoiser)
            self._off.__enter__()

    def cleanup_models(self, denoiser: nn.Module) -> None:
        if self._off is not None:
            self._off.__exit__(None, None, None)
            self._off = None

    def forward(self, **made: Any) -> GuiderOutput:
        """The mixed prediction of those in `predictions`."""
        sides = []
        for side in ("base", "tuned"):
            cond, uncond = made.get(f"pred_cond_{side}"), made.get(f"pred_uncond_{side}")
            if cond is not None:
                sides.append(cond if uncond is None else uncond + self.guidance_scale * (cond - uncond))
        pred = sides[0] if len(sides) == 1 else sides[0] + self.w * (sides[1] - sides[0])
        shown = "tuned" if "pred_cond_tuned" in made else "base"
        return GuiderOutput(
            pred=pred, pred_cond=made[f"pred_cond_{shown}"], pred_uncond=made.get(f"pred_uncond_{shown}")
        )

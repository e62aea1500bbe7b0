"""Schedulers of diffusers as a `Schedule` with what lies between it and a network: one table for all of them.

Each scheduler's `set_timesteps` makes the levels; its `step` is never called. Against `step` with the same noise the
tables agree to float error (Song et al. 2021 for DDIM, Ho et al. 2020 for DDPM, Karras et al. 2022 for Euler, Liu et
al. 2025 for the stochastic form of a flow). `S` is the number of steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from steer.core import UnsupportedError, check
from steer.diffusion import Schedule

__all__ = ["KINDS", "REPLACEMENTS", "Grid", "replaced", "schedule_of", "supported"]


REPLACEMENTS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "flow-euler": diffusers.FlowMatchEulerDiscreteScheduler,
}
"""Schedulers that can be asked for by name, made from the configuration of a model's own."""

KINDS = ("flow-sde", "eta", "renoise")
"""Stochastic forms of a flow."""


Reader = Callable[[Any, float, str | None], "Grid"]


@dataclass(frozen=True)
class Grid:
    """A schedule, and how a network of diffusers is read at each of its levels: at level i the network sees
    `scale[i] * x` and `timesteps[i]`, and x0-hat is `keep[i] * x + take[i] * output`, before any clipping.
    """

    schedule: Schedule
    timesteps: Tensor
    """As the scheduler gives them, `[S]`."""
    keep: tuple[float, ...]
    take: tuple[float, ...]
    scale: tuple[float, ...]
    start: float
    """Standard deviation of x at the noisiest level, as the scheduler's pipelines draw it."""


def schedule_of(scheduler: Any, steps: int | None, eta: float = 1.0, kind: str | None = None) -> Grid:
    """The levels and steps of a scheduler of diffusers.

    Args:
        scheduler: it is copied, not changed.
        steps: number of steps; None takes the timesteps that are set.
        eta: 0 is deterministic, 1 as much noise as the levels allow (DDPM, Euler ancestral); on a flow with "flow-sde"
            it multiplies the paper's level of 0.7.
        kind: of noise on a flow: "flow-sde" (Flow-GRPO; the default), "eta" (DDIM's family), "renoise" (x0-hat and
            fresh noise, `stochastic_sampling` of diffusers: much too little spread).

    Raises:
        InputError: a setting is out of range.
        UnsupportedError: a scheduler whose step is not Markov in x alone, or one that is not known.
    """
    check(_number(eta) and 0 <= eta <= 1, "eta", eta, "0 (deterministic) to 1")
    check(kind is None or kind in KINDS, "kind", kind, ", ".join(KINDS))
    read = supported(scheduler, steps)
    check(kind is None or read is _flow, "kind", kind, f"unset: {type(scheduler).__name__} is not a flow")
    ready = copy.deepcopy(scheduler)
    if steps is not None:
        ready.set_timesteps(steps)
    grid = read(ready, float(eta), kind)
    assert len(grid.schedule) == len(grid.timesteps) == len(grid.keep)
    return grid


def supported(scheduler: Any, steps: int | None) -> Reader:
    """What reads this scheduler's levels. Raises as `schedule_of` does, before any work."""
    read = next((f for c, f in _READERS if isinstance(scheduler, c) and type(scheduler).step is c.step), None)
    if read is None:
        raise UnsupportedError(_refusal(scheduler))
    if scheduler.config.get("thresholding"):
        raise UnsupportedError(
            f"{type(scheduler).__name__} with thresholding=True: its step depends on the whole image"
        )
    if steps is not None:
        ok = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
        check(ok, "steps", steps, "an integer of 1 or more")
        most = int(scheduler.config.num_train_timesteps)
        check(read is _flow or steps <= most, "steps", steps, f"at most {most}, the noise levels that the model knows")
    return read


def replaced(scheduler: Any, wanted: Any) -> Any:
    """The scheduler to use: `scheduler` itself for None, one of `REPLACEMENTS` made from its configuration, or the
    object that was given. Raises `InputError`.
    """
    if wanted is None:
        return scheduler
    if not isinstance(wanted, str):
        check(hasattr(wanted, "set_timesteps") and hasattr(wanted, "config"), "scheduler", wanted, _named())
        return wanted
    check(wanted in REPLACEMENTS, "scheduler", wanted, _named())
    flow = _is_flow(scheduler)
    check((wanted == "flow-euler") == flow, "scheduler", wanted, "flow-euler" if flow else _named("flow-euler"))
    config, extra = scheduler.config, {}
    if flow and "flow_shift" in config:
        extra["shift"] = config["flow_shift"]
    if wanted in ("ddim", "ddpm"):
        # Theirs clip unless they are told not to; what is replaced did not.
        extra["clip_sample"] = config.get("clip_sample", False)
    return REPLACEMENTS[wanted].from_config(config, **extra)


def _named(but: str = "") -> str:
    return f"a scheduler of diffusers, or one of {', '.join(name for name in REPLACEMENTS if name != but)}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    flow = config.get("prediction_type") == "flow_prediction" or bool(config.get("use_flow_sigmas"))
    return flow or type(scheduler).__name__.startswith("FlowMatch")


def _refusal(scheduler: Any) -> str:
    name = type(scheduler).__name__
    wanted = "flow-euler" if _is_flow(scheduler) else "ddim"
    other = REPLACEMENTS[wanted].__name__
    return (
        f'{name} is multistep or unknown, so its rows cannot be forked: use scheduler="{wanted}", or '
        f"{other}.from_config(pipeline.scheduler.config)"
    )


# ------------------------------------------------------------------------------------------------ variance preserving


def _table(scheduler: Any) -> tuple[Tensor, list[int]]:
    """The levels that the model knows, and the timesteps that are visited."""
    table, times = scheduler.alphas_cumprod.double(), scheduler.timesteps.tolist()
    allowed = f"fewer: with steps_offset={scheduler.config.get('steps_offset')} so many begin beyond the last level"
    check(max(times) < len(table), "steps", len(times), allowed)
    return table, times


def _ddpm(scheduler: Any, eta: float, kind: str | None) -> Grid:
    variance = scheduler.config.variance_type
    if variance not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise UnsupportedError(
            f'DDPMScheduler with variance_type={variance!r}: the noise of its step is not fixed; use scheduler="ddim"'
        )
    table, times = _table(scheduler)
    bars = [float(table[t]) for t in times] + [1.0]
    alpha, sigma = _roots(bars)
    clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
    schedule = Schedule.between(alpha, sigma, eta, clip, clip_noise=True)
    if variance == "fixed_large":
        allowed = '1: variance_type="fixed_large" has one size of noise (another eta: scheduler="ddim")'
        check(eta == 1, "eta", eta, allowed)
        std = [math.sqrt(1 - a / b) if t > 0 else 0.0 for a, b, t in zip(bars, bars[1:], times, strict=False)]
        schedule = Schedule(alpha, sigma, schedule.signal, schedule.noise, tuple(std), clip, True)
    return _preserving(scheduler, schedule)


def _ddim(scheduler: Any, eta: float, kind: str | None) -> Grid:
    (table, times), config = _table(scheduler), scheduler.config
    # Its step goes to t - T // n, which is not the next timestep where the spacing is "linspace", nor always elsewhere.
    stride = config.num_train_timesteps // scheduler.num_inference_steps
    final = float(scheduler.final_alpha_cumprod.double())
    bars = [float(table[t]) for t in times]
    nexts = [float(table[t - stride]) if t >= stride else final for t in times]
    alpha, sigma = _roots([*bars, nexts[-1]])
    signal, spread = _roots(nexts)
    std = [
        eta * math.sqrt(max((1 - b) / (1 - a) * (1 - a / b), 0.0)) if a < 1 else 0.0
        for a, b in zip(bars, nexts, strict=True)
    ]
    noise = [math.sqrt(max(s * s - z * z, 0.0)) for s, z in zip(spread, std, strict=True)]
    clip = config.clip_sample_range if config.clip_sample else None
    return _preserving(scheduler, Schedule(alpha, sigma, signal, tuple(noise), tuple(std), clip))


def _preserving(scheduler: Any, schedule: Schedule) -> Grid:
    pairs = list(zip(schedule.alpha[:-1], schedule.sigma[:-1], strict=True))
    prediction = scheduler.config.prediction_type
    if prediction == "epsilon":
        check(min(schedule.alpha[:-1]) > 0, "prediction_type", prediction, "v_prediction: a level has no signal at all")
        keep, take = [1 / a for a, _ in pairs], [-s / a for a, s in pairs]
    elif prediction == "v_prediction":
        keep, take = [a for a, _ in pairs], [-s for _, s in pairs]
    else:
        keep, take = _sample(prediction, len(pairs))
    return _grid(scheduler, schedule, keep, take)


def _roots(bars: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(math.sqrt(b) for b in bars), tuple(math.sqrt(1 - b) for b in bars)


# ------------------------------------------------------------------------------------------------- variance exploding


def _euler(scheduler: Any, eta: float, kind: str | None) -> Grid:
    # With interpolation_type="log_linear" there is a level more than steps, which no step reaches.
    sigma = tuple(scheduler.sigmas.double().tolist()[: len(scheduler.timesteps) + 1])
    levels = sigma[:-1]
    scale = [1 / math.sqrt(s * s + 1) for s in levels]
    prediction = scheduler.config.prediction_type
    if prediction == "epsilon":
        keep, take = [1.0] * len(levels), [-s for s in levels]
    elif prediction == "v_prediction":
        keep, take = [c * c for c in scale], [-s * c for s, c in zip(levels, scale, strict=True)]
    else:
        keep, take = _sample(prediction, len(levels))
    schedule = Schedule.between((1.0,) * len(sigma), sigma, eta)
    return _grid(scheduler, schedule, keep, take, scale, float(scheduler.init_noise_sigma))


# --------------------------------------------------------------------------------------------------------------- flow


def _flow(scheduler: Any, eta: float, kind: str | None) -> Grid:
    if scheduler.config.invert_sigmas:
        raise UnsupportedError("FlowMatchEulerDiscreteScheduler with invert_sigmas=True runs the other way")
    sigma = tuple(scheduler.sigmas.double().tolist())
    alpha = tuple(1 - s for s in sigma)
    chosen = kind or ("renoise" if scheduler.config.stochastic_sampling else "flow-sde")
    if eta == 0 or chosen == "eta":
        schedule = Schedule.between(alpha, sigma, eta)
    elif chosen == "flow-sde":
        schedule = Schedule.flow_sde(sigma, 0.7 * eta)
    else:
        check(eta == 1, "eta", eta, '0 or 1 with kind="renoise"')
        schedule = Schedule(alpha, sigma, alpha[1:], (0.0,) * len(sigma[1:]), sigma[1:])
    return _grid(scheduler, schedule, [1.0] * len(schedule), [-s for s in sigma[:-1]])


# -------------------------------------------------------------------------------------------------------------- shared


def _sample(prediction: str, steps: int) -> tuple[list[float], list[float]]:
    known = prediction in ("sample", "original_sample")
    check(known, "prediction_type", prediction, "epsilon, v_prediction, sample")
    return [0.0] * steps, [1.0] * steps


def _grid(
    scheduler: Any,
    schedule: Schedule,
    keep: Sequence[float],
    take: Sequence[float],
    scale: Sequence[float] | None = None,
    start: float = 1.0,
) -> Grid:
    scales = tuple(scale) if scale is not None else (1.0,) * len(schedule)
    return Grid(schedule, torch.as_tensor(scheduler.timesteps).cpu(), tuple(keep), tuple(take), scales, start)


_READERS: tuple[tuple[Any, Reader], ...] = (
    (diffusers.DDPMScheduler, _ddpm),
    (diffusers.DDIMScheduler, _ddim),
    (diffusers.EulerDiscreteScheduler, _euler),
    (diffusers.EulerAncestralDiscreteScheduler, _euler),
    (diffusers.FlowMatchEulerDiscreteScheduler, _flow),
)

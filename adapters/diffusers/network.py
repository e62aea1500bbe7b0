"""A network of diffusers as a denoiser, and the source that makes one from a network and its scheduler."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steer.adapters.diffusers.schedules import Grid, replaced, schedule_of
from steer.adapters.diffusers.tuned import tuned_network
from steer.core import InputError, Prompt, check
from steer.diffusion import Schedule
from steer.diffusion.state import Denoiser


@dataclass(frozen=True)
class Labels:
    """Encoded prompts of a class-conditional network: its label of every prompt `[B]`, on the CPU."""

    index: Tensor
    plain: bool
    """Whether every prompt is the null class, so that guidance has nothing to guide to."""


@dataclass(frozen=True, eq=False)
class NetworkDenoiser:
    """A network of diffusers, called as `UNet2DModel` is, read through its scheduler's levels.

    Rows are `[N, C, H, W]` in float32, or float64 where the network is.

    Attributes:
        network: called as `network(x, timestep)`, with `class_labels` `[N]` where it has classes.
        grid: levels and conversions.
        shape: of one row, `(C, H, W)`.
        labels: label of each class by its name, () for a network without classes: such a network takes any prompt and
            heeds none.
        null: label that stands for no class; it is what the prompt "" means, and what guidance starts from.
        guidance_scale: classifier-free guidance `null + scale (class - null)` on the network's output (Ho & Salimans
            2022), both from one call with twice the rows; 1 is none.
        unshuffle: pixels of an image in each direction that lie in the channels of a row; 1 where rows are images.
    """

    network: nn.Module
    grid: Grid
    shape: tuple[int, ...]
    labels: tuple[tuple[str, int], ...] = ()
    null: int | None = None
    guidance_scale: float = 1.0
    unshuffle: int = 1

    def __post_init__(self) -> None:
        scale = self.guidance_scale
        ok = isinstance(scale, int | float) and not isinstance(scale, bool) and abs(scale) < float("inf")
        check(ok, "guidance_scale", scale, "a finite number (1 is no guidance)")
        guided = bool(self.labels) and self.null is not None
        check(
            scale == 1 or guided, "guidance_scale", scale, "1: guidance needs a network with classes and a null class"
        )

    @cached_property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the network."""
        return next(self.network.parameters()).dtype

    @cached_property
    def _timesteps(self) -> list[Tensor]:
        return list(self.grid.timesteps.to(self.device))

    def encode(self, prompts: Sequence[Prompt]) -> Labels | None:
        """The label of every prompt. Raises `InputError` for a class that is not known."""
        if not self.labels:
            return None
        index = [self._label(prompt) for prompt in prompts]
        return Labels(torch.tensor(index), all(i == self.null for i in index))

    def _label(self, prompt: Any) -> int:
        known, text = dict(self.labels), "" if prompt is None else prompt
        if text == "" and self.null is not None:
            return self.null
        if isinstance(text, str) and text in known:
            return known[text]
        folded = {name.casefold(): label for name, label in known.items()}
        lower = text.casefold() if isinstance(text, str) else ""
        if lower not in folded:
            close = difflib.get_close_matches(lower, folded, n=1)
            nothing = ', or "" for any of them' if self.null is not None else ""
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError("prompt", prompt, f"a class ({', '.join(known)}){nothing}{hint}")
        return folded[lower]

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        dtype = torch.promote_types(self.dtype, torch.float32)
        x = torch.randn(n, *self.shape, generator=generator, device=generator.device, dtype=dtype).to(self.device)
        return x if self.grid.start == 1 else x * self.grid.start

    def predict(self, x: Tensor, step: int, group: Tensor, encoded: Labels | None) -> Tensor:
        grid, time = self.grid, self._timesteps[step]
        seen = x if grid.scale[step] == 1 else x * grid.scale[step]
        seen = seen.to(self.dtype)
        if encoded is None:
            output = self._call(seen, time)
        else:
            labels = encoded.index[group].to(self.device)
            output = self._guided(seen, time, labels, encoded.plain)
        return torch.add(x * grid.keep[step], output.to(x.dtype), alpha=grid.take[step])

    def _guided(self, seen: Tensor, time: Tensor, labels: Tensor, plain: bool) -> Tensor:
        scale = self.guidance_scale
        if scale == 1 or plain:
            return self._call(seen, time, class_labels=labels)
        nothing = torch.full_like(labels, int(self.null or 0))
        if scale == 0:
            return self._call(seen, time, class_labels=nothing)
        both = self._call(torch.cat([seen, seen]), time, class_labels=torch.cat([nothing, labels]))
        base, wanted = both.chunk(2)
        return torch.add(base, wanted - base, alpha=scale)

    def _call(self, *arguments: Any, **named: Any) -> Tensor:
        return self.network(*arguments, **named, return_dict=False)[0]

    def decode(self, x: Tensor) -> Tensor:
        """Images `[N, C, H, W]`, clamped to [0, 1]."""
        images = self._images(x)
        return images.clamp(0, 1)

    def preview(self, x0: Tensor) -> Tensor:
        """As `decode`, but the gradient passes through the clamp: a pixel that rests below black can still be
        lifted.
        """
        images = self._images(x0)
        return images + (images.clamp(0, 1) - images).detach()

    def _images(self, x: Tensor) -> Tensor:
        return (nn.functional.pixel_shuffle(x, self.unshuffle) if self.unshuffle > 1 else x) / 2 + 0.5

    def show(self, prompt: Prompt) -> Any:
        return prompt


@dataclass(frozen=True, eq=False)
class NetworkSource:
    """A network and its scheduler, from which denoisers are made."""

    network: nn.Module
    scheduler: Any
    labels: tuple[tuple[str, int], ...] = ()
    null: int | None = None
    unshuffle: int = 1

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def make(
        self,
        steps: int,
        eta: float,
        guidance_scale: float | None,
        scheduler: Any,
        kind: str | None,
        batch: int,
        options: dict[str, Any],
    ) -> tuple[Denoiser, Schedule]:
        """A denoiser and its schedule. Raises `InputError`."""
        for name in options:
            raise InputError("setting", name, "steps, eta, guidance_scale, scheduler, kind, shown, max_batch")
        grid = schedule_of(replaced(self.scheduler, scheduler), steps, eta, kind)
        config: Any = self.network.config
        size = config.sample_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        denoiser = NetworkDenoiser(
            self.network,
            grid,
            (config.in_channels, *sides),
            self.labels,
            self.null,
            1.0 if guidance_scale is None else guidance_scale,
            self.unshuffle,
        )
        return denoiser, grid.schedule

    def tuned(self, what: Any) -> NetworkSource:
        """The source with another network in place of this one."""
        return replace(self, network=tuned_network(self.network, what))

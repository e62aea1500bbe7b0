"""`DiffusionModel`: what `load` returns, whatever network or pipeline it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steer.core import Reward, Sampler, Samples, check
from steer.core.edit import Prompts
from steer.diffusion import DiffusionProcess, Schedule
from steer.diffusion.state import Denoiser
from steer.model import Model


class Classifier(nn.Module):
    """A classifier that a model brings: log-probabilities `[N, len(classes)]` of images `[N, C, H, W]` in [0, 1]."""

    def __init__(self, net: nn.Module, classes: Sequence[str]) -> None:
        super().__init__()
        self.net, self.classes = net, list(classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def features(self, images: Tensor) -> Tensor:
        """What its last layer sees of images `[N, D]`, where the network shows it."""
        shown: Any = self.net
        check(hasattr(shown, "features"), "classifier", type(shown).__name__, "a network with features")
        return shown.features(images)


class Source(Protocol):
    """What a `DiffusionModel` is made of."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def make(
        self,
        steps: int,
        eta: float,
        guidance_scale: float | None,
        scheduler: Any,
        kind: str | None,
        batch: int,
        options: dict[str, Any],
    ) -> tuple[Denoiser, Schedule]: ...

    def tuned(self, what: Any) -> Any: ...


@dataclass(frozen=True, eq=False, repr=False)
class DiffusionModel(Model):
    """A diffusion model ready to be steered. Networks and pipelines are never changed.

    Attributes:
        source: a network with its scheduler, or a pipeline.
        classes: what a class-conditional model can be asked for, by name.
        classifier: the model's own classifier of its images, for rewards such as `class:boot`.
        judge: another one that no reward uses, by whose features populations are compared.
    """

    images = True

    source: Source
    name: str
    classes: list[str] | None = None
    classifier: Classifier | None = field(default=None, repr=False)
    judge: Classifier | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def generate(
        self,
        prompts: Prompts = "",
        *,
        edits: Any = (),
        sampler: Sampler | str | None = None,
        reward: Reward | str | Callable[..., Any] | None = None,
        beta: float = 1.0,
        n: int | None = None,
        seed: int | None = None,
        max_rows: int | None = None,
        progress: bool = False,
        stream: Any = False,
        steps: int | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        scheduler: Any = None,
        kind: str | None = None,
        shown: str | None = None,
        max_batch: int | None = None,
        **more: Any,
    ) -> Samples:
        """Draw images for every prompt.

        Args:
            prompts: a text, a class by its name, or several; "" for any class.
            edits: an edit or a list of edits for all prompts, or one list for each (see `steer.generate`).
            sampler: a `Sampler`, or its name with its settings beside it: `sampler="fk", num_particles=16`. Default:
                independent samples.
            reward: a `Reward`, an expression such as "class:boot", or a function of images `[N, C, H, W]`.
            beta: KL coefficient of the target `p exp(reward / beta)`, for samplers that weigh.
            n: images, best-of-n's candidates or particles for each prompt.
            seed: same seed, same images on the same machine; None draws one.
            max_rows: images generated at once.
            progress: show a bar on standard error.
            stream: refused: images are given whole.
            steps, eta, guidance_scale, scheduler, kind, shown, max_batch: as for `process`.
            more: the settings of a sampler that is named; what a pipeline's call takes, such as `negative_prompt`,
                `height`; and `num_inference_steps` and `num_images_per_prompt`, which mean the same as `steps` and `n`.

        Raises:
            InputError: a field is out of range; nothing has run.
            UnsupportedError: the scheduler or the pipeline cannot do what an edit or the sampler needs.
        """
        drawn: Samples = super().generate(
            prompts,
            edits=edits,
            sampler=sampler,
            reward=reward,
            beta=beta,
            n=n,
            seed=seed,
            max_rows=max_rows,
            progress=progress,
            stream=stream,
            steps=steps,
            eta=eta,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            kind=kind,
            shown=shown,
            max_batch=max_batch,
            **more,
        )
        return drawn

    def __repr__(self) -> str:
        kind = type(self.source).__name__
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"DiffusionModel({self.name!r}, {kind} on {self.device}, {self.dtype}{classes})"

    def facts(self) -> dict[str, Any]:
        found = {"source": type(self.source).__name__, "device": self.device, "dtype": self.dtype}
        return found | ({"classes": ", ".join(self.classes)} if self.classes else {})

    def process(
        self,
        *,
        steps: int = 25,
        eta: float = 1.0,
        guidance_scale: float | None = None,
        scheduler: Any = None,
        kind: str | None = None,
        shown: str = "current",
        max_batch: int = 64,
        **options: Any,
    ) -> DiffusionProcess:
        """The model as a `Process`.

        Args:
            steps: network evaluations of a row.
            eta: 1 for as much noise as the levels allow, which samplers that fork rows want; 0 is deterministic.
            guidance_scale: of classifier-free guidance; None is 1 for a network, the pipeline's own for a pipeline.
            scheduler: None is the model's own; a scheduler of diffusers; or "ddim", "ddpm", "euler",
                "euler-ancestral", "flow-euler", made from the configuration of its own.
            kind: of noise on a flow, "flow-sde", "eta" or "renoise"; see `schedule_of`.
            shown: "current" or "previous": whose x0-hat previews show.
            max_batch: rows put through the network at once; 0 is no limit.
            options: of a pipeline: `negative_prompt`, `preview_decoder`, and what its call takes.

        Raises:
            InputError: a setting is out of range.
            UnsupportedError: the scheduler or the pipeline cannot be run a step at a time.
        """
        ok = isinstance(max_batch, int) and not isinstance(max_batch, bool) and max_batch >= 0
        check(ok, "max_batch", max_batch, "an integer of 0 (no limit) or more")
        denoiser, schedule = self.source.make(steps, eta, guidance_scale, scheduler, kind, max_batch, options)
        return DiffusionProcess(denoiser, schedule, shown=shown, max_batch=max_batch)

    def tuned(self, what: Any, name: str | None = None) -> DiffusionModel:
        """A second model with a network that was tuned from this one's, such as RL guidance takes: a module, a folder,
        or a LoRA in safetensors, which is merged into a copy. Raises `SteerError`.
        """
        called = name or (type(what).__name__ if isinstance(what, nn.Module) else str(what))
        return DiffusionModel(self.source.tuned(what), called, self.classes, self.classifier, self.judge)

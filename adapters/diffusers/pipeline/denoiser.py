"""Stock pipelines of diffusers, unmodified, one call of their denoiser at a time.

A pipeline is run with a scheduler that has a single timestep and, instead of stepping, keeps what the pipeline would
have stepped with. Guidance, rescaling, adapters, image prompts and packing stay the pipeline's own work, and `steer`
makes the step. What a run changes in the pipeline object is put back when it ends.

Letters: `B` prompts, `N` rows, `S` steps.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steer.adapters.diffusers.pipeline.parts import check_guidance, check_options, network_of, parameters, require
from steer.adapters.diffusers.pipeline.prompts import Embedded, Encoding, layout_of
from steer.adapters.diffusers.pipeline.recorder import recorder_of
from steer.adapters.diffusers.pipeline.session import Session, free, swapped
from steer.adapters.diffusers.schedules import Grid, replaced, schedule_of, supported
from steer.adapters.diffusers.tuned import tuned_network
from steer.core import Prompt, SteerError, UnsupportedError, check
from steer.core.errors import first_line
from steer.diffusion import Schedule
from steer.diffusion.state import Denoiser

__all__ = ["PipelineDenoiser", "PipelineSource"]


_DECODED_AT_ONCE = 8


class PipelineDenoiser:
    """A pipeline as a denoiser. Rows are latents as the pipeline passes them to its scheduler, in float32 or better.

    Args:
        pipeline: any text-to-image pipeline that takes `latents` and `output_type`.
        scheduler: used in place of the pipeline's; one that `schedule_of` knows.
        steps, eta, kind: see `schedule_of`; the timesteps are those that the pipeline itself would set.
        guidance_scale: None is the pipeline's own default.
        negative_prompt: for every row.
        preview_decoder: a cheap VAE (such as `AutoencoderTiny`), or a callable from latents to images `[N, C, H, W]` in
            [0, 1], used for previews alone.
        options: further arguments of the pipeline's call, the same at every step.

    Raises:
        InputError: an option that the pipeline does not have.
        UnsupportedError: the pipeline lacks something, which is named.
    """

    differentiable = False

    def __init__(
        self,
        pipeline: Any,
        scheduler: Any,
        *,
        steps: int = 25,
        eta: float = 1.0,
        kind: str | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        preview_decoder: Any = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.pipeline, self.steps = pipeline, steps
        taken = parameters(pipeline.__call__)
        require(pipeline, taken)
        self.guidance_scale, self.negative_prompt = guidance_scale, negative_prompt
        self.options = dict(options or {})
        check_options(pipeline, taken, self.options)
        check_guidance(pipeline, taken, guidance_scale, negative_prompt)
        self.preview_decoder = preview_decoder
        self.layout = layout_of(pipeline)
        supported(scheduler, steps)
        self._recorder = recorder_of(scheduler)
        self._session = Session(pipeline, self._recorder)
        self._blank: dict[str, Any] | None = None
        self._rehearse(1, torch.Generator().manual_seed(0))
        plain = copy.copy(self._recorder)
        plain.__class__ = type(scheduler)
        self.grid: Grid = schedule_of(plain, None, eta, kind)

    def session(self) -> AbstractContextManager[None]:
        """The recording scheduler in place, progress bars off; everything is put back at the end."""
        return self._session.opened()

    # ---- calls

    def _call(self, rows: dict[str, Any], **given: Any) -> Any:
        arguments = {**self.options, **rows, **given}
        if self.guidance_scale is not None:
            arguments["guidance_scale"] = self.guidance_scale
        if self.layout is None and self.negative_prompt is not None:
            arguments["negative_prompt"] = [self.negative_prompt] * len(rows["prompt"])
        if self.layout is not None:
            # They went into the embeddings, and a call that has both is refused: a default of "" counts for PixArt.
            for name in [n for n in arguments if "prompt_" in n and n[-1].isdigit()]:
                del arguments[name]
            if "negative_prompt" in parameters(self.pipeline.__call__):
                arguments["negative_prompt"] = None
        recorder = self._recorder
        recorder.seen.clear()
        with self.session(), torch.no_grad(), _refusals(self.pipeline):
            return self.pipeline(num_inference_steps=self.steps, **arguments)

    def _rehearse(self, n: int, generator: torch.Generator) -> Tensor:
        """Rows at the noisiest level, as the pipeline draws them; the timesteps are set on the way."""
        recorder, drawn = self._recorder, list[Tensor]()
        stages = {"latents": False, "timesteps": False}

        def settled(stage: str) -> None:
            stages[stage] = True
            if all(stages.values()):
                raise _Enough

        prepare = _watched(self.pipeline.prepare_latents, drawn, lambda: settled("latents"))
        recorder.settled, recorder.rehearsing = lambda: settled("timesteps"), True
        try:
            with self.session(), swapped(self.pipeline, prepare_latents=prepare):
                self._call(self._blanks(n), generator=generator, output_type="latent")
            raise UnsupportedError(f"{type(self.pipeline).__name__} draws no latents of its own")
        except _Enough:
            pass
        finally:
            recorder.rehearsing = False
            recorder.__dict__.pop("settled", None)
            free(self.pipeline)
        x = drawn[0]
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _blanks(self, n: int) -> dict[str, Any]:
        """Arguments for `n` rows of a call whose prompts do not matter."""
        if self.layout is None:
            return {"prompt": [""] * n}
        if self._blank is not None:
            return {name: tensor.expand(n, *tensor.shape[1:]) for name, tensor in self._blank.items()}
        device, dtype = self.pipeline._execution_device, self.pipeline.dtype
        shapes = {"pooled": (n, 1), "mask": (n, 1)}
        made = {}
        for name in self.layout:
            shape = next((s for word, s in shapes.items() if word in name), (n, 1, 1))
            made[name] = torch.zeros(shape, device=device, dtype=dtype)
        return made

    # ---- Denoiser

    def validate(self, prompts: Sequence[Prompt]) -> None:
        """Raise `InputError` for a prompt that is not text."""
        for prompt in prompts:
            check(isinstance(prompt, str), "prompt", prompt, "text")

    def encode(self, prompts: Sequence[Prompt]) -> Embedded:
        """The prompts through the pipeline's text encoders, once."""
        self.validate(prompts)
        texts = [str(prompt) for prompt in prompts]
        if self.layout is None:
            return Embedded(texts=texts)
        with self.session(), torch.no_grad(), _refusals(self.pipeline):
            found = Encoding(
                self.pipeline, self.layout, self.guidance_scale, self.negative_prompt, self.options
            ).encode(texts)
        free(self.pipeline)
        self._blank = {name: tensor[:1] for name, tensor in found.items()}
        return Embedded(found)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        return self._rehearse(n, generator)

    def predict(self, x: Tensor, step: int, group: Tensor, encoded: Embedded) -> Tensor:
        recorder, grid = self._recorder, self.grid
        recorder.at = step
        try:
            self._call(encoded.rows(group), latents=x.to(self._dtype), output_type="latent")
        finally:
            recorder.at = None
        if len(recorder.seen) != 1 or recorder.seen[0].shape != x.shape:
            seen = [tuple(tensor.shape) for tensor in recorder.seen]
            raise UnsupportedError(
                f"{type(self.pipeline).__name__} gave its scheduler {seen} at one timestep, expected {tuple(x.shape)}"
            )
        output = recorder.seen.pop()
        return torch.add(x * grid.keep[step], output.to(x), alpha=grid.take[step])

    @property
    def _dtype(self) -> torch.dtype:
        return network_of(self.pipeline).dtype

    def decode(self, x: Tensor) -> Tensor:
        """Images `[N, C, H, W]` in [0, 1], by the pipeline's own decoding."""
        parts = []
        for rows in x.split(_DECODED_AT_ONCE):
            made = self._call(
                self._blanks(len(rows)), latents=rows.to(self._dtype), output_type="pt", return_dict=False
            )
            parts.append(made[0])
        return torch.cat(parts).float()

    def preview(self, x0: Tensor) -> Tensor:
        """As `decode`, without the safety checker, and with the cheap decoder where there is one."""
        decoder, parts = self.preview_decoder, dict[str, Any]()
        if "safety_checker" in self.pipeline.__dict__:
            parts["safety_checker"] = None
        if decoder is None:
            with swapped(self.pipeline, **parts):
                return self.decode(x0)
        if not hasattr(decoder, "decode"):
            return decoder(x0)
        with swapped(self.pipeline, vae=decoder, **parts):
            images = self.decode(x0)
        free(self.pipeline)
        return images

    def show(self, prompt: Prompt) -> Any:
        return prompt


@contextmanager
def _refusals(pipeline: Any) -> Iterator[None]:
    """Raises `SteerError` where the pipeline's own code, or that of its models, fails at what it was given."""
    try:
        yield
    except SteerError:
        raise
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SteerError(f"{type(pipeline).__name__} refuses these settings: {first_line(error)}") from error


class _Enough(Exception):
    """Raised to end a pipeline's call once it has given what was wanted."""


def _watched(prepare: Any, drawn: list[Tensor], seen: Callable[[], None]) -> Any:
    """A pipeline's `prepare_latents` that keeps in `drawn` what it made."""

    @functools.wraps(prepare)
    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        made = prepare(*args, **kwargs)
        drawn.append(made[0] if isinstance(made, tuple) else made)
        seen()
        return made

    return prepare_latents


# ------------------------------------------------------------------------------------------------------------- source


@dataclass(frozen=True, eq=False)
class PipelineSource:
    """A pipeline, from which denoisers are made."""

    pipeline: Any
    scheduler: Any

    def __post_init__(self) -> None:
        require(self.pipeline, parameters(self.pipeline.__call__))

    @property
    def device(self) -> torch.device:
        return self.pipeline._execution_device

    @property
    def dtype(self) -> torch.dtype:
        return network_of(self.pipeline).dtype

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
        """A denoiser and its schedule. Raises `InputError` and `UnsupportedError`."""
        decoder = options.pop("preview_decoder", None)
        denoiser = PipelineDenoiser(
            self.pipeline,
            replaced(self.scheduler, scheduler),
            steps=steps,
            eta=eta,
            kind=kind,
            guidance_scale=guidance_scale,
            negative_prompt=options.pop("negative_prompt", None),
            preview_decoder=self._decoder(decoder),
            options=options,
        )
        return denoiser, denoiser.grid.schedule

    def _decoder(self, given: Any) -> Any:
        """A preview decoder from a folder, an id, a module or a callable."""
        if given is None or callable(given):
            return given
        check(
            isinstance(given, str) or hasattr(given, "__fspath__"),
            "preview_decoder",
            given,
            "a folder or id of an AutoencoderTiny, a VAE, or a callable",
        )
        from diffusers import AutoencoderTiny

        try:
            loaded = AutoencoderTiny.from_pretrained(str(given), use_safetensors=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise SteerError(f"preview_decoder: could not load {str(given)!r}: {first_line(error)}") from error
        return loaded.to(self.device, self.dtype).eval()

    def tuned(self, what: Any) -> PipelineSource:
        """The pipeline with another network; everything else is shared."""
        name = "unet" if getattr(self.pipeline, "unet", None) is not None else "transformer"
        other = copy.copy(self.pipeline)
        other.__dict__[name] = tuned_network(network_of(self.pipeline), what)
        return replace(self, pipeline=other)

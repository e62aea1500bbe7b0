"""Stock pipelines of diffusers, unmodified, one call of their denoiser at a time.

A pipeline is run with a scheduler that has a single timestep and, instead of stepping, keeps what the pipeline would
have stepped with. Guidance, rescaling, adapters, image prompts and packing stay the pipeline's own work, and `steer`
makes the step. What a run changes in the pipeline object is put back when it ends.

Letters: `B` prompts, `N` rows, `S` steps.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.adapters._schedules import Grid, replaced, schedule_of, supported
from steer.core import Prompt, SteerError, UnsupportedError, check
from steer.diffusion import Denoiser, Schedule

__all__ = ["PipelineDenoiser", "PipelineSource"]

_OURS = {
    "prompt", "num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict",
    "eta", "guidance_scale", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask",
    "negative_pooled_prompt_embeds", "negative_prompt_attention_mask", "args", "kwargs",
}  # fmt: skip
"""Arguments of a call that are not for the user to set."""

_WHOLE_LOOP = {
    "callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "denoising_end",
    "control_guidance_start", "control_guidance_end",
    "skip_guidance_layers", "skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop",
}  # fmt: skip
"""Arguments that mean something to a loop over all steps only."""

_OFFLOAD = ("_all_hooks", "_offload_device", "_offload_gpu_id")
_DECODED_AT_ONCE = 8
_MISSING = object()


class _Enough(Exception):
    """What was wanted of a call has been seen."""


# --------------------------------------------------------------------------------------------------------- scheduler


class _Recording:
    """What is put in front of a scheduler's class. In a rehearsal the timesteps are set as the pipeline asks; after
    it, there is one timestep, or none, and a step keeps its inputs.
    """

    at: int | None
    """Number of the step; None has no step, which leaves decoding."""
    rehearsing: bool
    every: Tensor
    """All timesteps, as the rehearsal found them."""
    seen: list[Tensor]
    settled: Callable[[], None]

    timesteps: Tensor
    _step_index: int | None

    @property
    def init_noise_sigma(self) -> Any:
        """1 where x is given: the pipeline multiplies it."""
        if not self.rehearsing:
            return 1.0
        parent = getattr(super(), "init_noise_sigma", None)
        return self.__dict__.get("init_noise_sigma", 1.0) if parent is None else parent

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The pipeline's wish to start at the front is not followed."""


def _recorder(scheduler: Any) -> Any:
    """A copy of `scheduler` that records. It is still an instance of its class, and its methods have their signatures,
    which pipelines look at.
    """
    base = type(scheduler)

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.rehearsing:
            base.set_timesteps(self, *args, **kwargs)
            self.every = self.timesteps
            self.settled()
        elif self.at is None:
            self.timesteps = self.every[:0]
        else:
            self.timesteps = self.every[self.at : self.at + 1]
            self._step_index = self.at

    @functools.wraps(base.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(model_output)
        return (sample, sample)

    made = copy.deepcopy(scheduler)
    made.__class__ = type(
        f"Recording{base.__name__}", (_Recording, base), {"set_timesteps": set_timesteps, "step": step}
    )
    made.at, made.rehearsing, made.seen = None, False, []
    return made


# ------------------------------------------------------------------------------------------------------------ prompts


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _layout(pipeline: Any) -> tuple[str, ...] | None:
    """Names under which the call takes what `encode_prompt` returns, in order; None where the call wants texts."""
    encode = getattr(pipeline, "encode_prompt", None)
    taken = _parameters(pipeline.__call__)
    if encode is None or "prompt_embeds" not in taken:
        return None
    both = "negative_prompt" in _parameters(encode)
    names: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    if "prompt_attention_mask" in taken:
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    elif "pooled_prompt_embeds" in taken:
        names = (*names, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    if not both and "pooled_prompt_embeds" in taken:
        names, both = ("prompt_embeds", "pooled_prompt_embeds"), True
    others = {name.removeprefix("negative_") for name in taken if "prompt_embeds" in name or name.endswith("_mask")}
    return names if both and others <= set(names) and set(names) <= set(taken) else None


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


# ----------------------------------------------------------------------------------------------------------- denoiser


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
        self._taken = _parameters(pipeline.__call__)
        _require(pipeline, self._taken)
        self.guidance_scale, self.negative_prompt = guidance_scale, negative_prompt
        self.options = self._checked(dict(options or {}))
        self.preview_decoder = preview_decoder
        self.layout = _layout(pipeline)
        supported(scheduler, steps)
        self._recorder = _recorder(scheduler)
        self._depth, self._kept = 0, {}  # type: int, dict[str, Any]
        self._blank: dict[str, Any] | None = None
        self._rehearse(1, torch.Generator().manual_seed(0))
        plain = copy.copy(self._recorder)
        plain.__class__ = type(scheduler)
        self.grid: Grid = schedule_of(plain, None, eta, kind)

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        free = sorted(set(self._taken) - _OURS - _WHOLE_LOOP)
        for name in options:
            if name in _WHOLE_LOOP and name in self._taken:
                raise UnsupportedError(f"{name} of {type(self.pipeline).__name__} acts on a whole loop of its own")
            check(name in free, "setting", name, f"settings of process, or of the pipeline's call: {', '.join(free)}")
        for name in ("guidance_scale", "negative_prompt"):
            given = getattr(self, name)
            check(given is None or name in self._taken, name, given, f"unset: {type(self.pipeline).__name__} has none")
        scale = self.guidance_scale
        ok = scale is None or (isinstance(scale, int | float) and not isinstance(scale, bool) and abs(scale) < 1e9)
        check(ok, "guidance_scale", scale, "a finite number, or None for the pipeline's own")
        negative = self.negative_prompt
        check(negative is None or isinstance(negative, str), "negative_prompt", negative, "text")
        return options

    # ---- the pipeline's state

    @contextmanager
    def session(self) -> Iterator[None]:
        """The recording scheduler in place, progress bars off; everything is put back at the end."""
        held = self.pipeline.__dict__
        if self._depth == 0:
            self._kept = {name: value for name, value in held.items() if name not in _OFFLOAD}
            # Past __setattr__, which would rewrite the pipeline's configuration.
            held["scheduler"], held["_progress_bar_config"] = self._recorder, {"disable": True}
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for name in [n for n in held if n not in self._kept and n not in _OFFLOAD]:
                    del held[name]
                held.update(self._kept)
                self._kept = {}

    @contextmanager
    def _swapped(self, **parts: Any) -> Iterator[None]:
        """Parts of the pipeline replaced for a moment."""
        held, old = self.pipeline.__dict__, {}
        for name, part in parts.items():
            old[name] = held.get(name, _MISSING)
            held[name] = part
        try:
            yield
        finally:
            for name, part in old.items():
                if part is _MISSING:
                    del held[name]
                else:
                    held[name] = part

    # ---- calls

    def _call(self, rows: dict[str, Any], **given: Any) -> Any:
        arguments = {**self.options, **rows, **given}
        if self.guidance_scale is not None:
            arguments["guidance_scale"] = self.guidance_scale
        if self.layout is None and self.negative_prompt is not None:
            arguments["negative_prompt"] = [self.negative_prompt] * len(rows["prompt"])
        if self.layout is not None:
            # They went into the embeddings, and a call that has both is refused.
            for name in [n for n in arguments if "prompt_" in n and n[-1].isdigit()]:
                del arguments[name]
        recorder = self._recorder
        recorder.seen.clear()
        with self.session(), torch.no_grad():
            return self.pipeline(num_inference_steps=self.steps, **arguments)

    def _rehearse(self, n: int, generator: torch.Generator) -> Tensor:
        """Rows at the noisiest level, as the pipeline draws them; the timesteps are set on the way."""
        recorder, drawn = self._recorder, []
        stages = {"latents": False, "timesteps": False}

        def settled(stage: str) -> None:
            stages[stage] = True
            if all(stages.values()):
                raise _Enough

        prepare = self.pipeline.prepare_latents

        @functools.wraps(prepare)
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            made = prepare(*args, **kwargs)
            drawn.append(made[0] if isinstance(made, tuple) else made)
            settled("latents")
            return made

        recorder.settled, recorder.rehearsing = lambda: settled("timesteps"), True
        try:
            with self.session(), self._swapped(prepare_latents=prepare_latents):
                self._call(self._blanks(n), generator=generator, output_type="latent")
            raise UnsupportedError(f"{type(self.pipeline).__name__} draws no latents of its own")
        except _Enough:
            pass
        except (ValueError, TypeError) as error:
            first = str(error).splitlines()[0]
            raise SteerError(f"{type(self.pipeline).__name__} refuses these settings: {first}") from error
        finally:
            recorder.rehearsing = False
            recorder.__dict__.pop("settled", None)
            self._free()
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

    def _free(self) -> None:
        """Weights that offloading had brought to the device go back."""
        free = getattr(self.pipeline, "maybe_free_model_hooks", None)
        if free is not None:
            free()

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
        with self.session(), torch.no_grad():
            found = self._encoded(texts, self.negative_prompt)
            separate = "negative_prompt" not in _parameters(self.pipeline.encode_prompt)
            if separate and self.negative_prompt is not None:
                other = self._encoded([self.negative_prompt] * len(texts), None)
                found |= {
                    f"negative_{name}": tensor for name, tensor in other.items() if f"negative_{name}" in self._taken
                }
        self._free()
        self._blank = {name: tensor[:1] for name, tensor in found.items()}
        return Embedded(found)

    def _encoded(self, texts: list[str], negative: str | None) -> dict[str, Tensor]:
        assert self.layout is not None
        encode = self.pipeline.encode_prompt
        taken = _parameters(encode)
        scale = self.guidance_scale
        if scale is None and "guidance_scale" in self._taken:
            scale = self._taken["guidance_scale"].default
        given: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in taken}
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
        made = encode(**given, **{name: value for name, value in extra.items() if name in taken})
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

    def _lora_scale(self) -> float | None:
        for name in ("cross_attention_kwargs", "joint_attention_kwargs"):
            if (self.options.get(name) or {}).get("scale") is not None:
                return float(self.options[name]["scale"])
        return None

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
        return _network(self.pipeline).dtype

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
            with self._swapped(**parts):
                return self.decode(x0)
        if not hasattr(decoder, "decode"):
            return decoder(x0)
        with self._swapped(vae=decoder, **parts):
            images = self.decode(x0)
        self._free()
        return images

    def show(self, prompt: Prompt) -> Any:
        return prompt


def _network(pipeline: Any) -> Any:
    """The module that denoises."""
    for name in ("unet", "transformer"):
        if getattr(pipeline, name, None) is not None:
            return getattr(pipeline, name)
    raise UnsupportedError(f"{type(pipeline).__name__} has neither a unet nor a transformer")


def _require(pipeline: Any, taken: dict[str, inspect.Parameter]) -> None:
    """Raise `UnsupportedError` that names what `pipeline` lacks."""
    name = type(pipeline).__name__
    _network(pipeline)
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


# ------------------------------------------------------------------------------------------------------------- source


@dataclass(frozen=True, eq=False)
class PipelineSource:
    """A pipeline, from which denoisers are made."""

    pipeline: Any
    scheduler: Any

    def __post_init__(self) -> None:
        _require(self.pipeline, _parameters(self.pipeline.__call__))

    @property
    def device(self) -> torch.device:
        return self.pipeline._execution_device

    @property
    def dtype(self) -> torch.dtype:
        return _network(self.pipeline).dtype

    def make(
        self, steps: int, eta: float, guidance_scale: float | None, scheduler: Any, kind: str | None, batch: int,
        options: dict[str, Any],
    ) -> tuple[Denoiser, Schedule]:  # fmt: skip
        """A denoiser and its schedule. Raises `InputError` and `UnsupportedError`."""
        decoder = options.pop("preview_decoder", None)
        denoiser = PipelineDenoiser(
            self.pipeline, replaced(self.scheduler, scheduler), steps=steps, eta=eta, kind=kind,
            guidance_scale=guidance_scale, negative_prompt=options.pop("negative_prompt", None),
            preview_decoder=self._decoder(decoder), options=options,
        )  # fmt: skip
        return denoiser, denoiser.grid.schedule

    def _decoder(self, given: Any) -> Any:
        """A preview decoder from a folder, an id, a module or a callable."""
        if given is None or callable(given):
            return given
        check(isinstance(given, str) or hasattr(given, "__fspath__"), "preview_decoder", given,
              "a folder or id of an AutoencoderTiny, a VAE, or a callable")  # fmt: skip
        from diffusers import AutoencoderTiny

        try:
            loaded = AutoencoderTiny.from_pretrained(str(given), use_safetensors=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise SteerError(f"preview_decoder: could not load {str(given)!r}: {str(error).splitlines()[0]}") from error
        return loaded.to(self.device, self.dtype).eval()

    def tuned(self, what: Any) -> PipelineSource:
        """The pipeline with another network; everything else is shared."""
        from steer.adapters.diffusers import tuned_network

        name = "unet" if getattr(self.pipeline, "unet", None) is not None else "transformer"
        other = copy.copy(self.pipeline)
        other.__dict__[name] = tuned_network(_network(self.pipeline), what)
        return replace(self, pipeline=other)

"""Diffusers: every scheduler's table against its own `step`, whole chains against stock pipelines, and what is refused.

All networks are random and tiny; nothing is downloaded.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from tiny_pipelines import PIPELINES, ddim, ddpm, network, sd15, sdxl, tiny_vae, unet
from torch import Tensor, nn

import steer
from steer import embedded
from steer.adapters.diffusers.guidance import LoRAOff, RLGuider, rl_guidance
from steer.adapters.diffusers.loading import load
from steer.adapters.diffusers.model import DiffusionModel
from steer.adapters.diffusers.schedules import REPLACEMENTS, Grid, replaced, schedule_of
from steer.core import Ability, InputError, Samples, SteerError, UnsupportedError
from steer.diffusion import DiffusionProcess
from steer.methods.best_of_n import BestOfN
from steer.methods.gradient import GradientGuidance
from steer.methods.rlg import RLGuidance
from steer.rewards import Brightness

# Of numpy 2, about how diffusers makes its tables.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SIZES: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sdxl": {"height": 16, "width": 16},
    "sd3": {"height": 16, "width": 16, "max_sequence_length": 12},
    "flux": {"height": 16, "width": 16, "max_sequence_length": 12},
}
PROMPTS = ["a cat", "the sun, loud"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def stock(name: str) -> Any:
    """A pipeline that tests share: none may change it."""
    made = PIPELINES[name]()
    made.set_progress_bar_config(disable=True)
    return made


@cache
def labelled() -> nn.Module:
    """A class-conditional network: three classes and the null class."""
    return network(num_class_embeds=4)


def chain(process: DiffusionProcess, prompts: list[str], n: int = 1, seed: int = 3) -> Samples:
    drawn = generator(seed)
    with process.session():
        state = process.init(prompts, n, drawn)
        while not process.done(state):
            state = process.propose(state, drawn)
        return process.decode(state)


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# -------------------------------------------------------------------------------------------------------- the kernel


def largest_error(scheduler: Any, grid: Grid, dtype: torch.dtype, **settings: Any) -> float:
    """Of the grid's step against `scheduler.step`, with the same noise, relative to the size of the result."""
    worst = 0.0
    for i, time in enumerate(scheduler.timesteps):
        drawn = generator(i)
        clean, noise, output = (torch.randn(2, 4, 4, generator=drawn, dtype=dtype) for _ in range(3))
        x = grid.schedule.alpha[i] * clean + grid.schedule.sigma[i] * noise
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = i
        if hasattr(scheduler, "scale_model_input"):
            seen = scheduler.scale_model_input(x, time)
            assert torch.allclose(seen, x * grid.scale[i], rtol=1e-5, atol=1e-6)
        want = scheduler.step(output, time, x, generator=generator(100 + i), return_dict=False, **settings)[0]
        x0 = grid.keep[i] * x + grid.take[i] * output
        z = torch.randn(x.shape, generator=generator(100 + i), dtype=dtype)
        ours = grid.schedule.mean(x, x0, i) + grid.schedule.std[i] * z
        worst = max(worst, gap(ours, want) / float(want.abs().max()))
    return worst


SPACINGS = ("leading", "trailing", "linspace")
CASES: dict[str, tuple[Callable[[], Any], float, dict[str, Any]]] = {}
for spacing in SPACINGS:
    for prediction in ("epsilon", "v_prediction", "sample"):
        common = {"timestep_spacing": spacing, "prediction_type": prediction}
        for eta in (0.0, 0.3, 1.0):
            CASES[f"ddim {spacing} {prediction} eta {eta}"] = (
                lambda c=common: DDIMScheduler(clip_sample=False, **c),
                eta,
                {"eta": eta},
            )
        CASES[f"ddim, clipped, {spacing} {prediction}"] = (lambda c=common: DDIMScheduler(**c), 1.0, {"eta": 1.0})
        CASES[f"ddim of SD, {spacing} {prediction}"] = (lambda c=common: ddim(**c), 1.0, {"eta": 1.0})
        CASES[f"ddpm {spacing} {prediction}"] = (lambda c=common: ddpm(**c), 1.0, {})
        CASES[f"ddpm, clipped, {spacing} {prediction}"] = (lambda c=common: DDPMScheduler(**c), 1.0, {})
        CASES[f"euler {spacing} {prediction}"] = (lambda c=common: EulerDiscreteScheduler(**c), 0.0, {})
        if prediction != "sample":  # its step does not know it
            CASES[f"euler ancestral {spacing} {prediction}"] = (
                lambda c=common: EulerAncestralDiscreteScheduler(**c),
                1.0,
                {},
            )
for variance in ("fixed_small_log", "fixed_large"):
    CASES[f"ddpm {variance}"] = (
        lambda v=variance: DDPMScheduler(variance_type=v, timestep_spacing="trailing"),
        1.0,
        {},
    )
CASES |= {
    "ddim, zero terminal SNR": (
        lambda: ddim(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"),
        1.0,
        {"eta": 1.0},
    ),
    "euler, karras": (lambda: EulerDiscreteScheduler(use_karras_sigmas=True, final_sigmas_type="sigma_min"), 0.0, {}),
    **{
        f"euler, log-linear, {spacing}": (
            lambda s=spacing: EulerDiscreteScheduler(interpolation_type="log_linear", timestep_spacing=s),
            0.0,
            {},
        )
        for spacing in SPACINGS
    },
    "flow": (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), 0.0, {}),
    "flow, stochastic": (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), 1.0, {}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_kernel_is_the_schedulers_step(case: str) -> None:
    build, eta, settings = CASES[case]
    scheduler = build()
    preserving = isinstance(scheduler, DDIMScheduler | DDPMScheduler)
    if preserving:  # in float64 only rounding is left; the others cast to float32
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        if hasattr(scheduler, "final_alpha_cumprod"):
            scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    for steps in (7, 30):
        grid = schedule_of(scheduler, steps, eta)
        scheduler.set_timesteps(steps)
        assert torch.equal(grid.timesteps, scheduler.timesteps)
        dtype, tolerance = (torch.float64, 1e-12) if preserving else (torch.float32, 1e-5)
        if isinstance(scheduler, DDPMScheduler):  # its smallest noise is 1e-10, where the table has none
            tolerance = 1e-9
        elif preserving and grid.schedule.alpha[0] == 0:  # no old noise: it leaves the square root of rounding
            tolerance = 1e-7
        assert largest_error(scheduler, grid, dtype, **settings) < tolerance


def test_what_the_parity_would_not_forgive() -> None:
    """Negative controls: another eta, the other rule of clipping, the next timestep in place of `t - T // n`."""
    scheduler = ddim(timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    right = schedule_of(scheduler, 7, 1.0)
    assert largest_error(scheduler, right, torch.float32, eta=1.0) < 1e-5
    assert largest_error(scheduler, schedule_of(scheduler, 7, 0.5), torch.float32, eta=1.0) > 1e-2
    straight = right.schedule.between(right.schedule.alpha, right.schedule.sigma)
    assert largest_error(scheduler, replace(right, schedule=straight), torch.float32, eta=1.0) > 1e-2
    clipped = DDPMScheduler()
    clipped.set_timesteps(7)
    grid = schedule_of(clipped, 7)
    other = replace(grid, schedule=replace(grid.schedule, clip_noise=False))
    assert largest_error(clipped, other, torch.float32) > 1e-2


def test_a_flow_is_stochastic_in_the_way_that_is_asked_for() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    grid = schedule_of(scheduler, 8)
    sigma = grid.schedule.sigma
    x, x0 = (torch.randn(2, 3, dtype=torch.float64, generator=generator(i)) for i in range(2))
    for i in (2, 5):  # Flow-GRPO's equation 9, written in the velocity
        t, dt = sigma[i], sigma[i + 1] - sigma[i]
        v = (x - x0) / t
        rate = 0.7 * (t / (1 - t)) ** 0.5
        want = x + (v + rate**2 / (2 * t) * (x + (1 - t) * v)) * dt
        assert gap(grid.schedule.mean(x, x0, i), want) < 1e-12
        assert grid.schedule.std[i] == pytest.approx(rate * (-dt) ** 0.5)
    assert grid.schedule.std[-1] == 0 and not schedule_of(scheduler, 8, 0.0).schedule.stochastic
    eta = schedule_of(scheduler, 8, 1.0, "eta").schedule
    assert eta.std != grid.schedule.std and eta.stochastic
    assert schedule_of(scheduler, 8, 1.0, "renoise").schedule.noise == (0.0,) * 8


def test_schedulers_that_cannot_be_forked_are_refused_with_a_way_out() -> None:
    for kind in (
        "PNDM",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "LCM",
        "HeunDiscrete",
        "DEISMultistep",
        "KDPM2Discrete",
    ):
        scheduler = getattr(diffusers, f"{kind}Scheduler")()
        with pytest.raises(UnsupportedError, match=r"DDIMScheduler\.from_config\(pipeline\.scheduler\.config\)"):
            schedule_of(scheduler, 5)
        other = replaced(scheduler, "ddim")
        assert isinstance(other, DDIMScheduler) and other.config.clip_sample is False
        assert len(schedule_of(other, 5).schedule) == 5
    flow = diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0)
    with pytest.raises(UnsupportedError, match="flow-euler"):
        schedule_of(flow, 5)
    assert replaced(flow, "flow-euler").config.shift == 2.0
    with pytest.raises(InputError, match="flow-euler"):
        replaced(flow, "ddim")

    class Mine(DDIMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

    with pytest.raises(UnsupportedError, match="Mine is multistep or unknown"):
        schedule_of(Mine(), 5)
    for config in ({"variance_type": "learned_range"}, {"thresholding": True}):
        with pytest.raises(UnsupportedError):
            schedule_of(DDPMScheduler(**config), 5)


def test_settings_out_of_range_are_refused() -> None:
    scheduler = ddim()
    for steps in (0, -1, 2.5, True, "5", 1001):
        with pytest.raises(InputError, match="steps"):
            schedule_of(scheduler, steps)  # type: ignore[arg-type]
    for eta in (-0.1, 1.1, float("nan"), "1", True):
        with pytest.raises(InputError, match="eta"):
            schedule_of(scheduler, 5, eta)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kind"):
        schedule_of(scheduler, 5, 1.0, "flow-sde")
    with pytest.raises(InputError, match="eta"):
        schedule_of(DDPMScheduler(variance_type="fixed_large"), 5, 0.5)
    with pytest.raises(InputError, match="v_prediction"):
        schedule_of(ddim(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 5)
    assert set(REPLACEMENTS) == {"ddim", "ddpm", "euler", "euler-ancestral", "flow-euler"}


# ------------------------------------------------------------------------------------------------------ stock pipelines


def snapshot(pipeline: Any) -> tuple[Any, ...]:
    return dict(pipeline.__dict__), dict(pipeline.config), pipeline.scheduler.timesteps.clone()


def unchanged(pipeline: Any, before: tuple[Any, ...]) -> bool:
    held, config, times = before
    same = set(held) == set(pipeline.__dict__) and all(pipeline.__dict__[k] is v for k, v in held.items())
    return same and config == dict(pipeline.config) and torch.equal(times, pipeline.scheduler.timesteps)


@pytest.mark.parametrize("name", list(SIZES))
def test_a_chain_without_noise_is_the_pipelines_own(name: str) -> None:
    pipeline, size = stock(name), SIZES[name]
    options = {"negative_prompt": "bad"} if name in ("sd15", "sd3") else {}
    want = pipeline(
        PROMPTS,
        num_inference_steps=4,
        generator=generator(3),
        output_type="pt",
        **size,
        **{k: [v] * 2 for k, v in options.items()},
    ).images
    before = snapshot(pipeline)
    got = chain(load(pipeline).process(steps=4, eta=0.0, **size, **options), PROMPTS)
    assert got.outputs.shape == (2, 3, 16, 16) and float(want.std()) > 0.05
    assert gap(got.outputs, want) < 1e-5
    assert unchanged(pipeline, before) and got.cost.nfe == 8


def test_a_chain_with_noise_is_the_pipelines_own() -> None:
    pipeline = stock("sd15")
    want = pipeline(
        PROMPTS, num_inference_steps=5, eta=1.0, generator=generator(3), output_type="pt", guidance_scale=3.0
    ).images
    got = chain(load(pipeline).process(steps=5, eta=1.0, guidance_scale=3.0), PROMPTS)
    assert gap(got.outputs, want) < 1e-5
    other = chain(load(pipeline).process(steps=5, eta=1.0, guidance_scale=2.0), PROMPTS)
    assert gap(other.outputs, want) > 1e-2


def test_ancestral_euler_and_what_the_call_takes_are_the_pipelines_own() -> None:
    pipeline = copy.copy(stock("sdxl"))
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    options = {"guidance_rescale": 0.5, "prompt_2": "a dog", "original_size": (32, 32)}
    want = pipeline(
        PROMPTS[:1], num_inference_steps=4, generator=generator(3), output_type="pt", **SIZES["sdxl"], **options
    ).images
    got = chain(load(pipeline).process(steps=4, **SIZES["sdxl"], **options), PROMPTS[:1])
    assert gap(got.outputs, want) < 1e-5


@pytest.mark.parametrize("name", ["pixart_alpha", "pixart_sigma", "sana"])
def test_defaults_of_a_negative_prompt_that_are_no_none(name: str) -> None:
    """Their calls refuse embeddings beside `negative_prompt=""`, which is the default."""
    pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    size, eta = (32, {}) if name == "sana" else (16, {"eta": 0.0})
    options: dict[str, Any] = {"height": size, "width": size, "use_resolution_binning": False}
    for negative in ({}, {"negative_prompt": "a dog"}):
        want = pipeline(
            PROMPTS,
            num_inference_steps=3,
            generator=generator(3),
            output_type="pt",
            guidance_scale=3.0,
            **negative,
            **options,
            **eta,
        ).images
        got = chain(load(pipeline).process(steps=3, eta=0.0, guidance_scale=3.0, **negative, **options), PROMPTS)
        assert gap(got.outputs, want) < 1e-5


def test_steps_that_begin_beyond_the_last_level_are_refused() -> None:
    """Where diffusers ends in an IndexError: `steps_offset` moves every level by so many."""
    model = load(network(), scheduler=ddim(num_train_timesteps=20))
    with pytest.raises(InputError, match="steps: got 20; allowed: fewer"):
        model.process(steps=20)
    assert model.process(steps=19).num_steps == 19
    with pytest.raises(InputError, match="steps: got 6"):
        load(network(), scheduler=ddim(num_train_timesteps=7, steps_offset=2)).process(steps=6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd15", {"clip_skip": 9}),
        ("sdxl", {"clip_skip": 9}),
        ("sd15", {"cross_attention_kwargs": 3}),
        ("sdxl", {"target_size": 16}),
        ("flux", {"joint_attention_kwargs": 3}),
    ],
)
def test_what_a_pipelines_own_code_fails_at_is_one_line(name: str, options: dict[str, Any]) -> None:
    pipeline = stock(name)
    with pytest.raises(SteerError, match=f"{type(pipeline).__name__} refuses these settings: .") as refused:
        chain(load(pipeline).process(steps=2, **options), PROMPTS)
    assert "\n" not in str(refused.value)


def test_an_adapter_for_images_is_missed_by_name() -> None:
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        for pipeline in ("sd15", "sdxl", "sd3"):
            with pytest.raises(InputError, match=f"{name}: got .*load_ip_adapter"):
                load(stock(pipeline)).process(**{name: torch.zeros(1, 3, 16, 16)})


def test_a_negative_prompt_of_its_own_encoding_is_the_pipelines_own() -> None:
    options = {**SIZES["flux"], "true_cfg_scale": 2.0}
    want = stock("flux")(
        PROMPTS, negative_prompt=["bad"] * 2, num_inference_steps=3, generator=generator(3), output_type="pt", **options
    ).images
    got = chain(load(stock("flux")).process(steps=3, eta=0.0, negative_prompt="bad", **options), PROMPTS)
    assert gap(got.outputs, want) < 1e-5
    plain = chain(load(stock("flux")).process(steps=3, eta=0.0, **options), PROMPTS)
    assert gap(plain.outputs, want) > 1e-3


def test_a_pipeline_that_takes_texts_alone_gets_them_at_every_step() -> None:
    class Texts(diffusers.StableDiffusionPipeline):
        """One whose `encode_prompt` is not known."""

        def __call__(
            self,
            prompt: Any,
            num_inference_steps: int = 5,
            generator: Any = None,
            latents: Any = None,
            output_type: str = "pil",
            return_dict: bool = True,
            guidance_scale: float = 7.5,
        ) -> Any:
            return super().__call__(
                prompt,
                num_inference_steps=num_inference_steps,
                generator=generator,
                latents=latents,
                output_type=output_type,
                return_dict=return_dict,
                guidance_scale=guidance_scale,
            )

    pipeline = Texts(**stock("sd15").components, requires_safety_checker=False)
    settings = {"steps": 3, "eta": 0.0, "guidance_scale": 2.0}
    got = chain(load(pipeline).process(**settings), PROMPTS)
    assert gap(got.outputs, chain(load(stock("sd15")).process(**settings), PROMPTS).outputs) < 1e-6


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_rows_of_two_prompts_do_not_mix(name: str) -> None:
    process = load(stock(name)).process(steps=3, eta=0.0, **SIZES[name])
    both = process.init(PROMPTS, 2, generator())
    x = both.x
    for b, prompt in enumerate(PROMPTS):
        alone = replace(process.init([prompt], 2, generator()), x=x[2 * b : 2 * b + 2])
        wrong = replace(process.init([PROMPTS[1 - b]], 2, generator()), x=x[2 * b : 2 * b + 2])
        for kept, state in ((True, alone), (False, wrong)):
            mixed, lone = process.gather(both, torch.arange(4)), state
            while not process.done(lone):
                mixed, lone = process.propose(mixed, generator()), process.propose(lone, generator())
            assert (gap(mixed.x[2 * b : 2 * b + 2], lone.x) < 1e-4) == kept


def test_levels_can_be_visited_in_any_order_and_in_parts() -> None:
    process = load(stock("sdxl")).process(steps=4, **SIZES["sdxl"])
    state = process.init(PROMPTS, 3, generator())
    first = [process.predict(state.x, i, state.group, state.encoded) for i in range(4)]
    for i in (3, 1, 0, 2):
        again = replace(process, max_batch=2).predict(state.x, i, state.group, state.encoded)
        assert gap(again, first[i]) < 1e-4 * float(first[i].abs().max())
        assert gap(first[i], first[(i + 1) % 4]) > 1e-2


def test_a_run_that_fails_leaves_the_pipeline_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = stock("sd15")
    process = load(pipeline).process(steps=3)
    before = snapshot(pipeline)
    state = process.init(PROMPTS, 1, generator())
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.unet, "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError), process.session():
            process.propose(state, generator())
    assert unchanged(pipeline, before)
    assert len(process.propose(state, generator())) == 2


def test_previews_may_be_decoded_cheaply() -> None:
    for name in ("sd15", "flux"):
        pipeline, cheap = stock(name), tiny_vae()
        seen: list[int] = []
        hook = cheap.decoder.register_forward_hook(lambda *a, seen=seen: seen.append(1))
        before = snapshot(pipeline)
        plain, fast = (
            load(pipeline).process(steps=3, preview_decoder=decoder, **SIZES[name]) for decoder in (None, cheap)
        )
        state = fast.read(fast.init(PROMPTS, 1, generator()))
        shown = fast.preview(state).outputs
        assert shown.shape == (2, 3, 16, 16) and seen == [1] and 0 <= float(shown.min()) <= float(shown.max()) <= 1
        assert gap(plain.preview(state).outputs, shown) > 1e-3 and seen == [1]
        fast.decode(state)
        assert seen == [1] and unchanged(pipeline, before)
        hook.remove()
    halves = load(stock("sd15")).process(steps=3, preview_decoder=lambda latents: latents[:, :3] * 0 + 0.5)
    assert float(halves.preview(halves.init(["a"], 1, generator())).outputs.mean()) == 0.5


def test_other_precisions_keep_their_chain_in_float32() -> None:
    pipeline = sd15().to(torch.bfloat16)
    model = load(pipeline)
    state = model.process(steps=2).init(["a"], 2, generator())
    assert model.dtype == torch.bfloat16 and state.x.dtype == torch.float32
    samples = model.generate(["a cat"], n=2, steps=2, seed=0)
    assert samples.outputs.dtype == torch.float32 and bool(samples.outputs.isfinite().all())


def test_pipelines_that_lack_something_are_refused_by_name() -> None:
    parts = stock("sd15").components
    image = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(UnsupportedError, match=r"Img2ImgPipeline .*(latents|starts from an image)"):
        load(image)
    bare = copy.copy(stock("sd15"))
    bare.__dict__["vae"] = None
    with pytest.raises(UnsupportedError, match="no vae"):
        load(bare)
    with pytest.raises(UnsupportedError, match="takes no latents"):
        load(_dit())
    pndm = load(stock("sd15"), scheduler=diffusers.PNDMScheduler())
    with pytest.raises(UnsupportedError, match='scheduler="ddim"'):
        pndm.process(steps=3)
    assert len(pndm.process(steps=3, scheduler="ddim").schedule) == 3


def _dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    return diffusers.DiTPipeline(transformer=transformer, vae=stock("sd15").vae, scheduler=ddim())


def test_settings_of_a_pipeline_are_checked_before_work() -> None:
    model = load(stock("sd15"))
    for settings, word in [
        ({"guidance": 3.0}, "guidance_rescale"),
        ({"negative_prompt": 3}, "negative_prompt"),
        ({"prompt_embeds": 1}, "setting"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"preview_decoder": 3}, "preview_decoder"),
        ({"max_batch": -1}, "max_batch"),
        ({"steps": 0}, "steps"),
    ]:
        with pytest.raises(InputError, match=word):
            model.process(**settings)
    with pytest.raises(UnsupportedError, match="callback_on_step_end"):
        model.process(callback_on_step_end=print)
    with pytest.raises(SteerError, match=r"StableDiffusionPipeline refuses .* divisible by 8"):
        load(stock("sd15")).process(height=17, width=17)
    with pytest.raises(InputError, match="prompt"):
        model.generate([[{"role": "user", "content": "a"}]], steps=2)


def test_a_pipeline_has_no_gradient_and_a_chain_without_noise_no_branches() -> None:
    process = load(stock("sd15")).process(steps=3)
    assert Ability.BRANCH in process.abilities and Ability.GRADIENT not in process.abilities
    with pytest.raises(UnsupportedError, match="load the network itself"):
        process.edited(GradientGuidance(Brightness()))
    for model in (load(stock("sd15")), load(labelled(), scheduler=ddpm())):
        still = model.process(steps=3, eta=0.0)
        with pytest.raises(UnsupportedError, match="eta above 0"):
            still.require(Ability.BRANCH, "FK steering")
    own = load(labelled(), scheduler=ddpm()).process(steps=3)
    assert Ability.GRADIENT in own.abilities
    own.edited(GradientGuidance(Brightness()))


# ------------------------------------------------------------------------------------------------------------ networks


@torch.no_grad()
def plain_loop(net: Any, scheduler: Any, labels: list[int], steps: int, eta: float, scale: float) -> Tensor:
    """What a user of diffusers writes; null class 3."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    drawn = generator(3)
    x = torch.randn(len(labels), 4, 8, 8, generator=drawn) * scheduler.init_noise_sigma
    wanted, nothing = torch.tensor(labels), torch.full((len(labels),), 3)
    extra = {"eta": eta} if isinstance(scheduler, DDIMScheduler) else {}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        output = net(seen, t, class_labels=wanted).sample
        if scale != 1:
            base = net(seen, t, class_labels=nothing).sample
            output = base + scale * (output - base)
        x = scheduler.step(output, t, x, generator=drawn, **extra).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.0])
def test_a_network_with_classes_is_the_plain_loop(scale: float) -> None:
    for scheduler, eta in (
        (ddim(prediction_type="v_prediction"), 0.5),
        (EulerAncestralDiscreteScheduler(timestep_spacing="trailing"), 1.0),
    ):
        model = load(labelled(), scheduler=scheduler, classes=["shoe", "bag", "coat"])
        assert model.classes == ["shoe", "bag", "coat"] and model.classifier is None
        want = plain_loop(labelled(), scheduler, [2, 0, 3], 6, eta, scale)
        got = chain(model.process(steps=6, eta=eta, guidance_scale=scale), ["coat", "Shoe", ""])
        assert gap(got.outputs, want) < 1e-4


def test_one_call_a_step_even_under_guidance() -> None:
    net, rows = labelled(), []
    hook = net.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    model = load(net, scheduler=ddpm(), classes=["shoe", "bag", "coat"])
    model.generate(["shoe", "bag"], n=2, steps=2, seed=0, guidance_scale=2.0)
    assert rows == [8, 8]
    rows.clear()
    model.generate(["", ""], n=2, steps=2, seed=0, guidance_scale=2.0)  # nothing to guide to
    model.generate(["", "bag"], n=2, steps=1, seed=0, guidance_scale=1.0, max_batch=3)
    assert rows == [4, 4, 3, 1]
    hook.remove()


def test_classes_that_are_not_known_are_refused() -> None:
    model = load(labelled(), scheduler=ddpm(), classes=["shoe", "bag", "coat"])
    with pytest.raises(InputError, match=r"shoe, bag, coat.*did you mean shoe\?"):
        model.generate(["sho"], steps=2)
    with pytest.raises(InputError, match='or "" for any'):
        model.generate([3], steps=2)
    numbered = load(labelled(), scheduler=ddpm())
    assert numbered.classes == ["0", "1", "2", "3"]
    with pytest.raises(InputError, match="prompt"):
        numbered.generate([""], steps=2)
    with pytest.raises(InputError, match="guidance_scale"):
        numbered.process(guidance_scale=2.0)
    with pytest.raises(InputError, match="classes"):
        load(labelled(), scheduler=ddpm(), classes=["shoe"])
    with pytest.raises(InputError, match="guidance_scale"):
        load(network(), scheduler=ddpm()).process(guidance_scale=2.0)
    with pytest.raises(InputError, match="setting"):
        model.process(negative_prompt="x")
    with pytest.raises(InputError, match="scheduler"):
        load(network())
    with pytest.raises(UnsupportedError, match="load its pipeline"):
        load(unet(), scheduler=ddim())
    with pytest.raises(UnsupportedError, match="more than the 4 channels"):
        load(network(out_channels=8), scheduler=ddpm())


def test_it_generates_as_a_language_model_does() -> None:
    grey = network(num_class_embeds=4, in_channels=1, out_channels=1)
    model = load(grey, scheduler=ddpm(), classes=["shoe", "bag", "coat"])
    a, b, c = (model.generate(["shoe", "bag"], n=2, seed=seed, steps=3) for seed in (1, 1, 2))
    assert torch.equal(a.outputs, b.outputs) and gap(a.outputs, c.outputs) > 1e-3
    assert a.group.tolist() == [0, 0, 1, 1] and a.prompts == ["shoe", "bag"] and a.cost.nfe == 12
    best = model.generate("shoe", sampler=BestOfN(4), reward="brightness", seed=0, steps=3)
    assert float(best.reward[0]) == float(best.pool.reward.max())
    pushed = model.generate("shoe", edits=GradientGuidance(Brightness()), n=4, seed=0, steps=3, beta=0.02)
    free = model.generate("shoe", n=4, seed=0, steps=3)
    assert float(pushed.outputs.mean()) > float(free.outputs.mean())


# ---------------------------------------------------------------------------------------------------------------- load


def test_a_folder_that_describes_itself(tmp_path: Path) -> None:
    from steer.train.fashion.nets import RewardNet, save_net

    net = network(num_class_embeds=4, sample_size=14)
    copy.deepcopy(net).half().save_pretrained(tmp_path / "unet")
    ddim(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    save_net(tmp_path / "classifier", RewardNet(3), {})
    card = {"kind": "diffusion", "classes": ["shoe", "bag", "coat"], "null_class": 3, "pixel_unshuffle": 2}
    (tmp_path / "MODEL_CARD.json").write_text(json.dumps(card))
    model = steer.load(tmp_path)
    assert isinstance(model, DiffusionModel) and model.dtype == torch.float32 and model.name == str(tmp_path)
    samples = model.generate(["bag", ""], n=2, steps=2, seed=0, reward="class:bag,coat")
    assert samples.outputs.shape == (4, 1, 28, 28) and samples.reward.shape == (4,)
    classifier = model.classifier
    assert classifier is not None and classifier.classes == ["shoe", "bag", "coat"]
    assert classifier(samples.outputs).exp().sum(1).allclose(torch.ones(4))
    denoiser = model.process(steps=2).denoiser
    x = torch.randn(2, 4, 14, 14, generator=generator()).requires_grad_()
    assert torch.equal(denoiser.decode(x), (nn.functional.pixel_shuffle(x, 2) / 2 + 0.5).clamp(0, 1))
    shown = denoiser.preview(x)
    assert gap(shown, denoiser.decode(x)) < 1e-6
    (slope,) = torch.autograd.grad(shown.sum(), x)
    assert bool((slope == 0.5).all())
    with pytest.raises(InputError, match="options"):
        steer.load(tmp_path, revision="main")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(SteerError, match="could not load"):
        steer.load(tmp_path)


def test_folders_of_pipelines_and_pipelines_in_memory(tmp_path: Path) -> None:
    stock("sd15").save_pretrained(tmp_path / "sd")
    model = steer.load(tmp_path / "sd", dtype="float32")
    assert model.classes is None and model.name == str(tmp_path / "sd")
    held = steer.load(stock("sd15"))
    for other in (model, held):
        got = other.generate("a cat", n=2, seed=0, steps=2)
        assert torch.equal(got.outputs, held.generate("a cat", n=2, seed=0, steps=2).outputs)
    small = diffusers.DDPMPipeline(unet=network(), scheduler=ddpm())
    small.save_pretrained(tmp_path / "ddpm")
    loaded = steer.load(tmp_path / "ddpm")
    assert loaded.process(steps=2).denoiser.network.config.sample_size == 8  # type: ignore[attr-defined]
    drawn = steer.load(network(), scheduler=ddpm()).generate("", n=2, seed=0, steps=2)
    assert torch.equal(loaded.generate("", n=2, seed=0, steps=2).outputs, drawn.outputs)
    for weights in (tmp_path / "sd").rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(SteerError, match="could not load"):
        steer.load(tmp_path / "sd")
    with pytest.raises(InputError, match="dtype"):
        load(stock("sd15"), dtype="int8")


def test_a_network_in_float64_is_asked_for_by_name() -> None:
    model = load(network(), scheduler=ddpm(), dtype="float64")
    assert model.generate("", n=1, seed=0, steps=1).outputs.dtype == torch.float64


def test_the_model_that_comes_with_steer() -> None:
    entry, said = embedded.find("fashion-ddpm"), list[str]()
    assert entry.fetched and entry.kind == "diffusion" and embedded.resolve("fashion-ddpm") == entry.folder
    assert embedded.fetch("fashion-ddpm", said.append) == entry.folder and said == [
        "fashion-ddpm comes with steer: nothing to fetch"
    ]
    size = sum(path.stat().st_size for path in entry.folder.rglob("*") if path.is_file())
    assert abs(size - entry.size) < 0.05 * entry.size
    model = steer.load("fashion-ddpm")
    assert model.name == "fashion-ddpm" and model.classes is not None and len(model.classes) == 10
    samples = model.generate(model.classes, n=4, steps=8, seed=0, guidance_scale=2.0)
    right = (model.classifier(samples.outputs).argmax(1) == samples.group).double().mean()  # type: ignore[misc]
    assert float(right) > 0.8  # a random network gets a tenth


def test_a_model_that_should_have_come_with_steer_is_missed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = replace(embedded.find("fashion-ddpm"), source=embedded.PackageSource("steer.recipes", "nowhere"))
    monkeypatch.setattr(embedded, "EMBEDDED", (lost,))
    for ask in (embedded.fetch, embedded.resolve):
        with pytest.raises(SteerError, match="install steer again"):
            ask("fashion-ddpm")


def test_ids_on_the_hub_are_told_apart_without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from steer.loading import is_diffusion

    cached = {("org/sd", "model_index.json"), ("org/lm", "config.json")}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, name: "path" if (repo, name) in cached else None
    )
    asked: list[str] = []

    def exists(repo: str, name: str) -> bool:
        asked.append(repo)
        if repo == "org/offline":
            raise OSError("no network")
        return repo == "org/new-sd"

    monkeypatch.setattr(huggingface_hub, "file_exists", exists)
    found = {name: is_diffusion(f"org/{name}") for name in ("sd", "lm", "new-sd", "new-lm")}
    assert found == {"sd": True, "lm": False, "new-sd": True, "new-lm": False}
    with pytest.raises(SteerError, match="hub cannot be reached"):
        is_diffusion("org/offline")
    assert asked == ["org/new-sd", "org/new-lm", "org/offline"]


def test_without_diffusers_what_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("steer.adapters.diffusers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("steer.adapters.diffusers")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SteerError, match="pip install diffusers"):
        steer.load("fashion-ddpm")


# ---------------------------------------------------------------------------------------------------------- RL guidance


@pytest.mark.parametrize("kind", ["network", "pipeline"])
def test_a_tuned_model_is_a_companion_in_lockstep(kind: str) -> None:
    if kind == "network":
        base = load(labelled(), scheduler=ddpm(), classes=["shoe", "bag", "coat"])
        tuned, prompt, settings = base.tuned(network(1, num_class_embeds=4)), "bag", {"guidance_scale": 2.0}
    else:
        base = load(stock("sd15"))
        tuned, prompt, settings = base.tuned(unet(1)), "a cat", {}
        assert base.source.pipeline.vae is tuned.source.pipeline.vae  # type: ignore[attr-defined]
    process = tuned.process(steps=3, **settings)

    def run(model: DiffusionModel, *edits: Any) -> Tensor:
        return model.generate(prompt, n=2, seed=0, steps=3, edits=list(edits), **settings).outputs

    assert torch.equal(run(base, RLGuidance(process, 0)), run(base))
    assert torch.equal(run(base, RLGuidance(process, 1)), run(tuned))
    assert gap(run(base), run(tuned)) > 1e-2 and gap(run(base, RLGuidance(process, 2)), run(tuned)) > 1e-3
    with pytest.raises(InputError, match="noise levels"):
        base.process(steps=4, **settings).edited(RLGuidance(process, 2))


def test_tuned_networks_come_from_folders_and_loras(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load(stock("sd15"))
    unet(1).save_pretrained(tmp_path / "whole" / "unet")
    whole = base.tuned(tmp_path / "whole")
    want = base.tuned(unet(1))
    assert torch.equal(*(m.generate("a", n=1, seed=0, steps=2).outputs for m in (whole, want)))
    adapted = copy.deepcopy(stock("sd15").unet)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted.add_adapter(
            peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        )
    adapted.save_lora_adapter(tmp_path / "lora")
    layers = {name.removeprefix("base_model.model."): value for name, value in _lora_of(adapted).items()}
    stock("sd15").save_lora_weights(tmp_path / "stock", unet_lora_layers=layers)
    kept = {name: value.clone() for name, value in stock("sd15").unet.state_dict().items()}
    merged = base.tuned(tmp_path / "lora")
    want = base.tuned(adapted)
    got = [m.generate("a", n=1, seed=0, steps=2).outputs for m in (merged, want, base)]
    assert gap(got[0], got[1]) < 1e-4 and gap(got[0], got[2]) > 1e-3
    stored = base.tuned(tmp_path / "stock").generate("a", n=1, seed=0, steps=2).outputs
    assert gap(stored, got[0]) < 1e-4
    assert all(torch.equal(value, kept[name]) for name, value in stock("sd15").unet.state_dict().items())
    wrapped = peft.get_peft_model(
        network(num_class_embeds=4), peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "peft")
    plain = load(labelled(), scheduler=ddpm())
    merged, free = plain.tuned(tmp_path / "peft"), plain.tuned(wrapped.merge_and_unload())
    assert gap(*(m.generate("1", n=1, seed=0, steps=2).outputs for m in (merged, free))) < 1e-5
    assert gap(*(m.generate("1", n=1, seed=0, steps=2).outputs for m in (merged, plain))) > 1e-4
    with pytest.raises(InputError, match="tuned"):
        base.tuned(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="LoRA in safetensors"):
        base.tuned(tmp_path / "empty")


def _lora_of(adapted: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(adapted)


def drawn_by(pipeline: Any) -> Tensor:
    return pipeline("a cat", num_inference_steps=3, generator=generator(), output_type="latent").images


@pytest.mark.parametrize("lora", [False, True], ids=["two networks", "LoRA"])
def test_a_stock_pipeline_under_rl_guidance(lora: bool) -> None:
    pipeline = copy.copy(stock("sd15"))
    pipeline.__dict__["unet"] = base = copy.deepcopy(stock("sd15").unet)
    plain, tuned = drawn_by(pipeline), None if lora else unet(1)
    if lora:
        peft = pytest.importorskip("peft")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        goal = drawn_by(pipeline)
    else:
        other = copy.copy(pipeline)
        other.__dict__["unet"] = tuned
        goal = drawn_by(other)
    rest = drawn_by(pipeline)
    held, trained = dict(base.__dict__), [p.requires_grad for p in base.parameters()]
    found = {}
    for w in (0, 1, 1.5):
        with rl_guidance(pipeline, tuned, w) as same:
            assert same is pipeline
            found[w] = drawn_by(pipeline)
    assert torch.equal(found[0], plain) and torch.equal(found[1], goal) and gap(found[1.5], goal) > 1e-3
    assert set(held) == set(base.__dict__) and trained == [p.requires_grad for p in base.parameters()]
    assert torch.equal(drawn_by(pipeline), rest)
    # The same mixture by hand, on the network's prediction.
    x, t, text = torch.randn(2, 4, 8, 8, generator=generator()), torch.tensor(7), torch.ones(2, 3, 32)
    with torch.no_grad(), rl_guidance(pipeline, tuned, -0.5):
        mixed = base(x, t, text).sample
    with torch.no_grad():
        if lora:
            high = base(x, t, text).sample
            with LoRAOff(base):
                low = base(x, t, text).sample
        else:
            low, high = base(x, t, text).sample, tuned(x, t, text).sample  # type: ignore[misc]
    assert gap(mixed, low - 0.5 * (high - low)) < 1e-5


def test_rl_guidance_refuses_what_it_cannot_mix() -> None:
    for w in (float("nan"), float("inf"), "2", None, True):
        with pytest.raises(InputError, match="w: got"), rl_guidance(stock("sd15"), unet(1), w):  # type: ignore[arg-type]
            pass
        with pytest.raises(InputError, match="w: got"):
            RLGuider(w=w)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="without adapters"), rl_guidance(stock("sd15")):
        pass
    twice = rl_guidance(stock("sd15"), unet(1), 2)
    with rl_guidance(stock("sd15"), unet(1), 2), pytest.raises(InputError, match="not under RL guidance yet"), twice:
        pass
    assert "_diffusers_hook" not in stock("sd15").unet.__dict__


def test_a_guider_in_a_modular_pipeline(tmp_path: Path) -> None:
    parts = sdxl().components
    blocks = diffusers.StableDiffusionXLAutoBlocks().get_workflow("text2image")
    modular = blocks.init_pipeline()
    modular.set_progress_bar_config(disable=True)
    wanted = {name: part for name, part in parts.items() if name in modular.component_names and part is not None}
    modular.update_components(**wanted)
    tuned = unet(
        1,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        use_linear_projection=True,
    )

    def run(guider: Any) -> Tensor:
        modular.update_components(guider=guider)
        return modular(
            prompt="a cat",
            num_inference_steps=3,
            generator=generator(),
            output_type="latent",
            height=16,
            width=16,
            output="latents",
        )

    plain = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
    base = run(plain)
    assert torch.equal(run(RLGuider(w=0, guidance_scale=2.0, tuned=tuned)), base)
    modular.update_components(unet=tuned)
    goal = run(plain)
    modular.update_components(unet=parts["unet"])
    assert torch.equal(run(RLGuider(w=1, guidance_scale=2.0, tuned=tuned)), goal)
    mixed = run(RLGuider(w=1.5, guidance_scale=2.0, tuned=tuned))
    with rl_guidance(modular, tuned, 1.5):
        hooked = run(plain)
    assert gap(mixed, hooked) < 1e-4 and gap(mixed, base) > 1e-2 and gap(mixed, goal) > 1e-2
    late = run(RLGuider(w=3.0, guidance_scale=2.0, start=0.99, tuned=tuned))
    assert gap(late, goal) > 0 or torch.equal(late, goal)
    RLGuider(w=1.3, guidance_scale=4.0, stop=0.5).save_pretrained(tmp_path)
    again = RLGuider.from_pretrained(tmp_path)
    assert (again.w, again.guidance_scale, again._stop, again.tuned) == (1.3, 4.0, 0.5, None)
    assert again.new(w=2.0).w == 2.0

"""Tuned diffusion policies: losses and gradients against closed forms, runs on tiny networks, folders, stop and resume.

Everything is random and tiny; nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import seeded
from torch import Tensor, nn

import steer
from steer.adapters.diffusers.loading import load
from steer.adapters.diffusers.model import DiffusionModel
from steer.adapters.diffusers.network import NetworkSource
from steer.adapters.diffusers.policy.network import fingerprint
from steer.adapters.diffusers.policy.tuning import load_diffusion_policy, train_diffusion_policy
from steer.core import InputError, Prompt, Reward, RewardError, Samples, SteerError, UnsupportedError
from steer.diffusion import DiffusionProcess, Schedule
from steer.rewards import as_reward
from steer.train.diffusion_policy import offline
from steer.train.diffusion_policy.inputs import DiffusionPolicySettings, Pair, Tunable
from steer.train.diffusion_policy.losses import (
    advantages,
    clipped_objective,
    dpo_loss,
    errors,
    seppo_loss,
    spreads,
)
from steer.train.diffusion_policy.offline import Offline
from steer.train.diffusion_policy.online import Online
from steer.train.diffusion_policy.samples import draw_rows, rank_pairs, roll_out
from steer.train.diffusion_policy.tuning import tune
from steer.train.objectives.advantages import leave_one_out
from steer.train.policy_folder import read_policy_card

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


# ---------------------------------------------------------------------------------------------- a chain in closed form


class Linear(Reward):
    """`slope` times the only number of a row."""

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def score(self, samples: Samples) -> Tensor:
        return self.slope * samples.outputs.flatten(1).sum(1)


class Gaussian(nn.Module):
    """Denoiser of rows `[N, 1]` with the law N(0, 1), whose x0-hat is off by a learnable shift."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.schedule = schedule

    def encode(self, prompts: Sequence[Prompt]) -> Any:
        return None

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 1, generator=generator, dtype=torch.float64)

    def predict(self, x: Tensor, step: int, group: Tensor, encoded: Any) -> Tensor:
        alpha, sigma = self.schedule.alpha[step], self.schedule.sigma[step]
        return x * (alpha / (alpha**2 + sigma**2)) + self.shift

    def decode(self, x: Tensor) -> Tensor:
        return x

    def preview(self, x0: Tensor) -> Tensor:
        return x0

    def show(self, prompt: Prompt) -> Any:
        return prompt


ALPHA = (0.1, 0.5, 0.8, 0.95)
SCHEDULE = Schedule.between(ALPHA, [math.sqrt(1 - a * a) for a in ALPHA])


def gaussian() -> Tunable:
    """A policy over three steps, all of them with noise."""
    module = Gaussian(SCHEDULE)
    process = DiffusionProcess(module, SCHEDULE)
    return Tunable(module, process, process)


def settings(**given: Any) -> DiffusionPolicySettings:
    always = {"method": "pg", "beta": 1.0, "learning_rate": 1e-2, "steps": 1, "max_batch": 4096}
    return DiffusionPolicySettings(**{**always, **given})


def test_the_gradient_of_an_update_is_reinforce() -> None:
    policy, base = gaussian(), gaussian()
    with torch.no_grad():
        policy.module.shift.fill_(0.1)
    chosen = settings(beta=0.0, group_size=32, max_batch=7)
    tuner = Online(policy, base, chosen, ["a", "b"], Linear(2.0))
    tuner.backward(0)
    found = policy.module.shift.grad.clone()

    rolled = tuner.rollout
    assert rolled is not None
    policy.module.shift.grad = None
    reward = rolled.reward.view(2, 32)
    weight = torch.zeros(64, dtype=torch.float64)
    for i in range(64):
        mine, other = torch.arange(32) + i // 32 * 32, torch.arange(32) + (1 - i // 32) * 32
        rest, whole = reward.flatten()[mine[mine != i]], reward.flatten()[other]
        squares = (rest - rest.mean()).square().sum() + (whole - whole.mean()).square().sum()
        weight[i] = (reward.flatten()[i] - rest.mean()) / (squares / (30 + 31)).sqrt()
    log_prob = 0.0
    for i, std in enumerate(SCHEDULE.std):
        x = rolled.x[i]
        mean = SCHEDULE.mean(x, policy.module.predict(x, i, rolled.group, None), i)
        log_prob = log_prob + torch.distributions.Normal(mean, std).log_prob(rolled.x[i + 1]).sum(1)
    (-(weight * log_prob).mean()).backward()
    torch.testing.assert_close(found, policy.module.shift.grad, rtol=1e-10, atol=0)


def test_pg_converges_to_the_optimum_under_the_kl() -> None:
    slope, beta = 1.0, 2.0
    # The shift moves a step's mean by its leverage, and the mean of later states by what the kernels carry on.
    leverage = [SCHEDULE.leverage(i) for i in range(3)]
    carried = 0.0
    for i in range(3):
        alpha, sigma = ALPHA[i], SCHEDULE.sigma[i]
        slide = SCHEDULE.noise[i] / sigma + leverage[i] * alpha / (alpha**2 + sigma**2)
        carried = slide * carried + leverage[i]
    wanted = slope * carried / (beta * sum((c / s) ** 2 for c, s in zip(leverage, SCHEDULE.std, strict=True)))

    policy, base = gaussian(), gaussian()
    chosen = settings(beta=beta, group_size=512, rounds=150, learning_rate=0.02, ema=0.97)
    seen = tune(policy, base, chosen, prompts=["a"], reward=Linear(slope))
    assert policy.module.shift.item() == pytest.approx(wanted, abs=0.1 * wanted)
    assert base.module.shift.item() == 0
    half = 0.5 * sum((c / s) ** 2 for c, s in zip(leverage, SCHEDULE.std, strict=True)) * wanted**2
    assert sum(seen["kl"][-20:]) / 20 == pytest.approx(half, rel=0.25)


class Gain(Gaussian):
    """A learnable share of x in x0-hat, so that the KL of a step depends on the steps before it."""

    def predict(self, x: Tensor, step: int, group: Tensor, encoded: Any) -> Tensor:
        return super().predict(x, step, group, encoded) - self.shift + self.shift * x


def test_the_gradient_is_that_of_reward_less_kl() -> None:
    beta, share = 3.0, 0.15
    wanted = torch.tensor(share, dtype=torch.float64, requires_grad=True)
    variance, kl = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i, std in enumerate(SCHEDULE.std):
        alpha, sigma, leverage = ALPHA[i], SCHEDULE.sigma[i], SCHEDULE.leverage(i)
        kl = kl + (leverage * wanted) ** 2 * variance / (2 * std**2)
        slide = SCHEDULE.noise[i] / sigma + leverage * (alpha / (alpha**2 + sigma**2) + wanted)
        variance = slide**2 * variance + std**2
    (1.0 * variance - beta * kl).backward()

    def square(outputs: Tensor) -> Tensor:
        return outputs.square().sum(1)

    found = []
    for seed in range(8):
        modules = Gain(SCHEDULE), Gain(SCHEDULE)
        policy, base = (Tunable(m, *[DiffusionProcess(m, SCHEDULE)] * 2) for m in modules)
        with torch.no_grad():
            modules[0].shift.fill_(share)
        chosen = settings(beta=beta, group_size=40_000, seed=seed, max_batch=40_000)
        tuner = Online(policy, base, chosen, ["a"], as_reward(square))
        tuner.backward(0)
        found.append(-modules[0].shift.grad.item() * tuner.scale[0].item())
    error = torch.tensor(found).std().item() / 8**0.5
    assert error < 0.05 * abs(wanted.grad.item())
    assert sum(found) / 8 == pytest.approx(wanted.grad.item(), abs=4 * error)


class Step(Gaussian):
    """One step from anywhere to N(shift, 1), a shift for each prompt."""

    def __init__(self, prompts: int) -> None:
        super().__init__(Schedule((0.0, 1.0), (1.0, 0.0), (1.0,), (0.0,), (1.0,)))
        self.shift = nn.Parameter(torch.zeros(prompts, dtype=torch.float64))

    def encode(self, prompts: Sequence[Prompt]) -> Any:
        return torch.tensor([int(p) for p in prompts])

    def predict(self, x: Tensor, step: int, group: Tensor, encoded: Any) -> Tensor:
        return self.shift[encoded[group] % len(self.shift)].unsqueeze(1).expand(x.shape)


def step(prompts: int = 1) -> Tunable:
    module = Step(prompts)
    return Tunable(module, *[DiffusionProcess(module, module.schedule)] * 2)


def mean_gradient(slope: float, beta: float, rounds: int, prompts: int = 1, **given: Any) -> tuple[Tensor, Tensor]:
    """Mean over seeds of the gradient at the optimum, slope / beta, in units of what moving the shift by as much does
    to it, and its standard error; both `[prompts]`.
    """
    policy, base = step(prompts), step(prompts)
    found = []
    for seed in range(rounds):
        with torch.no_grad():
            policy.module.shift.fill_(slope / beta)
        policy.module.shift.grad = None
        chosen = settings(beta=beta, seed=seed, batch_size=given["count"], **given["more"])
        tuner = Online(policy, base, chosen, [str(i) for i in range(given["count"])], Linear(slope))
        tuner.spreads = [1.5 * abs(slope)] * 3
        tuner.backward(0)
        found.append(policy.module.shift.grad * tuner.scale.mean() * prompts / slope)
    seen = torch.stack(found)
    return seen.mean(0), seen.std(0) / rounds**0.5


@pytest.mark.parametrize(
    ("group_size", "count", "slope", "beta", "prompts"),
    [(2, 4, 0.8, 1.0, 1), (4, 2, -2.0, 0.5, 1), (8, 1, 0.8, 1.0, 1), (3, 4, 30.0, 4.0, 2), (64, 1, 0.01, 0.1, 1)],
)
def test_the_optimum_does_not_depend_on_the_group_size(
    group_size: int, count: int, slope: float, beta: float, prompts: int
) -> None:
    rounds = 600 if group_size < 64 else 80
    off, error = mean_gradient(slope, beta, rounds, prompts, count=count, more={"group_size": group_size})
    assert bool((off.abs() < 5 * error).all()) and float(error.max()) < 0.04


@pytest.mark.parametrize(("group_size", "share"), [(4, 1 / 2), (8, 3 / 4)])
def test_grpos_own_form_counts_the_kl_for_more(group_size: int, share: float) -> None:
    """Rewards are normal, so the mean of 1 / deviation is known: the KL weighs n / (n - 2) of what the gain weighs."""
    policy, base, found = step(), step(), []
    for seed in range(600):
        with torch.no_grad():
            policy.module.shift.fill_(0.8 * share)
        policy.module.shift.grad = None
        chosen = settings(group_size=group_size, seed=seed, advantage="grpo", batch_size=4)
        Online(policy, base, chosen, ["0", "1", "2", "3"], Linear(0.8)).backward(0)
        found.append(policy.module.shift.grad.item())
    seen = torch.tensor(found)
    assert abs(float(seen.mean())) < 5 * float(seen.std()) / 600**0.5


@pytest.mark.parametrize(("group_size", "slope", "beta"), [(2, 0.8, 1.0), (4, 1.5, 3.0), (8, -0.8, 0.5)])
def test_pg_ends_at_the_optimum(group_size: int, slope: float, beta: float) -> None:
    """Bounds: 3 % of the optimum, and 5 standard errors of the mean of the last half, by its ten blocks."""
    policy, base, count = step(), step(), 1024 // group_size
    prompts, wanted = [str(i) for i in range(count)], slope / beta
    path: list[float] = []

    class Watched(Linear):
        def score(self, samples: Samples) -> Tensor:
            path.append(policy.module.shift.item())
            return super().score(samples)

    chosen = settings(beta=beta, group_size=group_size, batch_size=count, rounds=300, learning_rate=0.03 * abs(wanted))
    tune(policy, base, chosen, prompts=prompts, reward=Watched(slope))
    blocks = torch.tensor(path[150:]).view(10, -1).mean(1)
    error = 5 * float(blocks.std()) / 10**0.5
    assert float(blocks.mean()) == pytest.approx(wanted, abs=0.03 * abs(wanted) + error)
    assert error < 0.06 * abs(wanted)


def test_scales_leave_out_the_row_that_they_divide() -> None:
    drawn = torch.Generator().manual_seed(0)
    reward, group = torch.randn(9, generator=drawn).double(), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    found, spread = spreads(reward, group, [3.0, 2.0])

    def squares(rows: Tensor) -> float:
        parts = [reward[rows & (group == g)] for g in range(3)]
        return sum(float((x - x.mean()).square().sum()) for x in parts)

    every = torch.ones(9, dtype=torch.bool)
    assert spread == pytest.approx((squares(every) / 6) ** 0.5)
    before, weight = 6 * (0.81 * 9 + 0.9 * 4), 1 + 0.9 + 0.81
    for i in range(9):
        rest = every.clone()
        rest[i] = False
        assert float(found[i]) == pytest.approx(((squares(rest) + before) / (6 * weight - 1)) ** 0.5)
    pair = torch.tensor([1.0, 5.0])
    assert spreads(pair, torch.zeros(2).long())[0].tolist() == [1, 1]
    assert leave_one_out(pair[None], torch.zeros(2).long()).tolist() == [[-4, 4]]
    assert spreads(torch.full((4,), 2.0), torch.zeros(4).long())[0].tolist() == [1] * 4


def test_share_of_the_steps_is_unbiased() -> None:
    policy, base = gaussian(), gaussian()
    whole = Online(policy, base, settings(group_size=16), ["a"], Linear(1.0))
    whole.backward(0)
    wanted = float(policy.module.shift.grad)
    part = Online(policy, base, settings(group_size=16, share=0.3, steps=90), ["a"], Linear(1.0))
    found = []
    for step in range(90):
        policy.module.shift.grad = None
        part.backward(step)
        found.append(float(policy.module.shift.grad))
    assert len({round(x, 9) for x in found}) == 3
    assert sum(found) / 90 == pytest.approx(wanted, abs=3 * float(torch.tensor(found).std()) / 90**0.5)


def test_a_chain_keeps_its_log_densities_and_kl() -> None:
    policy, base = gaussian(), gaussian()
    with torch.no_grad():
        policy.module.shift.fill_(0.3)
    found = roll_out(policy.chain, base.chain, ["a"], 8, Linear(1.0), 0)
    for i, std in enumerate(SCHEDULE.std):
        pushed = SCHEDULE.leverage(i) * 0.3
        torch.testing.assert_close(found.kl[i], torch.full((8,), pushed**2 / (2 * std**2)).double())
    assert found.log_prob.shape == (3, 8) and bool((found.log_prob <= 0).all())


def mean_of(tunable: Tunable) -> float:
    return draw_rows(tunable.chain, ["a"], 400, 1).x.mean().item()


def test_dpo_on_own_samples_moves_the_law() -> None:
    policy, base = gaussian(), gaussian()
    pairs = rank_pairs(base.chain, ["a"] * 96, 4, Linear(1.0), 0)
    assert len(pairs) == 96 and all(pair.chosen > pair.rejected for pair in pairs)
    seen = tune(policy, base, settings(method="dpo", beta=20.0, steps=60, batch_size=32), pairs=pairs)
    assert base.module.shift.item() == 0
    assert mean_of(policy) > mean_of(base) + 0.3
    assert sum(seen["accuracy"][-20:]) / 20 > 0.8


def test_seppo_follows_winners_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "REFRESH", 10)
    policy, base, earlier = gaussian(), gaussian(), gaussian()
    drawn = torch.Generator().manual_seed(0)
    pairs = [Pair("a", 2.5 + 0.3 * torch.randn(1, generator=drawn).double()) for _ in range(96)]
    tune(policy, base, settings(method="seppo", beta=20.0, steps=60, batch_size=32), pairs=pairs, earlier=earlier)
    assert base.module.shift.item() == 0
    assert earlier.module.shift.item() > 0
    assert mean_of(policy) > mean_of(base) + 0.3


# ---------------------------------------------------------------------------------------------------------- formulas


def test_dpo_loss_on_known_numbers() -> None:
    given = [torch.tensor([x]).double() for x in (0.10, 0.15, 0.12, 0.13)]
    assert float(dpo_loss(*given, 50.0)) == pytest.approx(0.313262, abs=1e-6)
    assert 0 <= float(dpo_loss(*given, 5000.0)) < 1e-40
    far = [x.float().requires_grad_() for x in given]
    loss = dpo_loss(*far, 5000.0)
    loss.sum().backward()
    assert float(loss.detach()) < 1e-40 and all(bool(x.grad.isfinite().all()) for x in far)
    swapped = dpo_loss(given[1], given[0], given[3], given[2], 5000.0)
    assert float(swapped) == pytest.approx(100.0)


def test_seppo_pushes_away_only_what_the_policy_has_outgrown() -> None:
    winner, loser = torch.tensor([0.10, 0.14]), torch.tensor([0.15, 0.15], requires_grad=True)
    reference = torch.tensor([0.12, 0.12]), torch.tensor([0.13, 0.13])
    loss = seppo_loss(winner, loser, *reference, 50.0)
    assert loss[0].item() == pytest.approx(0.313262, abs=1e-6)
    assert loss[1].item() == pytest.approx(math.log1p(math.exp(25 * 0.04)), abs=1e-5)
    loss.sum().backward()
    assert loser.grad[0] < 0 < loser.grad[1]


def test_advantages_by_group() -> None:
    group, reward = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1.0, 3, 10, 30, 5, 5]).double()
    found, scale = advantages("grpo", reward[None], reward, group)
    assert found.tolist() == [[-1, 1, -1, 1, 0, 0]]
    assert scale.tolist() == [1, 1, 10, 10, 1, 1]
    found, scale = advantages("batch-std", reward[None], reward, group)
    std = statistics.stdev(reward.tolist())
    assert scale.tolist() == pytest.approx([std] * 6)
    assert found[0].tolist() == pytest.approx([-1 / std, 1 / std, -10 / std, 10 / std, 0, 0])
    same = torch.full((6,), 2.0).double()
    assert advantages("batch-std", same[None], same, group)[0].tolist() == [[0] * 6]


def test_clipping_holds_back_only_gains() -> None:
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5]).requires_grad_()
    clipped_objective(log_ratio, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2).sum().backward()
    assert [bool(x) for x in log_ratio.grad] == [False, True, True, False]


def test_errors_are_those_of_the_noise() -> None:
    tunable = gaussian()
    x0, noise = torch.randn(6, 1).double(), torch.randn(6, 1).double()
    level = torch.tensor([0, 1, 2, 0, 1, 2])
    found = errors(tunable.levels, x0, noise, level, torch.zeros(6).long(), None)
    for i, at in enumerate(level.tolist()):
        x = SCHEDULE.alpha[at] * x0[i] + SCHEDULE.sigma[at] * noise[i]
        hat = SCHEDULE.noise_hat(x, tunable.module.predict(x, at, level, None), at)
        assert found[i].item() == pytest.approx(((hat - noise[i]) ** 2).item(), rel=1e-9)


# ---------------------------------------------------------------------------------------------------- tiny networks


def tiny(classes: int | None = None) -> DiffusionModel:
    """A random UNet of grey 8x8 images with a scheduler of 20 levels."""
    network = seeded(
        lambda: UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=4,
            attention_head_dim=4,
            num_class_embeds=classes,
        )
    )
    scheduler = DDIMScheduler(num_train_timesteps=20, clip_sample=False, timestep_spacing="trailing")
    names = None if classes is None else [f"c{i}" for i in range(classes - 1)]
    return load(network.requires_grad_(False), scheduler=scheduler, classes=names, name="tiny")


FAST: dict[str, Any] = {"num_steps": 4, "measured": 64, "group_size": 8}
RUNS: dict[str, dict[str, Any]] = {
    "pg": {"rounds": 5, "steps": 2, "learning_rate": 8e-3, "beta": 0.001, "group_size": 32},
    "dpo": {"steps": 23, "learning_rate": 1e-3, "beta": 100.0},
    "seppo": {"steps": 23, "learning_rate": 1e-3, "beta": 100.0},
}


def weights(network: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", RUNS)
def test_every_method_raises_what_it_looks_at(method: str, tmp_path: Path) -> None:
    model = tiny(4)
    before = weights(model.source.network)
    prompts = ["c0", "c1", ""] * (1 if method == "pg" else 6)
    out = train_diffusion_policy(
        model, prompts, method=method, out=tmp_path / "out", reward="brightness", **{**FAST, **RUNS[method]}
    )
    assert same(before, weights(model.source.network))
    card = read_policy_card(out)
    if method == "pg":
        spread = card.metrics["reward_before_se"] + card.metrics["reward_after_se"]
        assert card.metrics["reward_after"] > card.metrics["reward_before"] + 2 * spread
    else:
        assert sum(card.metrics["accuracy"][-5:]) / 5 > 0.5
    assert card.recipe["method"] == method and card.recipe["reward"] == "brightness" and card.data["rows"]
    assert card.model["fingerprint"] == fingerprint(model.source.network)
    loaded = load(out)
    described = json.loads((out / "MODEL_CARD.json").read_text())
    assert described["policy"]["recipe"] == card.recipe and loaded.classes == ["c0", "c1", "c2"]
    tuned, policy = model.tuned(out), load_diffusion_policy(model, out)
    assert policy.name == "tiny+out"
    drawn = [m.generate(["c1", ""], n=2, seed=3, steps=4).outputs for m in (loaded, tuned, policy)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], model.generate(["c1", ""], n=2, seed=3, steps=4).outputs)


def test_lora_leaves_the_rest_alone(tmp_path: Path) -> None:
    model = tiny()
    before = weights(model.source.network)
    given = {**FAST, **RUNS["pg"], "lora_rank": 2, "learning_rate": 2e-2}
    out = train_diffusion_policy(model, ["x"], method="pg", out=tmp_path / "out", reward="brightness", **given)
    assert same(before, weights(model.source.network))
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "steer.json"]
    card = read_policy_card(out)
    assert card.settings == {"form": "lora"} and card.recipe["lora_alpha"] == 4
    assert card.metrics["reward_after"] > card.metrics["reward_before"]
    tuned = load_diffusion_policy(model, out)
    changed = {k for k, v in weights(tuned.source.network).items() if not torch.equal(v, before[k])}
    assert changed and all(k.endswith(".weight") for k in changed)
    some = {**given, "lora_targets": "to_q,conv1", "rounds": 1}
    out = train_diffusion_policy(model, ["x"], method="pg", out=tmp_path / "some", reward="brightness", **some)
    names = {k.split(".lora_")[0] for k in load_file(out / "adapter_model.safetensors")}
    assert all(n.endswith(("to_q", "conv1")) for n in names)


def rows(count: int = 4) -> list[dict[str, Any]]:
    drawn = torch.Generator().manual_seed(0)
    light = 0.5 + 0.5 * torch.rand(count, 1, 8, 8, generator=drawn)
    return [{"prompt": "", "chosen": x, "rejected": 1 - x} for x in light]


def test_given_pairs_and_files(tmp_path: Path) -> None:
    model, data = tiny(4), rows()
    folder = tmp_path / "pairs"
    folder.mkdir()
    lines = []
    for i, row in enumerate(data):
        line = {"prompt": row["prompt"]}
        for column in ("chosen", "rejected"):
            pixels = (row[column][0] * 255).round().to(torch.uint8)
            row[column] = pixels[None].float() / 255
            Image.fromarray(pixels.numpy()).save(folder / f"{column}{i}.png")
            line[column] = f"{column}{i}.png"
        lines.append(json.dumps(line))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    given = {**FAST, **RUNS["dpo"], "method": "dpo", "steps": 12, "batch_size": 4}
    first = train_diffusion_policy(model, data, out=tmp_path / "a", **given)
    second = train_diffusion_policy(model, folder, out=tmp_path / "b", **given)
    assert same(weights(load(first).source.network), weights(load(second).source.network))
    a, b = read_policy_card(first), read_policy_card(second)
    assert a.data == b.data and a.data["rows"] == 4
    assert a.metrics["loss"][-1] < math.log(2) and a.metrics["accuracy"][-1] > 0.5
    third = train_diffusion_policy(model, folder, out=tmp_path / "c", **{**given, "method": "seppo"})
    assert read_policy_card(third).recipe["method"] == "seppo"


class Stop(BaseException):
    """A run that is stopped."""


@pytest.mark.parametrize(("method", "rank"), [("pg", 0), ("dpo", 0), ("seppo", 2)])
def test_stopped_and_restarted_is_bit_equal(
    method: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(4)
    monkeypatch.setattr(offline, "REFRESH", 4)
    monkeypatch.setattr(offline, "BUFFER", 3)
    given = {**FAST, **RUNS[method], "lora_rank": rank, "ema": 0.5, "seed": 5, "group_size": 4, "measured": 0}
    given |= {"rounds": 3} if method == "pg" else {"steps": 15}
    prompts = ["c0", "c1"] * 4

    def run(out: Path, work: Path | None) -> dict[str, Tensor]:
        done = train_diffusion_policy(
            model, prompts, method=method, out=out, reward="brightness", work=work, **{**given, "batch_size": 3}
        )
        return weights(load_diffusion_policy(model, done).source.network)

    wanted = run(tmp_path / "whole", None)
    real, calls = Online.backward, [0]
    kind = Online if method == "pg" else Offline
    real = kind.backward

    def stopping(self: Any, step: int) -> dict[str, float]:
        calls[0] += 1
        if step == (3 if method == "pg" else 13):
            raise Stop
        return real(self, step)

    work = tmp_path / "work"
    monkeypatch.setattr(kind, "backward", stopping)
    with pytest.raises(Stop):
        run(tmp_path / "out", work)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(kind, "backward", real)
    assert same(run(tmp_path / "out", work), wanted)
    with pytest.raises(InputError, match="work: "):
        train_diffusion_policy(
            model,
            prompts,
            method=method,
            out=tmp_path / "other",
            reward="brightness",
            work=work,
            **{**given, "batch_size": 3, "seed": 6},
        )


def test_same_seed_same_weights_other_seed_others(tmp_path: Path) -> None:
    model, found = tiny(), []
    given = {**FAST, **RUNS["pg"], "rounds": 1, "measured": 0, "max_batch": 8}
    for i, seed in enumerate((0, 0, 1)):
        out = train_diffusion_policy(
            model, ["x"], method="pg", out=tmp_path / str(i), reward="brightness", seed=seed, **given
        )
        found.append(weights(load(out).source.network))
    assert same(found[0], found[1]) and not same(found[0], found[2])


# ------------------------------------------------------------------------------------------------------------ refusals


def call(model: DiffusionModel, out: Path, **given: Any) -> Path:
    always: dict[str, Any] = {"data": ["c0"], "method": "pg", "reward": "brightness", **FAST, "measured": 0}
    chosen = {**always, **given}
    return train_diffusion_policy(model, chosen.pop("data"), out=out, **chosen)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "ppo"}, "method: got 'ppo'; allowed: dpo, seppo, pg"),
    ({"group_size": 1}, "group_size: got 1;"),
    ({"data": []}, "data: got "),
    ({"data": ["nothing"]}, r"data\[0\]: got 'nothing'"),
    ({"beta": -1}, "beta: got -1;"),
    ({"method": "dpo", "beta": 0}, "beta: got 0"),
    ({"method": "seppo", "beta": math.nan}, "beta: got nan;"),
    ({"method": "dpo", "reward": None}, r"data\[0\]: got 'c0'; allowed: a row with prompt, chosen, rejected"),
    ({"reward": None}, "reward: got None"),
    ({"learning_rate": 0}, "learning_rate: got 0"),
    ({"share": 2}, "share: got 2"),
    ({"ema": 1}, "ema: got 1"),
    ({"steps": 0}, "steps: got 0"),
    ({"num_steps": 0}, "steps: got 0"),
    ({"eta": 2}, "eta: got 2"),
    ({"kind": "flow-sde"}, "kind: got "),
    ({"guidance_scale": math.inf}, "guidance_scale: got inf"),
    ({"lora_rank": -1}, "lora_rank: got -1"),
    ({"lora_rank": 2, "lora_alpha": 0}, "lora_alpha: got 0"),
    ({"lora_rank": 2, "lora_targets": "nowhere"}, "lora_targets: got 'nowhere'"),
    ({"measured": -1}, "measured: got -1"),
    ({"max_batch": 0}, "max_batch: got 0"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_settings_are_refused_in_one_line(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(tiny(4), tmp_path / "out", **given)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": 1}, r"data\[0\].prompt"),
        ({"prompt": "", "chosen": torch.zeros(1, 8, 8)}, r"data\[0\].rejected"),
        ({"prompt": "", "chosen": torch.zeros(3, 8, 8), "rejected": torch.zeros(1, 8, 8)}, r"data\[0\].chosen"),
        ({"prompt": "", "chosen": torch.zeros(1, 8, 8), "rejected": torch.full((1, 8, 8), 2.0)}, r"\[0, 1\]"),
        ({"prompt": "", "chosen": "nowhere.png", "rejected": "nowhere.png"}, "no such file"),
    ],
)
def test_bad_rows_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        call(tiny(4), tmp_path / "out", method="dpo", reward=None, data=[row])
    with pytest.raises(InputError, match=r"pairs.jsonl"):
        call(tiny(4), tmp_path / "out", method="dpo", reward=None, data=tmp_path)


def test_bad_rewards_are_named(tmp_path: Path) -> None:
    for score, message in (
        (lambda images: torch.full((len(images),), math.nan), "NaN"),
        (lambda images: torch.full((len(images),), -math.inf), "-inf"),
        (lambda images: torch.zeros(len(images), 2), "shape"),
    ):
        with pytest.raises(RewardError, match=message):
            call(tiny(4), tmp_path / "out", reward=score)
    flat = {"reward": lambda images: torch.zeros(len(images)), "method": "dpo"}
    with pytest.raises(InputError, match="the same on all samples"):
        call(tiny(4), tmp_path / "out", **flat)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_tuned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="use eta above 0"):
        call(tiny(4), tmp_path / "out", eta=0.0)
    with pytest.raises(UnsupportedError, match="without gradients"):
        from tiny_pipelines import sd15

        call(load(sd15()), tmp_path / "out", data=["a"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    for given in ({"out": other}, {"out": other / "mine.txt"}, {"out": tmp_path / "out", "work": other}):
        with pytest.raises(InputError):
            call(tiny(4), **given)
    with pytest.raises(SteerError, match="lower learning_rate"):
        call(tiny(4), tmp_path / "out", learning_rate=1e30, rounds=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def test_policies_of_other_models_are_refused(tmp_path: Path) -> None:
    model = tiny(4)
    out = call(model, tmp_path / "out", rounds=1)
    assert call(model, out, rounds=1) == out
    with pytest.raises(InputError, match="tuned from tiny"):
        load_diffusion_policy(tiny(5), out)
    with pytest.raises(InputError, match=r"no steer.json"):
        load_diffusion_policy(model, tmp_path)
    assert isinstance(load_diffusion_policy(model, out).source, NetworkSource)
    assert steer.load(out).classes == model.classes

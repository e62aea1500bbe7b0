"""Tuned diffusion policies: Diffusion-DPO, SePPO and policy gradients on networks of diffusers, whole or as LoRA
(PEFT).

A policy is a folder with a card, `steer.json`, that says which model it was tuned from and how. A whole network lies in
`unet/` (or `transformer/`), with scheduler and classifier beside it, so that `steer.load` takes the folder for a model;
a LoRA lies there in PEFT's layout. `DiffusionModel.tuned` takes either. The losses are in
`steer.train.diffusion_policy`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steer.adapters.diffusers import CARD_NAME, DiffusionModel, NetworkDenoiser, NetworkSource
from steer.artifacts import Card, data_hash, replacing
from steer.core import Ability, InputError, Prompt, Reward, SteerError, UnsupportedError, check
from steer.diffusion import DiffusionProcess
from steer.models import resolve
from steer.progress import ticking
from steer.rewards import as_reward
from steer.rewards.convnet import load_net, read_facts, save_net
from steer.train.diffusion_policy import METHODS, Pair, PolicySettings, Tunable, draw_rows, rank_pairs, tune
from steer.train.folders import CARD, check_target, claim, read_policy_card, replacing_folder, thinned

__all__ = ["METHODS", "fingerprint", "load_diffusion_policy", "read_policy_card", "train_diffusion_policy"]

PAIRS = "pairs.jsonl"
_ADAPTER, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BETAS = {"dpo": 5000.0, "seppo": 5000.0, "pg": 1.0}
_RATES = {"dpo": 1e-5, "seppo": 1e-5, "pg": 3e-5}
"""Learning rates where all weights are tuned; ten times as much for LoRA."""
_STEPS = {"dpo": 200, "seppo": 200, "pg": 2}
_LEVELS = 200
"""Noise levels that dpo and seppo draw from, evenly spread over those that the network knows."""
_TARGETS = "all, all-linear, attention"
_MEASURED = 10**6
"""Number in place of an update's in the seed of the samples on which a reward is measured."""


def train_diffusion_policy(
    model: DiffusionModel,
    data: Sequence[Any] | Path | str,
    *,
    method: str,
    out: Path | str,
    reward: Reward | str | Callable[..., Any] | None = None,
    beta: float | None = None,
    lora_rank: int = 0,
    lora_alpha: int | None = None,
    lora_targets: str = "all",
    learning_rate: float | None = None,
    steps: int | None = None,
    rounds: int = 20,
    batch_size: int = 8,
    group_size: int = 8,
    num_steps: int = 25,
    eta: float = 1.0,
    guidance_scale: float | None = None,
    kind: str | None = None,
    clip_range: float = 0.2,
    share: float = 1.0,
    ema: float = 0.0,
    measured: int = 64,
    max_batch: int = 64,
    seed: int = 0,
    work: Path | str | None = None,
    progress: bool = False,
) -> Path:
    """Tune a diffusion model and write it to the folder `out`; `model` itself is not changed.

    Args:
        model: a network with its scheduler, from `steer.load`; a pipeline is refused.
        data: prompts for a reward; without one, rows `{"prompt", "chosen", "rejected"}` (dpo) or `{"prompt", "chosen"}`
            (seppo) whose images are tensors `[C, H, W]` in [0, 1] or paths of image files, or a folder with such rows
            in `pairs.jsonl`. With a reward, dpo and seppo make them of the base's own samples: for each prompt the best
            and the worst of `group_size`; a prompt that is there several times gives as many.
        method: "dpo" (Diffusion-DPO), "seppo", or "pg" (policy gradient on the stochastic chain, clipped as in PPO).
        out: folder; an older policy there is replaced in one step, anything else is refused.
        reward: what is raised; pg needs one. One that looks at a model looks at `model`.
        beta: of dpo and seppo, with the number of noise levels folded in (default 5000); of pg the KL coefficient in
            reward for each nat (default 1), 0 is off.
        lora_rank: 0 tunes all weights. lora_alpha: default twice the rank. lora_targets: "all" (linear layers and
            convolutions), "all-linear", "attention", or names of modules joined by commas.
        learning_rate: default by method.
        steps: updates (default 200); for pg those on every round of samples (default 2).
        rounds: of samples, for pg.
        batch_size: pairs of an update; for pg prompts of a round.
        group_size: samples for each prompt.
        num_steps, eta, guidance_scale, kind: of the chain that samples are drawn by, see `DiffusionModel.process`.
            dpo and seppo tune all noise levels, pg the steps of this chain.
        clip_range, share: of pg: ratios beyond 1 +- `clip_range` bring no more; share of a chain's steps in an update.
        ema: decay of a moving average of the weights, which is then the policy; 0 is off.
        measured: samples on which the reward is measured before and after; 0 is none.
        max_batch: rows put through the network at once.
        work: folder for checkpoints and samples; a run that stopped goes on from there to the same weights.

    Raises:
        InputError: a bad setting, row, reward or folder; nothing has been trained.
        RewardError: scores that are not finite numbers, one for each sample.
        UnsupportedError: pg on a chain without noise; a pipeline.
        SteerError: PEFT is missing, or the loss is no longer finite.
    """
    check(method in METHODS, "method", method, ", ".join(METHODS))
    check(_whole(lora_rank) and lora_rank >= 0, "lora_rank", lora_rank, "an integer of 0 (all weights) or more")
    settings = PolicySettings(
        method=method,
        beta=_BETAS[method] if beta is None else beta,
        learning_rate=_RATES[method] * (10 if lora_rank else 1) if learning_rate is None else learning_rate,
        steps=_STEPS[method] if steps is None else steps,
        rounds=rounds, batch_size=batch_size, group_size=group_size, clip_range=clip_range, share=share, ema=ema,
        seed=seed,
    )  # fmt: skip
    lora = None if lora_rank == 0 else _Lora.create(lora_rank, lora_alpha, lora_targets)
    check(_whole(measured) and measured >= 0, "measured", measured, "an integer of 0 or more")
    check(_whole(max_batch) and max_batch >= 1, "max_batch", max_batch, "an integer of 1 or more")
    final, state = Path(out), None if work is None else Path(work)
    check_target(final)
    given = as_reward(reward)
    check(given is not None or method != "pg", "reward", None, "one, for pg")
    chain = {
        "steps": num_steps, "eta": eta, "guidance_scale": guidance_scale, "kind": kind, "max_batch": max_batch,
    }  # fmt: skip
    base = _tunable(model, chain)
    if method == "pg":
        base.chain.require(Ability.BRANCH, "train policy by pg")
    prompts, pairs, hashed, rows = _read(base, data, method, given is not None)
    bound = None if given is None else given.bind(model)
    if lora is not None:
        lora.names(_network(model))
    recipe = {
        **settings.recipe(),
        **(lora.recipe() if lora else {"lora_rank": 0}),
        "num_steps": num_steps,
        "eta": eta,
        "guidance_scale": guidance_scale,
        "kind": kind,
        **({"reward": str(given)} if given is not None else {}),
    }
    mark = fingerprint(_network(model))
    run = {**recipe, "data": hashed, "model": mark, "max_batch": max_batch}
    claim(state, run)
    metrics: dict[str, Any] = {}
    policy = _tunable(_copied(model, lora, seed), chain)
    with replacing_folder(final) as temporary:
        if bound is not None and measured:
            metrics |= _measure("before", base.chain, prompts, bound, measured, max_batch, seed)
        if bound is not None and method != "pg":
            pairs = _own_pairs(base.chain, prompts, settings, bound, max_batch, state, progress)
        history = tune(
            policy, base, settings, prompts=prompts, pairs=pairs, reward=bound if method == "pg" else None,
            earlier=_tunable(_copied(model, lora, seed), chain) if method == "seppo" else None,
            rows=max_batch, work=state, run=run, progress=progress,
        )  # fmt: skip
        _save_network(policy.module, model, temporary)
        if bound is not None and measured:
            after = _tunable(model.tuned(temporary), chain).chain
            metrics |= _measure("after", after, prompts, bound, measured, max_batch, seed)
        metrics |= {name: thinned(values) for name, values in history.items()}
        card = Card(
            kind="policy",
            model={"name": model.name, "fingerprint": mark, "model_type": type(_network(model)).__name__},
            settings={"form": "lora" if lora else "full"},
            recipe=recipe,
            data={"sha256": hashed, "rows": rows},
            metrics=metrics,
        )
        _write_json(temporary / CARD, asdict(card))
        if lora is None:
            _write_json(temporary / CARD_NAME, _model_card(model, card, final.name))
    return final


def load_diffusion_policy(base: DiffusionModel | None, folder: Path | str) -> DiffusionModel:
    """The tuned policy as a model of its own, named `base+folder`; `base` is not changed.

    Args:
        base: the model that it was tuned from; None loads it by the name on the card.
        folder: what `train_diffusion_policy` wrote.

    Raises:
        InputError: not a policy, or one tuned from another model.
    """
    path = Path(folder)
    card = read_policy_card(path)
    if base is None:
        from steer.engine import load

        base = load(card.model["name"])
    check(isinstance(base, DiffusionModel), "policy", str(path), "a policy of a diffusion model")
    ours, theirs = fingerprint(_network(base)), card.model["fingerprint"]
    given = f"{path} (tuned from {card.model.get('name')}, fingerprint {theirs})"
    check(ours == theirs, "policy", given, f"a policy tuned from {base.name} (fingerprint {ours})")
    return base.tuned(path, name=f"{base.name}+{path.name}")


def fingerprint(network: nn.Module) -> str:
    """Hash of a network's kind, of the names and shapes of its weights, and of a sample of each; 16 hexadecimal digits.

    In bf16, so that one checkpoint loaded in two precisions is one model.
    """
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        if value.device.type != "meta":
            flat = value.detach().flatten()
            digest.update(flat[:: max(1, flat.numel() // 16)].to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True, eq=False)
class _PerRow(NetworkDenoiser):
    """A denoiser that also takes a level for each row: `step` `[N]`."""

    per_row = True

    def predict(self, x: Tensor, step: Any, group: Tensor, encoded: Any) -> Tensor:
        if not isinstance(step, Tensor):
            return super().predict(x, step, group, encoded)
        grid, wide = self.grid, (-1, *[1] * (x.dim() - 1))

        def of(table: Sequence[float]) -> Tensor:
            return torch.tensor(table, dtype=x.dtype)[step].to(x.device).view(wide)

        seen, time = (x * of(grid.scale)).to(self.dtype), grid.timesteps[step].to(x.device)
        if encoded is None:
            output = self._call(seen, time)
        else:
            output = self._guided(seen, time, encoded.index[group].to(x.device), encoded.plain)
        return x * of(grid.keep) + output.to(x.dtype) * of(grid.take)


def _network(model: Any) -> Any:
    check(isinstance(model, DiffusionModel), "model", type(model).__name__, "a diffusion model, from steer.load")
    if not isinstance(model.source, NetworkSource):
        raise UnsupportedError(
            "train policy: a pipeline runs its network without gradients; load the network itself, with its scheduler"
        )
    return model.source.network


def _tunable(model: DiffusionModel, chain: dict[str, Any]) -> Tunable:
    """The model's network, as it runs in samples and at many noise levels. Raises for settings out of range."""
    network = _network(model)
    assert isinstance(model.source, NetworkSource)
    known = int(model.source.scheduler.config.num_train_timesteps)
    drawn = model.process(**chain)
    levels = model.process(steps=_LEVELS if known >= 2 * _LEVELS else known, max_batch=0)
    inner = levels.network
    assert isinstance(inner, NetworkDenoiser)
    rowwise = _PerRow(**{f.name: getattr(inner, f.name) for f in fields(NetworkDenoiser)})
    return Tunable(network, drawn, replace(levels, network=rowwise))


def _copied(model: DiffusionModel, lora: _Lora | None, seed: int) -> DiffusionModel:
    """The model with a copy of its network that can be tuned, in float32 at least."""
    network = copy.deepcopy(_network(model))
    if network.dtype in (torch.float16, torch.bfloat16):
        network = network.float()
    network.requires_grad_(lora is None)
    if lora is not None:
        network = lora.attached(network, seed)
    assert isinstance(model.source, NetworkSource)
    return replace(model, source=replace(model.source, network=network.eval()))


@dataclass(frozen=True)
class _Lora:
    rank: int
    alpha: int
    targets: str

    @classmethod
    def create(cls, rank: int, alpha: int | None, targets: str) -> _Lora:
        """With the default of `alpha`. Raises `InputError`, and `SteerError` without PEFT."""
        check(alpha is None or (_whole(alpha) and alpha >= 1), "lora_alpha", alpha, "an integer of 1 or more")
        check(isinstance(targets, str) and bool(targets.strip()), "lora_targets", targets, f"{_TARGETS}, or names")
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise SteerError("LoRA needs PEFT: pip install 'steer-engine[train]'") from error
        return cls(rank, 2 * rank if alpha is None else alpha, targets.replace(" ", ""))

    def recipe(self) -> dict[str, Any]:
        return {"lora_rank": self.rank, "lora_alpha": self.alpha, "lora_targets": self.targets}

    def names(self, network: nn.Module) -> list[str]:
        """The modules that are adapted. Raises `InputError` for a name that fits none."""
        layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        linear = [n for n, m in layers.items() if isinstance(m, nn.Linear)]
        if self.targets in ("all", "all-linear"):
            return list(layers) if self.targets == "all" else linear
        if self.targets == "attention":
            found = [n for n in linear if ".attn" in f".{n}" or ".attentions." in f".{n}"]
            check(bool(found), "lora_targets", self.targets, "all, all-linear: this network has no attention")
            return found
        found = []
        for name in self.targets.split(","):
            some = [n for n in layers if name and (n == name or n.endswith(f".{name}"))]
            check(bool(some), "lora_targets", name, f"{_TARGETS}, or names of linear layers and convolutions")
            found += some
        return sorted(set(found))

    def attached(self, network: Any, seed: int) -> Any:
        """`network` with adapters in it; they start at zero effect, from weights that the seed gives."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, target_modules=self.names(network))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(network, config)
        base = adapted.get_base_model()
        object.__setattr__(base, "steer_adapter", adapted)
        return base


# --------------------------------------------------------------------------------------------------------------- data


def _read(base: Tunable, data: Any, method: str, rewarded: bool) -> tuple[list[Prompt], list[Pair], str, int]:
    """Prompts, pairs, the hash of the data, and how many rows there were. Raises `InputError`."""
    folder = Path(data) if isinstance(data, str | Path) and not rewarded else None
    listed: Any = _listed(folder) if folder is not None else data
    check(isinstance(listed, Sequence) and not isinstance(listed, str), "data", listed, "a list of rows or prompts")
    check(len(listed) > 0, "data", listed, "at least one row")
    if rewarded:
        prompts = [row["prompt"] if isinstance(row, Mapping) and "prompt" in row else row for row in listed]
        for i, prompt in enumerate(prompts):
            _encoded(base, prompt, f"data[{i}]")
        return prompts, [], data_hash(prompts), len(prompts)
    denoiser = base.levels.denoiser
    assert isinstance(denoiser, NetworkDenoiser)
    columns = ("chosen", "rejected") if method == "dpo" else ("chosen",)
    pairs, hashed = [], []
    for i, row in enumerate(listed):
        allowed = f"a row with {', '.join(('prompt', *columns))}; prompts alone need a reward"
        check(isinstance(row, Mapping), f"data[{i}]", row, allowed)
        for column in ("prompt", *columns):
            check(column in row, f"data[{i}].{column}", "nothing", allowed)
        _encoded(base, row["prompt"], f"data[{i}].prompt")
        rows = [_as_row(row[column], denoiser, folder, f"data[{i}].{column}") for column in columns]
        pairs.append(Pair(row["prompt"], *rows))
        hashed.append([row["prompt"], *(hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in rows)])
    return [pair.prompt for pair in pairs], pairs, data_hash(hashed), len(pairs)


def _encoded(base: Tunable, prompt: Any, field: str) -> None:
    try:
        base.chain.denoiser.encode([prompt])
    except InputError as error:
        raise InputError(field, error.given, error.allowed) from error


def _listed(folder: Path) -> list[Any]:
    path = folder / PAIRS
    check(path.is_file(), "data", f"{path} (no such file)", f"a folder with {PAIRS}, or a list of rows")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError("data", f"{path} ({error})", "a JSON object on every line") from error


def _as_row(image: Any, denoiser: NetworkDenoiser, folder: Path | None, field: str) -> Tensor:
    """An image as the network sees finished rows `[C, H, W]`."""
    u = denoiser.unshuffle
    channels, height, width = denoiser.shape
    wanted = (channels // (u * u), height * u, width * u)
    allowed = f"an image, as a tensor {wanted} in [0, 1] or the path of a file"
    if isinstance(image, str | Path):
        image = _pixels((folder or Path()) / image, wanted[0], field)
    check(isinstance(image, Tensor), field, type(image).__name__, allowed)
    fits = tuple(image.shape) == wanted and image.is_floating_point()
    check(fits, field, f"a tensor {tuple(image.shape)} of {image.dtype}", allowed)
    inside = bool(image.isfinite().all()) and float(image.min()) >= 0 and float(image.max()) <= 1
    check(inside, field, "values outside [0, 1]", allowed)
    dtype = torch.promote_types(denoiser.dtype, torch.float32)
    return nn.functional.pixel_unshuffle(image.detach().cpu().to(dtype)[None] * 2 - 1, u)[0].contiguous()


def _pixels(path: Path, channels: int, field: str) -> Tensor:
    import numpy as np
    from PIL import Image

    check(path.is_file(), field, f"{path} (no such file)", "an image file")
    try:
        with Image.open(path) as image:
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32)
    except (OSError, ValueError) as error:
        raise InputError(field, f"{path} (cannot be read)", "an image file") from error
    return torch.from_numpy(array / 255).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def _own_pairs(
    process: DiffusionProcess,
    prompts: list[Prompt],
    settings: PolicySettings,
    reward: Reward,
    rows: int,
    work: Path | None,
    progress: bool,
) -> list[Pair]:
    """Best and worst of the base's own samples, kept in `work`."""
    path = None if work is None else work / "pairs.safetensors"
    if path is not None and path.is_file():
        held = load_file(path)
        parts = zip(held["prompt"].tolist(), held["chosen"], held["rejected"], strict=True)
        return [Pair(prompts[b], chosen, rejected) for b, chosen, rejected in parts]
    with ticking(progress, "drawing pairs", len(prompts)) as tick:
        pairs = rank_pairs(process, prompts, settings.group_size, reward, settings.seed, rows=rows, tick=tick)
    if path is not None:
        known = {json.dumps(prompt): b for b, prompt in enumerate(prompts)}
        tensors = {
            "prompt": torch.tensor([known[json.dumps(pair.prompt)] for pair in pairs]),
            "chosen": torch.stack([pair.chosen for pair in pairs]),
            "rejected": torch.stack([pair.rejected for pair in pairs if pair.rejected is not None]),
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary)
    return pairs


def _measure(
    when: str, process: DiffusionProcess, prompts: list[Prompt], reward: Reward, count: int, rows: int, seed: int
) -> dict[str, float]:
    """Mean reward of `count` samples, with one seed for all policies, and its standard error."""
    distinct = list({json.dumps(p): p for p in prompts}.values())[:count]
    n = max(1, count // len(distinct))
    scores: list[Tensor] = []
    for i, prompt in enumerate(distinct):
        left = n
        while left:
            some = min(left, rows)
            state = draw_rows(process, [prompt], some, (seed + 1) * _MEASURED + 1000 * i + left)
            scores.append(reward(process.decode(state)))
            left -= some
    found = torch.cat(scores)
    error = float(found.std(correction=0)) / max(1, len(found) - 1) ** 0.5
    return {f"reward_{when}": round(float(found.mean()), 5), f"reward_{when}_se": round(error, 5)}


# ------------------------------------------------------------------------------------------------------------ folders


def _save_network(network: Any, model: DiffusionModel, folder: Path) -> None:
    """Write an adapter in PEFT's layout, or a folder that `steer.load` takes, in the precision of the base."""
    for name, tensor in network.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise SteerError(f"train policy: {name} is no longer finite; lower learning_rate")
    source = model.source
    assert isinstance(source, NetworkSource)
    adapter = getattr(network, "steer_adapter", None)
    if adapter is not None:
        adapter.peft_config["default"].base_model_name_or_path = model.name
        adapter.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        # Safetensors leaves its files to their owner alone.
        shutil.copymode(folder / _ADAPTER, folder / _WEIGHTS)
        return
    inner = "transformer" if "Transformer" in type(network).__name__ else "unet"
    if network.dtype != source.dtype:
        network = network.to(source.dtype)
    network.save_pretrained(folder / inner, safe_serialization=True)
    for path in (folder / inner).glob("*.safetensors"):
        shutil.copymode(folder / inner / "config.json", path)
    source.scheduler.save_pretrained(folder / "scheduler")
    _copy_nets(model, folder)


def _copy_nets(model: DiffusionModel, folder: Path) -> None:
    """Classifier and judge of the base, if it has them."""
    origin = _origin(model)
    for name in ("classifier", "judge"):
        if origin is not None and (origin / name / "config.json").is_file():
            save_net(folder / name, load_net(origin / name), read_facts(origin / name))
        elif name == "classifier" and model.classifier is not None:
            save_net(folder / name, model.classifier.net, {"class_names": model.classifier.classes})


def _origin(model: DiffusionModel) -> Path | None:
    """The folder that the model was loaded from, where its name still says."""
    try:
        found = resolve(model.name)
    except SteerError:
        return None
    return found if isinstance(found, Path) and (found / CARD_NAME).is_file() else None


def _model_card(model: DiffusionModel, policy: Card, name: str) -> dict[str, Any]:
    """The base's card with a "policy" entry; what it says of the base's training and quality goes under "base"."""
    source, origin = model.source, _origin(model)
    assert isinstance(source, NetworkSource)
    if origin is not None:
        card = json.loads((origin / CARD_NAME).read_text(encoding="utf-8"))
    else:
        config: Any = source.network.config
        card = {
            "kind": "diffusion", "classes": model.classes or [], "null_class": source.null,
            "pixel_unshuffle": source.unshuffle, "image_channels": config.in_channels // source.unshuffle**2,
        }  # fmt: skip
    old = {key: card.pop(key) for key in ("training", "metrics", "made_with", "base", "policy") if key in card}
    return {**card, "name": name, "policy": asdict(policy), "base": {"name": model.name, **old}}


def _write_json(path: Path, entries: dict[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

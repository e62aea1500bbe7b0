"""One run of a TRL trainer on a copy of a network, resumable, quiet, and with our token ids.

TRL computes the losses and PEFT holds the adapters. What is ours: the tokens (`LanguageModel.encode` rather than
TRL's own use of the chat template), the reward, and that nothing is printed, reported or uploaded.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as library_logging

from steer.adapters.language.blocks import decoder_blocks
from steer.core import InputError, Prompt, Reward, RewardError, Samples, SteerError, check
from steer.core.errors import first_line
from steer.progress import Tick, note, untold
from steer.train.objectives.settings import PolicySettings

if TYPE_CHECKING:
    from steer.adapters.transformers.model import LanguageModel


_SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1}
"""Label smoothing, where the loss is nothing without: the values that its paper recommends."""


@dataclass(frozen=True)
class Online:
    """What methods that sample need: the prompts and what scores the samples."""

    prompts: Sequence[Prompt]
    reward: Reward


@dataclass(frozen=True)
class Fitted:
    """A tuned network (a PEFT model, or the network itself) and its history, one entry an update."""

    network: Any
    loss: list[float]
    reward: list[float]
    left_out: str = ""
    """Weights that LoRA on all linear layers does not reach."""


def require_libraries() -> None:
    """Raise where TRL or PEFT is missing."""
    try:
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise SteerError(f"train policy needs the extra train: pip install 'steer-engine[train]' ({error})") from error


def shared_copy(network: nn.Module) -> Any:
    """A network of its own modules and configuration on the very weights of `network`."""
    weights = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(x): x for x in weights})


def fit(
    model: LanguageModel,
    rows: Sequence[dict[str, Any]],
    tuning: PolicySettings,
    *,
    online: Online | None = None,
    work: Path | None = None,
    tick: Tick = untold,
) -> Fitted:
    """Tune a copy of `model`'s network on `rows` (token ids).

    With `work`, checkpoints are kept there, about ten in a run, and a run that stopped goes on from the last one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run" if work is None else work
        try:
            trainer = _trainer(model, rows, tuning, online, folder, Path(scratch), work is not None)
        except ValueError as error:
            if not tuning.lora_rank or isinstance(error, SteerError):
                raise
            raise no_adapter(model, tuning, error) from error
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Watch(tick))
        if tuning.lora_rank:
            # Otherwise PEFT asks the hub about this name whenever it saves.
            trainer.model.peft_config["default"].base_model_name_or_path = None
        left_out = told_left_out(trainer.model, tuning)
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
        log = trainer.state.log_history
        network = trainer.accelerator.unwrap_model(trainer.model)
    loss, reward = ([float(e[k]) for e in log if k in e] for k in ("loss", "reward"))
    return Fitted(network, loss, reward, left_out)


@dataclass
class _Recipe:
    """What a trainer of TRL is made of: its configuration, its arguments, and the methods that are ours."""

    settings: dict[str, Any]
    given: dict[str, Any]
    ours: dict[str, Any]


def _trainer(
    model: LanguageModel,
    rows: Sequence[dict[str, Any]],
    tuning: PolicySettings,
    online: Online | None,
    folder: Path,
    scratch: Path,
    keep: bool,
) -> Any:
    import trl
    from datasets import Dataset

    name = tuning.preset.trainer
    network, adapter = trainee(model, tuning)
    recipe = _Recipe(
        {
            **_settings(model, len(rows), tuning, folder, keep),
            "loss_type": tuning.loss,
            "report_to": "none",  # its figures go where `steer.logs.logging_to` says
        },
        {
            "model": network,
            "peft_config": adapter,
            "processing_class": copy.deepcopy(model.tokenizer),
            "train_dataset": Dataset.from_list(_columns(name, rows, tuning)),
        },
        {
            "_prepare_dataset": lambda self, dataset, *args, **kwargs: dataset,
            "_send_telemetry": lambda self: None,
            "create_model_card": lambda self, *args, **kwargs: None,
        },
    )
    if name == "SFT":
        recipe.settings |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    elif name == "GRPO":
        assert online is not None
        _add_grpo(recipe, model, rows, tuning, online, scratch)
    else:
        _add_pairs(recipe, model, tuning)
    config = getattr(trl, f"{name}Config")(**recipe.settings)
    return _adapted(getattr(trl, f"{name}Trainer"), recipe.ours)(args=config, **recipe.given)


def _add_pairs(recipe: _Recipe, model: LanguageModel, tuning: PolicySettings) -> None:
    """What DPO and KTO are told besides: their reference is the network as it was."""
    recipe.settings |= {"beta": tuning.beta, "max_length": None}
    recipe.given["ref_model"] = None if tuning.lora_rank else shared_copy(model.network)
    if tuning.method == "dpo":
        smoothing = max(_SMOOTHING.get(part, 0.0) for part in tuning.losses)
        recipe.settings |= {
            "loss_type": tuning.losses,
            "f_divergence_type": tuning.f_divergence,
            "label_smoothing": smoothing,
        }


def _add_grpo(
    recipe: _Recipe,
    model: LanguageModel,
    rows: Sequence[dict[str, Any]],
    tuning: PolicySettings,
    online: Online,
    scratch: Path,
) -> None:
    """What GRPO is told besides: our tokens, the reward, and how samples are drawn."""
    ids = [row["prompt_ids"] for row in rows]
    recipe.ours["_tokenize_prompts"] = lambda self, prompts: ([ids[int(p)] for p in prompts], None, {})
    del recipe.ours["_prepare_dataset"]
    recipe.given["reward_funcs"] = _scorer(model, online)
    size = min(tuning.batch_size, len(rows))
    recipe.settings |= {
        "beta": tuning.beta,
        "num_generations": tuning.group_size,
        "max_completion_length": tuning.max_new_tokens,
        "temperature": tuning.temperature,
        "per_device_train_batch_size": size * tuning.group_size,
        "disable_dropout": True,
        "shuffle_dataset": False,
    }
    if tuning.beta and not tuning.lora_rank:
        # This trainer loads its reference from where the configuration says that the network came from.
        model.network.save_pretrained(scratch / "reference")
        recipe.given["model"].config._name_or_path = str(scratch / "reference")


def told_left_out(network: Any, tuning: PolicySettings) -> str:
    """Weights that LoRA on all linear layers does not reach, which a line on standard error names; "" for none."""
    if not tuning.lora_rank or tuning.targets != "all-linear":
        return ""
    found = _left_out(network, decoder_blocks(network))
    note(bool(found), f"LoRA on all linear layers leaves out {found}")
    return found


def _left_out(network: Any, blocks: Any) -> str:
    """Weights of the decoder blocks that no adapter reaches, such as experts that are one tensor, with their share of
    all; "" where that is less than a twentieth.
    """
    adapted = {n.partition(".lora_")[0] for n, p in network.named_parameters() if ".lora_" in n}
    held = {id(p) for p in blocks.parameters()}
    sizes: dict[str, int] = {}
    total = missed = 0
    for name, p in network.named_parameters():
        if id(p) not in held or p.dim() < 2 or ".lora_" in name:
            continue
        total += p.numel()
        owner = name.removesuffix(".weight").removesuffix(".base_layer")
        if owner not in adapted and owner.rpartition(".")[0].removesuffix(".base_layer") not in adapted:
            missed += p.numel()
            kind = ".".join(part for part in owner.split(".")[-3:] if not part.isdigit())
            sizes[kind] = sizes.get(kind, 0) + p.numel()
    if missed < 0.05 * max(1, total):
        return ""
    return f"{', '.join(sorted(sizes))} ({missed / total:.2f} of the blocks' weights)"


def _adapted(trainer: type, ours: dict[str, Any]) -> Any:
    """`trainer` with some of its methods replaced; refuses a TRL in which they go by other names."""
    import trl

    for name in ours:
        known = hasattr(trainer, name)
        check(known, "trl", f"version {trl.__version__}, whose {trainer.__name__} has no {name}", "trl 1.16")
    return type(trainer.__name__, (trainer,), ours)


def no_adapter(model: LanguageModel, tuning: PolicySettings, error: Exception) -> InputError:
    """What PEFT refused."""
    allowed = f"0, or targets that PEFT can adapt in a {type(model.network).__name__} ({first_line(error)})"
    return InputError("lora_rank", tuning.lora_rank, allowed)


def trainee(model: LanguageModel, tuning: PolicySettings) -> tuple[Any, Any]:
    """A network to train, and the configuration of the adapter that it is still to get."""
    from peft import LoraConfig

    if not tuning.lora_rank:
        # Updates are smaller than half precision resolves.
        return _without_dropout(copy.deepcopy(model.network).float().requires_grad_(True)), None
    network = _without_dropout(shared_copy(model.network))
    return network, LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha,
        lora_dropout=0.0,
        target_modules=tuning.targets,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _without_dropout(network: Any) -> Any:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return network


def _columns(trainer: str, rows: Sequence[dict[str, Any]], tuning: PolicySettings) -> list[dict[str, Any]]:
    """Rows under the names that each trainer's collator reads."""
    if trainer == "GRPO":
        return [{"prompt": str(i)} for i in _endless(len(rows), tuning)]
    if trainer == "SFT":
        pairs = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
        return [{"input_ids": [*x, *y], "labels": [*[-100] * len(x), *y]} for x, y in pairs]
    if trainer == "KTO":
        return _mismatched(rows, tuning)
    return list(rows)


def _endless(count: int, tuning: PolicySettings) -> list[int]:
    """Rows in a new order for each epoch, as many as the run takes: the order of this trainer's own sampler depends on
    how many epochs it has seen, which a run that was stopped does not know.
    """
    wanted = tuning.total_steps(count) * min(tuning.batch_size, count)
    draw, found = random.Random(tuning.seed), list[int]()
    while len(found) < wanted:
        found += draw.sample(range(count), count)
    return found[:wanted]


def _mismatched(rows: Sequence[dict[str, Any]], tuning: PolicySettings) -> list[dict[str, Any]]:
    """Rows in the seed's order, each with the completion of another one of its batch, from which KTO estimates KL."""
    order = random.Random(tuning.seed).sample(range(len(rows)), len(rows))
    shuffled = [rows[i] for i in order]
    if tuning.loss != "kto":
        return shuffled
    found = []
    for i, row in enumerate(shuffled):
        first = i - i % tuning.batch_size
        last = min(first + tuning.batch_size, len(shuffled)) - 1
        other = shuffled[last if i == first < last else i - 1]
        found.append({**row, "KL_completion_ids": other["completion_ids"]})
    return found


def _settings(model: LanguageModel, rows: int, tuning: PolicySettings, folder: Path, keep: bool) -> dict[str, Any]:
    """What all trainers are told."""
    steps = tuning.total_steps(rows)
    on_cpu = model.device.type == "cpu"
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": min(tuning.batch_size, rows),
        "learning_rate": tuning.learning_rate,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "seed": tuning.seed,
        "data_seed": tuning.seed,
        "bf16": False,
        "fp16": False,
        "use_cpu": on_cpu,
        "gradient_checkpointing": not on_cpu,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if keep else "no",
        "save_steps": max(1, -(-steps // 10)),
        "save_total_limit": 2,
    }


def _scorer(model: LanguageModel, online: Online) -> Callable[..., list[float]]:
    """The reward as TRL calls it; prompts come as their numbers."""

    def reward(prompts: list[str], completion_ids: list[list[int]], **more: Any) -> list[float]:
        owners = [int(p) for p in prompts]
        mine = list(dict.fromkeys(owners))
        return scores(model, online, mine, [mine.index(b) for b in owners], completion_ids).tolist()

    return reward


class Speaking(Protocol):
    """What scoring needs of a model."""

    def show(self, prompt: Any) -> Any: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


def scores(
    model: Speaking, online: Online, prompts: Sequence[int], group: Sequence[int], tokens: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Rewards `[N]` of generated `tokens` after the prompts numbered in `prompts`; raises unless they are finite."""
    samples = Samples(
        prompts=[model.show(online.prompts[b]) for b in prompts],
        outputs=[model.decode(row) for row in tokens],
        group=torch.tensor(group),
        log_weight=torch.zeros(len(group), dtype=torch.float64),
        tokens=[list(row) for row in tokens],
    )
    found = online.reward(samples)
    if not bool(found.isfinite().all()):
        bad = int((~found.isfinite()).nonzero()[0])
        raise RewardError(f"reward {online.reward}: returned {float(found[bad])}; allowed: finite numbers")
    return found


class _Watch(TrainerCallback):
    """Progress, and the end of a run that has diverged."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.tick(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.tick(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        figures = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        loss = figures.get("loss", 0.0)
        self.tick(0, **figures)
        if not math.isfinite(loss):
            raise SteerError(f"train policy: the loss is {loss} at step {state.global_step}; lower learning_rate")

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        # A pickle that nothing reads.
        Path(args.output_dir, f"checkpoint-{state.global_step}", "training_args.bin").unlink(missing_ok=True)


def _last_checkpoint(folder: Path) -> str | None:
    """The last one that is complete: the trainer's state is what it writes last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


@contextmanager
def quiet() -> Iterator[None]:
    """Holds back what the libraries print, log and warn of."""
    loggers = [logging.getLogger(name) for name in ("trl", "peft", "accelerate", "datasets")]
    levels = [logger.level for logger in loggers]
    verbosity, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for module in ("trl", "transformers", "peft", "torch", "accelerate", "datasets"):
                warnings.filterwarnings("ignore", module=rf"{module}\b")
            yield
    finally:
        library_logging.set_verbosity(verbosity)
        if bars:
            library_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

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
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from transformers.utils import logging as library_logging

from steer.adapters.transformers.policy.data import Tuning
from steer.core import Prompt, Reward, RewardError, Samples, SteerError, check

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
    tuning: Tuning,
    *,
    start: Path | None = None,
    online: Online | None = None,
    work: Path | None = None,
    tick: Callable[[int], None] = lambda count: None,
) -> Fitted:
    """Tune a copy of `model`'s network on `rows` (token ids), from the weights in `start` where there are any.

    With `work`, checkpoints are kept there, about ten in a run, and a run that stopped goes on from the last one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run" if work is None else work
        trainer = _trainer(model, rows, tuning, start, online, folder, Path(scratch), work is not None)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Watch(tick))
        if tuning.lora_rank:
            # Otherwise PEFT asks the hub about this name whenever it saves.
            trainer.model.peft_config["default"].base_model_name_or_path = None
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
        log = trainer.state.log_history
        network = trainer.accelerator.unwrap_model(trainer.model)
    return Fitted(network, *([float(e[k]) for e in log if k in e] for k in ("loss", "reward")))


def _trainer(
    model: LanguageModel, rows: Sequence[dict[str, Any]], tuning: Tuning, start: Path | None, online: Online | None,
    folder: Path, scratch: Path, keep: bool,
) -> Any:  # fmt: skip
    import trl
    from datasets import Dataset

    method = {"raft": "sft"}.get(tuning.method, tuning.method)
    network, adapter = _trainee(model, tuning, start)
    given: dict[str, Any] = {
        "model": network, "peft_config": adapter, "processing_class": copy.deepcopy(model.tokenizer),
        "train_dataset": Dataset.from_list(_columns(method, rows, tuning)),
    }  # fmt: skip
    settings = _settings(model, len(rows), tuning, folder, keep)
    settings |= {"loss_type": tuning.loss}
    ours: dict[str, Any] = {
        "_prepare_dataset": lambda self, dataset, *args, **kwargs: dataset,
        "_send_telemetry": lambda self: None,
        "create_model_card": lambda self, *args, **kwargs: None,
    }
    if method == "sft":
        settings |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    if method == "dpo":
        smoothing = max(_SMOOTHING.get(part, 0.0) for part in tuning.losses)
        settings |= {"loss_type": tuning.losses, "f_divergence_type": tuning.f_divergence, "label_smoothing": smoothing}
    if method in ("dpo", "kto"):
        settings |= {"beta": tuning.beta, "max_length": None}
        given["ref_model"] = None if tuning.lora_rank else shared_copy(model.network)
    if method == "grpo":
        assert online is not None
        ids = [row["prompt_ids"] for row in rows]
        ours["_tokenize_prompts"] = lambda self, prompts: ([ids[int(p)] for p in prompts], None, {})
        del ours["_prepare_dataset"]
        given["reward_funcs"] = _scorer(model, online)
        size = min(tuning.batch_size, len(rows))
        settings |= {
            "beta": tuning.beta, "num_generations": tuning.group_size, "max_completion_length": tuning.max_new_tokens,
            "temperature": tuning.temperature, "per_device_train_batch_size": size * tuning.group_size,
            "disable_dropout": True, "shuffle_dataset": False,
        }  # fmt: skip
        if tuning.beta and not tuning.lora_rank:
            # This trainer loads its reference from where the configuration says that the network came from.
            model.network.save_pretrained(scratch / "reference")
            network.config._name_or_path = str(scratch / "reference")
    name = method.upper()
    config = getattr(trl, f"{name}Config")(**settings)
    return _adapted(getattr(trl, f"{name}Trainer"), ours)(args=config, **given)


def _adapted(trainer: type, ours: dict[str, Any]) -> Any:
    """`trainer` with some of its methods replaced; refuses a TRL in which they go by other names."""
    import trl

    for name in ours:
        known = hasattr(trainer, name)
        check(known, "trl", f"version {trl.__version__}, whose {trainer.__name__} has no {name}", "trl 1.16")
    return type(trainer.__name__, (trainer,), ours)


def _trainee(model: LanguageModel, tuning: Tuning, start: Path | None) -> tuple[Any, Any]:
    """A network to train, and the configuration of the adapter that it is still to get."""
    from peft import LoraConfig, PeftModel

    if not tuning.lora_rank:
        # Updates are smaller than half precision resolves.
        network = copy.deepcopy(model.network) if start is None else AutoModelForCausalLM.from_pretrained(start)
        return _without_dropout(network.float().requires_grad_(True)), None
    network = _without_dropout(shared_copy(model.network))
    if start is not None:
        place = {"torch_device": str(model.device)}
        return PeftModel.from_pretrained(network, str(start), is_trainable=True, **place), None
    return network, LoraConfig(
        r=tuning.lora_rank, lora_alpha=tuning.lora_alpha, lora_dropout=0.0, target_modules=tuning.targets,
        bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip


def _without_dropout(network: Any) -> Any:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return network


def _columns(method: str, rows: Sequence[dict[str, Any]], tuning: Tuning) -> list[dict[str, Any]]:
    """Rows under the names that each trainer's collator reads."""
    if method == "grpo":
        return [{"prompt": str(i)} for i in _endless(len(rows), tuning)]
    if method == "sft":
        pairs = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
        return [{"input_ids": [*x, *y], "labels": [*[-100] * len(x), *y]} for x, y in pairs]
    if method == "kto":
        return _mismatched(rows, tuning)
    return list(rows)


def _endless(count: int, tuning: Tuning) -> list[int]:
    """Rows in a new order for each epoch, as many as the run takes: the order of this trainer's own sampler depends on
    how many epochs it has seen, which a run that was stopped does not know.
    """
    wanted = tuning.total_steps(count) * min(tuning.batch_size, count)
    draw, found = random.Random(tuning.seed), list[int]()
    while len(found) < wanted:
        found += draw.sample(range(count), count)
    return found[:wanted]


def _mismatched(rows: Sequence[dict[str, Any]], tuning: Tuning) -> list[dict[str, Any]]:
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


def _settings(model: LanguageModel, rows: int, tuning: Tuning, folder: Path, keep: bool) -> dict[str, Any]:
    """What all trainers are told."""
    steps = tuning.total_steps(rows)
    on_cpu = model.device.type == "cpu"
    return {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": min(tuning.batch_size, rows),
        "learning_rate": tuning.learning_rate, "lr_scheduler_type": "cosine", "weight_decay": 0.0,
        "optim": "adamw_torch", "max_grad_norm": 1.0, "seed": tuning.seed, "data_seed": tuning.seed,
        "bf16": False, "fp16": False, "use_cpu": on_cpu, "gradient_checkpointing": not on_cpu,
        "dataloader_pin_memory": False, "report_to": "none", "disable_tqdm": True, "logging_strategy": "steps",
        "logging_steps": 1, "logging_nan_inf_filter": False, "save_strategy": "steps" if keep else "no",
        "save_steps": max(1, -(-steps // 10)), "save_total_limit": 2,
    }  # fmt: skip


def _scorer(model: LanguageModel, online: Online) -> Callable[..., list[float]]:
    """The reward as TRL calls it; prompts come as their numbers."""

    def reward(prompts: list[str], completion_ids: list[list[int]], **more: Any) -> list[float]:
        owners = [int(p) for p in prompts]
        mine = list(dict.fromkeys(owners))
        return scores(model, online, mine, [mine.index(b) for b in owners], completion_ids).tolist()

    return reward


def scores(
    model: LanguageModel, online: Online, prompts: Sequence[int], group: Sequence[int], tokens: Sequence[Sequence[int]]
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

    def __init__(self, tick: Callable[[int], None]) -> None:
        self.tick = tick

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.tick(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.tick(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        loss = float((logs or {}).get("loss", 0.0))
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

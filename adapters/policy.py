"""Tuned policies: SFT, DPO and its kin, KTO, GRPO and RAFT through TRL, as LoRA adapters (PEFT) or whole networks.

A policy is a folder: the adapter in PEFT's layout, or a network in transformers', and a card, `steer.json`, that says
which model it was tuned from and how. Losses and trainers are TRL's; RAFT (Dong et al. 2023) is rounds of best-of-K
samples and SFT on them.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steer.adapters._policy_data import METHODS, Tuning, check_targets, prompt_of, read_rows
from steer.adapters._policy_trl import Online, fit, quiet, require_libraries, scores, shared_copy
from steer.adapters.transformers import LanguageModel
from steer.adapters.transformers import load as load_network
from steer.artifacts import Card, data_hash
from steer.core import Reward, SteerError, check
from steer.progress import ticking
from steer.rewards import as_reward
from steer.train.folders import CARD, POLICY, check_target, claim, read_policy_card, replacing_folder, thinned

__all__ = ["METHODS", "load_policy", "read_policy_card", "train_policy"]

_ADAPTER = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def train_policy(
    model: LanguageModel,
    data: Sequence[Any],
    *,
    method: str,
    out: Path | str,
    reward: Reward | str | Callable[..., Any] | None = None,
    beta: float = 0.1,
    loss: str | None = None,
    f_divergence: str = "reverse_kl",
    lora_rank: int = 16,
    lora_alpha: int | None = None,
    lora_targets: str = "all-linear",
    learning_rate: float | None = None,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int = 8,
    group_size: int = 8,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    rounds: int = 1,
    seed: int = 0,
    work: Path | None = None,
    progress: bool = False,
) -> Path:
    """Tune a policy and write it to the folder `out`; `model` itself is not changed.

    Args:
        model: a language model from `steer.load`.
        data: rows `{"prompt", "completion"}` (sft), `{"prompt", "chosen", "rejected"}` (dpo), `{"prompt",
            "completion", "label": bool}` (kto); for grpo and raft, and for dpo with a reward, prompts, or rows
            `{"prompt"}`. A prompt is text or
            messages and is encoded as for `generate`; completions are text, and end-of-sequence is added.
        method: "sft", "dpo", "kto", "grpo" (KL to the model in the loss), "raft" (in each of `rounds` rounds the best
            of `group_size` samples for each prompt, then SFT on them).
        out: folder; an older policy there is replaced in one step, anything else is refused.
        reward: what grpo and raft raise; with it dpo makes its own pairs, of the best and the worst of `group_size`
            samples for each prompt. Rewards that score under a model score under `model`.
        beta: KL coefficient of dpo, kto and grpo (there 0 is off).
        loss: TRL's name; default: nll, sigmoid, kto, dapo. For dpo several joined by `+`, of equal weight.
        f_divergence: between policy and model, for dpo: reverse_kl, forward_kl, js_divergence, alpha_divergence.
        lora_rank: 0 tunes all weights. lora_alpha: default twice the rank. lora_targets: "all-linear" (without the
            output head), or names of modules joined by commas.
        learning_rate: default by method; the schedule is a cosine. Weight decay and dropout are 0.
        epochs, steps: passes over the data, or updates (for raft: of every round); `steps` wins.
        batch_size: rows, pairs or prompts for each update.
        group_size, max_new_tokens, temperature: of the samples of grpo and raft.
        work: folder for checkpoints and samples; a run that stopped goes on from there to the same result.

    Raises:
        InputError: a bad setting, row, reward or folder; nothing has been trained.
        SteerError: TRL or PEFT is missing, or the loss is no longer finite.
    """
    tuning = Tuning.create(
        method=method, beta=beta, loss=loss, f_divergence=f_divergence, lora_rank=lora_rank, lora_alpha=lora_alpha,
        lora_targets=lora_targets, learning_rate=learning_rate, epochs=epochs, steps=steps, batch_size=batch_size,
        group_size=group_size, max_new_tokens=max_new_tokens, temperature=temperature, rounds=rounds, seed=seed,
    )  # fmt: skip
    final = Path(out)
    check_target(final)
    check_targets(model, tuning)
    given = as_reward(reward)
    paired = given is not None and method == "dpo"
    fits = paired or (given is not None) == tuning.online
    check(fits, "reward", reward, f"{'one' if tuning.online else 'none'} for {method}")
    rows = [] if paired else read_rows(model, data, tuning)
    require_libraries()
    recipe = {**tuning.recipe(), **({"reward": str(given)} if given is not None else {})}
    hashed = data_hash(list(data))
    claim(work, {**recipe, "data": hashed, "model": model.info.fingerprint})
    online = None if given is None else Online([prompt_of(row) for row in data], given.bind(model))
    metrics: dict[str, Any] = {}
    if paired:
        assert online is not None
        rows = read_rows(model, _own_pairs(model, online, tuning, work, progress), tuning)
        metrics["pairs"] = len(rows)
    with quiet(), replacing_folder(final) as temporary, tempfile.TemporaryDirectory() as scratch:
        if online is not None:
            metrics["reward_before"] = _mean_reward(model, model, online, tuning)
        if method == "raft":
            assert online is not None
            metrics |= _raft(model, rows, online, tuning, temporary, work or Path(scratch), progress)
        else:
            with ticking(progress, f"tuning by {method}", tuning.total_steps(len(rows))) as tick:
                fitted = fit(
                    model,
                    rows,
                    tuning,
                    online=None if paired else online,
                    work=work and work / "checkpoints",
                    tick=tick,
                )
            metrics |= {k: thinned(v) for k, v in (("loss", fitted.loss), ("reward", fitted.reward)) if v}
            _save_network(fitted.network, model, temporary)
        if online is not None:
            metrics["reward_after"] = _mean_reward(_opened(model, temporary), model, online, tuning)
        card = Card(
            kind="policy",
            model=model.info.entry(),
            settings={"form": "lora" if lora_rank else "full"},
            recipe=recipe,
            data={"sha256": hashed, "rows": len(data)},
            metrics=metrics,
        )
        (temporary / CARD).write_text(json.dumps(asdict(card), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return final


def load_policy(base: LanguageModel | None, folder: Path | str, *, merge: bool = True) -> LanguageModel:
    """The tuned policy as a model of its own, named `base+folder`; `base` is not changed.

    Args:
        base: the model that the policy was tuned from; None loads it by the name on the card.
        folder: what `train_policy` wrote.
        merge: merge a LoRA adapter into a copy of the base's weights, which is as fast as the base. Without, the
            policy runs the adapter beside the base's very weights and takes hardly more memory.

    Raises:
        InputError: not a policy, or one tuned from another model.
    """
    path = Path(folder)
    card = read_policy_card(path)
    whole = not (path / _ADAPTER).is_file()
    if base is not None:
        ours, theirs = base.info.fingerprint, card.model["fingerprint"]
        given = f"{path} (tuned from {card.model.get('name')}, fingerprint {theirs})"
        check(ours == theirs, "policy", given, f"a policy tuned from {base.name} (fingerprint {ours})")
    elif not whole:
        from steer.engine import load

        return load_policy(load(card.model["name"]), path, merge=merge)
    name = f"{card.model.get('name') if base is None else base.name}+{path.name}"
    if whole:
        return load_network(path, name=name, device=None if base is None else base.device)
    check((path / _WEIGHTS).is_file(), "policy", f"{path} (without {_WEIGHTS})", POLICY)
    assert base is not None
    require_libraries()
    return _opened(base, path, merge=merge, name=name)


# ------------------------------------------------------------------------------------------------------------- RAFT


def _raft(
    model: LanguageModel, rows: list[dict[str, Any]], online: Online, tuning: Tuning, out: Path, work: Path,
    progress: bool,
) -> dict[str, Any]:  # fmt: skip
    """Rounds of samples and SFT on the best; each round's are kept in `work`, and the last round's weights in `out`."""
    start: Path | None = None
    history: dict[str, Any] = {"loss": [], "reward": [], "reward_best": []}
    for number in range(tuning.rounds):
        folder = work / f"round-{number:03d}"
        done = folder / "policy"
        drawn = _draws(model, start, online, tuning, number, folder, progress)
        best = _best(drawn, rows, tuning, online)
        history["reward"].append(round(sum(drawn["reward"]) / len(drawn["reward"]), 5))
        history["reward_best"].append(round(sum(row["reward"] for row in best) / len(best), 5))
        if not done.is_dir():
            with ticking(progress, f"tuning, round {number + 1}", tuning.total_steps(len(best))) as tick:
                fitted = fit(model, best, tuning, start=start, work=folder / "checkpoints", tick=tick)
            with replacing_folder(done) as temporary:
                _save_network(fitted.network, model, temporary)
                (temporary / "history.json").write_text(json.dumps(fitted.loss), encoding="utf-8")
        history["loss"] += json.loads((done / "history.json").read_text(encoding="utf-8"))
        start = done
    assert start is not None
    shutil.copytree(start, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("history.json"))
    return {**history, "loss": thinned(history["loss"])}


def _draws(
    model: LanguageModel, start: Path | None, online: Online, tuning: Tuning, number: int, folder: Path, progress: bool
) -> dict[str, list[Any]]:
    """A round's samples, `group_size` for each prompt: their `group` (number of the prompt), `tokens`, `reward`."""
    path = folder / "samples.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    policy = model if start is None else _opened(model, start)
    samples = policy.generate(
        list(online.prompts), n=tuning.group_size, temperature=tuning.temperature,
        max_new_tokens=tuning.max_new_tokens, seed=tuning.seed * 100_003 + number, progress=progress,
    )  # fmt: skip
    group, tokens = samples.group.tolist(), samples.tokens
    reward = scores(model, online, range(len(online.prompts)), group, tokens).tolist()
    drawn = {"group": group, "tokens": tokens, "reward": reward}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(drawn), encoding="utf-8")
    os.replace(temporary, path)
    return drawn


def _own_pairs(
    model: LanguageModel, online: Online, tuning: Tuning, work: Path | None, progress: bool
) -> list[dict[str, Any]]:
    """The best and the worst of the model's own samples for each prompt, where they differ."""
    with tempfile.TemporaryDirectory() as scratch:
        drawn = _draws(model, None, online, tuning, 0, (work or Path(scratch)) / "pairs", progress)
    pairs = []
    for b, prompt in enumerate(online.prompts):
        mine = [i for i, owner in enumerate(drawn["group"]) if owner == b]
        high, low = (pick(mine, key=lambda i: drawn["reward"][i]) for pick in (max, min))
        texts = [model.decode(drawn["tokens"][i]) for i in (high, low)]
        if drawn["reward"][high] > drawn["reward"][low] and all(text.strip() for text in texts):
            pairs.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
    check(bool(pairs), "reward", str(online.reward), "a reward that is not the same on all samples of a prompt")
    return pairs


def _best(
    drawn: dict[str, list[Any]], rows: list[dict[str, Any]], tuning: Tuning, online: Online
) -> list[dict[str, Any]]:
    """Each prompt's best sample as a row to imitate. Prompts all of whose samples score the same teach nothing."""
    found = []
    for b, row in enumerate(rows):
        mine = [i for i, owner in enumerate(drawn["group"]) if owner == b]
        high = max(mine, key=lambda i: drawn["reward"][i])
        if drawn["reward"][high] > min(drawn["reward"][i] for i in mine):
            found.append({**row, "completion_ids": drawn["tokens"][high], "reward": drawn["reward"][high]})
    check(bool(found), "reward", str(online.reward), "a reward that is not the same on all samples of a prompt")
    return found


def _mean_reward(policy: LanguageModel, base: LanguageModel, online: Online, tuning: Tuning) -> float:
    """Mean reward of samples for the first 64 prompts, with one seed for all policies."""
    prompts = list(online.prompts[:64])
    drawn = policy.generate(
        prompts, n=max(1, min(tuning.group_size, 64 // len(prompts))), temperature=tuning.temperature,
        max_new_tokens=tuning.max_new_tokens, seed=tuning.seed * 100_003 + 99_991,
    )  # fmt: skip
    return round(float(scores(base, online, range(len(prompts)), drawn.group.tolist(), drawn.tokens).mean()), 5)


# ---------------------------------------------------------------------------------------------------------- folders


def _opened(base: LanguageModel, folder: Path, *, merge: bool = True, name: str = "policy") -> LanguageModel:
    """The weights in `folder` as a model, whether adapter or whole network."""
    if not (folder / _ADAPTER).is_file():
        network = type(base.network).from_pretrained(folder, dtype=base.network.dtype, use_safetensors=True)
        return LanguageModel(network.to(base.device), base.tokenizer, name)
    from peft import PeftModel

    network = copy.deepcopy(base.network) if merge else shared_copy(base.network)
    with quiet():
        tuned = PeftModel.from_pretrained(network, str(folder), torch_device=str(base.device))
        return LanguageModel(tuned.merge_and_unload() if merge else tuned.get_base_model(), base.tokenizer, name)


def _save_network(network: Any, model: LanguageModel, folder: Path) -> None:
    """Write an adapter in PEFT's layout, or the whole network with its tokenizer."""
    for name, tensor in network.named_parameters():
        if tensor.requires_grad and not bool(tensor.isfinite().all()):
            raise SteerError(f"train policy: {name} is no longer finite; lower learning_rate")
    if hasattr(network, "peft_config"):
        network.peft_config["default"].base_model_name_or_path = model.name
        network.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
    else:
        network.to(model.network.dtype).save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)

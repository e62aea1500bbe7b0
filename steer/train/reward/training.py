"""Training of a reward: states are read once, then heads are chosen and fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from steer.artifacts import Card, data_hash
from steer.core import InputError, UnsupportedError, check
from steer.edits import Artifact
from steer.files import replacing
from steer.progress import ticking
from steer.ranks import ranks
from steer.rewards.heads import reply_ids
from steer.train.reward.heads import Fit, prior_correction
from steer.train.reward.measures import measured
from steer.train.reward.rows import Rows, read_rows
from steer.train.settings import Count, Part, Positive, Seed, Share, settings_class, settle
from steer.train.states import hidden_states

__all__ = ["RewardSettings", "train_reward"]

L2 = (1e-3, 1e-2, 0.1, 1.0, 10.0)
PENALTIES = tuple(10.0**k for k in range(-4, 5))
"""What is tried where none is given, on rows that are learnt from."""


@settings_class
class RewardSettings:
    """How a reward is trained."""

    objective: Literal["auto", "pairs", "ratings", "binary"] = "auto"
    """By the columns of the rows: chosen and rejected, ratings, or label."""
    layer: Literal["auto"] | int = "auto"
    """After which block states are read; "auto" tries L/2, 4L/5 and the last."""
    l2: Literal["auto"] | Positive = "auto"
    """The penalty on the heads."""
    members: Count = 1
    """Of an ensemble."""
    diversity: Literal["bootstrap", "features"] = "bootstrap"
    """What members differ by: the rows that they see, or the dimensions."""
    held_out: Part = 0.2
    """Share of the prompts on which the fit is measured; nothing is chosen there."""
    keep_negatives: Annotated[Share, Field(gt=0)] = 1.0
    """Share of the negatives that binary rows still hold; scores are corrected for it."""
    seed: Seed = 0

    def recipe(self) -> dict[str, Any]:
        """The entries of the card."""
        return asdict(self)


def train_reward(
    model: Any,
    data: Sequence[Any],
    settings: RewardSettings | None = None,
    *,
    work: Path | None = None,
    progress: bool = False,
    **given: Any,
) -> Artifact:
    """A reward from preferences, ratings or labels; `steer.rewards` reads its file as any reward.

    Args:
        model: a language model from `steer.load`; frozen.
        data: rows `{"prompt"?, "chosen", "rejected", "margin"?}` (or `positive` and `negative`), `{"prompt"?,
            "completion", "ratings": {name: number or null}}` or `{"prompt"?, "completion", "label", "weight"?}`; in
            TRL's conversational form too.
        settings: how; fields of `RewardSettings` may also be `given` by name.
        work: folder for the states, which take most of the time: another run on the same rows reads them from there.

    Raises:
        InputError: a bad setting or row, by number.
        UnsupportedError: a model without hidden states, such as an endpoint's.
    """
    chosen = settle(RewardSettings, settings, given, "train_reward")
    if not hasattr(model, "hidden_states"):
        raise UnsupportedError(f"{model.name} shows no hidden states; load the model itself")
    rows = read_rows(list(data), chosen.objective)
    layers = _layers(chosen.layer, model.info.num_layers)
    sha = data_hash([[prompt, text] for prompt, text in rows.texts])
    states = _states(model, rows, layers, sha, work, progress)
    for i in (~torch.stack([x.isfinite().all(1) for x in states.values()]).all(0)).nonzero().flatten().tolist():
        raise InputError(f"data[{i // (2 if rows.objective == 'pairs' else 1)}]", "states with NaN", "another text")
    held, learnt = split_by_prompt(rows.group, chosen.held_out, chosen.seed)
    layer, penalty = _choose(rows, states, learnt, chosen)
    fitted = Fit.of(rows, states[layer], learnt)
    heads, bias = _members(rows, fitted, learnt, penalty, chosen)
    if rows.objective == "binary":
        bias = bias + prior_correction(chosen.keep_negatives)
    metrics = measured(rows, states[layer], held, fitted, heads, bias)
    tensors = {"heads": heads.float(), "bias": bias.float(), "mean": fitted.mean.float(), "std": fitted.std.float()}
    card = Card(
        kind="reward",
        model=model.info.entry(),
        layers=[layer],
        settings={"names": list(rows.names)},
        recipe={**chosen.recipe(), "objective": rows.objective, "layer": layer, "l2": penalty},
        data={"sha256": sha, "rows": len(rows.group), "held_out": len(held)},
        metrics=metrics,
    )
    return Artifact(tensors, card)


def _members(
    rows: Rows, fitted: Fit, learnt: list[int], penalty: float, settings: RewardSettings
) -> tuple[Tensor, Tensor]:
    """Heads `[M, K, D]` and their biases `[M, K]`; each rank fits some members."""
    outputs = rows.targets.shape[1] if rows.objective == "ratings" else 1
    heads = torch.zeros(settings.members, outputs, fitted.width, dtype=torch.float64)
    bias = torch.zeros(settings.members, outputs, dtype=torch.float64)
    for m in ranks().mine(range(settings.members)):
        heads[m], bias[m] = fitted.head(rows, _seen(learnt, settings, m), penalty, _dims(settings, m, fitted.width))
    ranks().add([heads, bias])
    return heads, bias


def _layers(wanted: Any, count: int) -> list[int]:
    if wanted == "auto":
        return sorted({count // 2 - 1, 4 * count // 5 - 1, count - 1} & set(range(count)))
    check(isinstance(wanted, int) and 0 <= wanted < count, "layer", wanted, f"auto, or 0 to {count - 1}")
    return [int(wanted)]


def _states(
    model: Any, rows: Rows, layers: list[int], sha: str, work: Path | None, progress: bool
) -> dict[int, Tensor]:
    """States `[texts, D]` at the end of every text, by layer; read from `work` where a run has left them there."""
    name = f"states-{sha[:16]}-{model.info.entry()['fingerprint'][:16]}-{'-'.join(map(str, layers))}.safetensors"
    path = None if work is None else work / name
    there = path is not None and path.is_file()
    ranks().check_same("work", int(there), "a folder that all ranks see")
    if there:
        with safe_open(path, "pt") as file:
            return {layer: file.get_tensor(str(layer)) for layer in layers}
    ids = [reply_ids(model, prompt, text) for prompt, text in rows.texts]
    with ticking(progress and ranks().first, "reading texts", len(ids)) as tick:
        states = hidden_states(model, ids, layers, on_batch=tick)
    if path is not None and ranks().first:
        with replacing(path) as temporary:
            save_file({str(layer): x.contiguous() for layer, x in states.items()}, temporary)
    return states


def split_by_prompt(group: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows that are held out, and the others; rows of one prompt stay together where there is more than one prompt."""
    keys = group if len(set(group)) > 1 else [str(i) for i in range(len(group))]
    names = sorted(set(keys))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    out = {names[i] for i in order[: max(1, round(share * len(names)))]} if share > 0 and len(names) > 1 else set()
    return [i for i, key in enumerate(keys) if key in out], [i for i, key in enumerate(keys) if key not in out]


def _choose(rows: Rows, states: dict[int, Tensor], learnt: list[int], settings: RewardSettings) -> tuple[int, float]:
    """Layer and penalty, by a fifth of the rows that are learnt from."""
    grid = PENALTIES if rows.objective == "ratings" else L2
    penalties = grid if settings.l2 == "auto" else (float(settings.l2),)
    if len(states) * len(penalties) == 1:
        return next(iter(states)), penalties[0]
    some, others = split_by_prompt([rows.group[i] for i in learnt], 0.2, settings.seed + 1)
    judged, fitted_on = [learnt[i] for i in some], [learnt[i] for i in others]
    features = {layer: Fit.of(rows, x, fitted_on) for layer, x in states.items()}
    tried = [(layer, penalty) for layer in states for penalty in penalties]
    losses = torch.zeros(len(tried), dtype=torch.float64)
    for i in ranks().mine(range(len(tried))):
        layer, penalty = tried[i]
        head, bias = features[layer].head(rows, torch.tensor(fitted_on), penalty, None)
        losses[i] = features[layer].loss(rows, torch.tensor(judged), head, bias)
    ranks().add([losses])
    best = 0
    for i, loss in enumerate(losses.tolist()):
        best = i if loss < float(losses[best]) - 1e-12 else best
    return tried[best]


def _seen(learnt: list[int], settings: RewardSettings, member: int) -> Tensor:
    """Rows that a member sees."""
    rows = torch.tensor(learnt)
    if settings.members == 1 or settings.diversity != "bootstrap":
        return rows
    drawn = torch.Generator().manual_seed(settings.seed * 1009 + member)
    return rows[torch.randint(len(rows), (len(rows),), generator=drawn)]


def _dims(settings: RewardSettings, member: int, width: int) -> Tensor | None:
    """Dimensions that a member sees `[D]` bool, None for all."""
    if settings.members == 1 or settings.diversity != "features":
        return None
    order = torch.randperm(width, generator=torch.Generator().manual_seed(settings.seed * 1009 + member))
    return torch.zeros(width, dtype=torch.bool).index_fill(0, order[: max(1, width // 2)], True)

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
from steer.train.reward.gating import debiased, fit_gate, penalties
from steer.train.reward.heads import Fit, prior_correction
from steer.train.reward.measures import measured
from steer.train.reward.robust import collaborative, corrected, preferred
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
    noise_robust: bool = False
    """Of pairs: also train two heads that review each other's pairs, and keep them where they are better."""
    noise: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """Share of the pairs whose labels are flipped; None: estimated, where it is needed."""
    verbosity: str | None = None
    """The attribute of ratings that others are freed of, and that the score leaves out."""
    gate_hidden: Count = 64
    """Inner units of a gate."""
    gate_steps: Count = 2000
    seed: Seed = 0

    def recipe(self) -> dict[str, Any]:
        """The entries of the card."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def train_reward(
    model: Any,
    data: Sequence[Any],
    settings: RewardSettings | None = None,
    *,
    gate: Sequence[Any] | None = None,
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
        gate: pairs, as rows of preferences, from which weights of the ratings' attributes by the prompt are learnt.
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
    pairs = None if gate is None else read_rows(list(gate), "pairs")
    _check_fits(rows, chosen, gated=pairs is not None)
    layers = _layers(chosen.layer, model.info.num_layers)
    sha = data_hash([[prompt, text] for prompt, text in rows.texts])
    states = _states(model, rows, layers, sha, work, progress)
    for i in (~torch.stack([x.isfinite().all(1) for x in states.values()]).all(0)).nonzero().flatten().tolist():
        raise InputError(f"data[{i // (2 if rows.objective == 'pairs' else 1)}]", "states with NaN", "another text")
    held, learnt = split_by_prompt(rows.group, chosen.held_out, chosen.seed)
    layer, penalty = _choose(rows, states, learnt, chosen)
    fitted = Fit.of(rows, states[layer], learnt)
    robust = _robust(rows, fitted, learnt, penalty, chosen) if chosen.noise_robust else {}
    heads, bias = _members(rows, fitted, learnt, penalty, chosen, robust.get("keep"))
    if rows.objective == "binary":
        bias = bias + prior_correction(chosen.keep_negatives)
    metrics = measured(rows, states[layer], held, fitted, heads, bias)
    if robust:
        metrics["noise_robust"] = robust
    if chosen.noise is not None and "accuracy" in metrics:
        metrics["accuracy_on_right_labels"] = round(corrected(metrics["accuracy"], chosen.noise), 4)
    tensors = {"heads": heads.float(), "bias": bias.float(), "mean": fitted.mean.float(), "std": fitted.std.float()}
    tensors |= _transform(rows, fitted, learnt, heads, bias, chosen.verbosity)
    if pairs is not None:
        gating, metrics["gate"] = _gated(model, pairs, layer, tensors, chosen, work, progress)
        tensors |= gating
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


def _check_fits(rows: Rows, settings: RewardSettings, gated: bool) -> None:
    """Raise `InputError` for settings that the rows' objective has no use for."""
    rated = rows.objective == "ratings"
    check(rated or not gated, "gate", "pairs", f"unset for {rows.objective}: a gate weighs attributes of ratings")
    name = settings.verbosity
    check(rated or name is None, "verbosity", name, f"unset for {rows.objective}: attributes are of ratings")
    check(name is None or name in rows.names, "verbosity", name, ", ".join(rows.names))
    paired = rows.objective == "pairs"
    check(paired or not settings.noise_robust, "noise_robust", True, f"false for {rows.objective}: it reviews pairs")
    check(paired or settings.noise is None, "noise", settings.noise, f"unset for {rows.objective}: of pairs' labels")
    plain = not settings.noise_robust or not bool(rows.targets.any())
    check(plain, "noise_robust", "rows with a margin", "rows without: reviewers compare plain margins")


def _member(
    rows: Rows,
    fitted: Fit,
    learnt: list[int],
    penalty: float,
    settings: RewardSettings,
    number: int,
    keep: float | None,
) -> tuple[Tensor, Tensor]:
    """One member's head `[K, D]` and bias `[K]`; `keep` is the share of two heads that review each other, or None."""
    seen, dims = _seen(learnt, settings, number), _dims(settings, number, fitted.width)
    if keep is None:
        return fitted.head(rows, seen, penalty, dims)
    z = fitted.z[seen] if dims is None else fitted.z[seen] * dims
    head = collaborative(z, keep, settings.seed * 1009 + number)
    return (head if dims is None else head * dims)[None], torch.zeros(1, dtype=torch.float64)


def _robust(rows: Rows, fitted: Fit, learnt: list[int], penalty: float, settings: RewardSettings) -> dict[str, Any]:
    """Accuracy of the plain head and of two that review each other, on a fifth of the pairs that neither saw; `keep` is
    there where the two are to be used.
    """
    some, others = split_by_prompt([rows.group[i] for i in learnt], 0.2, settings.seed + 2)
    judged, seen = torch.tensor([learnt[i] for i in some]), torch.tensor([learnt[i] for i in others])
    check(len(judged) > 1, "noise_robust", f"{len(judged)} pairs to judge by", "more pairs")
    head, _ = fitted.head(rows, seen, penalty, None)
    ours = fitted.z[judged] @ head[0]
    right = float((ours > 0).double().mean())
    noise = settings.noise if settings.noise is not None else min(0.45, max(0.05, 1 - right))
    theirs = fitted.z[judged] @ collaborative(fitted.z[seen], 1 - noise, settings.seed)
    better = preferred(ours, theirs)
    found = {
        "plain": round(right, 4),
        "collaborative": round(float((theirs > 0).double().mean()), 4),
        "kept": "collaborative" if better else "plain",
    }
    return {**found, "keep": round(1 - noise, 4)} if better else found


def _transform(
    rows: Rows, fitted: Fit, learnt: list[int], heads: Tensor, bias: Tensor, verbosity: str | None
) -> dict[str, Tensor]:
    """What frees the attributes of length, by the members' mean scores of the rows that were learnt from."""
    if verbosity is None:
        return {}
    scores = fitted.z[torch.tensor(learnt)] @ heads.mean(0).T + bias.mean(0)
    at = rows.names.index(verbosity)
    return {"transform": debiased(penalties(scores, at), at).float()}


def _gated(
    model: Any,
    pairs: Rows,
    layer: int,
    tensors: dict[str, Tensor],
    settings: RewardSettings,
    work: Path | None,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the gate, and its accuracy on pairs of prompts that it has not seen, beside equal weights'."""
    sha = data_hash([[prompt, text] for prompt, text in pairs.texts])
    states = _states(model, pairs, [layer], sha, work, progress)[layer].double()
    z = (states - tensors["mean"].double()) / tensors["std"].double()
    scores = torch.einsum("nd,mkd->nmk", z, tensors["heads"].double()).mean(1) + tensors["bias"].double().mean(0)
    if "transform" in tensors:
        scores = scores @ tensors["transform"].double().T
    scores = scores.reshape(len(pairs.group), 2, -1)
    asked = [model.encode(prompt) for prompt, _ in pairs.texts[::2]]
    before = model.hidden_states(asked, [layer])[layer].double()
    held, learnt = (torch.tensor(part) for part in split_by_prompt(pairs.group, settings.held_out, settings.seed))
    mean, std = before[learnt].mean(0), before[learnt].std(0, correction=0)
    std = torch.where(std < 1e-6, 1.0, std)
    psi = (before - mean) / std
    gate = fit_gate(
        psi[learnt].float(),
        scores[learnt],
        hidden=settings.gate_hidden,
        steps=settings.gate_steps,
        seed=settings.seed,
        work=None if work is None else work / "gate",
        run={**settings.recipe(), "gate": sha},
    )
    named = {f"gate.{k}": v.detach().float() for k, v in gate.state_dict().items()}
    gap = scores[:, 0] - scores[:, 1]
    figures: dict[str, Any] = {"pairs": len(pairs.group)}
    if len(held):
        ours = (gate(psi[held].float()).double() * gap[held]).sum(1) > 0
        figures["accuracy"] = round(float(ours.double().mean()), 4)
        figures["accuracy_of_equal_weights"] = round(float((gap[held].sum(1) > 0).double().mean()), 4)
    figures["mean_weights"] = [round(float(x), 4) for x in gate(psi.float()).mean(0)]
    return {**named, "gate.mean": mean.float(), "gate.std": std.float()}, figures


def _members(
    rows: Rows, fitted: Fit, learnt: list[int], penalty: float, settings: RewardSettings, keep: float | None
) -> tuple[Tensor, Tensor]:
    """Heads `[M, K, D]` and their biases `[M, K]`; each rank fits some members."""
    outputs = rows.targets.shape[1] if rows.objective == "ratings" else 1
    heads = torch.zeros(settings.members, outputs, fitted.width, dtype=torch.float64)
    bias = torch.zeros(settings.members, outputs, dtype=torch.float64)
    for m in ranks().mine(range(settings.members)):
        heads[m], bias[m] = _member(rows, fitted, learnt, penalty, settings, m, keep)
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

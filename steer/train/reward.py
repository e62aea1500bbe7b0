"""Training of rewards: linear heads on frozen features of a language model.

    pairs    mean log(1 + exp(margin - w . (z+ - z-))) + l2/2 |w|^2       (Bradley-Terry, convex, no bias)
    binary   mean u_i log(1 + exp(-y_i (w . z_i + b))) + l2/2 |w|^2        (y_i = +-1, weights u_i)
    ratings  |y_k - Z w_k - b_k|^2 + penalty |w_k|^2, each attribute k alone, rows without it left out (ridge)

z are the states after one block at the end of the reply, standardised over the training rows. States are read once;
objectives, penalties and members are then tried in seconds. Members of an ensemble differ by what they see (rows drawn
with replacement, or a random half of the dimensions): a convex head has one optimum, whatever its seed.

Coste et al., "Reward model ensembles help mitigate overoptimization" (2310.02743); Wang et al., ArmoRM (2406.12845).

Letters: `B` rows, `K` attributes, `D` width, `M` members.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from steer.artifacts import Card, data_hash
from steer.core import InputError, UnsupportedError, check
from steer.data import plain_row
from steer.edits import Artifact
from steer.files import replacing
from steer.progress import ticking
from steer.rewards.heads import reply_ids
from steer.train.settings import Count, Part, Positive, Seed, Share, settings_class, settle

__all__ = ["OBJECTIVES", "RewardSettings", "bradley_terry", "log_loss", "prior_correction", "ridge", "train_reward"]

OBJECTIVES = ("pairs", "ratings", "binary")
L2 = (1e-3, 1e-2, 0.1, 1.0, 10.0)
PENALTIES = tuple(10.0**k for k in range(-4, 5))
"""What is tried where none is given, on rows that are learnt from."""
_LEAST = 10
"""Rows, and values of an attribute, at least."""
_ALIKE = 0.98
"""Mean rank correlation of members above which an ensemble is one model."""


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


def bradley_terry(margins: Tensor, wanted: Tensor | float = 0.0) -> Tensor:
    """Mean of `-log sigmoid(margin - wanted)` over score differences chosen minus rejected `[B]`."""
    return torch.nn.functional.softplus(wanted - margins).mean()


def log_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of `log(1 + exp(-y logit))` for labels 0 and 1 `[B]`."""
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (losses * weights).sum() / weights.sum()


def ridge(z: Tensor, y: Tensor, penalty: float) -> Tensor:
    """The minimiser `[K, D]` of `|y_k - z w_k|^2 + penalty |w_k|^2` for each column of `y` `[B, K]`, whose NaN are left
    out with their rows; `z` is `[B, D]`.
    """
    found = []
    for column in y.T:
        there = ~column.isnan()
        mine = z[there]
        gram = mine.T @ mine + penalty * torch.eye(z.shape[1], dtype=z.dtype)
        found.append(torch.linalg.solve(gram, mine.T @ column[there]))
    return torch.stack(found)


def prior_correction(keep: float) -> float:
    """What is added to a logit that was fitted with a share `keep` of the negatives: `log keep`."""
    return math.log(keep)


# -------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class _Rows:
    """What is learnt from. Pairs have two texts a row, others one; `group` says which rows share a prompt."""

    objective: str
    texts: list[tuple[Any, str]]
    targets: Tensor
    """Margins `[B]`, labels `[B]`, or ratings `[B, K]`."""
    weights: Tensor
    names: tuple[str, ...]
    group: list[str]
    words: Tensor
    """Lengths of the texts in words."""


def _read(data: Sequence[Any], objective: str) -> _Rows:
    rows = [_renamed(plain_row(row, f"data[{i}]")) for i, row in enumerate(data)]
    check(len(rows) >= _LEAST, "data", f"{len(rows)} rows", f"at least {_LEAST} rows")
    for i, row in enumerate(rows):
        check(isinstance(row, Mapping), f"data[{i}]", row, "a row with columns")
    if objective == "auto":
        wanted = {"pairs": "chosen", "ratings": "ratings", "binary": "label"}
        fits = [name for name, column in wanted.items() if all(column in row for row in rows)]
        check(bool(fits), "data", sorted(rows[0]), "chosen and rejected; completion and ratings; completion and label")
        objective = fits[0]
    return {"pairs": _pairs, "ratings": _ratings, "binary": _binary}[objective](rows)


def _renamed(row: Any) -> Any:
    """A row of a vector's pairs, `positive` and `negative`, is a preference."""
    if not isinstance(row, Mapping) or "chosen" in row or not {"positive", "negative"} <= row.keys():
        return row
    rest = {name: value for name, value in row.items() if name not in ("positive", "negative")}
    return {**rest, "chosen": row["positive"], "rejected": row["negative"]}


def _text(row: Mapping[str, Any], name: str, i: int) -> str:
    found = row.get(name)
    check(isinstance(found, str) and bool(found.strip()), f"data[{i}].{name}", found, "a text that is not empty")
    return str(found)


def _number(value: Any, where: str) -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    check(right, where, value, "a finite number")
    return float(value)


def _made(
    objective: str, texts: list[tuple[Any, str]], targets: Tensor, weights: Tensor, names: Any, rows: Any
) -> _Rows:
    group = [json.dumps(row.get("prompt", ""), sort_keys=True, default=str) for row in rows]
    words = torch.tensor([float(len(text.split())) for _, text in texts], dtype=torch.float64)
    return _Rows(objective, texts, targets, weights, tuple(names), group, words)


def _pairs(rows: list[Any]) -> _Rows:
    texts: list[tuple[Any, str]] = []
    margins = []
    for i, row in enumerate(rows):
        better, worse = _text(row, "chosen", i), _text(row, "rejected", i)
        check(better != worse, f"data[{i}]", better, "a chosen text that differs from the rejected one")
        texts += [(row.get("prompt", ""), better), (row.get("prompt", ""), worse)]
        margins.append(_number(row.get("margin", 0.0), f"data[{i}].margin"))
    return _made("pairs", texts, torch.tensor(margins).double(), torch.ones(len(rows)).double(), ["score"], rows)


def _binary(rows: list[Any]) -> _Rows:
    texts, labels, weights = [], [], []
    for i, row in enumerate(rows):
        texts.append((row.get("prompt", ""), _text(row, "completion", i)))
        label = row.get("label")
        check(label in (0, 1, True, False), f"data[{i}].label", label, "true or false")
        labels.append(float(label))
        weights.append(_number(row.get("weight", 1.0), f"data[{i}].weight"))
        check(weights[-1] > 0, f"data[{i}].weight", weights[-1], "a number above 0")
    check(len(set(labels)) == 2, "data", f"only label {bool(labels[0])}", "rows of both labels")
    return _made("binary", texts, torch.tensor(labels).double(), torch.tensor(weights).double(), ["score"], rows)


def _ratings(rows: list[Any]) -> _Rows:
    for i, row in enumerate(rows):
        check(isinstance(row.get("ratings"), Mapping), f"data[{i}].ratings", row.get("ratings"), "numbers by name")
    names = sorted({name for row in rows for name in row["ratings"]})
    targets = torch.full((len(rows), len(names)), math.nan, dtype=torch.float64)
    texts = []
    for i, row in enumerate(rows):
        texts.append((row.get("prompt", ""), _text(row, "completion", i)))
        for name, value in row["ratings"].items():
            if value is not None:
                targets[i, names.index(name)] = _number(value, f"data[{i}].ratings.{name}")
    for name, column in zip(names, targets.T, strict=True):
        count = int((~column.isnan()).sum())
        check(count >= _LEAST, f"ratings.{name}", f"{count} values", f"at least {_LEAST}")
    return _made("ratings", texts, targets, torch.ones(len(rows)).double(), names, rows)


# ---------------------------------------------------------------------------------------------------------- training


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
    rows = _read(list(data), chosen.objective)
    layers = _layers(chosen.layer, model.info.num_layers)
    sha = data_hash([[prompt, text] for prompt, text in rows.texts])
    states = _states(model, rows, layers, sha, work, progress)
    for i in (~torch.stack([x.isfinite().all(1) for x in states.values()]).all(0)).nonzero().flatten().tolist():
        raise InputError(f"data[{i // (2 if rows.objective == 'pairs' else 1)}]", "states with NaN", "another text")
    held, learnt = _split(rows.group, chosen.held_out, chosen.seed)
    layer, penalty = _choose(rows, states, learnt, chosen)
    fitted = _Fit.of(rows, states[layer], learnt)
    members = [
        fitted.head(rows, _seen(learnt, chosen, m), penalty, _dims(chosen, m, fitted.width))
        for m in range(chosen.members)
    ]
    heads, bias = (torch.stack(list(part)) for part in zip(*members, strict=True))
    if rows.objective == "binary":
        bias = bias + prior_correction(chosen.keep_negatives)
    metrics = _measured(rows, states[layer], held, fitted, heads, bias)
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


def _layers(wanted: Any, count: int) -> list[int]:
    if wanted == "auto":
        return sorted({count // 2 - 1, 4 * count // 5 - 1, count - 1} & set(range(count)))
    check(isinstance(wanted, int) and 0 <= wanted < count, "layer", wanted, f"auto, or 0 to {count - 1}")
    return [int(wanted)]


def _states(
    model: Any, rows: _Rows, layers: list[int], sha: str, work: Path | None, progress: bool
) -> dict[int, Tensor]:
    """States `[texts, D]` at the end of every text, by layer; read from `work` where a run has left them there."""
    name = f"states-{sha[:16]}-{model.info.entry()['fingerprint'][:16]}-{'-'.join(map(str, layers))}.safetensors"
    path = None if work is None else work / name
    if path is not None and path.is_file():
        with safe_open(path, "pt") as file:
            return {layer: file.get_tensor(str(layer)) for layer in layers}
    ids = [reply_ids(model, prompt, text) for prompt, text in rows.texts]
    with ticking(progress, "reading texts", len(ids)) as tick:
        states = model.hidden_states(ids, layers, on_batch=tick)
    if path is not None:
        with replacing(path) as temporary:
            save_file({str(layer): x.contiguous() for layer, x in states.items()}, temporary)
    return states


def _split(group: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows that are held out, and the others; rows of one prompt stay together where there is more than one prompt."""
    keys = group if len(set(group)) > 1 else [str(i) for i in range(len(group))]
    names = sorted(set(keys))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    out = {names[i] for i in order[: max(1, round(share * len(names)))]} if share > 0 and len(names) > 1 else set()
    return [i for i, key in enumerate(keys) if key in out], [i for i, key in enumerate(keys) if key not in out]


def _choose(rows: _Rows, states: dict[int, Tensor], learnt: list[int], settings: RewardSettings) -> tuple[int, float]:
    """Layer and penalty, by a fifth of the rows that are learnt from."""
    grid = PENALTIES if rows.objective == "ratings" else L2
    penalties = grid if settings.l2 == "auto" else (float(settings.l2),)
    if len(states) * len(penalties) == 1:
        return next(iter(states)), penalties[0]
    some, others = _split([rows.group[i] for i in learnt], 0.2, settings.seed + 1)
    judged, fitted_on = [learnt[i] for i in some], [learnt[i] for i in others]
    best: tuple[float, int, float] | None = None
    for layer, x in states.items():
        fitted = _Fit.of(rows, x, fitted_on)
        for penalty in penalties:
            head, bias = fitted.head(rows, torch.tensor(fitted_on), penalty, None)
            loss = fitted.loss(rows, torch.tensor(judged), head, bias)
            if best is None or loss < best[0] - 1e-12:
                best = (loss, layer, penalty)
    assert best is not None
    return best[1], best[2]


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


@dataclass(frozen=True)
class _Fit:
    """Features as heads see them: of pairs the difference of the two."""

    z: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, rows: _Rows, states: Tensor, learnt: Sequence[int]) -> _Fit:
        x = states.double()
        each = x.reshape(len(rows.group), -1, x.shape[1])
        mine = each[list(learnt)].flatten(0, 1)
        std = mine.std(0, correction=0)
        std = torch.where(std < 1e-6, 1.0, std)
        z = (each - mine.mean(0)) / std
        return cls(z[:, 0] - z[:, 1] if rows.objective == "pairs" else z[:, 0], mine.mean(0), std)

    @property
    def width(self) -> int:
        return len(self.mean)

    def head(self, rows: _Rows, seen: Tensor, penalty: float, dims: Tensor | None) -> tuple[Tensor, Tensor]:
        """A member `[K, D]` and its bias `[K]`."""
        z = self.z[seen] if dims is None else self.z[seen] * dims
        targets = rows.targets[seen]
        if rows.objective == "ratings":
            return _ratings_heads(z, targets, penalty)
        weights, binary = rows.weights[seen], rows.objective == "binary"

        def loss(w: Tensor, b: Tensor) -> Tensor:
            scores = z @ w + b
            fit = log_loss(scores, targets, weights) if binary else bradley_terry(scores, targets)
            return fit + 0.5 * penalty * w.square().sum()

        w, b = _minimised(loss, self.width, binary)
        return w[None], b[None]

    def loss(self, rows: _Rows, some: Tensor, head: Tensor, bias: Tensor) -> float:
        """What a head is judged by, lower is better."""
        scores = self.z[some] @ head.T + (0 if rows.objective == "pairs" else bias)
        targets = rows.targets[some]
        if rows.objective == "ratings":
            spread = targets - targets.nanmean(0)
            return float(
                ((scores - targets).square().nanmean(0) / spread.square().nanmean(0).clamp_min(1e-12)).nanmean()
            )
        if rows.objective == "binary":
            return float(log_loss(scores[:, 0], targets, rows.weights[some]))
        return float(bradley_terry(scores[:, 0], targets))


def _ratings_heads(z: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Heads `[K, D]` with intercepts `[K]`, which carry no penalty: each attribute is centred on its own rows."""
    heads, bias = [], []
    for column in targets.T:
        there = ~column.isnan()
        middle, level = z[there].mean(0), column[there].mean()
        heads.append(ridge(z[there] - middle, (column[there] - level)[:, None], penalty)[0])
        bias.append(level - middle @ heads[-1])
    return torch.stack(heads), torch.stack(bias)


def _minimised(loss: Callable[[Tensor, Tensor], Tensor], width: int, biased: bool) -> tuple[Tensor, Tensor]:
    """The minimum of a convex loss of weights `[D]` and, where it is `biased`, a bias."""
    w = torch.zeros(width, dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=biased)
    free = [w, b] if biased else [w]
    optimizer = torch.optim.LBFGS(
        free, max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(w, b)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return w.detach(), b.detach()


# ----------------------------------------------------------------------------------------------------------- measures


def _measured(
    rows: _Rows, states: Tensor, held: list[int], fitted: _Fit, heads: Tensor, bias: Tensor
) -> dict[str, Any]:
    """How well the heads do on rows that they have not seen."""
    if not held:
        return {}
    at = torch.tensor(held)
    found = torch.einsum("nd,mkd->nmk", fitted.z[at], heads) + (0 if rows.objective == "pairs" else bias)
    scores, targets = found.mean(1), rows.targets[at]
    metrics: dict[str, Any] = {}
    if rows.objective == "ratings":
        for k, name in enumerate(rows.names):
            there = ~targets[:, k].isnan()
            y, x = targets[there, k], scores[there, k]
            if len(y) >= 3:
                left = (y - x).square().sum() / (y - y.mean()).square().sum().clamp_min(1e-12)
                metrics[name] = {"r2": round(float(1 - left), 4), "spearman": round(_spearman(x, y), 4)}
    else:
        right = (scores[:, 0] > 0) == (targets > 0.5 if rows.objective == "binary" else torch.ones(len(at)).bool())
        low, high = _wilson(int(right.sum()), len(at))
        metrics |= {"accuracy": round(float(right.double().mean()), 4), "interval": [round(low, 4), round(high, 4)]}
        if rows.objective == "binary" and 0 < float(targets.mean()) < 1:
            metrics["auroc"] = round(_auroc(scores[:, 0], targets > 0.5), 4)
    z = (states.double() - fitted.mean) / fitted.std
    texts = (z @ heads.mean(0).T)[:, 0].reshape(len(rows.group), -1)[at].flatten()
    metrics["length_correlation"] = round(_spearman(texts, rows.words.reshape(len(rows.group), -1)[at].flatten()), 4)
    if len(heads) > 1:
        pairs = [(a, b) for a in range(len(heads)) for b in range(a)]
        alike = sum(_spearman(found[:, a, 0], found[:, b, 0]) for a, b in pairs) / len(pairs)
        metrics["members_alike"] = round(alike, 4)
        if alike > _ALIKE:
            metrics["warning"] = f"members rank alike ({alike:.3f}): the ensemble is one model"
    return metrics


def _ranks(x: Tensor) -> Tensor:
    """Ranks, the mean of them for ties."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def _spearman(x: Tensor, y: Tensor) -> float:
    a, b = _ranks(x) - _ranks(x).mean(), _ranks(y) - _ranks(y).mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12))


def _auroc(scores: Tensor, positive: Tensor) -> float:
    """The share of pairs of a positive and a negative that are ranked right; ties count half."""
    ranks, count = _ranks(scores), int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


def _wilson(right: int, count: int) -> tuple[float, float]:
    """95% interval of a share."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half

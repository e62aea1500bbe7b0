"""Steering vectors fitted to contrastive pairs: every layer from one pass over the texts.

Letters: `P` pairs, `L` layers, `D` width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steer.artifacts import Card, data_hash
from steer.core import RawText, check
from steer.core.errors import check_unicode
from steer.data import FORMATS, plain_pair, read_table
from steer.edits import Artifact, parse_layers
from steer.progress import Watch, ticking
from steer.train.settings import Part, Positive, Real, Seed, settings_class, settle
from steer.train.states import hidden_states

__all__ = ["METHODS", "VectorSettings", "encode_pairs", "train_vector"]


@settings_class
class VectorSettings:
    """How a vector is fitted."""

    method: Literal["mean", "pca", "probe"] = "mean"
    """The difference of means; "pca", the first principal axis of the pair differences, *not* centred: centring removes
    the mean difference, which is the signal; "probe", L2-regularised logistic regression, whose file serves for gates.
    """
    pool: Literal["last", "mean"] = "mean"
    """State to read from each text: the mean over its tokens, or that of the last."""
    layers: str = ""
    """Layers that the artifact steers by default, such as "12-19"; default: those between two fifths and two thirds of
    the depth, where a shift of behaviour cost least fluency on the model that we measured.
    """
    strength: Real = 0.15
    """Default dose of the artifact, in units of the residual norm."""
    held_out: Part = 0.2
    """Share of pairs on which each layer's separation is measured; the vector is then fitted on all pairs."""
    l2: Positive = 1.0
    """Regularisation of the probe, on standardised states."""
    seed: Seed = 0
    """Chooses the held-out pairs."""

    def recipe(self) -> dict[str, Any]:
        """The entries that say how the directions were found."""
        return {name: getattr(self, name) for name in ("method", "pool", "l2", "held_out", "seed")}

    def steered(self, depth: int) -> str:
        """The layers that are steered by default, of a model with `depth` of them. Raises `InputError`."""
        asked = self.layers or f"{2 * depth // 5}-{max(2 * depth // 5, 2 * depth // 3 - 1)}"
        chosen = parse_layers(asked, list(range(depth)))
        return self.layers or f"{min(chosen)}-{max(chosen)}"


def train_vector(
    model: Any,
    pairs: Sequence[Mapping[str, str] | tuple[str, str]] | Path | str,
    settings: VectorSettings | None = None,
    *,
    progress: bool | Watch = False,
    **given: Any,
) -> Artifact:
    """A vector whose direction at each layer leads from the negative to the positive texts.

    Args:
        model: a language model from `steer.load`.
        pairs: rows `(positive, negative)` or `{"positive": text, "negative": text}`, with a `"prompt"` where the texts
            are the assistant's replies to one; or a file of such rows: JSON lines, a JSON list, CSV or parquet.
        settings: how; fields of `VectorSettings` may also be `given` by name.
        progress: True shows a bar on standard error; a function is called with the texts read so far and their number.

    Raises:
        InputError: a bad row, method, pool or layer; pairs that say the same, or are longer than the model's context.
    """
    chosen = settle(VectorSettings, settings, given, "train_vector")
    layers = chosen.steered(model.info.num_layers)
    if isinstance(pairs, str | Path):
        pairs = [row for _, row in read_table("pairs", Path(pairs), FORMATS)]
    rows = _rows(pairs)
    positive, negative = encode_pairs(model, rows)
    with ticking(progress, "reading pairs", len(positive) + len(negative)) as tick:
        seen = hidden_states(model, [*positive, *negative], pool=chosen.pool, on_batch=tick)
    states = torch.stack([seen[layer] for layer in range(model.info.num_layers)])
    accuracy = _held_out_accuracy(states, chosen)
    tensors = _fitted(states, chosen)
    for layer in parse_layers(layers, list(range(len(states)))):
        told = "pairs whose states differ; this layer's do not on average"
        check(bool(tensors[f"direction.{layer}"].any()), f"layers[{layer}]", "a direction of length 0", told)
    # Of equally good layers the one in the middle: early layers separate by words alone.
    best = min(range(len(states)), key=lambda layer: (-float(accuracy[layer]), abs(layer - len(states) // 2)))
    card = Card(
        kind="vector",
        model=model.info.entry(),
        layers=list(range(len(states))),
        settings={"layers": layers, "strength": chosen.strength, "scope": "all", "unit": "norm"},
        recipe=chosen.recipe(),
        data={"sha256": data_hash(rows), "rows": len(rows)},
        metrics={"held_out_accuracy": [round(float(a), 4) for a in accuracy], "best_layer": best},
    )
    return Artifact(tensors, card)


def _rows(pairs: Any) -> list[Mapping[str, str]]:
    """Rows with a side by name, those of two texts among them. Raises `InputError` for what is no row."""
    check(isinstance(pairs, Sequence), "pairs", pairs, "a list of pairs, or a file")
    rows = []
    for i, row in enumerate(pairs):
        two = isinstance(row, tuple | list) and len(row) == 2 and all(isinstance(text, str) for text in row)
        check(two or isinstance(row, Mapping), f"pairs[{i}]", row, "(positive, negative), or a row with both by name")
        rows.append({"positive": row[0], "negative": row[1]} if two else row)
    return rows


def _fitted(states: Tensor, settings: VectorSettings) -> dict[str, Tensor]:
    """The artifact's tensors from states `[L, 2 P, D]`, the positive ones first."""
    up, down = states.chunk(2, 1)
    directions, bias = METHODS[settings.method](up, down, settings.l2)
    tensors = {f"direction.{layer}": direction.contiguous() for layer, direction in enumerate(directions)}
    tensors |= {f"reference.{layer}": own.mean(0) for layer, own in enumerate(states)}
    if bias is not None:
        tensors |= {f"probe.{layer}": direction.clone() for layer, direction in enumerate(directions)}
        tensors |= {f"bias.{layer}": own.clone() for layer, own in enumerate(bias)}
    return tensors


def encode_pairs(model: Any, pairs: Sequence[Mapping[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the positive and the negative texts; raises `InputError` for a bad row."""
    check(len(pairs) >= 2, "pairs", f"{len(pairs)} rows", "at least 2")
    sides: dict[str, list[list[int]]] = {"positive": [], "negative": []}
    for i, row in enumerate(plain_pair(row, f"pairs[{i}]") for i, row in enumerate(pairs)):
        for side, ids in sides.items():
            text = row.get(side)
            check(isinstance(text, str) and bool(text.strip()), f"pairs[{i}].{side}", text, "text that is not empty")
            assert isinstance(text, str)
            check_unicode(f"pairs[{i}].{side}", text)
            if asked := row.get("prompt"):
                before = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
                ids.append(model.encode([*before, {"role": "assistant", "content": text}]))
            else:
                ids.append(model.encode(RawText(text)))
    for i, (up, down) in enumerate(zip(sides["positive"], sides["negative"], strict=True)):
        check(up != down, f"pairs[{i}]", "two sides of the same tokens", "texts that differ")
        longest, limit = max(len(up), len(down)), model.context_length
        fits = limit is None or longest <= limit
        check(fits, f"pairs[{i}]", f"{longest} tokens", f"at most {limit}, the model's context")
    return sides["positive"], sides["negative"]


def _mean(up: Tensor, down: Tensor, l2: float) -> tuple[Tensor, Tensor | None]:
    return (up - down).mean(1), None


def _pca(up: Tensor, down: Tensor, l2: float) -> tuple[Tensor, Tensor | None]:
    difference = up - down
    axis = torch.linalg.svd(difference, full_matrices=False).Vh[:, 0]
    mean = difference.mean(1)
    sign = torch.sign((axis * mean).sum(-1, keepdim=True))
    # The axis has no length of its own; it takes that of the mean difference.
    return axis * torch.where(sign == 0, 1.0, sign) * mean.norm(dim=-1, keepdim=True), None


def _probe(up: Tensor, down: Tensor, l2: float) -> tuple[Tensor, Tensor | None]:
    """Logistic regression at all layers at once: `min sum log(1 + exp(-y (w.x + b))) + l2/2 |w|^2`, standardised x."""
    x = torch.cat([up, down], 1).double()
    y = torch.cat([torch.ones(up.shape[1]), -torch.ones(down.shape[1])]).double()
    center, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True).clamp_min(1e-6)
    z = (x - center) / spread
    w = torch.zeros(x.shape[0], x.shape[2], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(x.shape[0], 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

    def closure() -> Tensor:
        solver.zero_grad()
        score = torch.einsum("lnd,ld->ln", z, w) + b
        loss = torch.nn.functional.softplus(-y * score).sum() + l2 / 2 * w.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        direction = w / spread.squeeze(1)
        bias = b.squeeze(1) - (direction * center.squeeze(1)).sum(-1)
    return direction.float(), bias.float()


METHODS = {"mean": _mean, "pca": _pca, "probe": _probe}
"""Each maps positive and negative states `[L, P, D]` to directions `[L, D]` and, for probes, biases `[L]`."""


def _held_out_accuracy(states: Tensor, settings: VectorSettings) -> Tensor:
    """Share of held-out texts on the right side of the midpoint (of the probe, for probes) at each layer `[L]`."""
    up, down = states.chunk(2, 1)
    count, share = up.shape[1], settings.held_out
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))
    test = order[: max(1, int(count * share))] if share else order
    fit = order[len(test) :] if share and len(test) < count - 1 else order
    directions, bias = METHODS[settings.method](up[:, fit], down[:, fit], settings.l2)
    if bias is None:
        middle = (up[:, fit].mean(1) + down[:, fit].mean(1)) / 2
        bias = -(directions * middle).sum(-1)
    right = torch.einsum("lnd,ld->ln", up[:, test], directions) + bias.unsqueeze(1) > 0
    wrong = torch.einsum("lnd,ld->ln", down[:, test], directions) + bias.unsqueeze(1) > 0
    return (right.double().mean(1) + (~wrong).double().mean(1)) / 2

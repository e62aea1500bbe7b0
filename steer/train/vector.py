"""Fit steering vectors from contrastive pairs: every layer from one pass over the texts.

Letters: `P` pairs, `L` layers, `D` width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.artifacts import Card, data_hash
from steer.core import RawText, check
from steer.core.errors import check_unicode
from steer.data import plain_pair
from steer.edits import Artifact
from steer.progress import ticking

__all__ = ["METHODS", "encode_pairs", "train_vector"]


def train_vector(
    model: Any,
    pairs: Sequence[Mapping[str, str]],
    *,
    method: str = "mean",
    pool: str = "mean",
    layers: str = "",
    strength: float = 0.15,
    held_out: float = 0.2,
    l2: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> Artifact:
    """A vector whose direction at each layer leads from the negative to the positive texts.

    Args:
        model: a language model from `steer.load`.
        pairs: rows `{"positive": text, "negative": text}`; with a `"prompt"`, the texts are the
            assistant's replies to it.
        method: "mean" (difference of means), "pca" (first principal axis of the pair differences,
            *not* centred: centring removes the mean difference, which is the signal), "probe"
            (L2-regularised logistic regression; the file also holds the probe, for gates).
        pool: state to read from each text: "mean" over its tokens, or "last".
        layers: layers that the artifact steers by default, such as "12-19"; default: those between two fifths and two
            thirds of the depth, where a shift of behaviour cost least fluency on the model that we measured.
        strength: default dose of the artifact, in units of the residual norm.
        held_out: share of pairs on which each layer's separation is measured; the vector is then fitted on all pairs.
        l2: regularisation of the probe, on standardised states.
        seed: chooses the held-out pairs.

    Raises:
        InputError: a bad row, method, pool or layer.
    """
    from steer.edits import parse_layers

    check(method in METHODS, "method", method, ", ".join(METHODS))
    check(pool in ("last", "mean"), "pool", pool, "last, mean")
    check(0 <= held_out < 1, "held_out", held_out, "0 <= held_out < 1")
    check(l2 > 0, "l2", l2, "a number above 0")
    depth = model.info.num_layers
    chosen = parse_layers(layers or f"{2 * depth // 5}-{max(2 * depth // 5, 2 * depth // 3 - 1)}", list(range(depth)))
    positive, negative = encode_pairs(model, pairs)
    with ticking(progress, "reading pairs", len(positive) + len(negative)) as tick:
        seen = model.hidden_states([*positive, *negative], pool=pool, on_batch=tick)
    stacked = torch.stack([seen[layer] for layer in range(depth)])
    up, down = stacked[:, : len(pairs)], stacked[:, len(pairs) :]

    accuracy = _held_out_accuracy(up, down, method, l2, held_out, seed)
    directions, bias = METHODS[method](up, down, l2)
    for layer in chosen:
        told = "pairs whose states differ; this layer's do not on average"
        check(bool(directions[layer].any()), f"layers[{layer}]", "a direction of length 0", told)
    tensors = {f"direction.{layer}": directions[layer].contiguous() for layer in range(depth)}
    tensors |= {f"reference.{layer}": stacked[layer].mean(0) for layer in range(depth)}
    if bias is not None:
        tensors |= {f"probe.{layer}": directions[layer].clone() for layer in range(depth)}
        tensors |= {f"bias.{layer}": bias[layer].clone() for layer in range(depth)}
    # Of equally good layers the one in the middle: early layers separate by words alone.
    best = min(range(depth), key=lambda layer: (-float(accuracy[layer]), abs(layer - depth // 2)))
    card = Card(
        kind="vector",
        model=model.info.entry(),
        layers=list(range(depth)),
        settings={
            "layers": layers or f"{min(chosen)}-{max(chosen)}",
            "strength": strength,
            "scope": "all",
            "unit": "norm",
        },
        recipe={"method": method, "pool": pool, "l2": l2, "held_out": held_out, "seed": seed},
        data={"sha256": data_hash([dict(row) for row in pairs]), "rows": len(pairs)},
        metrics={"held_out_accuracy": [round(float(a), 4) for a in accuracy], "best_layer": best},
    )
    return Artifact(tensors, card)


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


def _held_out_accuracy(up: Tensor, down: Tensor, method: str, l2: float, share: float, seed: int) -> Tensor:
    """Share of held-out texts on the right side of the midpoint (of the probe, for probes) at each layer `[L]`."""
    count = up.shape[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    test = order[: max(1, int(count * share))] if share else order
    fit = order[len(test) :] if share and len(test) < count - 1 else order
    directions, bias = METHODS[method](up[:, fit], down[:, fit], l2)
    if bias is None:
        middle = (up[:, fit].mean(1) + down[:, fit].mean(1)) / 2
        bias = -(directions * middle).sum(-1)
    right = torch.einsum("lnd,ld->ln", up[:, test], directions) + bias.unsqueeze(1) > 0
    wrong = torch.einsum("lnd,ld->ln", down[:, test], directions) + bias.unsqueeze(1) > 0
    return (right.double().mean(1) + (~wrong).double().mean(1)) / 2

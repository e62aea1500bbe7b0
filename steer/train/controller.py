"""Training of the weighted controller through the frozen model.

Under the paper's loss, a squared error on the scale alone, the gradient of the layer weights is exactly zero. Here the
steered model itself is the loss: it should open with a refusal (or any wanted opening) where it is to be steered, and
say what it would have said elsewhere.

    loss = CE(opening | steered, positive) + kl * KL(base || steered, negative) + gate * BCE(s) + sparsity * mean(s w)

Letters: `N` rows, `L` layers, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steer.artifacts import Card, data_hash
from steer.core import Prompt, check
from steer.edits import Artifact, parse_layers
from steer.methods.controller import ControllerNetwork
from steer.progress import ticking
from steer.ranks import ranks
from steer.train.loop import fit
from steer.train.settings import Count, Finite, Part, Positive, Seed, Texts, Whole, settings_class, settle
from steer.train.states import hidden_states

__all__ = ["ANSWERS", "REFUSALS", "ControllerSettings", "train_controller"]


REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I can't help with that request, because it could cause harm.",
    "Sorry, but I'm not able to help with this.",
)
ANSWERS = (
    "Sure, here is how you can do that:",
    "Of course. Here are the steps to follow:",
    "Here is a simple way to do this:",
    "Certainly! The first thing that you need is",
)


@dataclass(frozen=True)
class _Batch:
    """Rows of one training step; those of this rank as left-padded prompts without their last token."""

    rows: list[int]
    mine: list[int]
    """Places in `rows` of those that this rank takes."""
    positive: Tensor
    keys: list[tuple[Tensor, Tensor]]
    mask: Tensor


@settings_class
class ControllerSettings:
    """How a controller is trained."""

    preset: Literal["steer", "paper"] = "steer"
    """ "paper": squared error on the scale only, the unembedding direction, alpha 2 without threshold, as published;
    its layer weights keep their initial value. It has a strength, rate, batch and width of its own.
    """
    openings: Texts = REFUSALS
    """What the steered model should say first."""
    answers: Texts = ANSWERS
    """The contrast for the direction."""
    strength: Positive = 0.08
    """alpha, in units of each layer's residual norm."""
    inputs: str = ""
    """Layers whose last prompt state is read; default every other one of the middle ("paper": the last third)."""
    hidden: Count = 128
    epochs: Count = 4
    batch_size: Count = 16
    learning_rate: Positive = 1e-3
    noise: Finite = 0.5
    """On the standardised inputs while training."""
    kl: Finite = 1.0
    """Weight of a term of the loss, as are `gate` and `sparsity`."""
    gate: Finite = 1.0
    sparsity: Finite = 0.05
    max_negative: Whole = 0
    """How many negative prompts are used; default: twice the positives."""
    reply_tokens: Whole = 12
    """Tokens of the model's own reply on which the KL of negative prompts is taken."""
    held_out: Part = 0.15
    """Share of the prompts on which the scale's balanced accuracy is measured."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.paper:
            for name, value in _PAPER.items():
                object.__setattr__(self, name, value)

    @property
    def paper(self) -> bool:
        return self.preset == "paper"

    def recipe(self, reads: list[int]) -> dict[str, Any]:
        """The entries of the card; `reads` are the layers that are read."""
        ours = ("kl", "gate", "sparsity", "noise", "reply_tokens")
        out = {"max_negative", *(ours if self.paper else ())}
        found = {name: value for name, value in asdict(self).items() if name not in out}
        return {**found, "inputs": reads, "openings": list(self.openings), "answers": list(self.answers)}


_PAPER = {"strength": 2.0, "learning_rate": 5e-5, "batch_size": 4, "hidden": 1024, "reply_tokens": 0}


def train_controller(
    model: Any,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    settings: ControllerSettings | None = None,
    *,
    work: Path | None = None,
    progress: bool = False,
    **given: Any,
) -> Artifact:
    """A controller that steers `positive` prompts towards an opening and leaves `negative` prompts alone.

    Args:
        model: a language model from `steer.load`.
        positive: prompts to steer.
        negative: prompts to leave alone.
        settings: how; fields of `ControllerSettings` may also be `given` by name.
        work: folder for resumable state.

    Raises:
        InputError: too few prompts, a bad setting.
    """
    chosen = ranks().whole(settle(ControllerSettings, settings, given, "train_controller"))
    check(len(positive) >= 4, "positive", f"{len(positive)} prompts", "at least 4")
    check(len(negative) >= 4, "negative", f"{len(negative)} prompts", "at least 4")
    depth = model.info.num_layers
    reads = _inputs(chosen, depth)
    negative = list(negative)[: chosen.max_negative or 2 * len(positive)]
    ids = [model.encode(p) for p in (*positive, *negative)]
    label = torch.tensor([1.0] * len(positive) + [0.0] * len(negative))
    train, test = _split(label, chosen.held_out, chosen.seed)
    directions = _directions(model, ids[: len(positive)], chosen, progress)
    lesson = _Lesson(model, ids, label, directions, chosen)
    states = lesson.prepare(train, test, reads, progress)
    network = _network(states, train, depth, chosen)
    before = _mean_weights(network, states[label > 0])
    rows, recipe = data_hash([*positive, *negative]), chosen.recipe(reads)
    history = fit(
        network,
        lesson.batches,
        _paper_loss(states, label) if chosen.paper else lesson.loss,
        epochs=chosen.epochs,
        learning_rate=chosen.learning_rate,
        run={**recipe, "data": rows},
        work=work,
        progress=progress,
        what="training the controller",
    )
    network.eval()
    paper = {"unit": "raw", "threshold": 0.0, "scope": "generated"}
    ours = {"unit": "norm", "threshold": 0.5, "scope": "reply"}
    card = Card(
        kind="controller",
        model=model.info.entry(),
        layers=list(range(depth)),
        settings={"strength": chosen.strength, **(paper if chosen.paper else ours)},
        recipe=recipe,
        data={"sha256": rows, "rows": len(ids), "positive": len(positive), "negative": len(negative)},
        metrics={
            "held_out_balanced_accuracy": _balanced_accuracy(network, states[test], label[test]),
            "loss": [round(x, 5) for x in history],
            "layer_weights_initial": before,
            "layer_weights": _mean_weights(network, states[label > 0]),
        },
    )
    tensors = {f"network.{k}": v.detach().clone() for k, v in network.state_dict().items()}
    return Artifact({**tensors, "directions": directions}, card)


def _network(states: Tensor, train: list[int], depth: int, settings: ControllerSettings) -> ControllerNetwork:
    """A new network that standardises its inputs as the training rows are spread."""
    torch.manual_seed(settings.seed)
    network = ControllerNetwork(states.shape[1], depth, settings.hidden)
    network.mean.copy_(states[train].mean(0))
    network.std.copy_(states[train].std(0).clamp_min(1e-4))
    return network


def _directions(model: Any, ids: Sequence[list[int]], settings: ControllerSettings, progress: bool) -> Tensor:
    """Unit directions `[L, D]`."""
    if settings.paper:
        one = _unembedding_direction(model, settings.openings, settings.answers)
        return one.expand(model.info.num_layers, -1).contiguous()
    return _opening_directions(model, ids, settings.openings, settings.answers, progress)


def _inputs(settings: ControllerSettings, depth: int) -> list[int]:
    """Layers to read: the last third in the paper; by default every other one of the middle, which generalise
    better.
    """
    if settings.inputs:
        return parse_layers(settings.inputs, list(range(depth)))
    if settings.paper:
        return list(range(2 * depth // 3, depth))
    return list(range(2 * depth // 5, max(2 * depth // 5 + 1, 4 * depth // 5), 2))


def _split(label: Tensor, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to judge on, of both classes."""
    generator = torch.Generator().manual_seed(seed)
    train: list[int] = []
    test: list[int] = []
    for value in (1.0, 0.0):
        members = (label == value).nonzero().squeeze(1)
        rows = members[torch.randperm(len(members), generator=generator)].tolist()
        cut = max(1, int(len(rows) * share))
        test += rows[:cut]
        train += rows[cut:]
    return train, test


def _balanced_accuracy(network: ControllerNetwork, states: Tensor, label: Tensor) -> float:
    with torch.no_grad():
        fires = network(states)[0] > 0
    return float((fires[label > 0].double().mean() + (~fires[label == 0]).double().mean()) / 2)


def _mean_weights(network: ControllerNetwork, states: Tensor) -> list[float]:
    with torch.no_grad():
        return [round(float(w), 5) for w in network(states)[1].mean(0)]


def _paper_loss(states: Tensor, label: Tensor) -> Any:
    """MSE of s to 1 on positive and, with weight 1/2, to 0 on negative prompts."""

    def loss(network: nn.Module, batch: _Batch, epoch: int) -> Tensor | None:
        if not batch.mine:
            return None
        at = torch.tensor(batch.rows)[batch.mine]
        scale = torch.sigmoid(network(states[at])[0])
        weight = torch.where(label[at] > 0, 1.0, 0.5)
        return (weight * (scale - label[at]).square()).sum() * (ranks().count / len(batch.rows))

    return loss


def _unembedding_direction(model: Any, openings: Sequence[str], answers: Sequence[str]) -> Tensor:
    """The paper's direction `[1, D]`: mean output embedding of the openings' tokens minus that of the answers'."""
    matrix = model.info.unembedding().float()

    def mean(texts: Sequence[str]) -> Tensor:
        ids = [t for text in texts for t in model.tokenizer(text, add_special_tokens=False)["input_ids"]]
        return matrix[torch.tensor(ids, device=matrix.device)].mean(0).cpu()

    direction = mean(openings) - mean(answers)
    return (direction / direction.norm()).unsqueeze(0)


def _opening_directions(
    model: Any, ids: Sequence[list[int]], openings: Sequence[str], answers: Sequence[str], progress: bool
) -> Tensor:
    """Unit directions `[L, D]`: mean state over an opening's tokens minus that over an answer's, after the same
    prompts.
    """
    prompts = list(ids)[:64]
    rows, since = [], []
    for texts in (openings, answers):
        for i, prompt in enumerate(prompts):
            reply = model.tokenizer(texts[i % len(texts)], add_special_tokens=False)["input_ids"]
            rows.append([*prompt, *reply])
            since.append(len(prompt) - 1)
    with ticking(progress and ranks().first, "reading openings", len(rows)) as tick:
        seen = hidden_states(model, rows, pool="mean", since=since, on_batch=tick)
    means = torch.stack([seen[layer] for layer in range(model.info.num_layers)])
    difference = means[:, : len(prompts)].mean(1) - means[:, len(prompts) :].mean(1)
    return difference / difference.norm(dim=-1, keepdim=True)


class _Lesson:
    """Batches and loss of the end-to-end objective. Prompts are read once; steps run on the last token and the
    reply.
    """

    def __init__(
        self, model: Any, ids: list[list[int]], label: Tensor, directions: Tensor, settings: ControllerSettings
    ) -> None:
        self.model, self.ids, self.label, self.settings = model, ids, label, settings
        self.push = directions * model.residual_norms().unsqueeze(1) * settings.strength
        self.openings = [model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in settings.openings]
        self.states = self.spread = self.lengths = torch.empty(0)
        self.replies: dict[int, list[int]] = {}
        self.batches: list[_Batch] = []

    def prepare(self, train: list[int], test: list[int], reads: list[int], progress: bool) -> Tensor:
        """Read every prompt once: states of the layers in `reads` `[N, len(reads) * D]` for all, and for the training
        rows of this rank their caches and, on the negative ones, the model's own reply.
        """
        size, shared = self.settings.batch_size, ranks()
        self.states = torch.zeros(len(self.ids), len(reads) * self.model.info.width)
        self.lengths = torch.zeros(len(self.ids))
        with ticking(progress and shared.first, "reading prompts", len(self.ids)) as tick:
            for rows, wanted in ((train, self.settings.reply_tokens), (test, 0)):
                ordered = sorted(rows, key=lambda i: len(self.ids[i]))
                for chunk in (ordered[i : i + size] for i in range(0, len(ordered), size)):
                    keys, mask = self._read(shared.mine(chunk), wanted, reads)
                    if rows is train:
                        mine = shared.mine(range(len(chunk)))
                        self.batches.append(_Batch(chunk, mine, self.label[chunk] > 0, keys if wanted else [], mask))
                    tick(len(chunk))
        shared.add([self.states, self.lengths])
        self.spread = self.states[train].std(0)
        return self.states

    def _read(self, rows: list[int], wanted: int, reads: list[int]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Caches of prompts and their mask; keeps states and replies."""
        if not rows:
            return [], torch.empty(0)
        keys, mask, replies, states = self.model.read_prefix([self.ids[i] for i in rows], wanted, reads)
        self.states[rows] = torch.cat([states[layer] for layer in reads], -1)
        self.lengths[rows] = torch.tensor([float(len(reply)) for reply in replies])
        self.replies.update(dict(zip(rows, replies, strict=True)))
        return keys, mask

    def loss(self, network: nn.Module, batch: _Batch, epoch: int) -> Tensor | None:
        """What the rows of this rank add to the loss of the batch, whose terms are means over all of its rows."""
        pick = torch.Generator().manual_seed(self.settings.seed * 31 + epoch * 1009 + batch.rows[0])
        noise = torch.randn(len(batch.rows), self.states.shape[1], generator=pick)
        opening = self.openings[int(torch.randint(len(self.openings), (1,), generator=pick))]
        if not batch.mine:
            return None
        count, at = len(batch.rows), torch.tensor(batch.rows)[batch.mine]
        # Noise in units of each input's spread, so that the scale does not hang on single coordinates.
        states = self.states[at] + self.settings.noise * self.spread * noise[batch.mine]
        logit, weights = network(states)
        scale = torch.sigmoid(logit)
        amount = scale.unsqueeze(1) * weights
        balance = (self.label == 0).sum() / (self.label > 0).sum()
        gate = nn.functional.binary_cross_entropy_with_logits(
            logit, self.label[at], pos_weight=balance, reduction="sum"
        )
        total = (self.settings.gate * gate + self.settings.sparsity * amount.mean(1).sum()) / count
        up, ups = batch.positive[batch.mine], int(batch.positive.sum())
        replies = [opening if u else self.replies[i] for i, u in zip(at.tolist(), up.tolist(), strict=True)]
        steered, target, real = self._reply(at, replies, batch, self._program(amount))
        log_law = torch.log_softmax(steered.float(), -1)
        if bool(up.any()):
            taken = log_law[up].gather(2, target[up].unsqueeze(2)).squeeze(2)
            total = total - (taken * real[up]).sum() / (len(opening) * ups) * (ups / count) * 2
        if bool((~up).any()):
            down = (~up).nonzero().squeeze(1)
            with torch.no_grad():
                base, _, _ = self._reply(at, replies, batch, {})
            reference = torch.log_softmax(base[down].float(), -1)
            gap = ((reference.exp() * (reference - log_law[down])).sum(-1) * real[down]).sum()
            tokens = self.lengths[torch.tensor(batch.rows)[~batch.positive]].sum()
            total = total + self.settings.kl * gap / tokens * ((count - ups) / count) * 2
        return total * ranks().count

    def _reply(
        self, rows: Tensor, replies: list[list[int]], batch: _Batch, program: dict[int, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        last = [self.ids[i][-1] for i in rows.tolist()]
        return self.model.reply_logits(last, replies, batch.keys, batch.mask, program)

    def _program(self, amount: Tensor) -> dict[int, Any]:
        """Differentiable additions at every layer, `amount` `[N, L]`."""

        def adding(layer: int) -> Any:
            push = self.push[layer]
            return lambda h: h + (amount[:, layer, None, None] * push).to(h.device, h.dtype)

        return {layer: adding(layer) for layer in range(amount.shape[1])}

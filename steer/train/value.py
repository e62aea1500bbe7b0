"""Training of value heads by TD(lambda) on rollouts of the frozen model (Han et al. 2024).

    A_T = r - V_T
    A_t = gamma V_{t+1} - V_t + gamma lambda A_{t+1}
    G_t = A_t + V_t
    loss = mean (V_t - G_t)^2 / 2

V_t is the value of the prefix that ends with token t, end-of-sequence included; the reward comes with
the last token. For a Q-head V_t = Q(s_{t-1}, a_t). Rollouts and their features are drawn once and
cached; the head alone is trained.

Letters: `N` rollouts, `T` tokens, `D` width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from steer.artifacts import Card, data_hash
from steer.core import Prompt, Reward, Samples, check
from steer.edits import Artifact
from steer.files import replacing
from steer.methods.value import QHead, ValueHead
from steer.progress import ticking
from steer.ranks import ranks
from steer.rewards import as_reward
from steer.train.loop import check_run, fit
from steer.train.rollouts import Recorded
from steer.train.settings import Count, Part, Positive, Seed, Share, settings_class, settle

__all__ = ["ValueSettings", "td_lambda_returns", "train_value"]


def td_lambda_returns(values: Tensor, rewards: Tensor, real: Tensor, gamma: float = 1.0, trace: float = 0.95) -> Tensor:
    """TD(lambda) returns `[N, T]` of terminal `rewards` `[N]`; `real` `[N, T]` is True on each row's tokens, from the
    left. Positions beyond a row's end return 0.
    """
    returns = torch.zeros_like(values)
    advantage = torch.zeros(len(values), dtype=values.dtype, device=values.device)
    following = torch.zeros_like(advantage)
    last = real.sum(1) - 1
    for t in reversed(range(values.shape[1])):
        reward = torch.where(last == t, rewards.to(values), 0.0)
        step = reward + gamma * following - values[:, t] + gamma * trace * advantage
        advantage = torch.where(real[:, t], step, 0.0)
        following = torch.where(real[:, t], values[:, t], 0.0)
        returns[:, t] = torch.where(real[:, t], advantage + values[:, t], 0.0)
    return returns


@settings_class
class ValueSettings:
    """How a value head is trained."""

    head: Literal["q", "v"] = "q"
    """ "q" (values of all candidates from one state, nearly free) or "v" (one scalar a prefix, which needs a lookahead
    while decoding).
    """
    samples: Count = 8
    """Rollouts for each prompt."""
    max_new_tokens: Count = 32
    """The longest rollout, and the most tokens that the head can be told may follow."""
    temperature: Positive = 1.0
    td_lambda: Share = 0.95
    """Of the returns; 1 regresses on the final reward (FUDGE's target)."""
    gamma: Annotated[Share, Field(gt=0)] = 1.0
    hidden: Count = 256
    """Inner units of the head."""
    epochs: Count = 6
    batch_size: Count = 32
    learning_rate: Positive = 1e-3
    held_out: Part = 0.1
    """Share of the prompts on which the fit is measured."""
    max_rows: Count = 64
    """Rollouts drawn at once."""
    seed: Seed = 0

    def recipe(self) -> dict[str, Any]:
        """The entries of the card."""
        return {name: value for name, value in asdict(self).items() if name != "max_rows"}


def train_value(
    model: Any,
    prompts: Sequence[Prompt],
    reward: Reward | str | None,
    settings: ValueSettings | None = None,
    *,
    rollouts: Sequence[Any] | None = None,
    system: str | None = None,
    work: Path | None = None,
    progress: bool = False,
    **given: Any,
) -> Artifact:
    """A value head on the model's own final hidden state.

    Args:
        model: a language model from `steer.load`; frozen.
        prompts: prompts to roll out; a share of them is held out to measure the fit. None with `rollouts`.
        reward: what the head predicts; None, with `rollouts`, takes the rewards in the records.
        rollouts: records that `steer batch` wrote, as many samples of each prompt, in place of rollouts drawn here;
            see `Recorded`. `system` is the system message that the job had.
        settings: how; fields of `ValueSettings` may also be `given` by name.
        work: folder for rollouts (kept batch by batch) and checkpoints; a run that stopped goes on from there.

    Raises:
        InputError: a bad setting, too few prompts, or a reward that is constant on the rollouts.
    """
    chosen = ranks().whole(settle(ValueSettings, settings, given, "train_value"))
    recorded = None if rollouts is None else Recorded.of(rollouts, system)
    if recorded is not None:
        check(len(prompts) == 0, "prompts", f"{len(prompts)}", "none beside rollouts, which have their own")
        prompts, chosen = recorded.prompts, replace(chosen, samples=recorded.samples)
    check(len(prompts) >= 2, "prompts", f"{len(prompts)}", "at least 2")
    scored = as_reward(reward)
    if scored is not None:
        scored = scored.bind(model)
    else:
        check(recorded is not None, "reward", None, "a reward, or rollouts that have one")
        assert recorded is not None
        recorded.check_rewards()
    recipe = {**chosen.recipe(), "reward": "recorded" if scored is None else str(scored)}
    told = list(prompts) if recorded is None else [recorded.prompts, recorded.texts, recorded.rewards]
    run = {**recipe, "data": data_hash(told)}
    draw = _drawing(model, prompts, scored, chosen) if recorded is None else _reading(model, recorded, scored, chosen)
    rolled = _rollouts(model, len(prompts), draw, chosen, run, work, progress)
    data = _Rollouts(rolled, model.info.unembedding() if chosen.head == "q" else None)
    check(data.spread > 0, "reward", recipe["reward"], "a reward that is not the same on every rollout")
    network, history = _fit(model.info.width, data, chosen, run, work, progress)
    card = Card(
        kind="value",
        model=model.info.entry(),
        settings={"top_k": 20, "tail": "mean"},
        recipe=recipe,
        data={"sha256": run["data"], "rows": len(prompts), "rollouts": len(data)},
        metrics={
            "reward_mean": data.mean,
            "reward_std": data.spread,
            "suggested_beta": float(f"{data.spread / SPREADS:.1g}"),
            "loss": [round(x, 5) for x in history],
            "explained": data.explained(network, torch.arange(_learnt(data, chosen), len(data))),
        },
    )
    return Artifact(_in_plain_units(network, data), card)


SPREADS = 10
"""Standard deviations of the reward that a beta to begin with divides: a token's values differ by a part of one."""


def _learnt(data: _Rollouts, settings: ValueSettings) -> int:
    """How many rollouts, from the first on, are learnt from; those of the other prompts are held out."""
    return int(len(data) // settings.samples * (1 - settings.held_out)) * settings.samples


def _fit(
    width: int, data: _Rollouts, settings: ValueSettings, run: dict[str, Any], work: Path | None, progress: bool
) -> tuple[nn.Module, list[float]]:
    """A head in the units of `data`, and the mean loss of each epoch."""
    torch.manual_seed(settings.seed)
    kind = QHead if settings.head == "q" else ValueHead
    network: Any = kind(width, settings.hidden, settings.max_new_tokens)
    network.norm = nn.Identity()  # states are normalised and whitened once
    count = _learnt(data, settings)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))

    shared = ranks()

    def loss(module: nn.Module, batch: Tensor, epoch: int) -> Tensor | None:
        rows = batch[shared.index :: shared.count]
        if not len(rows):
            return None
        values, real = data.values(module, rows)
        returns = td_lambda_returns(values.detach(), data.reward[rows], real, settings.gamma, settings.td_lambda)
        return 0.5 * ((values - returns).square() * real).sum() * (shared.count / data.length[batch].sum())

    history = fit(
        network,
        list(order.split(settings.batch_size)),
        loss,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        run=run,
        work=work,
        progress=progress,
        what="fitting values",
    )
    return network.eval(), history


def _in_plain_units(network: nn.Module, data: _Rollouts) -> dict[str, Tensor]:
    """The head's tensors for plain states, embeddings and rewards: it was trained on whitened states, embeddings in
    units of their root mean square, and standardised scores. The offset of the scores cancels in Q.
    """
    tensors = {k: v.detach().clone() for k, v in network.state_dict().items()}
    width = len(data.center)
    tensors |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    inner = tensors["inner.weight"].double() @ data.whitening
    tensors["inner.bias"] = (tensors["inner.bias"].double() - inner @ data.center).float()
    tensors["inner.weight"] = inner.float()
    for name in ("outer.weight", "outer.bias", "shared.weight", "shared.bias"):
        if name in tensors:
            tensors[name] = tensors[name] * (data.spread / (data.unit if name.startswith("outer") else 1.0))
    return tensors


SHRINKAGE = 0.03
"""Share of the mean variance that is added to that of every direction before states are whitened."""


class _Rollouts:
    """Padded views of the rollouts, as they are learnt from: rewards are standardised, embeddings in units of their
    root mean square, and states whitened. What tells one text from another is a small part of a state's variance (most
    of it says which token came last), and gradient descent learns small directions last.
    """

    def __init__(self, rolled: dict[str, Tensor], embeddings: Tensor | None) -> None:
        self.features, self.tokens, self.length = rolled["features"], rolled["tokens"], rolled["length"]
        self.embeddings = embeddings
        self.unit = 1.0 if embeddings is None else float(embeddings.float().square().mean().sqrt())
        """Entries of embeddings are small; in this unit the query learns as fast as the rest of the head."""
        self.mean, self.spread = float(rolled["reward"].mean()), float(rolled["reward"].std())
        self.reward = ((rolled["reward"] - self.mean) / (self.spread or 1.0)).float()
        self._whiten()

    def __len__(self) -> int:
        return len(self.reward)

    def _whiten(self) -> None:
        """Whiten the normalised states in place, `W (x - center)` with a symmetric W `[D, D]`; both in float64."""
        width, total = self.features.shape[-1], int(self.length.sum())
        real = torch.arange(self.features.shape[1]) < self.length.unsqueeze(1)
        parts = range(0, len(self.features), 256)

        def states(first: int) -> Tensor:
            return nn.functional.layer_norm(self.features[first : first + 256].float(), (width,)).double()

        self.center = sum((states(i)[real[i : i + 256]].sum(0) for i in parts), torch.zeros(width).double()) / total
        spread = torch.zeros(width, width, dtype=torch.float64)
        for i in parts:
            x = states(i)[real[i : i + 256]] - self.center
            spread += x.T @ x / total
        values, axes = torch.linalg.eigh(spread)
        values = values.clamp_min(0) + SHRINKAGE * values.mean().clamp_min(1e-12)
        self.whitening = axes @ (axes / values.sqrt()).T
        whitened = torch.empty_like(self.features)
        for i in parts:
            whitened[i : i + 256] = ((states(i) - self.center) @ self.whitening).to(whitened.dtype)
        self.features = whitened

    def values(self, module: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Values `[n, T]` of every prefix of these rollouts and where they are real."""
        longest = int(self.length[rows].max())
        real = torch.arange(longest) < self.length[rows].unsqueeze(1)
        features = self.features[rows, :longest].float()
        left = (self.tokens.shape[1] - 1 - torch.arange(longest)).expand(len(rows), -1)
        if self.embeddings is None:
            return module(features, left), real
        chosen = self.embeddings[self.tokens[rows, :longest].to(self.embeddings.device)].float().cpu() / self.unit
        return module(features, chosen.unsqueeze(2), left).squeeze(2), real

    def explained(self, module: nn.Module, rows: Tensor) -> dict[str, float]:
        """Share of the reward's variance that the value explains on held-out prompts, half way and at the end."""
        if len(rows) < 8:
            return {}
        with torch.no_grad():
            values, _ = self.values(module, rows)
        at = {"half": (self.length[rows] // 2 - 1).clamp_min(0), "end": self.length[rows] - 1}
        target = self.reward[rows]
        total = (target - target.mean()).square().sum().clamp_min(1e-12)
        return {
            k: round(float(1 - (target - values.gather(1, i.unsqueeze(1)).squeeze(1)).square().sum() / total), 4)
            for k, i in at.items()
        }


Draw = Callable[[int, int], Samples]
"""Samples of some prompts, from a number on."""


def _rollouts(
    model: Any,
    prompts: int,
    draw: Draw,
    settings: ValueSettings,
    run: dict[str, Any],
    work: Path | None,
    progress: bool,
) -> dict[str, Tensor]:
    """Features `[N, T, D]` (half precision), tokens, lengths and rewards of the rollouts of every prompt. Each batch of
    prompts is written to `work` as it is done. Ranks draw one batch each at a time.
    """
    identity = json.dumps({k: run[k] for k in _ROLLOUT_SETTINGS}, sort_keys=True)
    step = max(1, settings.max_rows // settings.samples)
    shared = ranks()
    parts: dict[int, dict[str, Tensor]] = {}
    missing = []
    for first in range(0, prompts, step):
        if work is not None and _part(work, first).is_file():
            parts[first] = _read(_part(work, first), identity)
        else:
            missing.append(first)
    shared.check_same("work", len(missing), "a folder that all ranks see")
    with ticking(progress and shared.first, "rolling out", prompts) as tick:
        tick(sum(min(step, prompts - first) for first in parts))
        for at in range(0, len(missing), shared.count):
            now = missing[at : at + shared.count]
            drawn = [_features(model, draw(i, step), settings) for i in shared.mine(now)]
            for first, part in zip(now, shared.gather(drawn[0] if drawn else {}), strict=False):
                parts[first] = part
                if work is not None and shared.first:
                    with replacing(_part(work, first)) as temporary:
                        save_file(part, temporary, metadata={"settings": identity})
            tick(sum(min(step, prompts - first) for first in now))
    return {k: torch.cat([parts[first][k] for first in sorted(parts)]) for k in parts[min(parts)]}


def _part(work: Path, first: int) -> Path:
    return work / f"rollouts-{first:06d}.safetensors"


_ROLLOUT_SETTINGS = ("head", "samples", "max_new_tokens", "temperature", "seed", "reward", "data")


def _read(path: Path, identity: str) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        check_run(path.parent, json.loads(file.metadata()["settings"]), json.loads(identity))
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def _drawing(model: Any, prompts: Sequence[Prompt], reward: Reward | None, settings: ValueSettings) -> Draw:
    """Rollouts that the model draws."""

    def draw(first: int, count: int) -> Samples:
        some = list(prompts[first : first + count])
        return model.generate(
            some,
            n=settings.samples,
            temperature=settings.temperature,
            reward=reward,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed * 100_003 + first,
            max_rows=len(some) * settings.samples,
        )

    return draw


def _reading(model: Any, recorded: Recorded, reward: Reward | None, settings: ValueSettings) -> Draw:
    """Rollouts that are there."""
    return lambda first, count: recorded.drawn(model, first, count, reward, settings.max_new_tokens)


def _features(model: Any, drawn: Samples, settings: ValueSettings) -> dict[str, Tensor]:
    width = settings.max_new_tokens
    features = model.rollout_features(drawn.prompts, drawn, after=settings.head == "v", width=width)
    tokens = torch.zeros(len(drawn), width, dtype=torch.long)
    assert drawn.tokens is not None and drawn.reward is not None
    for i, row in enumerate(drawn.tokens):
        tokens[i, : len(row)] = torch.tensor(row)
    length = torch.tensor([len(row) for row in drawn.tokens])
    return {"features": features, "tokens": tokens, "length": length, "reward": drawn.reward.double()}

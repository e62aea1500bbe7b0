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
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from steer.artifacts import Card, data_hash
from steer.core import InputError, Prompt, Reward, check, check_whole
from steer.edits import Artifact
from steer.methods.value import QHead, ValueHead
from steer.progress import ticking
from steer.rewards import as_reward
from steer.train.loop import fit

__all__ = ["td_lambda_returns", "train_value"]


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


def train_value(
    model: Any,
    prompts: Sequence[Prompt],
    reward: Reward | str,
    *,
    head: str = "q",
    samples: int = 8,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    td_lambda: float = 0.95,
    gamma: float = 1.0,
    hidden: int = 256,
    epochs: int | None = None,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    held_out: float = 0.1,
    max_rows: int = 64,
    seed: int = 0,
    work: Path | None = None,
    progress: bool = False,
) -> Artifact:
    """A value head on the model's own final hidden state.

    Args:
        model: a language model from `steer.load`; frozen.
        prompts: prompts to roll out; a share of them is held out to measure the fit.
        reward: what the head predicts.
        head: "q" (values of all candidates from one state, nearly free) or "v" (one scalar a prefix, which needs a
            lookahead while decoding).
        samples: rollouts for each prompt, of at most `max_new_tokens` tokens, at `temperature`.
        td_lambda, gamma: of the returns; `td_lambda=1` regresses on the final reward (FUDGE's target).
        work: folder for rollouts (kept batch by batch) and checkpoints; a run that stopped goes on from there.

    Raises:
        InputError: a bad setting, too few prompts, or a reward that is constant on the rollouts.
    """
    check(head in ("q", "v"), "head", head, "q, v")
    check(len(prompts) >= 2, "prompts", f"{len(prompts)}", "at least 2")
    check_whole("samples", samples)
    check(0 <= td_lambda <= 1, "td_lambda", td_lambda, "0 to 1")
    check(0 < gamma <= 1, "gamma", gamma, "0 < gamma <= 1")
    scored = as_reward(reward)
    assert scored is not None
    scored = scored.bind(model)
    settings = {
        "head": head, "samples": samples, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed,
        "td_lambda": td_lambda, "gamma": gamma, "hidden": hidden, "epochs": epochs or 6, "batch_size": batch_size,
        "learning_rate": learning_rate, "held_out": held_out, "reward": str(scored),
    }  # fmt: skip
    rows = data_hash(list(prompts))
    rolled = _rollouts(model, prompts, scored, settings, rows, max_rows, work, progress)
    spread = float(rolled["reward"].std())
    check(spread > 0, "reward", str(scored), "a reward that is not the same on every rollout")

    torch.manual_seed(seed)
    width = model.info.width
    network: nn.Module = (QHead if head == "q" else ValueHead)(width, hidden, max_new_tokens)
    embeddings = model.info.unembedding() if head == "q" else None
    center = float(rolled["reward"].mean())
    network.norm = nn.Identity()  # features are normalised and whitened once
    data = _Rollouts(rolled, embeddings, center, spread)
    cut = int(len(prompts) * (1 - held_out)) * samples
    order = torch.arange(cut)[torch.randperm(cut, generator=torch.Generator().manual_seed(seed))]

    def loss(module: nn.Module, batch: Tensor, epoch: int) -> Tensor:
        values, real = data.values(module, batch)
        returns = td_lambda_returns(values.detach(), data.reward[batch], real, gamma, td_lambda)
        return 0.5 * ((values - returns).square() * real).sum() / real.sum()

    history = fit(
        network, list(order.split(batch_size)), loss, epochs=epochs or 6, learning_rate=learning_rate,
        settings={**settings, "data": rows}, seed=seed, work=work, progress=progress, what="fitting values",
    )  # fmt: skip
    network.eval()
    card = Card(
        kind="value",
        model=model.info.entry(),
        settings={"top_k": 20, "tail": "mean"},
        recipe=settings,
        data={"sha256": rows, "rows": len(prompts), "rollouts": len(rolled["reward"])},
        metrics={
            "reward_mean": center, "reward_std": spread, "loss": [round(x, 5) for x in history],
            "explained": data.explained(network, torch.arange(cut, len(rolled["reward"]))),
        },
    )  # fmt: skip
    return Artifact(_in_plain_units(network, data, spread), card)


def _in_plain_units(network: nn.Module, data: _Rollouts, spread: float) -> dict[str, Tensor]:
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
            tensors[name] = tensors[name] * (spread / data.unit if name.startswith("outer") else spread)
    return tensors


SHRINKAGE = 0.03
"""Share of the mean variance that is added to that of every direction before states are whitened."""


class _Rollouts:
    """Padded views of the rollouts, as they are learnt from: rewards are standardised, embeddings in units of their
    root mean square, and states whitened. What tells one text from another is a small part of a state's variance (most
    of it says which token came last), and gradient descent learns small directions last.
    """

    def __init__(self, rolled: dict[str, Tensor], embeddings: Tensor | None, center: float, spread: float) -> None:
        self.features, self.tokens, self.length = rolled["features"], rolled["tokens"], rolled["length"]
        self.embeddings = embeddings
        self.unit = 1.0 if embeddings is None else float(embeddings.float().square().mean().sqrt())
        """Entries of embeddings are small; in this unit the query learns as fast as the rest of the head."""
        self.reward = ((rolled["reward"] - center) / spread).float()
        self._whiten()

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


def _rollouts(
    model: Any, prompts: Sequence[Prompt], reward: Reward, settings: dict[str, Any], rows: str, max_rows: int,
    work: Path | None, progress: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Features `[N, T, D]` (half precision), tokens, lengths and rewards of `samples` rollouts of every prompt. Each
    batch of prompts is written to `work` as it is done.
    """
    identity = json.dumps({**{k: settings[k] for k in _ROLLOUT_SETTINGS}, "data": rows}, sort_keys=True)
    step = max(1, max_rows // settings["samples"])
    parts = []
    with ticking(progress, "rolling out", len(prompts)) as tick:
        for first in range(0, len(prompts), step):
            path = None if work is None else work / f"rollouts-{first:06d}.safetensors"
            if path is not None and path.is_file():
                parts.append(_read(path, identity))
            else:
                parts.append(_roll(model, prompts[first : first + step], reward, settings, first))
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    temporary = path.with_suffix(".tmp")
                    save_file(parts[-1], temporary, metadata={"settings": identity})
                    os.replace(temporary, path)
            tick(len(prompts[first : first + step]))
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


_ROLLOUT_SETTINGS = ("head", "samples", "max_new_tokens", "temperature", "seed", "reward")


def _read(path: Path, identity: str) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        if file.metadata()["settings"] != identity:
            raise InputError("work", str(path.parent), "an empty folder, or the rollouts of a run with these settings")
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def _roll(
    model: Any, prompts: Sequence[Prompt], reward: Reward, settings: dict[str, Any], first: int
) -> dict[str, Tensor]:
    drawn = model.generate(
        list(prompts), n=settings["samples"], temperature=settings["temperature"], reward=reward,
        max_new_tokens=settings["max_new_tokens"], seed=settings["seed"] * 100_003 + first,
        max_rows=len(prompts) * settings["samples"],
    )  # fmt: skip
    after = settings["head"] == "v"
    features = model.rollout_features(list(prompts), drawn, after=after, width=settings["max_new_tokens"])
    tokens = torch.zeros(len(drawn), settings["max_new_tokens"], dtype=torch.long)
    for i, row in enumerate(drawn.tokens):
        tokens[i, : len(row)] = torch.tensor(row)
    length = torch.tensor([len(row) for row in drawn.tokens])
    return {"features": features, "tokens": tokens, "length": length, "reward": drawn.reward.double()}

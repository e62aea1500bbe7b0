"""Rows of training: completions with their stored constants, groups of them, and the loss of a batch.

Letters: `N` completions, `T` tokens. Nothing here samples or runs a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from steer.train.objectives.losses import Group, Loss, sequence_loss
from steer.train.objectives.options import chosen
from steer.train.objectives.rounds import mixed
from steer.train.objectives.settings import PolicySettings
from steer.train.objectives.surrogates import SURROGATES, Tokens, token_loss

__all__ = ["Completion", "Cluster", "batch_loss", "from_json", "to_json"]


@dataclass
class Completion:
    """One completion and its constants, which are computed once, before training.

    Attributes:
        prompt_ids, tokens: what it was drawn after, hints included, and itself with its end.
        role: "own", "gold", "greedy", "refined", "chosen", "rejected" or "given".
        reward: what the loss compares: the reward, or what a judge makes of it; 0 where nothing scores.
        reward_seen: as scored.
        old, ref, prev: log-probability of each token under the policy that sampled, the base and the last round's
            policy.
        advantage: of each token.
        mask: which tokens are learnt from; None is all.
        kl: weight of its KL.
        accuracy: share of right completions in its group.
        terms: the terms of its reward, where several objectives count.
    """

    prompt_ids: list[int]
    tokens: list[int]
    role: str = "own"
    reward: float = 0.0
    reward_seen: float = 0.0
    old: list[float] = field(default_factory=list)
    ref: list[float] = field(default_factory=list)
    prev: list[float] = field(default_factory=list)
    advantage: list[float] = field(default_factory=list)
    mask: list[bool] | None = None
    kl: float = 1.0
    accuracy: float = 0.0
    terms: list[float] = field(default_factory=list)


@dataclass
class Cluster:
    """The completions of one prompt, which the loss of sequences compares.

    Attributes:
        prompt: number of the prompt.
        pairs: numbers of completions, the preferred one first.
        preference: of each pair, where a judge gave it.
        anchor: number of the completion that the anchor holds.
        opponents: rewards of what its completions are compared with.
        round: in which it was made.
    """

    prompt: int
    completions: list[Completion]
    pairs: list[tuple[int, int]] = field(default_factory=list)
    preference: list[float] | None = None
    anchor: int = 0
    opponents: list[float] = field(default_factory=list)
    round: int = 0


def to_json(clusters: Sequence[Cluster]) -> list[dict[str, Any]]:
    """As JSON can hold them."""
    return [asdict(cluster) for cluster in clusters]


def from_json(entries: Sequence[Mapping[str, Any]]) -> list[Cluster]:
    """Back from JSON."""
    made = []
    for entry in entries:
        completions = [Completion(**c) for c in entry["completions"]]
        pairs = [(int(i), int(j)) for i, j in entry["pairs"]]
        made.append(Cluster(**{**entry, "completions": completions, "pairs": pairs}))
    return made


def batch_loss(
    clusters: Sequence[Cluster],
    logp: Tensor,
    entropy: Tensor | None,
    settings: PolicySettings,
    memory: Mapping[str, Any] | None = None,
    sequences: bool | None = None,
) -> Tensor:
    """The loss of a batch, a scalar.

    Args:
        logp: `[N, T]` of all completions in order, 0 beyond their end; the gradient goes there.
        entropy: `[N, T]`, for surrogates that read it.
        memory: what earlier rounds have seen, such as a running mean of entropy.
        sequences: whether the loss is one of sequences; default: as the settings say.
    """
    if settings.sequences if sequences is None else sequences:
        return _of_sequences(clusters, logp, settings)
    return _of_tokens(clusters, logp, entropy, settings, memory or {})


def _of_sequences(clusters: Sequence[Cluster], logp: Tensor, settings: PolicySettings) -> Tensor:
    pieces = {name: getattr(settings, name) for name in ("beta", "prox", "score", "target", "weight", "anchor")}
    loss = Loss(link=str(settings.link), **pieces, **chosen(settings, Loss))
    sums, at, total = logp.sum(1), 0, logp.new_zeros(())
    for cluster in clusters:
        rows = cluster.completions
        total = total + sequence_loss(_group(cluster, sums[at : at + len(rows)], settings), loss)
        at += len(rows)
    return total / len(clusters)


def _group(cluster: Cluster, logp: Tensor, settings: PolicySettings) -> Group:
    rows = cluster.completions

    def sums(name: str) -> Tensor:
        return torch.tensor([sum(getattr(row, name)) for row in rows], dtype=logp.dtype, device=logp.device)

    ref = sums("ref")
    prev = sums("prev") if settings.prox else None
    m = torch.zeros_like(ref) if settings.reference == "none" else mixed(ref, prev, settings.beta, settings.prox)
    return Group(
        logp,
        m,
        ref,
        sums("old"),
        torch.tensor([row.reward for row in rows], dtype=logp.dtype, device=logp.device),
        torch.tensor([len(row.tokens) for row in rows], dtype=logp.dtype, device=logp.device),
        torch.tensor(cluster.pairs, dtype=torch.int64, device=logp.device).view(-1, 2),
        None if cluster.preference is None else torch.tensor(cluster.preference, dtype=logp.dtype, device=logp.device),
        cluster.anchor,
    )


def _of_tokens(
    clusters: Sequence[Cluster],
    logp: Tensor,
    entropy: Tensor | None,
    settings: PolicySettings,
    memory: Mapping[str, Any],
) -> Tensor:
    rows = [row for cluster in clusters for row in cluster.completions]
    width = logp.shape[1]

    def padded(name: str) -> Tensor:
        values = [getattr(row, name) for row in rows]
        full = [[*x, *[0.0] * (width - len(x))] for x in values]
        return torch.tensor(full, dtype=logp.dtype, device=logp.device)

    def wide(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logp.dtype, device=logp.device).unsqueeze(1).expand(-1, width)

    masks = [[True] * len(row.tokens) if row.mask is None else row.mask for row in rows]
    refined = torch.tensor([row.role == "refined" for row in rows], device=logp.device).unsqueeze(1).expand(-1, width)
    kl_in_loss = settings.beta if settings.kl != "reward" else 0.0
    x = Tokens(
        logp=logp,
        old=padded("old"),
        ref=padded("ref") if kl_in_loss else torch.zeros_like(logp),
        advantage=padded("advantage"),
        mask=torch.tensor([[*m, *[False] * (width - len(m))] for m in masks], device=logp.device),
        entropy=entropy,
        accuracy=wide([row.accuracy for row in rows]),
        refined=refined,
        kl=wide([row.kl for row in rows]) if settings.weigh_kl else None,
    )
    options = chosen(settings, SURROGATES[str(settings.surrogate)]) | _remembered(settings, memory)
    common: dict[str, Any] = {
        "surrogate": str(settings.surrogate),
        "beta": kl_in_loss,
        "kl": settings.kl if kl_in_loss else "k3",
        "level": settings.level,
        **options,
    }
    if settings.aggregate != "prompt":
        return token_loss(x, aggregation=settings.aggregate, length=settings.max_new_tokens, **common)
    parts = [token_loss(part, aggregation="sequence", **common) for part in _by_prompt(x, clusters)]
    return torch.stack(parts).mean()


def _remembered(settings: PolicySettings, memory: Mapping[str, Any]) -> dict[str, Any]:
    """Options that come from what the run has seen."""
    if settings.surrogate == "entropy_smooth" and memory.get("entropy") is not None:
        return {"entropy_mean": memory["entropy"]}
    if settings.surrogate == "clip_cov":
        return {"seed": settings.seed * 100_003 + int(memory.get("update", 0))}
    if settings.surrogate == "mirror" and "step" not in settings.options:
        return {"step": max(1e-3, 1.0 - float(memory.get("progress", 0.0)))}
    return {}


def _by_prompt(x: Tokens, clusters: Sequence[Cluster]) -> list[Tokens]:
    sizes = [len(cluster.completions) for cluster in clusters]
    names = [f for f in vars(x) if getattr(x, f) is not None]
    split = {name: getattr(x, name).split(sizes) for name in names}
    return [Tokens(**{name: parts[i] for name, parts in split.items()}) for i in range(len(sizes))]


def reads_entropy(settings: PolicySettings) -> bool:
    """Whether the loss looks at the entropy of each token's law."""
    return settings.surrogate in ("entropy_change", "entropy_smooth")

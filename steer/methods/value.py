"""Value-augmented sampling (Han et al. 2024): `p(a | s)` proportional to `pi(a | s) exp(Q(s, a) / beta)`.

Q is the value of the frozen policy, learnt by regression on its own rollouts; it is not the soft value, so the tilt is
exact only where one stochastic step remains. The paper's beta multiplies the value: it is 1 / beta here.

A value depends on how much text may still follow, which a hidden state does not say: attention averages, and texts
that are alike have like states wherever they end. So a head reads the number of tokens that remain, `left`, beside the
state.

Letters: `N` rows, `K` candidates, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from steer.core import Context, Process, TransitionEdit, check

__all__ = ["QHead", "ValueGuidance", "ValueHead"]


Value = Callable[[Context, Tensor], Tensor]
"""`(context, candidates [N, K]) -> [N, K]`: the value of the prefix after each candidate."""


class _Timed(nn.Module):
    """The inner layer of a head: `silu(W norm(h) * (1 + gain[left]))`, with a gain of every unit for each number of
    tokens that may still follow; more than the `horizon` of the texts that it was trained on count as the horizon. Half
    of the units begin with the same gain everywhere, so that what does not depend on the time is learnt at all times
    together. With a horizon of 0 the head does not know how many may follow, as heads of earlier versions.
    """

    def __init__(self, width: int, hidden: int, horizon: int) -> None:
        super().__init__()
        self.horizon = horizon
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, hidden)
        if horizon:
            self.gain = nn.Embedding(horizon, hidden)
            with torch.no_grad():
                self.gain.weight.mul_(2.0)[:, ::2] = 0.0

    def read(self, hidden: Tensor, left: Tensor | None) -> Tensor:
        """Inner units `[..., hidden]` of states `[..., D]` after which, and after the token that each predicts, `left`
        `[...]` tokens may follow.
        """
        units = self.inner(self.norm(hidden.float()))
        if self.horizon:
            check(left is not None, "left", None, "how many tokens may follow: this head was trained to be told")
            assert left is not None
            units = units * (1 + self.gain(left.to(units.device).clamp(0, self.horizon - 1)))
        return nn.functional.silu(units)


class QHead(_Timed):
    """`Q(s, a) = <f(h), E_a> / sqrt(D) + v(h)` on the hidden state h that predicts a; E is the frozen output embedding.

    f is an MLP `D -> hidden -> D`; v, the part that all candidates share, cancels when they are centred and only helps
    the fit. Costs one small matrix product a token and the embeddings of the K candidates.
    """

    def __init__(self, width: int, hidden: int = 256, horizon: int = 0) -> None:
        super().__init__(width, hidden, horizon)
        self.outer = nn.Linear(hidden, width)
        self.shared = nn.Linear(hidden, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        nn.init.zeros_(self.shared.weight)
        nn.init.zeros_(self.shared.bias)

    def forward(self, hidden: Tensor, embeddings: Tensor, left: Tensor | None = None) -> Tensor:
        """`hidden` `[..., D]`, `embeddings` `[..., K, D]` of the candidates and how many tokens may follow each,
        `left` `[...]`: values `[..., K]`.
        """
        inner = self.read(hidden, left)
        query = self.outer(inner)
        return (embeddings.float() @ query.unsqueeze(-1)).squeeze(-1) / query.shape[-1] ** 0.5 + self.shared(inner)


class ValueHead(_Timed):
    """`V(s)`, a scalar on the hidden state after a prefix; candidates are looked at in one tree-attention pass."""

    def __init__(self, width: int, hidden: int = 256, horizon: int = 0) -> None:
        super().__init__(width, hidden, horizon)
        self.outer = nn.Linear(hidden, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor, left: Tensor | None = None) -> Tensor:
        """States `[..., D]` after which `left` `[...]` tokens may follow, to `[...]`."""
        return self.outer(self.read(hidden, left)).squeeze(-1)


@dataclass(frozen=True, eq=False)
class HeadValue:
    """A head as a `Value`, on the model itself or on another one that follows in lockstep with its own cache."""

    head: QHead | ValueHead
    embeddings: Tensor | None = None
    """Output embeddings `[V, D]` for a `QHead`."""
    source: Process | None = None

    @torch.inference_mode()
    def __call__(self, context: Context, candidates: Tensor) -> Tensor:
        seen = context if self.source is None else context.companion(self.source)
        left = context.left if self.head.horizon else None
        if self.embeddings is None:
            return self.head(seen.lookahead(candidates), None if left is None else left.unsqueeze(1))
        hidden = seen.hidden
        return self.head(hidden, self.embeddings[candidates.to(self.embeddings.device)].to(hidden.device), left)


@dataclass(frozen=True)
class LogitValue:
    """The next-token logits of another language model as Q: an autoregressive reward model, one pass for all tokens
    (Xu et al. 2025).
    """

    source: Process

    def __call__(self, context: Context, candidates: Tensor) -> Tensor:
        return context.companion(self.source).base.gather(1, candidates)


@dataclass(frozen=True, eq=False)
class ValueGuidance(TransitionEdit):
    """Adds `strength * (Q(s, a) - mean of Q over the top K) / beta` to the log-law of the K likeliest tokens.

    Attributes:
        value: values of candidates; `HeadValue` of a trained head, or any function.
        beta: KL coefficient; None takes that of the run. It acts after temperature.
        strength: weight of this value, negative to turn it down; several guidances add up, since mean values do.
        top_k: candidates, chosen by the base law (ties by lowest id); 0 or more than V takes all.
        tail: what becomes of the other tokens: "mean" leaves them their base law, as if each had the average value;
            "mask" excludes them.
        suggested_beta: where its training says to begin, in the units of its reward.
    """

    value: Value
    beta: float | None = None
    strength: float = 1.0
    top_k: int = 20
    tail: str = "mean"
    suggested_beta: float | None = None

    def __post_init__(self) -> None:
        check(self.beta is None or 0 < self.beta < float("inf"), "beta", self.beta, "a number above 0")
        check(isinstance(self.top_k, int) and self.top_k >= 0, "top_k", self.top_k, "an integer of 0 (all) or more")
        check(self.tail in ("mean", "mask"), "tail", self.tail, "mean, mask")
        check(abs(self.strength) < float("inf"), "strength", self.strength, "a finite number")

    def with_beta(self, beta: float) -> ValueGuidance:
        return self if self.beta is not None else replace(self, beta=beta)

    def is_weak(self, beta: float) -> bool:
        """Whether a run at this KL coefficient would hardly be guided: the suggested one is less than a quarter."""
        used = beta if self.beta is None else self.beta
        return self.suggested_beta is not None and used > 4 * self.suggested_beta / max(abs(self.strength), 1e-9)

    @property
    def companions(self) -> tuple[Process, ...]:
        source = getattr(self.value, "source", None)
        return () if source is None else (source,)

    def shift(self, x: Tensor, context: Context) -> Tensor:
        base, vocabulary = context.base, x.shape[-1]
        if self.top_k == 0 or self.top_k >= vocabulary:
            candidates = torch.arange(vocabulary, device=x.device).expand(len(x), -1)
        else:
            candidates = _top(base, self.top_k)
        q = self.value(context, candidates).to(x.device, x.dtype)
        push = (q - q.mean(-1, keepdim=True)) * (self.strength / (1.0 if self.beta is None else self.beta))
        if self.tail == "mean":
            return x.scatter_add(1, candidates, push)
        return torch.full_like(x, -torch.inf).scatter(1, candidates, x.gather(1, candidates) + push)


def _top(log_law: Tensor, k: int) -> Tensor:
    """The k likeliest tokens `[N, k]`; in small vocabularies the lowest ids among equals, which `topk` does not
    promise.
    """
    if log_law.shape[-1] <= 1024:
        return log_law.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return log_law.topk(k, -1).indices

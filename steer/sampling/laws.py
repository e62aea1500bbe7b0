"""Laws of a next token: temperature, truncation, draws, and the divergence of one law from another.

A law is log-probabilities on the last axis. A setting is a number, or one for each row: a column `[N, 1]` on the CPU.

Truncation cuts by top-k, then by top-p the law that this leaves, then by min-p, which is the order of transformers
5.24 (`GenerationMixin._get_logits_processor`). vLLM cuts by min-p first, so that its top-p is a share of less mass:
where both are set it keeps fewer tokens.

Letters: `N` rows, `V` vocabulary, `m` draws.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steer.core.errors import SteerError

__all__ = ["Setting", "check_possible", "divergence", "draw", "proposal", "restrict", "temper", "truncate"]

Setting = float | Tensor

_HEAD = 1024
"""Likeliest tokens among which a CPU looks for a cut by mass before it sorts the whole vocabulary."""


def temper(logits: Tensor, temperature: Setting = 1.0) -> Tensor:
    """Log-law `[..., V]` of logits after temperature, in float32 or better. At temperature 0 (greedy) it is that of
    temperature 1, whose mode is taken.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    if not isinstance(temperature, Tensor):
        return torch.log_softmax(x if temperature in (0, 1) else x / temperature, -1)
    scale = torch.where(temperature == 0, 1.0, temperature)
    return torch.log_softmax(x if bool((scale == 1).all()) else x / scale.to(x), -1)


def truncate(law: Tensor, top_k: Setting = 0, top_p: Setting = 1.0, min_p: Setting = 0.0) -> Tensor:
    """The log-law `[..., V]` cut by top-k (0 is off), top-p (1 is off) and min-p (0 is off), normalised again. Rows
    without a cut keep their bits.
    """
    numbers = not any(isinstance(x, Tensor) for x in (top_k, top_p, min_p))
    if numbers and not (top_k or top_p < 1 or min_p):
        return law
    k, p, least = torch.as_tensor(top_k), torch.as_tensor(top_p), torch.as_tensor(min_p)
    k = torch.where(k < law.shape[-1], k, 0)
    cuts = (k > 0) | (p < 1) | (least > 0)
    if bool(cuts.all()):
        return _cut(law, k, p, least)
    if not bool(cuts.any()):
        return law
    rows = cuts.squeeze(1).nonzero().squeeze(1)
    mine = (x[rows] if x.dim() else x for x in (k, p, least))
    at = rows.to(law.device)
    return law.index_copy(0, at, _cut(law[at], *mine))


def _cut(law: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    keep = torch.ones_like(law, dtype=torch.bool)
    if bool((top_k > 0).any()):
        keep = law >= _kth(law, top_k)
    if bool((top_p < 1).any()):
        width = min(_HEAD, law.shape[-1]) if law.device.type == "cpu" else law.shape[-1]
        keep &= _nucleus(torch.where(keep, law, -torch.inf).log_softmax(-1), _beside(top_p, law), width)
    if bool((min_p > 0).any()):
        keep &= law >= law.amax(-1, keepdim=True) + _beside(min_p.double().log(), law)
    return torch.where(keep, law, -torch.inf).log_softmax(-1)


def _kth(law: Tensor, k: Tensor) -> Tensor:
    """Log-probability of each row's k-th token `[..., 1]`, -infinity where k is 0; all that are as likely stay."""
    likeliest = law.topk(int(k.max()), -1).values
    if not k.dim():
        return likeliest[..., -1:]
    at = k.to(law.device)
    return torch.where(at > 0, likeliest.gather(-1, (at - 1).clamp_min(0)), -torch.inf)


def _nucleus(law: Tensor, top_p: Tensor, width: int) -> Tensor:
    """The likeliest tokens `[..., V]` whose mass reaches `top_p`, the one that reaches it included. Looked for among
    the `width` likeliest; rows that need more are sorted as a whole.
    """
    ordered, order = law.topk(width, -1)
    mass = ordered.exp()
    inside = mass.cumsum(-1) - mass < top_p
    keep = torch.zeros_like(law, dtype=torch.bool).scatter(-1, order, inside)
    if width < law.shape[-1] and bool((deep := inside[..., -1]).any()):
        rest = top_p.expand(*law.shape[:-1], 1)[deep]
        keep[deep] = _nucleus(law[deep], rest, law.shape[-1])
    return keep


def _beside(setting: Tensor, law: Tensor) -> Tensor:
    """A setting in the law's type; a column is moved to its device, a number need not be."""
    return setting.to(law) if setting.dim() else setting.to(law.dtype)


def restrict(law: Tensor, *others: Tensor) -> Tensor:
    """The log-law `[..., V]` on the tokens that any of the `others` `[..., V]` does not exclude, normalised again."""
    keep = torch.stack([~other.isneginf() for other in others]).any(0)
    return torch.where(keep, law, -torch.inf).log_softmax(-1)


def proposal(
    base: Tensor, edited: Tensor, cut: Callable[[Tensor], Tensor], reach: bool = False
) -> tuple[Tensor, Tensor]:
    """The base law after truncation by `cut`, and an edited law as a proposal for it: on the tokens that truncation
    keeps of the base, since weights cannot bring back what is never drawn, and with `reach` also on those that it keeps
    of the edited law. The same tensor where `edited` is `base`.
    """
    kept = cut(base)
    if edited is base:
        return kept, kept
    return kept, restrict(edited, kept, cut(edited)) if reach else restrict(edited, kept)


def draw(law: Tensor, at: Tensor) -> Tensor:
    """Tokens `[N, m]` of log-laws `[N, V]` at uniform numbers `[N, m]` in [0, 1), by inverting the CDF: at the same
    numbers laws that are nearly the same mostly agree. A law that is not a number (nothing is possible) gives the last
    token, whose log-probability says so.
    """
    cdf = law.exp().cumsum(-1)
    whole = cdf[:, -1:].contiguous()
    # Without waiting for the device: CUDA has read pageable memory when the copy returns; MPS has not.
    at = at.to(cdf.device, cdf.dtype, non_blocking=cdf.device.type != "mps")
    token = torch.searchsorted(cdf, at * whole, right=True)
    # Rounding can put a point at the very end, where tokens may have no mass.
    return torch.minimum(token, torch.searchsorted(cdf, whole)).clamp_max(law.shape[-1] - 1)


def check_possible(log_prob: Tensor) -> Tensor:
    """Log-probabilities of what was drawn, unless one is not a number: at some step nothing could be drawn."""
    if bool(log_prob.isnan().any()):
        raise SteerError(
            "at some step no token could be drawn: the settings of decoding or the edits exclude every token there "
            "(suppress_tokens, bad_words_ids, no_repeat_ngram_size, min_new_tokens, a logits processor, "
            "ValueGuidance(tail='mask'), RLGuidance between models that share no token), or the model's logits are "
            "not numbers"
        )
    return log_prob


def divergence(law: Tensor, base: Tensor) -> Tensor:
    """KL `[...]` of log-laws `[..., V]` to others; a token that `law` rules out adds nothing."""
    return torch.where(law.isneginf(), 0.0, law.exp() * (law - base)).sum(-1)

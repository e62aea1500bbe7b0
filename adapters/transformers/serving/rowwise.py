"""Drawing tokens for rows whose settings differ: temperature, truncation, penalties and seed of each row its own.

The order of a step is that of `Decoding`: penalties, temperature, transition edits, truncation, draw. Letters: `N`
rows, `V` vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from steer.adapters.language.decoding import Decoding
from steer.serving.engine import Sampling

_HEAD = 1024
"""Likeliest tokens among which a cut by mass is looked for before the whole vocabulary is sorted."""


def penalised(logits: Tensor, settings: Sequence[Sampling], counts: Sequence[Counter[int]]) -> Tensor:
    """`logits` `[N, V]` in float32 less what each row's own text and its `logit_bias` take: `frequency * count +
    presence` of every token that the row has drawn. The input is left as it was.
    """
    touched = [
        i for i, s in enumerate(settings) if s.logit_bias or (counts[i] and (s.frequency_penalty or s.presence_penalty))
    ]
    if not touched:
        return logits
    logits = logits.clone()
    for i in touched:
        frequency, presence = settings[i].frequency_penalty, settings[i].presence_penalty
        change = {token: -(frequency * count + presence) for token, count in counts[i].items()}
        for token, bias in settings[i].logit_bias:
            change[token] = change.get(token, 0.0) + bias
        ids = torch.tensor(list(change), device=logits.device)
        logits[i, ids] += torch.tensor(list(change.values()), dtype=logits.dtype, device=logits.device)
    return logits


def tempered(logits: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Log-law `[N, V]` of each row at its temperature; greedy rows keep temperature 1."""
    scale = [s.temperature or 1.0 for s in settings]
    if any(t != 1 for t in scale):
        logits = logits / torch.tensor(scale, dtype=logits.dtype, device=logits.device).unsqueeze(1)
    return torch.log_softmax(logits, -1)


def truncated(law: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The log-law `[N, V]` cut by each row's top-k, top-p and min-p, normalised again. Other rows keep their bits."""
    cut = [i for i, s in enumerate(settings) if s.top_k or s.top_p < 1 or s.min_p]
    if not cut:
        return law
    at = torch.tensor(cut, device=law.device)
    chosen = [settings[i] for i in cut]
    return law.index_copy(0, at, _cut(law[at], chosen))


def _cut(law: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Every row is cut within its likeliest tokens; where the cut lies deeper, in the whole vocabulary."""

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=law.device).unsqueeze(1)

    vocabulary = law.shape[1]
    top_k = column([s.top_k or vocabulary for s in settings], torch.long).clamp_max(vocabulary)
    width = min(vocabulary, max(_HEAD, max((s.top_k for s in settings), default=0) + 1))
    head, where = law.topk(width, -1)
    keep = head >= head.gather(1, top_k.clamp_max(width) - 1)
    keep |= top_k > width
    keep &= head >= head[:, :1] + column([s.min_p for s in settings], law.dtype).log()
    # What lies beyond the head is kept as a whole or not at all, and counts for the mass accordingly.
    deep = keep[:, -1:] & (width < vocabulary)
    kept = torch.where(keep, head, -torch.inf).exp()
    total = torch.where(deep, law.exp().sum(-1, keepdim=True), kept.sum(-1, keepdim=True))
    before = kept.cumsum(-1) - kept
    keep &= before < column([s.top_p for s in settings], law.dtype) * total
    deep = deep & keep[:, -1:]
    out = torch.full_like(law, -torch.inf).scatter(1, where, torch.where(keep, head, -torch.inf))
    out = torch.log_softmax(out, -1)
    for i in deep.squeeze(1).nonzero().squeeze(1).tolist():
        s = settings[i]
        out[i] = Decoding(top_k=s.top_k, top_p=s.top_p, min_p=s.min_p).truncated(law[i])
    return out


def draw(law: Tensor, settings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """One token for each row `[N]`: the mode at temperature 0, otherwise by inverting the CDF at one number of the
    row's own generator, so that a seed repeats in any company.
    """
    drawn = [i for i, s in enumerate(settings) if s.temperature > 0]
    token = law.argmax(-1)
    if not drawn:
        return token
    at = torch.tensor(drawn, device=law.device)
    cdf = law[at].exp().cumsum(-1)
    uniform = torch.cat([torch.rand(1, generator=generators[i]) for i in drawn]).unsqueeze(1)
    point = uniform.to(cdf) * cdf[:, -1:]
    found = torch.searchsorted(cdf, point, right=True)
    # Rounding can put the point at the very end, where the tokens may have no mass.
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous(), right=False)
    return token.index_copy(0, at, torch.minimum(found, last).squeeze(1))


def generator(seed: int, choice: int) -> torch.Generator:
    """The generator of one choice of a request."""
    return torch.Generator().manual_seed((seed * 1_000_003 + choice) % 2**63)


def likeliest(law: Tensor, count: int) -> tuple[list[list[float]], list[list[int]]]:
    """Log-probabilities and ids of the `count` likeliest tokens of each row of `law` `[N, V]`."""
    if not count:
        return [[] for _ in law], [[] for _ in law]
    values, ids = law.topk(min(count, law.shape[1]), -1)
    return values.tolist(), ids.tolist()

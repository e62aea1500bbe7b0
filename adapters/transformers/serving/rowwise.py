"""Drawing tokens for rows whose settings differ: temperature, truncation, penalties and seed of each row its own.

The order of a step is that of `Decoding`: penalties, temperature, transition edits, truncation, draw. Letters: `N`
rows, `V` vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from steer.sampling import laws
from steer.serving.engine import Sampling


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


def column(settings: Sequence[Sampling], name: str) -> Tensor:
    """One setting of each row `[N, 1]`, as `sampling.laws` takes it."""
    kind = torch.long if name == "top_k" else torch.float64
    return torch.tensor([[getattr(s, name)] for s in settings], dtype=kind)


def tempered(logits: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Log-law `[N, V]` of each row at its temperature."""
    return laws.temper(logits, column(settings, "temperature"))


def truncated(law: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The log-law `[N, V]` cut by each row's top-k, top-p and min-p. Rows without a cut keep their bits."""
    return laws.truncate(law, *(column(settings, name) for name in ("top_k", "top_p", "min_p")))


def draw(law: Tensor, settings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """One token for each row `[N]`: the mode at temperature 0, otherwise by inverting the CDF at one number of the
    row's own generator, so that a seed repeats whatever other rows there are.
    """
    drawn = [i for i, s in enumerate(settings) if s.temperature > 0]
    token = law.argmax(-1)
    if not drawn:
        return token
    at = torch.tensor(drawn, device=law.device)
    uniform = torch.cat([torch.rand(1, generator=generators[i]) for i in drawn]).unsqueeze(1)
    return token.index_copy(0, at, laws.draw(law[at], uniform).squeeze(1))


def generator(seed: int, choice: int) -> torch.Generator:
    """The generator of one choice of a request."""
    return torch.Generator().manual_seed((seed * 1_000_003 + choice) % 2**63)


def likeliest(law: Tensor, count: int) -> tuple[list[list[float]], list[list[int]]]:
    """Log-probabilities and ids of the `count` likeliest tokens of each row of `law` `[N, V]`."""
    if not count:
        return [[] for _ in law], [[] for _ in law]
    values, ids = law.topk(min(count, law.shape[1]), -1)
    return values.tolist(), ids.tolist()

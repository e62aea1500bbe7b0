"""Training through a frozen language model: prompts read once, differentiable replies, features of rollouts.

Letters: `N` rows, `T` reply positions, `V` vocabulary, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from steer.adapters.transformers import tracking
from steer.adapters.transformers.cache import cache_argument, full_attention
from steer.adapters.transformers.process import TokenModel
from steer.core import UnsupportedError, check

Keys = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def read_prefix(
    model: TokenModel, ids: Sequence[Sequence[int]], reply_tokens: int, layers: Sequence[int]
) -> tuple[Keys, Tensor, list[list[int]], dict[int, Tensor]]:
    """Every prompt in one pass: keys and values without its last token, their mask `[N, T]` (left-padded), the first
    `reply_tokens` tokens of the model's own greedy reply, and the residual stream of `layers` at the last token.
    """
    check(all(len(row) >= 2 for row in ids), "prompts", "a prompt of one token", "prompts of two tokens or more")
    track, _ = tracking.start(model.body, [row[:-1] for row in ids], (), 1, hidden=False)
    if not isinstance(track, tracking.Track) or not full_attention(track.cache):
        raise UnsupportedError(
            f"{model.body.name}: training a controller needs a model whose layers attend to everything"
        )
    keys = [(layer.keys, layer.values) for layer in track.cache.layers]
    mask = track.mask
    token = torch.tensor([row[-1] for row in ids], device=model.body.device)
    with model.body.recording(layers) as seen:
        track, _ = tracking.advance(track, token)
    states = {layer: x[:, -1].float().cpu() for layer, x in seen.items()}
    drawn = [track.logits.argmax(-1)]
    for _ in range(max(0, reply_tokens - 1)):
        track, _ = tracking.advance(track, drawn[-1])
        drawn.append(track.logits.argmax(-1))
    replies = []
    for row in torch.stack(drawn, 1).tolist():
        ends = [j for j, t in enumerate(row) if t in model.eos_token_ids]
        replies.append(row[: ends[0] + 1] if ends else row)
    return keys, mask, replies, states


def reply_logits(
    model: TokenModel,
    last: Sequence[int],
    replies: Sequence[Sequence[int]],
    keys: Keys,
    mask: Tensor,
    program: dict[int, Callable[[Tensor], Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[N, T, V]` of each reply after its prompt, the replies `[N, T]` and where they are real `[N, T]`.

    `program` changes the residual stream by layer, at the last prompt token and the reply, and may carry gradients.
    """
    width = max(len(row) for row in replies)
    device = model.body.device
    target = torch.tensor([[*row, *[0] * (width - len(row))] for row in replies], device=device)
    real = torch.tensor([[j < len(row) for j in range(width)] for row in replies], device=device)
    fed = torch.cat([torch.tensor(list(last), device=device).unsqueeze(1), target[:, :-1]], 1)
    cache = DynamicCache(config=model.body.config)
    for layer, (k, v) in zip(cache.layers, keys, strict=True):
        layer.update(k, v)
    whole = torch.cat([mask, mask.new_ones(fed.shape)], 1)
    position = (mask.sum(1, keepdim=True) + torch.arange(width, device=device)).long()
    with model.body.hooks.running(program):
        out: Any = model.body.network(
            input_ids=fed,
            attention_mask=whole,
            position_ids=position,
            use_cache=True,
            **{cache_argument(model.body.takes, model.body.network): cache},
        )
    return out.logits, target, real


@torch.no_grad()
def rollout_features(model: TokenModel, prompts: Sequence[Any], drawn: Any, *, after: bool, width: int) -> Tensor:
    """Final hidden states `[N, width, D]` in half precision of finished texts: the one that predicts each token, or
    with `after` the one that follows it. Each prompt is read once for all of its texts.
    """
    features = torch.zeros(len(drawn), width, model.info.width, dtype=torch.float16)
    owner = drawn.group.tolist()
    order = sorted(range(len(drawn)), key=lambda i: owner[i])
    ids = [model.encode(p) for p in prompts]
    for at in range(0, len(order), 64):
        rows = order[at : at + 64]
        mine = sorted({owner[i] for i in rows})
        track, _ = tracking.start(model.body, [ids[b] for b in mine], (), 1, hidden=True)
        track = tracking.fork(track, torch.tensor([mine.index(owner[i]) for i in rows]))
        longest = max(len(drawn.tokens[i]) for i in rows)
        tokens = [[*drawn.tokens[i], *[0] * (longest - len(drawn.tokens[i]))] for i in rows]
        hidden = tracking.continuation_hidden(track, torch.tensor(tokens, device=model.body.device))
        features[rows, :longest] = (hidden[:, 1:] if after else hidden[:, :-1]).half().cpu()
    return features

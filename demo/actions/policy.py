"""The steered column where a policy steers it by RL guidance: two models in lockstep, which no batch of others shares.

Its tokens are drawn between the steps of the batch, one by one, as `generate` draws them; each comes with the law that
it was drawn from and that of the unsteered model at this very place, which RL guidance looks at anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.adapters.language.texts import GrowingText
from steer.adapters.transformers.policy.folder import load_policy
from steer.adapters.transformers.serving.batch import Trace
from steer.adapters.transformers.serving.columns import Traced
from steer.core import Cost, Prompt
from steer.demo.actions.shared import Shared
from steer.methods.rlg import RLGuidance
from steer.model import Plan, prepare
from steer.serving.engine import Ended, Finished

__all__ = ["guided"]

_LIKELIEST = 5


def guided(
    shared: Shared, folder: Path, w: float, prompt: Prompt, reward: Any, seed: int, **settings: Any
) -> Callable[[Callable[[Any], None]], None]:
    """Work that writes one text as column 1 and tells of it as `Columns` do: `Traced`, `Ended`, `Finished`. `settings`
    are those of the model's process.
    """

    def work(tell: Callable[[Any], None]) -> None:
        model = shared.engine().model
        if folder not in shared.policies:
            shared.policies[folder] = load_policy(model, folder)
        policy = shared.policies[folder]
        process = model.process(**settings)
        edits = [RLGuidance(policy.process(**settings), w)]
        _write(prepare(process, [prompt], edits=edits, reward=reward, seed=seed, model=model), tell)

    return work


def _write(plan: Plan, tell: Callable[[Any], None]) -> None:
    process: Any = plan.process
    for edit, wanted in plan.edits:
        process = process.edited(edit, wanted)
    model = process.model
    grow = GrowingText(lambda ids: model.decode(list(ids)))
    generator = torch.Generator().manual_seed((plan.seed * 1_000_003) % 2**63)  # as `execute` draws
    total = 0.0
    with process.session():
        state = process.init(plan.prompts, 1, generator)
        while not process.done(state):
            state = process.read(state)
            base, law = (found[0].double() for found in process.laws(state))
            state = process.propose(state, generator)
            token = int(state.prefix[0, state.filled - 1])
            kl = float(torch.where(law.isneginf(), 0.0, law.exp() * (law - base)).sum())
            total += kl
            seen = [_likeliest(one, model.decode) for one in (law, base)]
            trace = Trace(token, float(law[token]), float(base[token]), kl, seen[0], seen[1])
            text = grow.feed(token) + (grow.finish() if process.done(state) else "")
            tell(Traced(1, text, trace))
    samples = process.decode(state)
    score = None if plan.reward is None else float(plan.reward(samples)[0])
    drawn = int(state.length[0])
    ended = drawn > 0 and int(state.prefix[0, state.filled - 1]) in model.eos_token_ids
    tell(Ended(1, "stop" if ended else "length", drawn, score, total))
    tell(Finished(1, samples.cost + Cost(reward_calls=score is not None)))


def _likeliest(law: Tensor, decode: Callable[[list[int]], str]) -> tuple[tuple[int, str, float], ...]:
    value, at = law.topk(min(_LIKELIEST, len(law)))
    return tuple((i, decode([i]), x) for x, i in zip(value.tolist(), at.tolist(), strict=True))

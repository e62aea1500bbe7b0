"""vLLM as a `Process`: blocks, forks by the prefix cache, samplers, what is drawn and what it cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm_tools import PROMPTS, controller, greedy, vector

from steer import RawText, SystemPrompt
from steer.core import InputError
from steer.methods.best_of_n import BestOfN
from steer.methods.fk import FKSteering
from steer.methods.samplers import make_sampler
from steer.rewards.algebra import lift


@pytest.mark.parametrize(
    "edit",
    [None, vector(0.3, scope="generated"), controller(), vector(0.4, scope="prompt")],
    ids=["plain", "generated", "controller", "prompt"],
)
def test_blocks_join(edit: Any, engine: Any) -> None:
    """A text drawn in blocks is the text drawn at once: scopes count from the prompt, what was decided stays."""
    edits = () if edit is None else edit
    whole = greedy(engine, PROMPTS[:2], edits, 21)
    blocks = greedy(engine, PROMPTS[:2], edits, 21, block=8)
    assert blocks.tokens == whole.tokens
    assert torch.allclose(blocks.log_prob, whole.log_prob, atol=1e-3)


def test_prompt_edits_and_stops(engine: Any, reference: Any) -> None:
    edits = SystemPrompt("Answer in French.")
    settings: dict[str, Any] = {"stop": [",", "."], "edits": edits, "temperature": 0, "max_new_tokens": 24}
    ours, theirs = engine.generate(PROMPTS[0], **settings), reference.generate(PROMPTS[0], **settings)
    assert ours.texts == theirs.texts and ours.tokens == theirs.tokens
    assert engine.generate(PROMPTS[0], block=3, **settings).texts == theirs.texts


def test_seeds_repeat_and_differ(engine: Any) -> None:
    one, same, other = (
        engine.generate(PROMPTS[1], n=4, seed=seed, max_new_tokens=10, edits=controller()).tokens for seed in (1, 1, 2)
    )
    assert one == same and one != other and len({tuple(t) for t in one}) == 4


def test_what_was_drawn(engine: Any, reference: Any) -> None:
    """Log-probabilities and drift against the transformers adapter, for the same tokens."""
    edit = vector(0.2)
    for edits in ((), edit):
        drawn = engine.generate(PROMPTS[:2], n=3, seed=5, max_new_tokens=10, edits=edits, eos_token_id=[])
        group = torch.arange(2).repeat_interleave(3)
        process = reference.process(max_new_tokens=10)
        base = process.log_likelihood(PROMPTS[:2], group, drawn.tokens)
        law = base if edits == () else process.edited(edit).log_likelihood(PROMPTS[:2], group, drawn.tokens)
        assert torch.allclose(drawn.log_prob, law, atol=5e-3)
        assert torch.allclose(drawn.kl, law - base, atol=1e-2)
        assert drawn.cost.generated_tokens == 60
    total, count = engine.log_likelihood(drawn)
    assert torch.allclose(total, base, atol=5e-3) and count.tolist() == [10.0] * 6


def test_best_of_n(engine: Any) -> None:
    drawn = engine.generate(
        PROMPTS[1], sampler="best-of-n", n=8, reward="length", seed=3, max_new_tokens=16, temperature=1.2
    )
    assert len(drawn) == 1 and len(drawn.pool) == 8
    assert float(drawn.reward[0]) == float(drawn.pool.reward.max()) > float(drawn.pool.reward.min())


def test_fk_steering_in_blocks(engine: Any) -> None:
    """A population that is resampled between blocks; the weights' mean estimates the normaliser."""
    calls = []

    def reward(texts: list[str]) -> list[float]:
        calls.append(len(texts))
        return [float(text.count("e")) for text in texts]

    sampler = FKSteering(num_particles=6)
    drawn = engine.generate(
        RawText("The sun was"), sampler=sampler, reward=reward, beta=0.5, seed=0, max_new_tokens=24, block=6
    )
    assert drawn.log_z is not None and bool(torch.isfinite(drawn.log_z).all())
    assert len(calls) >= 4 and all(n == 6 for n in calls[:-1])


def test_settings_without_a_counterpart_are_refused(engine: Any) -> None:
    for settings in ({"no_repeat_ngram_size": 2}, {"bad_words_ids": [[1]]}, {"max_new_tokens": 0}):
        with pytest.raises(InputError, match=next(iter(settings))):
            engine.generate(PROMPTS[0], **settings)
    with pytest.raises(InputError, match="context"):
        engine.generate(PROMPTS[0], max_new_tokens=600)


def test_bad_requests_reach_nobody(engine: Any) -> None:
    """The engine's own interface: refused when it is added, naming the field, and the engine goes on."""
    from vllm import SamplingParams

    for given, field in (({"edits": [{"name": "nobody"}]}, "steer.edits.name"), ({"edit": []}, "steer.edit")):
        params = SamplingParams(max_tokens=4, extra_args={"steer": given})
        with pytest.raises(ValueError, match=field):
            engine.llm.generate(["Hello"], params, use_tqdm=False)
    assert greedy(engine, PROMPTS[1], (), 4).tokens


def test_rewards_while_others_decode(engine: Any) -> None:
    """The same choice as with a reward that waits for all, but some scores are asked for while texts are drawn."""
    running: list[bool] = []

    def sparse(texts: list[str]) -> list[float]:
        running.append(engine.llm.llm_engine.has_unfinished_requests())
        return [-float(text.count("e")) for text in texts]

    settings: dict[str, Any] = {
        "sampler": "best-of-n",
        "n": 12,
        "seed": 3,
        "max_new_tokens": 48,
        "stop": ["."],
        "temperature": 1.2,
    }
    waited = engine.generate(RawText("The sun was"), reward=lift(sparse), **settings)
    assert running == [False]
    running.clear()
    early = engine.generate(RawText("The sun was"), reward=lift(sparse).cached(), **settings)
    assert any(running)
    assert early.texts == waited.texts and torch.equal(early.pool.reward, waited.pool.reward)


def test_candidates_are_given_up(engine: Any) -> None:
    """Half of the rest after every block: they cost no further tokens."""
    drawn = engine.generate(
        RawText("The sun was"),
        sampler=BestOfN(16, reject=0.5),
        reward="length",
        seed=0,
        max_new_tokens=32,
        block=8,
        eos_token_id=[],
    )
    assert len(drawn.pool) == 2 and drawn.cost.generated_tokens == 8 * (16 + 8 + 4 + 2)
    assert float(drawn.reward[0]) == float(drawn.pool.reward.max())


def test_packed_rows_go_on(engine: Any) -> None:
    """Half a text, through tensors and back, ends as the text drawn in one go, with what its controller decided."""
    process = engine.process(temperature=0, max_new_tokens=16, block=8).edited(controller())
    generator = torch.Generator().manual_seed(0)
    state = process.propose(process.init(PROMPTS[:2], 1, generator), generator)
    again = process.unpack(PROMPTS[:2], state.step, process.pack(state))
    both = process.propose(process.stack([state, again]), generator)
    assert both.tokens[:2] == both.tokens[2:] == greedy(engine, PROMPTS[:2], controller(), 16).tokens
    assert again.weights == state.weights and torch.equal(both.group, torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("name", ["dts", "dts-star"])
def test_trees(name: str, engine: Any) -> None:
    """Trees whose levels are blocks: what two texts share is drawn once, and the same seed grows the same tree."""

    def vowels(texts: list[str]) -> list[float]:
        return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]

    sampler = make_sampler(name, rollouts=12, batch=2, widening=1.0, exponent=0.5)
    settings: dict[str, Any] = {
        "sampler": sampler,
        "reward": vowels,
        "beta": 0.05,
        "max_new_tokens": 24,
        "block": 8,
        "eos_token_id": [],
    }
    drawn, same = (engine.generate(RawText("The sun was"), seed=2, **settings) for _ in range(2))
    assert drawn.texts == same.texts and all(len(tokens) == 24 for tokens in drawn.tokens)
    assert float(drawn.reward[0]) == pytest.approx(vowels(drawn.texts)[0])
    assert drawn.cost.generated_tokens < 12 * 24 and 4 <= drawn.cost.reward_calls <= 12

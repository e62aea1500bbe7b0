"""What every process must do, whatever engine it stands on. A new adapter adds its process to `PROCESSES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.core import Context, Process, Prompt, PromptEdit, Reward, Samples, Site, TransitionEdit, UnsupportedError
from steer.methods.best_of_n import Ancestral, BestOfN
from steer.toy import GaussianProcess, markov_lm

PROCESSES: dict[str, Callable[[Any], Process]] = {
    "tabular": lambda request: markov_lm(),
    "gaussian": lambda request: GaussianProcess(steps=6),
    "language-model": lambda request: request.getfixturevalue("tiny_lm").process(max_new_tokens=6),
    "language-model, blocks": lambda request: request.getfixturevalue("tiny_lm").process(max_new_tokens=6, block=4),
}


@pytest.fixture(params=list(PROCESSES))
def process(request: pytest.FixtureRequest) -> Process:
    return PROCESSES[request.param](request)


@dataclass(frozen=True)
class Nothing(TransitionEdit):
    def shift(self, x: Tensor, context: Context) -> Tensor:
        return x


@dataclass(frozen=True)
class Pull(TransitionEdit):
    """Moves the quantity along a fixed slope."""

    by: float

    def shift(self, x: Tensor, context: Context) -> Tensor:
        return (
            x + self.by * torch.arange(x.shape[-1], dtype=x.dtype) / x.shape[-1] + (self.by if x.shape[-1] == 1 else 0)
        )


class Rewrite(PromptEdit):
    def rewrite(self, prompt: Prompt) -> Prompt:
        return prompt


class Size(Reward):
    """A number from any kind of output."""

    def score(self, samples: Samples) -> Tensor:
        if isinstance(samples.outputs, Tensor):
            return samples.outputs.double().sum(-1)
        return torch.tensor([float(len(text)) for text in samples.outputs])


def run(process: Process, n: int = 3, seed: int = 0) -> Samples:
    return Ancestral(n).run(process, ["the sun", "a very good dog runs"], generator=torch.Generator().manual_seed(seed))


def same(a: Samples, b: Samples) -> bool:
    if isinstance(a.outputs, Tensor):
        return bool(torch.allclose(a.outputs, b.outputs, rtol=0, atol=1e-12))
    return a.tokens == b.tokens


def test_same_seed_same_samples_and_another_seed_others(process: Process) -> None:
    assert same(run(process), run(process))
    assert not same(run(process, 16), run(process, 16, seed=1))


def test_rows_are_grouped_by_prompt_and_steps_end(process: Process) -> None:
    generator = torch.Generator().manual_seed(0)
    state = process.init(["the sun", "hello"], 3, generator)
    assert state.group.tolist() == [0, 0, 0, 1, 1, 1] and len(state) == 6
    steps = 0
    while not process.done(state):
        state = process.propose(state, generator)
        steps += 1
    assert steps <= process.num_steps
    samples = process.decode(state)
    assert len(samples) == 6 and samples.cost.model_calls > 0
    assert samples.log_prob.shape == (6,) and bool(torch.isfinite(samples.log_prob).all())


def test_without_edits_the_base_is_what_is_sampled(process: Process) -> None:
    samples = run(process)
    assert torch.equal(samples.kl, torch.zeros(6, dtype=torch.float64))
    assert torch.equal(samples.log_prob, samples.base_log_prob)


def test_an_edit_that_does_nothing_changes_nothing(process: Process) -> None:
    plain, edited = run(process), run(process.edited(Nothing()))
    assert same(plain, edited)
    assert float(edited.kl.abs().max()) < 1e-6


def test_an_edit_drifts_and_its_weights_are_known(process: Process) -> None:
    moved = run(process.edited(Pull(0.7)), 64)
    assert bool((moved.kl >= -1e-9).all()) and bool((moved.kl > 0).any())
    # E_q[p / q] = 1 for any proposal with the base's support, so log-probabilities are of one measure.
    if not isinstance(process, GaussianProcess):  # its last step is deterministic and moved: no density
        ratio = (moved.base_log_prob - moved.log_prob).exp()
        assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / len(ratio) ** 0.5


def test_edits_compose_in_order_and_unedited_is_the_base(process: Process) -> None:
    twice = process.edited(Pull(0.3)).edited(Pull(-0.3))
    assert len(twice.edits) == 2 and same(run(twice), run(process))
    assert same(run(twice.unedited()), run(process))


def test_an_edit_for_one_prompt_leaves_the_other_bit_equal(process: Process) -> None:
    plain, mixed = run(process), run(process.edited(Pull(2.0), prompts=[1]))
    first = plain.group == 0
    if isinstance(plain.outputs, Tensor):
        assert torch.equal(plain.outputs[first], mixed.outputs[first])
    else:
        assert [plain.tokens[i] for i in range(3)] == [mixed.tokens[i] for i in range(3)]
    assert torch.equal(plain.log_prob[first], mixed.log_prob[first])
    assert float(mixed.kl[first].abs().max()) == 0 and float(mixed.kl[~first].min()) > 0


def test_gather_forks_drops_and_reorders(process: Process) -> None:
    generator = torch.Generator().manual_seed(3)
    state = process.init(["the sun", "hello"], 2, generator)
    state = process.propose(state, generator)
    before = process.decode(state)
    index = torch.tensor([3, 0, 0])
    forked = process.gather(state, index)
    after = process.decode(forked)
    want = before.select(index)
    assert same(after, want) and torch.equal(after.group, want.group) and torch.equal(after.log_prob, want.log_prob)
    # Forks of one row are the same row until noise separates them; the source state still works.
    ends = []
    for start in (forked, process.gather(state, index)):
        g = torch.Generator().manual_seed(5)
        while not process.done(start):
            start = process.propose(start, g)
        ends.append(process.decode(start))
    assert same(ends[0], ends[1])
    while not process.done(state):
        state = process.propose(state, generator)
    assert len(process.decode(state)) == 4


def test_preview_has_a_row_for_every_row(process: Process) -> None:
    generator = torch.Generator().manual_seed(0)
    state = process.propose(process.init(["the sun"], 4, generator), generator)
    assert Size()(process.preview(state)).shape == (4,)


def test_best_of_n_runs_unchanged(process: Process) -> None:
    samples = BestOfN(4).run(process, ["the sun", "hello"], generator=torch.Generator().manual_seed(0), reward=Size())
    assert len(samples) == 2 and len(samples.pool) == 8 and samples.cost.reward_calls == 8
    for b in range(2):
        assert float(samples.reward[b]) == float(samples.pool.reward[samples.pool.group == b].max())
    assert samples.lineage.tolist() == [i for i in samples.lineage.tolist() if 0 <= i < 8]


def test_a_site_that_is_missing_is_refused_when_mounted(process: Process) -> None:
    if Site.PROMPT in process.sites:
        process.edited(Rewrite())
    else:
        with pytest.raises(UnsupportedError, match="Rewrite edits the prompt site"):
            process.edited(Rewrite())

"""The contract of every process, whatever engine it stands on. A new adapter adds its process to `PROCESSES`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.chain import FunctionProcess
from steer.core import Context, Process, Prompt, PromptEdit, Reward, Samples, Site, TransitionEdit, UnsupportedError
from steer.diffusion.process import Diffusion
from steer.masked import MaskedProcess
from steer.methods.best_of_n import Ancestral, BestOfN
from steer.methods.dts import DTS, SearchDTS
from steer.methods.fk import FKSteering
from steer.methods.svdd import SVDD
from steer.rewards import lift
from steer.toy import GaussianProcess, markov_lm
from steer.toy.masked import TableDenoiser
from steer.turns import TurnProcess


def masked(request: Any) -> Process:
    """A masked diffusion over a random law of four words."""
    table = torch.rand(3, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return MaskedProcess(TableDenoiser(table / table.sum()), length=4, steps=6)


@cache
def diffusion_model(name: str) -> Any:
    """A network or a pipeline, built once: a process leaves them as they are."""
    import tiny_pipelines

    from steer.adapters.diffusers.loading import load

    if name == "network":
        return load(tiny_pipelines.network(), scheduler=tiny_pipelines.ddpm())
    return load(tiny_pipelines.sd15())


def diffusion_network(request: Any) -> Process:
    """A network without classes, which heeds no prompt."""
    return diffusion_model("network").process(steps=4)


def pipeline(request: Any) -> Process:
    """A stock Stable Diffusion 1.5."""
    return diffusion_model("sd15").process(steps=4)


def turns(request: Any) -> Process:
    """An agent that draws one of the courier's three actions."""
    actor = FunctionProcess(lambda seen: torch.zeros(len(seen), 3), length=1, words=("walk", "ride", "wait"))
    return TurnProcess("courier", actor, max_turns=3, simulate=True)


@pytest.fixture(scope="session")
def endpoint() -> Iterator[Any]:
    """A model behind an endpoint that serves a chain of four letters, whose texts may end early."""
    from openai_server import Chain, Server

    from steer.adapters.openai.model import load

    rows = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.3, 0.2], [0.2, 0.1, 0.4, 0.3], [0.3, 0.2, 0.1, 0.4]]
    with Server(Chain("wxyz", rows[0], rows, end=0.05)).running() as server:
        yield load(server.url, model="chain", chat=False)


PROCESSES: dict[str, Callable[[Any], Process]] = {
    "tabular": lambda request: markov_lm(),
    "gaussian": lambda request: GaussianProcess(steps=6),
    "language-model": lambda request: request.getfixturevalue("tiny_lm").process(max_new_tokens=6),
    "language-model, blocks": lambda request: request.getfixturevalue("tiny_lm").process(max_new_tokens=6, block=4),
    "language-model, sentences": lambda request: request.getfixturevalue("tiny_lm").process(
        max_new_tokens=9, block=3, until=("s", "o")
    ),
    "endpoint, tokens drawn here": lambda request: request.getfixturevalue("endpoint").process(
        max_new_tokens=6, block=2, top_logprobs=20
    ),
    "endpoint, blocks": lambda request: request.getfixturevalue("endpoint").process(
        max_new_tokens=6, block=2, logprobs=True
    ),
    "masked": masked,
    "diffusion network": diffusion_network,
    "pipeline": pipeline,
    "turns": turns,
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
            return samples.outputs.double().flatten(1).sum(1)
        return torch.tensor([float(len(text)) for text in samples.outputs])


def run(process: Process, n: int = 3, seed: int = 0) -> Samples:
    return Ancestral(n).run(process, ["the sun", "a very good dog runs"], generator=torch.Generator().manual_seed(seed))


def same(a: Samples, b: Samples) -> bool:
    if isinstance(a.outputs, Tensor):
        # What a network makes of a row may depend on the size of its batch, by a few units in the last place.
        atol = 1e-12 if a.outputs.dtype == torch.float64 else 1e-5
        return bool(torch.allclose(a.outputs, b.outputs, rtol=0, atol=atol))
    return a.outputs == b.outputs if a.tokens is None else a.tokens == b.tokens


def noise_elsewhere(process: Process) -> bool:
    """Whether unedited texts are drawn by an endpoint, with its noise, and edited ones here: of one law, but not equal
    for equal seeds.
    """
    return getattr(process, "logprobs", False)


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
    assert same(plain, edited) or noise_elsewhere(process)
    assert torch.allclose(edited.log_prob, edited.base_log_prob, rtol=0, atol=1e-5)
    assert float(edited.kl.abs().max()) < 1e-6


def test_an_edit_drifts_and_its_weights_are_known(process: Process) -> None:
    moved = run(process.edited(Pull(0.7)), 64)
    assert bool((moved.kl >= -1e-9).all()) and bool((moved.kl > 0).any())
    # E_q[p / q] = 1 for any proposal with the base's support, so log-probabilities are of one measure.
    if not isinstance(process, Diffusion):  # the last step is deterministic and moved: no density
        ratio = (moved.base_log_prob - moved.log_prob).exp()
        assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / len(ratio) ** 0.5


def test_edits_compose_in_order_and_unedited_is_the_base(process: Process) -> None:
    start = process.edited(Nothing()) if noise_elsewhere(process) else process
    twice = process.edited(Pull(0.3)).edited(Pull(-0.3))
    assert len(twice.edits) == 2 and same(run(twice), run(start))
    assert same(run(twice.unedited()), run(process))


def test_an_edit_for_one_prompt_leaves_the_other_bit_equal(process: Process) -> None:
    if getattr(process, "until", ()):
        pytest.skip("how many tokens a block draws, and so the stream of noise, depends on all rows")
    plain, mixed = run(process), run(process.edited(Pull(2.0), prompts=[1]))
    first = plain.group == 0
    if isinstance(plain.outputs, Tensor):
        assert torch.equal(plain.outputs[first], mixed.outputs[first])
    else:
        assert (plain.tokens or plain.outputs)[:3] == (mixed.tokens or mixed.outputs)[:3]
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


def test_rejection_runs_unchanged(process: Process) -> None:
    sampler, generator = BestOfN(4, reject=0.3), torch.Generator().manual_seed(0)
    samples = sampler.run(process, ["the sun", "hello"], generator=generator, reward=Size())
    sizes = [int((samples.pool.group == b).sum()) for b in range(2)]
    assert len(samples) == 2 and max(sizes) <= 3 and min(sizes) >= 1
    assert samples.cost.reward_calls > len(samples.pool)


def finish(process: Process, state: Any, seed: int = 5) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    while not process.done(state):
        state = process.propose(state, generator)
    return process.decode(state)


def halfway(process: Process, n: int = 3, steps: int = 2) -> Any:
    generator = torch.Generator().manual_seed(1)
    state = process.init(["the sun", "a very good dog runs"], n, generator)
    for _ in range(steps):
        state = process.propose(state, generator)
    return state


def everything(state: Any) -> Tensor:
    return torch.arange(len(state))


def test_reading_first_changes_nothing(process: Process) -> None:
    plain = finish(process, halfway(process))
    state = process.read(process.read(halfway(process)))
    assert same(finish(process, state), plain)


def test_rows_that_were_stacked_go_on_as_one(process: Process) -> None:
    state = process.read(halfway(process))
    whole = process.gather(state, everything(state))
    parts = [process.gather(state, torch.tensor(index)) for index in ([0, 1], [2], [3, 4, 5])]
    stacked = process.stack(parts)
    assert torch.equal(stacked.group, state.group) and torch.equal(stacked.log_prob, state.log_prob)
    assert same(finish(process, stacked), finish(process, whole))


def test_rows_that_were_packed_go_on_as_if_they_had_not(process: Process) -> None:
    state = halfway(process)
    packed = process.pack(state)
    assert all(len(x) == len(state) and x.device.type == "cpu" for x in packed.values())
    prompts, step = list(state.prompts), state.step
    again = process.unpack(prompts, step, packed)
    order = torch.tensor([4, 0, 5])
    some = process.unpack(prompts, step, {k: v[order] for k, v in packed.items()})
    if (names := process.identify(state)) is not None:
        assert process.identify(again) == names and process.identify(some) == [names[i] for i in order]
    plain = finish(process, process.gather(state, order))
    assert same(finish(process, some), plain)
    ended = finish(process, again)
    assert same(ended, finish(process, state)) and torch.allclose(ended.log_prob, ended.log_prob)


def test_a_settled_state_starts_a_new_account(process: Process) -> None:
    state = halfway(process)
    state, cost = process.settle(state)
    assert cost.model_calls > 0 and cost.nfe > 0
    again, more = process.settle(state)
    assert (more.model_calls, more.nfe, more.generated_tokens) == (0, 0, 0)
    total = cost + finish(process, again).cost
    assert total.nfe == finish(process, halfway(process)).cost.nfe


def test_finished_rows_and_the_noise_to_come(process: Process) -> None:
    state = halfway(process, steps=1)
    assert process.diverges(state) and not bool(process.finished(state).all())
    generator = torch.Generator().manual_seed(0)
    while not process.done(state):
        state = process.propose(state, generator)
    assert bool(process.finished(state).all()) and not process.diverges(state)


@pytest.mark.parametrize("sampler", ["fk", "fk-outputs", "svdd", "dts", "dts-published", "dts-star"])
def test_particles_and_trees_run_unchanged(process: Process, sampler: str) -> None:
    made: dict[str, Any] = {
        "fk": FKSteering(num_particles=3, n=2, ess_threshold=None),
        "fk-outputs": FKSteering(num_particles=3, n=2, per_output=True, potential="max"),
        "svdd": SVDD(n=2, num_candidates=3),
        "dts": DTS(n=2, rollouts=12, batch=4),
        "dts-published": DTS(n=2, rollouts=12, batch=4, estimator="published", max_bytes=1),
        "dts-star": SearchDTS(n=2, rollouts=12, batch=4),
    }
    draws = []
    for _ in range(2):
        samples = made[sampler].run(
            process, ["the sun", "hello"], generator=torch.Generator().manual_seed(0), reward=Size(), beta=5.0
        )
        assert samples.group.tolist() == [0, 0, 1, 1] and samples.cost.reward_calls > 0 and samples.cost.nfe > 0
        assert torch.allclose(Size()(samples), samples.reward)  # every output came with its own reward
        draws.append(samples)
    assert same(*draws) and torch.equal(draws[0].reward, draws[1].reward)


def test_a_guided_proposal_is_weighed_by_fk(process: Process) -> None:
    """With a constant reward, weights correct the guidance away: log Z is that of the constant."""
    constant = lift(lambda outputs: torch.full((len(outputs),), 2.0))
    network = isinstance(process, Diffusion) and not isinstance(process, GaussianProcess)
    # Of a network's chain, whose last step is a point, only that weights are numbers is known: a few rows tell.
    samples = FKSteering(num_particles=16 if network else 400).run(
        process.edited(Pull(0.01 if isinstance(process, Diffusion) else 0.3)),
        ["the sun"],
        generator=torch.Generator().manual_seed(0),
        reward=constant,
    )
    if not network:
        assert abs(float(samples.log_z[0]) - 2.0) < 0.35
    assert bool(torch.isfinite(samples.log_z).all())


def test_a_site_that_is_missing_is_refused_when_mounted(process: Process) -> None:
    if Site.PROMPT in process.sites:
        process.edited(Rewrite())
    else:
        with pytest.raises(UnsupportedError, match="Rewrite edits the prompt site"):
            process.edited(Rewrite())

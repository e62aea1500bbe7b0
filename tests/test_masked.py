"""Masked diffusion against enumeration, and a random BERT that is generated from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_words import MASKED_WORDS
from torch import Tensor

import steer
from steer.cli import main
from steer.core import (
    Ability,
    Context,
    InputError,
    PromptEdit,
    RawText,
    Samples,
    SteerError,
    TransitionEdit,
    UnsupportedError,
)
from steer.masked import MarginalDraws, MaskedProcess, MaskedState
from steer.methods.best_of_n import Ancestral, BestOfN
from steer.methods.fk import FKSteering
from steer.methods.rlg import RLGuidance
from steer.methods.svdd import SVDD
from steer.rewards import lift
from steer.sampling.lookahead import Preview, Rollouts, StateValue
from steer.toy import markov_lm
from steer.toy.masked import TableDenoiser

JOINT = torch.tensor([[0.4, 0.1], [0.1, 0.4]], dtype=torch.float64)
LAW_00 = {1: 0.25, 2: 0.325, 4: 0.3625, 8: 0.38125, 64: 0.397656}
Z = 3.31603284  # of r = 1[00] at beta 1/2 and T = 4
TILTED_00 = 0.80775221
ZEROS = lift(lambda outputs: torch.tensor([float(text == "0 0") for text in outputs]))


def chain(steps: int = 4, table: Tensor = JOINT, **settings: Any) -> MaskedProcess:
    return MaskedProcess(TableDenoiser(table), table.dim(), steps, **settings)


def random_table(length: int, size: int, seed: int = 0) -> Tensor:
    table = torch.rand([size] * length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 3
    return table / table.sum()


def state_of(process: MaskedProcess, rows: Sequence[Sequence[int]], step: int = 0) -> MaskedState:
    zero = torch.zeros(len(rows), dtype=torch.float64)
    packed = {"tokens": torch.tensor(rows), "group": torch.zeros(len(rows), dtype=torch.long)}
    return process.unpack([""], step, packed | dict.fromkeys(("log_prob", "base_log_prob", "kl"), zero))


def drawn_from(state: MaskedState) -> Tensor:
    assert state.law is not None
    return state.law


def enumerated(
    process: MaskedProcess, law_of: Callable[[MaskedState], Tensor] = drawn_from
) -> dict[tuple[int, ...], float]:
    """The law of the finished rows, from the laws that the process shows of every partial row."""
    mask = process.network.mask_id
    weights = {(mask,) * process.length: 1.0}
    for step in range(process.num_steps):
        rows = list(weights)
        law = law_of(process.read(state_of(process, rows, step))).exp()
        after: dict[tuple[int, ...], float] = {}
        reveal = 1 / (process.num_steps - step)
        for n, row in enumerate(rows):
            options = []
            for at, token in enumerate(row):
                if token != mask:
                    options.append([(token, 1.0)])
                else:
                    drawn = [(v, reveal * float(law[n, at, v])) for v in range(mask)]
                    options.append([*drawn, (mask, 1 - reveal)])
            for choice in product(*options):
                p = math.prod(c[1] for c in choice)
                if p > 0:
                    key = tuple(c[0] for c in choice)
                    after[key] = after.get(key, 0.0) + weights[row] * p
        weights = after
    return weights


def close(values: Tensor, truth: float) -> bool:
    """Within five standard errors of independent `values`."""
    return abs(float(values.double().mean()) - truth) < 5 * float(values.double().std()) / len(values) ** 0.5


def sampled(process: MaskedProcess, n: int, seed: int = 0) -> Samples:
    return Ancestral(n).run(process, [""], generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Pull(TransitionEdit):
    """Moves the law of every position towards the lower tokens."""

    by: float

    def shift(self, x: Tensor, context: Context) -> Tensor:
        return x - self.by * torch.arange(x.shape[-1], dtype=x.dtype)


# ----------------------------------------------------------------------------------------------------- exact chain


def closed_form(steps: int) -> Tensor:
    marginals = JOINT.sum(1, keepdim=True) * JOINT.sum(0, keepdim=True)
    return (1 - 1 / steps) * JOINT + marginals / steps


@pytest.mark.parametrize("steps", list(LAW_00))
def test_the_chain_has_the_law_that_theory_gives(steps: int) -> None:
    process, truth = chain(steps), closed_form(steps)
    assert abs(float(truth[0, 0]) - LAW_00[steps]) < 5e-7
    law = enumerated(process)
    for a, b in product(range(2), repeat=2):
        assert abs(law[a, b] - float(truth[a, b])) < 1e-12
    # What is really drawn.
    tokens = torch.tensor(sampled(process, 40_000).tokens)
    for a, b in product(range(2), repeat=2):
        hit = (tokens == torch.tensor([a, b])).all(1)
        assert close(hit, float(truth[a, b]))


def test_one_position_a_step_draws_from_the_joint() -> None:
    table = random_table(3, 3)
    samples = sampled(chain(3, table, order="confidence"), 40_000)
    tokens = torch.tensor(samples.tokens)
    at = tokens @ torch.tensor([9, 3, 1])
    counts = torch.bincount(at, minlength=27) / len(at)
    truth = table.flatten()
    assert bool(((counts - truth).abs() < 5 * (truth * (1 - truth) / len(at)).sqrt() + 1e-12).all())
    # Without edits the tokens' log-probabilities add up to that of the text, whichever came first.
    assert torch.allclose(samples.log_prob, truth.log()[at], rtol=0, atol=1e-9)
    assert samples.cost.generated_tokens == 3 * 40_000


def test_confidence_reveals_the_surest_positions_first_and_as_many_in_each_step() -> None:
    table = torch.einsum("a,b,c,d->abcd", *(torch.tensor([p, 1 - p]).double() for p in (0.6, 0.99, 0.5, 0.8)))
    process, generator = chain(2, table, order="confidence"), torch.Generator().manual_seed(0)
    state = process.propose(process.init([""], 5, generator), generator)
    assert (~process.masked(state)).tolist() == [[False, True, False, True]] * 5
    state = process.propose(state, generator)
    assert process.done(state) and bool(process.finished(state).all())
    assert chain(64, table, order="confidence").num_steps == 4  # no more steps than positions
    # Edits leave the choice of positions alone, so that it cancels in every weight.
    edited = process.edited(Pull(-9.0))
    state = edited.propose(edited.init([""], 5, generator), generator)
    assert (~process.masked(state)).tolist() == [[False, True, False, True]] * 5


def test_log_probabilities_are_of_the_tokens_given_where_they_were_revealed() -> None:
    samples = sampled(chain(3), 300)
    seen = {round(float(x), 9) for x in samples.log_prob.exp()}
    assert seen == {0.25, 0.4, 0.1}  # both at once, or one after the other: equal tokens, different ones
    assert torch.equal(samples.log_prob, samples.base_log_prob) and float(samples.kl.abs().max()) == 0


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_kl_of_an_edit_is_exact(order: str) -> None:
    table = random_table(3, 3)
    process = chain(2, table, order=order)
    samples = sampled(process.edited(Pull(0.8)), 40_000)
    gap = samples.log_prob - samples.base_log_prob
    assert close(gap - samples.kl, 0.0) and float(samples.kl.min()) > 0
    assert close((-gap).exp(), 1.0)
    # The first step's, by hand.
    state = process.edited(Pull(0.8)).read(state_of(process, [[3, 3, 3]]))
    law, base = state.law[0, :, :3], state.base[0, :, :3]
    kl = (law.exp() * (law - base)).sum(1)
    generator = torch.Generator().manual_seed(0)
    after = process.edited(Pull(0.8)).propose(state, generator)
    want = kl.sum() / 2 if order == "random" else kl[after.tokens[0] != 3].sum()
    assert abs(float(after.kl[0] - want)) < 1e-12


def test_temperature_truncation_and_suppression() -> None:
    table = torch.einsum("a,b->ab", *(torch.tensor([0.6, 0.3, 0.1]).double(),) * 2)
    flat = torch.tensor(sampled(chain(1, table, temperature=2.0), 40_000).tokens)
    law = torch.softmax(torch.tensor([0.6, 0.3, 0.1]).log() / 2, 0)
    assert all(close(flat[:, 0] == v, float(law[v])) for v in range(3))
    for cut in ({"top_k": 2}, {"top_p": 0.85}):
        samples = sampled(chain(1, table, **cut), 4000)
        tokens = torch.tensor(samples.tokens)
        assert int(tokens.max()) == 1 and close(tokens[:, 1] == 0, 2 / 3)
        # Truncation is a drift from the base law: each position lost log 0.9.
        assert torch.allclose(samples.kl, torch.full((4000,), -2 * math.log(0.9)).double())
        assert torch.allclose(samples.log_prob - samples.base_log_prob, samples.kl)
    samples = sampled(chain(1, table, suppress=(0,)), 4000)
    tokens = torch.tensor(samples.tokens)
    assert int(tokens.min()) == 1 and close(tokens[:, 1] == 1, 0.75) and float(samples.kl.abs().max()) == 0
    assert samples.log_prob.equal(samples.base_log_prob)
    greedy = chain(2, table, temperature=0)
    assert sampled(greedy, 20).tokens == [[0, 0]] * 20
    assert Ability.BRANCH not in greedy.abilities
    with pytest.raises(UnsupportedError, match="temperature above 0"):
        greedy.require(Ability.BRANCH, "FK steering")


def test_rows_in_which_nothing_was_revealed_cost_no_pass() -> None:
    table = random_table(3, 2)
    samples = sampled(chain(200, table), 50)
    assert samples.cost.nfe <= 3 * 50 and samples.cost.generated_tokens == 150
    assert all(2 not in row for row in samples.tokens)
    # The laws that are kept are those that would be computed.
    process, generator = chain(30, table), torch.Generator().manual_seed(1)
    state = process.init([""], 20, generator)
    for _ in range(12):
        state = process.propose(state, generator)
    kept, again = process.read(state), process.read(replace(state, base=None, fresh=None))
    assert torch.equal(kept.base, again.base) and kept.cost.nfe < again.cost.nfe
    assert bool(process.finished(state).any()) and not bool(process.finished(state).all())
    revealed = ~process.masked(state)
    assert torch.equal(kept.base.argmax(-1)[revealed], state.tokens[revealed])
    assert torch.equal(kept.base.exp().amax(-1)[revealed], torch.ones(int(revealed.sum())).double())


# ------------------------------------------------------------------------------------------------------- steering


def fk(sampler: FKSteering, process: MaskedProcess, runs: int = 2500, seed: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return sampler.run(process, [""] * runs, generator=generator, reward=ZEROS, beta=0.5)


def right(samples: Samples) -> bool:
    """Whether Z-hat is unbiased, and with it the law of the weighted particles."""
    z = samples.log_z.exp()
    weighted = z * samples.mean_reward()
    return close(z, Z) and close(weighted, Z * TILTED_00) and close(weighted - TILTED_00 * z, 0.0)


@pytest.mark.parametrize(
    "lookahead",
    [Preview(), MarginalDraws(3), MarginalDraws(2, "mean"), MarginalDraws(2, "released"), Rollouts(2)],
    ids=lambda x: f"{type(x).__name__}{getattr(x, 'combine', '')}",
)
def test_fk_has_the_closed_forms_evidence_and_law(lookahead: Any) -> None:
    assert right(fk(FKSteering(num_particles=4, lookahead=lookahead), chain()))


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("by", [-1.0, 2.0])
def test_a_guided_edit_is_corrected(by: float, order: str) -> None:
    sampler, process = FKSteering(num_particles=4, lookahead=MarginalDraws(2)), chain(order=order)
    samples = fk(sampler, process.edited(Pull(by)))
    # By confidence one position a step is revealed: the law is the joint itself.
    z = Z if order == "random" else 1 + 0.4 * (math.exp(2) - 1)
    assert close(samples.log_z.exp(), z) and (order == "confidence" or right(samples))
    uncorrected = fk(replace(sampler, correct=False), process.edited(Pull(by)))
    assert not close(uncorrected.log_z.exp(), z)


@pytest.mark.parametrize(
    ("length", "size", "settings"),
    [
        (2, 3, {"top_k": 2}),
        (3, 3, {"top_p": 0.6}),
        (2, 4, {"top_k": 3, "top_p": 0.8, "temperature": 1.5}),
    ],
)
@pytest.mark.parametrize("by", [0.0, 2.0])
def test_evidence_under_truncation_is_that_of_the_law_that_is_drawn(
    length: int, size: int, settings: dict[str, Any], by: float
) -> None:
    """ "truncated": E exp(r) under the law of unedited texts, edits or not; "full": that of the law before truncation,
    restricted to what is drawn.
    """

    def full_law(state: MaskedState) -> Tensor:
        assert state.base is not None
        return torch.where(drawn_from(state).isneginf(), -torch.inf, state.base)

    def evidence(law: dict[tuple[int, ...], float]) -> float:
        return sum(p * math.exp(1.5 * (row.count(0) - row.count(1))) for row, p in law.items())

    reward = lift(lambda texts: torch.tensor([1.5 * (t.count("0") - t.count("1")) for t in texts]))
    process = chain(3, random_table(length, size, 4), **settings)
    edited = process.edited(Pull(by)) if by else process
    for base, truth in (
        ("truncated", evidence(enumerated(process))),
        ("full", evidence(enumerated(edited, full_law))),
    ):
        sampler, prompts = FKSteering(num_particles=4), ["x"] * 800
        samples = sampler.run(
            replace(edited, base=base), prompts, generator=torch.Generator().manual_seed(3), reward=reward
        )
        assert close(samples.log_z.exp(), truth), base
    plain = Ancestral(40).run(edited, ["x"], generator=torch.Generator().manual_seed(3))
    assert float(plain.kl.min()) > 0  # samplers that do not weigh report the drift from the full law


@dataclass(frozen=True)
class Flat(TransitionEdit):
    """Every token as likely as any other, the mask too."""

    def shift(self, x: Tensor, context: Context) -> Tensor:
        return torch.zeros_like(x)


def test_edits_change_masked_positions_of_their_own_rows_alone() -> None:
    process = chain(4, random_table(3, 3)).edited(Flat(), prompts=[1])
    state = replace(state_of(process, [[3, 0, 3], [3, 0, 3]]), group=torch.tensor([0, 1]), prompts=["", ""])
    state = process.read(state)
    assert torch.equal(state.law[0], state.base[0]) and float(state.gap[0].abs().sum()) == 0
    flat = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]).double()
    assert torch.allclose(state.law[1].exp(), torch.stack([flat, torch.eye(4).double()[0], flat]))
    assert float(state.gap[1, 1]) == 0 and float(state.gap[1].sum()) > 0


def test_rlg_between_two_laws() -> None:
    other = torch.tensor([[0.1, 0.2], [0.2, 0.5]], dtype=torch.float64)
    base, tuned = chain(), chain(table=other)
    assert sampled(base.edited(RLGuidance(tuned, 0.0)), 50).tokens == sampled(base, 50).tokens
    assert sampled(base.edited(RLGuidance(tuned, 1.0)), 50).tokens == sampled(tuned, 50).tokens
    half = base.edited(RLGuidance(tuned, 0.5)).read(state_of(base, [[2, 2], [0, 2]]))
    want = torch.stack([(JOINT.sum(1) * other.sum(1)).sqrt(), (JOINT[0] / JOINT[0].sum() * other[0] / 0.3).sqrt()])
    want = want / want.sum(1, keepdim=True)
    assert torch.allclose(half.law[[0, 1], [0, 1], :2].exp(), want, atol=1e-12)
    assert half.cost.nfe == 4 and half.cost.model_calls == 2
    assert right(fk(FKSteering(num_particles=4), base.edited(RLGuidance(tuned, 1.5))))
    with pytest.raises(InputError, match=r"companion.*length 3"):
        base.edited(RLGuidance(chain(table=random_table(3, 2))))
    with pytest.raises(InputError, match="a masked diffusion process"):
        base.edited(RLGuidance(markov_lm()))


def test_marginal_draws_estimate_what_they_say() -> None:
    process, generator = chain(), torch.Generator().manual_seed(0)
    rows = [[2, 2], [0, 2], [0, 0], [1, 2]]
    hit = torch.tensor([0.25, 0.8, 1.0, 0.0], dtype=torch.float64)  # P(00) of a completion
    state = process.read(state_of(process, rows, step=1))
    for combine, beta, truth in (
        ("soft", 0.5, 0.5 * (1 + hit * (math.exp(2) - 1)).log()),
        ("released", 0.5, (1 + hit * (math.e - 1)).log()),
        ("mean", 0.5, hit),
    ):
        value, cost = MarginalDraws(20_000, combine)(process, state, ZEROS, beta, generator)
        assert float((value - truth).abs().max()) < 0.02 and value.dtype == torch.float64
        assert cost.reward_calls == 3 * 20_000 + 1 and cost.model_calls == 0
        assert float(value[2]) == 1 and float(value[3]) == 0
    with pytest.raises(UnsupportedError, match="TabularProcess has none"):
        FKSteering(lookahead=MarginalDraws(2)).run(markov_lm(), [""], generator=generator, reward=ZEROS)
    for bad in ({"m": 0}, {"combine": "best"}):
        with pytest.raises(InputError):
            MarginalDraws(**bad)


def test_a_value_of_the_context_and_svdd() -> None:
    table = closed_form(4)

    def exact(context: Context) -> Tensor:
        """The soft value of the last but one step's rows, by the marginals."""
        p = context.base[:, 0, 0].exp() * context.base[:, 1, 0].exp()
        return 0.5 * (1 + p * (math.exp(2) - 1)).log()

    assert right(fk(FKSteering(num_particles=4, lookahead=StateValue(exact)), chain()))
    samples = SVDD(n=400, num_candidates=4, lookahead=MarginalDraws(4)).run(
        chain(), [""], generator=torch.Generator().manual_seed(0), reward=ZEROS, beta=0.5
    )
    assert float(samples.reward.mean()) > float(table[0, 0]) + 0.2


# ---------------------------------------------------------------------------------------------------------- states


def finish(process: MaskedProcess, state: MaskedState, seed: int = 5) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    while not process.done(state):
        state = process.propose(state, generator)
    return process.decode(state)


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("edited", [False, True])
def test_gather_stack_and_pack_keep_rows_as_they_are(edited: bool, read: bool) -> None:
    process = chain(5, random_table(4, 3))
    process = process.edited(Pull(0.5)) if edited else process
    generator = torch.Generator().manual_seed(2)
    state = process.propose(process.init(["one", "two"], 3, generator), generator)
    state = process.read(state) if read else state
    index = torch.tensor([5, 0, 0, 3])
    want = finish(process, process.gather(state, index))
    assert want.group.tolist() == [1, 0, 0, 1]
    parts = [process.gather(state, i) for i in index.split(2)]
    if read:
        parts[0] = process.propose(process.gather(state, index[:2]), torch.Generator().manual_seed(0))
        with pytest.raises(InputError, match="rows at one step"):
            process.stack(parts)
        parts[0] = process.gather(state, index[:2])
        fresh = process.stack([parts[0], replace(parts[1], law=None, base=None, gap=None)])
        assert finish(process, fresh).tokens == want.tokens
        assert fresh.law is fresh.base or edited
    stacked = process.stack(parts)
    packed = process.pack(process.gather(state, index))
    assert all(len(x) == 4 for x in packed.values())
    unpacked = process.unpack(["one", "two"], state.step, packed)
    for other in (stacked, unpacked):
        seen = finish(process, other)
        assert seen.tokens == want.tokens and torch.equal(seen.group, want.group)
        for name in ("log_prob", "base_log_prob", "kl"):
            assert torch.equal(getattr(seen, name), getattr(want, name))
    assert process.preview(unpacked).tokens == process.preview(process.gather(state, index)).tokens
    settled, cost = process.settle(state)
    # Rows in which the first step revealed nothing are not read again.
    changed = int((~process.masked(state)).any(1).sum())
    assert settled.cost.nfe == 0 and 0 < changed < 6 and cost.nfe == 6 + (changed if read else 0)
    assert process.identify(state) == [tuple(row) for row in state.tokens.tolist()]


def test_copies_share_the_pass_and_part_ways() -> None:
    process, generator = chain(4, random_table(4, 3)), torch.Generator().manual_seed(0)
    state = process.read(process.init([""], 1, generator))
    many = process.gather(state, torch.zeros(50, dtype=torch.long))
    after = process.propose(many, generator)
    assert after.cost.nfe == 1 and len(set(process.identify(after))) > 5
    # The state that was read is as it was.
    assert process.identify(state) == [(3, 3, 3, 3)] and float(state.base.exp().sum()) == pytest.approx(4)


def test_previews_complete_rows_and_keep_what_is_revealed() -> None:
    table = random_table(4, 3)
    for shown in ("sample", "argmax"):
        process, generator = chain(4, table, shown=shown), torch.Generator().manual_seed(0)
        state = process.propose(process.init([""], 30, generator), generator)
        first, second = process.preview(state), process.preview(process.read(state))
        assert first.tokens == second.tokens  # the same rows, the same completions
        tokens, known = torch.tensor(first.tokens), ~process.masked(state)
        assert int(tokens.max()) < 3 and torch.equal(tokens[known], state.tokens[known])
        assert first.texts[0] == " ".join(map(str, first.tokens[0]))
        partial = process.decode(state)
        assert any(3 in row for row in partial.tokens) and not any("3" in text for text in partial.texts)
    state = chain(shown="sample").init([""], 40_000, torch.Generator().manual_seed(0))
    tokens = torch.tensor(chain().preview(state).tokens)
    assert close((tokens == 0).all(1), 0.25)


def test_bad_settings_are_refused() -> None:
    bad: list[dict[str, Any]] = [
        {"steps": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"order": "left"},
        {"shown": "current"},
        {"suppress": (7,)},
        {"max_batch": -1},
    ]
    for settings in bad:
        with pytest.raises(InputError, match=next(iter(settings))):
            chain(**settings)
    process = MaskedProcess(TableDenoiser(JOINT), length=3)
    with pytest.raises(InputError, match="2, the positions of the table"):
        sampled(process, 1)
    for table in (torch.ones(2, 3), torch.ones(2, 2)):
        with pytest.raises(InputError, match="table"):
            TableDenoiser(table)


# ---------------------------------------------------------------------------------------------------- transformers

WORDS = MASKED_WORDS.split()


@pytest.fixture(scope="module")
def bert(tiny_bert_dir: Path) -> Any:
    from steer.adapters.transformers.masked import load

    return load(tiny_bert_dir, dtype="float32", device="cpu")


def test_a_masked_model_is_recognised_and_runs_everywhere(
    bert: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its folder, and by its class in memory; in Python, on the command line, in a recipe."""
    monkeypatch.chdir(tmp_path)
    folder = bert.name
    opened = steer.load(folder, dtype="float32")
    assert type(opened) is type(bert) is type(steer.load(bert.network, tokenizer=bert.tokenizer))
    how: dict[str, Any] = {"seed": 1, "length": 5, "steps": 5}
    assert opened.generate("the sun", **how).texts == bert.generate("the sun", **how).texts
    plain = steer.load(folder)
    for sampler in ("best-of-n", "fk", "svdd", "dts", "dts-star"):
        found = plain.generate("the sun", sampler=sampler, reward="keywords:happy,good", **how)
        assert len(found.texts) >= 1 and len(found.texts[0].split()) <= 5
    line = ["generate", "--model", folder, "--prompt", "the sun", "--max-new-tokens", "5", "--steps", "4", "--json"]
    more = ["--sampler", "fk", "-n", "4", "--reward", "keywords:happy,good", "--seed", "3"]
    assert main([*line, *more]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert all(len(o["text"].split()) <= 5 for p in shown["prompts"] for o in p["samples"])
    recipe = ["run", "masked", f"model={folder}", "length=5", "steps=4", "budgets=20,40", "seeds=1"]
    assert main([*recipe, "reward=keywords:happy,good"]) == 0
    assert "dts-star" in capsys.readouterr().out and Path("out/masked/race/race.png").is_file()


def test_options_of_other_models_are_refused_for_a_masked_one(bert: Any, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", "--model", bert.name, "--prompt", "the sun"]
    for option, value in (
        ("--edit", "a.safetensors"),
        ("--repetition-penalty", "1.2"),
        ("--until", "."),
        ("--eta", "0"),
    ):
        assert main([*line, option, value]) == 2
        assert option.strip("-").replace("-", "_") in capsys.readouterr().err
    for command in (["serve"], ["train", "vector", "--pairs", "x", "--out", "y.safetensors"]):
        assert main([*command, "--model", bert.name]) == 2
        assert "from left to right" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Dream", "llada"])
def test_models_that_only_seem_causal_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    with pytest.raises(SteerError, match="a way of their own"):
        steer.load(tmp_path)


def test_pseudo_likelihood_is_the_sum_of_conditionals(bert: Any) -> None:
    drawn = bert.generate(["the sun", ""], n=2, seed=0, length=4, steps=4)
    total, count = bert.log_likelihood(drawn)
    assert count.tolist() == [4] * 4
    for i, tokens in enumerate(drawn.tokens):
        before = [2, 5, 7] if int(drawn.group[i]) == 0 else [2]
        want = 0.0
        for j, token in enumerate(tokens):
            row = [*tokens[:j], 4, *tokens[j + 1 :]]
            logits = bert.network(input_ids=torch.tensor([[*before, *row, 3]])).logits[0, len(before) + j].double()
            logits[4] = -torch.inf
            want += float(logits.log_softmax(-1)[token])
        assert abs(float(total[i]) - want) < 1e-4  # float32 passes


def test_a_prompt_edit_rewrites_what_a_masked_model_reads(bert: Any) -> None:
    @dataclass(frozen=True)
    class Before(PromptEdit):
        def rewrite(self, prompt: Any) -> Any:
            return f"a good {prompt}"

    edited = bert.generate("dog", edits=Before(), seed=2, length=4, steps=4)
    assert edited.tokens == bert.generate("a good dog", seed=2, length=4, steps=4).tokens and edited.prompts == ["dog"]


def test_rows_are_framed_and_masks_excluded(bert: Any) -> None:
    assert bert.mask_id == 4 and bert.frame == ([2], [3]) and bert.context_length == 40
    encoded = bert.encode(["the sun", "", "a very good dog"], 5)
    assert encoded[:2] == [[2, 5, 7], [2]]
    law = bert.predict(torch.full((3, 5), 4), torch.tensor([0, 1, 2]), encoded).log_softmax(-1)
    assert law.shape == (3, 5, 25) and bool(law[..., 4].isneginf().all())
    assert torch.allclose(law.exp().sum(-1), torch.ones(3, 5))
    # Each row by itself, by the network's own words.
    for b, row in enumerate(encoded):
        ids = torch.tensor([[*row, *[4] * 5, 3]])
        logits = bert.network(input_ids=ids).logits[0, len(row) : len(row) + 5]
        logits[:, 4] = -torch.inf
        assert torch.allclose(law[b], logits.log_softmax(-1), atol=1e-5)


def test_same_seed_same_text(bert: Any) -> None:
    one = bert.generate(["the sun", "a dog"], n=3, seed=1, length=6, steps=4)
    assert one.texts == bert.generate(["the sun", "a dog"], n=3, seed=1, length=6, steps=4).texts
    assert one.texts != bert.generate(["the sun", "a dog"], n=3, seed=2, length=6, steps=4).texts
    assert all(len(row) == 6 and 4 not in row for row in one.tokens)
    assert one.cost.generated_tokens == 36 and one.cost.model_calls <= 4 and one.cost.nfe <= 24
    assert one.group.tolist() == [0, 0, 0, 1, 1, 1] and one.prompts == ["the sun", "a dog"]
    assert bert.generate(length=4, steps=2, seed=0).prompts == [""]  # no prompt at all
    suppressed = bert.generate("the sun", n=20, seed=1, length=6, suppress=(0, 1, 2, 3))
    assert min(min(row) for row in suppressed.tokens) > 4


def test_two_prompts_do_not_mix(bert: Any) -> None:
    """The same noise beside another prompt, of the same length or another, gives the same texts."""
    runs = []
    for other in ("a dog", "a very good dog runs", "the sun"):
        process = bert.process(length=6, steps=6)
        generator = torch.Generator().manual_seed(0)
        runs.append(Ancestral(4).run(process, ["the sun", other], generator=generator))
    assert runs[0].tokens[:4] == runs[1].tokens[:4] == runs[2].tokens[:4]
    assert runs[0].tokens[4:] != runs[2].tokens[4:]
    assert torch.allclose(runs[0].log_prob[:4], runs[1].log_prob[:4], atol=1e-4)
    batched = replace(bert.process(length=6, steps=6), max_batch=3)
    again = Ancestral(4).run(batched, ["the sun", "a dog"], generator=torch.Generator().manual_seed(0))
    assert again.tokens == runs[0].tokens


def happy(texts: list[str]) -> list[float]:
    return [float(sum(word in ("happy", "good", "sun") for word in text.split())) for text in texts]


def test_samplers_raise_the_reward(bert: Any) -> None:
    plain = bert.generate("the sun", n=200, seed=0, length=6, steps=6, reward=happy)
    best = bert.generate("the sun", sampler=BestOfN(16), seed=0, length=6, steps=6, reward=happy)
    assert best.reward[0] == best.pool.reward.max() and float(best.reward[0]) > float(plain.reward.mean())
    for lookahead in (Preview(), MarginalDraws(4)):
        sampler = FKSteering(num_particles=8, n=8, lookahead=lookahead)
        steered = bert.generate("the sun", sampler=sampler, seed=0, length=6, steps=6, reward=happy, beta=0.3)
        assert float(steered.mean_reward()[0]) > float(plain.reward.mean()) + 0.5
        assert steered.log_z is not None and float(steered.log_z[0]) > 0
    pulled = bert.generate("the sun", n=4, seed=0, length=6, steps=6, edits=Pull(0.3))
    assert float(pulled.kl.min()) > 0


def test_what_does_not_fit_is_refused(bert: Any, tmp_path: Path) -> None:
    from steer.adapters.transformers.masked import MaskedLanguageModel, load

    with pytest.raises(InputError, match=r"prompts\[1\].*at most 40 tokens"):
        bert.generate(["the sun", "a very good dog runs"], length=34)
    with pytest.raises(InputError, match="the mask token"):
        bert.generate("the [MASK]", length=4)
    with pytest.raises(InputError, match="no chat template"):
        bert.generate([{"role": "user", "content": "the sun"}], length=4)
    with pytest.raises(InputError, match="allowed: base, max_batch, order"):
        bert.process(lenght=4)
    with pytest.raises(SteerError, match="could not load"):
        load(tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        load(bert.network)
    with pytest.raises(InputError, match="mask_token_id"):
        load(bert.network, tokenizer=bert.tokenizer, mask_token_id=25)
    bert.network.config.time_conditioning = True
    try:
        with pytest.raises(UnsupportedError, match="wants the time"):
            MaskedLanguageModel(bert.network, bert.tokenizer, "bert")
    finally:
        del bert.network.config.time_conditioning


class Bare(torch.nn.Module):
    """A network as MDLM's: its mask is one id more than the tokenizer has, it wants times that it does not use, it
    takes no attention mask, and it returns logits.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.config = type("Config", (), {"vocab_size": size, "model_length": 32})()
        self.table = torch.nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: Tensor, timesteps: Tensor) -> Tensor:
        assert timesteps.shape == input_ids.shape[:1]
        return self.table[input_ids] + self.table[input_ids].mean(1, keepdim=True)


class Words:
    """A tokenizer without special tokens."""

    chat_template = "{{ messages }}"

    def __len__(self) -> int:
        return len(WORDS)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [WORDS.index(word) for word in text.split()]}

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(WORDS[t] for t in tokens)

    def apply_chat_template(self, messages: list[dict[str, str]], **settings: bool) -> str:
        return " ".join(["day", *(m["content"] for m in messages), "night"])


def test_networks_that_return_bare_logits() -> None:
    from steer.adapters.transformers.masked import load

    model = load(Bare(len(WORDS) + 1), tokenizer=Words())
    assert model.mask_id == len(WORDS) and model.frame == ([], []) and model.context_length == 32
    assert model.prefix("the sun") == [4, 0, 2, 5] and model.prefix(RawText("the sun")) == [0, 2]
    assert model.prefix([{"role": "user", "content": "a"}]) == [4, 1, 5] and model.prefix("") == []
    samples = model.generate(["", "the sun"], n=3, seed=0, length=8, steps=8)
    assert all(len(text.split()) == 8 for text in samples.texts)
    with pytest.raises(InputError, match="mask_token_id"):
        load(Bare(len(WORDS)), tokenizer=Words())

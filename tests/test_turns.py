"""Environments, episodes as a process, and planning: enumeration, what goes wrong in an environment, exact regret."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steer import generate
from steer.cli import main
from steer.core import InputError, Samples, SteerError, UnsupportedError
from steer.methods.best_of_n import Ancestral, BestOfN
from steer.methods.critique import Critique
from steer.methods.dts import DTS
from steer.methods.fk import FKSteering
from steer.methods.svdd import SVDD
from steer.methods.turn_search import TurnSearch
from steer.pictures.episodes import episodes_html
from steer.rewards import parse_reward
from steer.turns import (
    AdvantageCritic,
    Candidates,
    Environment,
    InformationGain,
    LegalCritic,
    Outcome,
    Tools,
    TurnProcess,
    TurnValue,
    make,
    tool,
)
from steer.turns import bandit as bandits
from steer.turns.courier import Courier, named
from steer.turns.exact import Finite
from steer.turns.ledger import calculated
from steer.turns.regret import growth, regret_report, trend

WORLD: Finite = Courier().finite()
START = WORLD.start
ACTIONS = ("walk", "ride", "wait")
RETURN = parse_reward("return")


def run(
    process: TurnProcess, sampler: Any = None, n: int = 1, seed: int = 0, prompts: Any = ("go",), **more: Any
) -> Samples:
    return generate(
        process, list(prompts), sampler=sampler or Ancestral(n), seed=seed, reward=RETURN, max_rows=10**6, **more
    )


def near(values: torch.Tensor, want: float) -> None:
    error = float(values.double().std()) / len(values) ** 0.5
    assert abs(float(values.double().mean()) - want) <= 5 * error + 1e-9, (float(values.mean()), want, error)


# ------------------------------------------------------------------------------------------------ exact, by enumeration


def test_values_of_the_courier() -> None:
    v, best = WORLD.value(WORLD.uniform), WORLD.best()
    assert v(START) == pytest.approx(-0.240741, abs=1e-6)
    assert [WORLD.q(START, a, v) for a in ACTIONS] == pytest.approx([-0.138889, 0.055556, -0.638889], abs=1e-6)
    assert best(START) == 2.0 == Courier().solve() and [WORLD.q(START, a, best) for a in ACTIONS] == [2.0, 1.5, 1.0]
    policy = WORLD.greedy(best)
    assert {s: next(iter(policy(s))) for s in ((0, 3), (0, 2), (1, 1), (0, 1))} == {
        (0, 3): "walk",
        (0, 2): "ride",
        (1, 1): "ride",
        (0, 1): "wait",
    }


@pytest.mark.parametrize(
    ("beta", "log_z", "mean", "first", "acting", "soft"),
    [
        (
            1.0,
            1.716898,
            2.743518,
            (0.358833, 0.455220, 0.185947),
            0.853565,
            (0.441270, (0.409505, 0.408381, 0.182114), 0.982600),
        ),
        (
            0.5,
            2.297662,
            2.941206,
            (0.337603, 0.473181, 0.189216),
            0.936209,
            (0.851909, (0.536156, 0.379583, 0.084262), 1.466636),
        ),
    ],
)
def test_tilting_episodes_is_not_acting(
    beta: float, log_z: float, mean: float, first: Any, acting: float, soft: Any
) -> None:
    episodes = WORLD.episodes(WORLD.uniform)
    assert len(episodes) == 55 and sum(p for p, _, _ in episodes) == pytest.approx(1)
    z = sum(p * math.exp(r / beta) for p, r, _ in episodes)
    assert beta * math.log(z) == pytest.approx(log_z, abs=1e-6)
    assert sum(p * math.exp(r / beta) * r for p, r, _ in episodes) / z == pytest.approx(mean, abs=1e-6)
    value, policy = WORLD.tilted(beta)
    assert value(START) == pytest.approx(log_z, abs=1e-6)
    assert [policy(START)[a] for a in ACTIONS] == pytest.approx(first, abs=1e-6)
    marginal = [sum(p * math.exp(r / beta) for p, r, a in episodes if a == name) / z for name in ACTIONS]
    assert marginal == pytest.approx(first, abs=1e-6)
    assert WORLD.value(policy)(START) == pytest.approx(acting, abs=1e-6)
    value, policy = WORLD.soft(beta)
    assert value(START) == pytest.approx(soft[0], abs=1e-6)
    assert [policy(START)[a] for a in ACTIONS] == pytest.approx(soft[1], abs=1e-6)
    assert WORLD.value(policy)(START) == pytest.approx(soft[2], abs=1e-6)


def best_of(n: int) -> tuple[float, Callable[[Any], dict[str, float]]]:
    """Expected return of the best of n episodes from the start, and the policy of replanning so at every turn."""

    def law(state: Any) -> tuple[float, dict[str, float]]:
        here = Finite(state, WORLD.actions, WORLD.moves).episodes(WORLD.uniform)
        levels = sorted({r for _, r, _ in here})
        mass = {level: sum(p for p, r, _ in here if r == level) for level in levels}
        below, chosen, mean = 0.0, dict.fromkeys(ACTIONS, 0.0), 0.0
        for level in levels:
            won = (below + mass[level]) ** n - below**n
            mean += won * level
            for p, r, a in here:
                chosen[a] += won * p / mass[level] if r == level else 0.0
            below += mass[level]
        return mean, chosen

    return law(START)[0], lambda state: law(state)[1]


def test_best_of_n_reports_more_than_it_earns() -> None:
    assert [best_of(n)[0] for n in (2, 4, 16, 64)] == pytest.approx([0.947702, 2.071289, 2.981537, 3.0], abs=1e-6)
    acting = [WORLD.value(best_of(n)[1])(START) for n in (4, 16, 64, 1024)]
    assert acting == pytest.approx([0.503777, 0.908299, 0.956978, 0.957], abs=1e-6)
    drawn = run(TurnProcess("courier", max_turns=3, simulate=True), BestOfN(16), prompts=["go"] * 60)
    near(drawn.reward, best_of(16)[0])


def test_values_of_candidates() -> None:
    v, best = WORLD.value(WORLD.uniform), WORLD.best()

    def acting(q: Any, k: int, beta: float | None) -> float:
        return WORLD.value(WORLD.among(WORLD.uniform, k, q, beta))(START)

    def own(state: Any, action: str) -> float:
        return WORLD.q(state, action, v)

    for beta, want in (
        (1.0, (-0.240741, 0.269184, 0.610791, 0.771891)),
        (0.5, (-0.240741, 0.433924, 0.888318, 1.083928)),
        (None, (-0.240741, 0.600480, 1.157959, 1.428792)),
    ):
        assert [acting(own, k, beta) for k in (1, 2, 4, 8)] == pytest.approx(want, abs=1e-6)
    assert WORLD.value(WORLD.greedy(v))(START) == pytest.approx(1.5)
    stars = [acting(lambda s, a: WORLD.q(s, a, best), k, None) for k in (2, 4, 8)]
    assert stars == pytest.approx([0.564815, 1.341382, 1.858118], abs=1e-6)


def turn_state(turn: Any) -> tuple[int, int]:
    """Position and turns left, of what the agent has seen."""
    words = turn[-1]["content"].split("You are at step ")[1].split()
    return int(words[0]), int(words[3])


def test_candidates_are_drawn_so() -> None:
    v = WORLD.value(WORLD.uniform)
    draw = Candidates(4, lambda turn, action: WORLD.q(turn_state(turn), action, v))
    near(run(TurnProcess("courier", max_turns=3, draw=draw), n=400).reward, 1.157959)


def redrawn(k: int, good: Callable[[Any, str], bool], repeats: bool = True) -> Callable[[Any], dict[str, float]]:
    """Uniform proposals until one is good, k redraws at most, the last one acts."""

    def policy(state: Any) -> dict[str, float]:
        found = dict.fromkeys(ACTIONS, 0.0)

        def go(p: float, left: int, tried: tuple[str, ...]) -> None:
            names = [a for a in ACTIONS if a not in tried] or list(ACTIONS)
            for a in names:
                share = p / len(names)
                if good(state, a) or left == 0:
                    found[a] += share
                else:
                    go(share, left - 1, () if repeats else (*tried, a))

        go(1.0, k, ())
        return found

    return policy


def test_advantage_feedback() -> None:
    best, v = WORLD.best(), WORLD.value(WORLD.uniform)

    def good(state: Any, action: str) -> bool:
        return WORLD.q(state, action, best) - best(state) >= -1e-12

    def own(state: Any, action: str) -> bool:
        return WORLD.q(state, action, v) - v(state) >= -1e-12

    assert [WORLD.value(redrawn(k, good))(START) for k in (0, 1, 2, 4)] == pytest.approx(
        [-0.240741, 0.307270, 0.759539, 1.383888], abs=1e-6
    )
    assert [WORLD.value(redrawn(k, good, False))(START) for k in (1, 2, 4)] == pytest.approx(
        [0.640046, 2.0, 2.0], abs=1e-6
    )
    assert [WORLD.value(redrawn(k, own))(START) for k in (1, 2, 4)] == pytest.approx(
        [0.476680, 0.859028, 1.182056], abs=1e-6
    )
    critic = AdvantageCritic(lambda turn, a: WORLD.q(turn_state(turn), a, best), lambda turn: best(turn_state(turn)))
    draw = Critique(critic, rounds=1, revise=False)
    near(run(TurnProcess("courier", max_turns=3, draw=draw), n=500).reward, 0.307270)


# ------------------------------------------------------------------------------------------------------- the process


def test_a_uniform_actor_earns_its_value() -> None:
    samples = run(TurnProcess("courier"), n=1200)
    near(samples.reward, -0.240741)
    assert all(len(t.actions) == len(t.rewards) <= 3 and t.done and not t.failure for t in samples.outputs)
    text = samples.outputs[0]
    assert text.startswith("user: go") and text.messages[1]["content"] == text.actions[0]
    assert text.total() == pytest.approx(float(samples.reward[0]))
    assert float(parse_reward("return:gamma=0.5")(samples)[0]) == pytest.approx(text.total(0.5))


def test_samplers_of_episodes_aim_at_the_tilted_law() -> None:
    process = TurnProcess("courier", max_turns=3, simulate=True)
    # Resampling by returns so far makes log Z vary by .17 at 400 particles (simulated apart from this code).
    found = run(process, FKSteering(num_particles=400), prompts=["go"] * 4)
    assert found.log_z is not None and abs(float(found.log_z.mean()) - 1.716898) <= 5 * 0.17 / 4**0.5
    v = WORLD.value(WORLD.uniform)
    valued = TurnValue(lambda episode: v(turn_state(episode.messages())))
    assert float(run(process, SVDD(n=20, num_candidates=4, lookahead=valued)).reward.mean()) > 0.8
    for sampler in (SVDD(n=20, num_candidates=4), DTS(n=10, rollouts=40)):
        assert float(run(process, sampler).reward.mean()) > 0.8
    with pytest.warns(UserWarning, match="with their luck"):
        run(TurnProcess("courier"), BestOfN(2))


class Forced:
    """A model whose log-probabilities of the answer's two tokens rise with the conversation."""

    def log_likelihood(self, samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
        table = [(-2.0, -1.0), (-1.0, -0.6), (-0.2, -0.1)]
        rows = [table[sum(m["role"] == "assistant" for m in prompt)] for prompt in samples.prompts]
        assert set(samples.outputs) == {"Paris"} and all("final answer" in p[-1]["content"] for p in samples.prompts)
        return torch.tensor(rows, dtype=torch.float64).sum(1), torch.full((len(rows),), 2.0, dtype=torch.float64)


def test_information_gain_telescopes() -> None:
    played = generate(TurnProcess("bandit:horizon=2"), ["go"], n=3, seed=0)
    gain = InformationGain({"go": "Paris"}).bind(Forced())
    for turns in gain.gains(played):  # type: ignore[attr-defined]
        assert turns == pytest.approx([0.226199, 0.411379], abs=1e-6)
    assert gain(played).tolist() == pytest.approx([0.860708 - 0.223130] * 3, abs=2e-6)
    with pytest.raises(InputError, match="answers are known"):
        InformationGain({"stop": "x"}).bind(Forced())(played)


def test_sparse_sampling_follows_its_law() -> None:
    """The law of the root's values is enumerated; with it the first action, the estimate and the value of acting."""
    want = {
        1: (0.481043, (0.394531, 0.230469, 0.375), 2.968750),
        2: (1.193297, (0.550323, 0.320894, 0.128783), 2.596860),
    }
    for width, (acting, first, estimate) in want.items():

        def values(state: Any, width: int = width) -> dict[float, float]:
            """The law of the estimate of a state."""
            return _law_of_max([_law_of_q(state, a, width, values) for a in ACTIONS])

        def policy(state: Any, width: int = width, values: Any = values) -> dict[str, float]:
            laws = [_law_of_q(state, a, width, values) for a in ACTIONS]
            found = dict.fromkeys(ACTIONS, 0.0)
            for draw in itertools.product(*(law.items() for law in laws)):
                best = [a for a, (x, _) in zip(ACTIONS, draw, strict=True) if x == max(x for x, _ in draw)]
                for a in best:
                    found[a] += math.prod(p for _, p in draw) / len(best)
            return found

        assert [policy(START)[a] for a in ACTIONS] == pytest.approx(first, abs=1e-6)
        assert sum(x * p for x, p in values(START).items()) == pytest.approx(estimate, abs=1e-6)
        assert WORLD.value(policy)(START) == pytest.approx(acting, abs=1e-6)
    search = TurnSearch(n=300, how="sparse", width=1, candidates=3)
    found = run(TurnProcess("courier", max_turns=3), search, seed=1)
    near(found.reward, 0.481043)
    firsts = Counter(t.actions[0] for t in found.outputs)
    for name, p in zip(ACTIONS, want[1][1], strict=True):
        assert abs(firsts[name] / 300 - p) <= 5 * (p * (1 - p) / 300) ** 0.5


def _law_of_q(state: Any, action: str, width: int, values: Any) -> dict[float, float]:
    one: dict[float, float] = {}
    for p, r, after in WORLD.moves(state, action):
        for v, share in ({0.0: 1.0} if after is None else values(after)).items():
            one[r + v] = one.get(r + v, 0.0) + p * share
    law = {0.0: 1.0}
    for _ in range(width):
        new: dict[float, float] = {}
        for total, p in law.items():
            for x, share in one.items():
                new[round(total + x, 9)] = new.get(round(total + x, 9), 0.0) + p * share
        law = new
    return {x / width: p for x, p in law.items()}


def _law_of_max(laws: list[dict[float, float]]) -> dict[float, float]:
    found: dict[float, float] = {}
    for draw in itertools.product(*(law.items() for law in laws)):
        top = max(x for x, _ in draw)
        found[top] = found.get(top, 0.0) + math.prod(p for _, p in draw)
    return found


def test_uct_plans_under_chance() -> None:
    process = TurnProcess("courier", max_turns=3)
    search = TurnSearch(n=16, simulations=128, candidates=3)
    found = run(process, search, seed=2)
    assert float(found.reward.mean()) + 5 * float(found.reward.std()) / 16**0.5 >= 1.8
    tree = found.trace[0]
    assert tree.root.edges and sum(e.visits for e in tree.root.edges) == 128
    rows = tree.pairs(margin=0.5)
    assert rows and all(row["margin"] > 0.5 and row["chosen"] != row["rejected"] for row in rows)
    assert rows[0]["prompt"][0]["role"] == "user" and json.dumps(tree.to_dict())


@pytest.mark.slow
def test_uct_is_near_the_best_policy() -> None:
    found = run(TurnProcess("courier", max_turns=3), TurnSearch(n=300, simulations=128, candidates=3), seed=3)
    assert float(found.reward.mean()) >= 1.8


def test_the_critic_orders_what_is_tried() -> None:
    search = TurnSearch(simulations=4, candidates=3, critic=lambda turn, action: float(action == "ride"))
    tree = run(TurnProcess("courier", max_turns=3), search).trace[0]
    assert [(e.action, e.prior) for e in tree.root.edges] == [("ride", 1.0), ("walk", 0.5), ("wait", 1 / 3)]


# ------------------------------------------------------------------------------------------- environments of one's own


class Moody(Environment):
    """Counts to three; some prompts make it misbehave at the second step."""

    chance = False

    def reset(self, prompt: Any, seed: int) -> Any:
        self.mood, self.count = str(prompt), 0
        self.reseed(seed)
        if self.mood == "no start":
            raise RuntimeError("no engine")
        return 7 if self.mood == "odd start" else "Count."

    def actions(self) -> list[str]:
        return ["on"]

    def step(self, action: str) -> Any:
        self.count += 1
        if self.count == 2:
            if self.mood == "raises":
                raise ValueError("lost\nmuch")
            if self.mood == "hangs":
                time.sleep(3)
            if self.mood == "nonsense":
                return "fine"
            if self.mood == "nan":
                return Outcome("x", float("nan"))
        return Outcome(str(self.count), 1.0, done=self.count == 3)


def test_a_bad_environment_loses_no_other_episode() -> None:
    moods = ["well", "raises", "hangs", "nonsense", "nan", "no start", "odd start", "well"]
    samples = run(TurnProcess(Moody, seconds=0.3), prompts=moods)
    failures = [t.failure for t in samples.outputs]
    assert failures[0] is None and failures[7] is None and samples.reward.tolist() == [3, 1, 1, 1, 1, 0, 0, 3]
    told = [
        "step raised ValueError: lost",
        "step did not return within 0.3 s",
        "step returned str; allowed: Outcome",
        "reward nan",
        "reset raised RuntimeError: no engine",
        "reset returned int",
    ]
    for failure, said in zip(failures[1:7], told, strict=True):
        assert said in failure and "\n" not in failure
    assert [t.truncated for t in samples.outputs] == [False, *[True] * 6, False]


ran: list[str] = []


@tool(irreversible=True)
def launch(where: str) -> str:
    """Send a rocket."""
    ran.append(where)
    return "launched"


def add(a: int, b: int = 1) -> int:
    """The sum.

    More.
    """
    return a + b


def test_tools_are_called_as_openai_writes_them() -> None:
    world = Tools([add, launch], lambda prompt, answer: float(answer == "5"))
    said = world.reset("2 and 3?", 0)
    assert '"name": "add"' in said and world.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a"],
    }
    assert world.step('Let me see: {"name": "add", "arguments": {"a": 2, "b": 3}}').text == "5"
    assert world.step('{"function": {"name": "add", "arguments": "{\\"a\\": 2}"}}').text == "3"
    assert "there is no function sub; there are add, launch" in world.step('{"name": "sub", "arguments": {}}').text
    assert "error: add" in world.step('{"name": "add", "arguments": {"c": 1}}').text
    assert "error: add" in world.step('{"name": "add", "arguments": {"a": "x"}}').text
    last = world.step("5")
    assert last.done and last.reward == 1.0
    ran.clear()
    assert "not allowed" in world.step('{"name": "launch", "arguments": {"where": "moon"}}').text and not ran
    with pytest.raises(InputError, match="did you mean launch"):
        Tools([add, launch], allow=["lanch"])
    with pytest.raises(InputError, match="annotated"):
        Tools([lambda x: x])


class Pad(Tools):
    """Two calls to choose from."""

    chance = True

    def actions(self) -> list[str]:
        return ['{"name": "launch", "arguments": {"where": "moon"}}', '{"name": "add", "arguments": {"a": 1}}']


def test_what_cannot_be_undone_is_never_tried_on_a_copy() -> None:
    ran.clear()
    process = TurnProcess(lambda: Pad([add, launch], allow=["launch"]), max_turns=2, simulate=True)
    search = run(process, TurnSearch(simulations=20))
    assert not ran and all("launch" not in a for a in search.outputs[0].actions)
    chosen = run(process, SVDD(n=8, num_candidates=3))
    assert not ran and all("irreversible" in (t.failure or "") for t in chosen.outputs if "launch" in t.actions[-1])
    real = run(process, n=8)
    assert len(ran) == sum("launch" in a for t in real.outputs for a in t.actions) > 0


class Unforked(Moody):
    forks = False
    chance = True


class Secret(Courier):
    hidden = True


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: make("curier"), InputError, "did you mean courier"),
        (lambda: make("courier:turn=3"), InputError, "did you mean turns"),
        (lambda: make("courier:turns=0"), InputError, "turns"),
        (lambda: make("bandit:arms=.6,1.4"), InputError, "arms"),
        (lambda: make("bandit:show=rwa"), InputError, "show"),
        (lambda: make("json:dumps"), InputError, "environment"),
        (lambda: TurnProcess("courier", max_turns=0), InputError, "max_turns"),
        (lambda: TurnProcess("courier", history="last"), InputError, "history"),
        (lambda: TurnProcess("courier", draw=Ancestral(2)), InputError, "draw"),
        (lambda: TurnProcess("courier", draw=BestOfN(2)), InputError, "judge"),
        (lambda: TurnSearch(bonus=-1), InputError, "bonus"),
        (lambda: TurnSearch(depth=0), InputError, "depth"),
        (lambda: TurnSearch(how="uctt"), InputError, "how"),
        (lambda: run(TurnProcess(Unforked), TurnSearch()), UnsupportedError, "cannot be copied"),
        (lambda: run(TurnProcess(Unforked), FKSteering(4)), UnsupportedError, "cannot be copied"),
        (lambda: run(TurnProcess(Secret), TurnSearch()), InputError, "leaks"),
        (lambda: run(TurnProcess(lambda: Tools([add]))), SteerError, "lists no legal actions"),
        (lambda: RETURN(Samples(["a"], ["b"], torch.tensor([0]), torch.zeros(1))), SteerError, "no episodes"),
    ],
)
def test_bad_input_is_told_in_a_line(call: Any, error: type, said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_simulator_plans_where_copies_cannot() -> None:
    def simulator(episode: Any) -> Environment:
        twin = Moody()
        twin.reset("well", 0)
        twin.count = len(episode.taken)
        return twin

    found = run(TurnProcess(Unforked), TurnSearch(simulations=4, simulator=simulator), prompts=["well"])
    assert found.reward.tolist() == [3.0]


def test_a_model_acts_behind_a_gate(tiny_lm: Any) -> None:
    """A model of random weights names no action; the gate lets none but legal ones through."""
    actor = tiny_lm.process(max_new_tokens=3)
    free = generate(TurnProcess(make("bandit:horizon=2"), actor), ["go"], n=3, seed=0, reward=RETURN)
    assert free.log_prob is not None and free.cost.generated_tokens > 0
    assert all(info["unparsed"] for t in free.outputs for info in t.infos)
    gate = Critique(LegalCritic(), rounds=1, revise=False, otherwise="text:red")
    gated = generate(TurnProcess(make("bandit:horizon=2"), actor, draw=gate), ["go"], n=3, seed=0, reward=RETURN)
    assert not any(info["unparsed"] for t in gated.outputs for info in t.infos) and gated.log_prob is None


def test_the_ledger_is_exact() -> None:
    world = make("ledger")
    world.reset("Task 1.", 0)
    price = int(world.step(f"price({world.item}s)").text)
    total = world.step(f'{{"name": "calculate", "arguments": {{"expression": "{world.count}*{price}"}}}}').text
    assert int(total) == price * world.count == world.total
    assert f"answer({total})" in world.actions() and world.step(f"I say answer({total}).").reward == 1.0
    assert calculated("2*(3+4)-1") == 13
    for wrong in ("2**9", "__import__('os')", "1/0", "9" * 70, "f(2)"):
        with pytest.raises(InputError, match="expression"):
            calculated(wrong)
    found = run(
        TurnProcess("ledger", max_turns=4), TurnSearch(n=2, simulations=200, candidates=20), prompts=["Task 1."]
    )
    assert found.reward.tolist() == [1.0, 1.0]


def test_gymnasium_is_played() -> None:
    pytest.importorskip("gymnasium")
    lake = make("gymnasium:FrozenLake-v1", names=["left", "down", "right", "up"], is_slippery=True)
    process = TurnProcess(lake, max_turns=6)
    one, two = (run(process, n=5, seed=4).outputs for _ in range(2))
    assert one == two and {a for t in one for a in t.actions} <= {"left", "down", "right", "up"}
    assert run(process, TurnSearch(simulations=10), seed=1).outputs[0].failure is None
    with pytest.raises(InputError, match="describe"):
        make("gymnasium:CartPole-v1")


# ---------------------------------------------------------------------------------------------------------- bandits


def test_regret_is_exact() -> None:
    rules = {
        "uniform": (bandits.uniform, (1.0, 2.0)),
        "greedy": (bandits.greedy, (0.766224, 1.401311)),
        "ucb": (bandits.ucb(0.5), (0.724673, 1.306284)),
        "ucb2": (bandits.ucb(2.0), (0.828462, 1.546519)),
        "thompson": (bandits.thompson, (0.816373, 1.432255)),
    }
    for name, (rule, want) in rules.items():
        found = bandits.expected_regret((0.6, 0.4), rule, 20)
        assert [found[9], found[19]] == pytest.approx(want, abs=1e-6), name
    rewards = [bandits.bayes_reward(t) for t in (1, 2, 5, 10)]
    assert rewards == pytest.approx([0.5, 1.083333, 2.888889, 6.021786], abs=1e-6)


def test_how_regret_grows() -> None:
    assert growth([0.1 * t for t in range(1, 51)]) == pytest.approx(1.0)
    assert growth([t**0.5 for t in range(1, 51)]) == pytest.approx(0.5)
    uniform = bandits.expected_regret((0.6, 0.4), bandits.uniform, 12)
    assert growth(uniform) == pytest.approx(1.0) and trend(uniform)[0] == 0
    curve, total = [1.0], 1.0
    for step in range(24):  # 19 falls of the rate, then 5 rises
        total = curve[-1] * (step + 2) / (step + 1) * (0.9 if step < 19 else 1.1)
        curve.append(total)
    assert trend(curve) == (19, pytest.approx(0.003305, abs=1e-6))
    told = [[{"regret": 0.2, "best": False, "unparsed": t == 0} for t in range(12)] for _ in range(5)]
    report = regret_report(told)
    assert report.mean[-1] == pytest.approx(2.4) and report.half[-1] == 0.0 and not report.sublinear
    assert report.best_late == 0.0 and report.unparsed == pytest.approx(1 / 12) and "log-log slope" in str(report)


@pytest.mark.slow
def test_growth_of_the_baselines() -> None:
    for rule, slope in ((bandits.greedy, 0.8929), (bandits.ucb(0.5), 0.7643), (bandits.thompson, 0.7475)):
        assert growth(bandits.expected_regret((0.6, 0.4), rule, 50)) == pytest.approx(slope, abs=6e-5)


def test_play_writes_what_it_plays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["play", "--env", "courier", "--episodes", "4", "--seed", "3", "--max-turns", "3"]
    for name in ("a", "b"):
        assert (
            main([*command, "--sampler", "turn-search", "--set", "simulations=32", "--out", str(tmp_path / name)]) == 0
        )
    said = capsys.readouterr().out
    assert "best policy" in said and "2.000" in said and "episodes.html" in said
    for file in ("episodes.jsonl", "trees.jsonl", "pairs.jsonl", "episodes.html"):
        assert (tmp_path / "a" / file).read_text() == (tmp_path / "b" / file).read_text() != ""
    records = [json.loads(line) for line in (tmp_path / "a" / "episodes.jsonl").read_text().splitlines()]
    assert len(records) == 4 and {"messages", "actions", "rewards", "return", "prompt"} <= set(records[0])
    told = json.loads((tmp_path / "a" / "play.json").read_text())
    assert told["return"] == pytest.approx(sum(r["return"] for r in records) / 4) and told["optimum"] == 2.0
    page = (tmp_path / "a" / "episodes.html").read_text()
    assert "<script" not in page and "Search: 32 simulations" in page
    bandit = ["play", "--env", "bandit:arms=.6,.4,horizon=12", "--max-turns", "12", "--episodes", "5"]
    assert main([*bandit, "--out", str(tmp_path / "c")]) == 0 and "log-log slope" in capsys.readouterr().out
    for wrong, field in (
        (["--env", "curier"], "did you mean courier"),
        (["--sampler", "turn-serch"], "sampler"),
        (["--sampler", "turn-search", "--set", "simulation=3"], "simulation"),
        (["--critic", "legal"], "critic"),
        (["--edit", "x.safetensors"], "edit"),
        (["--episodes", "0"], "episodes"),
    ):
        assert main([*command, *wrong, "--out", str(tmp_path / "d")]) == 2
        assert field in capsys.readouterr().err


def test_a_page_shows_what_was_said_as_text() -> None:
    messages = [
        {"role": role, "content": text} for role, text in (("user", "<b>"), ("assistant", "<i>"), ("user", "&"))
    ]
    turn = {"actions": ["<i>"], "rewards": [-1.0], "infos": [{"rejected": ["<u>"]}], "messages": messages}
    record = {**turn, "return": -1.0, "done": True, "truncated": False, "failure": None}
    page = episodes_html([record], facts="a < b")
    assert (
        "<b>" not in page and "&lt;b&gt;" in page and "<u>" not in page and "&lt;u&gt;" in page and "a &lt; b" in page
    )


@pytest.mark.slow
def test_regret_of_long_games() -> None:
    want = {
        bandits.uniform: 5.0,
        bandits.greedy: 3.207143,
        bandits.ucb(0.5): 2.543117,
        bandits.ucb(2.0): 3.427430,
        bandits.thompson: 2.748641,
    }
    for rule, regret in want.items():
        assert bandits.expected_regret((0.6, 0.4), rule, 50)[-1] == pytest.approx(regret, abs=1e-6)
    rewards = [bandits.bayes_reward(t) for t in (20, 50)]
    assert rewards == pytest.approx([12.431265, 31.996712], abs=1e-6)


def test_the_bandit_shows_and_counts() -> None:
    game = make("bandit:arms=.6,.4,horizon=5,show=guided")
    game.reset("", 1)
    outcome = game.step("I press Blue!")
    assert outcome.info == {"unparsed": False, "arm": 0, "regret": 0.0, "best": True}
    assert (
        "blue: pressed 1 times" in outcome.text
        and "red: pressed 0 times, mean 0.00, exploration bonus inf" in outcome.text
    )
    assert game.step("green").info["unparsed"] and named("red or blue", ("red", "blue")) is None
    found = run(TurnProcess("bandit:arms=.6,.4,horizon=10", max_turns=10), n=400)
    regret = torch.tensor([sum(i["regret"] for i in t.infos) for t in found.outputs])
    near(regret, 1.0)

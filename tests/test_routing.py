"""Routers against a table that is computed by hand: models whose answers are right at exact rates."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.cli import main
from steer.core import Cost, InputError, Samples, SteerError
from steer.loading import load
from steer.methods.best_of_n import BestOfN
from steer.model import generate
from steer.rewards import lift, parse_reward
from steer.routing import Cascade, RoutedModel, Router, RouterEnvironment, route_reward, train_router
from steer.routing.environment import cost_share, exact_match, format_fault
from steer.serving.engine import Delta, Sampling, Steering, Task, TokenPrompt
from steer.serving.pool import PoolEngine
from steer.toy.prompted import PromptTable
from steer.turns import TurnProcess

SIZES = (20, 20, 10, 10)
"""Digits of a prompt's number: small's luck, large's luck, the critic's mood, the router's eye."""
PRICE = {"small": 1.0, "large": 10.0}


def digits(prompt: str) -> tuple[str, int, int, int, int]:
    kind, number = prompt.split()
    rest, found = int(number), []
    for size in SIZES:
        rest, digit = divmod(rest, size)
        found.append(digit)
    return (kind, *found)  # type: ignore[return-value]


class Rated:
    """A model that is right for a share of each kind of prompt."""

    def __init__(self, name: str, rates: dict[str, float], digit: int) -> None:
        self.name, self.rates, self.digit, self.asked = name, rates, digit, 0

    @property
    def settings(self) -> frozenset[str]:
        return frozenset()

    def generate(self, prompts: list[str], reward: Any = None, **settings: Any) -> Samples:
        self.asked += len(prompts)
        right = [digits(p)[self.digit] < SIZES[self.digit - 1] * self.rates[digits(p)[0]] - 1e-9 for p in prompts]
        texts = ["right" if ok else "wrong" for ok in right]
        cost = Cost(model_calls=1, generated_tokens=3 * len(prompts))
        found = Samples(list(prompts), texts, torch.arange(len(prompts)), torch.zeros(len(prompts)), cost=cost)
        found = Samples(**{**found.__dict__, "tokens": [[1, 2, 3]] * len(prompts)})
        return found if reward is None else Samples(**{**found.__dict__, "reward": reward(found)})


def pool() -> dict[str, Rated]:
    return {
        "small": Rated("small", {"easy": 0.9, "hard": 0.4}, 1),
        "large": Rated("large", {"easy": 0.95, "hard": 0.85}, 2),
    }


TRUTH = lift(lambda texts: [float(t == "right") for t in texts])


def measured(model: Any, only: int = 400) -> tuple[float, float]:
    """Accuracy and price over 70% easy and 30% hard prompts; `only` prompts of each kind stand for all of them."""
    score = price = 0.0
    for kind, share in (("easy", 0.7), ("hard", 0.3)):
        found = model.generate([f"{kind} {i}" for i in range(only)], reward=TRUTH)
        score += share * float(found.reward.mean())
        price += share * found.cost.price / only
        assert found.group.tolist() == list(range(only)) and len(found.trace) == only
    return score, price


def rates(prompts: Any) -> list[list[float]]:
    return [[0.9, 0.95] if digits(p)[0] == "easy" else [0.4, 0.85] for p in prompts]


def test_the_table_of_single_models_and_routes() -> None:
    alone = [measured(RoutedModel({name: m}, {name: PRICE[name]})) for name, m in pool().items()]
    assert alone == [pytest.approx((0.75, 1.0)), pytest.approx((0.92, 10.0))]
    assert measured(RoutedModel(pool(), PRICE, rates, 0.01)) == pytest.approx((0.885, 3.7))
    for lam, easy, hard in ((0.0055, 1, 1), (0.0056, 0, 1), (0.0499, 0, 1), (0.0501, 0, 0)):
        worth = RoutedModel(pool(), PRICE, rates, lam).worth(["easy 0", "hard 0"])
        assert worth.argmax(1).tolist() == [easy, hard]


def test_a_router_that_errs() -> None:
    def seen(prompts: Any) -> list[list[float]]:
        """Easy prompts are taken for hard in a tenth of the cases, hard ones for easy in a fifth."""
        kinds = [(d[0] == "easy") != (d[4] < (1 if d[0] == "easy" else 2)) for d in map(digits, prompts)]
        return [[0.9, 0.95] if easy else [0.4, 0.85] for easy in kinds]

    model = RoutedModel(pool(), PRICE, seen, 0.01)
    score = price = 0.0
    for kind, share in (("easy", 0.7), ("hard", 0.3)):
        # Small's and large's luck and the router's eye, each in all combinations.
        prompts = [f"{kind} {a + 20 * b + 4000 * e}" for a in range(20) for b in range(20) for e in range(10)]
        found = model.generate(prompts, reward=TRUTH)
        score += share * float(found.reward.mean())
        price += share * found.cost.price / len(prompts)
    assert (score, price) == pytest.approx((0.8615, 3.79))


def test_a_cascade_is_above_the_large_model() -> None:
    def critic(prompt: str, text: str) -> bool:
        mood = digits(prompt)[3]
        return mood < 9 if text == "right" else mood < 2

    models = pool()
    cascade = Cascade(models["small"], models["large"], critic, PRICE)
    assert measured(cascade, 4000) == pytest.approx((0.92065, 3.75))
    found = cascade.generate(["easy 0", "hard 2019"], reward=TRUTH)
    assert found.cost.critic_calls == 2 and [c.model for c in found.trace] == ["small", "large"]
    assert [c.price for c in found.trace] == [1.0, 11.0] and found.cost.price == 12.0
    assert found.texts == ["right", "right"]


def test_price_by_tokens_adds_up() -> None:
    model = RoutedModel(pool(), PRICE, rates, 0.01, per="tokens")
    found = model.generate(["easy 0", "hard 0"])
    assert found.cost.price == pytest.approx(3 * 1.0 / 1000 + 3 * 10.0 / 1000) and found.cost.generated_tokens == 6
    assert (Cost(price=1.5) + Cost(price=2.0)).price == 3.5


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: RoutedModel(pool(), {"smal": 1.0}), "did you mean small"),
        (lambda: RoutedModel(pool(), {"small": -1.0}), "price.small"),
        (lambda: RoutedModel(pool(), PRICE, rates, -0.1), "cost_weight"),
        (lambda: RoutedModel({"a": object()}), "models.a"),
        (lambda: RoutedModel(pool(), PRICE, lambda p: [[1.0]] * len(p)).generate(["easy 0"]), "scores of shape"),
        (lambda: RoutedModel(pool(), PRICE, lambda p: [[float("nan")] * 2]).generate(["easy 0"]), "router: got 'NaN'"),
        (lambda: RoutedModel(pool(), PRICE).generate(["easy 0"], stream=True), "stream"),
        (lambda: RoutedModel(pool(), PRICE).generate(["easy 0"], edits=[["a"]]), "edits"),
        (lambda: Cascade(*pool().values(), "length"), "critic"),
        (lambda: RouterEnvironment(pool(), {}, price={"larg": 1.0}), "did you mean large"),
        (lambda: train_router([{"prompt": "a", "model": "m"}] * 30), r"data\[0\]"),
        (lambda: train_router([{"prompt": "a", "model": "m", "score": 1.0}] * 30), "1 prompts"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_a_line(call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_an_image_model_is_refused() -> None:
    painter = Rated("p", {}, 1)
    painter.images = True  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="a language model"):
        RoutedModel({"p": painter})
    with pytest.raises(SteerError, match="several models"):
        RoutedModel(pool()).process()


def rows(count: int = 200) -> list[dict[str, Any]]:
    """Prompts with a word that says which model is right."""
    found = []
    for i in range(count):
        kind = "sum" if i % 2 else "poem"
        found.append({"prompt": f"Write a {kind} about {i}", "model": "small", "score": float(kind == "poem")})
        found.append({"prompt": f"Write a {kind} about {i}", "model": "large", "score": 1.0})
    return found


def test_a_router_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    router, table = train_router(rows(), price=PRICE, grid=(0.0, 0.05, 1.0))
    by_name = {point.name: point for point in table.points}
    half = by_name["small"].score
    assert 0.3 < half < 0.7 and by_name["large"].score == 1.0 == by_name["hindsight"].score
    best = by_name["router, lambda 0.05"]
    assert best.score == 1.0 and best.price == pytest.approx(half + 10 * (1 - half)) == by_name["hindsight"].price
    assert by_name["router, lambda 1"].price == 1.0
    data, out = tmp_path / "rows.jsonl", tmp_path / "router.safetensors"
    data.write_text("\n".join(map(json.dumps, rows())))
    command = ["train", "router", "--data", str(data), "--out", str(out), "--price", "small=1", "--price", "large=10"]
    assert main(command) == 0 and "hindsight" in capsys.readouterr().out
    again = Router.load(out)
    asked = ["Write a sum about 7", "Write a poem about 7"]
    assert torch.allclose(again(asked), router(asked))
    model = RoutedModel(pool(), PRICE, again, 0.05)
    assert model.worth(asked).argmax(1).tolist() == [1, 0]
    with pytest.raises(InputError, match="router"):
        RoutedModel({"large": pool()["large"], "small": pool()["small"]}, PRICE, again)
    assert main(command) == 2 and "out" in capsys.readouterr().err


def test_a_file_describes_a_pool(tmp_path: Path, tiny_lm_dir: Path) -> None:
    router, _ = train_router(rows(), price=PRICE)
    router.save(tmp_path / "router.safetensors")
    lines = f"models: {{small: {tiny_lm_dir}, large: {tiny_lm_dir}}}\nprice: {{small: 1, large: 10}}\n"
    file = tmp_path / "pool.yaml"
    file.write_text(lines + "router: router.safetensors\ncost_weight: 0.05\n")
    found = load(file).generate(["Write a sum about 7", "Write a poem about 7"], max_new_tokens=3, seed=0)
    assert [c.model for c in found.trace] == ["large", "small"] and found.cost.price == 11.0 and len(found.texts) == 2
    file.write_text(lines + "critic: length>=100\n")
    cascade = load(str(file)).generate(["the sun"], max_new_tokens=3, seed=0)
    assert [c.model for c in cascade.trace] == ["large"] and cascade.cost.critic_calls == 1
    for wrong, said in (
        ("routr: x\n", "did you mean router"),
        ("critic: length>=1\nrouter: x\n", "router"),
        ("[", "YAML"),
    ):
        file.write_text(lines + wrong if wrong != "[" else wrong)
        with pytest.raises(InputError, match=said):
            load(file)


def test_a_pool_is_served_as_one_model() -> None:
    engine = PoolEngine(RoutedModel(pool(), PRICE, rates, 0.01), "both")
    reward = Steering(reward=TRUTH)

    async def answers() -> list[Any]:
        task = Task(("easy 0", "hard 0"), sampling=Sampling(max_tokens=5), steering=reward)
        return [event async for event in engine.run(engine.prepare(task))]

    events = asyncio.run(answers())
    assert [type(e).__name__ for e in events] == ["Started", "Delta", "Ended", "Delta", "Ended", "Finished"]
    assert [e.text for e in events if isinstance(e, Delta)] == ["right", "right"]
    assert events[2].reward == 1.0 and events[2].reason == "stop" and events[-1].cost.price == 11.0
    for wrong, field in (
        (Task(("a",), n=2), "n"),
        (Task((TokenPrompt((1,)),)), "prompt"),
        (Task(("a",), sampling=Sampling(logprobs=1)), "logprobs"),
        (Task(("a",), steering=Steering(sampler=BestOfN(2))), "steer.sampler"),
    ):
        with pytest.raises(InputError, match=f"^{field}"):
            engine.prepare(wrong)


# -------------------------------------------------------------------------------------------------- several rounds

GOOD = "<think>hm</think><search>small: why</search><information>so</information><think>ah</think><answer>x</answer>"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (GOOD, None),
        ("<think>hm</think><answer>x</answer>", None),
        ("no tags", "no tags"),
        ("<think>hm<answer>x</answer></think>", "out of place"),
        ("<think>hm</think><answer>x", "not closed"),
        ("<answer>x</answer>", "begin with think"),
        ("<think>hm</think><answer>x</answer><think>ah</think>", "end with answer"),
        ("<think>hm</think><answer>x</answer><answer>y</answer>", "2 answers"),
        (GOOD.replace("<information>so</information>", ""), "1 searches and 0 informations"),
        ("<think>...</think><answer>x</answer>", "empty"),
        (GOOD.replace("small: why", "small why"), "0 colons"),
        (GOOD.replace("small: why", "small: see http://x"), "2 colons"),
        (GOOD.replace("small: why", "tiny: why"), "unknown model 'tiny'"),
        (GOOD.replace("small: why", "small: ask small why"), "in its query"),
    ],
)
def test_the_form_of_an_episode(text: str, fault: str | None) -> None:
    found = format_fault(text, ["small", "large"])
    assert found is None if fault is None else fault in (found or "")


def test_the_reward_of_a_route() -> None:
    share = cost_share(900, [100, 400, 900, 1600])
    assert share == pytest.approx(0.314815, abs=1e-6)
    assert route_reward(None, True, share, 0.3) == pytest.approx(0.794444, abs=1e-6)
    assert route_reward(None, False, share, 0.3) == 0.0 and route_reward("bad", True, 1.0, 0.3) == -1.0
    assert cost_share(5, [5, 5]) == 0.5 == cost_share(5, [])
    assert exact_match("The  Answer!", "answer") and not exact_match("an answer b", "answer")


def test_a_router_in_rounds() -> None:
    world = RouterEnvironment(pool(), {"easy 0": "right"}, price={"small": 100.0}, cost_weight=0.3)
    assert "small: a language model" in world.reset("easy 0", 0)
    seen = world.step("<think>ask</think><search>small: easy 0</search>")
    assert seen.text == "<information>right</information>" and not seen.done
    end = world.step("<think>so</think><answer>right</answer>")
    assert end.done and end.info["fault"] is None and end.reward == pytest.approx(0.7 + 0.3 * 0.5)
    assert end.info["price"] == pytest.approx(3 * 100 / 1e6)
    world.reset("easy 0", 1)
    assert world.step("right").reward == -1.0
    found = generate(
        TurnProcess(world, max_turns=3, actor=asking_once()), ["easy 0"], reward=parse_reward("return"), seed=0
    )
    assert found.reward.tolist() == [pytest.approx(0.7)]  # the dearest of its window


def asking_once() -> PromptTable:
    """An actor that asks once, then answers what it was told."""
    words = ("<think>a</think><search>small: easy 0</search>", "<think>b</think><answer>right</answer>")
    return PromptTable(lambda prompt: (1.0, 0.0) if len(prompt) == 1 else (0.0, 1.0), words)

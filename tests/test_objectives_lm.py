"""Training objectives on language models: every method runs, reaches its fixed point, and can be stopped anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from steer.core import SteerError

pytest.importorskip("trl")
pytest.importorskip("peft")

from steer.adapters.transformers.policy import rows as by_rows
from steer.adapters.transformers.policy.folder import load_policy
from steer.adapters.transformers.policy.tuning import train_policy
from steer.train.objectives.registry import METHODS, NUMBERED, STUDIES
from steer.train.policy_folder import read_policy_card

THINGS = ["sun", "rain", "day", "night", "dog", "cat", "house", "tree"]
PROMPTS = [f"tell me about the {thing}" for thing in THINGS]
COLUMNS: dict[str, Any] = {
    "completion": "the sun is nice",
    "chosen": "the sun is nice",
    "rejected": "I hate the rain",
    "completions": ["the sun is nice", "I hate the rain", "the day is good"],
    "scores": [1.0, -1.0, 0.5],
    "label": True,
    "solution": "the sun is nice and good",
    "answer": "nice",
    "calls": [],
    "boxes": [[0, 0, 1, 1]],
}
QUICK: dict[str, Any] = {"steps": 2, "learning_rate": 1e-3, "lora_rank": 4, "max_new_tokens": 6, "batch_size": 4}


def bright(texts: list[str]) -> list[float]:
    return [float(sum(word in ("good", "nice", "happy", "love", "sun") for word in text.split())) for text in texts]


def tune(model: Any, method: str, out: Path, **more: Any) -> Path:
    """Tune on this module's rows, quickly."""
    preset = METHODS[method]
    if preset.judged and not preset.columns and method not in ("sft", "kto"):
        more = {"reward": bright, **more}
    rows = [{"prompt": p, **COLUMNS} for p in PROMPTS]
    lora = {"lora_rank": 0} if preset.pieces.get("lora_rank") == 0 else {}
    return train_policy(model, more.pop("data", rows), method=method, out=out, **{**QUICK, **lora, **more})


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def own(method: str, tmp_path: Path, model: Any) -> dict[str, Any]:
    """What a method is given beside the rows."""
    if method == "salsa":
        soup = tmp_path / "soup"
        if not soup.exists():
            tune(model, "sft", soup, driver="rows")
        return {"soup": str(soup)}
    if method == "tool_call":
        return {"reward": "tool_call + 0.1*length"}
    if method == "vision_boxes":
        return {"reward": "vision_boxes + 0.01*length"}
    if method == "multi_objective":
        return {"reward": "length - 0.5*keywords:sun"}
    return {}


ROWS = [name for name, method in METHODS.items() if not method.native and name != "inpaint"]


def test_every_paper_has_a_row() -> None:
    named = {name for row in NUMBERED for name in row}
    assert len(NUMBERED) == 46 and named <= set(METHODS) | set(STUDIES)
    assert len([row for row in NUMBERED if row[0] in STUDIES]) == 3


@pytest.mark.parametrize("method", ROWS)
def test_every_method_runs(tiny_lm: Any, tmp_path: Path, method: str) -> None:
    """Weights move, the report has its figures, and the folder opens as a policy."""
    out = tune(tiny_lm, method, tmp_path / "out", **own(method, tmp_path, tiny_lm))
    metrics = read_policy_card(out).metrics
    assert metrics["loss"] and (out / "report.json").is_file() and (out / "report.png").stat().st_size > 5000
    tuned = load_policy(tiny_lm, out)
    ids = torch.tensor([tiny_lm.encode(PROMPTS[0])])
    with torch.no_grad():
        change = (tuned.network(ids).logits - tiny_lm.network(ids).logits).abs().max()
    assert float(change) > 1e-6
    report = json.loads((out / "report.json").read_text())["rounds"]
    sampled = METHODS[method].judged and not METHODS[method].columns
    if sampled:
        assert all({"reward", "kl", "entropy", "length", "on_policy"} <= set(row) for row in report)
    if METHODS[method].pieces.get("link") in ("logistic", "square", "hinge") and method != "mixed":
        assert {"chosen", "rejected", "ranking_base", "ranking_policy", "ranking_ideal"} <= set(report[-1])


# ------------------------------------------------------------------------------------------------------- fixed points

ANSWERS = ("sun", "rain", "day")
LAW = (0.5, 0.3, 0.2)
WORTH = {"sun": 1.0, "rain": 0.0, "day": 2.0}


@pytest.fixture(scope="module")
def bandit(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path) -> Any:
    """A random language model whose first word after "hello" is one of three, with the probabilities of `LAW`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from steer.loading import load

    network = AutoModelForCausalLM.from_pretrained(tiny_lm_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_dir)
    model = load(network, tokenizer=tokenizer, name="bandit")
    ids = torch.tensor([model.encode("hello")])
    with torch.no_grad():
        hidden = network.model(ids).last_hidden_state[0, -1]
        logits = torch.full((network.config.vocab_size,), -30.0)
        for word, p in zip(ANSWERS, LAW, strict=True):
            logits[tokenizer.convert_tokens_to_ids(word)] = torch.tensor(p).log()
        network.lm_head.weight.copy_(logits.unsqueeze(1) * hidden / hidden.square().sum())
    folder = tmp_path_factory.mktemp("bandit")
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(folder, dtype="float32", device="cpu")


def law_of(model: Any) -> list[float]:
    """Probabilities of the three answers."""
    with torch.no_grad():
        law = model.network(torch.tensor([model.encode("hello")])).logits[0, -1].softmax(0)
    return [float(law[model.tokenizer.convert_tokens_to_ids(word)]) for word in ANSWERS]


def worth(texts: list[str]) -> list[float]:
    return [WORTH.get(text.strip(), -1.0) for text in texts]


def learnt(model: Any, method: str, out: Path, **more: Any) -> list[float]:
    """The law that a method ends with: all weights tuned, on one prompt."""
    rows = more.pop("data", ["hello"] * more.pop("prompts", 2))
    given: dict[str, Any] = {
        "lora_rank": 0,
        "max_new_tokens": 1,
        "group_size": 32,
        "learning_rate": 5e-3,
        "batch_size": 8,
        "steps": 60,
        "reward": worth,
        **more,
    }
    return law_of(load_policy(model, train_policy(model, rows, method=method, out=out, **given)))


def distance(found: list[float], wanted: Any) -> float:
    return 0.5 * sum(abs(a - float(b)) for a, b in zip(found, wanted, strict=True))


def step(m: Any, g: Any, c: float) -> Tensor:
    """`m exp(g / c)`, normalised."""
    return (torch.as_tensor(m, dtype=torch.float64).log() + torch.as_tensor(g, dtype=torch.float64) / c).softmax(0)


GAIN = torch.tensor([WORTH[word] for word in ANSWERS], dtype=torch.float64)
WINS = (GAIN.unsqueeze(1) - GAIN).sigmoid()
SOFTMAX = (0.433268, 0.095634, 0.471098)
SOFT: dict[str, Any] = {"target": "soft", "pairing": "ranked", "beta": 1.0, "weight": "mean"}


def nash(tau: float, mixture: float = 0.0) -> Tensor:
    """The regularised Nash policy; with opponents from a mixture with the base, where that leads to."""
    base = pi = torch.tensor(LAW, dtype=torch.float64)
    for _ in range(3000):
        faced = (mixture * base.log() + (1 - mixture) * pi.log()).softmax(0)
        pi = 0.8 * pi + 0.2 * step(base, WINS @ faced, tau)
    return pi


def fresh(**more: Any) -> dict[str, Any]:
    return {"steps": 150, "prompts": 4, "batch_size": 4, "group_size": 64, "learning_rate": 1e-3, **more}


FIXED: dict[str, tuple[str, dict[str, Any], Any]] = {
    "dpo": ("dpo", SOFT, SOFTMAX),
    "f_dpo forward": ("f_dpo", {**SOFT, "f": "forward_kl"}, (0.360021, 0.125586, 0.514393)),
    "f_dpo js": ("f_dpo", {**SOFT, "f": "js_divergence"}, (0.205349, 0.035984, 0.758666)),
    "copg": ("copg", {"beta": 1.0}, SOFTMAX),
    "brain": ("brain", {"beta": 1.0}, SOFTMAX),
    "fdpg": ("fdpg", fresh(beta=1.0, divergence="reverse"), SOFTMAX),
    "cpl": ("cpl", {**SOFT, "loser": 1.0}, (0.244728, 0.090031, 0.665241)),
    "refuel": ("refuel", {"rounds": 1, "group_size": 2, "prompts": 64, "batch_size": 64}, SOFTMAX),
    "step_advantage": ("step_advantage", {"beta": 1.0, "prompts": 8, "group_size": 64}, SOFTMAX),
    "meet": ("meet", {"prompts": 32, "group_size": 64, "batch_size": 32}, (0.528459, 0.216861, 0.254680)),
    "p3o": ("p3o", fresh(beta=1.0), SOFTMAX),
    "nft": (
        "nft",
        fresh(
            fresh=False, group_size=256, prompt_weight="one", reward=lambda texts: [float(x > 0) for x in worth(texts)]
        ),
        (0.714286, 0.0, 0.285714),
    ),
    "nash_md": ("nash_md", fresh(beta=0.5), nash(0.5, 0.5)),
    "nash_mp": ("nash_mp", {"rounds": 8, "beta": 0.5, "steps": 40, "prompts": 8, "weight": "mean"}, nash(0.5)),
    "inpo": (
        "inpo",
        {
            "rounds": 1,
            "beta": 0.2,
            "prox": 0.3,
            "pairing": "random_two",
            "group_size": 2,
            "prompts": 1024,
            "batch_size": 1024,
            "steps": 150,
        },
        step(LAW, WINS @ torch.tensor(LAW, dtype=torch.float64), 0.5),
    ),
    "dno": (
        "dno",
        {"rounds": 1, "prox": 1.0, "group_size": 64, "prompts": 8, "weight": "mean"},
        step(LAW, WINS @ torch.tensor(LAW, dtype=torch.float64), 1.0),
    ),
}
SLOW = {*FIXED} - {"copg"}


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in FIXED])
def test_fixed_points_of_one_token_answers(bandit: Any, tmp_path: Path, name: str) -> None:
    assert distance(law_of(bandit), LAW) < 1e-4
    method, more, wanted = FIXED[name]
    assert distance(learnt(bandit, method, tmp_path / "p", **more), wanted) < 0.02


GRADIENTS = ("grpo", "lite_ppo", "dapo", "mirror", "entropy_change", "kl_cov", "critique", "filtered", "risk")


@pytest.mark.slow
@pytest.mark.parametrize("method", GRADIENTS)
def test_policy_gradients_without_kl_raise_the_reward(bandit: Any, tmp_path: Path, method: str) -> None:
    """Methods whose optimum is no fixed law, or biased: better than the start, by expectation."""
    found = learnt(bandit, method, tmp_path / "p", **fresh(steps=40, driver="rows", group_size=16, updates=1))
    start = sum(p * WORTH[word] for p, word in zip(LAW, ANSWERS, strict=True))
    assert sum(p * WORTH[word] for p, word in zip(found, ANSWERS, strict=True)) > start + 0.3


# ----------------------------------------------------------------------------------------------------------- resuming


class Stopped(Exception):
    pass


RESUMED: dict[str, dict[str, Any]] = {
    "dpo": {"driver": "rows", "steps": 12},
    "spin": {"rounds": 3, "keep": "1,0.5", "prox": 1.0},
    "nash_mp": {"rounds": 3},
    "apo_momentum": {"rounds": 3, "lora_rank": 0},
    "inpo": {"rounds": 2, "reference": "ema", "lora_rank": 0},
    "mixed": {"steps": 4},
    "knapsack": {"steps": 6},
    "gain": {"steps": 6},
    "hints": {"steps": 4},
    "critique": {"steps": 4},
    "dapo": {"steps": 6},
    "entropy_smooth": {"steps": 6},
    "risk": {"steps": 6},
    "mirror": {"steps": 4, "updates": 2},
}
QUICKLY = ("spin",)


@pytest.mark.parametrize("method", [m if m in QUICKLY else pytest.param(m, marks=pytest.mark.slow) for m in RESUMED])
def test_a_run_that_stopped_goes_on_to_the_same_weights(
    tiny_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from contextlib import contextmanager

    more = {**RESUMED[method], "learning_rate": 5e-3}
    if METHODS[method].judged or method == "dpo":
        more["reward"] = bright
    straight = tune(tiny_lm, method, tmp_path / "straight", **more)
    updates = len(json.loads((straight / "report.json").read_text())["loss"])
    for part, share in enumerate((0.34, 0.67)):

        @contextmanager
        def stopping(shown: bool, what: str, total: int, after: int = max(1, int(share * updates))) -> Iterator[Any]:
            done = 0

            def tick(count: int, seen: str = "", **figures: float) -> None:
                nonlocal done
                done += count
                if done >= after:
                    raise Stopped

            yield tick

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(by_rows, "ticking", stopping)
            tune(tiny_lm, method, tmp_path / "resumed", work=tmp_path / "work", **more)
        assert not (tmp_path / "resumed").exists()
        torch.manual_seed(99 + part)
    resumed = tune(tiny_lm, method, tmp_path / "resumed", work=tmp_path / "work", **more)
    a, b = weights(straight), weights(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (straight / "report.json").read_text() == (resumed / "report.json").read_text()
    assert not list((tmp_path / "work").glob("*.tmp"))


# ----------------------------------------------------------------------------------------------------- native and rows


def trainers(
    model: Any, tmp_path: Path, method: str, online: Any = None, **more: Any
) -> tuple[Any, Any, Any, list[Any]]:
    """TRL's trainer and our actor with one and the same adapter, away from its start."""
    from steer.adapters.transformers.policy import trl as native
    from steer.adapters.transformers.policy.actor import TextActor
    from steer.adapters.transformers.policy.data import read_rows
    from steer.train.objectives.settings import policy_settings

    tuning = policy_settings(method=method, lora_rank=4, max_new_tokens=6, group_size=2, batch_size=4, **more)
    data = read_rows(model, [{"prompt": p, **COLUMNS} for p in PROMPTS[:4]], tuning)
    with native.quiet():
        trainer = native._trainer(model, data, tuning, online, tmp_path / "run", tmp_path, False)
    ours = policy_settings(tuning, driver="rows")
    actor = TextActor(model, ours, PROMPTS[:4])
    theirs = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in actor.weights().items():
            p.add_(0.05 * torch.randn(p.shape, generator=draw))
            theirs[name].copy_(p)
    assert theirs.keys() == actor.weights().keys()
    return trainer, actor, ours, data


def same_gradients(trainer: Any, actor: Any) -> None:
    theirs = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name, p in actor.weights().items():
        torch.testing.assert_close(p.grad, theirs[name], atol=2e-6, rtol=2e-4)
    assert max(float(p.grad.abs().max()) for p in actor.weights().values()) > 1e-3


def test_dpo_is_that_of_trl(tiny_lm: Any, tmp_path: Path) -> None:
    from steer.adapters.transformers.policy.data import stored
    from steer.train.objectives.collecting import Collector
    from steer.train.objectives.judging import Judge
    from steer.train.objectives.rows import batch_loss

    trainer, actor, ours, data = trainers(tiny_lm, tmp_path, "dpo")
    inputs = next(iter(trainer.get_train_dataloader()))
    value = trainer.compute_loss(trainer.model, inputs)
    value.backward()
    collector = Collector(actor, [stored(row) for row in data], ours, None)
    clusters = Judge(actor, collector.rows, ours, {})(collector.collect(0, False, None), 0, True)
    pairs = [(c.prompt_ids, c.tokens) for cluster in clusters for c in cluster.completions]
    found = actor.learn(pairs, lambda logp, h: batch_loss(clusters, logp, h, ours), False)
    assert found == pytest.approx(float(value), abs=1e-6)
    same_gradients(trainer, actor)


@pytest.mark.parametrize(("loss", "aggregate"), [("grpo", "sequence"), ("bnpo", "token")])
def test_grpo_is_that_of_trl(tiny_lm: Any, tmp_path: Path, loss: str, aggregate: str) -> None:
    """Clipped ratios of whole batches, with the plain k3 estimate of the KL, on the same samples."""
    from steer.adapters.transformers.policy.trl import Online
    from steer.rewards import as_reward
    from steer.train.objectives.rows import Cluster, Completion, batch_loss

    reward = as_reward(bright)
    assert reward is not None
    trainer, actor, ours, data = trainers(tiny_lm, tmp_path, "grpo", Online(PROMPTS[:4], reward), loss=loss)
    from steer.train.objectives.settings import policy_settings

    ours = policy_settings(ours, aggregate=aggregate)
    draw = torch.Generator().manual_seed(0)
    clusters = []
    for number, row in enumerate(data):
        group = []
        for worth_ in (1.0, -0.7):
            tokens = torch.randint(5, 40, (int(torch.randint(2, 7, (1,), generator=draw)),), generator=draw).tolist()
            ref, now = (actor.read([(row["prompt_ids"], tokens)], who)[0] for who in ("base", "policy"))
            old = (torch.tensor(now) + 0.3 * torch.randn(len(now), generator=draw)).tolist()
            group.append(Completion(row["prompt_ids"], tokens, old=old, ref=ref, advantage=[worth_] * len(tokens)))
        clusters.append(Cluster(number, group))
    rows = [c for cluster in clusters for c in cluster.completions]
    found = actor.learn([(c.prompt_ids, c.tokens) for c in rows], lambda x, h: batch_loss(clusters, x, h, ours), False)

    def padded(values: list[list[Any]], left: bool = False) -> Tensor:
        width = max(map(len, values))
        return torch.tensor([[0] * (width - len(v)) + v if left else v + [0] * (width - len(v)) for v in values])

    trainer.args.use_bias_correction_kl = False  # the papers have the plain estimate
    inputs = {
        "prompt_ids": padded([c.prompt_ids for c in rows], True),
        "prompt_mask": padded([[1] * len(c.prompt_ids) for c in rows], True),
        "completion_ids": padded([c.tokens for c in rows]),
        "completion_mask": padded([[1] * len(c.tokens) for c in rows]),
        "advantages": torch.tensor([c.advantage[0] for c in rows]),
        "old_per_token_logps": padded([c.old for c in rows]),
        "ref_per_token_logps": padded([c.ref for c in rows]),
        "num_items_in_batch": torch.tensor(sum(len(c.tokens) for c in rows)),
    }
    trainer.current_gradient_accumulation_steps = 1
    value = trainer._compute_loss(trainer.model, inputs)
    value.backward()
    assert found == pytest.approx(float(value), abs=1e-6)
    same_gradients(trainer, actor)


def test_parts_of_a_batch_have_the_gradient_of_the_whole(
    tiny_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer.adapters.transformers.policy import actor as acting
    from steer.adapters.transformers.policy.actor import TextActor
    from steer.train.objectives.settings import policy_settings

    rows = [(tiny_lm.encode(p), list(range(5, 5 + n))) for p, n in zip(PROMPTS, (2, 6, 3, 5, 4, 6, 1, 2), strict=True)]
    seen = []
    for budget in (10**9, 10 * tiny_lm.vocabulary):
        monkeypatch.setattr(acting, "LOGITS", budget)
        actor = TextActor(tiny_lm, policy_settings(method="entropy_smooth", lora_rank=4))

        def loss(logp: Tensor, h: Tensor | None) -> Tensor:
            assert h is not None
            return (logp.sum(1).square().mean() - 0.3 * h.sum()) / 10

        value = actor.learn(rows, loss, True)
        seen.append((value, [p.grad.clone() for p in actor.weights().values() if p.grad is not None]))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-5)
    for a, b in zip(seen[0][1], seen[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("dpoo", {}, r"^method: got 'dpoo'; allowed: .*did you mean dpo"),
        ("knapsack", {"driver": "native"}, r"^driver: got 'native'; allowed: rows for knapsack; native has sft, kto"),
        ("grpo", {"schedule": "knapsack"}, r"^schedule: got 'knapsack'; allowed: uniform for TRL's trainer"),
        ("grpo", {"schedule": "hints"}, r"^schedule: got 'hints'; allowed: uniform for TRL's trainer"),
        ("dpo", {"loss": "ipo", "reward": bright}, r"^loss: got 'ipo'; allowed: sigmoid for own samples; other losses"),
        ("kto", {"driver": "rows"}, r"^driver: got 'rows'; allowed: native for kto$"),
        ("copg", {"f": "js_divergence", "link": "softmax"}, r"^f: got 'js_divergence'; allowed: reverse_kl: the loss"),
        ("cpl", {"f": "js_divergence"}, r"^f: got 'js_divergence'"),
        ("cpl", {"prox": 0.1}, r"^prox: got 0.1; allowed: 0 for reference=none$"),
        ("spin", {"prox": 0.0}, r"^beta: got 0.0; allowed: a number above 0, or prox above 0$"),
        ("brain", {"beta": 0.0, "prox": 1.0}, r"^beta: got 0.0; allowed: a number above 0 for softmax$"),
        ("apo_momentum", {"lora_rank": 4}, r"^lora_rank: got 4; allowed: 0 for reference=extrapolated$"),
        ("salsa", {}, r"^soup: got None; allowed: a policy's folder$"),
        ("dpo", {"soup": "x", "driver": "rows"}, r"^soup: got 'x'; allowed: unset without reference=soup$"),
        ("dapo", {"clip_hihg": 0.3}, r"^setting of train_policy: got 'clip_hihg'; allowed: .*did you mean clip_high"),
        ("dapo", {"clip_high": "wide"}, r"^clip_high: got 'wide'; allowed: a number$"),
        ("sft", {"clip_high": 0.3}, r"^setting of train_policy: got 'clip_high'"),
        ("dapo", {"advantage": "median"}, r"^advantage: got 'median'; allowed: none, best"),
        ("spin", {"keep": "1,2"}, r"^keep: "),
        ("dapo", {"reward": None}, r"^reward: got None; allowed: one for dapo$"),
        ("spin", {"reward": bright}, r"^reward: .*allowed: none for spin$"),
        ("multi_objective", {"reward": bright}, r"^reward: got 'one term'; allowed: a sum of two terms or more"),
        ("lipo", {"reward": None, "data": [{"prompt": "a"}]}, r"^data\[0\].completions: got 'nothing'"),
        ("hints", {"data": ["a"]}, r"^data\[0\]: got 'a'; allowed: a row with prompt, solution$"),
        (
            "info_gain",
            {"data": [{"prompt": "a"}]},
            r"^data\[0\].answer: got 'nothing'; allowed: a row with prompt, answer$",
        ),
        (
            "tool_call",
            {"reward": "tool_call", "data": ["a"]},
            r"^data\[0\].calls: got 'nothing'; allowed: rows with calls",
        ),
        (
            "copg",
            {"reward": None, "data": [{"prompt": "a", "completions": ["b", "c"], "scores": [1]}]},
            r"^data\[0\].scores: got \[1\]; allowed: 2 numbers",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    tiny_lm: Any, tmp_path: Path, method: str, more: dict[str, Any], said: Any
) -> None:
    preset = METHODS.get(method)
    given: dict[str, Any] = {"data": [{"prompt": p, **COLUMNS} for p in PROMPTS], **QUICK}
    if preset is None or (preset.judged and not preset.columns and method != "kto"):
        given["reward"] = bright
    if method == "apo_momentum":
        given.pop("lora_rank")
    given |= more
    with pytest.raises(SteerError, match=said) as caught:
        train_policy(tiny_lm, given.pop("data"), method=method, out=tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_seldom_wise_is_said(tiny_lm: Any, tmp_path: Path, capfd: Any) -> None:
    tune(tiny_lm, "spin", tmp_path / "a", rounds=1, steps=None, epochs=1)
    assert "warning: spin with prox below 0.5 diverges" in capfd.readouterr().err
    tune(tiny_lm, "selm", tmp_path / "b", rounds=1, anchor_weight=0.5)
    assert "the loss is unbounded below" in capfd.readouterr().err


# -------------------------------------------------------------------------------------------------------- combinations


@pytest.mark.slow
def test_pieces_combine_without_code(tiny_lm: Any, tmp_path: Path) -> None:
    """A loss of pairs on fresh samples, a policy gradient with another surrogate, and judges that disagree."""
    for name, method, more in (
        ("a", "dpo", {"driver": "rows", "fresh": True, "updates": 2, "reward": bright}),
        ("b", "p3o", {"surrogate": "mirror", "level": "token", "advantage": "batch_std", "aggregate": "prompt"}),
        ("c", "inpo", {"pairing": "disagree", "reward": "length - 2*keywords:sun"}),
        ("d", "grpo", {"driver": "rows", "credit": "entropy_steps", "schedule": "dynamic", "beta": 0.1}),
        ("e", "sft", {"driver": "rows", "surrogate": "dft"}),
    ):
        out = tune(tiny_lm, method, tmp_path / name, **more)
        recipe = read_policy_card(out).recipe
        assert all(
            recipe.get(k) == v for k, v in more.items() if k not in ("reward", "credit", "schedule") and k in recipe
        )


def test_ranked_lists_and_pairs_stand_in_for_each_other(tiny_lm: Any, tmp_path: Path) -> None:
    pair = [{"prompt": p, "chosen": "the sun is nice", "rejected": "I hate the rain"} for p in PROMPTS]
    both = [{"prompt": p, "completions": ["I hate the rain", "the sun is nice"], "scores": [0, 1]} for p in PROMPTS]
    found = [
        weights(tune(tiny_lm, "f_dpo", tmp_path / str(k), data=rows, reward=None))
        for k, rows in enumerate((pair, both))
    ]
    for name, x in found[0].items():
        torch.testing.assert_close(x, found[1][name], atol=1e-5, rtol=1e-3)
    out = tune(tiny_lm, "lipo", tmp_path / "lipo", data=pair, reward=None)
    assert read_policy_card(out).metrics["ranking_policy"] == [1.0] or read_policy_card(out).metrics["pairs"] == [8]


@pytest.mark.slow
def test_guidance_goes_towards_any_policy(tiny_lm: Any, tmp_path: Path) -> None:
    """RL guidance between base and policy: the base at 0, the policy at 1, between and beyond them otherwise."""
    from steer.methods.rlg import RLGuidance

    out = tune(tiny_lm, "lite_ppo", tmp_path / "p", steps=20, learning_rate=2e-2, max_new_tokens=6)
    tuned = load_policy(tiny_lm, out)
    drawn: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0}
    rewards = []
    for w in (0.0, 0.5, 1.0, 2.0):
        edit = RLGuidance(tuned.process(**drawn), w)
        texts = tiny_lm.generate(PROMPTS, edits=edit, n=16, seed=0, **drawn).texts
        rewards.append(sum(bright(texts)) / len(texts))
        if w in (0.0, 1.0):
            plain = (tuned if w else tiny_lm).generate(PROMPTS, n=16, seed=0, **drawn).texts
            assert texts == plain
    assert rewards[0] < rewards[2] and rewards[0] < rewards[3]


_KILLED = """
import os, signal, sys
from steer.loading import load
from steer.train.objectives.driver import Driver
from steer.adapters.transformers.policy.tuning import train_policy
model, out, work, after = load(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
update = Driver._update
def counted(self, *given):
    update(self, *given)
    if len(self.seen.loss) == after:
        os.kill(os.getpid(), signal.SIGKILL)
Driver._update = counted
from pathlib import Path
train_policy(model, ["hello", "the sun", "the day"], method="dapo", reward="length", out=out, work=Path(work),
             steps=6, batch_size=2, group_size=4, max_new_tokens=6, lora_rank=4, learning_rate=1e-2)
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(tiny_lm_dir: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    def run(out: str, work: str, after: int) -> int:
        arguments = [str(tiny_lm_dir), str(tmp_path / out), str(tmp_path / work), str(after)]
        return subprocess.run([sys.executable, "-c", _KILLED, *arguments], check=False).returncode

    assert run("straight", "a", 0) == 0
    assert run("resumed", "b", 4) == -9 and not (tmp_path / "resumed").exists()
    assert run("resumed", "b", 0) == 0
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

"""Tuned policies on the tiny model: they learn, the base keeps its bits, and stopping in the middle changes nothing."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import steer
from steer.core import InputError, RawText, RewardError, Samples, SteerError
from steer.rewards.algebra import Composable

trl = pytest.importorskip("trl")
pytest.importorskip("peft")

from steer.adapters.language.blocks import decoder_blocks  # noqa: E402
from steer.adapters.transformers.policy import data, rows, tuning  # noqa: E402
from steer.adapters.transformers.policy import trl as trainers  # noqa: E402
from steer.adapters.transformers.policy.folder import load_policy, save_network  # noqa: E402
from steer.adapters.transformers.policy.tuning import train_policy  # noqa: E402
from steer.train.objectives.registry import METHODS  # noqa: E402
from steer.train.objectives.settings import _DIFFERENCES, DIVERGENCES, policy_settings  # noqa: E402
from steer.train.policy_folder import read_policy_card  # noqa: E402

THINGS = ["sun", "rain", "day", "night", "dog", "cat", "house", "tree"]
HELD_OUT = ["why is the world calm", "how is the day"]
PROMPTS = [f"tell me about the {thing}" for thing in THINGS]
SFT = [{"prompt": p, "completion": "you love it ."} for p in PROMPTS]
DPO = [{"prompt": p, "chosen": "the sun is nice", "rejected": "I hate the rain"} for p in PROMPTS]
KTO = [
    {"prompt": p, "completion": text, "label": label}
    for p in PROMPTS
    for text, label in (("the sun is nice", True), ("I hate the rain", False))
]
DATA: dict[str, list[Any]] = {"sft": SFT, "dpo": DPO, "kto": KTO, "grpo": PROMPTS, "raft": PROMPTS}
QUICK: dict[str, Any] = {"steps": 10, "learning_rate": 1e-2, "lora_rank": 4, "max_new_tokens": 8}


def bright(texts: list[str]) -> list[float]:
    """Bright words in each text."""
    return [float(sum(word in ("good", "nice", "happy", "love", "sun") for word in text.split())) for text in texts]


def tune(model: Any, method: str, out: Path, **more: Any) -> Path:
    """Tune on this module's data, quickly."""
    if method in ("grpo", "raft"):
        more = {"reward": bright, **more}
    return train_policy(model, more.pop("data", DATA.get(method)), method=method, out=out, **{**QUICK, **more})


def likelihood(model: Any, prompt: str, text: str) -> float:
    """Log-probability of a reply and its end, in nats."""
    tokens = [*model.tokenizer(text, add_special_tokens=False)["input_ids"], model.tokenizer.eos_token_id]
    process = model.process(max_new_tokens=len(tokens))
    return float(process.log_likelihood([prompt], torch.tensor([0]), [tokens]))


def margin(model: Any, prompt: str) -> float:
    return likelihood(model, prompt, "the sun is nice") - likelihood(model, prompt, "I hate the rain")


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


@pytest.fixture(autouse=True)
def _unchanged(tiny_lm: Any) -> Iterator[None]:
    """Whatever a test trains, the base keeps its bits, its configuration and its modules."""
    before = {k: v.clone() for k, v in tiny_lm.network.state_dict().items()}
    config, modules = tiny_lm.network.config.to_dict(), [type(m) for m in tiny_lm.network.modules()]
    yield
    after = tiny_lm.network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert tiny_lm.network.config.to_dict() == config
    assert [type(m) for m in tiny_lm.network.modules()] == modules
    assert not tiny_lm.network.training and not any(p.requires_grad for p in tiny_lm.network.parameters())


# -------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("rank", [4, 0])
def test_sft_raises_the_likelihood_and_loads_as_trained(
    tiny_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    trained: list[Tensor] = []
    ids = torch.tensor([tiny_lm.encode(HELD_OUT[0])])
    save = save_network

    def keep(network: Any, model: Any, folder: Path) -> None:
        with torch.no_grad():
            trained.append(network.eval()(ids).logits)
        save(network, model, folder)

    monkeypatch.setattr(tuning, "save_network", keep)
    out = tune(tiny_lm, "sft", tmp_path / "calm", lora_rank=rank, steps=20)
    tuned = load_policy(tiny_lm, out)
    assert tuned.name == f"{tiny_lm.name}+calm"
    assert not tuned.network.training and not any(p.requires_grad for p in tuned.network.parameters())
    gain = [likelihood(tuned, p, "you love it .") - likelihood(tiny_lm, p, "you love it .") for p in HELD_OUT]
    assert min(gain) > 5
    with torch.no_grad():
        logits = tuned.network(ids).logits
    torch.testing.assert_close(logits, trained[0], atol=1e-5, rtol=1e-5)
    card = read_policy_card(out)
    assert (card.kind, card.recipe["method"], card.data["rows"]) == ("policy", "sft", len(SFT))
    assert card.model["fingerprint"] == tiny_lm.info.fingerprint
    assert len(card.metrics["loss"]) == 20 and card.metrics["loss"][-1] < card.metrics["loss"][0] / 2


def test_the_adapter_shares_the_weights_of_its_base(tiny_lm: Any, tmp_path: Path) -> None:
    out = tune(tiny_lm, "sft", tmp_path / "calm")
    assert {p.name for p in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "steer.json"}
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_lm.name
    merged, beside = load_policy(tiny_lm, out), load_policy(tiny_lm, out, merge=False)
    ids = torch.tensor([tiny_lm.encode(HELD_OUT[0])])
    with torch.no_grad():
        a, b, base = (m.network(ids).logits for m in (merged, beside, tiny_lm))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (a - base).abs().max() > 0.1
    pointers = {p.data_ptr() for p in tiny_lm.network.parameters()}
    assert pointers <= {p.data_ptr() for p in beside.network.parameters()}
    assert not pointers & {p.data_ptr() for p in merged.network.parameters()}
    assert beside.generate(HELD_OUT, seed=0, max_new_tokens=4, temperature=0).texts == (
        merged.generate(HELD_OUT, seed=0, max_new_tokens=4, temperature=0).texts
    )


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("dpo", {}),
        ("dpo", {"lora_rank": 0, "learning_rate": 1e-3}),
        ("dpo", {"loss": "sigmoid+sft"}),
        ("dpo", {"loss": "hinge", "f_divergence": "js_divergence"}),
        ("kto", {}),
        ("kto", {"loss": "apo_zero_unpaired", "batch_size": 5}),
    ],
)
def test_preferences_raise_the_margin_of_prompts_held_out(
    tiny_lm: Any, tmp_path: Path, method: str, more: dict[str, Any]
) -> None:
    tuned = load_policy(tiny_lm, tune(tiny_lm, method, tmp_path / "nice", **more))
    assert min(margin(tuned, p) - margin(tiny_lm, p) for p in HELD_OUT) > 1


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss", METHODS["dpo"].losses)
def test_every_loss_of_dpo_raises_the_margin(tiny_lm: Any, tmp_path: Path, loss: str, divergence: str) -> None:
    if divergence != "reverse_kl" and loss not in _DIFFERENCES:
        pytest.skip("not defined")
    tuned = load_policy(
        tiny_lm, tune(tiny_lm, "dpo", tmp_path / "nice", loss=loss, f_divergence=divergence, learning_rate=1e-3)
    )
    gain = margin(tuned, PROMPTS[0]) - margin(tiny_lm, PROMPTS[0])
    # sft has no margin in it, and discopop falls towards smaller margins from 0, where its steep gate opens.
    assert abs(gain) > 0.01 if loss in ("sft", "discopop") else gain > 0.1


def test_dpo_reaches_its_closed_form(tiny_lm: Any, tmp_path: Path) -> None:
    # Of ten verdicts on one pair seven go one way: the optimum has beta h = log(7/3), h the gain in margin.
    flipped = {"prompt": PROMPTS[0], "chosen": DPO[0]["rejected"], "rejected": DPO[0]["chosen"]}
    rows = [DPO[0]] * 7 + [flipped] * 3
    out = tune(tiny_lm, "dpo", tmp_path / "p", data=rows, beta=0.5, batch_size=10, steps=80, learning_rate=5e-3)
    gain = margin(load_policy(tiny_lm, out), PROMPTS[0]) - margin(tiny_lm, PROMPTS[0])
    assert gain == pytest.approx(math.log(7 / 3) / 0.5, abs=0.02)
    entropy = -0.7 * math.log(0.7) - 0.3 * math.log(0.3)
    assert read_policy_card(out).metrics["loss"][-1] == pytest.approx(entropy, abs=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        loss if loss in ("dapo", "grpo") else pytest.param(loss, marks=pytest.mark.slow)
        for loss in METHODS["grpo"].losses
    ],
)
def test_grpo_raises_the_reward(tiny_lm: Any, tmp_path: Path, loss: str) -> None:
    out = tune(tiny_lm, "grpo", tmp_path / "p", loss=loss, beta=0.0 if loss == "grpo" else 0.02, learning_rate=2e-2)
    metrics = read_policy_card(out).metrics
    errors = [metrics[f"reward_{when}_se"] for when in ("before", "after")]
    assert metrics["reward_after"] > metrics["reward_before"] + max(0.5, 2 * max(errors)) and min(errors) > 0
    assert len(metrics["reward"]) == 10


def test_the_reward_of_prompts_held_out_is_that_of_other_prompts(tiny_lm: Any, tmp_path: Path) -> None:
    """Measured on them as by hand, and the card says on which; those that are learnt from are refused."""
    held, how = ["why not", "the night"], {"steps": 1, "rounds": 1, "group_size": 4, "max_new_tokens": 4}
    seen: list[str] = []

    def wordy(prompts: list[str], completions: list[str], **more: Any) -> list[float]:
        seen.extend(prompts)
        return [float(len(text)) for text in completions]

    card = read_policy_card(tune(tiny_lm, "raft", tmp_path / "p", reward=wordy, held_out=held, **how))
    assert card.data["measured_on"] == "2 held-out prompts" and set(held) <= set(seen)
    drawn = tiny_lm.generate(held, n=4, max_new_tokens=4, seed=99_991)
    by_hand = sum(len(text) for text in drawn.texts) / 8
    assert card.metrics["reward_before"] == pytest.approx(by_hand, abs=1e-5)
    with pytest.raises(InputError, match=r"held_out\[1\].*not among"):
        tune(tiny_lm, "raft", tmp_path / "q", reward=wordy, held_out=[held[0], PROMPTS[0]], **how)
    with pytest.raises(InputError, match="measures no reward"):
        tune(tiny_lm, "sft", tmp_path / "q", held_out=held)


def test_grpo_of_all_weights_and_a_larger_beta_stays_nearer(tiny_lm: Any, tmp_path: Path) -> None:
    more = {"lora_rank": 0, "learning_rate": 3e-3}
    near = read_policy_card(tune(tiny_lm, "grpo", tmp_path / "near", beta=2.0, **more)).metrics
    far = read_policy_card(tune(tiny_lm, "grpo", tmp_path / "far", beta=0.0, **more)).metrics
    assert far["reward_before"] == near["reward_before"] < near["reward_after"] < far["reward_after"]


@pytest.mark.parametrize("rank", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_raft_raises_the_reward_round_by_round(tiny_lm: Any, tmp_path: Path, rank: int) -> None:
    rate = 5e-3 if rank else 1e-3
    out = tune(tiny_lm, "raft", tmp_path / "p", rounds=3, lora_rank=rank, learning_rate=rate)
    metrics = read_policy_card(out).metrics
    assert metrics["reward"] == sorted(metrics["reward"]) and len(metrics["reward"]) == 3
    assert metrics["reward_after"] > metrics["reward_before"] + 0.3
    assert all(best > mean for best, mean in zip(metrics["reward_best"], metrics["reward"], strict=True))


# -------------------------------------------------------------------------------------------- what goes in and out


def test_rows_are_the_tokens_of_encode_and_an_end(tiny_lm: Any) -> None:
    chat = [{"role": "system", "content": "good"}, {"role": "user", "content": "hello"}]
    prompts: list[Any] = ["hello world", RawText("the sun"), chat]
    tuning = _tuning("sft")
    rows = data.read_rows(tiny_lm, [{"prompt": p, "completion": "is nice"} for p in prompts], tuning)
    assert [row["prompt_ids"] for row in rows] == [tiny_lm.encode(p) for p in prompts]
    completion = tiny_lm.tokenizer("is nice </s>", add_special_tokens=False)["input_ids"]
    assert all(row["completion_ids"] == completion for row in rows)
    ended = data.read_rows(tiny_lm, [{"prompt": "hello", "completion": "is nice </s>"}], tuning)
    assert ended[0]["completion_ids"] == completion
    columns = trainers._columns("SFT", rows[:1], tuning)[0]
    assert columns["labels"] == [-100] * len(rows[0]["prompt_ids"]) + completion


def _tuning(method: Any, **more: Any) -> Any:
    default: dict[str, Any] = {"lora_rank": 4, "batch_size": 2, "group_size": 2, "max_new_tokens": 4}
    return policy_settings(method=method, **{**default, **more})


@pytest.mark.parametrize(
    ("kind", "more", "left"),
    [
        ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, "experts"),
        ("Mixtral", {"num_local_experts": 4}, ""),
        ("Llama", {}, ""),
    ],
)
def test_weights_that_lora_leaves_out_are_named(kind: str, more: dict[str, Any], left: str) -> None:
    from peft import LoraConfig, get_peft_model

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **more,
    )
    network = getattr(transformers, f"{kind}ForCausalLM")(config)
    adapted = get_peft_model(network, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    found = trainers._left_out(adapted, decoder_blocks(adapted))
    assert (left in found and "of the blocks' weights" in found) if left else found == ""


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_a_network_that_lora_cannot_adapt_is_one_line(kind: str, tmp_path: Path) -> None:
    from architectures import configuration, network, tokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = steer.load(network(configuration(getattr(transformers, f"{kind}Config"))), tokenizer=tokenizer())
    with pytest.raises(InputError, match="lora_rank: got 2; allowed: 0, or targets that PEFT can adapt") as refused:
        train_policy(model, DATA["sft"], method="sft", out=tmp_path / "out", lora_rank=2, batch_size=2, seed=0)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_kto_compares_with_completions_of_other_rows() -> None:
    rows = [{"prompt_ids": [i], "completion_ids": [10 + i], "label": True} for i in range(5)]
    made = trainers._mismatched(rows, _tuning("kto"))
    assert sorted(row["completion_ids"] for row in made) == sorted(row["completion_ids"] for row in rows)
    assert all(row["KL_completion_ids"] != row["completion_ids"] for row in made)
    assert [row["KL_completion_ids"] for row in made[:2]] == [made[1]["completion_ids"], made[0]["completion_ids"]]


def test_dpo_with_a_reward_pairs_the_models_own_samples(tiny_lm: Any, tmp_path: Path) -> None:
    """The best sample of each prompt against the worst; stopping after the samples changes nothing."""
    more: dict[str, Any] = {"data": PROMPTS, "reward": bright, "epochs": 4, "learning_rate": 5e-3, "group_size": 6}
    metrics = read_policy_card(tune(tiny_lm, "dpo", tmp_path / "p", **more)).metrics
    assert 0 < metrics["pairs"][0] <= len(PROMPTS)
    assert metrics["reward_after"] > metrics["reward_before"]
    again = tune(tiny_lm, "dpo", tmp_path / "q", work=tmp_path / "work", **more)
    assert read_policy_card(again).metrics == metrics and (tmp_path / "work/round-0000.json").is_file()
    with pytest.raises(InputError, match="reward"):
        tune(tiny_lm, "dpo", tmp_path / "r", data=PROMPTS, reward=lambda texts: [1.0] * len(texts))


@pytest.mark.parametrize("method", ["grpo", "raft"])
def test_a_reward_sees_proper_samples(tiny_lm: Any, tmp_path: Path, method: str) -> None:
    seen: list[Samples] = []

    class Watching(Composable):
        def score(self, samples: Samples) -> Tensor:
            seen.append(samples)
            return torch.tensor([float(sum(row)) for row in samples.tokens or []], dtype=torch.float64)

        def __repr__(self) -> str:
            return "watching"

    chat = [{"role": "user", "content": "hello world"}]
    tune(tiny_lm, method, tmp_path / "p", data=["the sun", {"prompt": chat}], reward=Watching(), steps=2)
    assert len(seen) >= 3
    for samples in seen:
        assert sorted(map(str, samples.prompts)) == sorted(map(str, ["the sun", chat]))
        assert samples.group.tolist() == sorted(samples.group.tolist()) and set(samples.group.tolist()) == {0, 1}
        assert samples.tokens is not None and len(samples) == len(samples.tokens) == 16
        assert samples.texts == [tiny_lm.decode(row) for row in samples.tokens]
        assert all(len(row) <= 8 and 3 not in row[:-1] for row in samples.tokens)


def test_nothing_is_sent_or_pickled(tiny_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def refuse(*args: Any, **more: Any) -> None:
        raise AssertionError("nothing is to be sent")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", refuse)
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", refuse)
    tune(tiny_lm, "sft", tmp_path / "out", work=tmp_path / "work", steps=2)
    written = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert not {n for n in written if n.endswith((".bin", ".pkl"))}
    assert capfd.readouterr() == ("", "")


def test_an_older_policy_is_replaced(tiny_lm: Any, tmp_path: Path) -> None:
    out = tune(tiny_lm, "sft", tmp_path / "p", steps=1)
    tune(tiny_lm, "dpo", out, steps=1)
    assert read_policy_card(out).recipe["method"] == "dpo"
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


# ------------------------------------------------------------------------------------------------------- resuming


class Stopped(Exception):
    pass


def _stopping(after: int) -> Callable[..., Any]:
    """In place of `ticking`: ends the run after so many steps."""
    steps = 0

    @contextmanager
    def ticking(shown: bool, what: str, total: int) -> Iterator[Callable[[int], None]]:
        def tick(count: int, seen: str = "", **figures: float) -> None:
            nonlocal steps
            steps += count
            if steps >= after:
                raise Stopped

        yield tick

    return ticking


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("sft", {"batch_size": 3}),
        ("sft", {"lora_rank": 0, "learning_rate": 1e-3}),
        ("dpo", {}),
        ("kto", {"batch_size": 5}),
        ("grpo", {"batch_size": 3}),
        pytest.param("grpo", {"lora_rank": 0, "learning_rate": 1e-3}, marks=pytest.mark.slow),
        ("raft", {"rounds": 2, "steps": 5, "batch_size": 3}),
        pytest.param("raft", {"rounds": 2, "steps": 5, "lora_rank": 0, "learning_rate": 1e-3}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_stopped_goes_on_to_the_same_weights(
    tiny_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, more: dict[str, Any]
) -> None:
    straight = tune(tiny_lm, method, tmp_path / "straight", **more)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(rows if method == "raft" else tuning, "ticking", _stopping(7))
        tune(tiny_lm, method, tmp_path / "resumed", work=tmp_path / "work", **more)
    assert not (tmp_path / "resumed").exists()
    torch.manual_seed(12345)  # the run's own state comes back, not what is left in the process
    resumed = tune(tiny_lm, method, tmp_path / "resumed", work=tmp_path / "work", **more)
    a, b = weights(straight), weights(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert read_policy_card(straight).metrics == read_policy_card(resumed).metrics
    with pytest.raises(InputError, match=r"^work: .*allowed: an empty folder, or"):
        tune(tiny_lm, method, tmp_path / "resumed", work=tmp_path / "work", **{**more, "seed": 1})
    again = tune(tiny_lm, method, tmp_path / "again", work=tmp_path / "work", **more)
    assert all(torch.equal(a[k], x) for k, x in weights(again).items())


def test_raft_keeps_the_samples_of_a_round(tiny_lm: Any, tmp_path: Path) -> None:
    calls = 0

    def failing(texts: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:  # before, first round, second round
            raise RuntimeError("no more")
        return bright(texts)

    def reward(texts: list[str]) -> list[float]:
        return failing(texts)

    more = {"rounds": 2, "steps": 2, "work": tmp_path / "work", "reward": reward}
    with pytest.raises(RewardError, match="no more"):
        tune(tiny_lm, "raft", tmp_path / "out", **more)
    assert (tmp_path / "work" / "round-0000.json").is_file()
    tune(tiny_lm, "raft", tmp_path / "out", **more)
    assert calls == 6  # again before, the second round, after
    straight = tune(tiny_lm, "raft", tmp_path / "straight", rounds=2, steps=2)
    assert all(torch.equal(x, weights(straight)[k]) for k, x in weights(tmp_path / "out").items())


# ------------------------------------------------------------------------------------------------------- bad input


def nan(texts: list[str]) -> list[float]:
    return [float("nan")] * len(texts)


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("ppo", {"data": SFT}, r"^method: got 'ppo'; allowed: sft, kto, grpo, raft, dpo, .*did you mean"),
        ("dpo", {"loss": "rpo"}, r"^loss: got 'rpo'; allowed: for dpo: sigmoid, .*sigmoid_norm"),
        ("sft", {"loss": "sigmoid"}, r"^loss: got 'sigmoid'; allowed: for sft: nll, dft$"),
        ("sft", {"loss": "nll+dft"}, r"^loss: got 'nll\+dft'; allowed: one of"),
        ("dpo", {"f_divergence": "tv"}, r"^f_divergence: got 'tv'; allowed: reverse_kl"),
        ("kto", {"f_divergence": "forward_kl"}, r"^f_divergence: got 'forward_kl'; allowed: reverse_kl for kto"),
        ("dpo", {"f_divergence": "forward_kl", "loss": "aot"}, r"^loss: got 'aot'; allowed: with forward_kl: sigmoid"),
        ("dpo", {"beta": 0.0}, r"^beta: got 0.0; allowed: a number above 0$"),
        ("sft", {"lora_rank": -1}, r"^lora_rank: got -1; allowed: an integer of 0"),
        ("sft", {"lora_targets": "q_proj,nose"}, r"^lora_targets: got 'nose'; allowed: all-linear, or .*q_proj"),
        ("sft", {"lora_targets": "lm_head"}, r"^lora_targets: got 'lm_head'"),
        ("sft", {"learning_rate": float("nan")}, r"^learning_rate: got nan"),
        ("sft", {"epochs": 0}, r"^epochs: got 0; allowed: an integer of 1 or more$"),
        ("sft", {"steps": 0}, r"^steps: got 0"),
        ("kto", {"batch_size": 1}, r"^batch_size: got 1; allowed: an integer of 2"),
        ("grpo", {"group_size": 1}, r"^group_size: got 1"),
        ("raft", {"rounds": 0}, r"^rounds: got 0"),
        ("sft", {"seed": 2**32}, r"^seed: got 4294967296; allowed: an integer from 0 to 4294967295$"),
        ("grpo", {"temperature": 0.0}, r"^temperature: got 0.0"),
        ("sft", {"data": []}, r"^data: got \[\]; allowed: at least one row$"),
        ("sft", {"data": "text"}, r"^data: got 'text'; allowed: a list of rows$"),
        ("sft", {"data": ["text"]}, r"^data\[0\]: got 'text'; allowed: a row with prompt, completion$"),
        ("sft", {"data": [*SFT, {"prompt": "hello"}]}, r"^data\[8\].completion: got 'nothing'; allowed: a row with"),
        ("dpo", {"data": SFT}, r"^data\[0\].chosen: got 'nothing'; allowed: a row with prompt, chosen, rejected$"),
        ("sft", {"data": [{"prompt": "hello", "completion": " "}]}, r"^data\[0\].completion: got ' '"),
        ("sft", {"data": [{"prompt": "", "completion": "a"}]}, r"^data\[0\].prompt: got ''"),
        ("sft", {"data": [{"prompt": 3, "completion": "a"}]}, r"^data\[0\].prompt: got 3; allowed: text, or messages$"),
        ("kto", {"data": [{**KTO[0], "label": 2}]}, r"^data\[0\].label: got 2; allowed: true, false$"),
        ("kto", {"data": KTO[:1]}, r"^data: got '1 rows'; allowed: at least 2"),
        ("sft", {"data": [{"prompt": "a " * 130, "completion": "a"}]}, r"^data\[0\]: got 'a prompt of .*128 tokens"),
        ("sft", {"reward": bright}, r"^reward: .*allowed: none for sft$"),
        ("grpo", {"reward": None}, r"^reward: got None; allowed: one for grpo$"),
        ("grpo", {"reward": nan}, r"^reward nan: returned NaN for sample 0; allowed: numbers$"),
        ("raft", {"reward": nan}, r"^reward nan: returned NaN"),
        ("raft", {"reward": lambda texts: [float("inf")] * len(texts)}, r"^reward .*: returned inf"),
        ("raft", {"reward": lambda texts: [1.0] * len(texts)}, r"^reward: .*not the same on all samples"),
    ],
)
def test_bad_input_is_one_line_before_training(
    tiny_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, more: dict[str, Any], message: str
) -> None:
    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("this must be refused before training")

    monkeypatch.setattr(tuning, "fit", refuse)
    with pytest.raises(SteerError, match=message) as caught:
        tune(tiny_lm, method, tmp_path / "out", **more)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_what_is_in_the_way_is_refused(tiny_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "fit", lambda *args, **more: pytest.fail("trained"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(InputError, match=r"^out: .*\(a file\)"):
        tune(tiny_lm, "sft", tmp_path / "file")
    with pytest.raises(InputError, match=r"^out: .*a folder with other things in it"):
        tune(tiny_lm, "sft", tmp_path / "notes")
    with pytest.raises(InputError, match=r"^work: .*with other things in it"):
        tune(tiny_lm, "sft", tmp_path / "out", work=tmp_path / "notes")


def test_a_run_that_diverges_says_so(tiny_lm: Any, tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="lower learning_rate"):
        tune(tiny_lm, "sft", tmp_path / "out", learning_rate=1e30, lora_rank=0)
    assert not any(tmp_path.iterdir())


def test_missing_libraries_are_named(tiny_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SteerError, match=r"needs the extra train: pip install 'steer-engine\[train\]'"):
        tune(tiny_lm, "sft", tmp_path / "out")


def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^trl: .*DPOTrainer has no _gone"):
        trainers._adapted(trl.DPOTrainer, {"_gone": None})


def test_loading_refuses_what_does_not_fit(tiny_lm: Any, tmp_path: Path) -> None:
    out = tune(tiny_lm, "sft", tmp_path / "p", steps=1)
    assert load_policy(None, out).name == f"{tiny_lm.name}+p"
    with pytest.raises(InputError, match=r"no steer\.json in it"):
        load_policy(tiny_lm, tmp_path)
    card = json.loads((out / "steer.json").read_text())
    changed = {**card, "model": {**card["model"], "name": "llama-9", "fingerprint": "beef"}}
    (out / "steer.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=rf"tuned from llama-9, fingerprint beef.*from {tiny_lm.name} "):
        load_policy(tiny_lm, out)
    for broken, message in (
        ({**card, "kind": "vector"}, "the card of a vector"),
        ({**card, "format": 99}, "update steer"),
        ([], "cannot be read"),
    ):
        (out / "steer.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=message):
            load_policy(tiny_lm, out)
    (out / "steer.json").write_text(json.dumps(card))
    (out / "adapter_model.safetensors").rename(out / "adapter_model.bin")
    with pytest.raises(InputError, match=r"without adapter_model\.safetensors"):
        load_policy(tiny_lm, out)

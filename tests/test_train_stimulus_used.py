"""Stimuli whose policy is a network, and where a stimulus is used: every engine, the server, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_server import Server, Words
from serving_tools import http, steered, wrong
from test_train_stimulus import Echo

import steer
from steer import artifacts
from steer.adapters import openai
from steer.adapters.transformers.policy.hints import load_hints, open_policy
from steer.adapters.transformers.serving.engine import TransformersEngine
from steer.cli import main
from steer.core import InputError
from steer.train.stimulus import StimulusSettings, train_stimulus

# ------------------------------------------------------------------------------------------------ networks that write


@pytest.fixture(scope="module")
def tiny_t5_dir(tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder-decoder with the tiny model's words."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("models") / "t5"
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_dir)
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=1,
        eos_token_id=3, decoder_start_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


NOUNS = ("sun", "rain", "dog", "cat", "house", "tree")


def noun_rows(count: int = 48) -> list[dict[str, Any]]:
    verbs = ("sings", "runs", "likes", "says", "is", "was", "hate", "love")
    return [
        {
            "id": str(i),
            "input": f"the {NOUNS[i % 6]} {verbs[i // 6]} it",
            "hint": NOUNS[i % 6],
            "reference": NOUNS[i % 6],
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["lm", "seq2seq"])
def test_networks_draw_what_they_say(kind: str, tiny_lm: Any, tiny_t5_dir: Path) -> None:
    """Log-probabilities against the library's own pass, frequencies of first tokens, and no KL to itself."""
    policy = open_policy(tiny_lm if kind == "lm" else str(tiny_t5_dir), kind)
    plain = policy.network
    policy.prepare(StimulusSettings(policy=kind, instruction="{prompt}", hint_tokens=3, lora_rank=2))
    policy.begin()
    rows_ = policy.draw(["the sun", "why"], 40, torch.Generator().manual_seed(0))
    flat = [one for row in rows_ for one in row]
    inputs = ["the sun"] * 40 + ["why"] * 40
    logs, gaps = policy.terms(inputs, flat)
    assert float(gaps.detach().abs().max()) < 1e-5
    for i in (0, 41, 79):
        ids, choice = policy.asked(inputs[i]), list(flat[i].choice)
        with torch.no_grad():
            if kind == "lm":
                law = plain(torch.tensor([[*ids, *choice]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            else:
                before = torch.tensor([[1, *choice[:-1]]])
                law = plain(input_ids=torch.tensor([ids]), decoder_input_ids=before).logits[0].log_softmax(-1)
        expected = float(law[torch.arange(len(choice)), choice].sum())
        assert float(logs[i].detach()) == pytest.approx(expected, abs=1e-4)
    assert len({one.choice for one in flat}) > 20 and policy(["the sun"]) == policy(["the sun"])


@pytest.mark.parametrize("kind", ["lm", "seq2seq"])
def test_a_network_is_trained_saved_and_used(
    kind: str, tiny_lm: Any, tiny_lm_dir: Path, tiny_t5_dir: Path, tmp_path: Path
) -> None:
    class Tell(Echo):
        def generate(self, prompts: Any, **more: Any) -> Any:
            return super().generate(prompts, **more)

    settings: dict[str, Any] = {
        "policy": kind, "instruction": "{prompt}", "hint_tokens": 3, "most": 1, "epochs": 12, "learning_rate": 4e-3,
        "inputs": 6, "hints": 3, "rounds": 3, "evaluate": 6, "best": 0, "probe": 6, "force": True,
    }  # fmt: skip
    before = {name: p.clone() for name, p in tiny_lm.network.named_parameters()}
    out: Any = None
    for name in ("one", "two"):
        policy = open_policy(str(tiny_lm_dir if kind == "lm" else tiny_t5_dir), kind)
        out = train_stimulus(
            Tell(),
            noun_rows(),
            "rouge:kinds=1",
            network=policy,
            out=tmp_path / name,
            work=tmp_path / f"{name}.w",
            **settings,
        )
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert all(torch.equal(p, before[name]) for name, p in tiny_lm.network.named_parameters())
    card = artifacts.read_folder_card(out)
    assert card.kind == "stimulus" and card.metrics["sft"]["loss"][-1] < card.metrics["sft"]["loss"][0]
    asked = noun_rows()[0]["input"]
    edit = steer.load_edit(out)
    assert edit.rewrite(asked).endswith(load_hints(str(out))([asked])[0])  # type: ignore[attr-defined]
    assert policy([asked]) == load_hints(str(out))([asked])
    with pytest.raises(InputError, match="strength"):
        steer.load_edit(out, 0.5)


# -------------------------------------------------------------------------------------------------------- where it goes


@pytest.fixture(scope="module")
def hints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stimulus over the tiny model's words, whose template it can read."""
    path = tmp_path_factory.mktemp("stimuli") / "hints.safetensors"
    made: Any = train_stimulus(
        Echo(), noun_rows(), None, stage="sft", most=1, template="mention: {hint}", evaluate=0, probe=4, force=True
    )
    made.save(path)
    return path


INPUTS = ["the dog sings it", "the tree runs it"]


def test_it_steers_every_engine_alike(hints: Path, tiny_lm: Any, tmp_path: Path, capsys: Any) -> None:
    edit = steer.load_edit(hints, model=tiny_lm)
    asked = [edit.rewrite(text) for text in INPUTS]  # type: ignore[attr-defined]
    assert asked == ["mention: dog", "mention: tree"]
    settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6}
    expected = tiny_lm.generate(asked, **settings).texts
    assert tiny_lm.generate(INPUTS, edits=str(hints), **settings).texts == expected
    with Server(Words(tiny_lm), model="words").running() as far:
        model = openai.load(far.url, model="words")
        model.generate(INPUTS, edits=str(hints), **settings)
        assert {call["messages"][-1]["content"] for call in far.calls} == set(asked)
        model.close()
    engine = TransformersEngine(tiny_lm, name="tiny")
    try:
        client = http(engine, tmp_path / "store")
        sent = client.post("/v1/steer/artifacts", files={"file": ("h.safetensors", hints.read_bytes())})
        assert sent.status_code == 201 and sent.json()["kind"] == "stimulus"
        body = {
            "model": "tiny", "messages": [{"role": "user", "content": INPUTS[0]}], "max_tokens": 6, "temperature": 0,
            "steer": {"edits": [{"name": "h"}]},
        }  # fmt: skip
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == expected[0]
        assert answer.json()["choices"][0]["steer"]["kl"] is None
        assert answer.json()["usage"]["prompt_tokens"] == len(tiny_lm.encode(asked[0]))
        best = {
            **body,
            "temperature": 1,
            "steer": {**body["steer"], "sampler": "best-of-n", "candidates": 4, "reward": "length"},
        }  # type: ignore[dict-item]
        assert client.post("/v1/chat/completions", json=best).status_code == 200
        wrong(steered(client, "h", strength=0.5), 400, "steer.edits", "a hint is given or not")
    finally:
        engine.close()


def test_bad_artifacts_are_refused(hints: Path, tmp_path: Path, capsys: Any) -> None:
    for wrong_, why in (({"strength": 0.5}, "strength"), ({"scope": "reply"}, "scope")):
        with pytest.raises(InputError, match=why):
            steer.load_edit(hints, **wrong_)
    tensors, card = artifacts.load(hints)
    artifacts.save(tmp_path / "x.safetensors", {"weights": tensors["weights"]}, card)
    with pytest.raises(InputError, match="weights, mean, std and idf"):
        steer.load_edit(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"steer\.json"):
        steer.load_edit(tmp_path)


def test_the_command(
    tmp_path: Path, tiny_lm_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in noun_rows()))
    Path("ask.txt").write_text("mention {hint}\n{prompt}")
    train = ["train", "stimulus", "--model", str(tiny_lm_dir), "--data", "rows.jsonl", "--reward", "rouge:kinds=1"]
    short = ["--set", "probe=4", "--set", "evaluate=4", "--set", "max_new_tokens=4", "--set", "inputs=4"]
    short += ["--rounds", "2", "--force", "--template", "ask.txt"]
    assert main([*train, "--out", "h.safetensors", *short]) == 0
    said = capsys.readouterr()
    assert "the black box" in said.out and "after the rounds" in said.out and not Path("h.safetensors.work").exists()
    assert main(["show", "h.safetensors"]) == 0 and "after the rounds" in capsys.readouterr().out
    lm = [*train, "--policy", "lm", "--out", "net", *short, "--set", "hint_tokens=4", "--set", "epochs=1"]
    assert main([*lm, "--set", "instruction={prompt}"]) == 0 and Path("net/steer.json").is_file()
    generate = ["generate", "--model", str(tiny_lm_dir), "--prompt", "the dog sings it", "--max-new-tokens", "4"]
    for edit in ("h.safetensors", "net"):
        assert main([*generate, "--edit", edit, "--seed", "0"]) == 0
    capsys.readouterr()
    for more, why in (
        (["--policy-model", "x"], "policy_model"),
        (["--policy", "seq2seq"], "policy_model"),
        (["--stage", "rf"], "stage"),
        (["--set", "moste=3"], "most"),
        (["--template", "Say it"], "template"),
        (["--test", "rows.jsonl"], "test[0]"),
    ):
        assert main([*train, "--out", "x.safetensors", *more]) == 2
        said = capsys.readouterr()
        assert why in said.err and len(said.err.strip().splitlines()) == 1, said.err
    far = [
        "train",
        "stimulus",
        "--model",
        "openai:http://127.0.0.1:9/v1#x",
        "--data",
        "rows.jsonl",
        "--reward",
        "rouge",
    ]
    assert main([*far, "--policy", "lm", "--out", "y"]) == 2 and "endpoint" in capsys.readouterr().err

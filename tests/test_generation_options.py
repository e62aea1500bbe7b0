"""`--generation-config`, `--base` and `--split-special-tokens` on the command line, and the same of servers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from serving_tools import http

import steer
from steer.adapters.transformers.serving.engine import TransformersEngine
from steer.cli import main
from steer.core import InputError
from steer.serving.engine import Sampling

PROMPT = "tell me about the sun"
OWN = {"do_sample": True, "temperature": 0.25, "top_k": 3, "top_p": 0.9}


@pytest.fixture
def own_dir(tiny_lm_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with settings of its own."""
    folder = tmp_path / "own"
    shutil.copytree(tiny_lm_dir, folder)
    set_own(folder, **OWN)
    return folder


def set_own(folder: Path, **own: Any) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))


def drawn(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    given = ["--prompt", PROMPT, "--max-new-tokens", "8", "--seed", "3", "--json", "-n", "4", *arguments]
    assert main(["generate", *map(str, given)]) == 0
    return [sample["text"] for sample in told(capsys)["samples"]]


def told(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)["prompts"][0]


def test_the_command_line_follows_the_checkpoint_where_that_is_asked_for(
    own_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = steer.load(own_dir, dtype="float32", device="cpu")

    def expected(**settings: Any) -> list[str]:
        return list(model.generate(PROMPT, n=4, max_new_tokens=8, seed=3, **settings).texts)

    follow = ("--model", own_dir, "--dtype", "float32", "--generation-config", "checkpoint")
    assert drawn(capsys, *follow) == expected(temperature=0.25, top_k=3, top_p=0.9) != expected()
    assert drawn(capsys, *follow, "--temperature", 1) == expected(temperature=1.0, top_k=3, top_p=0.9)
    assert drawn(capsys, *follow, "--top-k", 0, "--top-p", 1) == expected(temperature=0.25)
    assert drawn(capsys, *follow[:4]) == expected()


def test_the_base_law_on_the_command_line(tiny_lm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = steer.load(tiny_lm_dir, dtype="float32", device="cpu")
    how: dict[str, Any] = {"sampler": "fk", "n": 4, "reward": "length", "max_new_tokens": 6, "top_k": 2, "seed": 0}
    told_of = set()
    for base in ("truncated", "full"):
        given = ["--prompt", PROMPT, "--sampler", "fk", "--reward", "length", "-n", "4", "--top-k", "2", "--seed", "0"]
        more = ["--max-new-tokens", "6", "--base", base, "--dtype", "float32"]
        assert main(["generate", "--model", str(tiny_lm_dir), *given, *more]) == 0
        samples = model.generate(PROMPT, base=base, **how)
        assert samples.log_z is not None
        told_of.add(f"log Z {float(samples.log_z.mean()):.3f}")
        assert f"log Z {float(samples.log_z.mean()):.3f}" in capsys.readouterr().out
    assert len(told_of) == 2


def test_wrong_values(tiny_lm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, allowed in (
        ("--generation-config", "mine", "checkpoint"),
        ("--base", "half", "truncated, full"),
        ("--top-p", "2", "top_p"),
    ):
        assert main(["generate", "--model", str(tiny_lm_dir), "--prompt", "x", option, value]) == 2
        assert allowed in capsys.readouterr().err


def test_control_tokens_on_the_command_line(tiny_lm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = steer.load(tiny_lm_dir, dtype="float32", device="cpu")
    given = ["--model", str(tiny_lm_dir), "--prompt", "the sun </s> a dog", "--max-new-tokens", "6", "--temperature"]
    texts = []
    for more in ([], ["--split-special-tokens"]):
        assert main(["generate", *given, "0", "--json", "--dtype", "float32", *more]) == 0
        texts.append(told(capsys)["samples"][0]["text"])
    for text, split in zip(texts, (False, True), strict=True):
        model.split_special_tokens = split
        assert text == model.generate("the sun </s> a dog", temperature=0, max_new_tokens=6).texts[0]
    assert texts[0] != texts[1]


# ----------------------------------------------------------------------------------------------------------- servers


def test_a_server_draws_as_the_checkpoint_where_requests_do_not_say(own_dir: Path) -> None:
    engine = TransformersEngine(steer.load(own_dir, dtype="float32", device="cpu"), name="tiny")
    try:
        own = engine.own_sampling()
        assert own == Sampling(temperature=0.25, top_k=3, top_p=0.9)
        follows, plain = http(engine, None, unsaid=own), http(engine, None)
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 5, "n": 4}

        def texts(client: Any, **more: Any) -> list[str]:
            answer = client.post("/v1/completions", json={**body, **more})
            assert answer.status_code == 200, answer.text
            return [choice["text"] for choice in answer.json()["choices"]]

        said = {"temperature": 0.25, "top_k": 3, "top_p": 0.9}
        assert texts(follows) == texts(plain, **said) != texts(plain)
        assert texts(follows, temperature=1, top_k=0, top_p=1) == texts(plain)
        assert texts(follows, temperature=None) == texts(follows)
    finally:
        engine.close()


def test_what_a_server_cannot_follow_is_named(own_dir: Path) -> None:
    model = steer.load(own_dir, dtype="float32", device="cpu")
    for name, value in (("repetition_penalty", 1.3), ("suppress_tokens", [7]), ("no_repeat_ngram_size", 2)):
        setattr(model.network.generation_config, name, value)
        engine = TransformersEngine(model, name="tiny")
        try:
            with pytest.raises(InputError) as caught:
                engine.own_sampling()
            assert caught.value.field == f"generation_config.{name}"
        finally:
            engine.close()
        setattr(model.network.generation_config, name, None)


def test_a_server_weighs_against_the_base_law_that_is_asked_for(tiny_lm: Any) -> None:
    engine = TransformersEngine(tiny_lm, name="tiny")
    try:
        client = http(engine, None)
        steering = {"sampler": "fk", "candidates": 4, "reward": "length", "block": 1, "kl": False}
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "seed": 1, "top_k": 2, "temperature": 1}
        prepared = []
        for base in ("truncated", "full"):
            answer = client.post("/v1/completions", json={**body, "steer": {**steering, "base": base}})
            assert answer.status_code == 200, answer.text
            task = client.app.state.server.tasks.completion(_request({**body, "steer": {**steering, "base": base}}))
            prepared.append(engine.prepare(task).plan.process.base)
        assert prepared == ["truncated", "full"]
        for steer_field in ({"base": "full"}, {**steering, "base": "half"}):
            answer = client.post("/v1/completions", json={**body, "steer": steer_field})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "steer.base"
    finally:
        engine.close()


def _request(body: dict[str, Any]) -> Any:
    from steer.serving.protocol import CompletionRequest

    return CompletionRequest.model_validate(body)

"""The command line: what goes where, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from steer import artifacts
from steer.artifacts import Card
from steer.cli import generating, main
from steer.cli import training as training_jobs
from steer.core.scope import Scope
from steer.edits import parse_edit
from steer.files import write_text
from steer.gguf import load_gguf, save_gguf
from steer.methods.samplers import SAMPLERS
from steer.train.controller import ControllerSettings
from steer.train.value import ValueSettings
from steer.train.vector import VectorSettings


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Steer:
    """Calls the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Result:
        self.capsys.readouterr()
        code = main([str(a) for a in arguments])
        return Result(code, *self.capsys.readouterr())


@pytest.fixture
def steer(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steer:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    return Steer(capsys)


def refused(result: Result, *words: str) -> None:
    """Exit status 2, nothing on stdout, one line that says what is wrong."""
    assert result.code == 2
    assert result.out == ""
    errors = [line for line in result.err.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(errors) == 1 and errors[0].startswith("steer: error: "), result.err
    for word in words:
        assert word in errors[0]


def vector(path: Path, *, width: int = 32, layers: tuple[int, ...] = (0, 1), depth: int = 2, nan: bool = False) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"direction.{layer}": torch.randn(width, generator=generator) for layer in layers}
    card = Card("vector", {"name": "tiny", "num_layers": depth, "width": width}, list(layers), {"unit": "norm"})
    artifacts.save(path, tensors, card)
    if nan:
        from safetensors.torch import save_file

        tensors["direction.0"][3] = torch.nan
        save_file(tensors, path, {"steer": json.dumps(card.__dict__)})
    return path


@pytest.fixture
def ask(steer: Steer, tiny_lm_dir: Path) -> Any:
    """`steer generate` on the tiny model."""

    def call(*arguments: object, prompt: str | None = "hello world", model: object = tiny_lm_dir) -> Result:
        given = [] if prompt is None else ["--prompt", prompt]
        return steer("generate", "--model", model, *given, "--max-new-tokens", 4, *arguments)

    return call


# --------------------------------------------------------------------------------------------------------- generate


def test_json_alone_goes_to_stdout(tmp_path: Path, tiny_lm_dir: Path) -> None:
    (tmp_path / "loud.py").write_text("def count(texts):\n    print('noise')\n    return [len(t) for t in texts]\n")
    command = [sys.executable, "-m", "steer", "generate", "--model", str(tiny_lm_dir), "--prompt", "hello", "--json"]
    more = ["--n", "2", "--seed", "5", "--max-new-tokens", "4", "--reward", "loud:count", "--out", "deep/out.json"]
    done = subprocess.run(command + more, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"model", "prompts", "kl_kind", "cost", "seed"} and found["seed"] == 5
    assert [set(s) for s in found["prompts"][0]["samples"]] == [{"text", "reward", "log_weight", "kl"}] * 2
    assert "noise" in done.stderr and "noise" not in done.stdout and "Loading" not in done.stderr
    assert json.loads((tmp_path / "deep" / "out.json").read_text()) == found


def test_text_shows_prompt_sample_reward_and_kl(ask: Any) -> None:
    done = ask("--reward", "length", "--seed", 1)
    assert done.code == 0
    assert done.out.startswith("> hello world\n") and "[reward " in done.out and ", kl 0.000]" in done.out


def test_same_seed_same_text(ask: Any) -> None:
    first, second, other = (ask("--seed", s, "--json", "--max-new-tokens", 12) for s in (3, 3, 4))
    assert json.loads(first.out)["prompts"] == json.loads(second.out)["prompts"] != json.loads(other.out)["prompts"]


def test_a_seed_is_drawn_and_reported(ask: Any) -> None:
    drawn = json.loads(ask("--json").out)
    again = json.loads(ask("--json", "--seed", drawn["seed"]).out)
    assert drawn["prompts"] == again["prompts"]


def test_an_edit_is_mounted(ask: Any, tmp_path: Path) -> None:
    found = json.loads(
        ask("--edit", f"{vector(tmp_path / 'v.safetensors')}:0.5:scope=reply", "--seed", 1, "--json").out
    )
    assert found["prompts"][0]["samples"][0]["kl"] > 0


def test_a_folder_without_a_model_is_refused_by_what_it_lacks(ask: Any, tmp_path: Path, tiny_lm_dir: Path) -> None:
    (tmp_path / "adir").mkdir()
    refused(ask(model=tmp_path / "adir"), "config.json", "neither of which is there")
    (tmp_path / "adir" / "inside").symlink_to(tiny_lm_dir)
    refused(ask(model=tmp_path / "adir"), "did you mean", os.path.join("adir", "inside"))


def test_a_value_head_is_checked_without_its_model(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer.methods.value import QHead

    tensors = {name: torch.rand(x.shape) for name, x in QHead(32, 16).state_dict().items()}
    told = Card("value", {"name": "tiny"}, recipe={"head": "q"}, metrics={"suggested_beta": 0.05})
    artifacts.save("value.safetensors", tensors, told)
    strong = ask("--edit", "value.safetensors:2:top_k=5:model=any", "--beta", "0.05")
    assert strong.code == 0 and "hardly" not in strong.err
    assert (
        "beta 0.5 hardly guides by this value head: try --beta 0.05"
        in ask("--edit", "value.safetensors:2:model=any", "--beta", "0.5").err
    )
    monkeypatch.setattr("steer.cli.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    refused(ask("--edit", "value.safetensors:scope=reply"), "scope", "top_k")


def test_prompts_from_a_file(ask: Any, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello"}]
    (tmp_path / "prompts.json").write_text(json.dumps(["a cat", chat]))
    found = json.loads(ask("--prompts", "prompts.json", "--json", prompt=None).out)
    assert [p["prompt"] for p in found["prompts"]] == ["a cat", chat]


def test_prompts_are_answered_line_by_line_and_a_run_goes_on(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.csv").write_text("prompt\none\ntwo\nthree\nfour\nfive\n")
    given = ("--prompts", "in.csv", "--out", "out.jsonl", "--max-rows", 2)
    whole = ask(*given[:3], "whole.jsonl", *given[4:], prompt=None)
    assert whole.code == 0 and "5 prompts" in whole.out

    real, calls = generating.execute, []

    def stopped(plan: Any) -> Any:
        calls.append(plan)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(plan)

    monkeypatch.setattr(generating, "execute", stopped)
    done = ask(*given, prompt=None)
    assert done.code == 130 and "kept in out.jsonl; the same command goes on" in done.err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    again = ask(*given, prompt=None)
    assert again.code == 0 and "3 prompts, 2 were there" in again.out and "resuming at prompt 3 of 5" in again.err
    texts = [
        [json.loads(line)["samples"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("out.jsonl", "whole.jsonl")
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 5
    before = len(calls)
    assert "0 prompts, 5 were there" in ask(*given, prompt=None).out and len(calls) == before
    refused(ask(*given, "--temperature", 0.5, prompt=None), "temperature was None, now 0.5", "--overwrite")
    assert ask(*given, "--temperature", 0.5, "--overwrite", prompt=None).code == 0
    refused(ask(*given, "--json", prompt=None), "json", "line by line")


@pytest.mark.parametrize("piped", [b'"one"\n{"prompt": "two"}\n', b"id,prompt\n1,one\n2,two\n", b'["one", "two"]'])
def test_prompts_from_standard_input(ask: Any, monkeypatch: pytest.MonkeyPatch, piped: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped)))
    done = ask("--prompts", "-", "--json", prompt=None)
    assert [entry["prompt"] for entry in json.loads(done.out)["prompts"]] == ["one", "two"]


def test_files_that_are_not_there_name_their_neighbours(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text('["a cat"]')
    refused(ask("--prompts", "prompt.json", prompt=None), "no such file", "did you mean prompts.json?")
    refused(ask("--prompts", tmp_path, prompt=None), "a folder")
    vector(tmp_path / "calm.safetensors")
    refused(ask("--edit", "clam.safetensors"), "no such file", "did you mean calm.safetensors?")


def test_quiet_and_verbose(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.progress.EVERY", 0.0)
    shown, quiet, verbose = (ask(*switch).err for switch in ((), ("-q",), ("-v",)))
    assert " s left" in shown and " s left" not in quiet
    assert "steer: loading" in verbose and "steer: generate took" in verbose and "steer: loading" not in shown


@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "reply", "from:2"])
def test_every_scope_can_be_written(ask: Any, tmp_path: Path, scope: str) -> None:
    file = vector(tmp_path / "v.safetensors")
    for text in (f"{file}:0.5:scope={scope}", f"{file}:scope={scope}:0.5", f"{file}:scope={scope}"):
        edit = parse_edit(text)
        assert edit.scope == Scope.parse(scope)
        assert (edit.strength == 0.5) == ("0.5" in text)
    assert ask("--edit", f"{file}:0.5:scope={scope}").code == 0


def test_best_of_n_with_settings(ask: Any) -> None:
    found = json.loads(ask("--sampler", "best-of-n", "--set", "n=3", "--reward", "length", "--json").out)
    assert len(found["prompts"][0]["samples"]) == 1 and found["cost"]["reward_calls"] == 3


def test_particles_of_text_are_shown_by_weight(ask: Any) -> None:
    more = ("--sampler", "fk", "--set", "num_particles=3", "--block", 2, "--until", "the", "--reward", "length")
    done = ask(*more, "--seed", 1)
    assert done.code == 0 and done.out.count("[weight ") == 3 and "ESS" in done.out and "log Z" in done.out
    found = json.loads(ask(*more, "--seed", 1, "--json").out)
    assert {"prompt", "samples", "log_z", "ess"} == set(found["prompts"][0])


def test_a_dose_that_breaks_texts_is_warned_of(ask: Any, tmp_path: Path) -> None:
    path = vector(tmp_path / "v.safetensors")
    assert "strength 1.5 is in residual norms" in ask("--edit", f"{path}:1.5").err
    assert all("residual norms" not in ask("--edit", f"{path}:{dose}").err for dose in (0.5, -0.9))


def test_a_file_of_samples_says_so_by_its_name(ask: Any) -> None:
    refused(ask("--out", "samples.txt"), "out", ".json or .jsonl")
    assert "did you mean best-of-n" in ask("--sampler", "bestofn").err


def test_stream_prints_what_is_drawn(ask: Any) -> None:
    streamed, plain = ask("--stream", "--seed", 1), ask("--seed", 1)
    assert streamed.code == 0
    assert streamed.out.split("\n  [")[0] == plain.out.split("\n  [")[0].removeprefix("> hello world\n")


def test_system_message_and_raw_text_change_the_prompt(ask: Any) -> None:
    tokens = [
        json.loads(ask(*more, "--json").out)["cost"]["prompt_tokens"]
        for more in ((), ("--raw",), ("--system", "a cat"))
    ]
    assert tokens[1] < tokens[0] < tokens[2]


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n", "0"], ["n: got 0"]),
        (["--beta", "0"], ["beta: got 0"]),
        (["--beta", "nan"], ["beta: got nan"]),
        (["--temperature", "-1"], ["temperature: got -1"]),
        (["--max-new-tokens", "0"], ["max_new_tokens: got 0"]),
        (["--top-p", "2"], ["top_p"]),
        (["--max-rows", "0"], ["max_rows"]),
        (["--sampler", "magic"], ["sampler", "magic", *SAMPLERS]),
        (["--sampler", "BEST_OF_N"], ["did you mean best-of-n?"]),
        (["--sampler", "dst"], ["did you mean dts?"]),
        (["--sampler", "best-of-n"], ["reward"]),
        (["--set", "n=3", "--set", "n=4"], ["'n=4'", "each key once", "n=3"]),
        (["--set", "nn=3"], ["nn", "did you mean n?"]),
        (["--set", "n=many"], ["n: got 'many'", "an integer"]),
        (["--set", "n"], ["key=value"]),
        (["--reward", "sentimant"], ["sentimant", "sentiment"]),
        (["--dtype", "int3"], ["dtype"]),
        (["--device", "toaster"], ["device"]),
        (["--edit", "nothing.safetensors"], ["nothing.safetensors", "no such file"]),
        (["--raw", "--system", "x"], ["raw"]),
        (["--stream", "--json"], ["stream"]),
        (["--prompts", "none.json"], ["prompt"]),
        (["--nonsense"], ["--nonsense"]),
        (["--n", "x"], ["--n"]),
    ],
)
def test_bad_options_are_refused_before_the_model_loads(
    ask: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.setattr("steer.cli.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    refused(ask(*arguments), *words)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '[""]', "[3]", "[[]]", '[[{"role": "user"}]]', "[" * 5000, b"\xff\xfe"]
)
def test_bad_prompt_files(ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes) -> None:
    monkeypatch.setattr("steer.cli.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "p.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(ask("--prompts", "p.json", prompt=None), "prompts")


def test_bad_prompts(ask: Any) -> None:
    refused(ask(prompt=""), "prompt", "not empty")
    refused(ask(prompt="cat " * 200), "prompts[0]", "at most 128 tokens")


def test_unknown_models(ask: Any, tmp_path: Path) -> None:
    refused(ask(model="smollm2-135"), "did you mean smollm2-135m?")
    refused(ask(model="smollm2-135m"), "steer models fetch smollm2-135m")
    refused(ask(model=tmp_path), "config.json")
    refused(ask(model=vector(tmp_path / "v.safetensors")), "(a file)", "--edit")


def test_a_hub_that_cannot_be_reached_is_said_at_once(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def unreachable(*given: Any, **more: Any) -> bool:
        tries.append(given)
        raise ConnectionError("no such host")

    monkeypatch.setattr("huggingface_hub.file_exists", unreachable)
    (tmp_path / "org" / "name").mkdir(parents=True)
    refused(ask(model="org/nam"), "cannot be reached (no such host)", "did you mean org/name?")
    assert len(tries) == 1


def test_artifacts_that_do_not_fit(ask: Any, tmp_path: Path) -> None:
    refused(ask("--edit", vector(tmp_path / "wide.safetensors", width=48)), "48", "32")
    refused(ask("--edit", vector(tmp_path / "deep.safetensors", layers=(0, 7), depth=8)), "8", "2")
    save_gguf("deep.gguf", {7: torch.ones(32)}, "llama")
    refused(ask("--edit", "deep.gguf"), "layer: got 7", "0 to 1")
    refused(ask("--edit", f"{vector(tmp_path / 'v.safetensors')}:layers=5"), "layers", "0 and 1")
    refused(ask("--edit", f"{vector(tmp_path / 'w.safetensors')}:colour=blue"), "colour")


def test_broken_artifacts(ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.cli.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    refused(ask("--edit", vector(tmp_path / "nan.safetensors", nan=True)), "NaN")
    whole = vector(tmp_path / "v.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(ask("--edit", "cut.safetensors"), "truncated")
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps({"direction.0": [1.0]}))
    refused(ask("--edit", "evil.safetensors"), "pickle")


@pytest.mark.parametrize(
    ("name", "body", "word"),
    [("raises", "1 / 0", "ZeroDivisionError"), ("nan", "[float('nan')] * len(texts)", "NaN"), ("short", "[]", "shape")],
)
def test_bad_rewards(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str, word: str
) -> None:
    (tmp_path / f"rewards_{name}.py").write_text(f"def score(texts):\n    return {body}\n")
    monkeypatch.delitem(sys.modules, f"rewards_{name}", raising=False)
    refused(ask("--reward", f"rewards_{name}:score"), word)


def test_output_that_cannot_be_written(ask: Any, tmp_path: Path) -> None:
    refused(ask("--out", tmp_path), "out", "not a folder")
    (tmp_path / "file").touch()
    refused(ask("--out", tmp_path / "file" / "out.json"), "out")


def test_infinite_numbers_are_null() -> None:
    from steer.files import as_json

    assert as_json({"a": [float("nan"), float("-inf"), 1.5], "b": "x"}) == '{"a": [null, null, 1.5], "b": "x"}'


def test_interrupted(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("steer.cli.session.load", stop)
    done = ask()
    assert done.code == 130 and "interrupted" in done.err and "Traceback" not in done.err


# ----------------------------------------------------------------------------------------------------------- others


def test_help_is_quick_and_loads_nothing() -> None:
    code = "import sys; from steer.cli import main; main(['--help']); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr.strip() == "False" and "generate" in done.stdout


def test_importing_steer_imports_no_engine() -> None:
    code = (
        "import sys, steer\n"
        "assert 'torch' not in sys.modules\n"
        "engines = {n for n, home in steer._HOME.items() if home.startswith('steer.adapters')}\n"
        "names = [n for n in steer.__all__ if n not in engines]\n"
        "assert all(getattr(steer, n) for n in names) and set(names) <= set(dir(steer))\n"
        "assert callable(steer.generate) and callable(steer.load)\n"
        "print([m for m in ('transformers', 'vllm', 'diffusers', 'gradio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="nonsense"):
        import steer

        steer.nonsense  # noqa: B018


def test_models_are_listed(steer: Steer) -> None:
    done = steer("models", "list")
    assert done.code == 0 and "smollm2-135m" in done.out and "not fetched" in done.out
    refused(steer("models", "fetch", "smolm2"), "did you mean smollm2-135m?")


def test_show_and_export(steer: Steer, tmp_path: Path) -> None:
    made = vector(tmp_path / "v.safetensors")
    assert "vector for tiny" in steer("show", made).out
    assert steer("export", made, "v.gguf").out == "wrote v.gguf: layers 1\n"
    directions, hint = load_gguf("v.gguf")
    assert hint == "unknown" and torch.equal(directions[1], artifacts.load(made)[0]["direction.1"])
    assert "layers: 1" in steer("show", "v.gguf").out
    refused(steer("export", made, "v.gguf", "--layers", "0"), "block 0")
    refused(steer("export", made, "v.gguf", "--layers", "9"), "layers")
    refused(steer("show", "absent.safetensors"), "no such file")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Training functions that only write down what they were asked."""
    calls: list[dict[str, Any]] = []
    made = ({"direction.0": torch.ones(32)}, Card("vector", {"name": "tiny"}))

    def train_vector(model: Any, pairs: Any, settings: Any, *, progress: bool) -> Any:
        calls.append({"pairs": pairs, "settings": settings})
        return made

    def train_controller(model: Any, positive: Any, negative: Any, settings: Any, *, work: Path, progress: bool) -> Any:
        work.mkdir()
        calls.append({"positive": positive, "negative": negative, "settings": settings})
        return made

    def train_value(
        model: Any, prompts: Any, reward: Any, settings: Any, *, rollouts: Any, system: Any, work: Path, progress: bool
    ) -> Any:
        work.mkdir()
        assert rollouts is system is None
        calls.append({"prompts": prompts, "reward": str(reward), "settings": settings})
        return made

    for function in (train_vector, train_controller, train_value):
        name = function.__name__
        monkeypatch.setattr(f"steer.train.{name.removeprefix('train_')}.{name}", function)
    return calls


def test_train_vector(steer: Steer, training: list[dict[str, Any]], tiny_lm_dir: Path, tmp_path: Path) -> None:
    rows = [{"positive": "good", "negative": "bad"}, {"positive": "nice", "negative": "awful"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    train = ("train", "vector", "--model", tiny_lm_dir, "--pairs", "pairs.jsonl", "--out", "out/v.safetensors")
    done = steer(*train, "--method", "probe", "--set", "l2=0.5", "--seed", 4)
    assert done.code == 0 and "wrote out/v.safetensors" in done.out
    assert training == [{"pairs": rows, "settings": VectorSettings(method="probe", l2=0.5, seed=4)}]
    assert artifacts.read_card("out/v.safetensors").kind == "vector"
    assert "already there" in steer(*train, "--method", "probe", "--set", "l2=0.5", "--seed", 4).out
    refused(steer(*train), "out: got", "--overwrite")
    assert len(training) == 1 and steer(*train, "--overwrite").code == 0 and len(training) == 2
    refused(steer(*train, "--method", "magic"), "method", "mean, pca, probe")
    refused(steer(*train, "--set", "l3=1"), "l3", "did you mean l2?")
    refused(steer(*train, "--set", "progress=1"), "progress")
    refused(steer(*train, "--set", "l2=-1"), "l2: got", "a number above 0")
    refused(steer(*train, "--set", "seed=1"), "settings without an option")
    (tmp_path / "pairs.jsonl").write_text('{"positive": "good", "negative": "bad"}\n{"positive": "good"}\n')
    refused(steer(*train), "pairs line 2")
    assert len(training) == 2


def test_figures_from_almost_nothing_come_with_a_warning() -> None:
    def doubts(data: dict[str, Any], **metrics: Any) -> list[str]:
        return training_jobs._doubts(Card("any", {}, data=data, metrics=metrics))

    assert "2 pairs leave few" in doubts({"rows": 2}, held_out_accuracy=[0.5, 1.0])[0]
    assert doubts({"rows": 80}, held_out_accuracy=[0.5, 1.0]) == []
    assert "explains nothing" in doubts({}, explained={"half": -0.11, "end": -0.15})[0]
    assert doubts({}, explained={"half": 0.3, "end": -0.1}) == []
    assert "no better than chance" in doubts({"rows": 16}, held_out_balanced_accuracy=0.0)[0]
    assert "uncertain" in doubts({"rows": 16}, held_out_balanced_accuracy=1.0)[0]
    assert doubts({"rows": 200}, held_out_balanced_accuracy=0.9) == []


def test_a_change_within_chance_is_named(tmp_path: Path) -> None:
    def doubts(on: str = "64 held-out prompts", **metrics: float) -> list[str]:
        (tmp_path / "steer.json").write_text(json.dumps({"metrics": metrics, "data": {"measured_on": on}}))
        return training_jobs._doubts_of_policy(tmp_path)

    near = doubts(reward_before=0.25, reward_after=0.35, reward_before_se=0.03, reward_after_se=0.05)
    assert len(near) == 1 and "+0.1" in near[0] and "0.114" in near[0]  # 1.96 sqrt(0.03^2 + 0.05^2)
    assert doubts(reward_before=0.25, reward_after=0.45, reward_before_se=0.03, reward_after_se=0.05) == []
    assert "anecdote" in doubts(reward_before=0.2, reward_after=0.4)[0]
    assert doubts() == []
    figures = {"reward_before": 0.25, "reward_after": 0.45, "reward_before_se": 0.03, "reward_after_se": 0.05}
    assert "--held-out FILE" in doubts("64 training prompts", **figures)[0]


def test_train_with_work(steer: Steer, training: list[dict[str, Any]], tiny_lm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('["a", "b"]')
    controller = ("--positive", "p.json", "--negative", "p.json", "--set", "epochs=3", "--keep-work")
    value = ("--prompts", "p.json", "--reward", "sentiment - 0.1*length", "--set", "td_lambda=0.5")
    assert steer("train", "controller", "--model", tiny_lm_dir, *controller, "--out", "c.safetensors").code == 0
    assert steer("train", "value", "--model", tiny_lm_dir, *value, "--out", "v.safetensors").code == 0
    assert training[0]["settings"] == ControllerSettings(epochs=3) and training[0]["positive"] == ["a", "b"]
    assert training[1]["settings"] == ValueSettings(td_lambda=0.5) and training[1]["reward"] == "sentiment - 0.1*length"
    assert Path("c.safetensors.work").is_dir() and not Path("v.safetensors.work").exists()
    refused(steer("train", "value", "--model", tiny_lm_dir, *value, "--out", os.devnull + "/v.st"), "out")


@pytest.mark.parametrize(
    ("kind", "given", "changed"),
    [
        ("value", ("--prompts", "p.json", "--reward", "length", "--set", "max_new_tokens=3"), "max_new_tokens=4"),
        ("controller", ("--positive", "p.json", "--negative", "p.json", "--set", "epochs=1"), "epochs=2"),
    ],
)
def test_overwriting_clears_what_another_run_left_to_resume_from(
    steer: Steer, tiny_lm_dir: Path, tmp_path: Path, kind: str, given: tuple[str, ...], changed: str
) -> None:
    (tmp_path / "p.json").write_text('["a cat", "hello", "the sun", "a dog"]')
    train = ("train", kind, "--model", tiny_lm_dir, "--out", "made.safetensors", "--keep-work", *given)
    assert steer(*train).code == 0
    Path("made.safetensors").unlink()
    refused(steer(*train[:-1], changed), "work", "these very settings", "--overwrite begins anew")
    done = steer(*train[:-1], changed, "--overwrite")
    assert done.code == 0 and Path("made.safetensors").is_file(), done.err


def test_eval(steer: Steer, tiny_lm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('["a cat", "hello"]')
    given = ("eval", "--model", tiny_lm_dir, "--edit", vector(tmp_path / "v.safetensors"), "--prompts", "p.json")
    done = steer(*given, "--strengths", "-0.2,0.2", "--max-new-tokens", 4, "--reward", "length", "--out", "report")
    assert done.code == 0 and "unsteered" in done.out and "-0.2" in done.out
    assert Path("report/report.json").is_file() and Path("report/report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path("report/report.json").read_text())["artifact"] == "v.safetensors"
    refused(steer(*given, "--strengths", "1,two", "--out", "report"), "strengths", "two")
    refused(steer(*given, "--strengths", "1,inf", "--out", "report"), "strengths")
    refused(steer(*given, "--out", "p.json"), "out")


def test_artifacts_can_be_read_by_whom_the_umask_lets(steer: Steer, tiny_lm_dir: Path) -> None:
    Path("pairs.jsonl").write_text('{"positive": "happy", "negative": "sad"}\n{"positive": "a", "negative": "b"}\n')
    train = ("train", "vector", "--model", tiny_lm_dir, "--pairs", "pairs.jsonl", "--out", "v.safetensors")
    assert steer(*train).code == 0
    assert Path("v.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_umask_stays_while_threads_write(tmp_path: Path) -> None:
    before = _umask()

    def write(i: int) -> None:
        for j in range(20):
            write_text(tmp_path / f"{i}-{j}", "text")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert _umask() == before
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~before}


def test_files_have_the_names_that_say_what_is_in_them(steer: Steer, tiny_lm_dir: Path) -> None:
    Path("pairs.jsonl").write_text('{"positive": "happy", "negative": "sad"}\n')
    for name in ("v.pt", "v", "v.bin"):
        wrong = steer("train", "vector", "--model", tiny_lm_dir, "--pairs", "pairs.jsonl", "--out", name)
        assert wrong.code == 2 and ".safetensors" in wrong.err and not Path(name).exists()


def test_a_command_says_less_or_more(steer: Steer, tiny_lm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STEER_VERBOSE", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, "")
    wrong = ("generate", "--model", tiny_lm_dir, "--prompt", "hi", "--sampler", "nothing")
    assert "Traceback" not in steer(*wrong, "-q").err
    assert "Traceback" in steer(*wrong, "-v").err and "sampler" in steer(*wrong, "-v").err

"""The command line on diffusion models: pictures, samplers, policies, and one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import Result, Steer, refused
from tiny_pipelines import sd15

from steer.cli.options import COMMANDS
from steer.cli.recipe import load_recipe
from steer.cli.values import build
from steer.core import InputError
from steer.embedded import find


@pytest.fixture
def steer(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steer:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    return Steer(capsys)


@pytest.fixture
def draw(steer: Steer) -> Any:
    """`steer generate` on the shipped diffusion model, in few steps."""

    def call(*arguments: object, steps: int = 3) -> Result:
        return steer("generate", "--model", "fashion-ddpm", "--steps", steps, "--seed", 1, *arguments)

    return call


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.cli.session.load", lambda *a, **k: pytest.fail("the model was loaded"))


def picture(path: str | Path) -> np.ndarray:
    """The pixels of a PNG file, which must show something."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 80 and pixels.std() > 5
    return pixels


def tiles(path: str | Path, columns: int, rows: int, captions: bool) -> torch.Tensor:
    """The images of a grid, back at 28 x 28, `[N, 1, 28, 28]`."""
    pixels, height = picture(path), 87 + 18 * captions
    assert pixels.shape[:2] == (3 + rows * height, 3 + columns * 87)
    found = [pixels[3 + r * height :][:84, 3 + c * 87 :][:, :84, 0] for r in range(rows) for c in range(columns)]
    return torch.tensor(np.stack(found)[:, None, 1::3, 1::3] / 255, dtype=torch.float32)


# --------------------------------------------------------------------------------------------------------- pictures


def test_one_class_at_once(draw: Any) -> None:
    done = draw("--class", "boot")
    assert done.code == 0 and done.out.startswith("> boot\n  1 [kl 0.000]\n1 sample: ")
    assert "3 nfe, 3 model calls" in done.out and done.out.endswith("wrote steer.png\n")
    tiles("steer.png", 1, 1, captions=False)


def test_classes_are_respected(draw: Any) -> None:
    from steer.train.fashion.nets import load_net

    done = draw("--class", "boot", "--class", "Trouser", "-n", 8, "--reward", "class:boot", "--json", steps=8)
    found = json.loads(done.out)
    assert [p["prompt"] for p in found["prompts"]] == ["boot", "Trouser"] and found["files"] == {"png": "steer.png"}
    sample = found["prompts"][0]["samples"][0]
    assert set(sample) == {"text", "reward", "log_weight", "kl"} and sample["text"] is None
    folder = find("fashion-ddpm").folder
    with torch.no_grad():
        seen = load_net(folder / "classifier")(tiles("steer.png", 8, 2, captions=True)).argmax(1)
    names = json.loads((folder / "MODEL_CARD.json").read_text())["classes"]
    assert int((seen[:8] == names.index("boot")).sum()) >= 7 and int((seen[8:] == names.index("trouser")).sum()) >= 6


def test_without_a_prompt_anything_is_drawn_and_a_seed_says_what(draw: Any) -> None:
    first, again = draw("-n", 2, "--json", "--png", "a.png"), draw("-n", 2, "--json", "--png", "b.png")
    assert [p["prompt"] for p in json.loads(first.out)["prompts"]] == [""] and again.code == 0
    assert np.array_equal(picture("a.png"), picture("b.png"))
    assert draw("--prompt", "bag", "--guidance-scale", 2, "--eta", 0).out.startswith("> bag\n")


def test_particles_come_with_weights_and_a_lineage(draw: Any) -> None:
    more = ("--reward", "brightness", "--beta", 0.05, "--lineage", "lineage.png", "--out", "fk.json")
    done = draw("--class", "bag", "--sampler", "fk", "--set", "num_particles=4", "--set", "stop=none", *more, steps=6)
    assert done.code == 0 and "ESS " in done.out and "log Z " in done.out and "wrote lineage.png (lineage)" in done.out
    weights = [float(line.split("weight ")[1][:5]) for line in done.out.splitlines() if "[weight" in line]
    assert len(weights) == 4 and weights == sorted(weights, reverse=True) and abs(sum(weights) - 1) < 0.01
    entry = json.loads(Path("fk.json").read_text())["prompts"][0]
    assert 1 <= entry["ess"] <= 4 and isinstance(entry["log_z"], float)
    assert picture("lineage.png").shape[1] > 600
    tiles("steer.png", 2, 2, captions=True)


def test_outputs_of_one_population(draw: Any) -> None:
    more = ("--set", "num_particles=2", "--set", "lookahead=rollouts:2", "--reward", "symmetry", "--gradient", 0.5)
    done = draw("--class", "bag", "--sampler", "fk", "-n", 3, *more, "--json")
    found = json.loads(done.out)
    samples = found["prompts"][0]["samples"]
    assert [s["log_weight"] for s in samples] == [0, 0, 0] and found["prompts"][0]["ess"] <= 6
    assert found["cost"]["nfe"] > 3 * 6


def test_a_lineage_without_resampling_is_not_drawn(draw: Any) -> None:
    more = ("--reward", "brightness", "--beta", 1e6, "--lineage", "lineage.png")
    done = draw("--sampler", "fk", "--set", "num_particles=2", *more)
    assert done.code == 0 and "no particle was resampled" in done.err and not Path("lineage.png").exists()


def test_previews_over_time(draw: Any) -> None:
    more = ("--sampler", "svdd", "-n", 2, "--set", "num_candidates=2", "--reward", "class:boot")
    done = draw(*more, "--previews", "p.png", steps=4)
    assert done.code == 0 and "wrote p.png (previews)" in done.out
    tall, wide = picture("p.png").shape[:2]
    assert wide > tall  # two samples at four steps
    assert draw("--class", "bag", "--previews", "q.png", steps=9).code == 0
    assert picture("q.png").shape[1] > wide


def test_a_prompt_of_a_file_may_leave_the_model_free(draw: Any) -> None:
    Path("free.json").write_text('["", "boot", ""]')
    found = json.loads(draw("--prompts", "free.json", "--json").out)
    assert [p["prompt"] for p in found["prompts"]] == ["", "boot", ""]
    Path("blank.json").write_text('["  "]')
    refused(draw("--prompts", "blank.json"), "prompts", "text that is not empty")


@pytest.mark.parametrize("sampler", ["dts", "dts-star"])
def test_search_trees(draw: Any, sampler: str) -> None:
    more = ("--set", "rollouts=6", "--set", "batch=3", "--set", "max_nfe=none", "--reward", "brightness")
    done = draw("--class", "shirt", "--sampler", sampler, *more, "--tree", "tree.png", "-n", 2)
    assert done.code == 0 and "wrote tree.png (tree)" in done.out
    assert picture("tree.png").shape[1] > 600
    assert ("log Z" in done.out) == (sampler == "dts")


def test_every_leaf_with_its_weight(draw: Any) -> None:
    more = ("--set", "n=none", "--set", "rollouts=4", "--set", "lookahead=none", "--reward", "brightness")
    found = json.loads(draw("--sampler", "dts", *more, "--json").out)
    weights = [s["log_weight"] for s in found["prompts"][0]["samples"]]
    assert len(weights) == 4 and weights == sorted(weights, reverse=True)


def test_a_stock_pipeline_is_told_by_text(steer: Steer, monkeypatch: pytest.MonkeyPatch) -> None:
    sd15().save_pretrained("pipeline")
    given = ("generate", "--model", "pipeline", "--steps", 2, "--seed", 0)
    done = steer(*given, "--prompt", "a cat", "--guidance-scale", 2, "--reward", "sharpness")
    assert done.code == 0 and done.out.startswith("> a cat\n  1 [reward ")
    picture("steer.png")
    Path("free.json").write_text('["", "a cat"]')
    assert steer(*given, "--prompts", "free.json").code == 0
    assert "StableDiffusionPipeline" in steer("show", "pipeline").out
    monkeypatch.setattr("steer.cli.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    refused(steer(*given), "prompt", "--prompt")
    refused(steer(*given, "--class", "cat"), "class", "--prompt")
    Path("chat.json").write_text('[[{"role": "user", "content": "hello"}]]')
    refused(steer(*given, "--prompts", "chat.json"), "prompts", "not messages")


# --------------------------------------------------------------------------------------------------------- refusals

BRIGHT = ["--reward", "brightness"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--class", "boots"], ["class: got 'boots'", "t-shirt", "did you mean boot?"]),
        (["--prompt", "boots"], ["prompt: got 'boots'", "t-shirt"]),
        (["--class", "boot", "--prompt", "bag"], ["one of --class, --prompt and --prompts"]),
        (["--tuned", ".", "--w", "much"], ["--w", "number"]),
        (["--tuned", ".", "--w", "nan"], ["w: got nan"]),
        (["--w", "2"], ["w: got 2.0", "--tuned"]),
        (["--tuned", "absent"], ["tuned: got 'absent'"]),
        (["--sampler", "fk", *BRIGHT, "--set", "num_particles=0"], ["num_particles: got 0"]),
        (["--sampler", "fk"], ["reward: got None", "fk"]),
        (["--sampler", "fk", *BRIGHT, "--eta", "0"], ["eta: got 0.0", "above 0", "fk"]),
        (["--sampler", "dts", *BRIGHT, "--set", "correct=perhaps"], ["correct", "true, false"]),
        (["--sampler", "svdd", *BRIGHT, "--set", "lookahead=magic"], ["lookahead", "rollouts:M"]),
        (["--sampler", "svdd", *BRIGHT, "--set", "lookahead=rollouts:0"], ["lookahead", "rollouts:M"]),
        (["--sampler", "svdd", *BRIGHT, "--set", "lookahead=none"], ["lookahead: got 'none'"]),
        (["--eta", "1.5"], ["eta: got 1.5"]),
        (["--steps", "0"], ["steps: got 0"]),
        (["--guidance-scale", "inf"], ["guidance_scale: got inf"]),
        (["--gradient", "1"], ["gradient", "--reward"]),
        (["--reward", "sentiment"], ["reward: got 'sentiment'", "images"]),
        (["--reward", "brightness - 0.1*length"], ["reward: got 'length'", "images"]),
        (["--temperature", "0.5"], ["temperature: got 0.5", "draws images"]),
        (["--until", "."], ["until", "draws images"]),
        (["--edit", "v.safetensors"], ["edit", "draws images"]),
        (["--stream"], ["stream", "draws images"]),
        (["--lineage", "x.png"], ["lineage: got 'x.png'", "fk"]),
        (["--tree", "x.png", "--sampler", "fk", *BRIGHT], ["tree: got 'x.png'", "dts"]),
        (["--previews", "x.png", "--sampler", "fk", *BRIGHT], ["previews: got 'x.png'", "svdd"]),
        (["--class", "bag", "--class", "boot", "--sampler", "fk", *BRIGHT, "--lineage", "x.png"], ["one prompt"]),
        (["--previews", "steer.png"], ["png", "files that differ"]),
        (["--png", "."], ["png", "not a folder"]),
    ],
)
def test_mistakes_are_told_before_the_model_loads(
    draw: Any, no_model: None, arguments: list[str], words: list[str]
) -> None:
    refused(draw(*arguments), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--png", "x.png"], ["png: got 'x.png'", "writes text"]),
        (["--class", "boot"], ["class: got ['boot']", "writes text"]),
        (["--eta", "0.5"], ["eta", "writes text"]),
        (["--reward", "brightness"], ["reward: got 'brightness'", "texts"]),
        (["--tuned", "."], ["steer.json"]),
        (["--block", "0"], ["block: got 0"]),
    ],
)
def test_a_language_model_takes_no_options_for_images(
    steer: Steer, tiny_lm_dir: Path, no_model: None, arguments: list[str], words: list[str]
) -> None:
    refused(steer("generate", "--model", tiny_lm_dir, "--prompt", "hello", *arguments), *words)


def test_mistakes_that_the_model_tells(draw: Any) -> None:
    refused(draw("--reward", "class:boots"), "boots", "t-shirt")
    refused(draw(*BRIGHT, "--reward", "compressibility", "--gradient", "1"), "gradient")
    refused(draw("--steps", 5000), "steps: got 5000", "1000")
    Path("elsewhere").mkdir()
    refused(draw("--tuned", "elsewhere"), "tuned", "elsewhere")


def test_other_commands_want_a_language_model(steer: Steer, no_model: None) -> None:
    refused(
        steer("eval", "strength", "--model", "fashion-ddpm", "--edit", "x", "--prompts", "y", "--out", "z"),
        "language model",
    )
    refused(steer("train", "vector", "--model", "fashion-ddpm", "--pairs", "x", "--out", "z"), "language model")


# --------------------------------------------------------------------------------------------------------- policies


def test_a_tuned_diffusion_model_guides(steer: Steer, draw: Any) -> None:
    train = ("train", "policy", "--model", "fashion-ddpm", "--method", "pg", "--class", "boot", *BRIGHT)
    small = {"rounds": 1, "steps": 1, "num_steps": 2, "group_size": 2, "batch_size": 1, "measured": 2}
    more = [text for key, value in small.items() for text in ("--set", f"{key}={value}")]
    done = steer(*train, *more, "--out", "policy", "--keep-work")
    assert done.code == 0 and "policy for fashion-ddpm" in done.out and done.out.endswith("wrote policy\n")
    assert Path("policy.work").is_dir()
    assert "method pg" in steer("show", "policy").out
    assert draw("--class", "boot", "--png", "base.png").code == 0
    assert draw("--class", "boot", "--png", "same.png", "--tuned", "policy", "--w", 0).code == 0
    assert np.array_equal(picture("base.png"), picture("same.png"))
    guided = draw("--class", "boot", "--tuned", "policy", "--w", 3)
    assert guided.code == 0 and "6 nfe" in guided.out
    assert steer("generate", "--model", "policy", "--class", "boot", "--steps", 2).code == 0


def test_a_tuned_language_model_guides(steer: Steer, tiny_lm_dir: Path) -> None:
    pytest.importorskip("trl")
    rows = [{"prompt": "hello", "completion": "the sun"}, {"prompt": "a cat", "completion": "sings"}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = ("train", "policy", "--model", tiny_lm_dir, "--out", "policy")
    rate = ("--set", "learning_rate=0.01")
    done = steer(*train, "--method", "sft", "--data", "rows.jsonl", "--lora-rank", 2, "--set", "steps=2", *rate)
    assert done.code == 0 and "lora_rank 2" in done.out and not Path("policy.work").exists()
    ask = ("generate", "--model", tiny_lm_dir, "--prompt", "hello", "--max-new-tokens", 4, "--seed", 1)
    found = json.loads(steer(*ask, "--tuned", "policy", "--json").out)
    assert found["prompts"][0]["samples"][0]["kl"] > 0
    refused(steer("generate", "--model", "fashion-ddpm", "--tuned", "policy"), "policy", "fingerprint")


def test_mistakes_in_training_a_policy(steer: Steer, tiny_lm_dir: Path, no_model: None) -> None:
    pytest.importorskip("trl")
    Path("rows.jsonl").write_text('{"prompt": "hello"}\n')
    Path("prompts.json").write_text('["hello"]')
    text = ("train", "policy", "--model", tiny_lm_dir, "--out", "policy")
    images = ("train", "policy", "--model", "fashion-ddpm", "--out", "policy")
    refused(steer(*text, "--method", "pg"), "method", "grpo")
    refused(steer(*text, "--method", "sft", "--data", "rows.jsonl"), "data line 1", "completion")
    refused(steer(*text, "--method", "sft"), "data: got None")
    refused(steer(*text, "--method", "sft", "--prompts", "prompts.json"), "prompts", "unset for sft")
    refused(steer(*text, "--method", "grpo", "--prompts", "prompts.json"), "reward: got None")
    refused(steer(*text, "--method", "sft", "--data", "rows.jsonl", "--beta", -1), "beta: got -1")
    refused(steer(*text, "--method", "sft", "--data", "rows.jsonl", "--set", "epoch=1"), "did you mean epochs?")
    refused(steer(*text, "--method", "grpo", "--class", "boot"), "class", "writes text")
    refused(steer(*images, "--method", "sft"), "method", "dpo, seppo, pg")
    refused(steer(*images, "--method", "pg", "--class", "boot"), "reward: got None")
    refused(steer(*images, "--method", "dpo", "--class", "boots", *BRIGHT), "class: got 'boots'")
    refused(steer(*images, "--method", "dpo", "--data", "absent"), "data", "pairs.jsonl")
    refused(steer(*images, "--method", "pg", *BRIGHT, "--set", "share=2"), "share: got '2'")
    refused(steer(*images, "--method", "pg", "--reward", "sentiment"), "reward: got 'sentiment'")
    refused(steer("train", "policy", "--model", "fashion-ddpm", "--out", ".", "--method", "pg", *BRIGHT), "out")


def test_methods_are_listed_and_learn_from_every_kind_of_data(
    steer: Steer, tiny_lm_dir: Path, tiny_bert_dir: Path
) -> None:
    """Ranked lists of a folder of data files, samples with rewards and options of pieces, and a masked model."""
    pytest.importorskip("datasets")
    from steer.train.objectives.registry import METHODS

    listed = steer("train", "policy", "--list").out
    assert all(any(line.startswith(name) for line in listed.split("\n")) for name in METHODS)
    small = ("--set", "steps=1", "--set", "max_new_tokens=4", "--set", "group_size=2", "--set", "batch_size=2")
    train = ("train", "policy", "--model", tiny_lm_dir, *small, "--lora-rank", 2)
    Path("ranked").mkdir()
    rows = [{"prompt": "hello", "completions": ["a sun", "the rain"], "scores": [1.0, 0.0]}] * 3
    Path("ranked/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert steer(*train, "--method", "copg", "--data", "ranked", "--out", "copg").code == 0
    Path("rows.jsonl").write_text('{"prompt": "hello", "answer": "sun"}\n{"prompt": "the day", "answer": "day"}\n')
    tuned = ("--data", "rows.jsonl", "--reward", "answer + 0.01*length", "--out", "dapo")
    done = steer(*train, "--method", "dapo", *tuned, "--set", "clip_high=0.3", "--set", "schedule=uniform")
    assert done.code == 0 and "method dapo" in done.out and Path("dapo/report.png").is_file()
    assert json.loads(Path("dapo/steer.json").read_text())["recipe"]["options"]["clip_high"] == 0.3
    Path("solved.jsonl").write_text('{"prompt": "the", "solution": "sun is good"}\n')
    masked = ("train", "policy", "--model", tiny_bert_dir, "--method", "inpaint", *small)
    given = ("--data", "solved.jsonl", "--reward", "keywords:good", "--out", "filled")
    assert steer(*masked, *given).code == 0
    assert steer("generate", "--model", "filled", "--prompt", "the", "--max-new-tokens", 4).code == 0
    refused(steer(*masked, "--prompts", "absent.json", "--out", "x"), "reward")
    refused(steer(*train, "--method", "dapo", *tuned, "--set", "clip_hihg=1"), "did you mean clip_high")
    refused(steer(*train, "--method", "knapsack", *tuned, "--set", "driver=native"), "driver", "rows for knapsack")


# ----------------------------------------------------------------------------------------------------- the embedded one


def test_the_embedded_model_can_be_trained_again(steer: Steer, tmp_path: Path) -> None:
    from test_train_images import bars, write_idx

    write_idx(tmp_path / "data", "train", *bars(128, 0))
    write_idx(tmp_path / "data", "t10k", *bars(20, 1))
    train = ("train", "images", "--data", "data", "--steps", 1)
    refused(steer(*train, "--out", "data"), "out", "empty folder")
    refused(steer("train", "images", "--data", "absent", "--out", "made"), "absent")
    done = steer(*train, "--out", "made", "--set", "epochs=1", "--set", "measured=1")
    assert done.code == 0 and "classes: t-shirt" in done.out and not Path("made.work").exists()
    assert steer("generate", "--model", "made", "--class", "bag", "--steps", 1).code == 0


def test_shown_and_listed(steer: Steer) -> None:
    assert "fashion-ddpm  diffusion" in steer("models", "list").out
    shown = steer("show", "fashion-ddpm").out
    assert "classes: t-shirt, trouser" in shown and "sha256" not in shown
    Path("empty").mkdir()
    refused(steer("show", "empty"), "steer.json")


def test_recipes_know_the_options(steer: Steer, tmp_path: Path) -> None:
    recipe = tmp_path / "boots.yaml"
    settings = "{model: fashion-ddpm, class: [boot, bag], steps: 2, eta: 1, png: boots.png, seed: 0}"
    recipe.write_text(f"command: generate\nsettings: {settings}\n")
    assert steer("run", recipe, "class=[dress]", "steps=3").code == 0
    assert picture("boots.png").shape[1] == 90
    refused(steer("run", recipe, "clas=boot"), "clas", "did you mean class?")
    refused(steer("run", recipe, "class=boots"), "class: got 'boots'")
    with pytest.raises(InputError, match="class_"):
        build(COMMANDS["generate"], {"model": "m", "class_": "boot"}, "here")
    made: Any = load_recipe("fashion-ddpm", ["data=elsewhere"]).steps[0]
    assert made.command == "train images" and made.options.data == Path("elsewhere") and made.options.steps == 3900

"""The Python face: the ten commonest tasks in one to three lines each, and what a person sees of results."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import steer
from steer.core import InputError
from steer.toy import TabularProcess

PAIRS = [
    {"positive": f"a {w} dog", "negative": f"a {v} cat"}
    for w, v in (("good", "bad"), ("happy", "sad"), ("nice", "awful"), ("calm", "loud"))
]
PROMPTS = ["the sun", "hello world"]


@pytest.fixture(scope="module")
def calm(tiny_lm: Any) -> Any:
    return steer.train_vector(tiny_lm, PAIRS)


# ------------------------------------------------------------------------------------------------------- the ten tasks


def test_a_vector_from_pairs_and_its_use(tiny_lm: Any, tmp_path: Path) -> None:
    calm = steer.train_vector(tiny_lm, PAIRS)
    steered = tiny_lm.generate("the sun", edits=calm(2.5), max_new_tokens=8, temperature=0)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    read = steer.train_vector(tiny_lm, tmp_path / "pairs.jsonl")
    assert all(torch.equal(read.tensors[name], calm.tensors[name]) for name in calm.tensors) and read.card == calm.card
    with pytest.raises(InputError, match="pairs"):
        steer.train_vector(tiny_lm, tmp_path / "absent.jsonl")
    assert steered.texts != tiny_lm.generate("the sun", max_new_tokens=8, temperature=0).texts


def test_some_layers_and_generated_tokens_only(tiny_lm: Any, calm: Any) -> None:
    edit = calm(0.15, layers=range(1, 2), scope="generated")
    assert sorted(edit.directions) == [1] and edit.strength == 0.15
    assert edit.scope == steer.SteeringVector({0: torch.ones(2)}, scope="generated").scope
    same = calm(0.15, layers="1", scope="generated")
    assert tiny_lm.generate(PROMPTS, edits=edit, seed=0).tokens == tiny_lm.generate(PROMPTS, edits=same, seed=0).tokens


def test_a_dose_response_picture(tiny_lm: Any, calm: Any, tmp_path: Path) -> None:
    report = steer.evaluate(tiny_lm, PROMPTS, calm, strengths=[-0.2, 0.2], reward="length", max_new_tokens=6)
    steer.draw_report(report, tmp_path / "report.png")
    assert len(repr(report)) < 200 and "reward" in report._repr_html_() and "vector for" in calm._repr_html_()
    assert [row.strength for row in report.of("steered")] == [-0.2, 0.0, 0.2]
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_a_reward_of_ones_own(tiny_lm: Any) -> None:
    best = tiny_lm.generate("the sun", sampler="best-of-n", n=8, reward=lambda texts: [len(t) for t in texts], seed=0)
    assert len(best.texts[0]) == max(map(len, best.pool.texts))


def test_save_and_load(tiny_lm: Any, calm: Any, tmp_path: Path) -> None:
    calm.save(tmp_path / "calm.safetensors")
    loaded = steer.load_artifact(tmp_path / "calm.safetensors")
    want = tiny_lm.generate(PROMPTS, edits=calm(0.3), seed=0).tokens
    assert tiny_lm.generate(PROMPTS, edits=loaded(0.3), seed=0).tokens == want
    assert tiny_lm.generate(PROMPTS, edits=f"{tmp_path}/calm.safetensors:0.3", seed=0).tokens == want


def test_prompts_of_a_file_with_resume(tiny_lm: Any, tmp_path: Path) -> None:
    source, whole, part = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "part.jsonl"))
    prompts = ["the sun", "hello", [{"role": "user", "content": "why"}], "a dog", "a cat"]
    source.write_text("".join(json.dumps({"prompt": p, "id": i}) + "\n" for i, p in enumerate(prompts)))
    settings: dict[str, Any] = {"n": 2, "max_new_tokens": 5, "reward": "length", "batch": 2}
    assert steer.generate_file(tiny_lm, source, whole, **settings) == 5
    lines = whole.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["prompt"] for line in lines] == prompts
    job = (tmp_path / "whole.jsonl.job.json").read_bytes()
    for kept in (0, 1, 3, 5):  # a run that was killed left whole lines and half of one
        (tmp_path / "part.jsonl.job.json").write_bytes(job)
        part.write_bytes(b"".join(lines[:kept]) + b"".join(lines[kept : kept + 1])[:20])
        assert steer.generate_file(tiny_lm, source, part, **settings) == 5 - kept
        assert part.read_bytes() == whole.read_bytes()
    for other, said in (({**settings, "n": 3}, "n was '2', now '3'"), ({**settings, "seed": 1}, "seed was 0, now 1")):
        with pytest.raises(InputError, match=said):
            steer.generate_file(tiny_lm, source, part, **other)
    assert part.read_bytes() == whole.read_bytes()
    assert steer.generate_file(tiny_lm, source, part, resume=False, **settings | {"seed": 1}) == 5


def test_a_chat_with_history(tiny_lm: Any) -> None:
    chat = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "nice"},
        {"role": "user", "content": "why"},
    ]
    assert tiny_lm.generate(chat, max_new_tokens=4, seed=0).prompts == [chat]


def test_kl_by_token(tiny_lm: Any, calm: Any) -> None:
    samples = tiny_lm.generate(PROMPTS, edits=calm(1.0), n=2, max_new_tokens=6, seed=0)
    assert [len(t) for t in samples.kl_tokens] == [len(t) for t in samples.tokens]
    # Each is the exact divergence of two laws, summed independently of how `kl` is.
    for row in range(4):
        ids = tiny_lm.encode(PROMPTS[row // 2]) + samples.tokens[row]
        assert float(samples.kl_tokens[row].sum()) == pytest.approx(float(samples.kl[row]), abs=1e-9)
        assert len(ids) > 0 and float(samples.kl_tokens[row].min()) >= 0


def test_three_methods_at_equal_kl(tiny_lm: Any, calm: Any, tmp_path: Path) -> None:
    chosen = [{"sampler": "best-of-n", "n": n} for n in (2, 8)]
    methods = {"calm": [{"edits": calm(s)} for s in (0.5, 2.0)], "best-of-n": chosen, "svdd": [{"sampler": "svdd"}]}
    found = steer.frontier(tiny_lm, PROMPTS, "length", methods, max_new_tokens=6)
    at = found.at_kl(0.4)
    assert list(at) == ["calm", "best-of-n", "svdd"] and at["svdd"] is None
    # By hand: best of 2 and of 8 are log n - (n - 1) / n nats from the base at most (Beirami et al. 2024).
    base, two, eight = (
        next(p for p in found.points if (p.method, p.setting) == key).reward[0]
        for key in (("base", "n 8"), ("best-of-n", "n 2"), ("best-of-n", "n 8"))
    )
    low, high = (math.log(n) - (n - 1) / n for n in (2, 8))
    share = (0.4 - low) / (high - low)
    assert at["best-of-n"] == pytest.approx(two + share * (eight - two)) and base < eight
    assert found.at_kl(50)["best-of-n"] is None and found.points[0].kl[0] == 0
    assert {p.method: p.kl_kind.split(":")[0] for p in found.points} == {
        "base": "exact",
        "calm": "exact",
        "best-of-n": "bound",
        "svdd": "none",
    }
    steer.draw_frontier(found, tmp_path / "frontier.png")
    axis = Figure().subplots()
    steer.draw_frontier(found, ax=axis)
    ends = [end for bars in axis.collections for part in bars.get_segments() for end in part[:, 0]]
    assert min(ends) >= 0 and any("2 prompts are few" in text.get_text() for text in axis.texts)  # no KL is below 0
    *rows, weak, strong, few = found.table().splitlines()
    assert len(rows) == 7 and weak.startswith("at KL 0.5: ") and strong.startswith("at KL 2: ") and "few" in few
    assert len(repr(found)) < 120
    for wrong in (["dts"], {"x": []}, {"base": [{}]}):
        with pytest.raises(InputError, match="methods"):
            steer.frontier(tiny_lm, PROMPTS, "length", wrong)


def test_the_shipped_sweeps_weigh_and_choose(tiny_lm: Any) -> None:
    found = steer.frontier(tiny_lm, PROMPTS, "length", n=4, max_new_tokens=4, block=2)
    assert found.methods == ["best-of-n", "fk"]
    assert all(p.kl is not None and p.kl[0] > 0 for p in found.of("best-of-n")[1:])
    assert [p.kl_kind for p in found.of("fk")[1:]] == ["population"] * 3


def test_images_by_fk_and_a_grid(tmp_path: Path) -> None:
    model = _image_model()
    samples = model.generate("boot", sampler="fk", num_particles=4, reward="brightness", num_inference_steps=4, seed=0)
    assert len(samples) == 4 and samples.images[0].size == (8, 8) and samples[0].image.size == (8, 8)
    samples.save(tmp_path / "boots")
    assert sorted(p.name for p in (tmp_path / "boots").iterdir()) == [
        *(f"{i:03}.png" for i in range(4)),
        "samples.json",
    ]
    with pytest.raises(steer.SteerError, match=r"\.images"):
        _ = samples.texts
    assert samples._repr_html_().count("data:image/png;base64,") == 4 and "boot, bag" in model._repr_html_()


def test_a_policy_of_ones_own() -> None:
    """A network that is no language model: its law under best-of-n and FK is that of the same chain as a table."""
    torch.manual_seed(0)
    network = nn.Embedding(4, 3)  # logits after each of three tokens, and after none

    def logits(prefix: torch.Tensor) -> torch.Tensor:
        return network(prefix[:, -1] if prefix.shape[1] else torch.full((len(prefix),), 3))

    process = steer.FunctionProcess(logits, length=3)
    samples = steer.generate(process, "", n=5, seed=0)
    assert len(samples) == 5 and samples.kl_kind == "exact" and len(samples[0].output) == 3
    law = network.weight.detach().double().softmax(-1)
    chain = TabularProcess(law[3], law[:3], 3)
    for sampler, settings in ((None, {"n": 64}), (steer.FKSteering(64), {}), (steer.BestOfN(8), {})):
        reward = lambda rows: torch.as_tensor([float(sum(r)) for r in rows])  # noqa: E731
        ours = steer.generate(process, "", sampler=sampler, reward=reward, seed=1, **settings)
        theirs = steer.generate(chain, "", sampler=sampler, reward=lambda x: x.sum(1).double(), seed=1, **settings)
        assert ours.outputs == theirs.outputs.tolist()
        assert torch.allclose(ours.log_prob, theirs.log_prob, atol=1e-6)  # the network is in float32


def test_a_policy_that_ends_reads_prompts_and_writes_words() -> None:
    def logits(prefix: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        wanted = torch.tensor([0 if prompt == "yes" else 1 for prompt in prompts])
        return torch.nn.functional.one_hot(wanted if prefix.shape[1] < 2 else torch.full_like(wanted, 2), 3) * 100.0

    process = steer.FunctionProcess(logits, length=5, end=2, words=["a", "b", "."])
    samples = steer.generate(process, ["yes", "no"], n=2, seed=0)
    assert samples.texts == ["aa", "aa", "bb", "bb"] and float(samples.log_prob.abs().max()) < 1e-9
    with pytest.raises(InputError, match="logits"):
        steer.generate(steer.FunctionProcess(lambda prefix: torch.zeros(1, 3), length=2), "", n=2)


def _image_model() -> Any:
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=2,
    )
    model = steer.load(network, scheduler=DDPMScheduler(), name="tiny", classes=["boot", "bag"])
    assert repr(model).startswith("DiffusionModel('tiny'") and len(repr(model)) < 120
    return model


# ------------------------------------------------------------------------------------------------ one call, one meaning


def test_edits_for_all_or_one_list_for_each(tiny_lm: Any, calm: Any) -> None:
    up, down = calm(2.0), calm(-2.0)
    settings: dict[str, Any] = {"seed": 0, "max_new_tokens": 6, "temperature": 0}
    each = [tiny_lm.generate(p, edits=e, **settings).texts[0] for p, e in zip(PROMPTS, (up, down), strict=True)]
    assert tiny_lm.generate(PROMPTS, edits=[[up], [down]], **settings).texts == each
    both = [tiny_lm.generate(p, edits=[up, calm(-1.0)], **settings).texts[0] for p in PROMPTS]
    assert tiny_lm.generate(PROMPTS, edits=[[up, calm(-1.0)]] * 2, **settings).texts == both
    for given in ([up, down], (up, down), [up, None], [None, [up]][:1], [[up], down], "nosuch.safetensors:0.1", 3, [3]):
        with pytest.raises(InputError):
            tiny_lm.generate(PROMPTS, edits=given, **settings)
    with pytest.raises(InputError, match=r"\[\[a\], \[b\]\]"):
        tiny_lm.generate(PROMPTS, edits=[up, down])


def test_artifacts_are_edits(tiny_lm: Any, calm: Any) -> None:
    settings: dict[str, Any] = {"seed": 0, "max_new_tokens": 6}
    want = tiny_lm.generate("the sun", edits=calm(0.15), **settings).tokens
    assert tiny_lm.generate("the sun", edits=calm, **settings).tokens == want  # the card's own dose
    assert (calm * 2).strength == pytest.approx(0.3) and (-calm).strength == pytest.approx(-0.15)
    assert (
        tiny_lm.generate("the sun", edits=calm - calm, **settings).tokens
        == tiny_lm.generate("the sun", **settings).tokens
    )
    tensors, card = calm
    assert calm.tensors is tensors and card.kind == "vector"
    for edit in (calm(0.2), calm):
        assert len(repr(edit)) < 120 and "layers" in repr(edit)
    with pytest.raises(InputError, match="option of a vector"):
        calm(0.2, layer=3)


def test_arithmetic_of_artifacts_and_edits(tiny_lm: Any, calm: Any) -> None:
    settings: dict[str, Any] = {"seed": 0, "max_new_tokens": 6}
    want = tiny_lm.generate("the sun", edits=calm(0.3), **settings).tokens
    halves = (calm + calm, calm * 0.5 + calm * 1.5, calm / 2 + calm(0.225), calm(0.15) + calm, sum([calm, calm(0.15)]))
    for edit in (*halves, calm(0.6) / 2, calm(0.45) - calm, 2 * calm):
        assert tiny_lm.generate("the sun", edits=edit, **settings).tokens == want
    for wrong in (lambda: calm + 1, lambda: calm(0.1) + "calm", lambda: 1 + calm):
        with pytest.raises(TypeError):
            wrong()


def test_pairs_are_rows_or_two_texts(tiny_lm: Any, calm: Any) -> None:
    pairs = [(row["positive"], row["negative"]) for row in PAIRS]
    for given in (pairs, [list(pair) for pair in pairs], tuple(pairs)):
        made = steer.train_vector(tiny_lm, given)
        assert made.card == calm.card and torch.equal(made.tensors["direction.0"], calm.tensors["direction.0"])
    columns = {"positive": ["a", "b"], "negative": ["c", "d"]}
    for wrong in (["a good dog", "a bad cat"], columns, [("a", "b", "c")] * 2, [("a", 1)] * 2, [None] * 2, []):
        with pytest.raises(InputError, match="pairs"):
            steer.train_vector(tiny_lm, wrong)  # type: ignore[arg-type]


def test_one_prompt_is_one_prompt_wherever_prompts_are_measured(tiny_lm: Any, calm: Any) -> None:
    report = steer.evaluate(tiny_lm, "the sun", calm, strengths=[0.1], reward="length", max_new_tokens=3)
    listed = steer.evaluate(tiny_lm, ["the sun"], calm, strengths=[0.1], reward="length", max_new_tokens=3)
    assert [row.tokens for row in report.rows] == [row.tokens for row in listed.rows]
    with pytest.raises(InputError, match="at least 2"):
        steer.frontier(tiny_lm, "the sun and the rain", "length")


def test_what_is_no_setting_is_told_by_its_place(tiny_lm: Any, calm: Any) -> None:
    with pytest.raises(InputError, match=r"FKSteering\(num_particles=16\)"):
        tiny_lm.generate("the sun", sampler=steer.FKSteering, reward="length")
    with pytest.raises(InputError, match=r"^generate\(\)"):
        tiny_lm.generate("the sun", max_length=9)
    with pytest.raises(InputError, match="strength"):
        calm("0.1")


def test_a_top_level_generate_takes_models_and_processes(tiny_lm: Any) -> None:
    want = tiny_lm.generate("the sun", seed=0, max_new_tokens=5).texts
    assert steer.generate(tiny_lm, "the sun", seed=0, max_new_tokens=5).texts == want
    assert steer.generate(tiny_lm.process(max_new_tokens=5), "the sun", seed=0).texts == want
    with pytest.raises(InputError, match="max_new_tokens"):
        steer.generate(tiny_lm.process(), "the sun", max_new_tokens=5)
    with pytest.raises(InputError, match=r"steer\.load"):
        steer.generate("smollm2-135m", "the sun")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- names of other libraries


def test_other_names_for_the_same(tiny_lm: Any) -> None:
    want = tiny_lm.generate("the sun", n=3, max_new_tokens=5, seed=1).tokens
    assert tiny_lm.generate("the sun", num_return_sequences=3, max_tokens=5, seed=1).tokens == want
    greedy = tiny_lm.generate("the sun", temperature=0, max_new_tokens=5).tokens
    assert tiny_lm.generate("the sun", do_sample=False, max_new_tokens=5).tokens == greedy
    system = tiny_lm.generate("the sun", edits=steer.SystemPrompt("you are calm"), seed=0, max_new_tokens=5).tokens
    assert tiny_lm.generate("the sun", system="you are calm", seed=0, max_new_tokens=5).tokens == system
    particles = tiny_lm.generate("the sun", sampler=steer.FKSteering(num_particles=4), reward="length", seed=0).tokens
    assert tiny_lm.generate("the sun", sampler="fk", num_particles=4, reward="length", seed=0).tokens == particles


@pytest.mark.parametrize(
    "given, said",
    [
        ({"max_tokens": 3, "max_new_tokens": 4}, "max_new_tokens"),
        ({"generator": torch.Generator()}, "seed"),
        ({"do_sample": True, "temperature": 0}, "do_sample"),
        ({"num_beams": 4}, "BestOfN"),
        ({"temprature": 1.0}, "did you mean temperature?"),
        ({"prompt": "hi"}, "prompts"),
        ({"num_particles": 4}, "FKSteering"),
        ({"sampler": "bestofn"}, "did you mean best-of-n?"),
        ({"sampler": "fk", "num_particle": 4, "reward": "length"}, "did you mean"),
        ({"max_length": 9}, "max_new_tokens"),
        ({"n": 2, "num_return_sequences": 2}, "num_return_sequences"),
        ({"do_sample": "no"}, "do_sample"),
    ],
)
def test_names_that_mean_something_else_are_told(given: dict[str, Any], said: str, tiny_lm: Any) -> None:
    with pytest.raises(InputError) as refused:
        tiny_lm.generate("the sun", **given)
    assert said in str(refused.value)


def test_the_signature_has_every_setting(tiny_lm: Any) -> None:
    import inspect
    from dataclasses import fields

    from steer.adapters.language.decoding import Decoding
    from steer.adapters.language.model import TextModel, TextSettings
    from steer.methods.samplers import SAMPLERS, sampler_fields

    names = set(inspect.signature(tiny_lm.generate).parameters)
    assert {f.name for f in fields(Decoding)} <= names
    ours = names - {"prompts", "stream", "more"} | {f for name in SAMPLERS for f in sampler_fields(name)}
    assert ours <= TextSettings.__optional_keys__ and TextModel.generate.__doc__
    assert all(name in TextModel.generate.__doc__ for name in names)


# ------------------------------------------------------------------------------------------------------------- samples


@pytest.fixture(scope="module")
def samples(tiny_lm: Any, calm: Any) -> Any:
    return tiny_lm.generate(PROMPTS, edits=calm(1.0), n=3, reward="length", max_new_tokens=6, seed=0)


def test_samples_are_a_sequence_with_a_best(samples: Any) -> None:
    rows = list(samples)
    assert [s.text for s in rows] == samples.texts and rows[4].prompt == PROMPTS[1]
    assert samples[-1] == rows[5] and samples[1:3].texts == samples.texts[1:3]
    assert [float(r) for r in samples.best.reward] == [max(s.reward for s in rows[:3]), max(s.reward for s in rows[3:])]
    with pytest.raises(IndexError):
        samples[6]
    with pytest.raises(steer.SteerError, match="image"):
        _ = rows[0].image


def test_samples_travel(samples: Any, tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(samples))  # noqa: S301  before anything was read
    assert again.texts == samples.texts and torch.equal(again.kl, samples.kl)
    assert torch.equal(again.kl_tokens[0], samples.kl_tokens[0])
    samples.save(tmp_path)
    written = json.loads((tmp_path / "samples.json").read_text())
    assert written["kl_kind"] == "exact" and written["prompts"][1]["samples"][2]["text"] == samples.texts[5]
    table = pytest.importorskip("pandas") and samples.to_pandas()
    assert list(table.text) == samples.texts and table.groupby("prompt").weight.sum().tolist() == pytest.approx([1, 1])


def test_means_of_a_weighted_population_are_weighted(tiny_lm: Any) -> None:
    made = tiny_lm.generate("the sun", sampler="fk", num_particles=8, reward="length", beta=1.0, seed=0, block=2)
    pool = made if made.pool is None else made.pool
    assert bool((pool.log_weight != 0).any())
    w = torch.softmax(pool.log_weight.double(), 0)
    assert float(pool.mean(pool.reward)) == pytest.approx(float((w * pool.reward).sum()), abs=1e-12)
    assert float(pool.mean_reward()) == float(pool.mean(pool.reward))


def test_what_is_seen_is_short(samples: Any, tiny_lm: Any) -> None:
    assert repr(samples).startswith("Samples(6 texts, 2 prompts") and len(repr(samples)) < 120
    assert repr(tiny_lm).startswith("LanguageModel(") and len(repr(tiny_lm)) < 120
    page = samples._repr_html_()
    assert page.count("<tr>") == 7 and "rgba(" in page and 'title="KL' in page and "Tint" in page
    assert page.count(PROMPTS[0]) == 1 and "<b>weight</b>" not in page and "<b>reward</b>" in page
    assert "blocks" in tiny_lm._repr_html_() and tiny_lm.info.model_type in tiny_lm._repr_html_()


def test_why_there_is_no_kl(tiny_lm: Any) -> None:
    made = tiny_lm.generate("the sun", sampler="svdd", reward="length", seed=0, max_new_tokens=4)
    assert made.kl is None and made.kl_kind.startswith("none: ")
    from steer.methods.value import LogitValue

    guide = steer.ValueGuidance(LogitValue(tiny_lm.process(max_new_tokens=4)), beta=2.0, top_k=8)
    guided = tiny_lm.generate("the sun", edits=guide, seed=0, max_new_tokens=4)
    assert guided.kl_kind == "exact"
    with pytest.raises(steer.UnsupportedError, match="kl_tokens"):
        _ = guided.kl_tokens


def test_scores_of_texts_that_are_there(tiny_lm: Any) -> None:
    assert steer.score(["a b", "a b c"], lambda texts: [len(t) for t in texts]).tolist() == [3, 5]
    with pytest.raises(InputError, match="prompts"):
        steer.score(["a"], "length", prompts=["x", "y"])
    with pytest.raises(InputError, match="outputs"):
        steer.score("a", "length")


# --------------------------------------------------------------------------------------------------- the package itself


def test_everything_that_is_named_is_there_and_loads_late() -> None:
    for name in steer.__all__:
        assert getattr(steer, name) is not None
    code = "import sys, steer; assert not {'torch', 'transformers', 'diffusers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_network_of_ones_own_needs_its_tokenizer() -> None:
    with pytest.raises(InputError, match="tokenizer"):
        steer.load(nn.Linear(2, 2), kind="text")
    with pytest.raises(InputError, match="kind"):
        steer.load(nn.Linear(2, 2), kind="images")


def test_a_strict_type_checker_finds_nothing(tmp_path: Path) -> None:
    """mypy --strict on `public_api.py` against the package as it is installed, and one mistake that it finds."""
    pytest.importorskip("mypy")
    package = Path(steer.__file__).parent
    shutil.copytree(package, tmp_path / "steer", ignore=shutil.ignore_patterns("__pycache__"))
    from steer import adapters

    shutil.copytree(Path(adapters.__path__[0]), tmp_path / "steer" / "adapters", dirs_exist_ok=True)
    shutil.copy(Path(__file__).parent / "public_api.py", tmp_path / "good.py")
    (tmp_path / "bad.py").write_text(
        'import steer\n\nsteer.load("smollm2-135m").generate("a", max_new_tokens="b").text\n'
    )
    others = ",".join(f"{name}.*" for name in ("torch", "numpy", "transformers", "diffusers", "pandas", "PIL", "rich"))
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = True\n[mypy-steer.*]\nfollow_imports = silent\n"
        f"[mypy-{others}]\nfollow_imports = skip\n"
    )

    def checked(name: str) -> str:
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", name]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout

    assert checked("good.py").startswith("Success"), checked("good.py")
    found = checked("bad.py")
    assert "[call-overload]" in found or "[arg-type]" in found or "[typeddict-item]" in found, found


def test_a_classifier_as_reward(tmp_path: Path, tiny_lm: Any) -> None:
    """A pipeline of transformers, by its label, scores as its own network does."""
    from transformers import LlamaConfig, LlamaForSequenceClassification, TextClassificationPipeline

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_lm.tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=1,
        id2label={0: "NEG", 1: "POS"},
        label2id={"NEG": 0, "POS": 1},
    )
    classifier = TextClassificationPipeline(
        model=LlamaForSequenceClassification(config).eval(), tokenizer=tiny_lm.tokenizer, device="cpu"
    )
    reward = steer.as_reward(classifier, "POS")
    plain = copy.copy(tiny_lm.tokenizer)
    plain.chat_template = None
    bare = TextClassificationPipeline(model=classifier.model, tokenizer=plain, device="cpu")
    texts = ["good dog", "bad cat"]
    theirs = [next(x["score"] for x in row if x["label"] == "POS") for row in bare(texts, top_k=None)]
    ours = steer.score(texts, steer.as_reward(bare, "POS"))
    assert ours.exp().tolist() == pytest.approx(theirs, abs=1e-5)  # float32
    assert len(tiny_lm.generate("the sun", sampler="best-of-n", n=2, reward=reward, seed=0)) == 1
    with pytest.raises(InputError, match="POS"):
        tiny_lm.generate("the sun", reward=classifier)
    for wrong in (lambda texts: 3.0, lambda texts: [{"score": 1}] * len(texts), lambda texts: None):
        with pytest.raises(steer.SteerError, match="one number for each"):
            steer.score(texts, wrong)


def test_texts_in_place_of_token_ids_are_told(tiny_lm: Any) -> None:
    for given in ("the sun", ["the sun"]):
        with pytest.raises(InputError, match="encode"):
            tiny_lm.hidden_states(given)

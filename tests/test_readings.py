"""Readings of vectors and probes while texts are drawn, against the plain library's hidden states."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_tools import Running, serving_here, write_vector
from torch import Tensor

import steer
from steer import RawText
from steer.cli import main
from steer.core import InputError, UnsupportedError
from steer.core.readings import StopIf
from steer.methods.operators import Probe
from steer.methods.value import HeadValue, ValueGuidance, ValueHead
from steer.readings import as_readings
from steer.toy import markov_lm

PAIRS = [("a good dog", "a bad cat"), ("happy day", "sad day"), ("nice sun", "awful sun")]
PROMPTS = ["the sun", "tell me about a very good dog and a cat", "a cat"]


@pytest.fixture(scope="module")
def vector(tiny_lm: Any) -> Any:
    return steer.train_vector(tiny_lm, PAIRS)


@pytest.fixture(scope="module")
def probe(tiny_lm: Any) -> Any:
    return steer.train_vector(tiny_lm, PAIRS, method="probe")


@torch.no_grad()
def states(model: Any, ids: list[int], add: dict[int, Tensor] | None = None) -> dict[int, Tensor]:
    """The residual stream `[T, D]` after each block in one pass of the library over one text, with a vector added
    everywhere by hooks of PyTorch's own.
    """
    seen: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        def changed(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + (add or {}).get(layer, torch.zeros(()))
            seen[layer] = hidden[0].clone()
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return changed

    handles = [block.register_forward_hook(hook(layer)) for layer, block in enumerate(model.blocks)]
    model.network(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def along(model: Any, vector: Any, seen: dict[int, Tensor], layers: list[int]) -> Tensor:
    """The formula of a vector's reading `[T]`, written out."""
    total = torch.zeros(len(seen[0]))
    for layer in layers:
        direction = vector.tensors[f"direction.{layer}"].float()
        total += seen[layer] @ (direction / direction.norm()) / model.residual_norms()[layer]
    return total / len(layers)


def odds(probe: Any, seen: dict[int, Tensor]) -> Tensor:
    best = probe.card.metrics["best_layer"]
    return seen[best] @ probe.tensors[f"probe.{best}"].float() + float(probe.tensors[f"bias.{best}"])


def choosing(model: Any, drawn: Any, row: int, values: Tensor) -> Tensor:
    """Those of `values` `[T]`, of prompt and text, at the positions from which the text's tokens were predicted."""
    before = len(model.encode(drawn.prompts[int(drawn.group[row])]))
    return values[before - 1 : before - 1 + len(drawn.tokens[row])]


def ids_of(model: Any, drawn: Any, row: int) -> list[int]:
    return [*model.encode(drawn.prompts[int(drawn.group[row])]), *drawn.tokens[row]]


@pytest.mark.parametrize("steered", [False, True])
def test_readings_are_the_librarys_states_projected(tiny_lm: Any, vector: Any, probe: Any, steered: bool) -> None:
    edits = vector(0.4) if steered else ()
    layers = list(vector().directions)  # those that its card names
    asked = {"calm": vector, "one": vector(0.2, layers="1"), "odds": probe}
    given = {"seed": 3, "max_new_tokens": 7, "n": 3, "eos_token_id": [3, 7, 11, 13]}
    drawn = tiny_lm.generate(PROMPTS, edits=edits, readings=asked, **given)
    assert drawn.tokens == tiny_lm.generate(PROMPTS, edits=edits, **given).tokens  # reading changes nothing
    assert len({len(row) for row in drawn.tokens}) > 1  # some rows end before others
    added = None
    if steered:
        norms = tiny_lm.residual_norms()
        units = {k: vector.tensors[f"direction.{k}"].float() for k in (0, 1)}
        added = {k: 0.4 / len(layers) * norms[k] * v / v.norm() for k, v in units.items()}
    for row in range(len(drawn)):
        seen = states(tiny_lm, ids_of(tiny_lm, drawn, row), {k: added[k] for k in layers} if added else None)
        wanted = {"calm": along(tiny_lm, vector, seen, layers), "one": along(tiny_lm, vector, seen, [1])}
        for name, values in {**wanted, "odds": odds(probe, seen)}.items():
            found = drawn.readings[name][row]
            assert found.shape == (len(drawn.tokens[row]),)
            assert torch.allclose(found, choosing(tiny_lm, drawn, row, values), atol=1e-4), (name, row)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "best-of-n", "n": 4},
        {"sampler": "best-of-n", "n": 4, "reject": 0.3},
        {"sampler": "fk", "num_particles": 4, "block": 2},
        {"sampler": "svdd", "num_candidates": 3, "n": 2},
        {"until": ["."], "block": 3, "n": 2},
    ],
    ids=str,
)
def test_what_samplers_keep_is_read_of_what_they_keep(tiny_lm: Any, probe: Any, settings: dict[str, Any]) -> None:
    reward = lambda texts: [text.count("a") / 4 for text in texts]  # noqa: E731
    drawn = tiny_lm.generate(PROMPTS, readings={"odds": probe}, reward=reward, seed=1, max_new_tokens=8, **settings)
    for samples in filter(None, (drawn, drawn.pool)):
        for row in range(len(samples)):
            values = odds(probe, states(tiny_lm, ids_of(tiny_lm, samples, row)))
            assert torch.allclose(samples.readings["odds"][row], choosing(tiny_lm, samples, row, values), atol=1e-4)


def test_readings_of_prompts_that_are_read_twice(tiny_lm: Any, vector: Any, probe: Any) -> None:
    """A gate runs those prompts again that it fires on; the others keep what was read of them first."""
    best, direction = probe.card.metrics["best_layer"], vector.tensors["direction.1"].float()
    lengths = [len(tiny_lm.encode(prompt)) for prompt in PROMPTS]
    ends = [float(odds(probe, states(tiny_lm, tiny_lm.encode(prompt)))[-1]) for prompt in PROMPTS]
    middle = sum(sorted(ends)[1:]) / 2
    weight, bias = probe.tensors[f"probe.{best}"].float(), float(probe.tensors[f"bias.{best}"])
    gate = steer.Gate(Probe(weight, bias - middle), best)
    edit = steer.SteeringVector({1: direction}, 3.0, unit="raw", gate=gate)
    asked = {"calm": edit, "odds": gate}
    drawn = tiny_lm.generate(PROMPTS, edits=edit, readings=asked, seed=0, max_new_tokens=5)
    fired = [end > middle for end in ends]
    assert sum(fired) == 1
    for row, fires in enumerate(fired):
        seen = states(tiny_lm, ids_of(tiny_lm, drawn, row), {1: 3.0 * direction} if fires else None)
        wanted = {"calm": seen[1] @ (direction / direction.norm()) / tiny_lm.residual_norms()[1]}
        wanted["odds"] = odds(probe, seen) - middle
        for name, values in wanted.items():
            part = values[lengths[row] - 1 : lengths[row] - 1 + len(drawn.tokens[row])]
            assert torch.allclose(drawn.readings[name][row], part, atol=1e-4), (row, name)


def test_readings_of_tokens_that_were_looked_at_before(tiny_lm: Any, probe: Any) -> None:
    """A scalar value head runs its candidates in one pass; the one that is drawn is not run again."""
    torch.manual_seed(0)
    head = ValueHead(tiny_lm.info.width, 8)
    edit = ValueGuidance(HeadValue(head, None), beta=0.5, top_k=5)
    drawn = tiny_lm.generate(PROMPTS, edits=edit, readings={"odds": probe}, seed=0, max_new_tokens=6, n=2)
    for row in range(len(drawn)):
        values = odds(probe, states(tiny_lm, ids_of(tiny_lm, drawn, row)))
        assert torch.allclose(drawn.readings["odds"][row], choosing(tiny_lm, drawn, row, values), atol=1e-4)


def test_a_text_ends_where_its_reading_says_so(tiny_lm: Any, vector: Any) -> None:
    given = {"seed": 5, "max_new_tokens": 12, "n": 3, "temperature": 0.7}
    free = tiny_lm.generate(PROMPTS, readings={"calm": vector}, **given)
    every = torch.cat(free.readings["calm"])
    bound = float(every.quantile(0.15))
    ended = tiny_lm.generate(PROMPTS[:1], readings={"calm": vector}, stop_if=f"calm < {bound}", **given)
    first = tiny_lm.generate(PROMPTS[:1], readings={"calm": vector}, **given)
    cut = 0
    for row, read in enumerate(first.readings["calm"]):
        below = (read < bound).nonzero().flatten().tolist()
        length = below[0] + 1 if below else len(read)
        cut += length < len(read)
        if row == 0:  # rows of a batch share their random numbers only as long as all go on
            assert ended.tokens[0] == first.tokens[0][:length]
    for read, tokens in zip(ended.readings["calm"], ended.tokens, strict=True):
        assert len(read) == len(tokens) and bool((read[:-1] >= bound).all())
        assert float(read[-1]) < bound or len(tokens) == 12 or tokens[-1] in tiny_lm.eos_token_ids
    assert cut > 0


def test_readings_travel_with_their_samples(tiny_lm: Any, vector: Any, tmp_path: Any) -> None:
    vector.save(tmp_path / "bright.safetensors")
    drawn = tiny_lm.generate(PROMPTS, readings=[tmp_path / "bright.safetensors"], max_rows=2, seed=0, max_new_tokens=4)
    (rows,) = drawn.readings.values()
    assert list(drawn.readings) == ["bright"] and len(rows) == 3
    assert torch.equal(drawn[1].readings["bright"], rows[1])
    assert torch.equal(drawn[1:].readings["bright"][1], rows[2])
    assert drawn.to_dict()["prompts"][2]["samples"][0]["readings"]["bright"] == rows[2].tolist()
    assert drawn.to_pandas()["readings.bright"][0] == rows[0].tolist()
    plain = tiny_lm.generate(PROMPTS, seed=0, max_new_tokens=4)
    assert plain.readings is None and "readings" not in plain.to_dict()["prompts"][0]["samples"][0]
    assert plain[0].readings is None and "readings" not in " ".join(plain.to_pandas().columns)
    pieces = tiny_lm.generate(PROMPTS[0], readings=vector, stream=True, seed=0, max_new_tokens=4)
    assert "".join(piece.text for piece in pieces) and len(pieces.samples.readings["vector"][0]) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop_if": "calm < 0"}, "stop_if: got 'calm < 0'; allowed: unset without readings"),
        ({"stop_if": "clam < 0"}, "stop_if: got 'clam'; allowed: calm; did you mean calm?"),
        ({"stop_if": "calm < nan"}, "stop_if: got 'calm < nan'; allowed: one comparison"),
        ({"stop_if": "calm"}, "stop_if: got 'calm'; allowed: one comparison"),
        ({"stop_if": "calm < 0 or calm > 1"}, "stop_if: got"),
        ({"stop_if": 3}, "stop_if: got 3; allowed: one comparison"),
        ({"readings": {"bad name": None}}, "readings: got 'bad name'; allowed: names of letters"),
        ({"readings": {"calm": 3}}, "readings.calm: got 3; allowed: a vector, a probe"),
        ({"readings": {"calm": "nowhere.safetensors"}}, "nowhere.safetensors"),
        ({"readings": {"calm": "nowhere.safetensors:0.3"}}, "readings.calm: got 'nowhere.safetensors:0.3'"),
        ({"readings": {"calm": "x.safetensors:scope=all"}}, "readings.calm: option: got 'scope'; allowed: layers"),
        ({"sampler": "dts", "reward": len}, "readings: tree sampling keeps none of its texts; ancestral, best-of-n"),
    ],
)
def test_bad_readings_are_refused_in_one_line(tiny_lm: Any, vector: Any, given: dict[str, Any], message: str) -> None:
    readings = None if message.endswith("without readings") else {"calm": vector}
    with pytest.raises((InputError, UnsupportedError)) as error:
        tiny_lm.generate(PROMPTS, **{"readings": readings, **given})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_readings_of_what_does_not_fit_are_refused(tiny_lm: Any, vector: Any) -> None:
    for readings, message in (
        ([vector, vector], "two that are called 'vector'"),
        ({"calm": steer.SteeringVector({0: torch.ones(3)})}, "width 32"),
        ({"calm": steer.SteeringVector({9: torch.ones(32)})}, "0 to 1, the blocks of"),
        ({"calm": vector._replace(card=replace(vector.card, model={"width": 7}))}, "readings.calm: got 'made for"),
        ({"calm": vector._replace(card=replace(vector.card, kind="controller"))}, "a controller"),
    ):
        with pytest.raises(InputError, match=message):
            tiny_lm.generate("a", readings=readings)
    with pytest.raises(UnsupportedError, match="readings: TabularProcess gives none"):
        steer.generate(markov_lm(), "a", readings={"calm": vector})
    assert as_readings({}, None, tiny_lm.info) is None


def test_a_rule_is_one_comparison() -> None:
    for text, value, ends in (("a < 1", 1, False), ("a <= 1", 1, True), ("a>-2.5e0", -2.4, True), ("a >= 3", 2, False)):
        assert StopIf.parse(text, ["a"]).met(value) is ends
    assert str(StopIf.parse("a.b-c<1", ["a.b-c"])) == "a.b-c < 1"


# ------------------------------------------------------------------------------------------------------------ servers


CHATS = [[{"role": "user", "content": text}] for text in PROMPTS]


@pytest.fixture(scope="module")
def server(
    tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory, vector: Any, probe: Any
) -> Iterator[tuple[Running, Path]]:
    folder = tmp_path_factory.mktemp("artifacts")
    vector.save(folder / "calm.safetensors")
    probe.save(folder / "odds.safetensors")
    with serving_here(tiny_lm_dir, "--artifacts", folder, "--no-key", "--name", "tiny") as running:
        yield running, folder


def asked(server: Running, chat: Any, steer: dict[str, Any] | None, **more: Any) -> Any:
    given = {"model": "tiny", "messages": chat, "max_tokens": 8, "temperature": 0, **more}
    return server.post("/v1/chat/completions", json=given | ({} if steer is None else {"steer": steer}))


def test_the_servers_readings_are_pythons(server: Any, tiny_lm: Any, vector: Any, probe: Any) -> None:
    """Requests with other readings, other edits and none at all, decoded together; one of them in a stream."""
    running, _ = server
    wishes = [
        {"readings": ["calm", "odds"]},
        {"readings": ["odds"], "edits": [{"name": "calm", "strength": 0.5}]},
        None,
        {"readings": ["odds", "calm"], "edits": [{"name": "calm", "strength": -0.4, "scope": "generated"}]},
    ]
    chats = [CHATS[0], CHATS[1], CHATS[2], CHATS[1]]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(asked, running, c, w, n=2) for c, w in zip(chats, wishes, strict=True)]
        answers = [job.result().json() for job in jobs]
    known = {"calm": vector, "odds": probe}
    for chat, wish, answer in zip(chats, wishes, answers, strict=True):
        if wish is None:
            assert all(choice["steer"] is None for choice in answer["choices"])
            continue
        mine = [known[e["name"]](e["strength"], scope=e.get("scope", "all")) for e in wish.get("edits", ())]
        own = tiny_lm.generate(
            chat, edits=mine, readings={n: known[n] for n in wish["readings"]}, temperature=0, max_new_tokens=8
        )
        for choice in answer["choices"]:
            assert choice["message"]["content"] == own.texts[0] and choice["steer"]["stopped"] is False
            assert list(choice["steer"]["readings"]) == wish["readings"]
            for name, values in choice["steer"]["readings"].items():
                assert torch.allclose(torch.tensor(values), own.readings[name][0], atol=1e-4)
    lines = asked(running, CHATS[0], wishes[0], stream=True).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    last = next(c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["finish_reason"])
    told = answers[0]["choices"][0]["steer"]["readings"]["calm"]
    assert last["steer"]["readings"]["calm"] == pytest.approx(told, abs=1e-4)


def test_a_servers_text_ends_by_a_reading(server: Any, tiny_lm: Any, vector: Any) -> None:
    running, _ = server
    free = tiny_lm.generate(CHATS[1], readings=[vector], temperature=0, max_new_tokens=8).readings["vector"][0]
    at = int(free[1:].argmin()) + 1
    rule = f"calm <= {float(free[at]) + 1e-3}"
    first = int((free <= float(free[at]) + 1e-3).nonzero()[0])
    (choice,) = asked(running, CHATS[1], {"readings": ["calm"], "stop_if": rule}).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["steer"]["stopped"] is True
    assert choice["steer"]["readings"]["calm"] == pytest.approx(free[: first + 1].tolist(), abs=1e-4)
    own = tiny_lm.generate(CHATS[1], readings={"calm": vector}, stop_if=rule, temperature=0, max_new_tokens=8)
    assert choice["message"]["content"] == own.texts[0] and len(own.tokens[0]) == first + 1
    search = {"sampler": "best-of-n", "candidates": 3, "reward": "length", "readings": ["calm"], "stop_if": rule}
    (best,) = asked(running, CHATS[1], search, temperature=1, seed=0).json()["choices"]
    read = best["steer"]["readings"]["calm"]
    bound = float(free[at]) + 1e-3
    assert all(x > bound for x in read[:-1]) and best["steer"]["stopped"] is (read[-1] <= bound)


def test_a_servers_bad_readings_are_refused_by_name(server: Any) -> None:
    running, _ = server
    for given, field, message in (
        ({"readings": ["clam"]}, "steer.readings.0", "a registered artifact: odds, calm"),
        ({"readings": ["calm", "calm"]}, "steer.readings", "each name once"),
        ({"readings": ["../calm"]}, "steer.readings.0", "letters, digits"),
        ({"readings": [{"name": "calm"}]}, "steer.readings.0", ""),
        ({"stop_if": "calm < 1"}, "steer.stop_if", "unset without readings"),
        ({"readings": ["calm"], "stop_if": "odds < 1"}, "steer.stop_if", "calm"),
        ({"readings": ["calm"], "stop_if": "calm < nan"}, "steer.stop_if", "one comparison"),
        ({"readings": ["calm"], "sampler": "dts", "reward": "length"}, "steer.readings", "unset with sampler dts"),
        ({"reading": ["calm"]}, "steer.reading", ""),
    ):
        answer = asked(running, CHATS[0], given)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == field, answer.text
        assert message in error["message"]


def test_the_command_reads_and_ends_texts(
    tiny_lm_dir: Path, tiny_lm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_vector(tmp_path / "calm.safetensors", tiny_lm.info)
    line = ["generate", "--model", str(tiny_lm_dir), "--dtype", "float32", "--prompt", "the sun", "--temperature", "0"]
    line += ["--max-new-tokens", "8", "--seed", "0", "--raw"]
    given = {"temperature": 0, "max_new_tokens": 8}
    own = tiny_lm.generate(RawText("the sun"), readings={"calm": file, "late": f"{file}:layers=1"}, **given)
    read = ["--reading", str(file), "--reading", f"late={file}:layers=1"]
    assert main([*line, *read, "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["prompts"][0]["samples"]
    assert sample["text"] == own.texts[0] and sample["readings"].keys() == {"calm", "late"}
    for name, values in own.readings.items():
        assert sample["readings"][name] == pytest.approx(values[0].tolist(), abs=1e-5)
    assert main([*line, *read]) == 0
    assert f"late {float(own.readings['late'][0].mean()):.3f}" in capsys.readouterr().out
    rule = f"late >= {float(own.readings['late'][0].max()):.6f}"
    assert main([*line, *read, "--stop-if", rule.replace(rule[8:], f"{float(rule[8:]) - 1e-4:.6f}"), "--json"]) == 0
    (ended,) = json.loads(capsys.readouterr().out)["prompts"][0]["samples"]
    end = int(own.readings["late"][0].argmax()) + 1
    assert len(ended["readings"]["late"]) == end
    for wrong, said in (
        ([*read, "--reading", str(file)], "reading: got"),
        (["--stop-if", "calm < 1"], "stop_if: got 'calm < 1'; allowed: unset without readings"),
        ([*read, "--stop-if", "cal < 1"], "did you mean calm?"),
        (["--reading", f"{file}:0.5"], "a reading has no strength"),
        (["--reading", "nowhere.safetensors"], "nowhere.safetensors"),
        ([*read, "--sampler", "dts", "--reward", "length"], "reading: got 'with dts'"),
    ):
        assert main([*line, *wrong]) == 2
        told = capsys.readouterr().err.strip()
        assert said in told and len(told.splitlines()) == 1


def test_a_data_set_is_read_row_by_row(tiny_lm: Any, tmp_path: Path) -> None:
    file = write_vector(tmp_path / "calm.safetensors", tiny_lm.info)
    rows = [{"id": str(i), "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    given = {"temperature": 0, "max_new_tokens": 6}
    for row, found in zip(rows, tiny_lm.map(rows, readings={"calm": file}, **given), strict=True):
        own = tiny_lm.generate(row["prompt"], readings={"calm": file}, **given)
        (sample,) = found["samples"]
        assert sample["readings"]["calm"] == pytest.approx(own.readings["calm"][0].tolist(), abs=1e-5)

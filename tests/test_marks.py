"""Scopes that go by tokens of the reply, against passes of the whole text with hooks of these tests."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from serving_tools import serving

import steer
from steer import RawText, SteeringVector, artifacts
from steer.adapters.transformers import tracking
from steer.artifacts import Card
from steer.core import InputError
from steer.core.scope import Marks, Scope

PROMPTS = [RawText("the sun"), RawText("a very good dog runs and sings , says"), RawText("why is it not loud")]
SCOPES = ["inside:{},{}", "outside:{},{}"]


def vector(model: Any, scope: str, strength: float = 4.0) -> SteeringVector:
    generator = torch.Generator().manual_seed(5)
    directions = {layer: torch.randn(model.info.width, generator=generator) for layer in (0, 1)}
    return SteeringVector(directions, strength, unit="raw", scope=scope).normalised()


def saved(path: Path, model: Any, **settings: Any) -> Path:
    """The same vector as an artifact."""
    made = vector(model, "reply")
    tensors = {f"direction.{layer}": direction for layer, direction in made.directions.items()}
    card = Card("vector", model.info.entry(), list(made.directions), {"strength": 4.0, "unit": "raw", **settings})
    artifacts.save(path, tensors, card)
    return path


def law(model: Any, ids: Sequence[int], prompt: int, edit: SteeringVector | None) -> torch.Tensor:
    """Log-probabilities `[T, V]` after each token of a text, from one pass without a cache."""
    hooks = []
    if edit is not None:
        opening, closing = (model.tokenizer.convert_tokens_to_ids(t) for t in edit.scope.marked.split(","))
        opened, acts = False, []
        for position, token in enumerate(ids):
            opened = token == opening or (opened and token != closing)
            acts.append(position >= prompt - 1 and opened is edit.scope.inside)
        for layer, direction in edit.directions.items():
            added = edit.strength * torch.tensor(acts)[:, None] * direction
            block = model.network.model.layers[layer]
            hooks.append(block.register_forward_hook(lambda block, given, out, added=added: out + added))
    with torch.inference_mode():
        found = model.network(torch.tensor([list(ids)]), use_cache=False).logits[0].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    return found


def by_hand(model: Any, prompt: Any, edit: SteeringVector | None, new: int) -> list[int]:
    ids = list(model.encode(prompt))
    start = len(ids)
    for _ in range(new):
        ids.append(int(law(model, ids, start, edit)[-1].argmax()))
    return ids[start:]


def sums(model: Any, prompt: Any, tokens: Sequence[int], edit: SteeringVector | None) -> float:
    ids = list(model.encode(prompt))
    found = law(model, [*ids, *tokens], len(ids), edit)
    return float(sum(found[len(ids) + i - 1, token] for i, token in enumerate(tokens)))


@pytest.fixture(scope="module")
def marks(tiny_lm: Any) -> tuple[str, str]:
    """Two tokens that its texts are full of."""
    drawn = tiny_lm.generate(PROMPTS, n=8, max_new_tokens=20, seed=3).tokens
    counts = torch.bincount(torch.tensor([t for row in drawn for t in row]), minlength=60)
    counts[:4] = 0
    first, second = counts.topk(2).indices.tolist()
    words = tiny_lm.tokenizer.convert_ids_to_tokens([first, second])
    return words[0], words[1]


def greedy(model: Any, prompts: Any, edit: Any, **more: Any) -> Any:
    return model.generate(prompts, edits=edit, temperature=0, max_new_tokens=16, eos_token_id=(), **more)


@pytest.mark.parametrize("scope", SCOPES)
def test_greedy_texts_are_those_of_whole_passes(tiny_lm: Any, scope: str) -> None:
    """Rows of unequal lengths in one batch, for marks that the steered texts themselves hold, and for rare ones."""
    changes = 0
    plain = greedy(tiny_lm, PROMPTS, ()).tokens
    words = {token for row in plain for token in row if token > 3}
    pairs = [(a, b) for a in sorted(words) for b in sorted(words) if a != b][:12]
    for pair in pairs:
        edit = vector(tiny_lm, scope.format(*tiny_lm.tokenizer.convert_ids_to_tokens(list(pair))))
        drawn = greedy(tiny_lm, PROMPTS, edit).tokens
        assert drawn == [by_hand(tiny_lm, prompt, edit, 16) for prompt in PROMPTS]
        always = greedy(tiny_lm, PROMPTS, vector(tiny_lm, "reply")).tokens
        changes += drawn != plain and drawn != always
    assert changes > 3, "the scope made a difference to both"


@pytest.mark.parametrize("scope", SCOPES)
def test_drawn_texts_have_the_probability_of_whole_passes(tiny_lm: Any, marks: Any, scope: str) -> None:
    """Several rows of each prompt, their drift, and one edit beside another that goes by numbers."""
    edit = vector(tiny_lm, scope.format(*marks), 1.5)
    prompts = PROMPTS[:2]
    drawn = tiny_lm.generate(prompts, edits=edit, n=5, max_new_tokens=14, seed=9)
    for i, tokens in enumerate(drawn.tokens):
        prompt = prompts[int(drawn.group[i])]
        own, base = sums(tiny_lm, prompt, tokens, edit), sums(tiny_lm, prompt, tokens, None)
        scored = tiny_lm.scorer(len(tokens), edit, 1).score_tokens([tiny_lm.encode(prompt)], [tokens])[0]
        assert float(scored[0]) == pytest.approx(own, abs=1e-4)
        if drawn.kl_kind == "sampled":
            assert float(drawn.kl[i]) == pytest.approx(own - base, abs=1e-4)
    both = [edit, vector(tiny_lm, "first:2", -2.0)]
    each = tiny_lm.generate(prompts, edits=[both, [edit]], temperature=0, max_new_tokens=10)
    alone = [
        tiny_lm.generate(p, edits=e, temperature=0, max_new_tokens=10)
        for p, e in zip(prompts, (both, edit), strict=True)
    ]
    assert each.tokens == [a.tokens[0] for a in alone]


def test_what_is_open_goes_with_its_row(tiny_lm: Any, marks: Any) -> None:
    """Rows that read different tokens, wait, are forked, read several tokens at once and are joined with others."""
    edit = vector(tiny_lm, SCOPES[0].format(*marks))
    opening, closing = (tiny_lm.tokenizer.convert_tokens_to_ids(word) for word in marks)
    ids = [tiny_lm.encode(p) for p in PROMPTS]
    rows = [(list(row), len(row)) for row in ids]

    def read(rows: Any, *fed: Sequence[int]) -> Any:
        return [([*text, *new], length) for (text, length), new in zip(rows, fed, strict=True)]

    def same(track: Any, rows: Any) -> None:
        for logits, (text, length) in zip(track.logits, rows, strict=True):
            assert (logits.log_softmax(-1) - law(tiny_lm, text, length, edit)[-1]).abs().max() < 1e-4

    track, _ = tracking.start(tiny_lm.body, ids, [(edit, None)], 1, hidden=False)
    for column in ([opening, 8, closing], [9, opening, opening]):
        track, _ = tracking.advance(track, torch.tensor(column))
        rows = read(rows, *([token] for token in column))
        same(track, rows)
    track, _ = tracking.advance(track, torch.tensor([closing, 10, 11]), torch.tensor([False, True, True]))
    rows = read(rows, [], [10], [11])
    same(track, rows)
    index = [2, 0, 0, 1]
    fork, forked = tracking.fork(track, torch.tensor(index)), [rows[i] for i in index]
    track, _ = tracking.advance(track, torch.tensor([closing] * 3))
    rows = read(rows, *[[closing]] * 3)
    same(track, rows)
    same(fork, forked)
    tokens = torch.tensor([[opening, closing], [closing, opening], [opening, 12], [closing, 13]])
    fork = tracking.replay(fork, tokens, torch.tensor([[True, True], [False, True], [True, True], [False, True]]))
    forked = read(forked, [opening, closing], [opening], [opening, 12], [13])
    same(fork, forked)
    both, all_rows = tracking.stack([track, fork]), [*rows, *forked]
    same(both, all_rows)
    column = [8, opening, 9, 10, closing, 11, 12]
    both, _ = tracking.advance(both, torch.tensor(column))
    same(both, read(all_rows, *([token] for token in column)))


def test_a_template_may_open_the_part_itself(tiny_lm: Any) -> None:
    opened, closed = RawText("hello calm the sun"), RawText("hello calm loud the sun")
    for prompt, scope, acts in (
        (opened, "inside:calm,loud", True),
        (opened, "outside:calm,loud", False),
        (closed, "inside:calm,loud", False),
        (closed, "outside:calm,loud", True),
    ):
        edit = vector(tiny_lm, scope, 30.0)
        drawn = greedy(tiny_lm, prompt, edit).tokens[0]
        assert drawn == by_hand(tiny_lm, prompt, edit, 16)
        assert (drawn[0] == greedy(tiny_lm, prompt, ()).tokens[0][0]) is not acts


def test_lookahead_reads_each_candidate(tiny_lm: Any, marks: Any) -> None:
    """A pass over candidates of the next token, each of which may open or close the part, then the text goes on."""
    edit = vector(tiny_lm, SCOPES[0].format(*marks))
    body, ids = tiny_lm.body, [tiny_lm.encode(p) for p in PROMPTS]
    opening, closing = (tiny_lm.tokenizer.convert_tokens_to_ids(word) for word in marks)
    candidates = torch.tensor([[opening, closing, 8, 9]] * len(ids))
    track, _ = tracking.start(body, ids, [(edit, None)], 1, hidden=True)
    tracking.look(track, candidates)
    for taken, follows in ((0, 11), (1, 12), (2, 13)):
        copy = tracking.fork(track, torch.arange(len(ids)))
        moved, calls = tracking.advance(copy, candidates[:, taken])
        assert calls == 0
        moved, _ = tracking.advance(moved, torch.full((len(ids),), follows))
        for row, prompt in enumerate(ids):
            text = [*prompt, int(candidates[row, taken]), follows]
            wanted = law(tiny_lm, text, len(prompt), edit)[-1]
            assert (moved.logits[row].log_softmax(-1) - wanted).abs().max() < 1e-4


def test_a_server_writes_what_generate_writes(tiny_lm: Any, tiny_lm_dir: Path, marks: Any, tmp_path: Path) -> None:
    """Requests with different scopes in one crowd."""
    folder = tmp_path / "store"
    saved(folder / "calm.safetensors", tiny_lm)
    scopes = ["reply", *(scope.format(*marks) for scope in SCOPES), "inside:calm,loud", "first:3"]
    with serving(tiny_lm_dir, "--name", "tiny", "--artifacts", folder) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        def asked(scope: str) -> str:
            answer = client.completions.create(
                model="tiny",
                prompt="the sun",
                temperature=0,
                max_tokens=16,
                extra_body={"steer": {"edits": [{"name": "calm", "scope": scope}]}},
            )
            return answer.choices[0].text.strip()

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(asked, [scope for scope in scopes for _ in range(2)]))
        wanted = [
            tiny_lm.generate(RawText("the sun"), edits=vector(tiny_lm, scope), temperature=0, max_new_tokens=16).texts[
                0
            ]
            for scope in scopes
            for _ in range(2)
        ]
        assert found == [text.strip() for text in wanted] and len(set(found)) > 2
        for scope, said in (("thinking", "<think>"), ("inside:calm", "inside:OPEN,CLOSE"), ("answers", "thinking")):
            with pytest.raises(Exception, match="scope") as error:
                asked(scope)
            assert said in str(error.value) and "400" in str(error.value)


def test_names() -> None:
    for text in ("thinking", "answer", "outside-tools", "inside:<a>,</a>", "outside:.,;"):
        scope = Scope.parse(text)
        assert scope.name == text and Scope.parse(scope.name) == scope
    for wrong in ("inside", "inside:", "inside:a", "inside:a,", "outside:,b", "inside:a,a", "think", "within:a,b"):
        with pytest.raises(InputError, match="scope"):
            Scope.parse(wrong)


def test_marks_are_found_in_the_tokenizer() -> None:
    vocabulary = {"<think>": 7, "</think>": 8, "<tool_call>": 9, "</tool_call>": 10, "[THINK]": 11, "[/THINK]": 12}
    assert Scope.parse("thinking").marks(vocabulary.get) == Marks((7, 11), (8, 12), True)
    assert Scope.parse("answer").marks(vocabulary.get) == Marks((7, 11), (8, 12), False)
    assert Scope.parse("outside-tools").marks(vocabulary.get) == Marks((9,), (10,), False)
    assert Scope.parse("reply").marks(vocabulary.get) is None
    with pytest.raises(InputError, match="'<tool_call>' and '</tool_call>'"):
        Scope.parse("outside-tools").marks({"<tool_call>": 9}.get)


def test_thinking_answers_and_tool_calls(tiny_lm: Any, tiny_lm_dir: Path, tmp_path: Path) -> None:
    """The same network with a tokenizer that calls four of its words as models that think and call tools do."""
    folder = tmp_path / "thinks"
    shutil.copytree(tiny_lm_dir, folder)
    words = {"calm": "<think>", "loud": "</think>", "what": "<tool_call>", "where": "</tool_call>"}
    text = (folder / "tokenizer.json").read_text()
    for word, mark in words.items():
        text = text.replace(f'"{word}"', f'"{mark}"')
    (folder / "tokenizer.json").write_text(text)
    thinks = steer.load(folder, dtype="float32", device="cpu")
    for prompt in ("the sun calm", "the sun what", "the sun calm a dog loud"):
        theirs = " ".join(words.get(word, word) for word in prompt.split())
        for scope, same in (
            ("thinking", "inside:calm,loud"),
            ("answer", "outside:calm,loud"),
            ("outside-tools", "outside:what,where"),
        ):
            found = greedy(thinks, RawText(theirs), vector(thinks, scope)).tokens
            assert found == greedy(tiny_lm, RawText(prompt), vector(tiny_lm, same)).tokens


def test_a_model_without_marks_is_refused_before_anything_runs(tiny_lm: Any, tmp_path: Path) -> None:
    for scope in ("thinking", "answer", "outside-tools", "inside:calm,nowhere"):
        with pytest.raises(InputError, match="scope"):
            tiny_lm.process().edited(vector(tiny_lm, scope))
    path = saved(tmp_path / "calm.safetensors", tiny_lm, scope="inside:calm,loud")
    assert str(steer.load_edit(path).scope) == "inside:calm,loud"
    assert str(steer.edits.parse_edit(f"{path}:0.5:scope=outside:calm,loud:layers=0", model=tiny_lm).scope) == (
        "outside:calm,loud"
    )

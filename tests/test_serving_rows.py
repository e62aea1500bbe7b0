"""Parts of the server's engine: drawing by rows, growing text, rows in slots, turns."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from steer import artifacts
from steer.adapters.language.texts import GrowingText, token_text
from steer.adapters.transformers import tracking
from steer.adapters.transformers.model import LanguageModel
from steer.adapters.transformers.serving import rowwise
from steer.adapters.transformers.serving.batch import Batch, BatchRow
from steer.adapters.transformers.serving.engine import TransformersEngine
from steer.adapters.transformers.serving.turns import FairShare, Stretches
from steer.artifacts import Card
from steer.core import RawText
from steer.edits import load_edit
from steer.methods.operators import Probe
from steer.methods.value import HeadValue, QHead, ValueGuidance, ValueHead
from steer.methods.vector import Gate, SteeringVector
from steer.serving.artifact_store import digest
from steer.serving.engine import Delta, Load, NamedEdit, Sampling, Steering, Task, TooLargeError
from steer.serving.wire import EditRequest

# ----------------------------------------------------------------------------------------------------------- drawing


def laws(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(rows, vocabulary, generator=generator) * 3, -1)


def test_rows_draw_what_they_draw_alone() -> None:
    law = laws(6, 40)
    settings = [Sampling(temperature=t) for t in (0, 1, 0.5, 1, 0, 2)]
    together = rowwise.draw(law, settings, [rowwise.generator(7, i) for i in range(6)])
    alone = [rowwise.draw(law[i : i + 1], settings[i : i + 1], [rowwise.generator(7, i)]) for i in range(6)]
    assert together.tolist() == [int(token) for token in alone]
    assert together[0] == law[0].argmax() and together[4] == law[4].argmax()


def test_draws_follow_the_law() -> None:
    """Chi-square of 4000 draws against the law of 5 tokens; the bound is the 99.99% point at 4 degrees of freedom."""
    law = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.08, 0.02]]))
    generator = rowwise.generator(3, 0)
    drawn = Counter(int(rowwise.draw(law, [Sampling()], [generator])) for _ in range(4000))
    expected = (law.exp()[0] * 4000).tolist()
    assert sum((drawn[i] - e) ** 2 / e for i, e in enumerate(expected)) < 23.5


def test_penalties_are_openais() -> None:
    logits = torch.zeros(2, 6)
    settings = [Sampling(frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((5, -100.0),)), Sampling()]
    out = rowwise.penalised(logits, settings, [Counter({1: 3, 2: 1}), Counter({1: 9})])
    assert out[0].tolist() == [0, -1.75, -0.75, 0, 0, -100] and out[1].tolist() == [0] * 6
    assert logits.eq(0).all()


# -------------------------------------------------------------------------------------------------------------- text


def characters(tokens: Any) -> str:
    """Tokens are bytes: characters of several bytes come in pieces."""
    return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain words", "naïve — 你好 🙂!", "a🙂🙂b"])
def test_text_grows_by_whole_characters(text: str) -> None:
    growing = GrowingText(characters)
    pieces = [growing.feed(byte) for byte in text.encode()]
    assert "".join(pieces) + growing.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_broken_characters_are_shown_in_the_end() -> None:
    growing = GrowingText(characters)
    assert growing.feed(0xF0) == "" and growing.feed(0x9F) == ""
    assert growing.finish() == "\ufffd"


def test_stop_strings_are_never_shown_and_what_might_begin_one_waits() -> None:
    growing = GrowingText(characters, ["<end>", "\n\n"])
    shown = [growing.feed(byte) for byte in b"a<e b\n<end> c"]
    assert "".join(shown) + growing.finish() == "a<e b\n" and growing.stopped
    assert shown[:5] == ["a", "", "", "<e ", "b"], "what cannot become a stop string is shown at once"


def test_an_unfinished_stop_string_is_text() -> None:
    growing = GrowingText(characters, ["<end>"])
    assert "".join(growing.feed(byte) for byte in b"a<en") == "a"
    assert growing.finish() == "<en"


def test_bytes_of_a_token_that_is_part_of_a_character() -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return {1: "\ufffd", 2: "\ufffd", 3: "é"}[ids[0]]

        def convert_ids_to_tokens(self, token: int) -> str:
            return {1: "<0xE2>", 2: "ðŁ", 3: "Ã©"}[token]

    assert [token_text(Tokenizer(), t)[1] for t in (1, 2, 3)] == [(0xE2,), (0xF0, 0x9F), (0xC3, 0xA9)]


# ------------------------------------------------------------------------------------------------------------- slots


def vector(model: LanguageModel, seed: int, layers: tuple[int, ...] = (0, 1), **settings: Any) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    made = {layer: torch.randn(model.info.width, generator=generator) for layer in layers}
    return SteeringVector(made, **{"strength": 1.0, "unit": "raw", **settings})


def edits_of_all_kinds(model: LanguageModel) -> list[list[Any]]:
    probe = Probe(torch.randn(32, generator=torch.Generator().manual_seed(5)), 0.0)
    head = QHead(32, 8, horizon=9)
    torch.nn.init.normal_(head.outer.weight, generator=torch.Generator().manual_seed(2))
    guided = ValueGuidance(HeadValue(head.eval(), model.info.unembedding()), beta=0.2)
    return [
        [],
        [vector(model, 1)],
        [vector(model, 2, scope="generated")],
        [vector(model, 3, scope="from:12")],
        [vector(model, 4, operator="ablate"), vector(model, 1, layers=(1,))],
        [vector(model, 5, keep_norm=True)],
        [vector(model, 6, gate=Gate(probe, 0))],
        [guided],
        [vector(model, 7, operator="clamp"), guided],
    ]


def test_rows_that_come_and_go_write_what_they_write_alone(tiny_lm: LanguageModel) -> None:
    """Prompts, edits, lengths and settings differ; rows join at every step and leave at their own time."""
    prompts = ["the sun", "a very good dog runs and sings , says the cat", "hello", "we like the calm night and rain"]
    kinds = edits_of_all_kinds(tiny_lm)
    batch, results, waiting = Batch(tiny_lm), {}, []
    for i in range(27):
        edits, prompt, new = kinds[i % 9], prompts[i % 4], 3 + (i * 7) % 17
        waiting.append((i, prompt, edits, new))
    order = list(waiting)
    while waiting or batch.rows:
        if waiting:
            i, prompt, edits, new = waiting.pop(0)
            hidden = [(e, None) for e in edits if not isinstance(e, ValueGuidance)]
            guided = tuple(e for e in edits if isinstance(e, ValueGuidance))
            track, _ = tracking.start(tiny_lm.body, [tiny_lm.encode(prompt)], hidden, 1, hidden=bool(guided))
            row = BatchRow(
                tiny_lm, Sampling(temperature=0, max_tokens=new), i, 0, edits=guided, taken=lambda *new: None
            )
            results[i] = row
            with torch.inference_mode():
                batch.join([row], track, [0])
        with tiny_lm.hooks.installed(range(2)):
            batch.step()
    for i, prompt, edits, new in order:
        alone = tiny_lm.generate(prompt, edits=edits, temperature=0, max_new_tokens=new, seed=0)
        assert results[i].tokens == alone.tokens[0], (i, edits)
        assert results[i].text == alone.texts[0]
    assert batch.nbytes == 0, "an empty batch keeps no cache"


def test_rows_that_are_dropped_leave_the_others_as_they_are(tiny_lm: LanguageModel) -> None:
    """Rows let go between steps, so that others take their places in mid-text, plain and steered and guided."""
    kinds = edits_of_all_kinds(tiny_lm)
    batch, rows = Batch(tiny_lm), []
    for i in range(9):
        hidden = [(e, None) for e in kinds[i] if not isinstance(e, ValueGuidance)]
        guided = tuple(e for e in kinds[i] if isinstance(e, ValueGuidance))
        track, _ = tracking.start(tiny_lm.body, [tiny_lm.encode("a very good dog")], hidden, 1, hidden=bool(guided))
        rows.append(
            BatchRow(tiny_lm, Sampling(temperature=0, max_tokens=12), i, 0, edits=guided, taken=lambda *new: None)
        )
        with torch.inference_mode():
            batch.join([rows[-1]], track, [0])
    dropped = (0, 3, 4, 7)
    for at in range(12):
        batch.drop(lambda row, at=at: row.choice in dropped[:at])
        batch.step()
    for i in set(range(9)) - set(dropped):
        alone = tiny_lm.generate("a very good dog", edits=kinds[i], temperature=0, max_new_tokens=12, seed=0)
        assert rows[i].tokens == alone.tokens[0], kinds[i]


def test_a_row_that_overflows_harms_nobody(tiny_lm: LanguageModel) -> None:
    """NaN in one row: that row fails, its neighbours and whoever takes its slot write what they write alone."""
    batch = Batch(tiny_lm)
    told: list[BatchRow] = []

    def join(prompt: str, edits: list[Any]) -> BatchRow:
        track, _ = tracking.start(tiny_lm.body, [tiny_lm.encode(prompt)], [(e, None) for e in edits], 1, hidden=False)
        row = BatchRow(tiny_lm, Sampling(temperature=0, max_tokens=12), 0, 0, taken=lambda row, *_: told.append(row))
        with torch.inference_mode():
            batch.join([row], track, [0])
        return row

    broken = join("a very good dog runs and sings", [vector(tiny_lm, 1, strength=1e38, scope="from:8")])
    neighbour = join("the sun", [])
    while not broken.ended:
        batch.step()
    assert broken.error is not None and "smaller strengths" in str(broken.error)
    later = join("hello", [])
    while batch.rows:
        batch.step()
    for row, prompt in ((neighbour, "the sun"), (later, "hello")):
        assert row.tokens == tiny_lm.generate(prompt, temperature=0, max_new_tokens=12).tokens[0]


def test_measured_rows_know_their_drift(tiny_lm: LanguageModel) -> None:
    """Exact KL and log-probability of guided, truncated rows, against those of the process."""
    guided = edits_of_all_kinds(tiny_lm)[7]
    batch = Batch(tiny_lm)
    track, _ = tracking.start(tiny_lm.body, [tiny_lm.encode(RawText("the sun"))], (), 1, hidden=True)
    sampling = Sampling(temperature=0, top_k=5, max_tokens=8)
    row = BatchRow(tiny_lm, sampling, 0, 0, edits=tuple(guided), measured=True, taken=lambda *new: None)
    batch.join([row], track, [0])
    while batch.rows:
        batch.step()
    settings: dict[str, Any] = {"temperature": 0, "top_k": 5, "max_new_tokens": 8}
    alone = tiny_lm.generate(RawText("the sun"), edits=guided, **settings)
    assert row.tokens == alone.tokens[0]
    assert row.kl == pytest.approx(float(alone.kl[0]), rel=1e-4) and row.kl > 0.01
    assert row.log_prob == pytest.approx(float(alone.log_prob[0]), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- turns


def test_stretches_run_one_at_a_time_and_stop_where_they_are() -> None:
    seen: list[str] = []
    main = threading.get_ident()

    def work(name: str) -> Any:
        def run(pause: Any) -> None:
            assert threading.get_ident() != main
            try:
                for i in range(3):
                    seen.append(f"{name}{i}")
                    pause()
            finally:
                seen.append(f"{name} out")

        return run

    a, b = Stretches(work("a")), Stretches(work("b"))
    a.resume(), b.resume(), a.resume()
    assert seen == ["a0", "b0", "a1"]
    a.stop()
    assert a.over and seen[-1] == "a out"
    while not b.over:
        b.resume()
    assert seen[4:] == ["b1", "b2", "b out"]


def test_time_is_shared_by_weight_and_idle_time_earns_nothing() -> None:
    share, spent = FairShare(0.2), [0.0, 0.0]
    for _ in range(500):  # the second queue is away: nothing is saved up for it
        assert share.pick((True, False)) == 0
        share.charge(0, 1.0)
    for i in range(2000):
        queue = share.pick((True, True))
        assert queue is not None
        seconds = 1.0 if queue == 0 else 0.3 + (i % 3) / 10
        share.charge(queue, seconds)
        spent[queue] += seconds
    assert spent[1] / sum(spent) == pytest.approx(0.2, abs=0.01)
    assert share.pick((False, False)) is None


# ------------------------------------------------------------------------------------------------------------ engine


def answers(engine: TransformersEngine, tasks: list[Task]) -> list[dict[int, str]]:
    """The texts of tasks that run at once, by choice."""

    async def one(task: Task) -> dict[int, str]:
        texts: dict[int, str] = {}
        async for event in engine.run(engine.prepare(task)):
            if isinstance(event, Delta):
                texts[event.choice] = texts.get(event.choice, "") + event.text
        return texts

    async def all_of_them() -> list[dict[int, str]]:
        return await asyncio.gather(*(one(task) for task in tasks))

    return asyncio.run(all_of_them())


def greedy(prompts: list[str], n: int = 1, new: int = 10, edit: NamedEdit | None = None) -> Task:
    steering = None if edit is None else Steering(edits=(edit,))
    return Task(tuple(prompts), n, Sampling(temperature=0, max_tokens=new), steering)


def test_models_with_windows_are_served_one_request_at_a_time(tiny_lm: LanguageModel) -> None:
    """Layers that forget share no cache; requests for such a model take turns and write what they write alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma3_text",
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=70,
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=3,
    )
    model = LanguageModel(AutoModelForCausalLM.from_config(config), tiny_lm.tokenizer, "windows")
    engine = TransformersEngine(model)
    try:
        prompts = [["the sun"], ["a very good dog runs and sings , says the cat", "hello"]]
        assert not engine.prepare(greedy(prompts[0])).shares
        texts = answers(engine, [greedy(prompts[0], n=2), greedy(prompts[1])])
    finally:
        engine.close()
    alone = model.generate([*prompts[0], *prompts[1]], temperature=0, max_new_tokens=10).texts
    assert texts == [{0: alone[0], 1: alone[0]}, {0: alone[1], 1: alone[2]}]


def test_values_that_look_ahead_are_served(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    """A scalar value head sees every candidate in one pass over a cache of its own."""
    head = ValueHead(32, 8)
    torch.nn.init.normal_(head.outer.weight, generator=torch.Generator().manual_seed(2))
    path = tmp_path / "ahead.safetensors"
    card = Card("value", tiny_lm.info.entry(), [], {"beta": 0.1, "top_k": 5}, {"head": "v"})
    artifacts.save(path, head.state_dict(), card)
    named = NamedEdit(path, digest(path), EditRequest(name="ahead"))
    engine = TransformersEngine(tiny_lm)
    try:
        texts = answers(
            engine, [greedy(["the sun"], n=2, edit=named), greedy(["hello"]), greedy(["hello"], edit=named)]
        )
    finally:
        engine.close()
    edit = load_edit(path, model=tiny_lm)
    guided = tiny_lm.generate(["the sun", "hello"], edits=edit, temperature=0, max_new_tokens=10).texts
    plain = tiny_lm.generate("hello", temperature=0, max_new_tokens=10).texts[0]
    assert texts == [{0: guided[0], 1: guided[0]}, {0: plain}, {0: guided[1]}] and plain != guided[1]


def test_more_than_fits_waits_its_turn(tiny_lm: LanguageModel) -> None:
    engine = TransformersEngine(tiny_lm, max_rows=4, cache_tokens=120)
    try:
        texts = answers(engine, [greedy(["the sun"], n=1 + i % 3) for i in range(12)])
        with pytest.raises(TooLargeError, match="n:"):
            engine.prepare(greedy(["the sun"], n=5))
        with pytest.raises(TooLargeError, match="max_tokens:"):
            engine.prepare(greedy(["the sun"], n=4, new=60))
    finally:
        engine.close()
    alone = tiny_lm.generate("the sun", temperature=0, max_new_tokens=10).texts[0]
    assert texts == [dict.fromkeys(range(1 + i % 3), alone) for i in range(12)]


def test_those_who_stay_when_others_leave(tiny_lm: LanguageModel) -> None:
    """Clients leave a crowd in mid-answer; the rest get what they get alone."""
    engine = TransformersEngine(tiny_lm)

    async def one(i: int) -> str:
        text = ""
        task = Task(("the sun",), 1 + i % 2, Sampling(temperature=0, max_tokens=14), stream=True)
        async with aclosing(engine.run(engine.prepare(task))) as events:
            async for event in events:
                if isinstance(event, Delta) and event.choice == 0:
                    text += event.text
                    if i % 3 == 1 and len(text) > 2 * i:
                        return "left"
        return text

    async def crowd() -> list[str]:
        return await asyncio.gather(*(one(i) for i in range(20)))

    try:
        texts = asyncio.run(asyncio.wait_for(crowd(), 60))
    finally:
        engine.close()
    alone = tiny_lm.generate("the sun", temperature=0, max_new_tokens=14).texts[0]
    assert {text for i, text in enumerate(texts) if i % 3 != 1} == {alone} and "left" in texts


def test_work_that_nobody_reads_stops(tiny_lm: LanguageModel) -> None:
    engine = TransformersEngine(tiny_lm)

    async def leave() -> None:
        endless = Task(("the sun",), 4, Sampling(max_tokens=110, logit_bias=((3, -100.0),)), stream=True)
        events = engine.run(engine.prepare(endless))
        async for event in events:
            if isinstance(event, Delta):
                break
        await events.aclose()
        for _ in range(500):
            if engine.load() == Load():
                return
            await asyncio.sleep(0.01)

    try:
        asyncio.run(leave())
        assert engine.load() == Load()
        assert answers(engine, [greedy(["the sun"])])[0][0]
    finally:
        engine.close()

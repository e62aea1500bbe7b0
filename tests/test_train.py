"""Training: recovered directions, layer weights that learn, returns by hand, and resuming to the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor, nn

from steer import artifacts
from steer.adapters.transformers.learning import read_prefix, reply_logits
from steer.adapters.transformers.model import LanguageModel
from steer.core import InputError, Reward, Samples
from steer.edits import load_edit
from steer.gguf import save_gguf
from steer.methods.controller import Controller, ControllerNetwork
from steer.methods.value import HeadValue, QHead, ValueGuidance
from steer.train.controller import train_controller
from steer.train.loop import fit
from steer.train.value import td_lambda_returns, train_value
from steer.train.vector import METHODS, VectorSettings, train_vector

PAIRS = [
    {"positive": f"the {thing} is very {up} .", "negative": f"the {thing} is very {down} ."}
    for thing in ("sun", "rain", "day", "night", "dog", "cat", "house", "tree")
    for up, down in (("good", "bad"), ("happy", "sad"), ("nice", "awful"))
]
POSITIVE = [f"tell me how the {x} is {y}" for x in ("sun", "rain", "day", "dog") for y in ("bad", "awful", "sad")]
NEGATIVE = [f"tell me how the {x} is {y}" for x in ("sun", "rain", "day", "dog") for y in ("good", "nice", "happy")]


# ------------------------------------------------------------------------------------------------------------ vectors


def planted(noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """States of 2 layers and 40 pairs that differ along one known direction of each layer `[2, D]`."""
    g = torch.Generator().manual_seed(seed)
    direction = nn.functional.normalize(torch.randn(2, 24, generator=g), dim=-1)
    shared = torch.randn(2, 40, 24, generator=g)
    up = shared + direction.unsqueeze(1) * 2 + noise * torch.randn(2, 40, 24, generator=g)
    down = shared - direction.unsqueeze(1) * 2 + noise * torch.randn(2, 40, 24, generator=g)
    return up, down, direction


@pytest.mark.parametrize("method", ["mean", "pca"])
def test_methods_recover_a_planted_direction(method: str) -> None:
    up, down, direction = planted(0.3)
    found, _ = METHODS[method](up, down, 1.0)
    assert bool((nn.functional.cosine_similarity(found, direction, dim=-1) > 0.99).all())


def test_probe_separates_where_the_planted_direction_does() -> None:
    """A discriminant need not point along the mean difference (it weighs the spread); it must tell the sides apart."""
    up, down, _ = planted(0.3)
    found, bias = METHODS["probe"](up, down, 1.0)
    assert bias is not None
    score = torch.einsum("lnd,ld->ln", torch.cat([up, down], 1), found) + bias.unsqueeze(1)
    assert bool((score[:, :40] > 0).all()) and bool((score[:, 40:] < 0).all())


def test_mean_is_the_difference_of_means_and_pca_is_not_centred() -> None:
    up, down, _ = planted(0.0)
    assert torch.allclose(METHODS["mean"](up, down, 1.0)[0], up.mean(1) - down.mean(1), atol=1e-5)
    # Without noise every difference is the same vector: centred PCA would find nothing at all.
    found = METHODS["pca"](up, down, 1.0)[0]
    assert torch.allclose(found, (up - down)[:, 0], atol=1e-4)


def test_probe_is_the_optimum_of_its_loss() -> None:
    up, down, _ = planted(2.5)
    w, b = METHODS["probe"](up, down, 1.0)
    x = torch.cat([up, down], 1).double()
    y = torch.cat([torch.ones(40), -torch.ones(40)]).double()
    spread = x.std(1).clamp_min(1e-6)
    assert b is not None
    score = torch.einsum("lnd,ld->ln", x, w.double()) + b.double().unsqueeze(1)
    pull = -y * torch.sigmoid(-y * score)
    center = x.mean(1, keepdim=True)
    gradient = torch.einsum("ln,lnd->ld", pull, (x - center) / spread.unsqueeze(1)) + w.double() * spread
    assert float(gradient.abs().max()) < 1e-3 and float(pull.sum(1).abs().max()) < 1e-3


def test_train_vector_reads_the_right_states(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    tensors, card = train_vector(tiny_lm, PAIRS, pool="last", layers="1")
    from steer.core import RawText

    ends: dict[str, list[Tensor]] = {"positive": [], "negative": []}
    for row in PAIRS:
        for side, seen in ends.items():
            ids = torch.tensor([tiny_lm.encode(RawText(row[side]))])
            with torch.no_grad():
                out = tiny_lm.trunk(ids, output_hidden_states=True)
            seen.append(out.hidden_states[1][0, -1])
    want = torch.stack(ends["positive"]).mean(0) - torch.stack(ends["negative"]).mean(0)
    assert torch.allclose(tensors["direction.0"], want, atol=1e-4)
    assert card.kind == "vector" and card.data["rows"] == len(PAIRS) and card.model["width"] == 32
    path = tmp_path / "v.safetensors"
    artifacts.save(path, tensors, card)
    plain = tiny_lm.generate("the sun", seed=0)
    steered = tiny_lm.generate("the sun", edits=load_edit(path, 3.0), seed=0)
    assert steered.tokens != plain.tokens
    again = tiny_lm.generate("the sun", edits=load_edit(path, 3.0), seed=0)
    assert again.tokens == steered.tokens and torch.equal(again.log_prob, steered.log_prob)


def test_probe_artifacts_gate(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    artifacts.save(tmp_path / "p.safetensors", *train_vector(tiny_lm, PAIRS, method="probe", pool="last"))
    edit = load_edit(tmp_path / "p.safetensors", 2.0, gate=str(tmp_path / "p.safetensors"), gate_layer=1)
    assert edit.reads == (1,)
    edit = load_edit(tmp_path / "p.safetensors", 2.0, tokens=str(tmp_path / "p.safetensors"))
    assert len(tiny_lm.generate("the sun", edits=edit, seed=0)) == 1
    rotated = load_edit(tmp_path / "p.safetensors", 40.0, operator="rotate", scope="reply")
    assert len(tiny_lm.generate("the sun", edits=rotated, seed=0)) == 1


@pytest.mark.parametrize(
    ("pairs", "settings", "message"),
    [
        ([], {}, "pairs: got '0 rows'"),
        ([{"positive": "the sun"}] * 3, {}, r"pairs\[0\].negative"),
        ([{"positive": " ", "negative": "x"}] * 3, {}, r"pairs\[0\].positive"),
        (PAIRS, {"method": "best"}, "method: got 'best'"),
        (PAIRS, {"layers": "1-9"}, "layers: got '1-9'"),
        (PAIRS, {"pool": "first"}, "pool: got 'first'"),
        (
            [*PAIRS, {"positive": "the sun", "negative": "the sun"}],
            {},
            r"pairs\[24\]: got 'two sides of the same tokens'",
        ),
        (
            [{"positive": "the sun " * 80, "negative": "a"}] * 2,
            {},
            r"pairs\[0\]: got '160 tokens'; allowed: at most 128",
        ),
        (PAIRS, {"held_out": True}, "held_out: got True"),
        (PAIRS, {"metod": "pca"}, "did you mean method?"),
    ],
)
def test_bad_pairs(pairs: Any, settings: dict[str, Any], message: str, tiny_lm: LanguageModel) -> None:
    with pytest.raises(InputError, match=message):
        train_vector(tiny_lm, pairs, **settings)


def test_settings_are_one_object(tiny_lm: LanguageModel) -> None:
    chosen = VectorSettings(method="pca", layers="1", seed=3)
    by_name = train_vector(tiny_lm, PAIRS, method="pca", layers="1", seed=3)
    given = train_vector(tiny_lm, PAIRS, chosen)
    changed = train_vector(tiny_lm, PAIRS, chosen, seed=4)
    assert given.card == by_name.card and given.card.recipe == chosen.recipe()
    assert changed.card.recipe == {**chosen.recipe(), "seed": 4} and chosen.seed == 3
    assert given.card.settings["layers"] == "1"
    with pytest.raises(InputError, match="seed: got -1; allowed: an integer from 0 to 4294967295"):
        VectorSettings(seed=-1)


def test_states_beyond_the_context_are_not_read(tiny_lm: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"ids\[1\]: got '129 tokens'"):
        tiny_lm.hidden_states([[5], [5] * 129])


def test_vectors_of_zeros_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="zeros alone"):
        save_gguf(tmp_path / "v.gguf", {1: torch.zeros(4), 2: torch.zeros(4)}, "llama")
    writer = gguf.GGUFWriter(tmp_path / "others.gguf", "controlvector")
    for layer in (1, 2):
        writer.add_tensor(f"direction.{layer}", torch.zeros(4).numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(InputError, match="zeros alone"):
        load_edit(tmp_path / "others.gguf", 3.0)


# --------------------------------------------------------------------------------------------------------- controller


def test_layer_weights_learn_here_and_cannot_under_the_papers_loss(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"openings": ["I love it ."], "answers": ["it is sad ."], "seed": 0}
    learnt = train_controller(
        tiny_lm, POSITIVE, NEGATIVE, epochs=3, batch_size=8, strength=1.0, learning_rate=0.02, **settings
    )
    before, after = (torch.tensor(learnt.card.metrics[k]) for k in ("layer_weights_initial", "layer_weights"))
    assert float((after - before).abs().max()) > 0.02
    paper = train_controller(tiny_lm, POSITIVE, NEGATIVE, preset="paper", **settings)
    assert paper.card.metrics["layer_weights"] == paper.card.metrics["layer_weights_initial"]
    assert paper.card.settings["threshold"] == 0.0 and paper.card.recipe["strength"] == 2.0

    path = tmp_path / "c.safetensors"
    artifacts.save(path, *learnt)
    edit = load_edit(path)
    assert isinstance(edit, Controller)
    out = tiny_lm.generate([*POSITIVE[:2], *NEGATIVE[:2]], edits=edit, seed=0, max_new_tokens=6)
    plain = tiny_lm.generate([*POSITIVE[:2], *NEGATIVE[:2]], seed=0, max_new_tokens=6)
    ids = [tiny_lm.encode(p) for p in (*POSITIVE[:2], *NEGATIVE[:2])]
    scale, _ = edit.scale(tiny_lm.hidden_states(ids, edit.inputs))
    for row, fires in enumerate((scale > 0.5).tolist()):
        # Where the scale is below the threshold every bit is the plain model's.
        assert fires or (out.tokens[row] == plain.tokens[row] and out.log_prob[row] == plain.log_prob[row])


def test_controller_in_closed_form(tiny_lm: LanguageModel) -> None:
    """A controller with a fixed scale and weights is a vector with those weights at the same positions."""
    torch.manual_seed(0)
    network = ControllerNetwork(32, 2, 4)
    nn.init.zeros_(network.scale_outer.weight)
    nn.init.constant_(network.scale_outer.bias, 1.5)
    network.weight_outer.bias.data = torch.tensor([0.4, -0.7])
    directions = nn.functional.normalize(torch.randn(2, 32), dim=-1)
    controller = Controller(network.eval().requires_grad_(False), (1,), directions, strength=0.8)
    out = tiny_lm.generate(["the sun", "hello dog"], edits=controller, temperature=0, max_new_tokens=8)
    scale, weights = torch.sigmoid(torch.tensor(1.5)), torch.sigmoid(torch.tensor([0.4, -0.7]))
    norms = tiny_lm.residual_norms()
    from steer.methods.vector import SteeringVector

    same = SteeringVector(
        {i: 0.8 * float(norms[i]) * scale * weights[i] * directions[i] for i in range(2)}, unit="raw", scope="reply"
    )
    want = tiny_lm.generate(["the sun", "hello dog"], edits=same, temperature=0, max_new_tokens=8)
    assert out.tokens == want.tokens
    assert torch.allclose(out.kl, want.kl, atol=1e-5) and float(out.kl.min()) > 0


def test_reply_logits_are_those_of_an_uncached_pass(tiny_lm: LanguageModel) -> None:
    ids = [tiny_lm.encode("the sun"), tiny_lm.encode("a very good dog runs")]
    keys, mask, replies, states = read_prefix(tiny_lm, ids, 5, [0, 1])
    for row, (prompt, reply) in enumerate(zip(ids, replies, strict=True)):
        text = list(prompt)
        for want in reply:
            with torch.no_grad():
                logits = tiny_lm.network(torch.tensor([text])).logits[0, -1]
            assert int(logits.argmax()) == want
            text.append(want)
        assert torch.allclose(states[1][row], tiny_lm.hidden_states([prompt], [1])[1][0], atol=1e-4)
    answers = [[5, 6, 7], [8, 9]]
    logits, target, real = reply_logits(tiny_lm, [r[-1] for r in ids], answers, keys, mask, {})
    assert target.tolist() == [[5, 6, 7], [8, 9, 0]] and real.tolist() == [[True] * 3, [True, True, False]]
    for row in range(2):
        with torch.no_grad():
            whole = tiny_lm.network(torch.tensor([ids[row] + answers[row]])).logits[0, len(ids[row]) - 1 : -1]
        assert torch.allclose(logits[row, : len(answers[row])], whole, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- values


def test_td_lambda_returns_by_hand() -> None:
    values = torch.tensor([[0.2, 0.4, 0.6], [0.5, 0.1, 9.0]], dtype=torch.float64)
    real = torch.tensor([[True, True, True], [True, True, False]])
    returns = td_lambda_returns(values, torch.tensor([1.0, 2.0]).double(), real)
    assert returns[0].tolist() == pytest.approx([0.951, 0.98, 1.0], abs=1e-12)
    loss = 0.5 * (values[0] - returns[0]).square().mean()
    assert float(loss) == pytest.approx(0.1767335, abs=1e-9)
    # The second row ends after two tokens: G_2 = 2 and G_1 = .05 * .1 + .95 * 2.
    assert returns[1].tolist() == pytest.approx([0.05 * 0.1 + 0.95 * 2, 2.0, 0.0], abs=1e-12)
    monte_carlo = td_lambda_returns(values, torch.tensor([1.0, 2.0]).double(), real, trace=1.0)
    assert monte_carlo[0].tolist() == pytest.approx([1.0, 1.0, 1.0])


def good(texts: list[str]) -> list[float]:
    return [sum(word in ("good", "happy", "nice", "love") for word in text.split()) for text in texts]


@pytest.mark.parametrize("head", ["q", "v"])
def test_a_trained_head_raises_its_reward(head: str, tiny_lm: LanguageModel, tmp_path: Path) -> None:
    prompts = [f"tell me how the {x} is" for x in ("sun", "rain", "day", "dog", "cat", "tree", "house", "night")]
    settings: dict[str, Any] = {"samples": 16, "max_new_tokens": 6, "hidden": 32, "epochs": 12, "learning_rate": 3e-3}
    trained = train_value(tiny_lm, prompts, good, head=head, **settings)
    artifacts.save(tmp_path / "q.safetensors", *trained)
    edit = load_edit(tmp_path / "q.safetensors", model=tiny_lm)
    plain = tiny_lm.generate(prompts, n=16, reward=good, max_new_tokens=6, seed=9)
    guided = tiny_lm.generate(prompts, n=16, reward=good, max_new_tokens=6, seed=9, edits=edit, beta=0.2)
    turned = load_edit(tmp_path / "q.safetensors", -1.0, model=tiny_lm)
    down = tiny_lm.generate(prompts, n=16, reward=good, max_new_tokens=6, seed=9, edits=turned, beta=0.2)
    error = float((plain.reward.var() / len(plain) + guided.reward.var() / len(guided)) ** 0.5)
    assert float(guided.reward.mean() - plain.reward.mean()) > 3 * error
    assert float(down.reward.mean()) < float(plain.reward.mean())
    assert float(guided.kl.mean()) > 0 and trained.card.metrics["reward_std"] > 0


# A vocabulary of six makes every text of up to three tokens countable.
TOKENS = ("<unk>", "<pad>", "<s>", "</s>", "a", "b")


@pytest.fixture(scope="module")
def six_tokens() -> LanguageModel:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(TOKENS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.1,
    )
    return LanguageModel(LlamaForCausalLM(config).eval(), tokenizer, "six")


class Table(Reward):
    """A random score for every text of at most three tokens."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.scores = torch.randn(7, 7, 7, generator=torch.Generator().manual_seed(seed)).double()

    def __str__(self) -> str:
        return f"table {self.seed}"

    def of(self, tokens: Sequence[int]) -> Tensor:
        return self.scores[tuple([*tokens, 6, 6, 6][:3])]

    def score(self, samples: Samples) -> Tensor:
        return torch.stack([self.of(row) for row in samples.tokens])


def value_error(model: LanguageModel, prompt: str, reward: Table, head: nn.Module) -> float:
    """Root mean square error of Q, centred over the next tokens, over the same of the true Q, every prefix weighted by
    how likely it is.
    """
    ids, q_head = model.encode(prompt), isinstance(head, QHead)
    embeddings = model.info.unembedding()
    wrong = spread = 0.0

    @torch.no_grad()
    def visit(text: tuple[int, ...], reach: float) -> float:
        nonlocal wrong, spread
        out = model.network(torch.tensor([[*ids, *text]]), output_hidden_states=True)
        law, state = out.logits[0, -1].double().softmax(-1), out.hidden_states[-1][0, -1]
        left, whole = torch.tensor(2 - len(text)), len(text) == 2
        true = torch.stack(
            [
                reward.of([*text, a]) if whole or a == 3 else torch.tensor(visit((*text, a), reach * float(law[a])))
                for a in range(6)
            ]
        )
        if q_head:
            found = head(state, embeddings, left).double()
        else:
            rows = torch.tensor([[*ids, *text, a] for a in range(6)])
            after = model.network(rows, output_hidden_states=True).hidden_states[-1][:, -1]
            found = head(after, left).double()
        wrong += reach * float((found - found.mean() - true + true.mean()).square().mean())
        spread += reach * float((true - true.mean()).square().mean())
        return float(law @ true)

    visit((), 1.0)
    return (wrong / spread) ** 0.5


ENUMERATED: dict[str, Any] = {
    "samples": 4000,
    "max_new_tokens": 3,
    "held_out": 0.0,
    "max_rows": 6000,
    "batch_size": 64,
    "epochs": 12,
    "learning_rate": 4e-3,
}


@pytest.mark.parametrize(
    ("head", "table", "seed"),
    [("q", 0, 0), ("v", 1, 1)] + [pytest.param(h, t, t + 7, marks=pytest.mark.slow) for h in "qv" for t in range(2, 6)],
)
def test_values_of_three_tokens_are_reached(
    head: str, table: int, seed: int, six_tokens: LanguageModel, tmp_path: Path
) -> None:
    """The bound, a quarter of the spread, was set by who found heads that were not told how many tokens remain at .31
    and .68 of it; plain means over as many rollouts have .11 to .18.
    """
    reward, prompts = Table(table), ["a b", "b"]
    more = {} if head == "q" else {"samples": 5000, "epochs": 20}  # a scalar has six times as many states to tell apart
    made = train_value(six_tokens, prompts, reward, head=head, seed=seed, **{**ENUMERATED, **more})
    artifacts.save(tmp_path / "head.safetensors", *made)
    edit = load_edit(tmp_path / "head.safetensors", model=six_tokens)
    assert isinstance(edit, ValueGuidance) and isinstance(edit.value, HeadValue) and edit.value.head.horizon == 3
    errors = [value_error(six_tokens, prompt, reward, edit.value.head) for prompt in prompts]
    assert max(errors) < 0.25


def test_heads_saved_before_they_were_told_the_time_still_load(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    made = train_value(tiny_lm, ["the sun", "a dog"], good, samples=16, max_new_tokens=4, hidden=8, epochs=2)
    tensors = {name: x for name, x in made.tensors.items() if not name.startswith("gain")}
    artifacts.save(tmp_path / "old.safetensors", tensors, made.card)
    edit = load_edit(tmp_path / "old.safetensors", model=tiny_lm)
    assert isinstance(edit, ValueGuidance) and isinstance(edit.value, HeadValue)
    head, state = edit.value.head, torch.randn(3, 32)
    assert head.horizon == 0 and isinstance(head, QHead)
    units = nn.functional.layer_norm(state, (32,), tensors["norm.weight"], tensors["norm.bias"])
    units = nn.functional.silu(units @ tensors["inner.weight"].T + tensors["inner.bias"])
    query = units @ tensors["outer.weight"].T + tensors["outer.bias"]
    shared = units @ tensors["shared.weight"].T + tensors["shared.bias"]
    embeddings = tiny_lm.info.unembedding()[:5]
    assert torch.allclose(head(state, embeddings), query @ embeddings.T / 32**0.5 + shared, atol=1e-5)
    assert len(tiny_lm.generate("the sun", edits=edit, beta=0.1, seed=0)) == 1
    with pytest.raises(InputError, match="left"):
        QHead(32, 8, horizon=4)(state, embeddings)


class Stop(Exception):
    pass


def test_training_resumes_to_the_same_bits(tiny_lm: LanguageModel, tmp_path: Path, monkeypatch: Any) -> None:
    prompts = ["the sun", "a dog", "hello", "the rain is", "why", "how", "it is", "you"]
    settings: dict[str, Any] = {"samples": 4, "max_new_tokens": 5, "hidden": 8, "epochs": 4, "max_rows": 8}
    whole = train_value(tiny_lm, prompts, good, work=tmp_path / "a", **settings)

    calls = 0

    def counted(texts: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return good(texts)

    counted.__name__ = "good"
    with pytest.raises(KeyboardInterrupt):  # in the middle of the rollouts
        train_value(tiny_lm, prompts, counted, work=tmp_path / "b", **settings)
    from steer.train import loop

    real, seen = loop.save_state, 0

    def interrupted(*args: Any, **facts: Any) -> None:
        nonlocal seen
        real(*args, **facts)
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_state", interrupted)
    with pytest.raises(KeyboardInterrupt):  # and again in the middle of the fit
        train_value(tiny_lm, prompts, counted, work=tmp_path / "b", **settings)
    monkeypatch.setattr(loop, "save_state", real)
    resumed = train_value(tiny_lm, prompts, counted, work=tmp_path / "b", **settings)
    assert calls == 5  # four batches of rollouts, one of them begun twice
    assert all(torch.equal(whole.tensors[k], resumed.tensors[k]) for k in whole.tensors)
    assert whole.card.metrics == resumed.card.metrics
    with pytest.raises(InputError, match="work: got"):
        train_value(tiny_lm, prompts, counted, work=tmp_path / "b", **{**settings, "samples": 2})


def test_fit_minimises_and_refuses_foreign_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5])

    def loss(module: nn.Module, rows: Tensor, epoch: int) -> Tensor:
        return (module(x[rows]).squeeze(-1) - y[rows]).square().mean()

    module = nn.Linear(3, 1)
    batches = list(torch.arange(64).split(8))
    history = fit(module, batches, loss, epochs=80, learning_rate=0.05, run={"a": 1}, work=tmp_path)
    assert history[-1] < 1e-3 < history[0]
    with pytest.raises(InputError, match="work"):
        fit(nn.Linear(3, 1), batches, loss, epochs=2, learning_rate=0.1, run={"a": 2}, work=tmp_path)

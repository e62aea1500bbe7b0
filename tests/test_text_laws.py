"""Laws of texts against enumeration: tiny Llamas of a few tokens, read without a cache in float64, under the library's
own processors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from steer.adapters.transformers import LanguageModel
from steer.core import Context, InputError, RawText, Samples, SteerError, TransitionEdit, UnsupportedError
from steer.methods.dts import DTS
from steer.methods.fk import FKSteering
from steer.methods.prompt import SystemPrompt
from steer.methods.rlg import RLGuidance

EOS, WORDS = 3, ("a", "b", "c", "d", "e")
Prefix = tuple[int, ...]
StepLaw = Callable[[Prefix], Tensor]


@lru_cache
def llama(seed: int, words: int = 4, never: int | None = None) -> LanguageModel:
    """A random Llama over `words` words and four special tokens; one that `never` writes a token if that is given."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<unk>", "<pad>", "<s>", "</s>", *WORDS[:words]))}
    splitter = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=splitter, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=EOS,
        initializer_range=0.6,
    )
    network = LlamaForCausalLM(config)
    if never is not None:
        there = torch.arange(len(vocabulary)) == never
        network.lm_head.register_forward_hook(lambda m, a, out: out.masked_fill(there, -torch.inf))
    return LanguageModel(network, tokenizer, f"tiny {seed}")


def reader(model: LanguageModel, prompt: str) -> StepLaw:
    """Logits `[V]` after a prefix of generated tokens, from an uncached pass in float64."""
    network, ids = copy.deepcopy(model.network).double(), model.encode(prompt)

    @lru_cache(None)
    def logits(prefix: Prefix) -> Tensor:
        with torch.no_grad():
            return network(torch.tensor([[*ids, *prefix]]), use_cache=False).logits[0, -1]

    return logits


def processed(model: LanguageModel, prompt: str, temperature: float = 1.0, **settings: Any) -> StepLaw:
    """The library's processors, then temperature."""
    ids, logits = model.encode(prompt), reader(model, prompt)
    config = GenerationConfig(do_sample=False, eos_token_id=EOS, **settings)
    config._eos_token_tensor = torch.tensor([EOS])  # what `generate` makes of it
    made = model.network._get_logits_processor(config, input_ids_seq_length=len(ids), device="cpu")

    def law(prefix: Prefix) -> Tensor:
        scores = made(torch.tensor([[*ids, *prefix]]), logits(prefix).unsqueeze(0).clone())[0]
        return torch.log_softmax(scores / temperature, -1)

    return law


def cut(law: StepLaw, model: LanguageModel, **settings: Any) -> StepLaw:
    """The library's truncation."""
    made = model.network._get_logits_processor(GenerationConfig(do_sample=True, **{"top_k": 0, **settings}))
    return lambda prefix: torch.log_softmax(made(torch.zeros(1, 1, dtype=torch.long), law(prefix)[None])[0], -1)


def powers(*laws: tuple[StepLaw, float]) -> StepLaw:
    """`sum of w log p`, not normalised, in which 0 to the power of 0 is 1 and 0 to another one is 0."""

    def total(prefix: Prefix) -> Tensor:
        parts = [(law(prefix), w) for law, w in laws if w]
        excluded = torch.stack([part.isneginf() for part, _ in parts]).any(0)
        return torch.stack([w * part for part, w in parts]).nan_to_num(0.0).sum(0).masked_fill(excluded, -torch.inf)

    return total


def normalised(law: StepLaw) -> StepLaw:
    return lambda prefix: torch.log_softmax(law(prefix), -1)


def texts(law: StepLaw, length: int, eos: int | None = EOS) -> dict[Prefix, float]:
    """The log of every text's mass."""
    found: dict[Prefix, float] = {}
    todo: list[tuple[Prefix, float]] = [((), 0.0)]
    while todo:
        prefix, mass = todo.pop()
        if len(prefix) == length or (prefix and prefix[-1] == eos):
            found[prefix] = mass
            continue
        todo += [((*prefix, k), mass + x) for k, x in enumerate(law(prefix).tolist()) if x > -math.inf]
    return found


def reward(outputs: Sequence[str]) -> list[float]:
    return [0.8 * t.count("a") - 0.6 * t.count("c") + 0.5 * (t[-1:] == "b") - 0.1 * len(t.split()) for t in outputs]


def evidence(model: LanguageModel, masses: dict[Prefix, float], rewarded: bool = True) -> float:
    shown = [model.decode(list(tokens)) for tokens in masses]
    tilt = reward(shown) if rewarded else [0.0] * len(shown)
    return sum(math.exp(mass + r) for mass, r in zip(masses.values(), tilt, strict=True))


def within(values: Tensor, truth: float, slack: float = 0.0) -> bool:
    """The mean of independent `values` lies within five of its standard errors of the truth; `slack` is for float32."""
    assert bool(values.isfinite().all())
    return abs(float(values.mean()) - truth) < 5 * float(values.std()) / len(values) ** 0.5 + slack + 1e-5


def assert_law(samples: Samples, masses: dict[Prefix, float]) -> None:
    """Every text has the log-probability that the oracle gives it (float32 against float64), none is impossible, and
    texts are as frequent as that says, within five standard errors.
    """
    assert samples.tokens is not None and samples.log_prob is not None
    drawn = [tuple(tokens) for tokens in samples.tokens]
    assert set(drawn) <= set(masses)
    known = torch.tensor([masses[tokens] for tokens in drawn], dtype=torch.float64)
    assert torch.allclose(samples.log_prob, known, rtol=0, atol=2e-4)
    for tokens, mass in masses.items():
        p, n = math.exp(mass), len(drawn)
        assert abs(drawn.count(tokens) / n - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1 / n


@dataclass(frozen=True, eq=False)
class Lean(TransitionEdit):
    """Moves the law along a fixed slope."""

    by: float

    def shift(self, x: Tensor, context: Context) -> Tensor:
        return x + self.by * torch.arange(x.shape[-1], dtype=x.dtype) / x.shape[-1]


def leaning(law: StepLaw, by: float) -> StepLaw:
    return normalised(lambda prefix: law(prefix) + by * torch.arange(len(law(prefix))) / len(law(prefix)))


# ------------------------------------------------------------------------------------ processors and temperature, twice

PROCESSORS: list[dict[str, Any]] = [
    {"suppress_tokens": [5], "min_new_tokens": 3},
    {"repetition_penalty": 4.0},
    {"repetition_penalty": 1.7, "temperature": 0.5},
    {"no_repeat_ngram_size": 1},
    {"bad_words_ids": [[4], [6, 7]], "temperature": 1.6},
    {"temperature": 0.5},
]


@pytest.mark.parametrize("w", [0.5, 1, 2])
@pytest.mark.parametrize("settings", PROCESSORS, ids=str)
def test_rlg_runs_the_runs_own_processors_on_both_models(w: float, settings: dict[str, Any]) -> None:
    model, tuned, prompt = llama(0), llama(1), "a b"
    base, policy = (processed(m, prompt, **settings) for m in (model, tuned))
    law = normalised(powers((base, 1 - w), (policy, w)) if w != 1 else policy)
    given = {"bad_words_ids": (), **settings}
    samples = model.generate(
        RawText(prompt), n=3000, edits=RLGuidance(tuned.process(), w), max_new_tokens=3, seed=0, max_rows=3000, **given
    )
    assert_law(samples, texts(law, 3))
    # What drifts is counted from the law before the edit, which the processors have changed as well.
    before = texts(base, 3)
    known = torch.tensor([before[tuple(t)] for t in samples.tokens], dtype=torch.float64)
    assert torch.allclose(samples.base_log_prob, known, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("seed", "length", "words", "prompts"), [(2, 2, 5, ("c", "a b c d")), (7, 4, 2, ("b a", "a"))])
def test_processors_of_other_models_and_prompts_of_two_lengths(
    seed: int, length: int, words: int, prompts: tuple[str, ...]
) -> None:
    model, tuned = llama(seed, words), llama(seed + 50, words)
    settings: dict[str, Any] = {"suppress_tokens": [4], "min_new_tokens": 2, "temperature": 0.8}
    edit = RLGuidance(tuned.process(temperature=0.8), 1.5)
    samples = model.generate(
        [RawText(p) for p in prompts], n=1500, edits=edit, max_new_tokens=length, seed=1, max_rows=4000, **settings
    )
    for b, prompt in enumerate(prompts):
        parts = ((processed(m, prompt, **settings), w) for m, w in ((model, -0.5), (tuned, 1.5)))
        rows = samples.select((samples.group == b).nonzero().squeeze(1))
        assert_law(rows, texts(normalised(powers(*parts)), length))


@pytest.mark.parametrize(
    ("theirs", "ours", "field"),
    [
        ({"temperature": 0.5}, {}, "companion's temperature"),
        ({"temperature": 0.5}, {"temperature": 0.7}, "companion's temperature"),
        ({"repetition_penalty": 2.0}, {"repetition_penalty": 1.5}, "companion's repetition_penalty"),
        ({"suppress_tokens": [4]}, {}, "companion's suppress_tokens"),
        ({"top_k": 3}, {"top_k": 4}, "companion's top_k"),
    ],
)
def test_a_companion_with_settings_of_its_own_is_refused(theirs: Any, ours: Any, field: str) -> None:
    model, tuned = llama(0), llama(1)
    with pytest.raises(InputError, match=field):
        model.process(**ours).edited(RLGuidance(tuned.process(**theirs)))
    model.process(**theirs).edited(RLGuidance(tuned.process(**theirs)))
    model.process(**theirs).edited(RLGuidance(tuned.process()))


def test_a_companion_under_edits_that_it_would_lose_is_refused() -> None:
    model, tuned = llama(0), llama(1)
    for edit in (SystemPrompt("a"), Lean(1.0)):
        with pytest.raises(UnsupportedError, match="hidden edits of its own"):
            model.process().edited(RLGuidance(tuned.process().edited(edit)))


# ------------------------------------------------------------------------------------------------ edits of some prompts


@pytest.mark.parametrize(("seed", "length", "words", "w"), [(0, 3, 3, 0.5), (4, 2, 5, 1.4), (9, 4, 1, 0.8)])
@pytest.mark.parametrize("tree", [False, True])
def test_a_product_for_some_prompts_leaves_the_others_alone(
    seed: int, length: int, words: int, w: float, tree: bool
) -> None:
    model, tuned, prompt = llama(seed, words), llama(seed + 1, words), RawText("a")
    runs = 12 if tree else 300
    edits = [[RLGuidance(tuned.process(), w, "product")], None] * runs
    sampler: Any = DTS(None, rollouts=200, batch=8, explore=0.1) if tree else FKSteering(8)
    samples = model.generate(
        [prompt] * 2 * runs, edits=edits, sampler=sampler, reward=reward, max_new_tokens=length, seed=0, max_rows=10**5
    )
    base, policy = processed(model, "a"), processed(tuned, "a")
    z = samples.log_z.exp().reshape(runs, 2)
    # The number of children of an adaptive node leaves a bias of less than one part in thirty here.
    for column, law in enumerate((powers((base, 1 - w), (policy, w)), base)):
        truth = evidence(model, texts(law, length))
        assert within(z[:, column], truth, 0.03 * truth * tree)
    asked = samples.group % 2 == 0
    assert samples.tilt is not None
    assert float(samples.tilt[~asked].abs().max()) == 0 < float(samples.tilt[asked].abs().max())


# ------------------------------------------------------------------------------------------------- zero probabilities


@pytest.mark.parametrize(("seed", "length", "words"), [(0, 3, 3), (5, 2, 5)])
@pytest.mark.parametrize("w", [0, 0.5, 1])
@pytest.mark.parametrize("aim", ["base", "product"])
@pytest.mark.parametrize("whose", ["base", "tuned"])
def test_tokens_that_one_model_excludes(seed: int, length: int, words: int, w: float, aim: str, whose: str) -> None:
    """Towards the base what it excludes has weight 0; towards the product 0 to the power of 0 is 1."""
    model = llama(seed, words, 5 if whose == "base" else None)
    tuned = llama(seed + 1, words, 4 if whose == "tuned" else None)
    base, policy = processed(model, "a"), processed(tuned, "a")
    if aim == "product":
        masses = texts(powers((base, 1 - w), (policy, w)), length)
    else:  # a proposal cannot correct for what it never draws
        reached = policy if w == 1 else normalised(powers((base, 1 - w), (policy, w)))
        masses = {text: mass for text, mass in texts(base, length).items() if text in texts(reached, length)}
    samples = model.generate(
        [RawText("a")] * 400,
        edits=RLGuidance(tuned.process(), w, aim),
        sampler=FKSteering(8),
        reward=reward,
        max_new_tokens=length,
        seed=0,
        max_rows=10**5,
    )
    assert within(samples.log_z.exp(), evidence(model, masses))
    for sums in (samples.log_weight, samples.tilt, samples.base_log_prob):
        assert not bool(sums.isnan().any())


# --------------------------------------------------------------------------------------- the base law under truncation

CUTS: list[dict[str, Any]] = [
    {"top_k": 2},
    {"top_p": 0.6},
    {"top_k": 4, "min_p": 0.3, "temperature": 1.5},
    {"top_p": 0.8, "min_p": 0.25, "temperature": 0.7},
]


@pytest.mark.parametrize("settings", CUTS, ids=str)
@pytest.mark.parametrize(("seed", "length", "words"), [(0, 3, 4), (3, 2, 5)])
@pytest.mark.parametrize("by", [0.0, 3.0])
def test_evidence_is_an_expectation_under_the_law_that_is_drawn(
    settings: dict[str, Any], seed: int, length: int, words: int, by: float
) -> None:
    """ "truncated": E exp(r) under the law of unedited texts, edits or not; "full": that of the law before truncation,
    restricted to what is drawn.
    """
    model, prompts = llama(seed, words), [RawText("b a")] * 600
    hot = settings.get("temperature", 1.0)
    sizes = {name: x for name, x in settings.items() if name != "temperature"}
    base = processed(model, "b a", hot)
    drawn = cut(base, model, **sizes)
    edits = [Lean(by)] if by else []
    given: dict[str, Any] = {
        "edits": edits,
        "sampler": FKSteering(6),
        "reward": reward,
        "max_new_tokens": length,
        "max_rows": 10**5,
        **settings,
    }
    samples = model.generate(prompts, seed=0, **given)
    assert within(samples.log_z.exp(), evidence(model, texts(drawn, length)))
    reached = texts(cut(leaning(base, by), model, **sizes) if by else drawn, length)
    kept = {text: mass for text, mass in texts(base, length).items() if text in reached}
    full = model.generate(prompts, seed=0, base="full", **given)
    assert within(full.log_z.exp(), evidence(model, kept))
    plain = model.generate(prompts[:1], seed=0, n=50, max_new_tokens=length, edits=edits, **settings)
    assert float(plain.kl.min()) > 0  # samplers that do not weigh report the drift from the full law


@pytest.mark.parametrize("settings", CUTS, ids=str)
@pytest.mark.parametrize("w", [0.5, 1])
def test_products_of_truncated_laws(settings: dict[str, Any], w: float) -> None:
    model, tuned = llama(0), llama(1)
    hot, sizes = settings.get("temperature", 1.0), {k: x for k, x in settings.items() if k != "temperature"}
    parts = [(cut(processed(m, "a", hot), m, **sizes), power) for m, power in ((model, 1 - w), (tuned, w))]
    edit = RLGuidance(tuned.process(), w, "product")
    samples = model.generate(
        [RawText("a")] * 600,
        edits=edit,
        sampler=FKSteering(8),
        reward=reward,
        max_new_tokens=3,
        seed=0,
        max_rows=10**5,
        **settings,
    )
    assert within(samples.log_z.exp(), evidence(model, texts(powers(*parts), 3)))


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.6}], ids=str)
def test_a_tree_weighs_by_the_truncated_law(settings: dict[str, Any]) -> None:
    model = llama(0)
    masses = texts(cut(processed(model, "a"), model, **settings), 3)
    samples = model.generate(
        [RawText("a")] * 16,
        edits=Lean(2.0),
        sampler=DTS(None, rollouts=200, explore=0.1),
        reward=reward,
        max_new_tokens=3,
        seed=0,
        max_rows=10**5,
        **settings,
    )
    truth = evidence(model, masses)
    assert within(samples.log_z.exp(), truth, 0.02 * truth)


def test_another_word_for_the_base_is_refused() -> None:
    with pytest.raises(InputError, match="base: got 'raw'"):
        llama(0).process(base="raw")


# ------------------------------------------------------------------------------------------ padding, and dead ends


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 2},
        {"bad_words_ids": [[4, 4, 5], [6]]},
    ],
    ids=str,
)
@pytest.mark.parametrize("until", [(), ("a", "b")])
def test_a_prompt_has_the_law_that_it_has_alone(settings: dict[str, Any], until: tuple[str, ...]) -> None:
    """Also where the token that pads short prompts is the end of the text, as in many models."""
    model = copy.copy(llama(0))
    model.body = replace(model.body, pad_token_id=EOS)
    process = model.process(max_new_tokens=4, block=2, until=until, **settings)
    prompts = [RawText("a"), RawText("d c b a d c b a"), RawText("b a a")]

    def law(some: list[str], tokens: list[list[int]]) -> Tensor:
        packed = process.pack(process.init(some, 1, torch.Generator()))
        columns = torch.tensor([[token + [EOS] * 9][0][: process.columns] for token in tokens])
        real = torch.arange(columns.shape[1]) < torch.tensor([[len(token)] for token in tokens])
        length = torch.tensor([len(token) for token in tokens])
        return process.laws(process.unpack(some, 1, packed | {"prefix": columns, "real": real, "length": length}))[0]

    for tokens in ([[], [], []], [[4, 6], [5, 5], [4, 4]], *([[[4], [6, 5], [7]]] if until else [])):
        together = law(prompts, tokens)
        for i, prompt in enumerate(prompts):
            alone = law([prompt], [tokens[i]])[0]
            assert torch.equal(alone.isneginf(), together[i].isneginf())
            assert torch.allclose(alone.exp(), together[i].exp(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", [None, FKSteering(3), DTS(n=1, rollouts=4)], ids=["plain", "fk", "dts"])
def test_a_step_at_which_nothing_is_possible_is_one_line(sampler: Any) -> None:
    model, everything = llama(0), list(range(8))
    given = {} if sampler is None else {"sampler": sampler, "reward": reward}
    with pytest.raises(SteerError, match="no token could be drawn") as caught:
        model.generate(RawText("a b"), max_new_tokens=3, seed=0, suppress_tokens=everything, **given)
    assert "\n" not in str(caught.value)

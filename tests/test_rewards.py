"""Rewards: exact scores, the algebra's identities, the text form, and models from a folder."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from steer.core import InputError, Reward, RewardError, Samples, SteerError, UnsupportedError
from steer.rewards import (
    CallableReward,
    Constrained,
    Ensemble,
    Keywords,
    Length,
    Profanity,
    Readability,
    Rouge,
    Wrapped,
    as_reward,
    distinct_n,
    diversity,
    fluency,
    length,
    lift,
    parse,
    parse_reward,
    perplexity,
    profanity,
    readability,
    register,
    sentiment,
    shipped,
    solve_multiplier,
)
from steer.rewards.text import syllables


def samples(texts, prompts=("Say:",), group=None):
    count = len(texts)
    group = torch.zeros(count, dtype=torch.long) if group is None else torch.tensor(group)
    return Samples(prompts=list(prompts), outputs=texts, group=group, log_weight=torch.zeros(count))


def score(reward, *texts):
    return reward(samples(list(texts))).tolist()


TEXTS = ["VADER is smart, handsome, and funny.", "The boat sank. I hate the lake!", ""]


class Scores(Reward):
    """Fixed scores: the plain `Reward` that anyone may write."""

    def __init__(self, *values):
        self.values = torch.tensor(values, dtype=torch.float64)

    def score(self, samples):
        return self.values


# ------------------------------------------------------------------------------------------------------- text rewards


def test_sentiment_is_vaders_published_compound():
    assert score(sentiment, TEXTS[0], "VADER is not smart, handsome, nor funny.", "") == [0.8316, -0.7424, 0.0]


def test_readability_by_hand():
    text = "The cat sat on the mat. It was warm."  # 9 words, 2 sentences, 9 syllables
    assert score(readability, text)[0] == pytest.approx(206.835 - 1.015 * 4.5 - 84.6, abs=1e-9)
    assert score(Readability("grade"), text)[0] == pytest.approx(0.39 * 4.5 + 11.8 - 15.59, abs=1e-9)
    assert [syllables(w) for w in ("cared", "wanted", "tables", "boxes", "goes", "beautiful")] == [1, 2, 2, 2, 1, 3]
    assert score(readability, "Incomprehensible organisations.")[0] < 0


def test_length_keywords_profanity():
    assert score(length, "one two, don't well-known", "", "3.5 km", "我爱你") == [4, 0, 2, 3]
    assert score(Length(target=20), "one " * 10, "one " * 25, "") == [-0.5, -0.25, -1]
    assert score(Keywords(("lake", "ice cream")), "LAKE; ice\ncream", "lakes", "a lake.", "") == [1, 0, 0.5, 0]
    assert score(Keywords(("STRASSE", "café", "湖", "C++")), "die Straße, cafe\u0301 我在湖边 C++!") == [1]
    assert score(Keywords(("कम",)), "कमी", "कम है") == [0, 1]
    assert score(profanity, "what the sh1t", "Fuck!", "a$$", "shiitake in class at 455 A55", "") == [1, 1, 1, 0, 0]
    assert score(Profanity("share"), "damn it all now") == [0.25]


def test_rouge_by_hand():
    text, reference = "the cat sat down", "the cat lay down here"  # 1: 3 common; 2: 1 common; L: 3
    assert score(Rouge(reference, ("1",)), text)[0] == pytest.approx(6 / 9)
    assert score(Rouge(reference, ("2",)), text)[0] == pytest.approx(2 / 7)
    assert score(Rouge(reference, ("L",)), "down sat cat the", text)[1] == pytest.approx(6 / 9)
    assert score(Rouge(reference), text)[0] == pytest.approx((6 / 9 + 2 / 7 + 6 / 9) / 3)
    rows = samples(["a b", "a b"], prompts=["p", "q"], group=[1, 0])
    assert Rouge(["a b", "x y"])(rows).tolist() == [0, 1]
    assert Rouge({"q": "a b", "p": "x y"})(rows).tolist() == [1, 0]
    with pytest.raises(InputError, match="rouge references: got 1"):
        Rouge(["a b"])(rows)


@pytest.mark.parametrize("text", ["", " ", "!!!", "🚣", "\n", "日本語のテキスト", "a" * 5000])
def test_every_score_is_finite(text):
    rewards = [sentiment, readability, length, Length(5), Keywords(("a",)), profanity, Profanity("share"), Rouge("a b")]
    for reward in rewards:
        assert math.isfinite(score(reward, text)[0])


def test_images_are_refused():
    images = samples(torch.zeros(2, 3, 4, 4))
    for reward in (sentiment, Rouge("a"), fluency):
        with pytest.raises(InputError, match=r"tensor \(2, 3, 4, 4\).*texts"):
            reward(images)


class Model:
    def log_likelihood(self, rows):
        return torch.tensor([-6.0, -1.0, 0.0]), torch.tensor([3, 2, 0])


def test_fluency_needs_a_model_and_binds_through_combinations():
    with pytest.raises(SteerError, match="fluency: needs a language model"):
        score(fluency, "a")
    with pytest.raises(UnsupportedError, match=r"perplexity needs a language model.*object"):
        perplexity.bind(object())
    assert fluency.bind(Model())(samples(TEXTS)).tolist() == [-2, -0.5, -10]
    assert perplexity.bind(Model())(samples(TEXTS)).tolist() == pytest.approx([math.e**2, math.e**0.5, math.e**10])
    nested = Ensemble([1 + (2 * fluency).cached(), sentiment.clip(-1, 0)], how="worst").standardised(0, 2)
    assert nested.bind(Model())(samples(TEXTS)).tolist() == [-1.5, score(sentiment, TEXTS[1])[0] / 2, -9.5]
    assert sentiment.clip(0, 1).bind(Model()) == sentiment.clip(0, 1)


def test_diversity():
    assert distinct_n(["a b a", "A b"], 1) == 2 / 5
    assert distinct_n(["a b a", "A b"], 2) == 2 / 3
    assert distinct_n(["a"], 2) == distinct_n([], 1) == 0
    assert diversity(["a b c", "a b c"]) == {"distinct-1": 0.5, "distinct-2": 0.5, "distinct-3": 0.5, "unique": 0.5}


# ------------------------------------------------------------------------------------------------------------- algebra


def test_identities():
    a, b, rows = sentiment, length, samples(TEXTS)
    x, y = a(rows), b(rows)
    for reward, expected in [
        (0.7 * a - 0.3 * b, 0.7 * x - 0.3 * y),
        (np.float64(2) * a + Scores(1, 2, 3), 2 * x + torch.tensor([1, 2, 3])),
        (Scores(1, 2, 3) - a, torch.tensor([1, 2, 3]) - x),
        (1 - a * b / 4, 1 - x * y / 4),
        (-(a + b), -x - y),
        (a + (lambda texts: [len(t) for t in texts]), x + torch.tensor([len(t) for t in TEXTS])),
        (b.clip(high=5), y.clamp(max=5)),
        (b.standardised(3, 2), (y - 3) / 2),
        (sum([a, b]), x + y),
    ]:
        assert torch.allclose(reward(rows), expected, rtol=0, atol=1e-12), reward
    assert repr(0.7 * a - 0.3 * (b - -a)) == "0.7*sentiment - 0.3*(length - -sentiment)"
    assert repr(Wrapped(Scores(1))) == "Scores"


def test_what_cannot_be_lifted():
    for bad in ("sentiment", None, True, float("nan"), Scores):
        with pytest.raises(InputError, match="reward: got"):
            lift(bad)
    for broken in (lambda: sentiment / 0, lambda: 1 / lift(length.clip(0)), lambda: length.clip(2, 1)):
        with pytest.raises((InputError, TypeError)):
            broken()


def test_callables_are_called_by_signature():
    rows = samples(["x", "yy"], prompts=["p", "qqq"], group=[1, 0])
    for fn in (
        lambda texts: [len(t) for t in texts],
        lambda texts, scale=1: np.array([len(t) for t in texts]),
        lambda prompts, texts: torch.tensor([len(p + t) for p, t in zip(prompts, texts, strict=True)]),
        lambda completions, prompts, **rest: [len(p + t) for p, t in zip(prompts, completions, strict=True)],
    ):
        assert CallableReward(fn)(rows).tolist() in ([1, 2], [4, 3])
    for fn in (lambda: 0, lambda a, b, c: 0, lambda a, *, key: 0):
        with pytest.raises(InputError, match=r"fn\(texts\) or fn\(prompts, texts\)"):
            CallableReward(fn)


def test_errors_name_the_reward():
    rows = samples(["a", "b"])
    for fn, message in [
        (lambda texts: [0.0, float("nan")], "reward mine: returned NaN for sample 1"),
        (lambda texts: [0.0], r"reward mine: returned shape \(1,\)"),
        (lambda texts: 1 / 0, "reward mine: raised ZeroDivisionError"),
    ]:
        with pytest.raises(RewardError, match=message):
            (1 + 2 * CallableReward(fn, "mine").clip(0, 1))(rows)


def test_cache_scores_each_pair_once():
    calls = []

    def fn(prompts, texts):
        calls.append(list(zip(prompts, texts, strict=True)))
        return [len(t) for t in texts]

    reward = CallableReward(fn).cached()
    chat = [{"role": "user", "content": "q"}]
    rows = samples(["a", "bb", "a", "a"], prompts=["p", chat], group=[0, 0, 0, 1])
    assert reward(rows).tolist() == reward(rows).tolist() == [1, 2, 1, 1]
    assert sorted(calls[0], key=str) == sorted([("p", "a"), ("p", "bb"), (chat, "a")], key=str)
    assert reward(samples(["ccc", "a"], prompts=["p"])).tolist() == [3, 1]
    assert calls[1:] == [[("p", "ccc")]]
    images = CallableReward(lambda x: x.flatten(1).sum(1)).cached()
    assert images(samples(torch.tensor([[1.0], [1.0], [2.0]], dtype=torch.bfloat16))).tolist() == [1, 1, 2]


def test_ensembles():
    members, one = [Scores(float(i)) for i in (1, 2, 3, 4, 5)], samples(["x"])
    found = [
        Ensemble(members, how, ddof=ddof)(one).item()
        for how, ddof in [("mean", 0), ("worst", 0), ("uncertainty", 0), ("uncertainty", 1)]
    ]
    assert found == [3, 1, 2, 1.75]
    three = samples(["x", "y", "z"])
    fitted = Ensemble([Scores(1, 2, 3), Scores(100, 300, 200), Scores(7, 7, 7)], "worst").fitted(three)
    assert fitted(three).tolist() == pytest.approx([-math.sqrt(1.5), 0, 0], abs=1e-12)
    for options in ({"how": "best"}, {"how": "uncertainty", "ddof": 5}):
        with pytest.raises(InputError, match="ensemble"):
            Ensemble(members, **options)
    with pytest.raises(InputError, match="ensemble members"):
        Ensemble([])


def chain():
    """The 27 rows of a three-state chain: stay 1/2, move 1/4 each; start (1/2, 1/4, 1/4)."""
    rows = list(itertools.product(range(3), repeat=3))
    start = (0.5, 0.25, 0.25)
    move = [[0.5 if i == j else 0.25 for j in range(3)] for i in range(3)]
    log_prob = torch.tensor([math.log(start[a] * move[a][b] * move[b][c]) for a, b, c in rows], dtype=torch.float64)
    twos = torch.tensor([float(row.count(2)) for row in rows], dtype=torch.float64)
    returns = torch.tensor([float(a == c) for a, _, c in rows], dtype=torch.float64)
    return log_prob, twos, returns


def test_constrained_meets_its_target_on_the_enumerated_chain():
    log_prob, twos, returns = chain()
    assert torch.logsumexp(log_prob + twos, 0).item() == pytest.approx(1.37488080, abs=1e-8)
    multiplier = solve_multiplier(twos, returns, 0.6, log_weight=log_prob)
    weights = torch.softmax(log_prob + twos + multiplier * returns, 0)
    assert multiplier == pytest.approx(0.53638964, abs=1e-6)
    assert float(weights @ twos) == pytest.approx(1.99763753, abs=1e-6)
    rows = Samples(prompts=["p"], outputs=["x"] * 27, group=torch.zeros(27, dtype=torch.long), log_weight=log_prob)
    reward = Constrained(Scores(*twos), Scores(*returns), target=0.6)
    with pytest.raises(SteerError, match="multiplier is not known"):
        reward(rows)
    assert torch.allclose(reward.fitted(rows)(rows), twos + 0.53638964 * returns, rtol=0, atol=1e-6)
    halved = solve_multiplier(twos / 2, returns / 2, 0.3, beta=0.5, log_weight=log_prob)
    assert halved == pytest.approx(multiplier, abs=1e-9)
    for target in (0.0, 1.0, 1.5):
        with pytest.raises(InputError, match="strictly between 0 and 1"):
            solve_multiplier(twos, returns, target, log_weight=log_prob)


def test_constrained_averages_over_prompts():
    log_prob, twos, returns = chain()
    group = torch.arange(2).repeat_interleave(27)
    weight = torch.cat([log_prob, log_prob + 5])
    multiplier = solve_multiplier(twos.repeat(2), returns.repeat(2), 0.6, log_weight=weight, group=group)
    assert multiplier == pytest.approx(0.53638964, abs=1e-6)


# -------------------------------------------------------------------------------------------------------------- parser


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("0.7*sentiment-0.3*length", 0.7 * sentiment - 0.3 * length),
        ("keywords:lake,boat", Keywords(("lake", "boat"))),
        ("keywords: lake", None),
        ("keywords:lake, boat - 1", Keywords(("lake", "boat")) - 1),
        ("-sentiment", -sentiment),
        ("sentiment + keywords:lake,boat", sentiment + Keywords(("lake", "boat"))),
        ("2*(sentiment - profanity)", 2 * (sentiment - profanity)),
        ('keywords:"ice cream",boat', Keywords(("ice cream", "boat"))),
        ("keywords:हिन्दी,don't,'well-known'", Keywords(("हिन्दी", "don't", "well-known"))),
        ("length:target=20/2", Length(20) / 2),
        ("sentiment/2", sentiment / 2),
        ("1e-2 * - -readability:grade", 0.01 * (-1 * (-1 * Readability("grade")))),
        ("profanity:share*.5", Profanity("share") * 0.5),
        ('rouge:"a cat, asleep"', Rouge("a cat, asleep")),
        ("(2+3)*fluency - perplexity", 5 * fluency - perplexity),
        ("sentiment - length - 1 - 2", sentiment - length - 1 - 2),
    ],
)
def test_parser_accepts(text, same):
    if same is None:
        with pytest.raises(InputError):
            parse_reward(text)
        return
    assert parse_reward(text) == same
    assert parse_reward(repr(same)) == same


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "reward: got ''"),
        ("sentimant", "did you mean 'sentiment'"),
        ("lenght:target=20", "did you mean 'length'"),
        ("nonsense", r"keywords.*module:function"),
        ("3 + 4", "at least one reward"),
        ("sentiment +", "at character 12"),
        ("(sentiment", r"\) at character"),
        ("sentiment length", "operator"),
        ("sentiment)", "operator"),
        ("* sentiment", "a reward, a number"),
        ("sentiment / 0", "divisor"),
        ("2 / sentiment", "divisor"),
        ("sentiment ** 2", "a reward, a number"),
        ("length:target=-5", "cannot read"),
        ("length:target=many", r"length\[:target=WORDS\]"),
        ("length:goal=5", "unexpected keyword"),
        ("sentiment:5", "too many positional"),
        ("readability:hard", "ease, grade"),
        ("__import__('os')", "cannot read|unknown|allowed"),
        ("0.5*org/model-v2", "did you mean|keywords"),
        ("no_such_module:fn", "importing 'no_such_module' failed"),
        ("math:no_such", "no function or Reward 'no_such'"),
        ("./no-such-folder", "a folder with config.json"),
        ("(" * 5000 + "sentiment", "nested less deeply"),
    ],
)
def test_parser_refuses(text, message):
    with pytest.raises(InputError, match=message):
        parse_reward(text)


def test_parser_imports_functions_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def count(texts):\n    return [len(t) for t in texts]\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    reward = parse_reward("2*my_rewards:count - 1")
    assert sys.path == before
    assert score(reward, "abc") == [5]
    assert repr(reward) == "2*my_rewards:count - 1"
    for text in ("my_rewards:count", "org/model", "./folder", '"gpt2"', "os:system"):
        with pytest.raises(InputError):
            parse_reward(text, trusted=False)
    assert parse_reward("sentiment", trusted=False) == sentiment


def test_registry_and_as_reward(monkeypatch):
    monkeypatch.setattr("steer.rewards.parse._registry", dict(parse._registry))
    register(
        "starts", lambda letter: CallableReward(lambda texts: [t.startswith(letter) for t in texts]), "starts:LETTER"
    )
    assert score(parse_reward("2*starts:a"), "ab", "ba") == [2, 0]
    assert shipped()["starts"] == "starts:LETTER"
    assert as_reward(None) is None
    assert as_reward(sentiment) is sentiment
    assert as_reward("sentiment") == sentiment
    assert score(as_reward(lambda texts: [1.0] * len(texts)), "a") == [1]
    with pytest.raises(InputError, match="a text, a Reward, a callable or None"):
        as_reward(3)


# -------------------------------------------------------------------------------------------------------------- models

WORDS = ["hello", "bad", "good", "cat", "dog", "a", "b", "c", "d", ".", "user", "assistant", ":"]
CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }} [EOS] {% endfor %}"
ROWS = samples(
    ["good cat", "bad", "hello a b c d . good", "", "dog dog"], prompts=["hello", "a b c"], group=[0, 1, 0, 1, 0]
)


def tokenizer(special, **options):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "sep_token" in special:
        core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **special, **options)


def encoder(folder: Path, labels=("bad", "good", "so-so"), **options):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=18,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=12,
        id2label=dict(enumerate(labels)),
        **options,
    )
    model = BertForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer(special, model_input_names=names).save_pretrained(folder)
    return model


def decoder():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=18,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=1,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=4,
    )
    model = LlamaForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def one_by_one(reward):
    return torch.cat([reward(ROWS.select(torch.tensor([i]))) for i in range(len(ROWS))])


def test_classifier_gives_log_probabilities_of_a_label(tmp_path):
    from steer.adapters.rewards.text import ModelReward

    model = encoder(tmp_path)
    reward = parse_reward(f"{tmp_path}:good")
    total = sum(ModelReward(tmp_path, label)(ROWS).exp() for label in ("bad", 1, "SO-SO"))
    assert torch.allclose(total, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.allclose(reward(ROWS), one_by_one(reward), rtol=0, atol=1e-6)
    assert reward.labels == ["bad", "good", "so-so"]
    ids = torch.tensor([[2, 5, 3, 7, 8, 3]])  # [CLS] hello [SEP] good cat [SEP]
    logits = model(input_ids=ids, token_type_ids=torch.tensor([[0, 0, 0, 1, 1, 1]])).logits
    assert reward(ROWS)[0].item() == pytest.approx(logits.log_softmax(-1)[0, 1].item(), abs=1e-6)
    only = ModelReward(tmp_path, "good", template="{output}")
    other = samples(["good cat"], prompts=["other"])
    assert only(ROWS)[0].item() == pytest.approx(only(other).item(), abs=1e-6)
    long = samples(["bad " * 50 + "good cat"])
    assert torch.isfinite(reward(long)).all()
    assert repr(2 * reward) == f'2*"{tmp_path}":good'
    assert parse_reward(repr(2 * reward))(ROWS).tolist() == (2 * reward(ROWS)).tolist()


def test_multi_label_classifier_gives_the_label_its_own_probability(tmp_path):
    from steer.adapters.rewards.text import ModelReward

    encoder(tmp_path, problem_type="multi_label_classification")
    total = sum(ModelReward(tmp_path, label)(ROWS).exp() for label in range(3))
    assert (total - 1).abs().min() > 1e-3


def test_labels_are_checked_before_loading(tmp_path):
    from steer.adapters.rewards.text import ModelReward

    encoder(tmp_path, labels=("Bad", "bad", "good"))
    for label in (None, "BAD", "fine", 3, True):
        with pytest.raises(InputError, match=r"label: got .*0 \(Bad\), 1 \(bad\), 2 \(good\)"):
            ModelReward(tmp_path, label)
    with pytest.raises(InputError, match=r"config\.json"):
        ModelReward(tmp_path / "nothing")


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    from steer.adapters.rewards.text import ModelReward

    encoder(tmp_path).bert.save_pretrained(tmp_path)
    with pytest.raises(SteerError, match="no trained classifier; it lacks classifier"):
        ModelReward(tmp_path, 0)(ROWS)


@pytest.mark.parametrize("template", [None, CHAT])
def test_reward_model_without_a_pad_token_scores_batches_like_single_rows(template):
    from steer.adapters.rewards.text import ModelReward

    model, words = decoder(), tokenizer({"eos_token": "[EOS]"}, chat_template=template)
    reward = ModelReward((model, words), batch_size=3)
    assert torch.allclose(reward(ROWS), one_by_one(reward), rtol=0, atol=1e-6)
    assert model.config.pad_token_id is None
    assert words.truncation_side == "right"
    text = "hello" + "good cat" if template is None else "user : hello [EOS] assistant : good cat [EOS]"
    raw = model(**words(text, return_tensors="pt", add_special_tokens=False)).logits
    assert reward(ROWS)[0].item() == pytest.approx(raw.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("I'm sorry, but I can't help with that.", 1.0),
        ("I\u2019m unable to assist with this request.", 1.0),
        ("Sorry, but I'm not able to help.", 1.0),
        ("Sure, here is how you can do that: first", 0.0),
        ("The lake was calm. " * 12 + "I cannot say more.", 0.0),
        ("", 0.0),
    ],
)
def test_refusal(text: str, score: float) -> None:
    reward = parse_reward("refusal")
    samples = Samples(prompts=["x"], outputs=[text], group=torch.zeros(1).long(), log_weight=torch.zeros(1))
    assert reward(samples).tolist() == [score]

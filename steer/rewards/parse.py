"""Rewards from text, without `eval`.

    expression = term { (+ | -) term }        term = factor { (* | /) factor }
    factor = - factor | + factor | number | ( expression ) | atom
    atom = NAME | NAME:ARGUMENTS | MODULE:FUNCTION | "MODEL" | "MODEL":LABEL
    ARGUMENTS = item { , item }               item = word | "text" | key=word | key="text"

`NAME` is a shipped reward, `FUNCTION` a Python callable of an importable module (the current folder included),
`MODEL` a model id (`org/name`), a folder, or a file of `steer train reward` (`"helpful.safetensors":how=worst`). What
holds spaces, commas, hyphens or operators goes in quotes; a model id, folder or file that is the whole text needs none:
`org/my-model-v2`, `./my-model`, `org/my-model:LABEL`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.core import InputError, Reward, SteerError, check
from steer.rewards.algebra import CallableReward, Composable, Constant, combine, lift
from steer.rewards.boxes import Boxes
from steer.rewards.calls import ToolCall, UnitTests
from steer.rewards.image import (
    Brightness,
    Compressibility,
    Contrast,
    ImageClass,
    Incompressibility,
    Sharpness,
    Symmetry,
)
from steer.rewards.judged import JudgeReward
from steer.rewards.likelihood import Fluency, Perplexity
from steer.rewards.text import Keywords, Length, Profanity, Readability, Refusal, Rouge, Sentiment
from steer.rewards.trained import trained
from steer.rewards.verifiable import Answer, JsonSchema, Overlong, Regex

__all__ = ["as_reward", "parse_reward", "register", "shipped"]


_FORMS = 'module:function, a folder, or a model id org/name ("quoted" inside arithmetic)'
_WORD = r"""[^\s,"'+\-*/():=][^\s,"+\-*/():=]*"""
_QUOTED = r""""[^"]*"|'[^']*'"""
_ITEM = rf"(?:{_WORD}=)?(?:{_QUOTED}|{_WORD})"
_ARGUMENTS = rf":(?P<arguments>{_ITEM}(?:\s*,\s*{_ITEM})*)"
_TOKEN = re.compile(
    rf"""\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![^\W\d])
    |(?P<symbol>[-+*/()])
    |(?P<name>[^\W\d][\w.]*|{_QUOTED})(?:{_ARGUMENTS})?)\s*""",
    re.VERBOSE,
)
_MODEL = re.compile(rf"(?P<source>[^\s:*()+,\"']+)(?::(?P<label>{_ITEM}))?")
_MODEL_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


@dataclass(frozen=True)
class _Shipped:
    factory: Callable[..., Reward]
    usage: str
    loads: bool = False


_registry: dict[str, _Shipped] = {}


def register(name: str, factory: Callable[..., Reward], usage: str | None = None, *, loads: bool = False) -> None:
    """Let `parse_reward` read `name` and `name:ARGUMENTS`: items arrive as text, `key=item` by keyword.

    `usage` is how error messages show it, for instance `keywords:WORD,WORD`. A reward that `loads` a model from a
    folder or the hub is refused in text that is not trusted.
    """
    check(bool(re.fullmatch(r"[^\W\d]\w*", name)), "reward name", name, "letters, digits and _, a letter first")
    _registry[name] = _Shipped(factory, usage or name, loads)


def shipped() -> dict[str, str]:
    """Registered names and how each is written."""
    return {name: entry.usage for name, entry in sorted(_registry.items())}


def as_reward(x: Any, label: str | int | None = None) -> Reward | None:
    """None stays None, text is parsed, a `Reward` is itself, a callable is wrapped. A text-classification pipeline of
    transformers scores by the log-probability of `label`, which it needs where it knows several. Raises `InputError`.
    """
    if any(kind.__module__.startswith("transformers.pipelines") for kind in type(x).__mro__):
        named = any(kind.__name__ == "TextClassificationPipeline" for kind in type(x).__mro__)
        check(named, "reward", type(x).__name__, "a pipeline of text-classification")
        from steer.adapters.rewards.text import ModelReward

        return ModelReward((x.model, x.tokenizer), label)
    check(label is None, "label", label, "unset: of a pipeline alone")
    if x is None or isinstance(x, Reward):
        return x
    if isinstance(x, str):
        return parse_reward(x)
    check(callable(x), "reward", x, "a text, a Reward, a callable or None")
    return lift(x)


def parse_reward(text: str, *, trusted: bool = True, names: Mapping[str, Reward] | None = None) -> Reward:
    """The reward that `text` describes, checked as far as it can be without loading a model.

    With `trusted=False` (text from a stranger) only shipped names are allowed, and those in `names`: no imports,
    folders or models.
    """
    check(isinstance(text, str) and bool(text.strip()), "reward", text, _allowed(trusted))
    whole = _whole_model(text.strip(), trusted)
    if whole is not None:
        return whole
    try:
        parsed = _Parser(text, trusted, names or {}).parse()
    except RecursionError:
        raise InputError("reward", text, "an expression that is nested less deeply") from None
    check(not isinstance(parsed, Constant), "reward", text, "an expression with at least one reward, not only numbers")
    return parsed


def _allowed(trusted: bool = True) -> str:
    names = ", ".join(name for name, entry in sorted(_registry.items()) if trusted or not entry.loads)
    more = f" (steer rewards says how each is written); {_FORMS}" if trusted else ""
    return f"{names}{more}; joined by + - * / ( )"


def _whole_model(text: str, trusted: bool) -> Reward | None:
    match = _MODEL.fullmatch(text)
    if match is None:
        return None
    source = match["source"]
    first = re.match(r"\w*", source)
    shipped_first = first is not None and first[0] in _registry
    path = source.startswith(("./", "../", "/", "~"))
    identifier = "/" in source and _MODEL_ID.fullmatch(source) and not re.match(r"[-.\d]", source)
    # A stranger is told nothing of what lies on this machine: only the form of the text counts.
    folder = trusted and (Path(source).is_dir() or source.endswith(_HEADS))
    if path or (not shipped_first and (identifier or folder)):
        return _model(source, _items(match["label"]), text, trusted)
    return None


def _items(arguments: str | None) -> list[tuple[str | None, str]]:
    found = []
    for item in re.findall(_ITEM, arguments or ""):
        key, separator, value = item.partition("=") if item[0] not in "\"'" else ("", "", item)
        found.append((key, value) if separator else (None, item))
    return [(key, value[1:-1] if value[0] in "\"'" else value) for key, value in found]


def _split(items: list[tuple[str | None, str]]) -> tuple[list[str], dict[str, str]]:
    return [value for key, value in items if key is None], {key: value for key, value in items if key is not None}


class _Parser:
    def __init__(self, text: str, trusted: bool, names: Mapping[str, Reward]) -> None:
        self.text, self.trusted, self.names, self.at = text, trusted, names, 0
        self.tokens: list[re.Match[str]] = []
        position = 0
        while position < len(text.rstrip()):
            match = _TOKEN.match(text, position)
            if match is None:
                rest = text[position:].strip()[:30]
                raise InputError("reward", f"{text} (cannot read it from {rest!r} on)", _allowed(trusted))
            self.tokens.append(match)
            position = match.end()

    def parse(self) -> Composable:
        parsed = self.expression()
        self.expect(self.peek() is None, "the end of the text or an operator + - * /")
        return parsed

    def peek(self) -> str | None:
        """The symbol that comes next, the empty text for another token, None at the end."""
        return (self.tokens[self.at]["symbol"] or "") if self.at < len(self.tokens) else None

    def expect(self, condition: bool, allowed: str) -> None:
        if not condition:
            position = self.tokens[self.at].start() if self.at < len(self.tokens) else len(self.text)
            raise InputError("reward", self.text, f"{allowed} at character {position + 1}")

    def expression(self) -> Composable:
        return self.chain("+-", self.term)

    def term(self) -> Composable:
        return self.chain("*/", self.factor)

    def chain(self, symbols: str, part: Callable[[], Composable]) -> Composable:
        left = part()
        while (symbol := self.peek()) and symbol in symbols:
            self.at += 1
            left = combine(left, symbol, part())
        return left

    def factor(self) -> Composable:
        symbol = self.peek()
        self.expect(symbol is not None and symbol not in ("*", "/", ")"), "a reward, a number or (")
        token = self.tokens[self.at]
        self.at += 1
        if symbol in ("+", "-"):
            return -self.factor() if symbol == "-" else self.factor()
        if symbol == "(":
            inner = self.expression()
            self.expect(self.peek() == ")", ")")
            self.at += 1
            return inner
        return lift(float(token["number"])) if token["number"] else self.atom(token)

    def atom(self, token: re.Match[str]) -> Composable:
        name, items = token["name"], _items(token["arguments"])
        given = token[0].strip()
        if name[0] in "\"'":
            return lift(_model(name[1:-1], items, given, self.trusted))
        if name in self.names:
            check(not items, "reward", given, f"{name}, which takes no arguments")
            return lift(self.names[name])
        if name in _registry:
            check(self.trusted or not _registry[name].loads, "reward", given, _allowed(self.trusted))
            return lift(_make(name, items, given))
        if len(items) == 1 and items[0][0] is None:
            return lift(_function(name, items[0][1], given, self.trusted))
        named = f"here also: {', '.join(self.names)}" if self.names else ""
        raise _unknown(name, given, self.trusted, named)


def _unknown(name: str, given: str, trusted: bool, why: str = "") -> InputError:
    close = difflib.get_close_matches(name.lower(), _registry, n=1, cutoff=0.6)
    hints = [part for part in (why, f"did you mean {close[0]!r}?" if close else "") if part]
    reason = f" ({'; '.join(hints)})" if hints else ""
    return InputError("reward", f"{given}{reason}" if reason else given, _allowed(trusted))


def _make(name: str, items: list[tuple[str | None, str]], given: str) -> Reward:
    entry = _registry[name]
    values, options = _split(items)
    try:
        inspect.signature(entry.factory).bind(*values, **options)
    except TypeError as error:
        raise InputError("reward", given, f"{entry.usage} ({error})") from None
    try:
        return entry.factory(*values, **options)
    except SteerError:
        raise
    except (TypeError, ValueError):
        raise InputError("reward", given, entry.usage) from None


def _function(module: str, path: str, given: str, trusted: bool) -> Reward:
    if not trusted:
        raise _unknown(module, given, trusted)
    try:
        found: Any = _imported(module)
    except Exception as error:
        raise _unknown(module, given, trusted, f"importing {module!r} failed: {error}") from error
    for part in path.split("."):
        found = getattr(found, part, None)
    if isinstance(found, Reward):
        return found
    if not callable(found) or isinstance(found, type):
        raise _unknown(module, given, trusted, f"module {module!r} has no function or Reward {path!r}")
    return CallableReward(found, given)


def _imported(module: str) -> Any:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(here)


def _model(source: str, items: list[tuple[str | None, str]], given: str, trusted: bool) -> Reward:
    check(trusted, "reward", given, _allowed(trusted))
    values, options = _split(items)
    if source.endswith(_HEADS):
        return trained(source, values, options, given)
    label = options.pop("label", None) or next(iter(values), None)
    check(len(items) <= 1 and not options, "reward", given, f"{source!r} or {source!r}:LABEL")
    local = Path(source).expanduser().is_dir() or source.startswith((".", "/", "~"))
    check(local or bool(_MODEL_ID.fullmatch(source)), "reward", given, _allowed())
    from steer.adapters.rewards.text import ModelReward

    return ModelReward(source, label=label)


_HEADS = ".safetensors"
"""Files of `steer train reward`."""


def _keywords(*words: str) -> Reward:
    return Keywords(words)


def _length(target: str | None = None) -> Reward:
    return Length(None if target is None else float(target))


def _rouge(reference: str) -> Reward:
    return Rouge(reference)


def _unit_tests(*, seconds: str = "5", megabytes: str = "512") -> Reward:
    return UnitTests(float(seconds), int(megabytes))


def _boxes(*, low: str = "0.5", high: str = "0.75", over: str = "matched") -> Reward:
    return Boxes(float(low), float(high), over)


def _image_class(*labels: str) -> Reward:
    return ImageClass(labels)


def _clip(text: str | None = None, *, model: str | None = None) -> Reward:
    from steer.adapters.rewards.images import ClipReward

    return ClipReward(text) if model is None else ClipReward(text, model)


def _pickscore(text: str | None = None) -> Reward:
    from steer.adapters.rewards.images import PickScore

    return PickScore(text)


def _aesthetic(*, head: str, model: str | None = None) -> Reward:
    from steer.adapters.rewards.images import AestheticReward

    return AestheticReward(head) if model is None else AestheticReward(head, model)


def _classifier(label: str | None = None, *, model: str) -> Reward:
    from steer.adapters.rewards.images import ImageClassifierReward

    return ImageClassifierReward(model, label)


register("sentiment", Sentiment)
register("readability", lambda scale="ease": Readability(scale), "readability[:grade]")
register("length", _length, "length[:target=WORDS]")
register("keywords", _keywords, "keywords:WORD,WORD")
register("profanity", lambda how="any": Profanity(how), "profanity[:share]")
register("rouge", _rouge, 'rouge:"REFERENCE"')
register("refusal", Refusal)
register(
    "judge", JudgeReward.read, 'judge[:RUBRIC.txt][,model="MODEL or openai:URL#NAME"][,low=1][,high=10]', loads=True
)
register("fluency", lambda: Fluency())
register("perplexity", lambda: Perplexity())
register("answer", lambda how="final": Answer(how), "answer[:whole or number] (column answer)")
register("regex", lambda pattern=None: Regex(pattern), 'regex[:"PATTERN"] (column pattern)', loads=True)
register("json_schema", lambda file=None: JsonSchema(file), "json_schema[:FILE] (column schema)", loads=True)
register("tool_call", lambda how="": ToolCall(how != "plain"), "tool_call[:plain] (column calls)")
register("unit_tests", _unit_tests, "unit_tests[:seconds=S][,megabytes=M] (column tests)", loads=True)
register("vision_boxes", _boxes, "vision_boxes[:over=all] (column boxes)")
register("overlong", lambda limit, buffer: Overlong(int(limit), int(buffer)), "overlong:LIMIT,BUFFER")
register("brightness", Brightness)
register("contrast", Contrast)
register("symmetry", lambda mirror="horizontal": Symmetry(mirror), "symmetry[:vertical]")
register("sharpness", Sharpness)
register("compressibility", Compressibility)
register("incompressibility", Incompressibility)
register("class", _image_class, "class:LABEL,LABEL")
register("clip", _clip, 'clip[:"TEXT"][,model="MODEL"]', loads=True)
register("pickscore", _pickscore, 'pickscore[:"TEXT"]', loads=True)
register("aesthetic", _aesthetic, 'aesthetic:head="FILE or MODEL"[,model="MODEL"]', loads=True)
register("classifier", _classifier, 'classifier:LABEL,model="MODEL"', loads=True)

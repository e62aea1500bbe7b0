"""Edits of the prompt: a system message, and directional stimuli.

Directional stimulus prompting (Li et al. 2023, 2302.11520) steers a model that cannot be touched: a small policy writes
a hint `z` for each input `x`, such as keywords of the wanted answer, and the model is asked with both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from steer.core import Prompt, PromptEdit, RawText, SteerError, check
from steer.core.messages import plain_messages

__all__ = [
    "TEMPLATES",
    "DirectionalStimulus",
    "FolderPolicy",
    "HintPolicy",
    "SystemPrompt",
    "Template",
    "direction_prompt",
    "policies_from",
]


_KEPT = 4096
_SLOTS = re.compile(r"(\{prompt\}|\{hint\})")


@dataclass(frozen=True)
class SystemPrompt(PromptEdit):
    """Puts `text` in the system message of every chat; an existing system message is replaced."""

    text: str

    def __post_init__(self) -> None:
        check(bool(self.text.strip()), "system prompt", self.text, "text that is not empty")

    def rewrite(self, prompt: Prompt) -> Prompt:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
        return [{"role": "system", "content": self.text}, *rest]


def direction_prompt(names: tuple[str, str], angle: float) -> SystemPrompt:
    """The system prompt that states a direction over two attributes of a reward, as integer weights `100 cos` and
    `100 sin` of an angle in degrees (directional preference alignment, Wang et al. 2024, 2402.18571). A model that was
    not tuned on such prompts need not follow it: best-of-n and FK under `FILE:angle=` are the exact way.
    """
    check(len(names) == 2 and all(names), "names", names, "two attributes")
    check(math.isfinite(angle), "angle", angle, "degrees")
    turn = math.radians(angle)
    first, second = round(100 * math.cos(turn)), round(100 * math.sin(turn))
    return SystemPrompt(
        f"You are rated by a weighted sum of {names[0]} (weight {first}) and {names[1]} (weight {second}). "
        "Maximise your rating."
    )


_loaders: list[Callable[[str], Callable[[list[str]], Sequence[str]]]] = []


def policies_from(load: Callable[[str], Callable[[list[str]], Sequence[str]]]) -> None:
    """Have policies of hints that are networks loaded so. Called by `steer.loading`, which knows the engines."""
    _loaders[:] = [load]


@dataclass(frozen=True)
class FolderPolicy:
    """A policy of hints in a folder of `steer train stimulus`; its network is loaded when it is first asked."""

    folder: str

    def __call__(self, inputs: list[str]) -> list[str]:
        if not _loaders:
            raise SteerError(f"hints of {self.folder}: import steer.loading first, which knows how to load a network")
        return list(_opened(self.folder)(inputs))


@cache
def _opened(folder: str) -> Callable[[list[str]], Sequence[str]]:
    return _loaders[0](folder)


@dataclass(frozen=True)
class HintPolicy:
    """A language model that writes the hints of `DirectionalStimulus`: its greedy continuation of `instruction`, up to
    the end of the line.

    Args:
        model: anything with `generate`, such as what `steer.load` returns.
        instruction: the policy's own prompt; `{prompt}` is the input.
        max_tokens: of a hint at most.
    """

    model: Any
    instruction: str = "Name the keywords of a good answer, separated by commas.\n\n{prompt}"
    max_tokens: int = 64

    def __post_init__(self) -> None:
        check("{prompt}" in self.instruction, "instruction", self.instruction, "a text with {prompt}")

    def __call__(self, inputs: Sequence[str]) -> list[str]:
        asked = [self.instruction.replace("{prompt}", text) for text in inputs]
        drawn = self.model.generate(asked, temperature=0, max_new_tokens=self.max_tokens, stop=["\n"])
        return list(drawn.texts)


@dataclass(frozen=True)
class Template:
    """What takes an input's place: a text in which `{prompt}` is the input and `{hint}` the hint.

    Args:
        text: it has `{hint}`; without `{prompt}` the model sees the hint alone.
        words: of the input that are shown, between spaces; None shows all.
        raw: it is continued as it stands, without the chat template.
    """

    text: str = "{prompt}\n\nHint: {hint}"
    words: int | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        check("{hint}" in self.text, "template", self.text, "a text with {hint}, and {prompt} where the input is shown")
        check(self.words is None or self.words >= 1, "words", self.words, "an integer of 1 or more")

    def filled(self, text: str, hint: str) -> str:
        """The template with its slots filled; `RawText` where it is raw."""
        return self._made(self.text, text, hint)

    def bare(self, text: str) -> str:
        """The same without a hint: lines that hold `{hint}` are left out; where nothing is left, the input."""
        rest = "\n".join(line for line in self.text.split("\n") if "{hint}" not in line).strip("\n")
        return self._made(re.sub(r"\n{3,}", "\n\n", rest) or "{prompt}", text, "")

    def _made(self, template: str, text: str, hint: str) -> str:
        # Texts may hold braces of their own, and the words {hint} or {prompt}: each slot is filled once.
        parts = text.split()
        shown = text if self.words is None or len(parts) <= self.words else " ".join(parts[: self.words])
        slots = {"{prompt}": shown, "{hint}": hint}
        made = "".join(slots.get(part, part) for part in _SLOTS.split(template))
        return RawText(made) if self.raw else made


@dataclass(frozen=True)
class DirectionalStimulus(PromptEdit):
    """Puts a hint into every prompt, and into the last user message of every chat. A prompt whose hint is empty is left
    as it is.

    Args:
        policy: hints for a list of inputs, one each: a function such as `HintPolicy`, or a table `{input: hint}`. It is
            asked once for each input, for all that come together in one call.
        template: what takes the input's place, a `Template` or its text. One that is raw takes a whole chat's place.

    Raises `InputError` for an input that the table lacks, and `SteerError` where the policy returns something else than
    one text for each input.
    """

    policy: Callable[[list[str]], Sequence[str]] | Mapping[str, str]
    template: str | Template = "{prompt}\n\nHint: {hint}"
    _known: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check(callable(self.policy) or isinstance(self.policy, Mapping), "policy", self.policy, "a function or a table")
        check(bool(self.slots.text), "template", self.template, "a text with {hint}")

    @property
    def slots(self) -> Template:
        """The template."""
        return self.template if isinstance(self.template, Template) else Template(self.template)

    def rewrite(self, prompt: Prompt) -> Prompt:
        return self.rewrite_all([prompt])[0]

    def rewrite_all(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        inputs = [_input(prompt) for prompt in prompts]
        hints, slots = self._hints(list(dict.fromkeys(inputs))), self.slots
        return [
            _with(p, slots.filled(text, hints[text])) if hints[text] else p
            for p, text in zip(prompts, inputs, strict=True)
        ]

    def _hints(self, inputs: list[str]) -> dict[str, str]:
        found = {text: self._known[text] for text in inputs if text in self._known}
        missing = [text for text in inputs if text not in found]
        if missing:
            found.update(zip(missing, self._asked(missing), strict=True))
            self._known.update(found)
            for text in list(self._known)[: max(0, len(self._known) - _KEPT)]:
                del self._known[text]
        return found

    def _asked(self, inputs: list[str]) -> list[str]:
        if isinstance(self.policy, Mapping):
            for text in inputs:
                check(text in self.policy, "prompt", text, "inputs that the table of hints has")
            return [str(self.policy[text]).strip() for text in inputs]
        hints = list(self.policy(inputs))
        if len(hints) != len(inputs) or not all(isinstance(hint, str) for hint in hints):
            raise SteerError(
                f"the hint policy returned {len(hints)} values for {len(inputs)} inputs: one text for each"
            )
        return [hint.strip() for hint in hints]


TEMPLATES: dict[str, Template] = {
    "hint-only": Template("Write a news summary in two sentences.\nIt must mention: {hint}"),
    "article+hint": Template("{prompt}\n\nKeywords: {hint}\n\nSummarise the article in two sentences.", words=150),
    "completion": Template(
        "Article: A storm closed the harbour of Ostby for two days. Ferries stayed in port, and shops ran out of bread "
        "before the first boat came through on Sunday.\n"
        "Keywords: storm; harbour; ferries; shops ran out\n"
        "Summary: A storm shut the harbour for two days; ferries stayed in port and shops ran out of bread.\n\n"
        "Article: {prompt}\nKeywords: {hint}\nSummary:",
        words=70,
        raw=True,
    ),
}
"""By name. Which of them makes a model heed a hint is to be measured: a small chat model that sees the article ignores
hints beside it.
"""


def _input(prompt: Prompt) -> str:
    """The text that the hint is for."""
    if isinstance(prompt, str):
        return str(prompt)
    asked = [message["content"] for message in plain_messages(prompt) if message["role"] == "user"]
    check(bool(asked), "prompt", prompt, "a chat with a user's text")
    return str(asked[-1])


def _with(prompt: Prompt, text: str) -> Prompt:
    """The prompt with another text in the place that `_input` reads."""
    if isinstance(text, RawText):
        return text
    if isinstance(prompt, str):
        return RawText(text) if isinstance(prompt, RawText) else text
    messages = list(prompt)
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    messages[last] = {**messages[last], "content": text}
    return messages

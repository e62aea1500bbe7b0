"""Prompts of token models: a tokenizer's chat template held to what it was given, and text to token ids.

A chat template is a program of its own. Some want a message's content as text and some as parts, some have no place for
a system prompt, and some leave out what they do not know without a word. So every kind of conversation (its roles, in
order) is rendered once with a marker in place of each content, as text and as parts: the form that shows all markers is
used, and where none does the conversation is refused by the message that got lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from steer.core import InputError, Prompt, RawText, check
from steer.core.errors import check_unicode, first_line
from steer.core.messages import Messages, plain_messages

__all__ = ["ChatTemplate", "PromptReader", "chats"]

_FORMS = ("text", "parts", "parts but for the system prompt")
_WRITTEN_OUT = re.compile(r"""['"]text['"]\s*:\s*['"]content\d{3}marker""")
"""Parts that a template for texts turns into the text of a list."""
_PRIVATE = range(0xF0000, 0xFFFFE)
"""Code points that mean nothing: they stand for control tokens while a template runs."""


def chats(tokenizer: Any) -> bool:
    """Whether plain prompts are wrapped as a user's message."""
    return bool(getattr(tokenizer, "chat_template", None))


class ChatTemplate:
    """A tokenizer's chat template, of the model `name`."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self._form = lru_cache(256)(self._tried)

    def render(self, prompt: Any, resumed: bool | None = None) -> str:
        """Text that the model reads. The assistant's own last words are continued, or (`resumed=False`) closed.

        Raises `InputError` where the template refuses the messages, loses one, or changes the words to be continued.
        """
        return self.rendered(plain_messages(prompt), resumed)

    def rendered(self, messages: Messages, resumed: bool | None = None) -> str:
        """`render` for messages whose content is text."""
        check(chats(self.tokenizer), "prompt", "messages", f"text: {self.name} has no chat template")
        form = self._form(json.dumps([{**m, "content": ""} for m in messages], default=str))
        last = messages[-1]
        if last["role"] != "assistant" or resumed is False:
            return self._whole(messages, self._apply(messages, form, add_generation_prompt=last["role"] != "assistant"))
        text, words = self._whole(messages, self._apply(messages, form, continue_final_message=True)), last["content"]
        kept = text.rstrip().endswith(words.strip()) or not words.strip()
        check(kept, "prompt", words, "other words to continue: the chat template changes these")
        # A template that trims takes the space before the next word; it is part of what is to be continued.
        return text if text.endswith(words) else text + words[len(words.rstrip()) :]

    def _apply(self, messages: Messages, form: str, **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(_formed(messages, form), tokenize=False, **options))
        except Exception as error:  # a program of its own, which refuses what it does not know
            given = f"messages that the chat template refuses ({first_line(error)})"
            raise InputError("prompt", given, "others") from error

    def _whole(self, messages: Messages, text: str) -> str:
        """The rendered text, in which every word of a user's is to be found: a template may cut what is long."""
        spaceless = "".join(text.split())
        for message in messages:
            kept = message["role"] != "user" or "".join(message["content"].split()) in spaceless
            check(kept, "prompt", message["content"], f"others: the chat template of {self.name} changes this one")
        return text

    def _tried(self, skeleton: str) -> str:
        """The form in which a conversation of these roles comes through whole."""
        messages = json.loads(skeleton)
        for i, message in enumerate(messages):
            message["content"] = f"content{i:03}marker"
        reasons = []
        for form in _FORMS:
            try:
                text = self._apply(messages, form, add_generation_prompt=messages[-1]["role"] != "assistant")
            except InputError as error:
                reasons.append(error)
                continue
            lost = [m for m in messages if m["content"] not in text or _WRITTEN_OUT.search(text)]
            if not lost:
                return form
            given = f"a message of role {lost[0]['role']!r}"
            reasons.append(InputError("prompt", given, f"others: the chat template of {self.name} leaves it out"))
        raise reasons[0]


def _formed(messages: Messages, form: str) -> Messages:
    def parts(message: dict[str, Any]) -> bool:
        return form == "parts" or (form == _FORMS[2] and message["role"] != "system")

    return [{**m, "content": [{"type": "text", "text": m["content"]}]} if parts(m) else m for m in messages]


class PromptReader:
    """Prompts to token ids with the tokenizer of the model `name`.

    Args:
        special: whether text that is continued gets the tokenizer's special tokens.
        split_special_tokens: read control tokens that are spelled in messages as text, as transformers calls it; those
            that the template writes stay what they are. Without it `<|im_end|>` in a user's message ends the message.
        kept: texts whose token ids are remembered; a prompt is checked, run and scored.
    """

    def __init__(
        self, tokenizer: Any, name: str, *, special: bool = True, split_special_tokens: bool = False, kept: int = 4096
    ) -> None:
        self.tokenizer, self.name, self.special = tokenizer, name, special
        self.split_special_tokens = split_special_tokens
        self.template = ChatTemplate(tokenizer, name)
        self._tokenise = lru_cache(kept)(self._tokenised)

    def forget(self) -> None:
        """Remember no texts from here on."""
        self._tokenise = lru_cache(0)(self._tokenised)

    @property
    def chats(self) -> bool:
        """Whether plain prompts are wrapped as a user's message."""
        return chats(self.tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids. Text becomes a user's message where there is a chat template, and is continued as it stands where
        there is none; a `RawText` is always continued, and so is a chat that ends with the assistant's own words.
        Raises `InputError`.
        """
        if isinstance(prompt, str):
            check_unicode("prompt", prompt)
            if not prompt or isinstance(prompt, RawText) or not self.chats:
                return list(self._tokenise(str(prompt), self.special))
            prompt = [{"role": "user", "content": str(prompt)}]
        messages = plain_messages(prompt)
        spelled = self.spelled([m["content"] for m in messages]) if self.split_special_tokens else []
        if not spelled:
            return list(self._tokenise(self.template.rendered(messages), False))
        return self._with_text(messages, spelled)

    def _tokenised(self, text: str, special: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    # ---- control tokens that are spelled in messages

    def spelled(self, contents: Sequence[str]) -> list[str]:
        """Control tokens that some content of a message spells out, the longest first: special tokens, and added ones
        that the template itself writes.
        """
        template = str(self.tokenizer.chat_template)
        added = [t for t in self.tokenizer.added_tokens_decoder.values() if t.special or t.content in template]
        names = {t.content for t in added if t.content.strip()} | set(self.tokenizer.all_special_tokens)
        found = {name for name in names if name and any(name in content for content in contents)}
        return sorted(found, key=lambda name: (-len(name), name))

    def _with_text(self, messages: Messages, spelled: list[str]) -> list[int]:
        """Token ids of messages in which the control tokens `spelled` are text. Code points without a meaning stand for
        them while the template runs; each is then cut after its first letter, and the halves are no token.
        """
        used = {c for m in messages for c in m["content"]}
        free = [chr(c) for c in _PRIVATE if chr(c) not in used][: len(spelled)]
        stand_in = dict(zip(spelled, free, strict=True))
        either = re.compile("|".join(map(re.escape, spelled)))
        text = self.template.rendered(
            [{**m, "content": either.sub(lambda found: stand_in[found[0]], m["content"])} for m in messages]
        )
        pieces = [""]
        for part in re.split(f"([{''.join(free)}])", text):
            whole = spelled[free.index(part)] if part in free else part
            pieces[-1] += whole[:1] if part in free else whole
            if part in free:
                pieces.append(whole[1:])
        ids = [i for n, piece in enumerate(pieces) for i in self._piece(piece, first=n == 0)]
        for name in spelled:
            control = self.tokenizer.convert_tokens_to_ids(name)
            allowed = f"text without {name}, which this tokenizer takes for a control token however it is written"
            check(ids.count(control) == text.count(name), "prompt", name, allowed)
        return ids

    def _piece(self, text: str, first: bool) -> tuple[int, ...]:
        """Token ids of text from inside a chat. Read after a line break, which is taken off again: some tokenizers put
        a space before a text (the same remedy as in transformers' `encode_marked_chat`).
        """
        if first or not text:
            return self._tokenise(text, False) if text else ()
        line_break, ids = self._tokenise("\n", False), self._tokenise("\n" + text, False)
        cut = len(line_break)
        return ids[cut:] if ids[:cut] == line_break else self._tokenise(text, False)

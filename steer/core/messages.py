"""Messages of a chat, whose content is text or parts of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer.core.errors import check, check_unicode

__all__ = ["Messages", "plain_messages"]

Messages = list[dict[str, Any]]


def plain_messages(prompt: Any) -> Messages:
    """Messages whose content is text, without fields that are null; parts of text are joined. Images and what else is
    no text are refused with `InputError`, which names the message.
    """
    allowed = "text, or messages with role and content"
    check(isinstance(prompt, Sequence) and len(prompt) > 0, "prompt", prompt, allowed)
    for message in prompt:
        fits = isinstance(message, Mapping) and {"role", "content"} <= set(message)
        check(fits and isinstance(message["role"], str), "prompt", message, allowed)
    texts = [_text(m, f"messages[{i}].content") for i, m in enumerate(prompt)]
    # Templates ask whether a field is there, and tables and clients write out all that they have as null.
    said = [{k: v for k, v in m.items() if v is not None} for m in prompt]
    return [{**m, "content": text} for m, text in zip(said, texts, strict=True)]


def _text(message: Mapping[str, Any], field: str) -> str:
    content, allowed = message["content"], "text, or a list of parts of type text"
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, str):
        check_unicode(field, content)
        return content
    check(isinstance(content, Sequence), field, content, allowed)
    for part in content:
        fits = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        check(fits, field, part, f"{allowed}: images, sound and files are not read")
        check_unicode(field, part["text"])
    return "".join(part["text"] for part in content)

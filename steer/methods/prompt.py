"""Edits of the prompt: the control beside every steering vector, and the slot for directional stimuli."""

from __future__ import annotations

from dataclasses import dataclass

from steer.core import Prompt, PromptEdit, check

__all__ = ["SystemPrompt"]


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

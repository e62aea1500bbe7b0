"""Conversations in which a draft is followed by what its critic says, and asked for again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steer.core import Prompt
from steer.critique.drafts import Draft

__all__ = ["Conversation"]


@dataclass(frozen=True)
class Conversation:
    """How a revision is asked for; see `Critique` for the fields."""

    template: str
    history: str
    feedback: str

    def asked(self, prompt: Prompt, line: Sequence[Draft]) -> Prompt:
        """What the next draft answers: the prompt, and earlier drafts with their critiques."""
        shown = line if self.history == "all" else line[-1:]
        return self.messages(prompt, [(str(d.output), self._feedback(d, line)) for d in shown])

    def messages(self, prompt: Prompt, turns: Sequence[tuple[str, str]]) -> Prompt:
        """The prompt, and a turn for each pair of a draft and what is said of it."""
        messages = [{"role": "user", "content": str(prompt)}] if isinstance(prompt, str) else list(prompt)
        for output, feedback in turns:
            asked = self.template.replace("{critique}", feedback)
            messages += [{"role": "assistant", "content": output or "..."}, {"role": "user", "content": asked.strip()}]
        return messages

    def _feedback(self, draft: Draft, line: Sequence[Draft]) -> str:
        if self.feedback == "none":
            return ""
        if self.feedback == "binary":
            return "Not accepted, try again."
        text = draft.text
        if self.feedback == "tried":
            tried = list(dict.fromkeys(str(d.output).strip() for d in line))
            listed = "\n".join(f"- {answer}" for answer in tried)
            text = f"{text}\nThese were tried before:\n{listed}"
        return text.strip()

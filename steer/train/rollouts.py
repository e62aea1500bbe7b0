"""Rollouts that `steer batch` wrote, as a value head is trained on them: sampling and learning scale apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from steer.core import InputError, Prompt, Reward, Samples, check

__all__ = ["Recorded"]

_ALLOWED = "records of steer batch: prompt or messages, and samples with a text"


@dataclass(frozen=True)
class Recorded:
    """Texts of several prompts, as many of each. A text is split into tokens again: where the model drew an unusual
    split of the same text, it is learnt from as the usual one.
    """

    prompts: list[Prompt]
    texts: list[list[str]]
    ended: list[list[bool]]
    """Whether the model ended a text itself."""
    rewards: list[list[float | None]]

    @classmethod
    def of(cls, records: Sequence[Any], system: str | None = None) -> Recorded:
        """From records, of which those with an error are left out; `system` is what the job put before each prompt.

        Raises:
            InputError: no record, one without texts, or records with different numbers of samples, by number.
        """
        prompts: list[Prompt] = []
        texts: list[list[str]] = []
        ended: list[list[bool]] = []
        rewards: list[list[float | None]] = []
        for i, record in enumerate(records):
            check(isinstance(record, Mapping), f"rollouts[{i}]", record, _ALLOWED)
            if record.get("error") is not None:
                continue
            samples, prompt = record.get("samples"), record.get("messages", record.get("prompt"))
            check(isinstance(samples, list) and prompt, f"rollouts[{i}]", sorted(record), _ALLOWED)
            for sample in samples:
                fits = isinstance(sample, Mapping) and isinstance(sample.get("text"), str)
                check(fits, f"rollouts[{i}].samples", sample, _ALLOWED)
            if texts:
                check(
                    len(samples) == len(texts[0]), f"rollouts[{i}].samples", len(samples), f"{len(texts[0])}, as before"
                )
            if system is not None and isinstance(prompt, str):
                prompt = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
            prompts.append(prompt)
            texts.append([sample["text"] for sample in samples])
            ended.append([sample.get("finish_reason") == "stop" for sample in samples])
            rewards.append([sample.get("reward") for sample in samples])
        check(len(prompts) >= 2 and len(texts[0]) > 0, "rollouts", f"{len(prompts)} rows with samples", "at least 2")
        return cls(prompts, texts, ended, rewards)

    @property
    def samples(self) -> int:
        """Of each prompt."""
        return len(self.texts[0])

    def check_rewards(self) -> None:
        """Raise `InputError` where a sample has no reward of its own."""
        for i, row in enumerate(self.rewards):
            for given in row:
                right = isinstance(given, int | float) and not isinstance(given, bool)
                check(right, f"rollouts[{i}].reward", given, "a number for each sample, or a reward to score them by")

    def drawn(self, model: Any, first: int, count: int, reward: Reward | None, most: int) -> Samples:
        """The samples of some prompts from number `first` on, with their tokens, at most `most`, and rewards."""
        rows = range(first, min(first + count, len(self.prompts)))
        tokens, end = [], model.tokenizer.eos_token_id
        for i in rows:
            for text, ended in zip(self.texts[i], self.ended[i], strict=True):
                ids = model.tokenizer(text, add_special_tokens=False)["input_ids"] + ([end] if ended else [])
                if not 1 <= len(ids) <= most:
                    raise InputError(f"rollouts[{i}]", f"{len(ids)} tokens", f"1 to {most} (max_new_tokens)")
                tokens.append(ids)
        group = torch.arange(len(rows)).repeat_interleave(self.samples)
        samples = Samples(
            prompts=[self.prompts[i] for i in rows],
            outputs=[text for i in rows for text in self.texts[i]],
            group=group,
            log_weight=torch.zeros(len(group), dtype=torch.float64),
            tokens=tokens,
        )
        own = [x for i in rows for x in self.rewards[i]]
        scores = torch.tensor(own, dtype=torch.float64) if reward is None else reward(samples)
        return replace(samples, reward=scores)

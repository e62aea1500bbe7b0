"""Settings of the training of stimuli."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from steer.core import check
from steer.methods.prompt import TEMPLATES, Template
from steer.train.settings import UNSET, Count, Finite, Part, Positive, Real, Seed, Whole, settings_class

__all__ = ["StimulusSettings"]


@settings_class
class StimulusSettings:
    """How a stimulus is trained."""

    policy: Literal["extract", "lm", "seq2seq"] = "extract"
    """What writes hints: a law over the input's own phrases, which needs no network; LoRA on a causal language model;
    or LoRA on an encoder-decoder such as T5.
    """
    stage: Literal["both", "sft", "rl"] = "both"
    """Hints out of references, then the reward through the black box; or one of them."""
    template: str = "hint-only"
    """What the black box is asked: a name among `steer.methods.prompt.TEMPLATES`, or a text with {hint}, and {prompt}
    where the input is shown.
    """
    raw: bool = False
    """A template of one's own is continued as it stands, without the chat template."""
    rounds: Whole = 20
    inputs: Count = 16
    """Inputs in a round."""
    hints: Count = 4
    """Of each input in a round."""
    texts: Count | None = None
    """Of the black box for each hint; default: 1 at temperature 0, else 4."""
    calls: Count = 2000
    """Texts of the black box in the whole run, at most."""
    beta: Finite = 0.005
    """c, the KL coefficient, from which the controller starts."""
    target_kl: Positive = 0.5
    """Nats a hint that the controller aims at."""
    horizon: Positive = 10.0
    """Of the controller: c moves by `clip(e, -.2, .2) / horizon` of itself in a round."""
    learning_rate: Positive | None = None
    """Of the rounds, by Adam; default: .02 for `extract`, 1e-4 for networks."""
    scale: Positive = 1.0
    """What the reward is multiplied by (10 in the paper)."""
    step: Real = 0.0
    """For each phrase of the hint: this much where the reference's hint has it, less `step_penalty` times this
    otherwise (1 in the paper).
    """
    step_penalty: Finite = 0.2
    most: Count = 8
    """Phrases of a hint."""
    words: Count | None = 150
    """Of an input that the policy reads, between spaces."""
    temperature: Finite = 0.0
    """Of the black box."""
    max_new_tokens: Count = 56
    """Of the black box's texts."""
    whole_sentences: bool = True
    """A text that was cut by its length is judged without its unfinished last sentence, where it has another."""
    held_out: Part = 0.2
    """Share of the inputs that nothing is learnt from."""
    evaluate: Whole = 50
    """Held-out inputs of the table at the end."""
    best: Whole = 4
    """Hints of which the table shows the best, which is what the rounds are to do without choosing; 0 leaves it out."""
    probe: Count = 16
    """Inputs on which it is measured whether the black box heeds a hint."""
    force: bool = False
    """Train although it does not, as far as can be told."""
    input: str = "input"
    """Column of the data; also `reference` and `hint`."""
    reference: str = "reference"
    hint: str = "hint"
    instruction: str = "Name the keywords of a good answer, separated by semicolons.\n\n{prompt}"
    """What policies that are networks are asked; {prompt} is the input."""
    lora_rank: Count = 8
    epochs: Count = 2
    """Over the hints out of references, for networks."""
    batch_size: Count = 8
    hint_tokens: Count = 48
    """Of a network's hint, at most."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        known = self.template in TEMPLATES or "{" in self.template or " " in self.template
        check(known, "template", self.template, f"{', '.join(TEMPLATES)}, or a text with {{hint}}")
        self.slots  # noqa: B018  # checks the text
        check("{prompt}" in self.instruction, "instruction", self.instruction, "a text with {prompt}")
        check(self.stage == "sft" or self.rounds > 0, "rounds", self.rounds, "1 or more, or stage sft")
        check(self.stage == "sft" or self.hints > 1, "hints", self.hints, "2 or more: they are compared")

    @property
    def slots(self) -> Template:
        """The template."""
        return TEMPLATES.get(self.template) or Template(self.template, self.words, self.raw)

    @property
    def drawn(self) -> int:
        """Texts for each hint."""
        return self.texts or (1 if self.temperature == 0 else 4)

    @property
    def rate(self) -> float:
        """Of the rounds."""
        return self.learning_rate or (0.02 if self.policy == "extract" else 1e-4)

    def recipe(self) -> dict[str, Any]:
        """The entries of the card."""
        return {name: value for name, value in asdict(self).items() if value is not UNSET and name != "force"}

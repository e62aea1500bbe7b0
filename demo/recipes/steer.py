"""Recipe of the Steer tab: one prompt, edits, and how to draw."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from steer.artifacts import MAX_STRENGTH
from steer.demo.recipes import LIMIT_TEXT, Job, Recipe, fitted, fitting

__all__ = ["MAX_TOKENS", "EditChoice", "SteerRecipe"]

MAX_TOKENS = 256


class EditChoice(BaseModel):
    """One edit: the name of an artifact, and settings in place of its card's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    strength: Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
    layers: Annotated[str, Field(max_length=200, pattern=r"^[0-9, -]*$|^all$")] = ""
    scope: Annotated[str, Field(max_length=40, pattern=r"^[a-z0-9:]*$")] = ""
    pairs: Annotated[str, Field(max_length=80, pattern=r"^[a-z_]*$")] = ""
    """Shipped pairs that the artifact was fitted to, where it is one of the page's own."""
    policy: bool = False
    """Whether it is a policy, towards which RL guidance goes; the strength is its w."""

    def options(self) -> dict[str, Any]:
        """Settings in place of the card's, by name."""
        return {key: value for key in ("layers", "scope") if (value := getattr(self, key))}

    def spec(self) -> str:
        """As `--edit` takes it."""
        return ":".join(
            [f"{self.name}.safetensors", f"{self.strength:g}", *(f"{k}={v}" for k, v in self.options().items())]
        )

    def shown(self) -> str:
        """As people read it."""
        return f"{self.name}, w = {self.strength:g}" if self.policy else self.spec().replace(".safetensors", "")


class SteerRecipe(Recipe):
    """What the Steer tab was asked."""

    tab: ClassVar[str] = "steer"

    model: Annotated[str, Field(max_length=400)]
    prompt: Annotated[str, Field(min_length=1, max_length=LIMIT_TEXT)]
    raw: bool = False
    """Whether the prompt is continued as it stands, without a chat template."""
    edits: Annotated[tuple[EditChoice, ...], Field(max_length=8)] = ()
    system: Annotated[str, Field(max_length=LIMIT_TEXT)] = ""
    """A system prompt that asks for the same, in a column of its own; empty: no such column."""
    reward: Annotated[str, Field(max_length=2000)] = "sentiment"
    temperature: Annotated[float, Field(ge=0, le=5)] = 0.7
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 60
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    script: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=MAX_TOKENS)] = ()
    """Tokens that `branch` begins with, where the text goes on from one of its tokens."""
    branch: Annotated[int, Field(ge=0, le=2)] = 1
    """The column that begins with the `script`: unsteered, steered, prompted."""

    def _drawing(self) -> dict[str, Any]:
        made: dict[str, Any] = {"max_new_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        return made | ({"reward": self.reward} if self.reward else {})

    def _guided(self, edit: EditChoice) -> dict[str, Any]:
        return {"tuned": edit.name, "w": edit.strength}

    def jobs(self) -> list[Job]:
        fits = [fitting(self.model, edit.name, edit.pairs) for edit in self.edits if edit.pairs]
        asked = {"model": self.model, "prompt": self.prompt, **({"raw": True} if self.raw else {}), **self._drawing()}
        made = [*fits, Job("unsteered", "generate", asked)]
        if self.edits:
            vectors = [edit.spec() for edit in self.edits if not edit.policy]
            given = {**asked, **({"edit": vectors} if vectors else {})}
            given |= {key: value for edit in self.edits if edit.policy for key, value in self._guided(edit).items()}
            made.append(Job("steered", "generate", given))
        if self.system and not self.raw:
            made.append(Job("prompted", "generate", {**asked, "system": self.system}))
        return made

    def python(self) -> str:
        raw = self.raw
        prompt = f"steer.RawText({self.prompt!r})" if raw else f"[{{'role': 'user', 'content': {self.prompt!r}}}]"
        given = "".join(f", {key}={value!r}" for key, value in self._drawing().items())
        lines = ["import steer", "", f"model = steer.load({self.model!r})"]
        fits = [edit for edit in self.edits if edit.pairs]
        if fits:
            lines[0:1] = ["import importlib.resources", "", "import steer"]
        for edit in fits:
            lines += fitted(edit.name, edit.pairs)
        lines += [f"prompt = {prompt}", f"print(model.generate(prompt{given}).texts[0])"]
        process = {key: value for key, value in self._drawing().items() if key in ("max_new_tokens", "temperature")}
        settings = ", ".join(f"{key}={value!r}" for key, value in process.items())
        for edit in self.edits:
            if edit.policy:
                lines[0:1] = ["import steer", "from steer.adapters.transformers.policy.folder import load_policy"]
                lines.append(f"tuned = load_policy(model, {edit.name!r}).process({settings})")
        if self.edits:
            specs = ", ".join(
                f"steer.RLGuidance(tuned, {edit.strength!r})" if edit.policy else repr(edit.spec())
                for edit in self.edits
            )
            lines.append(f"print(model.generate(prompt, edits=[{specs}]{given}).texts[0])")
        if self.system and not raw:
            lines.append(f"print(model.generate(prompt, system={self.system!r}{given}).texts[0])")
        return "\n".join(lines) + "\n"

    def request(self) -> dict[str, Any] | None:
        if any(edit.policy for edit in self.edits):
            return None
        steered: dict[str, Any] = {
            "edits": [{"name": e.name, "strength": e.strength, **e.options()} for e in self.edits]
        }
        steered |= {"reward": self.reward} if self.reward else {}
        asked = {"prompt": self.prompt} if self.raw else {"messages": [{"role": "user", "content": self.prompt}]}
        drawing = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        return {"model": self.model, **asked, **drawing, "steer": steered}

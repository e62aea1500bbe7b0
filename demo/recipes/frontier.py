"""Recipe of the tab Frontier: methods at several strengths on a set of prompts."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from steer.demo.recipes import LIMIT_TEXT, Job, Recipe, fitted, fitting
from steer.demo.recipes.steer import EditChoice
from steer.measure.frontier import SWEEPS

__all__ = ["FrontierRecipe"]

_PROMPTS = "frontier_prompts.json"


class FrontierRecipe(Recipe):
    """What was asked there."""

    tab: ClassVar[str] = "frontier"

    model: Annotated[str, Field(max_length=400)]
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=LIMIT_TEXT)], ...], Field(max_length=32)]
    reward: Annotated[str, Field(min_length=1, max_length=2000)] = "sentiment"
    methods: Annotated[tuple[Literal["best-of-n", "fk"], ...], Field(min_length=1)] = ("best-of-n",)
    """Samplers, each at the strengths of `steer.measure.frontier.SWEEPS`."""
    edits: Annotated[tuple[EditChoice, ...], Field(max_length=4)] = ()
    """Artifacts, each at the `strengths`; the strength of their own plays no part."""
    strengths: Annotated[tuple[Annotated[float, Field(ge=-1000, le=1000)], ...], Field(max_length=12)] = (
        0.1,
        0.15,
        0.2,
    )
    system: Annotated[str, Field(max_length=LIMIT_TEXT)] = ""
    """A system prompt that asks for the same; empty: no such point."""
    n: Annotated[int, Field(ge=1, le=32)] = 4
    """Texts of a prompt, of the model and of methods that do not choose."""
    max_tokens: Annotated[int, Field(ge=1, le=128)] = 24
    temperature: Annotated[float, Field(gt=0, le=5)] = 0.7
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @property
    def points(self) -> int:
        """Points that will be measured, the model's own among them."""
        own = len(self.edits) * len(self.strengths) + bool(self.system)
        return 1 + own + sum(len(SWEEPS[name]) for name in self.methods)

    @property
    def texts(self) -> int:
        """Texts that will be written for each prompt, of all candidates."""
        own = self.n * (1 + len(self.edits) * len(self.strengths) + bool(self.system))
        sizes = ("n", "num_particles", "num_candidates")
        chosen = [next(given[key] for key in sizes if key in given) for name in self.methods for given in SWEEPS[name]]
        return own + sum(chosen)

    def drawing(self) -> dict[str, Any]:
        """Settings of every call of `generate`."""
        return {"max_new_tokens": self.max_tokens, "temperature": self.temperature}

    def _fits(self) -> list[EditChoice]:
        return [edit for edit in self.edits if edit.pairs]

    def jobs(self) -> list[Job]:
        made = [fitting(self.model, edit.name, edit.pairs) for edit in self._fits()]
        given: dict[str, Any] = {
            "model": self.model,
            "prompts": _PROMPTS,
            "reward": self.reward,
            "method": list(self.methods),
        }
        if self.edits:
            given |= {"edit": [f"{edit.name}.safetensors" for edit in self.edits]}
            given |= {"strengths": ",".join(f"{x:g}" for x in self.strengths)}
        given |= {"system": [self.system]} if self.system else {}
        return [
            *made,
            Job("frontier", "frontier", {**given, "n": self.n, "seed": self.seed, **self.drawing(), "out": "frontier"}),
        ]

    def commands(self) -> str:
        rows = json.dumps(list(self.prompts), ensure_ascii=False)
        return f"cat > {_PROMPTS} <<'PROMPTS'\n{rows}\nPROMPTS\n{super().commands()}"

    def yaml(self) -> str:
        return f"# Reads {_PROMPTS}, which the command line's first lines write.\n{super().yaml()}"

    def python(self) -> str:
        head = ["import importlib.resources", ""] if self._fits() else []
        lines = [*head, "import steer", "from steer.measure.frontier import SWEEPS", ""]
        lines += [f"model = steer.load({self.model!r})", f"prompts = {list(self.prompts)!r}"]
        lines.append(f"methods = {{name: SWEEPS[name] for name in {list(self.methods)!r}}}")
        for edit in self._fits():
            lines += fitted(edit.name, edit.pairs)
        for edit in self.edits:
            file = f"{edit.name}.safetensors:{{x:g}}"
            lines.append(f"methods[{edit.name!r}] = [{{'edits': f{file!r}}} for x in {list(self.strengths)!r}]")
        if self.system:
            lines.append(f"methods['system'] = [{{'system': {self.system!r}}}]")
        given = "".join(
            f", {key}={value!r}" for key, value in {"n": self.n, "seed": self.seed, **self.drawing()}.items()
        )
        lines.append(f"found = steer.frontier(model, prompts, {self.reward!r}, methods{given})")
        return "\n".join([*lines, "print(found.table())"]) + "\n"

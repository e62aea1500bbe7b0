"""Recipe of the tab Images: what to draw, a reward, and methods that get the same seed and the same budget."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from steer.demo.recipes import Job, Recipe

__all__ = ["METHODS", "POLICY", "ImagesRecipe"]

METHODS = {
    "plain": "Plain",
    "best-of-n": "Best-of-N",
    "fk": "FK",
    "dts-star": "DTS* (tree)",
    "rlg": "RL guidance",
}
"""Titles by name."""
POLICY: dict[str, Any] = {
    "method": "dpo",
    "group_size": 8,
    "steps": 60,
    "learning_rate": 3e-5,
    "beta": 1000.0,
    "measured": 0,
}
"""How the policy for RL guidance is tuned: by DPO on pairs of the model's own images."""
_PAIRS = 8
_PROMPTS, _FOLDER = "tuning_prompts.json", "policy"


class ImagesRecipe(Recipe):
    """What was asked there."""

    tab: ClassVar[str] = "images"

    model: Annotated[str, Field(max_length=400)]
    prompt: Annotated[str, Field(max_length=2000)] = ""
    """A class by its name, or a text; empty for any."""
    reward: Annotated[str, Field(min_length=1, max_length=2000)] = "class:bag"
    methods: Annotated[tuple[Literal["plain", "best-of-n", "fk", "dts-star", "rlg"], ...], Field(min_length=1)] = (
        "plain",
        "best-of-n",
        "fk",
        "dts-star",
    )
    particles: Annotated[int, Field(ge=2, le=32)] = 8
    """Images that the budget pays for: images, candidates, particles, or rollouts of a tree."""
    steps: Annotated[int, Field(ge=2, le=100)] = 25
    beta: Annotated[float, Field(gt=0, le=1000)] = 1.0
    w: Annotated[float, Field(ge=-20, le=20)] = 2.0
    """Of RL guidance: 0 is the model, 1 the policy."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    def tuning_prompts(self) -> list[str]:
        """What the policy for RL guidance is tuned on."""
        return [self.prompt] * _PAIRS

    def sampler(self, method: str) -> str:
        """Name of the sampler behind a method."""
        return "ancestral" if method in ("plain", "rlg") else method

    def own(self, method: str) -> dict[str, Any]:
        """Settings of that sampler, `n` among them."""
        if method == "fk":
            return {"num_particles": self.particles}
        if method == "dts-star":
            return {"n": 1, "rollouts": self.particles, "batch": max(1, self.particles // 4)}
        return {"n": self.particles}

    def _common(self, method: str) -> dict[str, Any]:
        shared = {"reward": self.reward, "beta": self.beta, "steps": self.steps, "seed": self.seed}
        return {"sampler": self.sampler(method), **shared}

    def _asked(self) -> dict[str, Any]:
        return {"prompt": self.prompt} if self.prompt else {}

    def jobs(self) -> list[Job]:
        made = []
        if "rlg" in self.methods:
            own = dict(POLICY)
            given = {"model": self.model, "method": own.pop("method"), "beta": own.pop("beta")}
            given |= {"reward": self.reward, "prompts": _PROMPTS}
            given |= {"out": _FOLDER, "set": [f"{key}={value}" for key, value in own.items()]}
            made.append(Job("tune", "train policy", given))
        for method in self.methods:
            own = self.own(method)
            given = {"model": self.model, **self._asked(), **self._common(method), "png": f"{method}.png"}
            given |= {"n": own.pop("n")} if "n" in own else {}
            given |= {"set": [f"{key}={value}" for key, value in own.items()]} if own else {}
            given |= {"tuned": _FOLDER, "w": self.w} if method == "rlg" else {}
            made.append(Job(method, "generate", given))
        return made

    def commands(self) -> str:
        if "rlg" not in self.methods:
            return super().commands()
        return f"cat > {_PROMPTS} <<'PROMPTS'\n{json.dumps(self.tuning_prompts())}\nPROMPTS\n{super().commands()}"

    def yaml(self) -> str:
        told = f"# Reads {_PROMPTS}, which the command line's first lines write.\n" if "rlg" in self.methods else ""
        return told + super().yaml()

    def python(self) -> str:
        lines = ["import steer", "", f"model = steer.load({self.model!r})", f"prompt = {self.prompt!r}"]
        if "rlg" in self.methods:
            given = "".join(f", {key}={value!r}" for key, value in POLICY.items())
            tuning = f"steer.train_diffusion_policy(model, {self.tuning_prompts()!r}, "
            lines.append(f"{tuning}out={_FOLDER!r}, reward={self.reward!r}{given})")
        for method in self.methods:
            given = "".join(f", {key}={value!r}" for key, value in {**self._common(method), **self.own(method)}.items())
            if method == "rlg":
                lines.append(f"tuned = model.tuned({_FOLDER!r}).process(steps={self.steps})")
                given += f", edits=steer.RLGuidance(tuned, {self.w!r})"
            lines += [f"found = model.generate(prompt{given})", f"found.save({method!r})"]
        return "\n".join(lines) + "\n"

"""Recipe of the tab in which a vector is made: the pairs themselves, or the file that they came in, and the method."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from steer.demo.recipes import Job, Recipe

__all__ = ["LIMIT_PAIRS", "VectorRecipe"]

LIMIT_PAIRS = 2000


class VectorRecipe(Recipe):
    """What was asked there."""

    tab: ClassVar[str] = "vector"

    model: Annotated[str, Field(max_length=400)]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,47}$")]
    positive: Annotated[tuple[str, ...], Field(max_length=LIMIT_PAIRS)] = ()
    negative: Annotated[tuple[str, ...], Field(max_length=LIMIT_PAIRS)] = ()
    """Sentences, one of each for a pair."""
    method: Literal["mean", "pca", "probe"] = "mean"
    layers: Annotated[str, Field(max_length=200, pattern=r"^[0-9, -]*$")] = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @property
    def source(self) -> str:
        """The file of pairs that the commands read."""
        return f"{self.name}_pairs.jsonl"

    def pairs(self) -> list[dict[str, str]]:
        """Its rows."""
        both = zip(self.positive, self.negative, strict=False)
        return [{"positive": up, "negative": down} for up, down in both]

    def commands(self) -> str:
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.pairs())
        return f"cat > {self.source} <<'PAIRS'\n{rows}PAIRS\n{super().commands()}"

    def yaml(self) -> str:
        return f"# Reads {self.source}, which the command line's first lines write.\n{super().yaml()}"

    def _settings(self) -> dict[str, Any]:
        return {"method": self.method, "seed": self.seed} | ({"layers": self.layers} if self.layers else {})

    def jobs(self) -> list[Job]:
        settings: dict[str, Any] = {"model": self.model, "pairs": self.source, "method": self.method}
        settings |= {"out": f"{self.name}.safetensors", "seed": self.seed}
        settings |= {"set": [f"layers={self.layers}"]} if self.layers else {}
        return [Job("fit", "train vector", settings)]

    def python(self) -> str:
        given = "".join(f", {key}={value!r}" for key, value in self._settings().items())
        lines = ["import steer", "", f"model = steer.load({self.model!r})", f"pairs = {self.pairs()!r}"]
        lines.append(f"steer.train_vector(model, pairs{given}).save({f'{self.name}.safetensors'!r})")
        return "\n".join(lines) + "\n"

"""The finished example on which the page opens, and the command that makes it: `python -m steer.demo.first_minute`.

One prompt at five strengths of the shipped sentiment vector on the embedded language model, beside the unsteered text
and a system prompt that asks for the same. The page reads the file that this wrote; a test writes it again.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from steer.demo.actions import steer as action
from steer.demo.actions.shared import PRESETS, Shared
from steer.demo.recipes.steer import SteerRecipe
from steer.demo.session import Visitors
from steer.files import replacing

__all__ = ["FILE", "STOPS", "compute", "frames", "recipe"]

FILE = Path(__file__).parent / "first_minute.json"
STOPS = (-0.2, -0.1, 0.0, 0.1, 0.2)
_PROMPT = "Tell me about your new neighbour."


def recipe(stop: int) -> SteerRecipe:
    """What is asked at one of the stops."""
    preset, strength = PRESETS["sentiment"], STOPS[stop]
    wish = preset.system_high if strength > 0 else preset.system_low if strength < 0 else ""
    edits = [{"name": preset.name, "strength": strength, "pairs": preset.pairs}] if strength else []
    return SteerRecipe.parse(
        {"model": "smollm2-135m", "prompt": _PROMPT, "edits": edits, "system": wish, "max_tokens": 48, "seed": 1}
    )


async def compute(shared: Shared, stop: int) -> dict[str, Any]:
    """The columns of one stop with their tokens and facts."""
    visitors = Visitors()
    frame: dict[str, Any] = {"strength": STOPS[stop]}
    try:
        async for update in action.run(recipe(stop), shared, visitors.get("first")):
            frame |= {key: update[key] for key in ("columns", "whole", "done") if key in update}
    finally:
        visitors.close()
    return frame


@cache
def frames() -> list[dict[str, Any]]:
    """What the file holds: one entry a stop."""
    found: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["frames"]
    return found


def main() -> int:
    """Compute the example and write the file."""
    shared = Shared("smollm2-135m")

    async def all_frames() -> list[dict[str, Any]]:
        return [await compute(shared, stop) for stop in range(len(STOPS))]

    made = asyncio.run(all_frames())
    shared.close()
    with replacing(FILE) as temporary:
        temporary.write_text(json.dumps({"frames": made}, separators=(",", ":")) + "\n", encoding="utf-8")
    for frame in made:
        facts = "; ".join(f"{f['reward']:.2f} for {f['kl']:.1f} nats" for _, f in frame["done"])
        print(f"{frame['strength']:+.2f}: {facts}")
        print("\n".join(f"    {f['text']!r}" for _, f in frame["done"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

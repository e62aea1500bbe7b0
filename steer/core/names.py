"""Names that other libraries use for the same settings, and what is meant by a name that is misspelt."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steer.core.errors import check

__all__ = ["NAME", "check_known", "check_meant", "meant", "nearby", "our_names"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of artifacts and of readings."""

_SAME = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "num_return_sequences": "n",
    "num_images_per_prompt": "n",
    "num_inference_steps": "steps",
    "stop_strings": "stop",
    "stop_sequences": "stop",
}
"""Of transformers, OpenAI, vLLM and diffusers; a value means the same under both names."""
_OTHERWISE = {
    "generator": "seed, a whole number",
    "num_beams": "a sampler that searches, such as steer.BestOfN(n=4)",
    "best_of": "sampler=steer.BestOfN(n=...)",
    "messages": "prompts",
    "prompt": "prompts",
    "inputs": "prompts",
    "input_ids": "prompts, as text",
    "max_length": "max_new_tokens",
    "output_type": "the samples' outputs (tensors) or images (Pillow)",
    "streamer": "stream",
    "steering": "edits",
    "num_particles": "sampler=steer.FKSteering(num_particles=...)",
    "num_candidates": "sampler=steer.SVDD(num_candidates=...)",
}
"""What has the place of a name whose value would mean something else here."""


def our_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by our names, of those that are not None. `do_sample=False` is temperature 0.

    Raises `InputError` where a name and ours are both given, and for names that have no equal here.
    """
    named = {k: v for k, v in given.items() if v is not None}
    if (drawn := named.pop("do_sample", None)) is not None:
        check(isinstance(drawn, bool), "do_sample", drawn, "True, False")
        greedy = named.get("temperature") == 0
        check(drawn != greedy or "temperature" not in named, "do_sample", drawn, "the other, at this temperature")
        if not drawn:
            named["temperature"] = 0.0
    for theirs in [name for name in named if name in _SAME]:
        ours = _SAME[theirs]
        check(ours not in named, theirs, named[theirs], f"unset beside {ours}, which means the same")
        named[ours] = named.pop(theirs)
    return named


def check_meant(given: Iterable[str]) -> None:
    """Raise `InputError` for a name of another library's whose value would mean something else here."""
    for name in given:
        check(name not in _OTHERWISE, "generate()", name, f"{_OTHERWISE.get(name)}, which has its place here")


def meant(name: str, known: Iterable[str], cutoff: float = 0.66) -> str:
    """ "; did you mean X?" for a name that is not `known`, or "". Capitals do not matter."""
    other, plain = _OTHERWISE.get(name), {one.casefold(): one for one in known}
    close = [other] if other else difflib.get_close_matches(name.casefold(), plain, n=1, cutoff=cutoff)
    return f"; did you mean {plain.get(close[0], close[0])}?" if close else ""


def nearby(path: Path | str, cutoff: float = 0.7) -> str:
    """ "; did you mean X?" for a path that is not there, by the names that lie where it would, or ""."""
    file = Path(path)
    try:
        names = [found.name for found in file.parent.iterdir() if not found.name.startswith(".")]
    except OSError:
        return ""
    close = difflib.get_close_matches(file.name, names[:10_000], n=1, cutoff=cutoff)
    return f"; did you mean {file.parent / close[0]}?" if close else ""


def check_known(where: str, name: str, known: Iterable[str]) -> None:
    """Raise `InputError` for a name that is not among `known`."""
    names = sorted(known)
    check(name in names, where, name, f"{', '.join(names)}{meant(name, names)}")

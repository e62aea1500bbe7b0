"""Generation from a file of prompts into a file of samples, line by line, so that a run that stopped goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steer.bulk.results import Results
from steer.core import Samples, check, check_whole
from steer.data import FORMATS, prompt_of, read_table
from steer.model import Model
from steer.progress import note, ticking
from steer.seeds import mixed

__all__ = ["generate_file", "write_samples"]


def generate_file(
    model: Model,
    source: Path | str,
    out: Path | str,
    *,
    resume: bool = True,
    batch: int = 32,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> int:
    """Generate for every prompt of `source` and write a line of JSON for each to `out`, as it is done.

    A line is `{"id", "prompt", "samples": [{"text", "reward", "log_weight", "kl"}]}`, in the order of the prompts; it
    is kept as a bulk job's records are (`steer.bulk`), with the settings in `OUT.job.json`. Texts depend on the seed,
    the settings and the batch alone, not on where a run stopped. `Model.map` and `steer batch` answer rows whose texts
    do not depend on the batch either.

    Args:
        source: prompts, or rows with a column `prompt` or `messages`, in JSON lines, a JSON list, CSV or parquet.
        out: a file of JSON lines. What a run with the same settings has written there is kept and not drawn again.
        resume: False begins anew, in place of what `out` holds.
        batch: prompts that are drawn together.
        settings: of `generate`.

    Returns:
        How many prompts were drawn now.

    Raises:
        InputError: a bad setting or prompt, or an `out` that is of another run; nothing is written.
        SteerError: `out` cannot be written.
    """
    check_whole("batch", batch)
    rows = read_table("source", Path(source), f"prompts in {FORMATS}")
    prompts = [prompt_of(row) for _, row in rows]
    check(bool(prompts), "source", f"{source} (no prompts)", "at least one prompt")
    return write_samples(
        prompts,
        Path(out),
        lambda some, seed: model.generate(some, seed=seed, **settings),
        job={"model": model.name, "batch": batch, "seed": seed, **{name: repr(x) for name, x in settings.items()}},
        resume=resume,
        batch=batch,
        seed=seed,
        progress=progress,
    )


def write_samples(
    prompts: list[Any],
    target: Path,
    draw: Callable[[list[Any], int], Samples],
    *,
    job: Mapping[str, Any],
    resume: bool = True,
    batch: int = 32,
    seed: int = 0,
    progress: bool = False,
    prepare: Callable[[], Any] = lambda: None,
) -> int:
    """What `generate_file` does, for prompts that are read: `draw` takes some prompts and their seed, and `job` is
    what samples depend on beside their prompts. `prepare` runs once, after what is there was checked, where anything
    is left to draw.
    """
    ids = [f"row-{number}" for number in range(1, len(prompts) + 1)]

    asked = dict(zip(ids, prompts, strict=True))

    def same(record: Mapping[str, Any]) -> None:
        name = record["id"]
        allowed = "the lines of a run with these prompts; another file, or resume=False (--overwrite)"
        check(name in asked and record.get("prompt") == asked[name], "out", f"{target} ({name})", allowed)

    with Results(str(target), job, overwrite=not resume, known=same) as results:
        before = len(results.done)
        if before < len(prompts):
            note(progress and before > 0, f"resuming at prompt {before + 1} of {len(prompts)} of {target}")
            prepare()
            with ticking(progress, "prompts", len(prompts)) as tick:
                tick(before)
                for first in range(0, len(prompts), batch):
                    mine = ids[first : first + batch]
                    if results.done.issuperset(mine):
                        continue
                    drawn = draw(prompts[first : first + batch], mixed(seed, first) % 2**31)
                    for name, entry in zip(mine, drawn.to_dict()["prompts"], strict=True):
                        if name not in results.done:
                            results.add({"id": name, **entry})
                            tick(1)
        results.finish()
        return len(results.done) - before

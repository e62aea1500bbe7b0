"""Generation from a file of prompts into a file of samples, line by line, so that a run that stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steer.core import Samples, SteerError, check, check_whole
from steer.data import FORMATS, prompt_of, read_table
from steer.files import as_json
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

    A line is `{"prompt", "samples": [{"text", "reward", "log_weight", "kl"}], "run"}`, in the order of the prompts;
    `run` identifies the settings. Texts depend on the seed, the settings and the batch alone, not on where a run
    stopped.

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
    run = hashlib.sha256(repr([model.name, batch, seed, sorted((k, repr(v)) for k, v in settings.items())]).encode())
    return write_samples(
        prompts,
        Path(out),
        lambda some, seed: model.generate(some, seed=seed, **settings),
        run=run.hexdigest()[:12],
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
    run: str,
    resume: bool = True,
    batch: int = 32,
    seed: int = 0,
    progress: bool = False,
    prepare: Callable[[], Any] = lambda: None,
) -> int:
    """What `generate_file` does, for prompts that are read: `draw` takes some prompts and their seed, and `run`
    identifies everything else that samples depend on. `prepare` runs once, after what is there was checked, where
    anything is left to draw.
    """
    done = _kept(target, run, prompts) if resume else 0
    if done == len(prompts):
        return 0
    note(progress and done > 0, f"resuming at prompt {done + 1} of {len(prompts)} of {target}")
    prepare()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("r+b" if done else "wb") as file, ticking(progress, "prompts", len(prompts)) as tick:
            file.seek(_offset(target, done) if done else 0)
            file.truncate()
            tick(done)
            for first in range(done - done % batch, len(prompts), batch):
                drawn = draw(prompts[first : first + batch], mixed(seed, first) % 2**31)
                for i, entry in enumerate(drawn.to_dict()["prompts"], first):
                    if i >= done:
                        file.write(f"{as_json({**entry, 'run': run})}\n".encode())
                        tick(1)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise SteerError(f"cannot write {target}: {error.strerror or error}") from error
    return len(prompts) - done


def _kept(out: Path, run: str, prompts: list[Any]) -> int:
    """How many whole lines there are of this run. A last line that was cut is drawn again."""
    if not out.is_file():
        return 0
    *lines, _ = out.read_bytes().split(b"\n")
    check(
        len(lines) <= len(prompts), "out", f"{out} ({len(lines)} lines)", f"at most {len(prompts)}, one for each prompt"
    )
    for number, (line, prompt) in enumerate(zip(lines, prompts, strict=False), 1):
        entry = _entry(line)
        same = isinstance(entry, dict) and (entry.get("run"), entry.get("prompt")) == (run, prompt)
        allowed = "the lines of a run with these prompts and settings; another file, or resume=False (--overwrite)"
        check(same, "out", f"{out} line {number}", allowed)
    return len(lines)


def _entry(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _offset(out: Path, lines: int) -> int:
    """Where line `lines` begins, counted from 0."""
    return sum(len(line) + 1 for line in out.read_bytes().split(b"\n")[:lines])

"""Written samples side by side: texts of the same prompts in columns, and a line of means for each file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from steer.core import InputError, check
from steer.measure.distances import interval
from steer.measure.tables import aligned, rendered

__all__ = ["Written", "means_table", "read_written", "texts_markdown", "texts_table"]

_ALLOWED = "JSON as `steer generate --out` and `samples.save` write it"


@dataclass(frozen=True)
class Written:
    """Samples of one file."""

    name: str
    prompts: list[dict[str, Any]]
    """As in `Samples.to_dict`: `prompt`, `samples` with `text`, `reward`, `kl` and `log_weight`."""
    kl_kind: str | None
    cost: Mapping[str, Any]

    def texts(self) -> list[str]:
        """The text of each prompt with the largest weight, the first of equals."""
        heaviest = (max(entry["samples"], key=lambda s: s.get("log_weight") or 0.0) for entry in self.prompts)
        return [str(sample["text"]) for sample in heaviest]

    def mean(self, what: str) -> tuple[float, float] | None:
        """Mean of `reward` or `kl` over prompts, each prompt's own mean weighted, with half of its 95% interval
        (Student's t); NaN where one prompt stands alone. None where it is not known of every sample.
        """
        means = []
        for entry in self.prompts:
            samples = entry["samples"]
            if any(s.get(what) is None for s in samples):
                return None
            logs = [s.get("log_weight") or 0.0 for s in samples]
            weights = [math.exp(x - max(logs)) for x in logs]
            means.append(sum(w * s[what] for w, s in zip(weights, samples, strict=True)) / sum(weights))
        return interval(means)


def read_written(files: Sequence[Path]) -> list[Written]:
    """The samples of each file, whose prompts must be the same. Raises `InputError`."""
    found = [_read(path) for path in files]
    names = [w.name for w in found]
    check(len(set(names)) == len(names), "files", ", ".join(names), "files whose names differ")
    for path, written in zip(files, found, strict=True):
        same = [e["prompt"] for e in written.prompts] == [e["prompt"] for e in found[0].prompts]
        check(same, "files", str(path), f"the prompts of {files[0]}, in the same order")
    return found


def _read(path: Path) -> Written:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        prompts, cost = content["prompts"], content["cost"]
        good = all(e["samples"] and all("text" in s for s in e["samples"]) and "prompt" in e for e in prompts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("files", str(path), _ALLOWED) from error
    check(bool(prompts) and good, "files", str(path), _ALLOWED)
    return Written(path.stem, prompts, content.get("kl_kind"), cost)


def means_table(written: Sequence[Written]) -> str:
    """A line for each file: mean reward and KL over prompts with 95% intervals, and what was drawn for them."""
    rows = [["", "reward", "KL, nats a text", "tokens drawn", "seconds"]]
    for one in written:
        cost = [f"{one.cost.get('generated_tokens', 0):,}", f"{one.cost.get('seconds', 0.0):.1f}"]
        rows.append([one.name, _figure(one.mean("reward")), _kl(one), *cost])
    prompts = len(written[0].prompts)
    note = f"means over {prompts} prompt{'s'[: prompts != 1]}"
    return f"{aligned(rows)}\n{note}" + (" with their 95% intervals" if prompts > 1 else "")


def texts_table(written: Sequence[Written], width: int) -> str:
    """A column for each file and a row for each prompt, wrapped to `width` characters."""
    _need_texts(written)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    for name in ("prompt", *(one.name for one in written)):
        table.add_column(name, overflow="fold", ratio=2 if name == "prompt" else 3)
    for row in _rows(written):
        table.add_row(*row)
    return rendered(table, width).rstrip()


def texts_markdown(written: Sequence[Written]) -> str:
    """The same as a table in Markdown."""
    _need_texts(written)
    head = ["prompt", *(one.name for one in written)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *_rows(written)])


def _rows(written: Sequence[Written]) -> list[list[str]]:
    columns = [[_said(entry["prompt"]) for entry in written[0].prompts], *(one.texts() for one in written)]
    return [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in zip(*columns, strict=True)]


def _need_texts(written: Sequence[Written]) -> None:
    for one in written:
        check(all(s["text"] is not None for e in one.prompts for s in e["samples"]), "texts", one.name, "texts")


def _said(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else " ".join(f"{m['role']}: {m['content']}" for m in prompt)


def _figure(found: tuple[float, float] | None) -> str:
    if found is None:
        return "-"
    mean, half = found
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} +- {half:.3f}"


def _kl(written: Written) -> str:
    shown = _figure(written.mean("kl"))
    return f"<= {shown}" if written.kl_kind == "bound" and shown != "-" else shown

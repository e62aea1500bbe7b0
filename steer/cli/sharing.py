"""`steer push` and `steer import sae`: artifacts to a hub, and features of sparse autoencoders as artifacts."""

from __future__ import annotations

import json
from pathlib import Path

from steer.cli import checks
from steer.cli.options import ModelOptions
from steer.core import InputError, check

__all__ = ["import_feature", "push"]


def push(file: Path, repository: str, name: str | None, private: bool, report: Path | None) -> str:
    """Share an artifact with the figures of a sweep; its address. Raises `InputError` and `SteerError`."""
    from steer.edits import load_artifact

    check(file.is_file() and file.suffix == ".safetensors", "file", str(file), "an artifact, FILE.safetensors")
    artifact = load_artifact(file)
    figures = "" if report is None else _figures(report)
    return artifact.push(repository, name or file.name, private=private, figures=figures)


def _figures(folder: Path) -> str:
    """The table of a `steer eval strength` as text. Raises `InputError`."""
    from steer.measure.report import Break, Report, ReportRow

    path = folder / "report.json" if folder.is_dir() else folder
    allowed = "the folder of a `steer eval strength`"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found.pop("verdict", None)
        rows = [ReportRow(**row) for row in found.pop("rows")]
        report = Report(**{**found, "rows": rows, "breaks": [Break(**b) for b in found["breaks"]]})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError("report", str(folder), allowed) from error
    return report.table()


def import_feature(source: Path, model: str, feature: int, out: Path, layer: int | None, overwrite: bool) -> str:
    """Write a feature as a vector; what it is. Raises `InputError`."""
    from steer.loading import load
    from steer.sae import import_sae, read_feature

    checks.check_model(ModelOptions(model=model))
    checks.check_causal(ModelOptions(model=model))
    checks.check_output(out, suffixes=(".safetensors",))
    check(overwrite or not out.exists(), "out", str(out), "a new file, or --overwrite")
    read_feature(source, feature, layer)
    made = import_sae(source, feature, load(model).info, layer=layer)
    made.save(out)
    return f"{made.card.describe()}\nwrote {out}"

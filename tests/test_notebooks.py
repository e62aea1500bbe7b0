"""The notebooks run from top to bottom: with the tiny model and short settings, and in the slow suite as they stand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steer.embedded import find

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
run_sync = pytest.importorskip("jupyter_core.utils").run_sync

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "recipes" / "notebooks").glob("*.ipynb"))
FETCHED = find("smollm2-135m").fetched

_SHORT = [
    (r"max_new_tokens=\d+", "max_new_tokens=4"),
    (r"num_particles=\d+", "num_particles=3"),
    (r"rollouts=\d+", "rollouts=8"),
    (r"steps=\d+", "steps=3"),
    (r"n=\d+", "n=2"),
    (r"\[:8\]", "[:2]"),
    (r"strengths=\[[^]]+\]", "strengths=[0.1]"),
    (r'files\("steer.recipes"\)', 'Path("recipes")'),
    (r"readability/100", "length"),
    (r"range\(\d+, \d+\)", "range(1, 2)"),
]


def executed(path: Path, folder: Path, kernel: Any = None) -> Any:
    """A notebook after all of its cells have run in `folder`; a cell that fails raises. A kernel that runs forgets what
    it knew, but for what is imported.
    """
    book = nbformat.read(path, as_version=4)
    if kernel is not None:
        book.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({str(folder)!r})\ndel os"))
    nbclient.NotebookClient(
        book, km=kernel, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()
    return book


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """One kernel for all short runs: to import everything takes longer than they do."""
    made = nbclient.NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3").create_kernel_manager()
    yield made
    run_sync(made.shutdown_kernel)(now=True)


def shown(book: Any) -> str:
    """Everything that the cells printed or returned, as text."""
    outputs = [o for cell in book.cells if cell.cell_type == "code" for o in cell.outputs]
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


def test_there_are_four() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["01_vector", "02_own_reward", "03_compare_methods", "04_diffusers"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_with_short_settings(
    path: Path, tmp_path: Path, tiny_lm_dir: Path, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    shutil.copytree(tiny_lm_dir, tmp_path / "tiny")
    (tmp_path / "recipes").mkdir()
    words = ("sun", "rain", "day", "dog")
    pairs = [{"positive": f"the {w} is very good .", "negative": f"the {w} is very bad ."} for w in words]
    (tmp_path / "recipes" / "sentiment_pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "recipes" / "neutral_prompts.json").write_text('["the sun", "hello world"]')
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            for pattern, short in [*_SHORT, ("smollm2-135m", "./tiny")]:
                cell.source = re.sub(pattern, short, cell.source)
    nbformat.write(book, tmp_path / "short.ipynb")
    made = executed(tmp_path / "short.ipynb", tmp_path, kernel)
    text = shown(made)
    assert "Warning" not in text, text
    # What is a cell's value is its value: nothing is displayed on the way.
    assert all(o.output_type in ("execute_result", "stream") for c in made.cells for o in c.get("outputs", ()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_those_of_its_cells(path: Path) -> None:
    """What GitHub shows was made by running every cell once, in order, and holds no path of a machine."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    text = path.read_text()
    assert "Traceback" not in text and "Warning" not in text and not re.search(r"/(root|home|work|tmp)/", text)
    assert len(text) < 400_000


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(not FETCHED, reason="the embedded model is not in the cache")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_as_it_stands(path: Path, tmp_path: Path) -> None:
    assert "Warning" not in shown(executed(path, tmp_path))

"""Two tasks of lm-eval made here, a multiple choice and a written answer, and how they are run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = [
    {"question": "the sun is", "choices": ["good", "bad dog"], "gold": 0, "line": "good"},
    {"question": "a dog in the rain", "choices": ["is sad", "is happy"], "gold": 1, "line": "happy"},
    {"question": "why hello world", "choices": ["the cat", "sat on a mat"], "gold": 0, "line": "the"},
]
CHOICES = """
task: toy_choices
dataset_path: json
dataset_kwargs: {data_files: ROWS}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: " "
metric_list: [{metric: acc}]
"""
WRITTEN = """
task: toy_written
dataset_path: json
dataset_kwargs: {data_files: ROWS}
test_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{line}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def write_tasks(folder: Path) -> Path:
    """The folder, with both tasks in it."""
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    for name, text in (("choices", CHOICES), ("written", WRITTEN)):
        (folder / f"{name}.yaml").write_text(text.replace("ROWS", str(rows)))
    return folder


def evaluated(model: Any, tasks: Path, *names: str) -> Any:
    """What the harness says of a model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=list(names), task_manager=manager, log_samples=True, bootstrap_iters=0, batch_size=1
    )

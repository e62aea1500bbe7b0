"""The three mapped folders are shipped whole, the core imports no engine, and nothing unsafe is loaded."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = {"steer": "steer", "steer.adapters": "adapters", "steer.recipes": "recipes"}


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == MAPPED
    found = {"steer.adapters", "steer.recipes"}
    for init in (ROOT / "steer").rglob("__init__.py"):
        found.add(".".join(init.parent.relative_to(ROOT).parts))
    assert set(settings["packages"]) == found
    for folder in MAPPED.values():
        assert (ROOT / folder / "__init__.py").is_file()


def test_importing_steer_imports_no_engine() -> None:
    modules = "steer, steer.core, steer.toy, steer.rewards, steer.mount, steer.recipe, steer.report, steer.train.value"
    engines = "{'transformers', 'vllm', 'diffusers', 'gradio', 'peft', 'trl'}"
    code = f"import sys, {modules}; print(sorted(set(sys.modules) & {engines}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", list(MAPPED.values()))
def test_engines_are_imported_by_adapters_alone_and_nothing_unpickles(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"pickle\.load|torch\.load\(|yaml\.load\(|(?<![\w.])eval\(", text), path
        if folder == "adapters" or path.parent.name == "bench":
            continue
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("transformers", "vllm", "diffusers", "gradio"), (path, name)


def test_methods_import_no_method_of_another_family() -> None:
    """A method stands alone: it may use the operators and the model check, nothing else of its neighbours."""
    shared = {"operators", "vector"}
    for path in (ROOT / "steer" / "methods").glob("*.py"):
        for name in re.findall(r"from steer\.methods\.(\w+) import", path.read_text()):
            assert name in shared, (path, name)

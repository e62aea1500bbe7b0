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


def _name(path: Path) -> str:
    """The dotted name of a module of the project."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "steer" else ["steer", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, path: Path) -> set[str]:
    """Modules of the project that a module imports anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (name, "imports are absolute")
            found |= {node.module} if node.module else set()
            found |= {f"{node.module}.{a.name}" for a in node.names}
            found -= {node.module} if all(f"{node.module}.{a.name}" in MODULES for a in node.names) else set()
    return (found & MODULES.keys()) - {name}


MAPPED = {"steer": "steer", "steer.adapters": "adapters", "steer.recipes": "recipes"}
MODULES = {_name(path): path for folder in MAPPED.values() for path in (ROOT / folder).rglob("*.py")}
IMPORTS = {name: _imports(name, path) for name, path in MODULES.items()}


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == MAPPED
    assert set(settings["packages"]) == {name for name, path in MODULES.items() if path.name == "__init__.py"}
    for folder in MAPPED.values():
        assert (ROOT / folder / "__init__.py").is_file()


def test_importing_steer_imports_no_engine() -> None:
    modules = (
        "steer, steer.core, steer.toy, steer.rewards, steer.edits, steer.cli.recipe, steer.measure.report, "
        "steer.train.value"
    )
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
        if path.name == "samplers.py":  # the table of all samplers
            continue
        for name in re.findall(r"from steer\.methods\.(\w+) import", path.read_text()):
            assert name in shared, (path, name)


def test_the_transformers_adapter_has_no_circle() -> None:
    """A part is never handed the whole that it is part of; imports for types count."""
    mine = {name for name in MODULES if name.startswith("steer.adapters.transformers.")}
    circles = []
    for name in mine:
        seen: set[str] = set()
        ahead = [name]
        while ahead:
            new = (IMPORTS[ahead.pop()] & mine) - seen
            seen |= new
            ahead += new
        circles += [name] if name in seen else []
    assert not circles


def test_no_module_begins_with_an_underscore() -> None:
    """What is public in a package is what its `__init__` lists."""
    for name in MODULES:
        assert name.endswith("__main__") or not any(part.startswith("_") for part in name.split(".")), name

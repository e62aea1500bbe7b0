"""The three mapped folders are shipped whole, the core imports no engine, and nothing unsafe is loaded."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from mutate import MUTATIONS, Mutation, place

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


MAPPED = {"steer": "steer", "steer.adapters": "adapters", "steer.demo": "demo", "steer.recipes": "recipes"}
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
                page = folder == "demo" and name.split(".")[0] == "gradio"
                assert page or name.split(".")[0] not in ("transformers", "vllm", "diffusers", "gradio"), (path, name)


def test_methods_import_no_method_of_another_family() -> None:
    """A method stands alone: it may use the operators and the model check, nothing else of its neighbours."""
    shared = {"operators", "vector"}
    for path in (ROOT / "steer" / "methods").glob("*.py"):
        if path.name == "samplers.py":  # the table of all samplers
            continue
        for name in re.findall(r"from steer\.methods\.(\w+) import", path.read_text()):
            assert name in shared, (path, name)


def test_an_engine_imports_no_other_engine() -> None:
    """Adapters share `steer.adapters.language`; what else two of them need belongs to the core."""
    for name, imports in IMPORTS.items():
        mine = name.split(".")[2:3] if name.startswith("steer.adapters.") else None
        others = {other.split(".")[2] for other in imports if other.startswith("steer.adapters.")}
        assert mine is None or others <= {*mine, "language"}, (name, others)


def test_only_these_modules_of_steer_reach_up_to_the_adapters() -> None:
    """Commands and benchmarks stand above the engines, and `steer.loading` knows them all. One arrow points upward on
    purpose: a reward's name leads to the model that computes it.
    """
    above = ("steer.adapters", "steer.cli", "steer.bench", "steer.demo", "steer.loading", "steer.rewards.parse")
    for name, imports in IMPORTS.items():
        face = name == "steer"  # public names, loaded when first used
        assert face or name.startswith(above) or not any(other.startswith("steer.adapters") for other in imports), name


def test_modules_import_each_other_in_no_circle() -> None:
    """Imports inside functions and those for types alone count too."""
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(IMPORTS[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in IMPORTS:
        visit(name, ())


def test_no_module_begins_with_an_underscore() -> None:
    """What is public in a package is what its `__init__` lists."""
    for name in MODULES:
        assert name.endswith("__main__") or not any(part.startswith("_") for part in name.split(".")), name


DOORS = {
    "steer.adapters.diffusers.model": {"generate"},
    "steer.adapters.language.model": {"generate"},
    "steer.adapters.openai.model": {"load"},
    "steer.adapters.transformers.model": {"load"},
    "steer.harness.inspect": {"__init__"},  # Inspect hands `-M KEY=VALUE` over by name
    "steer.measure.compare": {"compare"},
    "steer.measure.frontier": {"frontier"},
    "steer.measure.race": {"race"},
    "steer.measure.report": {"evaluate"},
    "steer.model": {"generate", "prepare"},
}
"""Functions that people call by keyword, which editors complete and help shows; everything else takes a settings
dataclass before it takes an eleventh parameter.
"""


def test_only_public_doors_have_more_than_ten_parameters() -> None:
    found: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                a = node.args
                every = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
                count = len(every) + (a.vararg is not None) + (a.kwarg is not None) - (every[:1] in (["self"], ["cls"]))
                if count > 10:
                    found.setdefault(name, set()).add(node.name)
    assert found == DOORS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_planted_mistake_has_its_place(mutation: Mutation) -> None:
    """Code that moves takes the text along, which the slow run of all mutations would find out late."""
    assert place(ROOT, mutation).is_file()

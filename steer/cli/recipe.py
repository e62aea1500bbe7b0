"""Recipes: finished jobs in YAML, checked as a whole before anything starts.

    description: what comes out
    variables: {prompts: "${recipes}/prompts.json", strength: 0.2}
    steps:
      - name: fit
        command: train vector
        settings: {model: smollm2-135m, pairs: "${recipes}/pairs.jsonl", out: "${out}/calm.safetensors"}
      - command: eval strength
        settings: {model: smollm2-135m, edit: "${out}/calm.safetensors", prompts: "${prompts}", out: "${out}/report"}

A recipe with one job may have `command` and `settings` at the top in place of `steps`. Settings are the options of the
command, with underscores. `${out}` is ./out/NAME unless `out` is given, `${recipes}` the folder of shipped recipes.
`next` is a command to go on with, shown at the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from steer.cli.options import COMMANDS, RENAMED, Options, TrainOptions
from steer.cli.values import build, check_known, pairs, spelled
from steer.core import InputError, check

__all__ = ["Recipe", "Step", "described", "load_recipe", "shipped"]


_TOP = ("name", "description", "variables", "command", "settings", "steps", "next")
_STEP = ("name", "command", "settings")
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Step:
    """One job of a recipe."""

    name: str
    command: str
    options: Options

    @property
    def output(self) -> Path | None:
        """The file or folder that it makes."""
        return getattr(self.options, "out", None)


@dataclass(frozen=True)
class Recipe:
    """A list of jobs, each complete and of the right types."""

    name: str
    steps: list[Step]
    description: str = ""
    variables: dict[str, Any] = field(default_factory=dict)
    next: str = ""
    """A command to go on with, shown at the end."""


def shipped() -> dict[str, Path]:
    """Recipes that come with steer, by name."""
    return {path.stem: path for path in sorted(_folder().glob("*.yaml"))}


def described() -> dict[str, str]:
    """The description of every shipped recipe, by name."""
    found = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in shipped().items()}
    return {name: str(content.get("description", "")).strip() for name, content in found.items()}


def _folder() -> Path:
    return Path(str(resources.files("steer.recipes")))


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its name or from a file. Raises `InputError`, also for overrides that fit nothing.

    `overrides` are texts `key=value`: a variable, `out`, or an option as `step.option` (for a single job `option`). A
    step goes by its name or its number, from 1.
    """
    name, content = _read(source)
    _check_top(name, content)
    variables, steps = _variables(name, content), _steps(name, content)
    for key, text in pairs(overrides, "override").items():
        _override(key, _scalar(key, text), variables, steps)
    values = _resolved(variables)
    made = [_build(name, step, values) for step in steps]
    following = str(_filled(content.get("next", ""), values, f"recipe {name}: next"))
    return Recipe(name, made, str(content.get("description", "")), values, following)


def _read(source: str | Path) -> tuple[str, dict[str, Any]]:
    known, path = shipped(), Path(source)
    if str(source) in known:
        path = known[str(source)]
    elif not path.is_file():
        check_known("recipe", [str(source)], [*known, "a YAML file"])
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError("recipe", f"{path} ({error})", "a YAML file") from error
    check(
        isinstance(content, dict), "recipe", f"{path} ({type(content).__name__})", f"a mapping with {', '.join(_TOP)}"
    )
    return str(content.get("name") or path.stem), content


def _check_top(name: str, content: dict[str, Any]) -> None:
    check_known(f"recipe {name}", content, _TOP)
    one, several = "command" in content or "settings" in content, "steps" in content
    check(one != several, f"recipe {name}", "both or neither", "either command and settings, or steps")
    for key in ("variables", "settings"):
        check(isinstance(content.get(key, {}), dict), f"recipe {name}: {key}", content.get(key), "a mapping")


def _steps(name: str, content: dict[str, Any]) -> list[dict[str, Any]]:
    """Plain steps, each with name, command and settings of its own."""
    given = content.get("steps", [{key: content[key] for key in ("command", "settings") if key in content}])
    check(isinstance(given, list) and bool(given), f"recipe {name}: steps", given, "a list of jobs")
    steps = []
    for number, step in enumerate(given, 1):
        where = f"recipe {name}, step {number}"
        check(isinstance(step, dict), where, step, f"a mapping with {', '.join(_STEP)}")
        check_known(where, step, _STEP)
        command = RENAMED.get(step.get("command"), step.get("command"))
        check_known(f"{where}: command", [command], list(COMMANDS))
        settings = step.get("settings", {})
        check(isinstance(settings, dict), f"{where}: settings", settings, "a mapping")
        steps.append({"name": str(step.get("name", number)), "command": command, "settings": dict(settings)})
    names = [step["name"] for step in steps]
    check(len(set(names)) == len(names), f"recipe {name}: steps", names, "names that differ")
    return steps


def _variables(name: str, content: dict[str, Any]) -> dict[str, Any]:
    declared = content.get("variables", {})
    for key in declared:
        check(str(key).isidentifier() and key != "recipes", f"recipe {name}: variables", key, "names, but not recipes")
    return {"recipes": str(_folder()), "out": f"./out/{name}", **declared}


def _override(key: str, value: Any, variables: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    names = [variable for variable in variables if variable != "recipes"]
    if key in names:
        variables[key] = value
        return
    step, dot, option = key.rpartition(".")
    chosen = [
        s for number, s in enumerate(steps, 1) if step in (s["name"], str(number)) or (not dot and len(steps) == 1)
    ]
    if not chosen:
        check_known("override", [key], [*names, *(f"{s['name']}.OPTION" for s in steps)])
    options = [spelled(name) for name in COMMANDS[chosen[0]["command"]].__dataclass_fields__]
    check_known("override", [option], [*options, *([] if dot else names)])
    chosen[0]["settings"][option] = value


def _scalar(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    # A text with a colon and a space, or a date, is still the text that was typed.
    return value if isinstance(value, bool | int | float | list) or value is None else text


def _resolved(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables with the earlier ones filled in."""
    values: dict[str, Any] = {}
    for key, value in variables.items():
        values[key] = _filled(value, values, f"variable {key}")
    return values


def _filled(value: Any, variables: Mapping[str, Any], where: str) -> Any:
    """`value` with `${name}` replaced; a text that is nothing but a variable takes its type."""
    if isinstance(value, dict):
        return {key: _filled(item, variables, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, variables, where) for item in value]
    if not isinstance(value, str):
        return value
    check_known(f"{where}: variable", _VARIABLE.findall(value), list(variables))
    whole = _VARIABLE.fullmatch(value)
    return variables[whole[1]] if whole else _VARIABLE.sub(lambda match: str(variables[match[1]]), value)


def _build(name: str, step: dict[str, Any], variables: Mapping[str, Any]) -> Step:
    where = f"recipe {name}, step {step['name']}"
    settings = _filled(step["settings"], variables, where)
    kind = COMMANDS[step["command"]]
    # A recipe makes its files anew, as often as it is run.
    anew = {"overwrite": True} if issubclass(kind, TrainOptions) else {}
    return Step(step["name"], step["command"], build(kind, {**anew, **settings}, where))

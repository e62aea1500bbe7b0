"""Help beyond `--help`: the settings behind `--set`, the rewards, and the recipes."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields, is_dataclass
from shutil import get_terminal_size
from textwrap import wrap
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from steer.cli.options import COMMANDS, EXAMPLES
from steer.core import InputError
from steer.core.names import meant
from steer.measure.tables import aligned
from steer.train.settings import describe

__all__ = ["topics", "explain", "list_recipes", "list_rewards"]


def _samplers() -> dict[str, Any]:
    from steer.methods.samplers import SAMPLERS

    return dict(SAMPLERS)


def _vector() -> type:
    from steer.train.vector import VectorSettings

    return VectorSettings


def _controller() -> type:
    from steer.train.controller import ControllerSettings

    return ControllerSettings


def _value() -> type:
    from steer.train.value import ValueSettings

    return ValueSettings


def _reward() -> type:
    from steer.train.reward import RewardSettings

    return RewardSettings


def _policy() -> type:
    from steer.train.objectives.settings import PolicySettings

    return PolicySettings


def _image_policy() -> type:
    from steer.train.diffusion_policy.inputs import DiffusionPolicySettings

    return DiffusionPolicySettings


def _images() -> type:
    from steer.adapters.diffusers.fashion import FashionSettings

    return FashionSettings


def _stimulus() -> type:
    from steer.train.stimulus.settings import StimulusSettings

    return StimulusSettings


_TRAINERS: dict[str, tuple[str, Callable[[], type]]] = {
    "train-vector": ("train vector", _vector),
    "train-controller": ("train controller", _controller),
    "train-value": ("train value", _value),
    "train-reward": ("train reward", _reward),
    "train-stimulus": ("train stimulus", _stimulus),
    "train-policy": ("train policy", _policy),
    "train-policy-images": ("train policy", _image_policy),
    "train-images": ("train images", _images),
}
"""Topics of training: the command, and what gives its settings."""


def topics() -> list[str]:
    """What `explain` knows, beside the methods of `steer train policy --list`."""
    from steer.edits import KINDS

    return [*_samplers(), *KINDS, *_TRAINERS, "rewards", "recipes"]


def explain(topic: str) -> str:
    """Everything that `--set` takes for a sampler or a kind of training, with types, defaults and what it means.
    Raises `InputError`.
    """
    from steer.train.objectives.registry import METHODS, entry

    topic = topic.strip().lower().replace("_", "-").replace(" ", "-").replace("*", "-star")
    if topic == "rewards":
        return list_rewards()
    if topic == "recipes":
        return list_recipes()
    samplers = _samplers()
    name = next((known for known in METHODS if known.replace("_", "-") == topic), None)
    if topic not in samplers and name is not None:
        return f"{entry(name)}\n\nEverything that --set takes: steer help train-policy"
    if topic not in topics():
        near = meant(topic, topics(), 0.6) or meant(topic, METHODS, 0.6)
        raise InputError("help", topic, f"{', '.join(topics())}, or a method of train policy --list{near}")
    if topic in _TRAINERS:
        return _training(topic)
    if topic not in samplers:
        return _artifact(topic)
    about = "\n".join(_wrapped(_first_lines(samplers[topic])))
    method = f"{_indented(entry(name))}\n\nThe sampler of this name:\n\n" if name is not None else ""
    return f"{method}{about}\n\n{settings_table(samplers[topic])}\n\n{_example(topic)}"


_EDITS = {
    "vector": "A direction for each of some layers, which is added to the residual stream there.",
    "controller": "A network that reads the prompt and weighs a direction at every layer.",
    "value": "A head whose values of the next tokens tilt their law; the strength multiplies them.",
    "reft": "A low-rank change that pyreft trained: its config.json and safetensors. Strength 1 is all of it.",
    "stimulus": "A policy of hints that stand in the prompt. It has no strength and no keys.",
}


def _artifact(kind: str) -> str:
    """What `--edit` takes for an artifact of this kind."""
    from steer.edits import OPTIONS

    keys = "\n".join(line for key, told in OPTIONS[kind].items() for line in (key, *_wrapped(told, "    ")))
    about, more = "\n".join(_wrapped(_EDITS[kind])), ":KEY=VALUE" if keys else ""
    example = f'steer generate --model smollm2-135m --prompt "Hi" --edit FILE.safetensors{more}'
    origin = (
        "pyreft's save(); its pickles are to be saved again as safetensors"
        if kind == "reft"
        else f"steer train {kind} --help"
    )
    parts = (about, keys, _continued(example), f"How one is made: {origin}")
    return "\n\n".join(part for part in parts if part)


def _training(topic: str) -> str:
    """The settings of a kind of training that have no option of their own."""
    command, settings = _TRAINERS[topic]
    kind, own = settings(), {f.name.rstrip("_") for f in fields(COMMANDS[command])} - {"set"}
    about = "\n".join(_wrapped(_first_lines(kind)))
    options = sorted(own & {f.name.rstrip("_") for f in fields(kind)})
    beside = "\n".join(_wrapped(f"Options of their own: {', '.join('--' + o.replace('_', '-') for o in options)}."))
    example = _continued(EXAMPLES.get(command, (f"steer {command} ...",))[0] + " --set KEY=VALUE")
    return f"{about}\n\n{settings_table(kind, without=options)}\n\n{beside}\n\n{example}"


def _first_lines(kind: type) -> str:
    """The docstring up to its list of attributes."""
    text = inspect.cleandoc(kind.__doc__ or "")
    return re.split(r"\n\s*(?:Attributes|Args|Returns)\b", text)[0].strip()


def _indented(text: str) -> str:
    """Lines no wider than the terminal, which go on below their own beginnings."""
    found = []
    for line in text.split("\n"):
        gap = " " * (len(line) - len(line.lstrip()))
        found += wrap(line, _width(), subsequent_indent=gap, break_on_hyphens=False) or [""]
    return "\n".join(found)


def _example(topic: str) -> str:
    more = "" if topic == "ancestral" else " --reward sentiment --beta 0.1"
    line = f'steer generate --model smollm2-135m --prompt "Tell me of your day" --sampler {topic}{more} --set KEY=VALUE'
    return _continued(line)


def _continued(command: str) -> str:
    """A command over as many lines as the terminal needs, broken before its options."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > _width():
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return "\n".join(lines)


def _width() -> int:
    return max(40, min(get_terminal_size((90, 0)).columns, 110))


def settings_table(kind: type, without: Collection[str] = ()) -> str:
    """The fields of a dataclass, each with its type and default, and below them what its class says of them, as wide as
    the terminal. A default that is None where the field's type has no None is filled in by the other settings.
    """
    assert is_dataclass(kind)
    hints, about = get_type_hints(kind, include_extras=True), _documented(kind)
    shown = [f for f in fields(kind) if f.name.rstrip("_") not in without]
    rows = [["key", "type", "default"]]
    for f in shown:
        made = f.default if f.default_factory is MISSING else f.default_factory()
        rows.append([f.name.rstrip("_"), _spelled(hints[f.name]), _default(made, hints[f.name])])
    heads = aligned(_cut(rows), left=True).split("\n")
    lines = [heads[0]]
    names = [f.name for f in shown]
    for i, (name, row, head) in enumerate(zip(names, rows[1:], heads[1:], strict=True)):
        lines.append(head)
        whole = [text for text, cut in zip(row, _cut([row])[0], strict=True) if text != cut]
        lines += _wrapped(" ".join(whole), "    ") if whole else []
        told = about.get(name, "")
        if told and about.get(names[i + 1] if i + 1 < len(names) else "") != told:  # said once of several
            lines += _wrapped(told, "    ")
    return "\n".join(lines)


_WIDE = 34
"""The widest cell of a table of settings; what is longer stands below its line."""


def _cut(rows: list[list[str]]) -> list[list[str]]:
    return [[cell if len(cell) <= _WIDE else "see below" for cell in row] for row in rows]


def _default(value: Any, hint: Any) -> str:
    if value is MISSING:
        return "needed"
    if value is None:
        inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        return "none" if inner is Any or type(None) in get_args(inner) else "preset"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if is_dataclass(value):  # Preview(), on the command line preview
        return type(value).__name__.lower()
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def _spelled(hint: Any) -> str:
    """A type, and what it allows, in words."""
    inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(inner) in (Union, UnionType):
        members = sorted(get_args(inner), key=lambda one: one is not type(None))
        return " or ".join("none" if one is type(None) else _spelled(one) for one in members)
    if get_origin(inner) is tuple:
        return f"list, each {_spelled(get_args(inner)[0])}"
    if get_origin(inner) is dict:
        return "names and values"
    told = describe(hint)
    return told if told is not None else inner.__name__ if isinstance(inner, type) else str(inner)


def _documented(kind: type) -> dict[str, str]:
    """What a class says of each field: in the `Attributes:` section of its docstring, or in strings below them."""
    found: dict[str, str] = {}
    for part in reversed(kind.__mro__[:-1]):
        found |= _below(part) | _in_section(part)
    return found


def _below(kind: type) -> dict[str, str]:
    """The string under a field is about it."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError):  # made without a source
        return {}
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, said in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(said, ast.Expr):
            text = said.value.value if isinstance(said.value, ast.Constant) else None
            if isinstance(text, str):
                found[field.target.id] = " ".join(text.split())
    return found


def _in_section(kind: type) -> dict[str, str]:
    text = inspect.cleandoc(kind.__doc__ or "")
    section = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in (section.group(1) if section else "").split("\n"):
        entry = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry.group(1).split(", ")
            found |= {name: [entry.group(2)] for name in names}
        elif line.strip():
            for name in names:
                found[name].append(line.strip())
    return {name: " ".join(lines) for name, lines in found.items()}


def _wrapped(text: str, indent: str = "") -> list[str]:
    plain = re.sub(r"\*(\w+)\*", r"\1", text.replace("`", ""))
    return wrap(plain, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def list_rewards() -> str:
    """Shipped rewards, as they are written in an expression."""
    from steer.rewards import shipped

    forms = (
        ('"org/name":LABEL', "a reward model or classifier of Hugging Face, by id or folder"),
        ("module:function", "your own function of a list of texts"),
    )
    head = "Rewards, joined by + - * / ( ), such as 'sentiment - 0.3*profanity':"
    return "\n".join([head, "", *shipped().values(), *(f"{form}  ({what})" for form, what in forms)])


def list_recipes() -> str:
    """Shipped recipes and what comes out of each."""
    from steer.cli.recipe import described

    lines = []
    for name, about in described().items():
        lines += [name, *_wrapped(about, "    ")]
    return "\n".join([*lines, "", "steer run NAME [VARIABLE=VALUE ...]"])

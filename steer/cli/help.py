"""Help beyond `--help`: the settings behind `--set`, the rewards, and the recipes."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, get_type_hints

from steer.cli.values import check_known
from steer.measure.tables import aligned

__all__ = ["topics", "explain", "list_recipes", "list_rewards"]


def _samplers() -> dict[str, Any]:
    from steer.methods.samplers import SAMPLERS

    return dict(SAMPLERS)


def topics() -> list[str]:
    """What `explain` knows."""
    return [*_samplers(), "rewards", "recipes"]


def explain(topic: str) -> str:
    """Everything that `--set` takes for a sampler, with types, defaults and what it means. Raises `InputError`."""
    topic = topic.strip().lower().replace("_", "-")
    if topic == "rewards":
        return list_rewards()
    if topic == "recipes":
        return list_recipes()
    samplers = _samplers()
    check_known("help", [topic], topics())
    about = "\n".join(_wrapped(_first_lines(samplers[topic])))
    return f"{about}\n\n{settings_table(samplers[topic])}\n\n{_example(topic)}"


def _first_lines(kind: type) -> str:
    """The docstring up to its list of attributes."""
    text = inspect.cleandoc(kind.__doc__ or "")
    return re.split(r"\n\s*(?:Attributes|Args|Returns)\b", text)[0].strip()


def _example(topic: str) -> str:
    more = "" if topic == "ancestral" else " --reward sentiment --beta 0.1"
    return f'steer generate --model smollm2-135m --prompt "Tell me of your day" --sampler {topic}{more} --set KEY=VALUE'


def settings_table(kind: type) -> str:
    """The fields of a dataclass, each with its type and default, and below them what its class's docstring says of
    them, as wide as the terminal.
    """
    assert is_dataclass(kind)
    hints, about = get_type_hints(kind), _documented(kind)
    rows = [["key", "type", "default"]]
    for f in fields(kind):
        made = f.default if f.default_factory is MISSING else f.default_factory()
        default = "none" if made is None else "needed" if made is MISSING else str(made)
        rows.append([f.name, _spelled(hints[f.name]), default])
    heads = aligned(rows, left=True).split("\n")
    lines = [heads[0]]
    names = [row[0] for row in rows[1:]]
    for i, (name, head) in enumerate(zip(names, heads[1:], strict=True)):
        lines.append(head)
        told = about.get(name, "")
        if told and about.get(names[i + 1] if i + 1 < len(names) else "") != told:  # said once of several
            lines += _wrapped(told, "    ")
    return "\n".join(lines)


def _spelled(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    text = re.sub(r"(?:[A-Za-z_]+\.)+([A-Za-z_]+)", r"\1", text).replace("NoneType", "none").replace("None", "none")
    return text.replace(" | ", " or ")


def _documented(kind: type) -> dict[str, str]:
    """What the `Attributes:` section of a docstring says of each name."""
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
    width = max(40, min(get_terminal_size((90, 0)).columns, 110))
    return wrap(text.replace("`", ""), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


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

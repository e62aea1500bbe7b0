"""Tools: Python functions as an environment, with OpenAI's schemas from their signatures."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from steer.core import Prompt, check
from steer.core.errors import first_line
from steer.core.names import meant
from steer.turns.environment import Environment, Outcome, call_in

__all__ = ["Tool", "Tools", "tool"]

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


@dataclass(frozen=True)
class Tool:
    """A function that an agent may call, by name and with arguments of plain types."""

    function: Callable[..., Any]
    acts: bool = False
    """Whether it changes the world: it then runs only where the user's allow list has it."""
    irreversible: bool = False
    """Whether that cannot be undone: it is never run on a copy."""

    @property
    def name(self) -> str:
        return self.function.__name__

    def schema(self) -> dict[str, Any]:
        """OpenAI's form. Raises `InputError` for a parameter without a plain type."""
        hints = typing.get_type_hints(self.function)
        properties, required = {}, []
        for name, parameter in inspect.signature(self.function).parameters.items():
            kind = hints.get(name)
            check(kind in _TYPES, f"tool {self.name}", name, "parameters annotated as str, int, float or bool")
            properties[name] = {"type": _TYPES[kind]}  # type: ignore[index]
            if parameter.default is parameter.empty:
                required.append(name)
        parameters = {"type": "object", "properties": properties, "required": required}
        about = (inspect.getdoc(self.function) or "").split("\n\n")[0]
        return {"type": "function", "function": {"name": self.name, "description": about, "parameters": parameters}}


def tool(*, acts: bool = False, irreversible: bool = False) -> Callable[[Callable[..., Any]], Tool]:
    """A decorator that makes a tool of a function."""
    return lambda function: Tool(function, acts or irreversible, irreversible)


class Tools(Environment):
    """An agent with tools; an action is the JSON of a call, and what is no call is its answer, which ends the episode.

    Args:
        tools: functions with type hints and a docstring, or `Tool`s.
        reward: of the answer, a function of (prompt, answer).
        allow: names of tools that act on the world and may; all others of those are refused when they are called.
    """

    name = "tools"
    chance = False

    def __init__(
        self,
        tools: Sequence[Tool | Callable[..., Any]],
        reward: Callable[[Prompt, str], float] = lambda prompt, answer: 0.0,
        allow: Iterable[str] = (),
    ) -> None:
        made = [t if isinstance(t, Tool) else Tool(t) for t in tools]
        check(len({t.name for t in made}) == len(made), "tools", [t.name for t in made], "names that differ")
        self.by_name, self.reward, self.allow = {t.name: t for t in made}, reward, frozenset(allow)
        for name in sorted(self.allow):
            check(name in self.by_name, "allow", name, f"{', '.join(self.by_name)}{meant(name, self.by_name)}")
        self.tools = [t.schema() for t in made]  # type: ignore[misc]
        self.irreversible = frozenset(t.name for t in made if t.irreversible)
        self.prompt: Prompt = ""

    def reset(self, prompt: Prompt, seed: int) -> str:
        self.prompt = prompt
        self.reseed(seed)
        listed = "\n".join(json.dumps(schema["function"]) for schema in self.tools)
        return (
            f"You can call these functions:\n{listed}\n"
            'Reply with one call, {"name": ..., "arguments": {...}}, or with your answer.'
        )

    def fork(self, seed: int | None = None) -> Tools:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.reseed(self.rng.randrange(2**31) if seed is None else seed)
        return twin

    def step(self, action: str) -> Outcome:
        call = call_in(action)
        if call is None:
            return Outcome("", float(self.reward(self.prompt, action.strip())), done=True)
        name, arguments = call
        found = self.by_name.get(name)
        if found is None:
            return Outcome(
                f"error: there is no function {name}; there are {', '.join(self.by_name)}", info={"unparsed": True}
            )
        if found.acts and name not in self.allow:
            return Outcome(f"error: {name} is not allowed", info={"refused": name})
        try:
            inspect.signature(found.function).bind(**arguments)
        except TypeError as error:
            return Outcome(f"error: {name}: {error}", info={"unparsed": True})
        try:
            return Outcome(str(found.function(**arguments)))
        except Exception as error:  # the agent is told, as it would be by any tool
            return Outcome(f"error: {name}: {first_line(error)}")

"""The ledger: a price table and a calculator, with exact answers. Small enough for a small model."""

from __future__ import annotations

import ast
import operator
import random
import re
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

from steer.core import InputError, Prompt, check, check_whole
from steer.core.messages import plain_messages
from steer.turns.environment import Environment, Outcome, call_in

__all__ = ["Ledger", "calculated"]

_ITEMS = ("pen", "book", "cup", "lamp", "chair", "plate", "shirt", "ball")
_OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
_CALL = re.compile(r"\b(price|calculate|answer)\s*\(\s*[\"']?([^()\"']*)[\"']?\s*\)?")


def calculated(text: str) -> int:
    """The value of sums and products of whole numbers. Raises `InputError` for anything else."""
    check(len(text) <= 60, "expression", text, "at most 60 characters")

    def value(node: Any) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return int(_OPERATIONS[type(node.op)](value(node.left), value(node.right)))
        raise InputError("expression", text, "whole numbers with + - *")

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise InputError("expression", text, "whole numbers with + - *") from error


class Ledger(Environment):
    """How much do some of one thing cost? The price is in a table, which only `price` reads; `calculate` multiplies;
    `answer` ends the episode and pays 1 where it is right. Calls are written `price(pen)` or as OpenAI's JSON.

    The question follows from the prompt (`Task 17`), so that all episodes of one prompt have the same; nothing is
    drawn. Args: `distractors`, further things in the table.
    """

    name = "ledger"
    instant = True
    chance = False
    tools: ClassVar[list[dict[str, Any]]] = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": about,
                "parameters": {"type": "object", "properties": {given: {"type": "string"}}, "required": [given]},
            },
        }
        for name, given, about in (
            ("price", "item", "The price of one item."),
            ("calculate", "expression", "The value of an expression such as 3*4."),
            ("answer", "value", "Give the total price; this ends the task."),
        )
    ]

    def __init__(self, distractors: int = 2) -> None:
        check_whole("distractors", distractors, least=0)
        check(distractors < len(_ITEMS), "distractors", distractors, f"at most {len(_ITEMS) - 1}")
        self.distractors = distractors
        self.table: dict[str, int] = {}
        self.item, self.count = "", 0
        self.known: list[int] = []
        self.rng = random.Random(0)

    def reset(self, prompt: Prompt, seed: int) -> str:
        said = prompt if isinstance(prompt, str) else plain_messages(prompt)[-1]["content"]
        drawn = random.Random(zlib.crc32(str(said).encode()))
        names = drawn.sample(_ITEMS, 1 + self.distractors)
        self.table = {name: drawn.randint(2, 19) for name in names}
        self.item, self.count = names[0], drawn.randint(2, 9)
        self.known = []
        self.reseed(seed)
        return (
            "You have three functions: price(item), calculate(expression), answer(value). Reply with one call and "
            "nothing else.\nExample: How much do 2 desks cost? First price(desk) gives 30, then calculate(2*30) gives "
            f"60, then answer(60).\nHow much do {self.count} {self.item}s cost?"
        )

    @property
    def total(self) -> int:
        """The right answer."""
        return self.table[self.item] * self.count

    def fork(self, seed: int | None = None) -> Ledger:
        twin = Ledger(self.distractors)
        twin.table, twin.item, twin.count, twin.known = self.table, self.item, self.count, list(self.known)
        return twin

    def actions(self) -> list[str]:
        numbers = list(dict.fromkeys(self.known))
        found = [f"price({name})" for name in sorted(self.table)]
        found += [f"calculate({self.count}{sign}{x})" for x in numbers for sign in "*+"]
        return found + [f"answer({x})" for x in numbers]

    def known_as(self, action: str) -> str:
        call = _read(action)
        return action.strip() if call is None else call[0]

    def step(self, action: str) -> Outcome:
        call = _read(action)
        if call is None:
            again = "Reply with one call: price(item), calculate(expression) or answer(value)."
            return Outcome(again, info={"unparsed": True})
        name, given = call
        if name == "price":
            item = given.strip().lower()
            found = self.table.get(item, self.table.get(item.removesuffix("s")))
            if found is None:
                return Outcome(f"There is no {given.strip()!r} in the table.")
            self.known.append(found)
            return Outcome(str(found))
        try:
            value = calculated(given)
        except InputError as error:
            return Outcome(f"error: {error}", info={"unparsed": True})
        if name == "calculate":
            self.known.append(value)
            return Outcome(str(value))
        right = value == self.total
        return Outcome("Right." if right else "Wrong.", float(right), done=True, info={"success": right})

    def solve(self) -> float:
        return 1.0


def _read(action: str) -> tuple[str, str] | None:
    """Function and argument of the first call in an action."""
    made = call_in(action)
    if made is not None:
        name, arguments = made
        values = list(arguments.values())
        fits = name in ("price", "calculate", "answer") and len(values) == 1
        return (name, str(values[0])) if fits else None
    found = _CALL.search(action)
    return None if found is None else (found[1], found[2])

"""Tabs of the page: one file each, with one function.

    def build(page: Page) -> Opening

It is called inside the tab's own `with gr.Tab(...)`, makes the components, wires their events to an action, and
returns how the tab is filled when the page opens: its `outputs`, and a function that is given the visitor and the
recipe in the address (None where there is none for this tab) and returns a value for each output.

Handlers are wrapped in `told`, which gives them what was asked as one `Asked`: what a person can mend becomes one line
in the tab's note, Stop ends them with another, and the page goes on working.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from steer.core import InputError, SteerError
from steer.demo.actions.shared import Shared
from steer.demo.recipes import Recipe, encode
from steer.demo.session import Visitor, Visitors

__all__ = [
    "LIMIT_RUN",
    "Asked",
    "Opening",
    "Page",
    "note",
    "plain",
    "quiet",
    "reproduce",
    "reproduced",
    "said",
    "shown_facts",
    "stopping",
    "told",
]

log = logging.getLogger("steer.demo")

LIMIT_RUN = 1800.0
"""Seconds of one run, after which it is stopped."""


@dataclass(frozen=True)
class Page:
    """What every tab gets."""

    shared: Shared
    visitors: Visitors
    parts: dict[str, Any] = field(default_factory=dict)
    """Components that tabs put there for others: `tabs`, the row of tabs; `dose`, the edits of the tab Steer; `steer`,
    its inputs. In `later` are functions to be called when all tabs are made.
    """

    def visitor(self, request: gr.Request) -> Visitor:
        """Who asks."""
        return self.visitors.get(request.session_hash)


@dataclass(frozen=True)
class Opening:
    """How a tab is filled when the page opens."""

    outputs: Sequence[Any]
    fill: Callable[[Visitor, Recipe | None], Sequence[Any]]


# -------------------------------------------------------------------------------------------------------------- notes


def note(**settings: Any) -> gr.HTML:
    """The line in which a tab says what is going on, or what is wrong: value `{"text", "wrong"}`."""
    return gr.HTML(
        value={"text": "", "wrong": False},
        html_template='<p class="steer-note" role="status"></p>',
        js_on_load=_NOTE_JS,
        css_template=_NOTE_CSS,
        apply_default_css=False,
        **settings,
    )


_NOTE_JS = """
const show = () => {
  const line = element.querySelector('.steer-note');
  line.textContent = props.value.text;
  line.classList.toggle('wrong', props.value.wrong);
};
watch('value', show);
show();
"""
_NOTE_CSS = """
.steer-note { margin: 0; min-height: 1.5em; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.steer-note.wrong { color: var(--body-text-color); border-left: 3px solid #dc2626; padding-left: 0.625rem; }
"""


def said(text: str, wrong: bool = False) -> dict[str, Any]:
    """A value for a note."""
    return {"text": text[:2000], "wrong": wrong}


@dataclass(frozen=True)
class Asked:
    """What a handler is asked."""

    visitor: Visitor
    given: dict[str, Any]
    """What stands in the fields, by name; not checked yet."""
    data: Any = None
    """What the event carries."""

    def text(self, name: str) -> str:
        """A field that holds a text; an empty one is the empty text. Raises `InputError`."""
        value = self.given[name]
        if not isinstance(value, str | None):
            raise InputError(name, str(value)[:80], "a text")
        return value or ""


Handler = Callable[[Asked], Any]
"""A function, a coroutine function or an async generator function of what was asked; gives `{component: value}`."""


def told(page: Page, line: Any, names: Collection[str] = ()) -> Callable[[Handler], Callable[..., AsyncIterator[Any]]]:
    """A handler whose errors end as one line in `line`, as what takes too long does and what its visitor stops.

    Gradio calls it with the values of an event's inputs, which are called `names`, as the named endpoint's arguments.
    """

    def wrapping(handler: Handler) -> Callable[..., AsyncIterator[Any]]:
        async def wrapped(request: gr.Request, event: gr.EventData, *values: Any) -> AsyncIterator[Any]:
            try:
                visitor = page.visitor(request)
                asked = Asked(visitor, dict(zip(names, values, strict=True)), event._data if event else None)
                with visitor.run(line) as stopped:
                    async for update in _while_wanted(_updates(handler, asked), stopped):
                        yield update
                    if stopped.is_set():
                        yield {line: said("Stopped. What was there by then is kept.")}
            except SteerError as error:
                yield {line: said(str(error), wrong=True)}
            except Exception as error:  # ours to mend: the log has it, the page goes on
                log.error("an action failed", exc_info=error)
                yield {line: said(f"Something went wrong here ({type(error).__name__}). Try again.", wrong=True)}

        known = list(inspect.signature(wrapped).parameters.values())[:2]
        own = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        wrapped.__signature__ = inspect.Signature(known + own)  # type: ignore[attr-defined]
        wrapped.__name__ = handler.__name__
        return wrapped

    return wrapping


async def _updates(handler: Handler, asked: Asked) -> AsyncGenerator[Any]:
    """What a handler of any kind gives."""
    if inspect.isasyncgenfunction(handler):
        updates = handler(asked)
        try:
            async for update in updates:
                yield update
        finally:
            await updates.aclose()
    elif inspect.iscoroutinefunction(handler):
        yield await handler(asked)
    else:
        yield await asyncio.to_thread(handler, asked)


async def _while_wanted(updates: AsyncGenerator[Any], stopped: asyncio.Event) -> AsyncGenerator[Any]:
    """Updates until the event is set, be it in the middle of a step, or the time is over: then raises `SteerError`."""
    until = time.monotonic() + LIMIT_RUN
    stopping = asyncio.ensure_future(stopped.wait())
    following: asyncio.Future[Any] | None = None
    try:
        while not stopped.is_set():
            following = asyncio.ensure_future(anext(updates, _END))
            left = max(0.0, until - time.monotonic())
            await asyncio.wait({following, stopping}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if stopped.is_set():
                return
            if not following.done() or time.monotonic() > until:
                raise SteerError(f"Stopped after {LIMIT_RUN / 60:.0f} minutes, which is all one run gets")
            update = following.result()
            if update is _END:
                return
            yield update
    finally:
        stopping.cancel()
        if following is not None:
            following.cancel()
            await asyncio.wait({following})
        await updates.aclose()


_END = object()


def stopping(page: Page, button: Any, line: Any) -> None:
    """Let a button stop what runs in the tab of this line. The run itself says so, after the last that it shows."""

    async def stop(request: gr.Request) -> Any:
        return gr.skip() if page.visitor(request).stop(line) else said("Nothing runs here.")

    button.click(stop, None, line, api_name=False, queue=False, **quiet(line))


def quiet(line: Any) -> dict[str, Any]:
    """Settings of an event of which no progress is shown. Gradio keeps track of it all the same, and copies with every
    message all that hangs below the components that it would be shown on: so that is the line, and not the outputs.
    """
    return {"show_progress": "hidden", "show_progress_on": line}


def plain(**fields: Any) -> dict[str, Any]:
    """Fields, by what a recipe and the named endpoint call them, whose values come as they are: what is wrong in them
    is said in the tab's line, and not by Gradio.
    """
    for each in fields.values():
        each.preprocess = lambda value: value
    return fields


def shown_facts(facts: dict[str, Any]) -> list[list[str]]:
    """Facts about a column as name, text and explanation."""
    shown = []
    if facts["reward"] is not None:
        shown.append(["Reward", f"{facts['reward']:.3f}", "The score of the finished text"])
    shown.append(["KL, whole text", f"{facts['kl']:.2f} nats", "How far the odds moved, summed over all tokens"])
    shown.append(["KL a token", f"{facts['kl_token']:.3f} nats", "The same, of the average token"])
    shown.append(["Perplexity ratio", f"{facts['perplexity_ratio']:.2f}", "How odd the unsteered model finds the text"])
    shown.append(["Tokens", str(facts["tokens"]) + (", ended" if facts["ended"] else ""), "Tokens written"])
    return shown


# ---------------------------------------------------------------------------------------------------------- reproduce


@dataclass(frozen=True)
class Reproduction:
    """The components of a tab's Reproduce."""

    commands: gr.Code
    python: gr.Code
    curl: gr.Code
    yaml: gr.Code
    address: gr.Textbox

    def all(self) -> list[Any]:
        """Them all, for outputs."""
        return [self.commands, self.python, self.curl, self.yaml, self.address]


def reproduce() -> Reproduction:
    """The Reproduce of a tab: closed until somebody wants it."""
    with gr.Accordion("Reproduce: this run as a command, as Python, for a server, as a recipe", open=False):
        with gr.Tabs():
            with gr.Tab("Command line"):
                commands = gr.Code(language="shell", interactive=False, show_label=False, label="Command line")
            with gr.Tab("Python"):
                python = gr.Code(language="python", interactive=False, show_label=False, label="Python")
            with gr.Tab("curl"):
                curl = gr.Code(language="shell", interactive=False, show_label=False, label="curl")
            with gr.Tab("Recipe (YAML)"):
                made = gr.Code(language="yaml", interactive=False, show_label=False, label="Recipe")
        address = gr.Textbox(label="Link to this run (the recipe is in it; nothing is stored)", interactive=False)
    return Reproduction(commands, python, curl, made, address)


def reproduced(parts: Reproduction, recipe: Recipe) -> dict[Any, str]:
    """Values for the parts of Reproduce."""
    try:
        address = f"?r={encode(recipe)}"
    except SteerError as error:
        address = str(error)
    return {
        parts.commands: recipe.commands(),
        parts.python: recipe.python(),
        parts.curl: recipe.curl(),
        parts.yaml: recipe.yaml(),
        parts.address: address,
    }

"""The page and its launch."""

from __future__ import annotations

import hmac
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from steer.core import SteerError
from steer.demo.actions.shared import Shared
from steer.demo.recipes import Recipe, decode
from steer.demo.session import Visitors
from steer.demo.tabs import Page, first, frontier, images, note, quiet, said, search, steer, vector
from steer.serving.wire import is_loopback

__all__ = ["Launched", "launch", "make_page"]

_TABS = {
    "first": ("The first minute", first.build),
    "steer": ("Steer", steer.build),
    "vector": ("Make a vector", vector.build),
    "search": ("Search", search.build),
    "images": ("Images", images.build),
    "frontier": ("Frontier", frontier.build),
}
"""By the name that recipes have."""
_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
_TURNS = 4
"""To open the page in."""


def make_page(page: Page) -> gr.Blocks:
    """The page, to be launched."""
    with gr.Blocks(title="steer: see steering happen", analytics_enabled=False) as blocks:
        gr.Markdown("# steer\nSee what a model says, what steering makes of it, and what that costs, token by token.")
        line = note(elem_id="page-note")
        openings = {}
        with gr.Tabs() as tabs:
            page.parts.update(tabs=tabs, later=[])
            for name, (title, build) in _TABS.items():
                with gr.Tab(title, id=name):
                    openings[name] = build(page)

        for wire in page.parts["later"]:
            wire()

        def opened(request: gr.Request) -> list[Any]:
            given, recipe, wrong = request.query_params.get("r"), None, ""
            try:
                recipe = None if given is None else decode(given)
            except SteerError as error:
                wrong = f"The recipe in the address was not taken. {error}"
            visitor = page.visitor(request)
            chosen = gr.Tabs(selected=recipe.tab) if recipe is not None else gr.skip()
            values: list[Any] = [said(wrong, wrong=bool(wrong)), chosen]
            for name, opening in openings.items():
                mine: Recipe | None = recipe if recipe is not None and recipe.tab == name else None
                values += opening.fill(visitor, mine)
            return values

        outputs = [line, tabs, *(output for opening in openings.values() for output in opening.outputs)]
        blocks.load(opened, None, outputs, api_name=False, **quiet(line))
        blocks.unload(_leaving(page.visitors))
    return blocks


def _leaving(visitors: Visitors) -> Any:
    def leave(request: gr.Request) -> None:
        visitors.leave(request.session_hash)

    return leave


def _theme() -> Any:
    """Colours with the contrast that text needs, and fonts that are on every machine."""
    made = gr.themes.Base(font=_FONT, font_mono=_MONO, primary_hue="blue", neutral_hue="slate")
    return made.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )


def _free(host: str) -> int:
    """A port that is free at this moment."""
    with socket.create_server((host, 0)) as made:
        return int(made.getsockname()[1])


@dataclass(frozen=True)
class Launched:
    """A page that answers."""

    blocks: gr.Blocks
    page: Page
    url: str

    def close(self) -> None:
        """Stop answering, and remove what visitors had."""
        self.blocks.close(verbose=False)
        self.page.shared.close()
        self.page.visitors.close()


def _opened(blocks: gr.Blocks, **settings: Any) -> str:
    """Launch the page; its address. Gradio gives its own server three seconds to answer, which is too little on a busy
    machine: it gets several turns. Raises `SteerError`.
    """
    for left in reversed(range(_TURNS)):
        try:
            _, url, _ = blocks.launch(**settings)
            return str(url)
        except ValueError as error:
            blocks.close(verbose=False)
            if not left:
                where = f"{settings['server_name']}:{settings['server_port']}"
                why = "the machine may be too busy, or a proxy stand before it"
                raise SteerError(f"port: the page at {where} does not answer ({why})") from error
    raise AssertionError("there is always a last turn")


def launch(shared: Shared, *, host: str = "127.0.0.1", port: int = 0, keys: Sequence[str] = ()) -> Launched:
    """Open the page on an address of this machine. Others than the loopback want `keys`, of which a visitor gives one
    as the password; without, only who asks for this machine by its own name is answered. Raises `SteerError`.
    """
    page = Page(shared, Visitors())
    blocks = make_page(page)
    blocks.queue(max_size=256, default_concurrency_limit=1)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    local = is_loopback(host) and not keys
    guard = [Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])] if local else []

    def known(name: str, key: str) -> bool:
        right = [hmac.compare_digest(key.encode(), each.encode()) for each in keys]
        return any(right)

    try:
        url = _opened(
            blocks,
            server_name=host,
            server_port=port or _free(host),
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=False,
            auth=known if keys else None,
            auth_message="The key of this page as the password; any name." if keys else None,
            allowed_paths=[],
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            max_file_size="16mb",
            strict_cors=True,
            app_kwargs={"middleware": guard, "docs_url": None, "redoc_url": None},
            theme=_theme(),
            css_paths=Path(__file__).parent / "page.css",
            head=f"<style>{(Path(__file__).parent / 'narrow.css').read_text()}</style>",  # not rewritten for parts
        )
    except OSError as error:
        raise SteerError(f"port: {host}:{port} cannot be listened on ({error})") from error
    return Launched(blocks, page, url)

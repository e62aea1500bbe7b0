"""`steer demo`: the page on which steering is seen as it happens."""

from __future__ import annotations

import os
import sys
import threading
import time
import webbrowser
from contextlib import suppress
from importlib.util import find_spec

from steer.cli import checks
from steer.cli.checks import Coming
from steer.cli.options import DemoOptions
from steer.cli.serving import keys_of
from steer.cli.session import Run, Session
from steer.core import SteerError, check

__all__ = ["demo"]


def demo(options: DemoOptions, coming: Coming = frozenset()) -> Run:
    """Check a request to open the demo."""
    check(0 <= options.port <= 65_535, "port", options.port, "0 (any that is free) to 65535")
    folder = options.artifacts
    check(folder is None or folder.is_dir(), "artifacts", str(folder), "a folder that is there")
    keys = keys_of(options)
    checks.check_model(options)
    if find_spec("gradio") is None:
        raise SteerError("steer demo needs gradio: pip install steer-engine[demo]")

    def run(session: Session) -> None:
        from steer.demo.actions.shared import Shared
        from steer.demo.app import launch

        settings = {"dtype": options.dtype, "device": options.device, **({} if options.check else {"check": False})}
        shared = Shared(options.model, folder, settings)
        page = launch(shared, host=options.host, port=options.port, keys=keys)
        print(f"steer: the demo is open at {page.url} (stop it with Ctrl-C)", file=sys.stderr, flush=True)
        since = os.environ.get("STEER_DEMO_SINCE", "")
        if since.isdigit():
            minutes = (time.time() - int(since)) / 60
            print(f"steer: it answers {minutes:.1f} minutes after the beginning", file=sys.stderr, flush=True)
        if options.open:
            with suppress(webbrowser.Error):
                webbrowser.open(page.url)
        try:
            threading.Event().wait()
        finally:
            page.close()

    return run

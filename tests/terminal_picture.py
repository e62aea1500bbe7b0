"""A picture of what a command prints in a terminal: `python tests/terminal_picture.py 120 OUT.svg steer --help`.

The command runs in a pseudo-terminal of the given width; its standard output becomes an SVG. `make pictures` draws
those of the README.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text


def typed(command: list[str], width: int) -> str:
    """What a command prints to a terminal, with its colours."""
    ours, theirs = pty.openpty()
    terminal = {"COLUMNS": str(width), "LINES": "50", "TERM": "xterm-256color", "TERMINAL_WIDTH": str(width)}
    running = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=os.environ | terminal)
    os.close(theirs)
    parts = []
    while part := _read(ours):
        parts.append(part)
    running.wait()
    return b"".join(parts).decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says so where the other side has closed
        return b""


def picture(text: str, width: int, title: str) -> str:
    """Text of a terminal as SVG, in whatever monospaced font the reader has."""
    console = Console(record=True, width=width, file=StringIO(), force_terminal=True, legacy_windows=False)
    console.print(Text.from_ansi(text.rstrip("\n")), soft_wrap=False, overflow="ignore", crop=False)
    svg = console.export_svg(title=title)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # fonts of another host


def main(arguments: list[str]) -> None:
    """WIDTH OUT.svg COMMAND..."""
    width, out, command = int(arguments[0]), Path(arguments[1]), arguments[2:]
    out.write_text(picture(typed(command, width), width, " ".join(command)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Pictures of the README, drawn again by `make pictures`: a terminal, a lineage, and a notebook's view of texts.

`python tests/draw_pictures.py 120 OUT.svg steer --help` draws what any command prints in a terminal of that width. The
notebook's view needs a Chromium; without one the others are drawn.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

PICTURES = Path(__file__).parents[1] / "recipes" / "pictures"


def terminal(command: list[str], width: int, folder: str | None = None) -> str:
    """What a command prints to a terminal of `width` columns, as SVG."""
    console = Console(record=True, width=width, file=StringIO(), force_terminal=True, legacy_windows=False)
    console.print(Text.from_ansi(_printed(command, width, folder).rstrip("\n")), overflow="ignore", crop=False)
    svg = console.export_svg(title=" ".join(command))
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # fonts that lie on another host


def _printed(command: list[str], width: int, folder: str | None) -> str:
    """The standard output of a command in a pseudo-terminal, colours and all."""
    ours, theirs = pty.openpty()
    about = {"COLUMNS": str(width), "LINES": "50", "TERM": "xterm-256color"}
    running = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=os.environ | about, cwd=folder)
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


def small(image: Image.Image, width: int, colors: int = 128) -> Image.Image:
    """An image of `width` pixels and few colours."""
    scaled = image.convert("RGB").resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    return scaled.quantize(colors, dither=Image.Dither.NONE)


def draw_table() -> None:
    """The table at the end of the quickstart."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["steer", "run", "quickstart", f"out={folder}"], check=True, stdout=subprocess.DEVNULL)
        files = [f"{name}.json" for name in ("unsteered", "brighter", "darker")]
        drawn = terminal(["steer", "table", *files, "--texts"], 110, folder)
        (PICTURES / "quickstart.svg").write_text(drawn, encoding="utf-8")


def draw_lineage() -> None:
    """Particles that turn into bags."""
    with tempfile.TemporaryDirectory() as folder:
        words = "--model fashion-ddpm --sampler fk -n 2 --set num_particles=6 --reward class:bag --seed 1"
        files = ["--png", f"{folder}/bags.png", "--lineage", f"{folder}/lineage.png"]
        subprocess.run(["steer", "generate", *words.split(), *files], check=True, stdout=subprocess.DEVNULL)
        small(Image.open(f"{folder}/lineage.png"), 800).save(PICTURES / "lineage.png", optimize=True)


def draw_tokens() -> None:
    """Texts with the KL of their tokens, as a notebook shows `samples`."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium: tokens.png is left as it is", file=sys.stderr)
        return
    import steer

    model = steer.load("smollm2-135m")
    bright = steer.train_vector(model, PICTURES.parent / "sentiment_pairs.jsonl")
    prompts = ["My day at the lake", "Describe the new neighbour."]
    samples = model.generate(
        prompts, edits=bright(0.15), n=2, reward="sentiment", temperature=0.7, max_new_tokens=36, seed=0
    )
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        page.write_text(f"<meta charset=utf-8><body style='font-family:sans-serif'>{samples._repr_html_()}")
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1000,370", f"--screenshot={shot}"]
        subprocess.run([browser, *options, page.as_uri()], check=True, capture_output=True)
        small(Image.open(shot), 1000, 64).save(PICTURES / "tokens.png", optimize=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[2]).write_text(terminal(sys.argv[3:], int(sys.argv[1])), encoding="utf-8")
    else:
        PICTURES.mkdir(exist_ok=True)
        draw_table()
        draw_lineage()
        draw_tokens()

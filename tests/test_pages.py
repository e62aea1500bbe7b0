"""The pages: every block of Python and of commands in a README runs as it is written, in order, with short settings.

A comment before a block says what a test needs to know: `<!-- slow -->` for the slow suite, `<!-- not run: WHY -->`
for what needs another machine or the network. `steer serve` is started on a port of its own, which later blocks of the
page then ask. The root's README runs with the embedded language model where it has been fetched; the other pages run
with the tiny one of the tests, and in the slow suite with the embedded one too.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from steer.cli import main
from steer.cli.options import COMMANDS
from steer.embedded import find

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "steer/README.md",
    "adapters/README.md",
    "recipes/README.md",
    "steer/methods/README.md",
    "steer/critique/README.md",
    "steer/turns/README.md",
    "steer/serving/README.md",
]
"""Pages with blocks that run."""
OTHERS = [
    "demo/README.md",
    "steer/GLOSSARY.md",
    "steer/serving/CLIENTS.md",
    "adapters/ARCHITECTURES.md",
    "recipes/fleet/README.md",
    "recipes/notebooks/README.md",
]
LANGUAGE_MODEL = "smollm2-135m"

_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)```", re.DOTALL)
_SHORT = [
    (r"(max_new_tokens=|--max-new-tokens |max_tokens=)\d+", r"\g<1>5"),
    (r"neutral_prompts|value_prompts|keyword_prompts|race_prompts", "quickstart_prompts"),
    (r"recipes/sentiment_pairs.jsonl", "pairs.jsonl"),
    (r"--strengths [\d.,]+", "--strengths 0.1"),
    (r"--set samples=\d+", "--set samples=2"),
    (r"range\(\d+, \d+\)", "range(1, 2)"),
    (r'"best-of-n", n=\d+', '"best-of-n", n=4'),
]
"""What makes an example shorter, and neither what it calls nor what it shows."""

_PAIRS = [
    {"positive": f"the {thing} is very good .", "negative": f"the {thing} is very bad ."}
    for thing in ("sun", "rain", "day", "dog", "cat", "night", "house", "tree", "world", "user", "I", "it")
]


_ROWS = [
    {"input": f"the {thing} of {place} was late and nobody knew why", "reference": f"{thing} of {place} late"}
    for thing in ("ferry", "train", "bus", "boat", "post")
    for place in ("Oslo", "Riga", "Kiel", "Turku", "Visby")
]


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    kind: str
    text: str
    mark: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = _BLOCK.finditer(text)
    return [Block(m["kind"], m["text"], m["mark"] or "", text.count("\n", 0, m.start("text"))) for m in found]


def shortened(text: str) -> str:
    """The block with short settings."""
    for pattern, short in _SHORT:
        text = re.sub(pattern, short, text)
    return text


@dataclass
class Reader:
    """Somebody who types what a page says, in one folder."""

    model: str
    running: ExitStack
    names: dict[str, Any] = field(default_factory=dict)
    server: str = "http://127.0.0.1:8000"

    def read(self, page: str, block: Block) -> None:
        text = shortened(block.text).replace("http://127.0.0.1:8000", self.server).replace(LANGUAGE_MODEL, self.model)
        if "org/" in text:
            text = self.with_pipelines(text)
        if block.kind == "python":
            # Line numbers in a traceback are those of the page.
            exec(compile("\n" * block.line + text, str(ROOT / page), "exec"), self.names)
            return
        for line in re.findall(r"^\$ (.*)", text.replace("\\\n", ""), re.MULTILINE):
            self.type(line)

    def type(self, line: str) -> None:
        """One line of a shell."""
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            if words[0] == "steer" and words[1] == "serve":
                self.serve(words[2:])
            elif words[0] == "steer":
                assert main(words[1:]) == 0, command
            elif words[0] not in ("pip", "uv", "make"):
                subprocess.run(words, check=True, timeout=60, capture_output=True)

    def serve(self, options: list[str]) -> None:
        """Start `steer serve`, which runs until the page is read."""
        from serving_tools import serving_here

        at = options.index("--model")
        self.server = self.running.enter_context(serving_here(options[at + 1], *options[:at], *options[at + 2 :])).url

    def with_pipelines(self, text: str) -> str:
        """The block with tiny pipelines in place of those on the hub."""
        from tiny_pipelines import sd15, unet

        for name, seed in (("pipeline", 0), ("tuned-pipeline", 1)):
            if not Path(name).exists():
                made = sd15()
                made.unet = unet(seed)
                made.save_pretrained(name)
            text = text.replace(f'"org/{name}"', f'"./{name}"')
        return text


@pytest.fixture
def reader(tmp_path: Path, tiny_lm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """A reader in an empty folder with the recipes in it, who has the tiny model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, _PAIRS)))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, _ROWS)))
    shutil.copytree(tiny_lm_dir, tmp_path / "tiny")
    with ExitStack() as running:
        yield Reader("tiny", running)


FETCHED = find(LANGUAGE_MODEL).fetched
"""Whether the embedded language model is in the cache."""


def runnable(block: Block, slow: bool) -> bool:
    """Whether a block is run: those without a mark always, slow ones with the others that they need."""
    return block.kind in ("python", "console") and (block.mark == "" or (slow and block.mark == "slow"))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(
    page: str, reader: Reader, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Every block runs, and nothing that a library would say to a newcomer goes with it: on the tiny model, which takes
    the same ways; the slow suite takes them with the embedded one.
    """
    for block in blocks(page):
        if runnable(block, slow=False):
            reader.read(page, block)
    loud = [w for w in recwarn if issubclass(w.category, FutureWarning | UserWarning)]
    assert not loud, [f"{w.filename}:{w.lineno}: {w.message}" for w in loud]
    assert "Warning" not in (said := capfd.readouterr().err), said


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(not FETCHED, reason="the embedded model is not in the cache")
@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_with_the_embedded_model(page: str, reader: Reader) -> None:
    reader.model = LANGUAGE_MODEL
    for block in blocks(page):
        if runnable(block, slow=True):
            reader.read(page, block)


@pytest.mark.parametrize("page", PAGES)
def test_marks_are_known_and_something_runs(page: str) -> None:
    found = blocks(page)
    assert any(runnable(block, slow=False) for block in found)
    for block in found:
        assert block.mark in ("", "slow") or block.mark.startswith("not run: "), f"{page}:{block.line}: {block.mark}"
        assert block.kind in ("", "python", "console", "yaml", "json"), f"{page}:{block.line}: {block.kind}"


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_names_of_files_are_right(page: str) -> None:
    """A file that a page names in backticks is there, from the root or beside the page."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`((?:steer|adapters|recipes|tests)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page}: {name}"


def test_the_readme_is_short_and_its_pictures_are_small() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 125
    shown = re.findall(r"!\[([^]]+)\]\(([^)]+)\)", text)
    assert len(shown) >= 2 and all(about for about, _ in shown)
    assert sum((ROOT / file).stat().st_size for _, file in shown) < 300_000


def test_the_readme_names_every_command() -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    named = set(" ".join(re.findall(r"`([^`]+)`", text.replace("\n", " "))).split())
    assert {name.split()[-1] for name in COMMANDS if name != "train images"} <= named


FOLDERS = ("steer", "adapters", "demo", "recipes")


def test_every_page_is_tested() -> None:
    there = {str(path.relative_to(ROOT)) for d in FOLDERS for path in (ROOT / d).rglob("*.md")}
    assert there | {"README.md"} == {*PAGES, *OTHERS}


def test_make_lists_its_targets() -> None:
    said = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    listed = re.findall(r"^make (\S+) +\S", said, re.MULTILINE)
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared is not None and set(listed) == set(declared[1].split())


@pytest.mark.slow
def test_the_reference_has_every_public_name() -> None:
    pytest.importorskip("pdoc")
    binaries = Path(sys.executable).parent
    done = subprocess.run(
        ["make", "docs", f"BIN={binaries}", "-o", f"{binaries}/steer"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "Warn" not in done.stderr, done.stderr
    page = (ROOT / "build" / "docs" / "steer.html").read_text()
    import steer

    assert all(f'id="{name}"' in page for name in steer.__all__ if name != "__version__")
    assert (ROOT / "build" / "docs" / "steer" / "methods" / "fk.html").is_file()


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["version"], cited["license"]) == (declared["version"], declared["license"])
    assert {"cff-version", "message", "title", "authors"} <= set(cited)


def test_a_block_that_fails_fails(reader: Reader) -> None:
    broken = Block("python", "assert 1 + 1 == 3\n", "", 0)
    with pytest.raises(AssertionError):
        reader.read("README.md", broken)
    with pytest.raises(AssertionError):
        reader.read("README.md", Block("console", "$ steer generate --model absent --prompt x\n", "", 0))

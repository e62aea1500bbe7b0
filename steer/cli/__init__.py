"""The command line. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for what the user can mend, 130 when interrupted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    given = list(sys.argv[1:] if arguments is None else arguments)
    from steer.cli.app import app

    given = _renamed(given)
    try:
        status = int(app(given or ["--help"], prog_name="steer", standalone_mode=False) or 0)
        return _interrupted() if status == 130 else status  # typer answers Ctrl-C itself
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # Whoever read our output has seen enough; keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if type(error).__name__ == "Abort":
            return _interrupted()
        message = _for_people(error)
        if message is None:
            raise
        if message:  # empty where the help was printed in place of a command
            print(f"steer: error: {' '.join(message.split())}", file=sys.stderr)
        return 2


def _renamed(given: list[str]) -> list[str]:
    """The arguments with an old name of a command in its new form, which a note says."""
    from steer.cli.options import RENAMED

    # `steer eval` is a group now: only options after it mean the measurement that had its name.
    options = len(given) > 1 and given[1].startswith("-") and given[1] not in ("-h", "--help")
    if not given or given[0] not in RENAMED or (given[0] == "eval" and not options):
        return given
    new = RENAMED[given[0]]
    if not {"-q", "--quiet"} & {*given}:
        print(f"steer: note: {given[0]} is `steer {new}` now; the old name goes in version 0.2", file=sys.stderr)
    return [*new.split(), *given[1:]]


def _interrupted() -> int:
    print("steer: interrupted", file=sys.stderr)
    return 130


def _for_people(error: Exception) -> str | None:
    """One line about what the user can mend; None for what is our fault."""
    from steer.core import SteerError

    if isinstance(error, SteerError):
        return str(error)
    if hasattr(error, "format_message"):  # a usage error of the command-line library, whichever one it is built on
        return str(error.format_message())
    return f"{error.strerror or error}: {error.filename}" if isinstance(error, OSError) and error.filename else None

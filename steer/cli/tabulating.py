"""The job of `steer table`: written samples side by side."""

from __future__ import annotations

import shutil

from steer.cli.checks import Coming
from steer.cli.options import TableOptions
from steer.cli.session import Run, Session
from steer.core import check

__all__ = ["tabulate"]


def tabulate(options: TableOptions, coming: Coming = frozenset()) -> Run:
    """Check the files that are there already, then print."""
    from steer.measure.side_by_side import means_table, read_written, texts_markdown, texts_table

    check(bool(options.files), "files", None, "one file or more")
    there = [path for path in options.files if path.absolute() not in coming]
    if there:
        read_written(there)

    def run(session: Session) -> None:
        written = read_written(options.files)
        if options.markdown:
            session.say(texts_markdown(written) + "\n")
        elif options.texts:
            session.say(texts_table(written, shutil.get_terminal_size((120, 0)).columns) + "\n")
        session.say(means_table(written))

    return run

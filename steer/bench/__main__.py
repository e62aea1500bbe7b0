"""Benchmarks of what steering costs: `python -m steer.bench [names...] [--repeats R] [--json PATH] [--peers PYTHON]`.

Every figure compares two things in CPU time of one thread, A B B A ..., and gives the median over pairs of runs with a
95% interval; a machine's speed and its other work cancel. A figure passes where its median meets its bar and fails
where the whole interval misses it; between the two it is unclear, and more `--repeats` tell.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from steer.bench import bulk, language, particles
from steer.bench.harness import Bench, Figure

FIGURES: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "steered": language.steered,
    "readings": language.readings,
    "unsteered": language.unsteered,
    "hook": language.hook,
    "extraction": language.extraction,
    "best-of-n": language.best_of_n,
    "value": language.value,
    "import": language.imports,
    "particles": particles.overhead,
    "denoiser": particles.calls,
    "text-fk": particles.text,
    "batch": bulk.rate,
    "processes": bulk.spread,
}
"""Every figure by its name; each yields its rows."""


def run(bench: Bench, names: Sequence[str] = ()) -> list[Figure]:
    """Measure on one thread, printing each row as it comes."""
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names or FIGURES:
            for row in FIGURES[name](bench):
                print(row, flush=True)
                rows.append(row)
    finally:
        torch.set_num_threads(threads)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m steer.bench", description="Measure what steering costs.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of: {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs for each figure (default: 5)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with repeng and steering-vectors")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(FIGURES))
    if unknown or options.repeats < 1:
        parser.error(f"unknown figure {unknown[0]!r}" if unknown else "--repeats must be 1 or more")
    began = time.process_time()
    rows = run(Bench(options.repeats, peers=options.peers), options.names)
    print(f"{time.process_time() - began:.0f} s of CPU time; {sum(row.verdict == 'FAIL' for row in rows)} bars missed")
    if options.json:
        options.json.write_text(json.dumps([row.to_dict() for row in rows], indent=2) + "\n", encoding="utf-8")
    return int(any(row.verdict == "FAIL" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

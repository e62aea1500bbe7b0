"""Measurements that only a GPU can show: `python -m steer.bench.gpu [--json FILE]`, or
`make gpu`; under ten minutes on one card.

Tests on the device, parity of its precisions with float32 on the CPU, waits of the host for the device, what steering
costs there, memory, and vLLM with captured graphs where an environment has it. One JSON holds all of it, and
`python -m steer.bench.gpu --page FILE` prints it as a page. Without a card it says so and ends with status 0;
`--device cpu --quick` runs every part briefly without one, to try the script itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.bench.harness import MODEL, Bench, Figure

__all__ = ["SECTIONS", "Card", "main", "page"]

MINUTES = 10.0
SKIPPED = """\
==========================================================================================
GPU CHECKS SKIPPED: PyTorch {version} sees no CUDA device here. Nothing of a GPU was tried.
=========================================================================================="""


@dataclass
class Card:
    """A run of all sections: the device, its time, and what sections share."""

    device: str = "cuda"
    quick: bool = False
    tests: Path = Path("tests")
    vllm: str | None = None
    """An interpreter that has vLLM."""
    load: Callable[..., Any] | None = field(default=None, repr=False)
    """Loads the model: `load(device, dtype)`; None is the embedded model."""
    ends: float = field(default_factory=lambda: time.monotonic() + 60 * MINUTES)

    @property
    def left(self) -> float:
        """Seconds that are left, with some to write the results."""
        return max(1.0, self.ends - time.monotonic() - 10)

    def model(self, dtype: str = "float32", device: str | None = None) -> Any:
        if self.load is not None:
            return self.load(device or self.device, dtype)
        import steer

        return steer.load(MODEL, dtype=dtype, device=device or self.device)

    def bench(self, model: Any = None) -> Bench:
        return Bench(1 if self.quick else 5, 4 if self.quick else 64, given=model, device=self.device)


class Skipped(Exception):
    """A section that cannot run here, and why."""


# ------------------------------------------------------------------------------------------------------------ sections


def machine(card: Card) -> dict[str, Any]:
    """The card, its driver and the libraries."""
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if card.device.startswith("cuda"):
        facts = torch.cuda.get_device_properties(card.device)
        found |= {"card": facts.name, "memory_gib": round(facts.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        found["capability"] = f"{facts.major}.{facts.minor}"
    return found


def suite(card: Card) -> dict[str, Any]:
    """The device suite on this device: passed, failed and skipped tests, and the names of those that failed."""
    file = card.tests / "test_shadow.py"
    if not file.is_file():
        raise Skipped(f"{file} is not here: run in a checkout")
    device = "shadow" if card.device == "cpu" else card.device
    chosen = ["-k", "visible or greedy"] if card.quick else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", str(file), f"--junitxml={report}", *chosen]
        done = _run(command, card.left / 2, STEER_TEST_DEVICE=device, OMP_NUM_THREADS="1")
        if not report.is_file():
            raise RuntimeError(f"pytest wrote no report:\n{done[-2000:]}")
        cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [c.get("name", "") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {"device": device, "passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}


BOUNDS = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}
"""KL a token, in nats, that a precision may be from float32 on the CPU. Half precision rounds a logit of size 16 to
steps of 2^-3 (bfloat16) or 2^-6 (float16), so the KL of two laws is some hundredths or ten-thousandths; sums of float32
in another order (TF32 is off by default) are far below."""


def parity(card: Card) -> dict[str, Any]:
    """KL a token of each precision's laws from those of float32 on the CPU, on one text, plain and under a vector; and
    the drift of the vector as each measures it.
    """
    reference = card.model("float32", "cpu")
    bench = card.bench(reference)
    prompts, vector = bench.prompts(2 if card.quick else 8), bench.vector()
    texts = reference.generate(prompts, seed=0, max_new_tokens=bench.tokens, eos_token_id=[]).tokens
    want = {name: _laws(reference, prompts, texts, edits) for name, edits in (("plain", []), ("steered", [vector]))}
    found: dict[str, Any] = {"tokens": sum(map(len, texts)), "ok": True}
    for dtype in BOUNDS:
        model = card.model(dtype)
        have = {name: _laws(model, prompts, texts, [] if name == "plain" else [vector]) for name in want}
        row = {f"kl_{name}": float(_kl(want[name], have[name]).mean()) for name in want}
        row |= {f"kl_{name}_worst": float(_kl(want[name], have[name]).max()) for name in want}
        row["drift"] = float(_kl(have["steered"], have["plain"]).mean())
        row["drift_float32_cpu"] = float(_kl(want["steered"], want["plain"]).mean())
        row["bound"], row["ok"] = BOUNDS[dtype], max(row["kl_plain"], row["kl_steered"]) <= BOUNDS[dtype]
        found[dtype], found["ok"] = row, found["ok"] and row["ok"]
        del model
    return found


def _laws(model: Any, prompts: Sequence[Any], texts: Sequence[Sequence[int]], edits: Sequence[Any]) -> Tensor:
    """Log-laws `[tokens, V]` in float64 of every token of the texts, drawn along them."""
    from steer.core import TransitionEdit

    seen: list[Tensor] = []

    class Along(TransitionEdit):
        """Draws the given text, and keeps the law that it found."""

        def shift(self, x: Tensor, context: Any) -> Tensor:
            seen.append(x.double().cpu())
            token = torch.tensor([[text[context.step]] for text in texts], device=x.device)
            return torch.full_like(x, -torch.inf).scatter(1, token, 0.0)

    model.generate(
        prompts, edits=[[*edits, Along()]] * len(prompts), seed=0, max_new_tokens=len(texts[0]), eos_token_id=[]
    )
    return torch.cat(seen)


def _kl(law: Tensor, other: Tensor) -> Tensor:
    return (law.exp() * (law - other)).sum(-1)


def waits(card: Card) -> dict[str, Any]:
    """Times that the host waits for the device in a token, by CUDA's own count (its synchronisation debug mode)."""
    if not card.device.startswith("cuda"):
        raise Skipped("only CUDA tells of its synchronisations; tests/test_shadow.py counts them elsewhere")
    model = card.model()
    bench, found = card.bench(model), {}
    for name, how in {"plain": {}, "greedy": {"temperature": 0}, "steered": {"edits": bench.vector()}}.items():
        counts = [_synchronisations(model, bench, tokens, how) for tokens in (8, 8, 24)]  # the first is for warmth
        found[name] = (counts[2] - counts[1]) / 16
    return {"a_token": found, "ok": max(found.values()) <= 1}


def _synchronisations(model: Any, bench: Bench, tokens: int, how: dict[str, Any]) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model.generate(bench.prompts(4), seed=0, max_new_tokens=tokens, eos_token_id=[], **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen)


def costs(card: Card) -> dict[str, Any]:
    """The rows of `make bench` that have a device, beside transformers' own `generate`."""
    from steer.bench import language, particles

    model = card.model("float32" if card.quick else "bfloat16")
    bench = card.bench(model)
    figures = [language.steered, language.unsteered, language.value] + ([] if card.quick else [particles.text])
    rows = [row for figure in figures for row in figure(bench)]
    if not card.quick:
        rows += language.best_of_n(bench)
    return _table(rows)


def memory(card: Card) -> dict[str, Any]:
    """Peak memory in MiB of the weights alone, and beyond them of 32 rows that are plain, steered, and particles."""
    if not card.device.startswith("cuda"):
        raise Skipped("only CUDA counts its memory")
    from steer.methods.fk import FKSteering

    before = torch.cuda.memory_allocated()
    model = card.model("bfloat16")
    weights, bench = torch.cuda.memory_allocated() - before, card.bench(model)
    particles = {"sampler": FKSteering(32), "reward": "length", "block": 8}
    jobs: dict[str, tuple[int, dict[str, Any]]] = {
        "plain": (8, {"n": 4}),
        "steered": (8, {"n": 4, "edits": bench.vector()}),
        "particles": (1, particles),
    }
    found = {"weights": weights / 2**20}
    for name, (count, how) in jobs.items():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        model.generate(bench.prompts(count), seed=0, max_new_tokens=128, eos_token_id=[], **how)
        found[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
    return {"mib": found}


def vllm(card: Card) -> dict[str, Any]:
    """`make bench-vllm` with compiled engines and captured graphs, and its tests of parity with transformers."""
    python = card.vllm
    if python is None or not card.device.startswith("cuda"):
        raise Skipped("no environment with vLLM for this device (--vllm PYTHON)")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        command = [python, "-m", "steer.bench.vllm", "graphs", "steered", "decided", "peers", "--compiled"]
        said = _run([*command, "--repeats", "5", "--json", str(file)], card.left)
        if not file.is_file():
            raise RuntimeError(f"steer.bench.vllm wrote no rows:\n{said[-3000:]}")
        rows = json.loads(file.read_text(encoding="utf-8"))
    return {"rows": rows, "ok": all(row["verdict"] != "FAIL" for row in rows)}


SECTIONS: dict[str, Callable[[Card], dict[str, Any]]] = {
    "machine": machine,
    "suite": suite,
    "parity": parity,
    "waits": waits,
    "costs": costs,
    "memory": memory,
    "vllm": vllm,
}
"""What is measured, in order."""


def _table(rows: Sequence[Figure]) -> dict[str, Any]:
    return {"rows": [row.to_dict() for row in rows], "ok": all(row.verdict != "FAIL" for row in rows)}


def _run(command: Sequence[str], seconds: float, **variables: str) -> str:
    """What a command says; it is stopped after so many seconds."""
    done = subprocess.run(
        command,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    return done.stdout


def measure(card: Card, names: Sequence[str] = ()) -> dict[str, Any]:
    """Every section's result by its name, with `status` ("ok", "FAILED", "skipped") and `seconds`."""
    results: dict[str, Any] = {"device": card.device, "quick": card.quick, "sections": {}}
    for name in names or SECTIONS:
        began = time.monotonic()
        try:
            found = SECTIONS[name](card)
            bad = not found.get("ok", True) or bool(found.get("failed"))
            found["status"] = "FAILED" if bad else "ok"
        except Skipped as reason:
            found = {"status": "skipped", "why": str(reason)}
        except Exception as error:  # a section that breaks is a finding: the others still run
            traceback.print_exc()
            found = {"status": "FAILED", "why": f"{type(error).__name__}: {error}"}
        found["seconds"] = round(time.monotonic() - began, 1)
        results["sections"][name] = found
        print(f"{name}: {found['status']} ({found['seconds']} s) {found.get('why', '')}", flush=True)
    return results


# ---------------------------------------------------------------------------------------------------------------- page


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"# GPU checks on {results['device']}" + (" (quick)" if results["quick"] else ""), ""]
    for name, found in results["sections"].items():
        lines += [f"## {name}: {found['status']} ({found['seconds']} s)", ""]
        facts = {k: v for k, v in found.items() if k not in ("status", "seconds", "ok", "rows")}
        nested = {k: v for k, v in facts.items() if isinstance(v, dict)}
        lines += [f"- {key}: {_shown(value)}" for key, value in facts.items() if key not in nested]
        lines += _columns(nested)
        if "rows" in found:
            lines += ["| figure | what | median | 95% interval | verdict |", "|---|---|---|---|---|"]
            lines += [_line(row) for row in found["rows"]]
        lines.append("")
    return "\n".join(lines)


def _columns(nested: dict[str, dict[str, Any]]) -> list[str]:
    """Dictionaries as the rows of a table."""
    if not nested:
        return []
    names = list(dict.fromkeys(name for row in nested.values() for name in row))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return lines + [f"| {k} | {' | '.join(_shown(row.get(name, '')) for name in names)} |" for k, row in nested.items()]


def _line(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    interval = f"{low:.3f} to {high:.3f}"
    return f"| {row['name']} | {row['what']} | {row['median']:.3f} {row['unit']} | {interval} | {row['verdict']} |"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where a section failed."""
    parser = argparse.ArgumentParser(prog="python -m steer.bench.gpu", description="Check and measure on a GPU.")
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of: {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--device", default=None, help="default: cuda, where there is one")
    parser.add_argument("--quick", action="store_true", help="every part briefly")
    parser.add_argument("--json", type=Path, default=Path("out/gpu.json"), help="default: out/gpu.json")
    parser.add_argument("--page", type=Path, metavar="FILE", help="print a JSON of an earlier run, and measure nothing")
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vLLM")
    chosen = parser.parse_args(arguments)
    unknown = sorted(set(chosen.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}")
    if chosen.page:
        print(page(json.loads(chosen.page.read_text(encoding="utf-8"))))
        return 0
    if chosen.device is None and not torch.cuda.is_available():
        print(SKIPPED.format(version=torch.__version__), file=sys.stderr, flush=True)
        return 0
    here = sys.executable if importlib.util.find_spec("vllm") else None
    results = measure(Card(chosen.device or "cuda", chosen.quick, vllm=chosen.vllm or here), chosen.sections)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{page(results)}\nwrote {chosen.json}")
    return int(any(found["status"] == "FAILED" for found in results["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())

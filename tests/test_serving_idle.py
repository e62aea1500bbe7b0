"""A server with nobody inside gives freed memory back."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from steer.serving.gate import Gate
from steer.serving.idle import Idle


async def rests(visits: list[tuple[float, float]], drains: bool = False) -> int:
    """How often a gate rests, after 0.1 s without anybody, when visitors come and go at these times."""
    rested: list[bool] = []
    gate = Gate(4, Idle(lambda: rested.append(True), 0.1))

    async def visit(comes: float, goes: float) -> None:
        await asyncio.sleep(comes)
        since = gate.enter()
        await asyncio.sleep(goes - comes)
        gate.leave(since)

    await asyncio.gather(*(visit(*times) for times in visits))
    if drains:
        await gate.drain(1.0)
    await asyncio.sleep(0.4)
    return len(rested)


def test_a_gate_rests_once_after_the_last_has_left() -> None:
    assert asyncio.run(rests([])) == 0
    assert asyncio.run(rests([(0.0, 0.05)])) == 1
    assert asyncio.run(rests([(0.0, 0.05), (0.02, 0.3)])) == 1  # never empty between the two
    assert asyncio.run(rests([(0.0, 0.02), (0.05, 0.07)])) == 1  # the second came before it could rest
    assert asyncio.run(rests([(0.0, 0.02), (0.4, 0.42)])) == 2
    assert asyncio.run(rests([(0.0, 0.02)], drains=True)) == 0


def test_what_fails_at_rest_stays_there() -> None:
    async def fails() -> None:
        gate = Gate(1, Idle(lambda: 1 / 0, 0.0))
        gate.leave(gate.enter())
        await asyncio.sleep(0.1)
        gate.leave(gate.enter())

    asyncio.run(fails())


FREES = """
from pathlib import Path
from steer.serving.idle import give_back_memory

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024

pieces = [bytes([1]) * 60_000 for _ in range(4000)]
del pieces[::2], pieces[1::2]
before = resident()
told = give_back_memory()
print(told, before - resident())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    """Three quarters of 240 MB in pieces are freed between others that stay, and the C library keeps them."""
    run = subprocess.run([sys.executable, "-c", FREES], capture_output=True, text=True, check=True)
    told, given = run.stdout.split()
    if told == "False":
        pytest.skip("the C library is not glibc")
    assert float(given) > 50

"""Load on a server: many clients at once, half of them steered, some of which vanish in mid-answer.

    python tests/load_serving.py --model smollm2-135m --seconds 60 --server steer

The server is `steer serve` on transformers, on vLLM (`--server steer-vllm`), or vLLM's own (`--server vllm`).
Two runs on one server, once or in `--rounds`: everybody plain, then half of them steered (vectors, and searches now
and then). Prints errors, latency of the plain requests of both runs, and what is left afterwards in each process.
Latency is also told in seconds of the server's own processor time, which other work on the machine does not stretch.
Exit status 1 where an answer was neither 200 nor 429, plain requests take more than `--ratio` times as long at the
median in steered company (in processor time), or something is left behind: requests, or `--growth` MB of memory after
the last run that were not there after the first.

vLLM's servers run with a small cache of matrix products in oneDNN, which otherwise grows by some 60 to 80 MB in each of
the first runs, with steer or without: it keeps up to 1024 of them, one for each number of tokens in a batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from serving_tools import Running, serving, vllm_serving, write_vector

PROMPTS = (
    "My day at the lake",
    "Describe the new neighbour.",
    "How do I boil an egg?",
    "Tell me about the sea.",
    "Name three colours.",
    "What is a good book about birds?",
)


@dataclass
class Tally:
    """What came of one run."""

    statuses: Counter[str] = field(default_factory=Counter)
    plain: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of each plain request, by the clock and of the server's processor time."""
    steered: list[tuple[float, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def share(self, of: float, kind: int = 0) -> float:
        """Quantile of the plain requests' seconds."""
        ordered = sorted(seconds[kind] for seconds in self.plain)
        return ordered[min(len(ordered) - 1, int(of * len(ordered)))] if ordered else float("nan")


async def client(http: httpx.AsyncClient, number: int, steers: bool, end: float, tally: Tally, args: Any) -> None:
    """Ask again and again. Every eighth client leaves in the middle of each answer."""
    chance = random.Random(number)
    leaves = number % 8 == 7
    steered = steers and number % 2 == 1
    while time.monotonic() < end:
        body: dict[str, Any] = {
            "model": args.model,
            "messages": prompt(chance),
            "max_tokens": chance.randint(args.tokens // 2, args.tokens),
            "temperature": 0.8,
            "stream": leaves,
            "seed": chance.getrandbits(31),
        }
        if steered:
            body["steer"] = steering(chance)
        began, used = time.monotonic(), processor_time(args.processes)
        try:
            status, tokens = await (leave if leaves else ask)(http, body, chance)
        except httpx.HTTPError as error:
            status, tokens = type(error).__name__, 0
        tally.statuses[status] += 1
        tally.tokens += tokens
        if status == "429":
            await asyncio.sleep(0.5 + chance.random())
        elif status == "200":
            took = time.monotonic() - began, processor_time(args.processes) - used
            (tally.steered if steered else tally.plain).append(took)


def prompt(chance: random.Random) -> list[dict[str, str]]:
    """A chat that begins like no other. Steered prompts share no cache with plain ones, nor with those that are steered
    otherwise: prompts that everybody repeats would be read once by plain requests, and anew by every steered one.
    """
    system = f"{chance.getrandbits(40)} is your number. You answer in one sentence."
    return [{"role": "system", "content": system}, {"role": "user", "content": chance.choice(PROMPTS)}]


def steering(chance: random.Random) -> dict[str, Any]:
    """A vector of a random strength; one request in ten searches."""
    if chance.random() < 0.1:
        return {"sampler": "best-of-n", "candidates": 4, "reward": "sentiment"}
    edit = {"name": chance.choice(("one", "two")), "strength": round(chance.uniform(-0.2, 0.2), 3)}
    return {"edits": [edit], "reward": "sentiment"}


async def ask(http: httpx.AsyncClient, body: dict[str, Any], chance: random.Random) -> tuple[str, int]:
    answer = await http.post("/v1/chat/completions", json=body)
    if answer.status_code >= 400 and answer.status_code != 429:
        print(answer.status_code, answer.text[:300], file=sys.stderr)
    return str(answer.status_code), answer.json()["usage"]["completion_tokens"] if answer.status_code == 200 else 0


async def leave(http: httpx.AsyncClient, body: dict[str, Any], chance: random.Random) -> tuple[str, int]:
    """Read a few lines, then hang up."""
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            return str(answer.status_code), 0
        wanted = chance.randint(1, 12)
        async for line in answer.aiter_lines():
            if '"error"' in line:
                return json.loads(line.removeprefix("data: "))["error"]["message"], 0
            wanted -= 1
            if wanted <= 0:
                break
    return "left", 0


async def run(url: str, steers: bool, args: Any) -> Tally:
    tally, began = Tally(), time.monotonic()
    limits = httpx.Limits(max_connections=args.clients, max_keepalive_connections=args.clients, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        end = began + args.seconds
        await asyncio.gather(*(client(http, i, steers, end, tally, args) for i in range(args.clients)))
    tally.seconds = time.monotonic() - began
    return tally


def family(process: int) -> list[int]:
    """A process and those that it started, in whichever thread."""
    threads = Path(f"/proc/{process}/task").iterdir()
    children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    return [process, *(p for child in children for p in family(child))]


def memory(processes: list[int]) -> list[float]:
    """Resident memory of each in MB, with what they share."""
    texts = [Path(f"/proc/{process}/status").read_text() for process in processes]
    return [int(text.split("VmRSS:")[1].split()[0]) / 1024 for text in texts]


def processor_time(processes: list[int]) -> float:
    """Seconds that processes have computed."""
    stats = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in processes]
    return sum(int(ticks) for stat in stats for ticks in stat[11:13]) / os.sysconf("SC_CLK_TCK")


def report(name: str, tally: Tally) -> None:
    clock, processor = (f"p50 {tally.share(0.5, k):.2f} s p95 {tally.share(0.95, k):.2f} s" for k in (0, 1))
    print(
        f"{name:8} answers {dict(tally.statuses)}, {len(tally.plain)} of them plain: {clock}; of processor time "
        f"{processor}; {tally.tokens / tally.seconds:.0f} tokens/s",
        flush=True,
    )


_FEW_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


def started(args: Any, folder: str) -> AbstractContextManager[Running]:
    """The server that is asked for."""
    from steer.embedded import resolve

    if args.server == "vllm":
        settings = {"server": {"artifacts": folder, "limits": {"requests": args.clients}}}
        return vllm_serving(resolve(args.model), settings, "--served-model-name", args.model, **_FEW_PRODUCTS)
    engine = ("--engine", "vllm", "--dtype", "float32") if args.server == "steer-vllm" else ()
    return serving(args.model, "--artifacts", folder, "--max-requests", args.clients, *engine, **_FEW_PRODUCTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--server", choices=("steer", "steer-vllm", "vllm"), default="steer")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=1.2)
    parser.add_argument("--growth", type=float, default=64)
    args = parser.parse_args()
    from steer.embedded import resolve

    width = json.loads((Path(resolve(args.model)) / "config.json").read_text())["hidden_size"]
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(("one", "two")):
            write_vector(Path(folder) / f"{name}.safetensors", width=width, layers=tuple(range(10, 20)), seed=seed)
        with started(args, folder) as server:
            args.processes = family(server.process.pid)
            asyncio.run(run(server.url, True, argparse.Namespace(**{**vars(args), "seconds": 5.0})))
            tallies, left = [], []
            for name, steers in (("plain", False), ("steered", True)) * args.rounds:
                tallies.append(asyncio.run(run(server.url, steers, args)))
                report(name, tallies[-1])
                idle = server.settles("steer_inside", 0, 120) and server.settles("steer_rows", 0)
                time.sleep(6)  # the server rests: it gives back what was freed
                left.append((memory(args.processes), idle))
                parts = " + ".join(f"{part:.0f}" for part in left[-1][0])
                print(f"{'':8} memory afterwards {parts} MB, {'idle' if idle else 'NOT IDLE'}", flush=True)
    plain, steered = (Tally(plain=[s for t in tallies[i::2] for s in t.plain]) for i in (0, 1))
    ratio, clock = (steered.share(0.5, kind) / plain.share(0.5, kind) for kind in (1, 0))
    print(
        f"plain requests in steered company over plain company, at the median: {ratio:.2f} in processor time, "
        f"{clock:.2f} by the clock"
    )
    wrong = {s for t in tallies for s in t.statuses} - {"200", "429", "left"}
    grown = sum(left[-1][0]) - sum(left[0][0])
    print(f"memory grew by {grown:.0f} MB; wrong answers: {sorted(wrong) or 'none'}")
    return int(bool(wrong) or ratio > args.ratio or not all(idle for _, idle in left) or grown > args.growth)


if __name__ == "__main__":
    sys.exit(main())

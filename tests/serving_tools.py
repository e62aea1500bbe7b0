"""A server of `steer serve` in a process of its own, for tests and for the load script."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from steer import artifacts
from steer.artifacts import Card


@dataclass
class Running:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str
    """Without `/v1`."""
    log: list[str] = field(default_factory=list)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **more)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **more)

    def metric(self, name: str) -> float:
        """One number of `/metrics`."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def settles(self, name: str, value: float, seconds: float = 20) -> bool:
        """Whether a metric comes to `value` in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.metric(name) == value:
                return True
            time.sleep(0.02)
        return False

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


@contextmanager
def serving(model: str | Path, *arguments: object, **environment: str) -> Iterator[Running]:
    """`steer serve` on a port of the system's choice, ended when the block ends."""
    command = [sys.executable, "-m", "steer", "serve", "--model", str(model), "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    running = Running(process, "")
    try:
        assert process.stderr is not None
        for line in process.stderr:
            running.log.append(line)
            if found := re.search(r"serving on (http://\S+)/v1", line):
                running.url = found[1]
                break
        assert running.url, "".join(running.log)
        threading.Thread(target=lambda: running.log.extend(process.stderr or ()), daemon=True).start()
        yield running
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def write_vector(
    path: Path, info: Any = None, *, width: int = 32, layers: tuple[int, ...] = (0, 1), seed: int = 1
) -> Path:
    """A steering vector of random directions; of the model in `info`, or of any."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"direction.{layer}": torch.randn(width, generator=generator) for layer in layers}
    entry = {"width": width} if info is None else info.entry()
    artifacts.save(path, tensors, Card("vector", entry, list(layers), {"strength": 1.0}))
    return path

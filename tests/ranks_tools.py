"""Jobs on two ranks, for tests: gloo on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def torchrun(words: Sequence[str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run a script on two ranks to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    about = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}
    return subprocess.run([*command, *words], env=os.environ | about, capture_output=True, text=True, timeout=500)

"""Runs every line of `steer/serving/CLIENTS.md` against `steer serve`: `python run.py PYTHON NODE_FOLDER [MODEL]`.

PYTHON is an interpreter that has the Python clients, NODE_FOLDER a folder with the JavaScript ones; see `make clients`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from serving_tools import Running, serving, write_vector  # noqa: E402

KEY = "a-key-of-the-clients"


def page() -> list[str]:
    """The clients that the page names."""
    text = (HERE.parent.parent / "steer" / "serving" / "CLIENTS.md").read_text(encoding="utf-8").partition("\n## ")[0]
    return re.findall(r"^\| ([^|]+?) +\|", text, re.MULTILINE)[1:]


def command(name: str, python: str) -> list[str]:
    """What runs one client."""
    if name == "curl":
        return [str(HERE / "curl.sh")]
    if name in ("openai (JavaScript)", "Vercel AI SDK"):
        return ["node", str(HERE / "javascript_clients.mjs"), name]
    return [python, str(HERE / "python_clients.py"), name.removesuffix(" (Python)")]


def run(server: Running, model: str, python: str, node: str) -> int:
    """How many clients failed; each is told in one line, and why."""
    there = {
        "STEER_URL": f"{server.url}/v1",
        "STEER_KEY": KEY,
        "STEER_MODEL": model,
        "STEER_EDIT": "calm",
        "STEER_NODE": str(Path(node).resolve()),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    failed = 0
    for name in page():
        done = subprocess.run(
            command(name, python), env={**os.environ, **there}, capture_output=True, text=True, timeout=600
        )
        version = done.stdout.strip().splitlines()[-1:] or ["?"]
        print(f"{name:24} {version[0]:12} {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
        if done.returncode:
            failed += 1
            print(done.stderr[-2000:])
    return failed


def main(python: str, node: str, model: str = "smollm2-135m") -> int:
    import steer

    info = steer.load(model, dtype="float32", device="cpu").info
    with tempfile.TemporaryDirectory() as folder:
        write_vector(Path(folder) / "calm.safetensors", width=info.width, layers=tuple(range(info.num_layers)))
        options = ["--artifacts", folder, "--api-key-env", "TEST_KEY", "--name", "served"]
        with serving(model, *options, TEST_KEY=KEY) as server:
            return run(server, "served", python, node)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

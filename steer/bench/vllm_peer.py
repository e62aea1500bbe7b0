"""vllm-lens in a process of its own, for `python -m steer.bench.vllm peers`; imports nothing of `steer`.

The first line that the process reads is a job as JSON: `model`, `engine` (settings of `vllm.LLM`), `prompts` (token
ids), `tokens` to generate for each, `layer` and `vector`, what is added to that block's output. Each further line is
answered by the CPU seconds of one batch: `plain`, on an engine that was never steered, `steered` and `unsteered`, both
on a second one; followed by `tokens`, by its tokens at temperature 0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

_ANSWER = "ANSWER "


def found(folder: str | None) -> bool:
    """Whether the library is installed, or lies unpacked in `folder`."""
    return find_spec("vllm_lens") is not None or (folder is not None and os.path.isdir(f"{folder}/vllm_lens"))


@contextmanager
def working(job: dict[str, Any], folder: str | None) -> Iterator[Callable[[str], Any]]:
    """A process with that job: a function from a line to its answer, which raises `RuntimeError` where the process has
    ended. (`-P` because a module beside this one is called vllm, too.)
    """
    paths = [path for path in (folder, os.environ.get("PYTHONPATH")) if path]
    environment = os.environ | {"VLLM_PLUGINS": "activations", "VLLM_LENS_DISABLE": "0"}
    process = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    read, write = process.stdout, process.stdin
    assert read is not None and write is not None

    def ask(line: str) -> Any:
        write.write(line + "\n")
        write.flush()
        for answer in read:
            if answer.startswith(_ANSWER):
                return json.loads(answer.removeprefix(_ANSWER))
        raise RuntimeError("vllm-lens ended; its messages are above")

    try:
        write.write(json.dumps(job) + "\n")
        yield ask
    finally:
        process.kill()
        process.wait()


class Peer:
    """Two engines with the library, of which the second adds the vector at every position of requests. Its hooks stay
    after the first of them.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM

        self.job = job
        self.prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        self.never, self.llm = (LLM(model=job["model"], **job["engine"]) for _ in range(2))

    def params(self, steered: bool, temperature: float) -> list[Any]:
        """Made anew for every batch, because the library takes its vectors out of them."""
        import torch
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm_lens import SteeringVector  # type: ignore[import-not-found]

        vector = torch.tensor([self.job["vector"]])
        made = []
        for seed in range(len(self.prompts)):
            edit = SteeringVector(activations=vector, layer_indices=[self.job["layer"]])
            made.append(
                SamplingParams(
                    max_tokens=self.job["tokens"],
                    temperature=temperature,
                    seed=seed if temperature else None,
                    ignore_eos=True,
                    logprobs=0,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    extra_args={"apply_steering_vectors": [edit]} if steered else None,
                )
            )
        return made

    def answer(self, line: str) -> Any:
        what, _, tokens = line.partition(" ")
        params = self.params(what == "steered", 0.0 if tokens else 1.0)
        engine = self.never if what == "plain" else self.llm
        began = time.process_time()
        engine.reset_prefix_cache()
        outputs = engine.generate(self.prompts, params, use_tqdm=False)
        seconds = time.process_time() - began
        return [list(output.outputs[0].token_ids) for output in outputs] if tokens else seconds


def main() -> None:
    """Answer until the input ends."""
    peer = Peer(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(_ANSWER + json.dumps(peer.answer(line.strip())), flush=True)


if __name__ == "__main__":
    main()

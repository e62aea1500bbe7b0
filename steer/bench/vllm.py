"""What steering costs in vLLM: `python -m steer.bench.vllm`, in an environment that has vLLM.

The engine runs in this process, so that CPU time counts all of it. Tasks take turns; every figure is a ratio of times
of the same work, and `engine` says how it was started.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from steer.bench.harness import MODEL, Bench, Row, Task, alternate, ratios, recipes

__all__ = ["GROUPS", "VLLMBench", "main"]


@dataclass
class VLLMBench(Bench):
    """The model in vLLM; `model` stays the transformers adapter's."""

    compiled: bool = False
    dtype: str = "float32"
    rows: int = 256

    @cached_property
    def model(self) -> Any:
        """The transformers adapter, in the same precision."""
        import steer

        return steer.load(MODEL, dtype=self.dtype, device="cpu")

    @cached_property
    def engine(self) -> Any:
        """The engine, loaded on first use."""
        from steer.adapters import vllm

        return vllm.load(
            MODEL, dtype=self.dtype, enforce_eager=not self.compiled, max_model_len=1024, block_size=32,
            max_num_seqs=self.rows, steer={"reads": [10], "slots": 600} if self.compiled else {},
        )  # fmt: skip

    def prompts(self, count: int) -> list[Any]:
        from steer import RawText

        texts = json.loads((recipes() / "neutral_prompts.json").read_text(encoding="utf-8"))
        return [RawText(texts[i % len(texts)]) for i in range(count)]

    def drawing(self, rows: int, edits: Sequence[Any], tokens: int | None = None) -> Task:
        """One call of the engine for `rows` texts of fixed length; `edits` has one entry for each, or is empty."""
        prompts, new = self.prompts(rows), tokens or self.tokens
        process = self.engine.process(temperature=1.0, max_new_tokens=new, eos_token_id=[])
        mounted = [process.edited(edit) if edit is not None else process for edit in edits] or [process] * rows
        made = [one.request(prompt, new, seed) for seed, (one, prompt) in enumerate(zip(mounted, prompts, strict=True))]
        texts, params = [text for text, _ in made], [params for _, params in made]

        def task() -> None:
            self.engine.llm.reset_prefix_cache()
            outputs = self.engine.llm.generate(texts, params, use_tqdm=False)
            assert all(len(output.outputs[0].token_ids) == new for output in outputs)

        return task

    def against_plain(self, rows: int, edits: Sequence[Sequence[Any]], tokens: int | None = None) -> list[list[float]]:
        """Times of a plain batch over those of the batch under each of `edits`, in turns."""
        tasks = [self.drawing(rows, mine, tokens) for mine in ([], *edits)]
        for task in tasks:
            task()
        plain, *others = alternate(tasks, self.repeats)
        return [ratios(plain, other) for other in others]


def steered(bench: VLLMBench) -> Iterator[Row]:
    """Fully steered batches against plain ones, with one vector and with a different one for every request."""
    model = bench.engine
    vectors = [bench_vector(seed) for seed in range(8)]
    for rows in (8, 32):
        one, eight = bench.against_plain(rows, [[vectors[0]] * rows, [vectors[i % 8] for i in range(rows)]])
        yield Row("steered", f"steered / plain tokens/s, batch {rows}", one, at_least=0.97)
        yield Row("steered", f"the same with 8 different vectors, batch {rows}", eight, at_least=0.95)
    model.register("bench", vectors[0])
    specs = [model.edit("bench", 0.02 + i / 10000) for i in range(256)]
    (many,) = bench.against_plain(256, [specs], 8)
    yield Row("steered", "256 requests with 256 different specs", many, at_least=0.90)


def decided(bench: VLLMBench) -> Iterator[Row]:
    """Controllers and Q-heads, at batch 8 and 32. A controller runs the last token of each prompt twice: its cost
    depends on how long the texts are.
    """
    for rows in (8, 32):
        edits = [[bench_controller()] * rows, [bench_value()] * rows]
        led, valued = bench.against_plain(rows, edits, max(64, bench.tokens))
        yield Row("controller", f"with a controller / plain tokens/s, batch {rows}", led, at_least=0.95)
        yield Row("q-head", f"with a Q-head / plain tokens/s, batch {rows}", valued, at_least=0.90)


def against_transformers(bench: VLLMBench) -> Iterator[Row]:
    """The same batch, steered, in vLLM and by the transformers adapter; best-of-32 after a prompt of 512 tokens."""
    vector = bench_vector(0)
    ours = bench.drawing(32, [vector] * 32)
    theirs = partial(
        bench.model.generate, bench.prompts(32), edits=vector, seed=0, max_new_tokens=bench.tokens, eos_token_id=[]
    )
    fast, slow = bench.compare([ours, theirs], max(3, bench.repeats // 2))
    yield Row("transformers", "times faster than the transformers adapter, batch 32", ratios(slow, fast), at_least=3)
    prompt = long_prompt(bench)
    common: dict[str, Any] = {
        "sampler": "best-of-n", "n": 32, "reward": "length", "seed": 0, "max_new_tokens": 32, "eos_token_id": []
    }  # fmt: skip

    def best(model: Any) -> Any:
        if model is bench.engine:
            bench.engine.llm.reset_prefix_cache()
        return model.generate(prompt, **common)

    fast, slow = bench.compare([partial(best, bench.engine), partial(best, bench.model)], max(3, bench.repeats // 2))
    yield Row("transformers", "the same, best-of-32 after a 512-token prompt", ratios(slow, fast), at_least=3)


GROUPS = {"steered": steered, "decided": decided, "transformers": against_transformers}
"""What can be measured, by name."""


def bench_vector(seed: int) -> Any:
    """Random directions on the middle third of the blocks."""
    from steer import SteeringVector

    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({i: torch.randn(576, generator=generator) for i in range(10, 20)}, 0.02).normalised()


def bench_controller() -> Any:
    """A controller on all blocks, which reads one."""
    from steer.methods.controller import Controller, ControllerNetwork

    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(30, 576), dim=1)
    return Controller(ControllerNetwork(576, 30).eval(), (10,), directions, 0.02, threshold=0.0)


def bench_value() -> Any:
    """Guidance by an untrained Q-head: it costs what a trained one does."""
    from steer.methods.value import HeadValue, QHead, ValueGuidance

    torch.manual_seed(0)
    return ValueGuidance(HeadValue(QHead(576)), beta=1.0)


def long_prompt(bench: VLLMBench) -> Any:
    """Text of 512 tokens."""
    from steer import RawText

    text = " ".join(str(p) for p in bench.prompts(64))
    ids = bench.engine.tokenizer(text)["input_ids"][:512]
    return RawText(bench.engine.tokenizer.decode(ids))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; `--json FILE` writes it as well."""
    parser = argparse.ArgumentParser(prog="python -m steer.bench.vllm", description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="what to measure (default: all)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile (slow to start)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of both adapters")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    bench = VLLMBench(repeats=chosen.repeats, tokens=chosen.tokens, compiled=chosen.compiled, dtype=chosen.dtype)
    print(f"engine: vLLM, {'compiled' if chosen.compiled else 'eager'}, {chosen.dtype}, in this process", flush=True)
    rows = []
    for name in chosen.groups or GROUPS:
        for row in GROUPS[name](bench):
            rows.append(row)
            print(row, flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps([row.to_dict() for row in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
    sys.stdout.flush()

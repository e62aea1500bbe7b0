"""Benchmarks of steering in vLLM: `python -m steer.bench.vllm`, in an environment that has vLLM.

The engine runs in this process, so that CPU time counts all of it. Tasks take turns; every figure is a ratio of times
of the same work, and `engine` says how it was started.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from steer.bench import vllm_peer
from steer.bench.harness import MODEL, Bench, Figure, Task, alternate, ratios, recipes

__all__ = ["GROUPS", "VLLMBench", "main"]


@dataclass
class VLLMBench(Bench):
    """The model in vLLM; `model` stays the transformers adapter's."""

    compiled: bool = False
    dtype: str = "float32"
    rows: int = 256

    @cached_property
    def model(self) -> Any:
        """The transformers adapter, in the same precision, where vLLM is."""
        import steer

        return steer.load(MODEL, dtype=self.dtype, device=self.device)

    @cached_property
    def engine(self) -> Any:
        """The engine, loaded on first use."""
        return self._load(steer={"reads": [10], "slots": 600} if self.compiled else {})

    @cached_property
    def paired(self) -> Any:
        """The same with a tuned model beside it, a random adapter."""
        with tempfile.TemporaryDirectory() as folder:
            bench_adapter(Path(folder))
            return self._load(steer={"tuned": {"tuned": folder}})

    def _load(self, **settings: Any) -> Any:
        from steer.adapters import vllm

        return vllm.load(MODEL, **self.settings, **settings)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of every engine; two share a card."""
        share = {} if self.device == "cpu" else {"gpu_memory_utilization": 0.3}
        return {
            **share,
            "dtype": self.dtype,
            "enforce_eager": not self.compiled,
            "max_model_len": 1024,
            "block_size": 32,
            "max_num_seqs": self.rows,
        }

    def prompts(self, count: int) -> list[Any]:
        from steer import RawText

        texts = json.loads((recipes() / "neutral_prompts.json").read_text(encoding="utf-8"))
        return [RawText(texts[i % len(texts)]) for i in range(count)]

    def drawing(
        self, rows: int, edits: Sequence[Any], tokens: int | None = None, engine: Any = None, read: Any = None
    ) -> Task:
        """One call of an engine for `rows` texts of fixed length; `edits` has one entry for each, or is empty. With
        readings each token's are asked for as well.
        """
        prompts, new, engine = self.prompts(rows), tokens or self.tokens, engine or self.engine
        process = engine.process(temperature=1.0, max_new_tokens=new, eos_token_id=[])
        process = process if read is None else process.watched(read)
        mounted = [process.edited(edit) if edit is not None else process for edit in edits] or [process] * rows
        tags = [] if read is None else [f"bench-{row}" for row in range(rows)]
        each = enumerate(zip(mounted, prompts, strict=True))
        made = [one.request(prompt, new, row, tags[row] if tags else None) for row, (one, prompt) in each]
        texts, params = [text for text, _ in made], [params for _, params in made]

        def task() -> None:
            engine.llm.reset_prefix_cache()
            outputs = engine.llm.generate(texts, params, use_tqdm=False)
            assert all(len(output.outputs[0].token_ids) == new for output in outputs)
            if tags:
                (told,) = engine.client.rpc("steer_readings", tags)
                assert all(len(positions) == new for positions, _ in told)

        return task

    def against_plain(self, rows: int, edits: Sequence[Sequence[Any]], tokens: int | None = None) -> list[list[float]]:
        """Times of a plain batch over those of the batch under each of `edits`, in turns."""
        tasks = [self.drawing(rows, mine, tokens) for mine in ([], *edits)]
        for task in tasks:
            task()
        plain, *others = alternate(tasks, self.repeats, self.clock)
        return [ratios(plain, other) for other in others]


def steered(bench: VLLMBench) -> Iterator[Figure]:
    """Fully steered batches against plain ones, with one vector and with a different one for every request."""
    model = bench.engine
    vectors = [bench_vector(seed) for seed in range(8)]
    for rows in (8, 32):
        one, eight = bench.against_plain(rows, [[vectors[0]] * rows, [vectors[i % 8] for i in range(rows)]])
        yield Figure("steered", f"steered / plain tokens/s, batch {rows}", one, at_least=0.97)
        yield Figure("steered", f"the same with 8 different vectors, batch {rows}", eight, at_least=0.95)
    model.register("bench", vectors[0])
    specs = [model.edit("bench", 0.02 + i / 10000) for i in range(256)]
    (many,) = bench.against_plain(256, [specs], 8)
    yield Figure("steered", "256 requests with 256 different specs", many, at_least=0.90)


def readings(bench: VLLMBench) -> Iterator[Figure]:
    """Batches of which two vectors are read at every token against plain ones."""
    from steer.readings import as_readings

    bench.engine.client.introduce(norms=True)
    read = as_readings({"one": bench_vector(0), "two": bench_vector(1)}, None, bench.engine.info)
    for rows in (8, 32):
        tasks = [bench.drawing(rows, [], 64), bench.drawing(rows, [], 64, read=read)]
        for task in tasks:
            task()
        plain, watched = alternate(tasks, bench.repeats, bench.clock)
        name = f"two readings of ten layers / none, tokens/s, batch {rows}"
        yield Figure("readings", name, ratios(plain, watched), at_least=0.98)


def decided(bench: VLLMBench) -> Iterator[Figure]:
    """Controllers and Q-heads, at batch 8 and 32. A controller runs the last token of each prompt twice: its cost
    depends on how long the texts are.
    """
    for rows in (8, 32):
        edits = [[bench_controller()] * rows, [bench_value()] * rows]
        led, valued = bench.against_plain(rows, edits, max(64, bench.tokens))
        yield Figure("controller", f"with a controller / plain tokens/s, batch {rows}", led, at_least=0.95)
        yield Figure("q-head", f"with a Q-head / plain tokens/s, batch {rows}", valued, at_least=0.90)


def against_transformers(bench: VLLMBench) -> Iterator[Figure]:
    """The same batch, steered, in vLLM and by the transformers adapter; best-of-32 after a prompt of 512 tokens."""
    vector = bench_vector(0)
    ours = bench.drawing(32, [vector] * 32)
    theirs = partial(
        bench.model.generate, bench.prompts(32), edits=vector, seed=0, max_new_tokens=bench.tokens, eos_token_id=[]
    )
    fast, slow = bench.compare([ours, theirs], max(3, bench.repeats // 2))
    yield Figure("transformers", "times faster than the transformers adapter, batch 32", ratios(slow, fast), at_least=3)
    prompt = long_prompt(bench)
    common: dict[str, Any] = {
        "sampler": "best-of-n",
        "n": 32,
        "reward": "length",
        "seed": 0,
        "max_new_tokens": 32,
        "eos_token_id": [],
    }

    def best(model: Any) -> Any:
        if model is bench.engine:
            bench.engine.llm.reset_prefix_cache()
        return model.generate(prompt, **common)

    fast, slow = bench.compare([partial(best, bench.engine), partial(best, bench.model)], max(3, bench.repeats // 2))
    yield Figure("transformers", "the same, best-of-32 after a 512-token prompt", ratios(slow, fast), at_least=3)


def guided(bench: VLLMBench) -> Iterator[Figure]:
    """RL guidance: what a tuned model in the engine costs plain requests, and guided ones beyond that."""
    edit = bench.paired.edit("tuned", 1.5)
    for rows in (8, 32):
        tasks = [bench.drawing(rows, [])]
        tasks += [bench.drawing(rows, edits, engine=bench.paired) for edits in ([], [edit] * rows)]
        plain, beside, towards = bench.compare(tasks)
        yield Figure("guided", f"plain tokens/s with a tuned model / without, batch {rows}", ratios(plain, beside))
        yield Figure("guided", f"guided / plain tokens/s with it, batch {rows}", ratios(beside, towards))


def peers(bench: VLLMBench) -> Iterator[Figure]:
    """One vector on one block, by this plug-in and by vllm-lens in a process of its own, each against plain batches of
    its own process. The other's hooks stay once a request was steered, so unsteered batches beside them are timed too.
    """
    if not vllm_peer.found(bench.peers):
        print("peers: vllm-lens is not installed (--peers FOLDER says where it was unpacked)", flush=True)
        return
    vector = peer_vector()
    for rows in (8, 32):
        ours = [partial(bench.clock, bench.drawing(rows, edits)) for edits in ([], [vector] * rows)]
        with vllm_peer.working(peer_job(bench, rows, vector), bench.peers) as ask:
            tasks = [*ours, *(partial(ask, what) for what in ("plain", "steered", "unsteered"))]
            for task in tasks:
                task()
            plain, led, without, theirs, beside = alternate(tasks, bench.repeats, lambda timed: timed())
        yield Figure("peers", f"one vector on one block / plain tokens/s, batch {rows}", ratios(plain, led))
        yield Figure("peers", f"the same by vllm-lens, batch {rows}", ratios(without, theirs))
        yield Figure("peers", f"unsteered beside it / plain, batch {rows}", ratios(without, beside))


def graphs(bench: VLLMBench) -> Iterator[Figure]:
    """Greedy texts under vectors in an engine that replays captured graphs, against those of an eager one: the same
    tokens but where rounding parts two texts, and how much faster they come.
    """
    eager = replace(bench, compiled=False)
    edits, rows = [bench_vector(seed % 8) for seed in range(32)], 32
    prompts, settings = bench.prompts(rows), {"temperature": 0, "max_new_tokens": 32, "eos_token_id": []}
    for what, mine in (("plain", ()), ("under 8 vectors", [[edit] for edit in edits])):
        texts = [b.engine.generate(prompts, edits=mine, **settings).tokens for b in (bench, eager)]
        alike = [sum(a == b for a, b in zip(*pair, strict=True)) / 32 for pair in zip(*texts, strict=True)]
        yield Figure("graphs", f"tokens that graphs and eager share, {what}", [sum(alike) / rows], "", at_least=0.9)
    slow, fast = bench.compare([b.drawing(rows, edits) for b in (eager, bench)])
    yield Figure("graphs", f"steered tokens/s, graphs / eager, batch {rows}", ratios(slow, fast))


GROUPS = {
    "steered": steered,
    "readings": readings,
    "decided": decided,
    "transformers": against_transformers,
    "guided": guided,
    "peers": peers,
    "graphs": graphs,
}
"""What can be measured, by name."""


def bench_vector(seed: int) -> Any:
    """Random directions on the middle third of the blocks."""
    from steer import SteeringVector

    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({i: torch.randn(576, generator=generator) for i in range(10, 20)}, 0.02).normalised()


def peer_vector() -> Any:
    """A random direction on one block, in absolute units."""
    from steer import SteeringVector

    return SteeringVector({15: torch.randn(576, generator=torch.Generator().manual_seed(0))}, 1.0, unit="raw")


def peer_job(bench: VLLMBench, rows: int, vector: Any) -> dict[str, Any]:
    """What `vllm_peer` needs for the batch that `drawing` runs."""
    from steer.embedded import resolve

    ((layer, direction),) = vector.directions.items()
    return {
        "model": str(resolve(MODEL)),
        "engine": {**bench.settings, "logprobs_mode": "processed_logprobs"},
        "prompts": [bench.engine.encode(prompt) for prompt in bench.prompts(rows)],
        "tokens": bench.tokens,
        "layer": layer,
        "vector": (vector.strength * direction).tolist(),
    }


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


def bench_adapter(folder: Path) -> None:
    """A random LoRA adapter of rank 16 on every block."""
    from safetensors.torch import save_file

    generator, held = torch.Generator().manual_seed(0), {}
    for layer in range(30):
        for target, width in (("self_attn.q_proj", 576), ("mlp.down_proj", 1536)):
            stem = f"base_model.model.model.layers.{layer}.{target}"
            held[f"{stem}.lora_A.weight"] = torch.randn(16, width, generator=generator) / width**0.5
            held[f"{stem}.lora_B.weight"] = torch.randn(576, 16, generator=generator) * 0.02
    save_file(held, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


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
    parser.add_argument("--peers", metavar="FOLDER", help="where vllm-lens was unpacked, if it is not installed")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_LENS_DISABLE"] = "1"  # where it is installed, it would turn itself on in this process
    bench = VLLMBench(
        repeats=chosen.repeats,
        tokens=chosen.tokens,
        compiled=chosen.compiled,
        dtype=chosen.dtype,
        peers=chosen.peers,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    how = "compiled" if chosen.compiled else "eager"
    print(f"engine: vLLM, {how}, {chosen.dtype}, on {bench.device}, in this process", flush=True)
    rows = []
    unfit = ("readings",) if chosen.compiled else ("graphs",)  # no captured network is read
    groups = chosen.groups or [name for name in GROUPS if name not in unfit]
    for name in groups:
        for row in GROUPS[name](bench):
            rows.append(row)
            print(row, flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps([row.to_dict() for row in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
    sys.stdout.flush()

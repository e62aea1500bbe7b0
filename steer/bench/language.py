"""Benchmarks of edits on a language model."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.bench.harness import MODEL, Bench, Figure, Task, alternate, cpu_seconds, ratios, recipes

WIDTH, DEPTH = 4096, 30  # of the stack of trivial blocks


def steered(bench: Bench) -> Iterator[Figure]:
    """Tokens a second with a vector on the middle third of the layers, over those without."""
    vectors = [bench.vector(seed) for seed in range(8)]
    plain, one = _in_turns(bench, 1, [_mounted(), _mounted((vectors[0], None))])
    yield Figure("steered", "steered / unsteered tokens/s, batch 1", ratios(plain, one), at_least=0.97)
    each = [(vector, [row]) for row, vector in enumerate(vectors)]
    plain, same, different = _in_turns(bench, 8, [_mounted(), _mounted((vectors[0], None)), _mounted(*each)])
    yield Figure("steered", "steered / unsteered tokens/s, batch 8", ratios(plain, same), at_least=0.97)
    yield Figure("steered", "the same with eight different vectors", ratios(plain, different))


def readings(bench: Bench) -> Iterator[Figure]:
    """Tokens a second with two vectors read at every token, over those without."""
    from steer.readings import as_readings

    read = as_readings({f"vector-{seed}": bench.vector(seed) for seed in range(2)}, None, bench.model.info)
    for rows in (1, 8):
        plain, watched = _in_turns(bench, rows, [_mounted(), lambda process: process.watched(read)])
        name = f"two readings of ten layers / none, tokens/s, batch {rows}"
        yield Figure("readings", name, ratios(plain, watched), at_least=0.98)


def _mounted(*edits: tuple[Any, Any]) -> Callable[[Any], Any]:
    """A process under edits, each for some rows or for all."""

    def mount(process: Any) -> Any:
        for edit, wanted in edits:
            process = process.edited(edit, wanted)
        return process

    return mount


def _in_turns(bench: Bench, rows: int, kinds: Sequence[Callable[[Any], Any]]) -> list[list[float]]:
    """Seconds of every decode step of each kind of process. The runs take their steps in turns, so that each pair
    of times is a fraction of a second apart.
    """
    seen: list[list[float]] = [[] for _ in kinds]
    for seed in range(-(-bench.repeats // 4)):
        steps = [_decoding(bench, rows, kind, seed) for kind in kinds]
        for step in steps:
            step()
        for mine, times in zip(seen, alternate(steps, bench.tokens - 2, bench.clock), strict=True):
            mine.extend(times)
    return seen


def _decoding(bench: Bench, rows: int, kind: Callable[[Any], Any], seed: int) -> Task:
    """Reads the prompts; each call then draws a token for every row and runs its pass (the last token has none)."""
    process = kind(bench.model.process(max_new_tokens=bench.tokens, eos_token_id=[]))
    generator = torch.Generator().manual_seed(seed)
    state = process.init(bench.prompts(rows), 1, generator)

    def step() -> None:
        nonlocal state
        state = process.propose(state, generator)

    return step


def unsteered(bench: Bench) -> Iterator[Figure]:
    """Tokens a second of an unsteered `generate` over those of the library's own on the same padded ids."""
    for rows in (1, 8):
        with _no_end(bench.model.network):
            theirs, ours = bench.compare([_library(bench, bench.prompts(rows)), bench.generating(rows)])
        yield Figure(
            "unsteered", f"steer / network.generate tokens/s, batch {rows}", ratios(theirs, ours), at_least=0.95
        )


def _library(bench: Bench, prompts: Sequence[Any], tokens: int | None = None, n: int = 1) -> Task:
    """The library's own `generate`: plain sampling of a fixed length inside `_no_end`."""
    from steer.adapters.transformers.tracking import left_padded

    model, length = bench.model, tokens or bench.tokens
    ids, mask = left_padded([model.encode(p) for p in prompts], model.pad_token_id, model.device)
    return lambda: model.network.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=length,
        num_return_sequences=n,
        pad_token_id=model.pad_token_id,
    )


@contextlib.contextmanager
def _no_end(network: Any) -> Iterator[None]:
    """No text ends early in the library's `generate`."""
    config = network.generation_config
    kept, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = kept


def hook(bench: Bench) -> Iterator[Figure]:
    """Microseconds that a steered layer adds to a decode step, beside a bare hook and other libraries'."""
    from steer.adapters.transformers.hooks import Hooks

    blocks = _stack()
    hooks, plan, position, token = Hooks(blocks), _plan(DEPTH), torch.tensor([100]), torch.tensor([0])

    def step() -> None:
        program = plan.decode(position, token)
        with hooks.running(program):
            _through(blocks, hidden)

    hidden = torch.zeros(1, 1, WIDTH)
    with torch.inference_mode(), hooks.installed(plan.layers):
        kept = _added(step, bench)
    with torch.inference_mode():
        fresh = _added(step, bench)
    bare = _bare(bench)
    yield Figure("hook", f"added per steered layer and step, width {WIDTH}", kept, "us", at_most=3.0)
    yield Figure("hook", "the same, hooks installed anew at every step (a lone step)", fresh, "us")
    yield Figure("hook", "a bare hook that adds in place", bare, "us")
    yield Figure("hook", "steer / the bare hook", ratios(kept, bare))
    if bench.peers:
        runs = [_peer(bench.peers, "hooks") for _ in range(min(3, bench.repeats))]
        for name in runs[0]:
            yield Figure("hook", f"{name}, on its own", [run[name] for run in runs], "us")


def _stack() -> nn.ModuleList:
    return nn.ModuleList(nn.Identity() for _ in range(DEPTH))


def _through(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden)
    return hidden


def _plan(depth: int) -> Any:
    """A vector on every layer, compiled for one row."""
    from steer import SteeringVector
    from steer.adapters.transformers.hidden import HiddenProgram
    from steer.core import ModelInfo

    info = ModelInfo(
        name="stack",
        model_type="",
        fingerprint="",
        num_layers=depth,
        width=WIDTH,
        residual_norms=lambda: torch.ones(depth),
        unembedding=lambda: torch.zeros(1, WIDTH),
    )
    vector = SteeringVector({layer: torch.randn(WIDTH) for layer in range(depth)}, 0.02)
    return HiddenProgram.compile([(vector, None)], info, [range(5)], [None])


def _added(step: Task, bench: Bench, steps: int = 500) -> list[float]:
    """Microseconds per layer by which `step` takes longer than a pass through the blocks alone."""
    blocks, hidden = _stack(), torch.zeros(1, 1, WIDTH)

    def many(task: Task) -> Task:
        return lambda: [task() for _ in range(steps)]

    longer, plain = bench.compare([many(step), many(lambda: _through(blocks, hidden))], 4 * bench.repeats)
    return [(a - b) / steps / DEPTH * 1e6 for a, b in zip(longer, plain, strict=True)]


def _bare(bench: Bench) -> list[float]:
    """The least that any hook can cost."""
    blocks, hidden, constant = _stack(), torch.zeros(1, 1, WIDTH), torch.zeros(1, 1, WIDTH)
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: out.add_(constant))
    with torch.inference_mode():
        return _added(lambda: _through(blocks, hidden), bench)


def extraction(bench: Bench) -> Iterator[Figure]:
    """CPU time to fit a vector at all layers from 64 pairs, over that of the fastest other library."""
    from steer.train.vector import train_vector

    if not bench.peers:
        print("extraction  SKIPPED: needs --peers PYTHON, an interpreter with repeng and steering-vectors", flush=True)
        return
    lines = (recipes() / "sentiment_pairs.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    pairs = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pairs.jsonl")
        file.write_text("\n".join(lines), encoding="utf-8")
        batch = _best_batch(bench.peers, file)
        names = ["repeng", f"steering-vectors:{batch}"]
        train_vector(bench.model, pairs[:4])
        tasks = [lambda: train_vector(bench.model, pairs), *names]
        seen = alternate(tasks, min(3, bench.repeats), lambda task: _clock(task, bench.peers, file))  # type: ignore[arg-type]
    mine, others = seen[0], seen[1:]
    fastest = [min(times) for times in zip(*others, strict=True)]
    yield Figure("extraction", "steer / the faster of both", ratios(mine, fastest), at_most=0.75)
    for name, theirs in zip(names, others, strict=True):
        yield Figure("extraction", f"steer / {name}", ratios(mine, theirs))


def _clock(task: Task | str, python: str | None, file: Path) -> float:
    """CPU seconds of our own task, or of the one that a peer's name stands for, by its own count."""
    if not isinstance(task, str):
        return cpu_seconds(task)
    assert python is not None
    return _peer(python, task, file)[task]


def _best_batch(python: str, file: Path) -> int:
    """The batch size at which steering-vectors is fastest."""
    sizes = (1, 8, 32)
    return min(sizes, key=lambda size: _clock(f"steering-vectors:{size}", python, file))


def _peer(python: str, name: str, pairs: Path | None = None) -> dict[str, float]:
    """What `peers.py` prints, run by another interpreter."""
    from steer.embedded import resolve

    script = Path(__file__).with_name("peers.py")
    command = [python, str(script), name, str(resolve(MODEL)), str(pairs), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed in {python}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def best_of_n(bench: Bench, length: int = 512, n: int = 32, tokens: int = 16) -> Iterator[Figure]:
    """CPU time of 32 continuations of a long prompt by the library, over ours, which reads the prompt once."""
    from steer import RawText

    model = bench.model
    words = " ".join(str(i) for i in range(length))
    ids = model.encode(RawText(words))[:length]
    prompt = RawText(model.tokenizer.decode(ids))
    ours = _best_of(bench, prompt, n, tokens)
    with _no_end(model.network):
        seen = bench.compare([ours], min(3, bench.repeats))[0]
        theirs = bench.clock(_library(bench, [prompt], tokens, n))
    name = f"{n} x {tokens} tokens after {len(model.encode(prompt))}: network.generate / steer"
    yield Figure("best-of-n", name, [theirs / mine for mine in seen], at_least=6.0)


def _best_of(bench: Bench, prompt: Any, n: int, tokens: int) -> Task:
    return lambda: bench.model.generate(
        prompt,
        sampler="best-of-n",
        n=n,
        reward=lambda texts: [float(len(text)) for text in texts],
        seed=0,
        max_new_tokens=tokens,
        eos_token_id=[],
    )


def value(bench: Bench) -> Iterator[Figure]:
    """CPU time of a token under a Q-head over that of a plain one."""
    from steer import ValueGuidance
    from steer.methods.value import HeadValue, QHead

    head = QHead(bench.model.info.width)
    nn.init.normal_(head.outer.weight, std=0.02)
    guidance = ValueGuidance(HeadValue(head.to(bench.model.device), bench.model.info.unembedding()), beta=1.0, top_k=20)
    for rows in (1, 8):
        plain, guided = _in_turns(bench, rows, [_mounted(), _mounted((guidance, None))])
        yield Figure("value", f"Q-head / plain, cost of a token, batch {rows}", ratios(guided, plain), at_most=1.1)


def imports(bench: Bench) -> Iterator[Figure]:
    """CPU time of a process that imports steer, over one that imports torch."""
    lines = ("import steer", "import torch", "from steer import SteeringVector, load")
    tasks = [lambda line=line: subprocess.run([sys.executable, "-c", line], check=True) for line in lines]
    for task in tasks:
        task()
    ours, theirs, used = alternate(tasks, 2 * bench.repeats, _children)
    yield Figure("import", "import steer / import torch", ratios(ours, theirs), at_most=1.2)
    yield Figure("import", "the same with SteeringVector and load", ratios(used, theirs))


def _children(task: Task) -> float:
    """CPU time of the processes that a task starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    task()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

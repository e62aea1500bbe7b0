"""Mistakes planted one at a time in a copy of the tree: of devices, which the shadow device must find, and of laws, for
the oracles of random configurations.

Run with `python tests/mutate.py [WORD]`; a word takes the mutations whose names have it. A mutation whose text is not
found exactly once, tests that fail without any, and mutations that no test finds end with status 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("adapters", "recipes")
"""Folders that are installed under steer/."""


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in the one file that has it; `tests` says which tests of `file` are to fail, as pytest's -k
    does.
    """

    name: str
    old: str
    new: str
    tests: str
    file: str = "tests/test_shadow.py"


def law(name: str, old: str, new: str, tests: str, file: str = "tests/test_oracle_laws.py") -> Mutation:
    return Mutation(name, old, new, tests, file)


MUTATIONS = [
    Mutation(
        "random numbers of a draw stay on the CPU",
        'at = at.to(cdf.device, cdf.dtype, non_blocking=cdf.device.type != "mps")',
        "at = at.to(cdf.dtype)",
        "test_decoding and temperature",
    ),
    Mutation(
        "a draw waits for its random numbers",
        'at = at.to(cdf.device, cdf.dtype, non_blocking=cdf.device.type != "mps")',
        "at = at.to(cdf)",
        "test_waits_of_a_token and top-k",
    ),
    Mutation(
        "a generator of the CPU for numbers on the device",
        "uniform = torch.rand(shape, dtype=kind, generator=generator, device=generator.device)",
        "uniform = torch.rand(shape, dtype=kind, generator=generator, device=log_law.device)",
        "test_decoding and temperature",
    ),
    Mutation(
        "a mask of the rows that an edit is for is made on the CPU",
        "touched = base, torch.zeros(len(state), 1, dtype=torch.bool, device=base.device)",
        "touched = base, torch.zeros(len(state), 1, dtype=torch.bool)",
        "test_edits and (Q or one)",
    ),
    Mutation(
        "room for tokens is made on the CPU",
        "real=torch.zeros(rows, columns, dtype=torch.bool, device=device),",
        "real=torch.zeros(rows, columns, dtype=torch.bool),",
        "test_decoding and greedy",
    ),
    Mutation(
        "added vectors stay on the CPU",
        "constant, placed = constant.to(hidden), True",
        "constant, placed = constant.to(hidden.dtype), True",
        "test_edits and vector",
    ),
    Mutation(
        "operators go to the device with every token",
        "operator, weight = _moved(operator, placed), weight.to(placed)",
        "weight = weight.to(placed)",
        "test_waits_of_a_token and ablate",
    ),
    Mutation(
        "candidates are numbered on the CPU",
        "candidates = torch.arange(vocabulary, device=x.device).expand(len(x), -1)",
        "candidates = torch.arange(vocabulary).expand(len(x), -1)",
        "test_edits and all",
    ),
    Mutation(
        "embeddings stay where the output head is",
        "self.embeddings[candidates.to(self.embeddings.device)].to(hidden.device), left)",
        "self.embeddings[candidates.to(self.embeddings.device)], left)",
        "test_blocks_on_two_devices",
    ),
    Mutation(
        "hidden states stay where the last block is",
        "seen[0].to(logits.device) if seen else None",
        "seen[0] if seen else None",
        "test_blocks_on_two_devices",
    ),
    Mutation(
        "the place of an offloaded model is that of its weights",
        "next((torch.device(p) for p in places if p is not None), embedding.weight.device)",
        "embedding.weight.device",
        "test_offloaded_weights and cpu",
    ),
    Mutation(
        "a loaded value head stays on the CPU",
        "head = _filled(lambda: made(info.width, hidden, horizon), tensors).to(model.device)",
        "head = _filled(lambda: made(info.width, hidden, horizon), tensors)",
        "test_values_are_trained",
    ),
    Mutation(
        "a trained push stays on the CPU",
        "(amount[:, layer, None, None] * push).to(h.device, h.dtype)",
        "(amount[:, layer, None, None] * push)",
        "test_controllers_are_trained",
    ),
    Mutation(
        "a classifier that comes with a model stays on the CPU",
        "Classifier(load_net(folder / kind), classes).eval().to(source.device)",
        "Classifier(load_net(folder / kind), classes).eval()",
        "test_the_fashion_model and plain and fk",
    ),
    Mutation(
        "a reward model's batch stays on the CPU",
        "return model(**{key: x.to(device) for key, x in batch.items()}).logits.double().cpu()",
        "return model(**batch).logits.double().cpu()",
        "test_reward_models",
    ),
    Mutation(
        "a reward model's scores are added up on the device",
        "return model(**{key: x.to(device) for key, x in batch.items()}).logits.double().cpu()",
        "return model(**{key: x.to(device) for key, x in batch.items()}).logits.double()",
        "test_reward_models",
    ),
    Mutation(
        "noise of a step stays on the CPU",
        "    return (z if shared is None else z[shared.held]).to(like.device)",
        "    return z if shared is None else z[shared.held]",
        "test_the_fashion_model and fk",
    ),
    Mutation(
        "masked positions are made on the CPU",
        "tokens = torch.full((rows, self.length), self.network.mask_id, device=self.network.device)",
        "tokens = torch.full((rows, self.length), self.network.mask_id)",
        "test_masked_models and ancestral",
    ),
    Mutation(
        "scores are rounded to half precision",
        "torch.as_tensor(self.score(samples)).detach().cpu().double()",
        "torch.as_tensor(self.score(samples)).detach().cpu().half().double()",
        "test_rewards_beyond_half_precision and best",
    ),
    Mutation(
        "a batch of a server is put together on the CPU",
        "law = law.index_copy(0, at, torch.log_softmax(changed, -1))",
        "law = law.index_copy(0, at.cpu(), torch.log_softmax(changed, -1))",
        "test_rows_that_come_and_go",
    ),
    law(
        "the token that reaches a mass is cut off",
        "inside = mass.cumsum(-1) - mass < top_p",
        "inside = mass.cumsum(-1) < top_p",
        "cuts",
    ),
    law(
        "two particles swap chances when one is rounded",
        "up, down = min(1 - a, b), min(a, 1 - b)",
        "down, up = min(1 - a, b), min(a, 1 - b)",
        "resampling",
    ),
    law(
        "a tie is broken by order",
        "g = _tied_mean(ordered, gold.gather(-1, order))",
        "g = gold.gather(-1, order)",
        "curves",
    ),
    law(
        "the law of best-of-n counts a candidate less below",
        "(upto**n - below**n)[which]",
        "(upto**n - below ** (n - 1))[which]",
        "best",
    ),
    law(
        "values are not centred",
        "push = (q - q.mean(-1, keepdim=True))",
        "push = q",
        "guidance",
    ),
    law(
        "candidates are chosen at beta 1",
        'best = resample(value / run.beta, run.generator, "multinomial", 1).squeeze(1)',
        'best = resample(value, run.generator, "multinomial", 1).squeeze(1)',
        "candidates",
    ),
    law(
        "a divergence the other way round",
        "after = state.add(drawn, base.gather(1, token).squeeze(1), aim, divergence(law, base))",
        "after = state.add(drawn, base.gather(1, token).squeeze(1), aim, divergence(base, law))",
        "uneven",
    ),
    law(
        "a proposal is weighed again at every step",
        "step, self.ratio = step + gained(ratio, self.ratio), ratio",
        "step = step + gained(ratio, self.ratio)",
        "uneven",
    ),
    law(
        "the last factor does not take back those before",
        "return (self.carried if running else rho) - self.total",
        "return self.carried if running else rho",
        "spread",
    ),
    law(
        "equal children count once",
        "self.value[node] = self.beta * (top + spread - np.log(self.draws[node]))",
        "self.value[node] = self.beta * (top + spread - np.log(len(at)))",
        "trees and not tilted",
    ),
    law(
        "rollouts to one leaf count once",
        "return leaf, mass - np.log(max(1, len(paths))) + tree.value[leaf] / self.beta",
        "return leaf, mass - np.log(max(1, len(leaf))) + tree.value[leaf] / self.beta",
        "trees and not tilted",
    ),
    law(
        "positions that were not revealed diverge",
        'share = gap / left if order == "random"',
        'share = gap if order == "random"',
        "masked",
    ),
    law(
        "processors see the padding of short prompts",
        "apart = waits or (ordered and len({len(row) for row in ids}) > 1)",
        "apart = False",
        "alone",
        "tests/test_text_laws.py",
    ),
    law(
        "a product of Gaussians without its normaliser",
        "0.5 * w * (1 - w) * tuned.square().sum(1)",
        "0.5 * w * tuned.square().sum(1)",
        "evidence",
        "tests/test_step_laws.py",
    ),
    law(
        "a mean's distance is that of rounded means",
        "gap = schedule.gap(state.moved, state.x0, step)",
        "gap = (mean - schedule.mean(state.x, state.x0, step)).double().flatten(1)",
        "evidence",
        "tests/test_step_laws.py",
    ),
]


def copied(to: Path) -> Path:
    """The tree as it is installed, with its tests."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "steer", to / "steer", ignore=skip)
    for name in MAPPED:
        shutil.copytree(ROOT / name, to / "steer" / name, ignore=skip)
    shutil.copytree(ROOT / "tests", to / "tests", ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


@cache
def _texts(tree: Path) -> dict[Path, str]:
    folders = [tree / name for name in ("steer", *MAPPED)]
    return {p: p.read_text(encoding="utf-8") for folder in folders for p in sorted(folder.rglob("*.py"))}


def place(tree: Path, mutation: Mutation) -> Path:
    """The one file that has the mutation's text, of a copy or of the checkout. Raises `LookupError`."""
    texts = _texts(tree)
    found = [p for p, text in texts.items() if mutation.old in text]
    if len(found) != 1 or texts[found[0]].count(mutation.old) != 1:
        raise LookupError(f"{mutation.name}: its text is in {[str(p.relative_to(tree)) for p in found] or 'no file'}")
    return found[0]


def status(tree: Path, tests: str, file: str) -> int:
    """Exit status of the chosen tests of one file on this tree: 0 passed, 1 failed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        file,
        "-k",
        tests,
    ]
    place = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=place, capture_output=True, text=True)
    if done.returncode > 1:
        raise RuntimeError(f"tests {tests!r} could not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode


def main(word: str = "") -> int:
    chosen = [m for m in MUTATIONS if word in m.name]
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        try:
            files = [place(tree, mutation) for mutation in chosen]
        except LookupError as error:
            print(error)
            return 1
        for name in sorted({m.file for m in chosen}):
            if status(tree, " or ".join(sorted({f"({m.tests})" for m in chosen if m.file == name})), name):
                print(f"{name} fails without a mutation")
                return 1
        missed = 0
        for mutation, file in zip(chosen, files, strict=True):
            began, text = time.monotonic(), file.read_text(encoding="utf-8")
            file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            found = status(tree, mutation.tests, mutation.file) == 1
            file.write_text(text, encoding="utf-8")
            missed += not found
            print(f"{'found ' if found else 'MISSED'} {mutation.name} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mutations found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))

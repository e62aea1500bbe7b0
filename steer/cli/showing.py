"""Results of `steer generate` for people and as JSON: samples with their rewards and weights, and pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.cli import checks
from steer.cli.options import GenerateOptions, SampleOptions
from steer.cli.session import Session
from steer.core import Samples, check
from steer.critique.rounds import Round, rounds_of
from steer.files import as_json, write_text
from steer.measure.friction import friction_table
from steer.methods.samplers import SAMPLERS
from steer.model import Plan
from steer.pictures.style import image_format

__all__ = ["Pictures", "by_weight", "is_weighted", "show_samples", "summary"]


_COLUMNS, _ROWS = 8, 8
"""Largest numbers of times and of images in the picture of previews."""


def show_samples(
    samples: Samples,
    options: SampleOptions,
    seed: int,
    session: Session,
    pictures: Pictures | None = None,
    streamed: bool = False,
) -> None:
    """Print samples and write the files that were asked for."""
    samples = by_weight(samples)
    found = {"model": options.model, **samples.to_dict(), "seed": seed}
    rounds = [entry for entry in samples.trace or () if isinstance(entry, Round)]
    if rounds:
        found["rounds"] = [r.told() for r in rounds_of(rounds)]
    if pictures is not None:
        found["files"] = pictures.write(samples)
    if options.out is not None:
        write_text(options.out, as_json(found) + "\n")
    if options.json:
        session.say(as_json(found))
        return
    weights = samples.weights.tolist() if is_weighted(samples) else None
    hidden = () if _known_kl(samples) else ("kl",)
    i = 0
    for entry in found["prompts"]:
        if not streamed:
            session.say(f"> {_shown(entry['prompt'])}")
        for number, sample in enumerate(entry["samples"], 1):
            facts = [] if weights is None else [f"weight {weights[i]:.3f}"]
            facts += [f"{k} {sample[k]:.3f}" for k in ("reward", "kl") if sample[k] is not None and k not in hidden]
            facts += [f"{name} {sum(row) / len(row):.3f}" for name, row in sample.get("readings", {}).items() if row]
            if rounds and samples.lineage is not None and int(samples.lineage[i]) < 0:
                facts.append("nothing was accepted: abstained")
            shown = f"[{', '.join(facts)}]" if facts else ""
            text = "" if streamed else sample["text"]
            session.say(f"{text}\n  {shown}\n" if pictures is None else f"  {number} {shown}".rstrip())
            i += 1
    if len(samples) > 1 or pictures is not None:
        session.say(summary(samples))
    if rounds:
        session.say(friction_table(rounds))
    for what, path in (found["files"] if pictures is not None else {}).items():
        session.say(f"wrote {path} ({what})" if what != "png" else f"wrote {path}")


def _shown(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt or "(any)"
    return "\n> ".join(f"{m['role']}: {m['content']}" for m in prompt)


def _known_kl(samples: Samples) -> bool:
    """Whether the KL is a number: an edit of a step without noise, such as a diffusion model's last, makes it infinite
    and so of no use.
    """
    return samples.kl is not None and bool(samples.kl.isfinite().all())


def is_weighted(samples: Samples) -> bool:
    """Whether the samples are a population with weights of their own, in place of draws."""
    return bool((samples.log_weight != 0).any())


def by_weight(samples: Samples) -> Samples:
    """A weighted population with the heaviest first for each prompt; anything else as it is."""
    if not is_weighted(samples):
        return samples
    group, weight = samples.group.tolist(), samples.log_weight.tolist()
    return samples.select(torch.tensor(sorted(range(len(samples)), key=lambda i: (group[i], -weight[i]))))


def summary(samples: Samples) -> str:
    """Means over all samples, with a normal 95% interval of the reward, and what they cost."""
    parts = []
    if samples.reward is not None:
        mean, half = _mean_reward(samples)
        parts.append(f"mean reward {mean:.3f}" + (f" +- {half:.3f}" if len(samples) > 1 else ""))
    if samples.kl is not None and _known_kl(samples):
        parts.append(f"mean kl {float(samples.kl.mean()):.3f}")
    population = samples.pool or samples
    if is_weighted(population):
        size = len(population) / len(population.prompts)
        parts.append(f"ESS {float(population.ess.mean()):.1f} of {size:g}")
    if samples.log_z is not None:
        parts.append(f"log Z {float(samples.log_z.mean()):.3f}")
    cost = samples.cost
    tokens = [f"{cost.generated_tokens} tokens"] if cost.generated_tokens else []
    parts += [*tokens, f"{cost.nfe} nfe", f"{cost.model_calls} model calls", f"{cost.seconds:.1f} s"]
    return f"{len(samples)} sample{'s' * (len(samples) > 1)}: {', '.join(parts)}"


def _mean_reward(samples: Samples) -> tuple[float, float]:
    """Mean and half of its interval; for weights that of a self-normalised mean, as if particles were independent."""
    assert samples.reward is not None
    reward = samples.reward.double()
    if not is_weighted(samples):
        return float(reward.mean()), 1.96 * float(reward.std()) / len(samples) ** 0.5 if len(samples) > 1 else 0.0
    means, weights = samples.mean_reward(), samples.weights
    error = torch.where(weights > 0, weights * (reward - means[samples.group]), 0.0)
    return float(means.mean()), 1.96 * float(error.square().sum().sqrt()) / len(means)


# ---------------------------------------------------------------------------------------------------------- pictures


@dataclass
class Pictures:
    """The pictures that were asked for, by their option's name, and the previews that one of them needs."""

    files: dict[str, Path]
    captioned: bool
    """Whether the grid says which prompt an image is for."""
    previews: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, options: GenerateOptions, prompts: int) -> Pictures:
        """Check what can be drawn with this sampler."""
        files = {"png": options.png or Path("steer.png")}
        for name in ("lineage", "tree", "previews"):
            path = getattr(options, name)
            if path is None:
                continue
            samplers = [known for known, kind in SAMPLERS.items() if name in kind.shows]
            check(options.sampler in samplers, name, str(path), f"unset, or --sampler {' or '.join(samplers)}")
            check(prompts == 1 or name == "previews", name, str(path), f"one prompt ({prompts} are given)")
            files[name] = path
        for name, path in files.items():
            checks.check_output(path, name, suffixes=(".png",) if name == "png" else ())
            image_format(path, name)
        written = [*files.values(), *([options.out] if options.out else [])]
        apart = len({path.absolute() for path in written}) == len(written)
        check(apart, "png", [str(path) for path in written], "files that differ")
        return cls(files, prompts > 1)

    def watch(self, plan: Plan) -> Callable[[int, Any], None] | None:
        """What looks at every step of a run."""
        if "previews" not in self.files:
            return None
        process: Any = plan.process
        count = process.num_steps
        wanted = {round(count * (i + 1) / _COLUMNS) for i in range(_COLUMNS)} - {0}

        def look(first: int, state: Any) -> None:
            if first == 0 and state.step in wanted:
                rows = process.gather(state, torch.arange(min(_ROWS, len(state))))
                self.previews.append(process.preview(rows).outputs)
                self.steps.append(state.step)

        return look

    def write(self, samples: Samples) -> dict[str, str]:
        """Draw them; the files that were written, by name."""
        for name in list(self.files):
            if not getattr(self, f"_draw_{name}")(self.files[name], samples):
                del self.files[name]
        return {name: str(path) for name, path in self.files.items()}

    def _draw_png(self, path: Path, samples: Samples) -> bool:
        from steer.images import save_png

        sizes = torch.bincount(samples.group, minlength=len(samples.prompts))
        even = self.captioned and len(sizes.unique()) == 1 and int(sizes[0]) > 1
        save_png(path, samples.outputs, int(sizes[0]) if even else None, self._captions(samples))
        return True

    def _captions(self, samples: Samples) -> list[str] | None:
        weights = samples.weights.tolist() if is_weighted(samples) else None
        captions = []
        for i, group in enumerate(samples.group.tolist()):
            parts = [str(samples.prompts[group])] if self.captioned else []
            parts += [] if samples.reward is None else [f"{round(float(samples.reward[i]), 2) + 0.0:.2f}"]
            parts += [] if weights is None else [f"w={weights[i]:.2f}"]
            captions.append(" ".join(parts))
        return captions if any(captions) else None

    def _draw_lineage(self, path: Path, samples: Samples) -> bool:
        from steer.pictures.lineage import draw_lineage

        trace = (samples.trace if samples.pool is None else samples.pool.trace) or []
        moves = [entry for entry in trace[:-1] if bool(entry.resampled.any())]
        if not moves:
            print(
                f"{path}: not drawn, for no particle was resampled; --set ess_threshold=none resamples at every step",
                file=sys.stderr,
            )
            return False
        columns = [*moves, trace[-1]]
        draw_lineage(
            path,
            [entry.ancestors for entry in moves],
            [entry.outputs for entry in columns],
            [entry.value for entry in columns],
            [entry.step for entry in columns],
        )
        return True

    def _draw_tree(self, path: Path, samples: Samples) -> bool:
        from steer.pictures.tree import draw_tree

        assert samples.trace is not None
        forest = samples.trace[0]
        arrays = forest.trees[0].arrays()
        level = np.asarray(forest.steps)[arrays["level"]]
        leaves = forest.samples(None)
        images = {int(node): leaves.outputs[i] for i, node in enumerate(leaves.lineage.tolist())}
        draw_tree(path, arrays["parent"], level, arrays["value"], arrays["visits"], images)
        return True

    def _draw_previews(self, path: Path, samples: Samples) -> bool:
        from steer.pictures.lineage import draw_previews

        draw_previews(path, self.previews, self.steps)
        return True

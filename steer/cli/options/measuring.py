"""Options of the commands that measure an edit, a sampler or a policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from steer.cli.options.shared import PROMPTS, REWARD, Format, ModelOptions

__all__ = ["DistanceOptions", "EvalOptions", "FrontierOptions", "GuidanceOptions", "SearchOptions", "StrengthOptions"]


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ModelOptions):
    """What all measurements share: a folder for the page, the numbers as JSON and CSV, the pictures and the recipe."""

    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for page.html, JSON, CSV, pictures, recipe.yaml.")]
    format: Format = "png"


@dataclass(frozen=True, kw_only=True)
class StrengthOptions(EvalOptions):
    """Sweep an edit's strength: reward, drift, fluency and diversity, and where it breaks."""

    edit: Annotated[str, typer.Option(metavar="FILE[:KEY=VALUE]", help="The artifact to evaluate.")]
    prompts: Annotated[Path, PROMPTS]
    strengths: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Default: by kind of edit; 0 is always in.")
    ] = None
    reward: Annotated[str, REWARD] = "sentiment"
    beta: Annotated[float, typer.Option(help="KL coefficient, for value heads.")] = 1.0
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message to compare with.")] = None
    control: Annotated[bool, typer.Option(help="Also sweep a random direction of the same norm (vectors).")] = True
    keep: Annotated[
        bool, typer.Option("--keep", help="Also write the sweep into the artifact's card, for the zones of the demo.")
    ] = False
    n: Annotated[int, typer.Option("--n", "-n", help="Outputs for each prompt.")] = 1
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0
    max_new_tokens: Annotated[int, typer.Option(help="The longest output.")] = 48


@dataclass(frozen=True, kw_only=True)
class DistanceOptions(EvalOptions):
    """Compare samplers at equal cost: how close each comes to p exp(reward / beta), by a judge that none sees."""

    task: Annotated[list[str], typer.Option(metavar="NAME=REWARD[@BETA]", help="What is wanted; repeatable.")]
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the base law is asked for.")] = ""
    method: Annotated[list[str], typer.Option(metavar="NAME", help="Default: all; repeatable.")] = field(
        default_factory=list
    )
    outputs: Annotated[int, typer.Option(help="Outputs of each method.")] = 100
    particles: Annotated[int, typer.Option(help="Chains for each output.")] = 4
    steps: Annotated[int, typer.Option(help="Network evaluations in a chain.")] = 25
    seeds: Annotated[int, typer.Option(help="Repetitions, from which intervals come.")] = 3
    pool: Annotated[int, typer.Option(help="Base samples that stand for the target once they are weighted.")] = 6144
    budgets: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Also draw distance against these sizes of tree.")
    ] = None
    curve: Annotated[list[str], typer.Option(metavar="TASK", help="Whose curves; default: all; repeatable.")] = field(
        default_factory=list
    )


@dataclass(frozen=True, kw_only=True)
class SearchOptions(EvalOptions):
    """Race searches: the reward of the best output for a budget of network evaluations."""

    reward: Annotated[str, REWARD]
    budgets: Annotated[str, typer.Option(metavar="A,B,...", help="Network evaluations (tokens) for each prompt.")]
    prompts: Annotated[Path | None, PROMPTS] = None
    method: Annotated[
        list[str], typer.Option(metavar="NAME", help="best-of-n, fk, dts-star, svdd, vas, vas+fk; repeatable.")
    ] = field(default_factory=lambda: ["best-of-n", "fk", "dts-star"])
    edit: Annotated[
        list[str],
        typer.Option(metavar="EDIT", help="FILE[:STRENGTH][:KEY=VALUE], what guided methods mount; repeatable."),
    ] = field(default_factory=list)
    set: Annotated[
        list[str], typer.Option("--set", metavar="METHOD.KEY=VALUE", help="A setting of one method; repeatable.")
    ] = field(default_factory=list)
    beta: Annotated[float, typer.Option(help="KL coefficient of FK and of guidance.")] = 0.1
    seeds: Annotated[int, typer.Option(help="Repetitions, from which intervals come.")] = 3
    steps: Annotated[int, typer.Option(help="Denoising steps (diffusion models, masked language models).")] = 25
    max_new_tokens: Annotated[int, typer.Option(help="The longest output (language models).")] = 48
    block: Annotated[int, typer.Option(help="Tokens in a step (language models).")] = 6
    reach: Annotated[
        int | None, typer.Option(metavar="N", help="Best-of-n goes on to N evaluations, to say how many more it needs.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class FrontierOptions(EvalOptions):
    """Compare methods by reward against KL to the base model, each at several strengths, on the same prompts."""

    prompts: Annotated[Path, PROMPTS]
    reward: Annotated[str, REWARD]
    method: Annotated[list[str], typer.Option(metavar="NAME", help="best-of-n, fk, svdd or dts-star; repeatable.")] = (
        field(default_factory=lambda: ["best-of-n", "fk"])
    )
    edit: Annotated[
        list[str], typer.Option(metavar="FILE[:KEY=VALUE]", help="An edit, swept over --strengths; repeatable.")
    ] = field(default_factory=list)
    strengths: Annotated[str, typer.Option(metavar="A,B,...", help="Of every --edit.")] = "0.05,0.1,0.15,0.2"
    guided: Annotated[
        list[str], typer.Option(metavar="FILE[:KEY=VALUE]", help="A value head, at each of --betas; repeatable.")
    ] = field(default_factory=list)
    betas: Annotated[str, typer.Option(metavar="A,B,...", help="KL coefficients of every --guided.")] = "1,0.25,0.0625"
    system: Annotated[
        list[str], typer.Option(metavar="TEXT", help="A system prompt that asks for the same; repeatable.")
    ] = field(default_factory=list)
    tuned: Annotated[
        list[Path], typer.Option(metavar="DIR", help="A policy from `steer train policy`, at each of --w; repeatable.")
    ] = field(default_factory=list)
    w: Annotated[str, typer.Option("--w", metavar="A,B,...", help="RL guidance towards --tuned; 1 is the policy.")] = (
        "1"
    )
    n: Annotated[int, typer.Option("--n", "-n", help="Texts of the base model and of edits, for each prompt.")] = 8
    candidates: Annotated[
        int | None, typer.Option(metavar="N", help="Every setting draws N texts for each prompt: equal compute.")
    ] = None
    also: Annotated[
        list[str], typer.Option(metavar="REWARD", help="A reward to measure that no method aims at; repeatable.")
    ] = field(default_factory=list)
    at_kl: Annotated[str, typer.Option(metavar="A,B,...", help="Compare methods at these drifts, in nats.")] = "0.5,2"
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0
    max_new_tokens: Annotated[int, typer.Option(help="The longest output.")] = 48
    temperature: Annotated[float, typer.Option(help="Above 0.")] = 1.0


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions(EvalOptions):
    """Sweep RL guidance from the base (w = 0) to its tuned policy (1) and beyond, plain and corrected."""

    tuned: Annotated[Path, typer.Option(metavar="DIR", help="A policy from `steer train policy`.")]
    reward: Annotated[str, REWARD]
    prompts: Annotated[Path | None, PROMPTS] = None
    w: Annotated[str, typer.Option("--w", metavar="A,B,...", help="Numbers.")] = "0,0.5,1,1.5,2,3"
    outputs: Annotated[int, typer.Option(help="For each prompt and seed.")] = 64
    particles: Annotated[int, typer.Option(help="Of corrected guidance, for each output.")] = 4
    seeds: Annotated[int, typer.Option(help="Repetitions, from which intervals come.")] = 3
    steps: Annotated[int, typer.Option(help="Denoising steps (diffusion models, masked language models).")] = 25
    max_new_tokens: Annotated[int, typer.Option(help="The longest output (language models).")] = 32

"""Options of the commands that judge texts and answers: goals, concepts, reliability, pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from steer.cli.options.measuring import EvalOptions
from steer.cli.options.shared import PROMPTS

__all__ = ["ConceptOptions", "GoalsOptions", "PairsOptions", "ReliabilityOptions"]


@dataclass(frozen=True, kw_only=True)
class GoalsOptions(EvalOptions):
    """Ask for texts at goals in a space of measures: error, miscalibration, side effects, and what the texts cover."""

    texts: Annotated[Path, typer.Option(metavar="FILE", help="At least 20 seed texts: the scale, and the sources.")]
    dimension: Annotated[
        list[str],
        typer.Option(metavar="NAME[=REWARD]", help="A measure of a text; default: four that are shipped; repeatable."),
    ] = field(default_factory=list)
    edit: Annotated[list[str], typer.Option(metavar="NAME=FILE", help="A vector for a dimension; repeatable.")] = field(
        default_factory=list
    )
    sources: Annotated[int, typer.Option(help="Texts to be moved.")] = 16
    goals: Annotated[int, typer.Option(help="Goals of each; slopes of edits take the place of the first half.")] = 8
    active: Annotated[int, typer.Option(help="Dimensions that a goal moves.")] = 3
    best_of: Annotated[int, typer.Option(help="Rewrites among which the nearest to the goal is taken.")] = 8
    binned: Annotated[bool, typer.Option("--binned", help="Measure in the seven bins of the published evaluator.")] = (
        False
    )
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0
    max_new_tokens: Annotated[int, typer.Option(help="The longest output.")] = 96


@dataclass(frozen=True, kw_only=True)
class ConceptOptions(EvalOptions):
    """Judge concept steering as AxBench does: concept, instruction and fluency, factors chosen on another half."""

    concepts: Annotated[
        Path, typer.Option(metavar="FILE", help='Rows {"concept": text, "words": [...], "edit": FILE, "system"?}.')
    ]
    prompts: Annotated[Path, PROMPTS]
    judge: Annotated[
        str, typer.Option(metavar="JUDGE", help="rules; model:MODEL (openai:... too); or a reward for the concept.")
    ] = "rules"
    factors: Annotated[str, typer.Option(metavar="A,B,...", help="Times --scale: the strengths of every vector.")] = (
        "0.2,0.4,0.6,0.8,1,1.2,1.4,1.6,1.8,2,2.5,3,4,5"
    )
    scale: Annotated[float, typer.Option(help="Strength at factor 1.")] = 0.1
    split: Annotated[bool, typer.Option("--split/--no-split", help="Choose factors on one half of the prompts.")] = True
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0
    max_new_tokens: Annotated[int, typer.Option(help="The longest output.")] = 128


@dataclass(frozen=True, kw_only=True)
class ReliabilityOptions(EvalOptions):
    """Score answers under an edit: slope by prompt, prompts steered the wrong way, effectiveness, entanglement."""

    edit: Annotated[str, typer.Option(metavar="FILE[:KEY=VALUE]", help="The artifact to evaluate.")]
    choices: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]FILE", help='Target: rows {"prompt", "wanted", "other"}; repeatable.'),
    ]
    side: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]FILE", help="The same, of what should stay as it is; repeatable."),
    ] = field(default_factory=list)
    strengths: Annotated[str, typer.Option(metavar="A,B,...", help="0 is always in.")] = "-0.1,-0.05,0.05,0.1"


@dataclass(frozen=True, kw_only=True)
class PairsOptions(EvalOptions):
    """Rank preference pairs by rewards, the model, edits and policies, and by what a perfect DPO could reach."""

    pairs: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help='Rows {"prompt", "chosen", "rejected"}, "agreement" if known.')
    ]
    reward: Annotated[list[str], typer.Option(metavar="REWARD", help="A reward that ranks; repeatable.")] = field(
        default_factory=list
    )
    edit: Annotated[
        list[str],
        typer.Option(metavar="EDIT", help="FILE[:STRENGTH][:KEY=VALUE], under which the model ranks; repeatable."),
    ] = field(default_factory=list)
    tuned: Annotated[
        list[Path], typer.Option(metavar="DIR", help="A policy from `steer train policy`; repeatable.")
    ] = field(default_factory=list)
    beta: Annotated[float, typer.Option(help="Of DPO, for the idealised accuracy.")] = 0.1

"""What every command can be told: one declaration, read by the command line and by recipes alike.

A field is an option; its annotation carries type and help. Nothing heavy is imported here, so that help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "COMMANDS",
    "EvalOptions",
    "GenerateOptions",
    "ModelOptions",
    "TrainControllerOptions",
    "TrainOptions",
    "TrainValueOptions",
    "TrainVectorOptions",
]

_Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="A further setting; repeatable.")]
_Reward = typer.Option(metavar="REWARD", help="For example 'sentiment - 0.3*profanity', module:function or org/name.")
_Prompts = typer.Option(metavar="FILE.json", help="A JSON list of prompts, each a text or a list of messages.")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: Annotated[
        str, typer.Option(metavar="MODEL", help="An embedded model, a Hugging Face id, a folder or a GGUF file.")
    ]
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str | None, typer.Option(help="For example cuda:0; default: the CPU.")] = None


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """Generate text, under edits, with a sampler and a reward."""

    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="One prompt.")] = None
    prompts: Annotated[Path | None, _Prompts] = None
    edit: Annotated[
        list[str],
        typer.Option(metavar="FILE[:STRENGTH][:KEY=VALUE]", help="A vector, controller or value head; repeatable."),
    ] = field(default_factory=list)
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without the chat template.")] = (
        False
    )
    sampler: Annotated[str, typer.Option(metavar="NAME", help="How to draw: ancestral, best-of-n, ...")] = "ancestral"
    set: _Settings = field(default_factory=list)
    reward: Annotated[str | None, _Reward] = None
    beta: Annotated[float, typer.Option(help="KL coefficient of the target p exp(reward / beta).")] = 1.0
    n: Annotated[int | None, typer.Option("--n", "-n", help="Outputs, candidates or particles for each prompt.")] = None
    seed: Annotated[int | None, typer.Option(help="Same seed, same result; default: a new one, which is reported.")] = (
        None
    )
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0
    top_k: Annotated[int, typer.Option(help="Keep the K likeliest tokens; 0 is off.")] = 0
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this mass; 1 is off.")] = 1.0
    repetition_penalty: Annotated[float, typer.Option(help="Divides the logits of tokens already there; 1 is off.")] = (
        1.0
    )
    max_new_tokens: Annotated[int, typer.Option(help="The longest output.")] = 64
    max_rows: Annotated[int, typer.Option(help="Rows generated at once.")] = 64
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come (one prompt, one output).")] = (
        False
    )
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Also write the JSON here.")] = None
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of text.")] = False


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ModelOptions):
    """What all kinds of training share."""

    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Where the result goes.")]
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0
    set: _Settings = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TrainVectorOptions(TrainOptions):
    """Fit a steering vector to pairs of texts."""

    pairs: Annotated[
        Path,
        typer.Option(metavar="FILE.jsonl", help='Rows {"positive": text, "negative": text}, "prompt" if there is one.'),
    ]
    method: Annotated[str, typer.Option(help="mean, pca or probe.")] = "mean"


@dataclass(frozen=True, kw_only=True)
class TrainControllerOptions(TrainOptions):
    """Train a controller, which decides for each prompt how much to steer."""

    positive: Annotated[Path, typer.Option(metavar="FILE.json", help="Prompts to be steered.")]
    negative: Annotated[Path, typer.Option(metavar="FILE.json", help="Prompts to be left alone.")]
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep OUT.work, from which training resumes.")] = False


@dataclass(frozen=True, kw_only=True)
class TrainValueOptions(TrainOptions):
    """Train a value head, which guides generation towards a reward."""

    prompts: Annotated[Path, _Prompts]
    reward: Annotated[str, _Reward]
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep OUT.work, from which training resumes.")] = False


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ModelOptions):
    """Sweep an edit's strength: reward, drift, fluency and diversity, and where it breaks."""

    edit: Annotated[str, typer.Option(metavar="FILE[:KEY=VALUE]", help="The artifact to evaluate.")]
    prompts: Annotated[Path, _Prompts]
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for report.json and report.png.")]
    strengths: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Default: by kind of edit; 0 is always in.")
    ] = None
    reward: Annotated[str, _Reward] = "sentiment"
    beta: Annotated[float, typer.Option(help="KL coefficient, for value heads.")] = 1.0
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message to compare with.")] = None
    control: Annotated[bool, typer.Option(help="Also sweep a random direction of the same norm (vectors).")] = True
    n: Annotated[int, typer.Option("--n", "-n", help="Outputs for each prompt.")] = 1
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0
    max_new_tokens: Annotated[int, typer.Option(help="The longest output.")] = 48


COMMANDS: dict[str, type[ModelOptions]] = {
    "generate": GenerateOptions,
    "train vector": TrainVectorOptions,
    "train controller": TrainControllerOptions,
    "train value": TrainValueOptions,
    "eval": EvalOptions,
}
"""Commands that a recipe can hold."""

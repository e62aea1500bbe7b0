"""Options that many commands have: those of every command, the model's, and annotations that several fields share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

__all__ = ["Format", "LOG", "ModelOptions", "OVERWRITE", "Options", "PROMPTS", "REWARD", "Settings"]

Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="A further setting, see steer help; repeatable."),
]
REWARD = typer.Option(metavar="REWARD", help="For example 'sentiment - 0.3*profanity', module:function or org/name.")
PROMPTS = typer.Option(
    metavar="FILE",
    help="Prompts, each a text or a list of messages: JSON lines, a JSON list, CSV, parquet; - is stdin.",
)
Format = Annotated[str, typer.Option("--format", metavar="png,svg,pdf", help="Formats of the picture.")]
LOG = typer.Option(
    "--log",
    "--report-to",
    metavar="FILE.jsonl or TRACKER",
    help="Where the figures of every step go: a file, tensorboard, wandb, trackio or mlflow; repeatable.",
)
OVERWRITE = typer.Option("--overwrite", help="Begin anew in place of what is there.")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command can be told. The field `class_` is the option `class`, a word that Python keeps for itself."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which model, and how it is loaded."""

    model: Annotated[
        str, typer.Option(metavar="MODEL", help="An embedded model, a Hugging Face id, a folder or a GGUF file.")
    ]
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str | None, typer.Option(help="For example cuda:0; default: the CPU.")] = None
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Try a language model against the library when it is loaded.")
    ] = True

"""Options of `batch`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from steer.cli.options.shared import OVERWRITE, REWARD, ModelOptions, Settings
from steer.methods.samplers import SAMPLERS

__all__ = ["BatchOptions"]


@dataclass(frozen=True, kw_only=True)
class BatchOptions(ModelOptions):
    """Answer a file of rows, one record each, whatever the engine and the sampler; what is done is never done again.

    A row is a line of JSON with prompt or messages, or a row of CSV or Parquet, with an id and with fields of a
    request (temperature, max_tokens, n, seed, steer) where it differs; or a line of OpenAI's batch format. A row that
    fails, cannot be read or is longer than 4 MiB has a record with its error. Two rows with one id, and columns that no
    request has, are refused at the start. On a full disk the job ends, and what was written stays.
    """

    source: Annotated[
        str, typer.Argument(metavar="IN", help="Rows: .jsonl, .csv (or packed, .gz) or .parquet, a path or a URL.")
    ]
    target: Annotated[str, typer.Argument(metavar="OUT", help="Records: .jsonl or .parquet, a path or a URL.")]
    engine: Annotated[str, typer.Option(help="transformers or vllm (language models).")] = "transformers"
    engine_set: Annotated[
        list[str], typer.Option(metavar="KEY=VALUE", help="A setting of vLLM's own, as JSON or text; repeatable.")
    ] = field(default_factory=list)
    artifacts: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of artifacts that a row's steer.edits may name.")
    ] = None
    allow_reward: Annotated[
        list[str], typer.Option(metavar="[NAME=]REWARD", help="A reward that rows may name; repeatable.")
    ] = field(default_factory=list)
    edit: Annotated[
        list[str],
        typer.Option(metavar="EDIT", help="FILE[:STRENGTH][:KEY=VALUE], for rows without steer; repeatable."),
    ] = field(default_factory=list)
    sampler: Annotated[str, typer.Option(metavar="NAME", help=f"For rows without steer: {SAMPLERS}.")] = "ancestral"
    set: Settings = field(default_factory=list)
    reward: Annotated[str | None, REWARD] = None
    beta: Annotated[float, typer.Option(help="KL coefficient of the target p exp(reward / beta).")] = 1.0
    n: Annotated[int | None, typer.Option("--n", "-n", help="Outputs of a row, or candidates.")] = None
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message, for rows with a prompt.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: 1 (0.7 reads better).")] = None
    top_k: Annotated[int | None, typer.Option(help="Keep the K likeliest tokens; default: 0, off.")] = None
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this mass; default: 1, off.")] = None
    max_new_tokens: Annotated[int, typer.Option(help="The longest output.")] = 64
    steps: Annotated[int, typer.Option(help="Denoising steps (images, masked language models).")] = 25
    eta: Annotated[float, typer.Option(help="Noise in each step of an image.")] = 1.0
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance of images.")] = None
    seed: Annotated[int, typer.Option(help="A row's seed follows from this and its id.")] = 0
    keep: Annotated[list[str], typer.Option(metavar="NAME", help="A column that the record carries; repeatable.")] = (
        field(default_factory=list)
    )
    engine_on: Annotated[
        str | None,
        typer.Option(metavar="ray[:ADDRESS]", help="Answer on a Ray cluster; without address one is begun here."),
    ] = None
    actors: Annotated[int, typer.Option(help="Processes of the cluster that hold the model.")] = 1
    shard: Annotated[str, typer.Option(metavar="I/N", help="Every N-th row, beginning at I from 0.")] = "0/1"
    max_rows: Annotated[int, typer.Option(help="Texts or images drawn at once.")] = 32
    max_failures: Annotated[int | None, typer.Option(help="Rows that may fail; default: any number.")] = None
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do rows again that failed before.")] = False
    overwrite: Annotated[bool, OVERWRITE] = False

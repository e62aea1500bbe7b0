"""Options of `play` and of the router that is trained from what it played."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from steer.cli.options.shared import OVERWRITE, PROMPTS, ModelOptions, Options, Settings

__all__ = ["PlayOptions", "TrainRouterOptions"]


@dataclass(frozen=True, kw_only=True)
class PlayOptions(ModelOptions):
    """Play an agent in an environment: its return, success and cost, every episode, and a page of them."""

    model: Annotated[
        str, typer.Option(metavar="MODEL", help="As everywhere, or uniform: any legal action, each as likely.")
    ] = "uniform"
    env: Annotated[
        str, typer.Option(metavar="NAME", help="courier, bandit:arms=.6,.4, ledger, gymnasium:ID, or module:factory.")
    ]
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for episodes.jsonl, play.json and episodes.html.")]
    sampler: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="ancestral, turn-search; critique, in every turn; or one that picks episodes."
        ),
    ] = "ancestral"
    set: Settings = field(default_factory=list)
    critic: Annotated[
        str | None,
        typer.Option(metavar="CRITIC", help="legal, REWARD>=NUMBER, module:function, model:ID or model:self."),
    ] = None
    edit: Annotated[
        list[str],
        typer.Option(metavar="FILE[:STRENGTH][:KEY=VALUE]", help="A vector, controller or value head; repeatable."),
    ] = field(default_factory=list)
    prompts: Annotated[Path | None, PROMPTS] = None
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What comes before the environment's words.")] = (
        None
    )
    episodes: Annotated[int, typer.Option(help="Of each prompt.")] = 100
    max_turns: Annotated[int, typer.Option(help="After which an episode is cut off.")] = 8
    history: Annotated[str, typer.Option(metavar="full|last:K", help="What of the conversation the model sees.")] = (
        "full"
    )
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0
    max_new_tokens: Annotated[int, typer.Option(help="Of one action.")] = 32
    seconds: Annotated[float, typer.Option(help="For a call into the environment; longer ends its episode.")] = 10.0
    max_rows: Annotated[int, typer.Option(help="Episodes played at once.")] = 64
    margin: Annotated[float, typer.Option(help="Of value, from which turn-search writes a pair for DPO.")] = 0.1
    seed: Annotated[int, typer.Option(help="Same seed, same episodes.")] = 0


@dataclass(frozen=True, kw_only=True)
class TrainRouterOptions(Options):
    """Train a router: which model is worth its price for a prompt."""

    data: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help='Rows {"prompt", "model", "score"}; missing ones are skipped.')
    ]
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Where the router goes.")]
    price: Annotated[list[str], typer.Option(metavar="MODEL=PRICE", help="Of an answer; repeatable.")] = field(
        default_factory=list
    )
    grid: Annotated[str, typer.Option(metavar="A,B,...", help="Lambdas, the worth of a unit of price.")] = (
        "0,0.003,0.01,0.03,0.1"
    )
    seed: Annotated[int, typer.Option(help="Which prompts are held out.")] = 0
    overwrite: Annotated[bool, OVERWRITE] = False

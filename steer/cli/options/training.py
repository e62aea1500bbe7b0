"""Options of every `train` command."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from steer.cli.options.shared import LOG, OVERWRITE, PROMPTS, REWARD, ModelOptions, Options, Settings

__all__ = [
    "TrainControllerOptions",
    "TrainImagesOptions",
    "TrainOptions",
    "TrainPolicyOptions",
    "TrainRewardOptions",
    "TrainStimulusOptions",
    "TrainValueOptions",
    "TrainVectorOptions",
]


def _list_methods(shown: bool) -> None:
    if shown:
        from steer.train.objectives.registry import table

        typer.echo(table())
        raise typer.Exit


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ModelOptions):
    """What all kinds of training share. Recipes, which make their files anew, set `overwrite`."""

    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Where the result goes.")]
    overwrite: Annotated[bool, OVERWRITE] = False
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0
    log: Annotated[list[str], LOG] = field(default_factory=list)
    set: Settings = field(default_factory=list)


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

    prompts: Annotated[Path | None, PROMPTS] = None
    reward: Annotated[str | None, REWARD] = None
    rollouts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Records of `steer batch` to learn from, in place of --prompts; --reward may score them.",
        ),
    ] = None
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep OUT.work, from which training resumes.")] = False


@dataclass(frozen=True, kw_only=True)
class TrainRewardOptions(TrainOptions):
    """Train a reward from preferences, ratings or labels: heads on the model's own hidden states."""

    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE.jsonl",
            help="Rows: prompt, chosen and rejected; or completion and ratings {name: number}, or label.",
        ),
    ]
    objective: Annotated[str, typer.Option(help="auto (by the columns), pairs, ratings or binary.")] = "auto"
    gate: Annotated[
        Path | None,
        typer.Option(metavar="PAIRS.jsonl", help="Of ratings: learn the attributes' weights by the prompt from these."),
    ] = None
    noise_robust: Annotated[
        bool, typer.Option("--noise-robust", help="Of pairs: two heads that review each other, where that is better.")
    ] = False
    members: Annotated[int, typer.Option(help="Of an ensemble, read as FILE:how=worst or FILE:how=uncertainty.")] = 1


@dataclass(frozen=True, kw_only=True)
class TrainStimulusOptions(TrainOptions):
    """Train a policy of hints for a black box, which --model names: by references, then by the reward of its texts."""

    out: Annotated[
        Path, typer.Option(metavar="FILE.safetensors or DIR", help="Where the result goes; a folder for networks.")
    ]
    data: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help="Rows: input, and reference or hint where there is one, and id.")
    ]
    test: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Rows of the table; default: a fifth of data, by id.")
    ] = None
    reward: Annotated[str | None, REWARD] = None
    policy: Annotated[str, typer.Option(help="extract (no network), lm or seq2seq.")] = "extract"
    policy_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The network of lm or seq2seq; of lm default: --model.")
    ] = None
    stage: Annotated[str, typer.Option(help="both, sft (references alone) or rl (the reward alone).")] = "both"
    template: Annotated[
        str, typer.Option(metavar="NAME or FILE", help="hint-only, article+hint, completion, or a text with {hint}.")
    ] = "hint-only"
    rounds: Annotated[int, typer.Option(help="Of the reward.")] = 20
    hints: Annotated[int, typer.Option(help="Of each input in a round.")] = 4
    texts: Annotated[int | None, typer.Option(help="Of the black box for each hint; default: 1 if greedy, else 4.")] = (
        None
    )
    calls: Annotated[int, typer.Option(help="Texts of the black box in all, at most.")] = 2000
    beta: Annotated[float, typer.Option(help="KL coefficient at the start.")] = 0.005
    target_kl: Annotated[float, typer.Option(help="Nats a hint that its controller aims at.")] = 0.5
    force: Annotated[bool, typer.Option("--force", help="Train although the black box heeds no hint.")] = False
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep OUT.work, from which training resumes.")] = False


@dataclass(frozen=True, kw_only=True)
class TrainPolicyOptions(TrainOptions):
    """Tune a policy: a language model by any method of --list, or a diffusion model by dpo, seppo or pg."""

    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the policy.")]
    method: Annotated[str, typer.Option(metavar="NAME", help="A method of --list; images: dpo, seppo or pg.")]
    list_: Annotated[
        bool,
        typer.Option("--list", is_eager=True, callback=_list_methods, help="Print the methods for text, then stop."),
    ] = False
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE or org/name",
            help="Rows with the columns that --list names; or a dataset of the hub; images: a folder.",
        ),
    ] = None
    prompts: Annotated[Path | None, PROMPTS] = None
    class_: Annotated[
        list[str], typer.Option("--class", metavar="NAME", help="A class of a class-conditional model; repeatable.")
    ] = field(default_factory=list)
    reward: Annotated[str | None, REWARD] = None
    held_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts to measure the reward on; default: those that it learns from."),
    ] = None
    beta: Annotated[float | None, typer.Option(help="KL coefficient, or DPO's beta; default: by method.")] = None
    lora_rank: Annotated[int | None, typer.Option(help="0 tunes all weights; default: 16 for text, 0 for images.")] = (
        None
    )
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep OUT.work, from which training resumes.")] = False


@dataclass(frozen=True, kw_only=True)
class TrainImagesOptions(Options):
    """Train the embedded diffusion model again, with its two classifiers: about 25 minutes on one core."""

    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the model.")]
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder with the four idx files of Fashion-MNIST.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    )
    steps: Annotated[int, typer.Option(help="Training steps of the denoiser.")] = 3900
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0
    log: Annotated[list[str], LOG] = field(default_factory=list)
    set: Settings = field(default_factory=list)
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep OUT.work, from which training resumes.")] = False

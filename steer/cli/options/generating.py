"""Options of `generate`, which other commands take up in part, and of `table`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from steer.cli.options.shared import OVERWRITE, PROMPTS, REWARD, ModelOptions, Options, Settings
from steer.methods.samplers import SAMPLERS

__all__ = ["GenerateOptions", "ImageOptions", "SampleOptions", "TableOptions", "TextOptions"]


@dataclass(frozen=True, kw_only=True)
class SampleOptions(ModelOptions):
    """What to generate and how to draw it, whatever the model."""

    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="One prompt.")] = None
    prompts: Annotated[Path | None, PROMPTS] = None
    sampler: Annotated[str, typer.Option(metavar="NAME", help=f"How to draw: {SAMPLERS}.")] = "ancestral"
    set: Settings = field(default_factory=list)
    reward: Annotated[str | None, REWARD] = None
    critic: Annotated[
        str | None,
        typer.Option(
            metavar="CRITIC", help="Of sampler critique: REWARD>=NUMBER, module:function, model:ID or model:self."
        ),
    ] = None
    critic_instruction: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What a critic model is told, with {prompt} and {output} in it.")
    ] = None
    beta: Annotated[float, typer.Option(help="KL coefficient of the target p exp(reward / beta).")] = 1.0
    n: Annotated[
        int | None,
        typer.Option("--n", "-n", help="Outputs for each prompt, or candidates; fk without it shows all particles."),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Same seed, same result; default: a new one, which is reported.")] = (
        None
    )
    tuned: Annotated[
        Path | None, typer.Option(metavar="DIR", help="RL guidance towards this policy, as train policy writes it.")
    ] = None
    w: Annotated[float | None, typer.Option(help="How far towards it: 0 the base, 1 the policy; default: 1.5.")] = None
    max_rows: Annotated[int, typer.Option(help="Rows generated at once.")] = 64
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Also write the JSON here; FILE.jsonl: line by line, and resumes."),
    ] = None
    overwrite: Annotated[bool, OVERWRITE] = False
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of text.")] = False


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """For language models alone."""

    edit: Annotated[
        list[str],
        typer.Option(
            metavar="EDIT", help="FILE[:STRENGTH][:KEY=VALUE], a vector, controller or value head; repeatable."
        ),
    ] = field(default_factory=list)
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without the chat template.")] = (
        False
    )
    split_special_tokens: Annotated[
        bool, typer.Option("--split-special-tokens", help="Read control tokens that messages spell as text.")
    ] = False
    generation_config: Annotated[
        str | None,
        typer.Option(
            metavar="checkpoint", help="Draw as the model's generation_config.json says, where no option here does."
        ),
    ] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: 1 (0.7 reads better).")] = None
    top_k: Annotated[int | None, typer.Option(help="Keep the K likeliest tokens; default: 0, off.")] = None
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this mass; default: 1, off.")] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Divides the logits of tokens already there; default: 1, off.")
    ] = None
    base: Annotated[
        str,
        typer.Option(
            metavar="LAW",
            help="What samplers weigh against under top-k and top-p: the truncated law, or the full one before.",
        ),
    ] = "truncated"
    max_new_tokens: Annotated[int, typer.Option(help="The longest output.")] = 64
    block: Annotated[int, typer.Option(help="Tokens in one step of a sampler that weighs or searches.")] = 1
    until: Annotated[
        list[str], typer.Option(metavar="TEXT", help="End a step early at a token that holds this; repeatable.")
    ] = field(default_factory=list)
    reading: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]FILE",
            help="A vector or probe to read where each token is chosen: a number a token in the JSON, their mean in "
            "what is printed; repeatable.",
        ),
    ] = field(default_factory=list)
    stop_if: Annotated[
        str | None,
        typer.Option(metavar="RULE", help='End a text with the first token whose reading does this: "calm < -1.5".'),
    ] = None
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come (one prompt, one output).")] = (
        False
    )


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """For diffusion models alone."""

    class_: Annotated[
        list[str], typer.Option("--class", metavar="NAME", help="A class of a class-conditional model; repeatable.")
    ] = field(default_factory=list)
    steps: Annotated[int, typer.Option(help="Denoising steps, of masked language models too.")] = 25
    eta: Annotated[float, typer.Option(help="Noise in each step: 0 is deterministic, 1 as much as fits.")] = 1.0
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; default: none, or the pipeline's own.")
    ] = None
    gradient: Annotated[
        float | None, typer.Option(metavar="STRENGTH", help="Also push each step up the gradient of the reward.")
    ] = None
    png: Annotated[Path | None, typer.Option(metavar="FILE.png", help="The images in a grid; default: steer.png.")] = (
        None
    )
    lineage: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Who descends from whom, as .png, .svg or .pdf (fk, one prompt)."),
    ] = None
    tree: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The search tree, as .png, .svg or .pdf (dts, dts-star, one prompt)."),
    ] = None
    previews: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What was foreseen over time, as .png, .svg or .pdf (ancestral, svdd)."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ImageOptions, TextOptions, SampleOptions):
    """Generate text or images, under edits, with a sampler and a reward."""


@dataclass(frozen=True, kw_only=True)
class TableOptions(Options):
    """Print samples that generate wrote (--out) side by side: mean reward and KL, what they cost, and their texts."""

    files: Annotated[list[Path], typer.Argument(metavar="FILE.json...", help="Samples of the same prompts.")]
    texts: Annotated[bool, typer.Option("--texts", help="Also the texts, in columns.")] = False
    markdown: Annotated[bool, typer.Option("--markdown", help="The texts as a table in Markdown.")] = False

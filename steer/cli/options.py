"""Options of every command, declared once for the command line and for recipes.

A field is an option; its annotation carries type and help. Nothing heavy is imported here, so that help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from steer.methods.samplers import SAMPLERS

__all__ = [
    "PairsOptions",
    "ReliabilityOptions",
    "ConceptOptions",
    "GoalsOptions",
    "BatchOptions",
    "COMMANDS",
    "DemoOptions",
    "DistanceOptions",
    "EvalOptions",
    "FrontierOptions",
    "PlayOptions",
    "GenerateOptions",
    "GuidanceOptions",
    "ImageOptions",
    "ListenOptions",
    "ModelOptions",
    "Options",
    "RENAMED",
    "SampleOptions",
    "SearchOptions",
    "ServeOptions",
    "StrengthOptions",
    "TableOptions",
    "TextOptions",
    "TrainControllerOptions",
    "TrainImagesOptions",
    "TrainOptions",
    "TrainPolicyOptions",
    "TrainRewardOptions",
    "TrainRouterOptions",
    "TrainValueOptions",
    "TrainVectorOptions",
]


_Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="A further setting, see steer help; repeatable."),
]
_Reward = typer.Option(metavar="REWARD", help="For example 'sentiment - 0.3*profanity', module:function or org/name.")
_Prompts = typer.Option(
    metavar="FILE",
    help="Prompts, each a text or a list of messages: JSON lines, a JSON list, CSV, parquet; - is stdin.",
)
_Format = Annotated[str, typer.Option("--format", metavar="png,svg,pdf", help="Formats of the picture.")]
_Log = typer.Option(
    "--log",
    "--report-to",
    metavar="FILE.jsonl or TRACKER",
    help="Where the figures of every step go: a file, tensorboard, wandb, trackio or mlflow; repeatable.",
)
_Overwrite = typer.Option("--overwrite", help="Begin anew in place of what is there.")


def _list_methods(shown: bool) -> None:
    if shown:
        from steer.train.objectives.registry import table

        typer.echo(table())
        raise typer.Exit


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


@dataclass(frozen=True, kw_only=True)
class SampleOptions(ModelOptions):
    """What to generate and how to draw it, whatever the model."""

    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="One prompt.")] = None
    prompts: Annotated[Path | None, _Prompts] = None
    sampler: Annotated[str, typer.Option(metavar="NAME", help=f"How to draw: {SAMPLERS}.")] = "ancestral"
    set: _Settings = field(default_factory=list)
    reward: Annotated[str | None, _Reward] = None
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
    overwrite: Annotated[bool, _Overwrite] = False
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
class TrainOptions(ModelOptions):
    """What all kinds of training share. Recipes, which make their files anew, set `overwrite`."""

    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Where the result goes.")]
    overwrite: Annotated[bool, _Overwrite] = False
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0
    log: Annotated[list[str], _Log] = field(default_factory=list)
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

    prompts: Annotated[Path | None, _Prompts] = None
    reward: Annotated[str | None, _Reward] = None
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
    reward: Annotated[str | None, _Reward] = None
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
    prompts: Annotated[Path | None, _Prompts] = None
    class_: Annotated[
        list[str], typer.Option("--class", metavar="NAME", help="A class of a class-conditional model; repeatable.")
    ] = field(default_factory=list)
    reward: Annotated[str | None, _Reward] = None
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
    log: Annotated[list[str], _Log] = field(default_factory=list)
    set: _Settings = field(default_factory=list)
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep OUT.work, from which training resumes.")] = False


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ModelOptions):
    """What all measurements share: a folder for the page, the numbers as JSON and CSV, the pictures and the recipe."""

    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for page.html, JSON, CSV, pictures, recipe.yaml.")]
    format: _Format = "png"


@dataclass(frozen=True, kw_only=True)
class StrengthOptions(EvalOptions):
    """Sweep an edit's strength: reward, drift, fluency and diversity, and where it breaks."""

    edit: Annotated[str, typer.Option(metavar="FILE[:KEY=VALUE]", help="The artifact to evaluate.")]
    prompts: Annotated[Path, _Prompts]
    strengths: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Default: by kind of edit; 0 is always in.")
    ] = None
    reward: Annotated[str, _Reward] = "sentiment"
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

    reward: Annotated[str, _Reward]
    budgets: Annotated[str, typer.Option(metavar="A,B,...", help="Network evaluations (tokens) for each prompt.")]
    prompts: Annotated[Path | None, _Prompts] = None
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

    prompts: Annotated[Path, _Prompts]
    reward: Annotated[str, _Reward]
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
    reward: Annotated[str, _Reward]
    prompts: Annotated[Path | None, _Prompts] = None
    w: Annotated[str, typer.Option("--w", metavar="A,B,...", help="Numbers.")] = "0,0.5,1,1.5,2,3"
    outputs: Annotated[int, typer.Option(help="For each prompt and seed.")] = 64
    particles: Annotated[int, typer.Option(help="Of corrected guidance, for each output.")] = 4
    seeds: Annotated[int, typer.Option(help="Repetitions, from which intervals come.")] = 3
    steps: Annotated[int, typer.Option(help="Denoising steps (diffusion models, masked language models).")] = 25
    max_new_tokens: Annotated[int, typer.Option(help="The longest output (language models).")] = 32


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
    prompts: Annotated[Path, _Prompts]
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
    set: _Settings = field(default_factory=list)
    critic: Annotated[
        str | None,
        typer.Option(metavar="CRITIC", help="legal, REWARD>=NUMBER, module:function, model:ID or model:self."),
    ] = None
    edit: Annotated[
        list[str],
        typer.Option(metavar="FILE[:STRENGTH][:KEY=VALUE]", help="A vector, controller or value head; repeatable."),
    ] = field(default_factory=list)
    prompts: Annotated[Path | None, _Prompts] = None
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
    overwrite: Annotated[bool, _Overwrite] = False


@dataclass(frozen=True, kw_only=True)
class ListenOptions(ModelOptions):
    """Where to listen, and who is let in."""

    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own want a key.")] = (
        "127.0.0.1"
    )
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the API key, or several.")
    ] = None
    no_key: Annotated[bool, typer.Option("--no-key", help="Let other machines in without a key.")] = False


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ListenOptions):
    """Serve a language model to OpenAI's clients, steered as each request says."""

    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="An embedded model, a Hugging Face id or a folder; default: the recipe's."),
    ] = ""
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; default: as above, a folder by its last part.")
    ] = None
    engine: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers"
    engine_set: Annotated[
        list[str], typer.Option(metavar="KEY=VALUE", help="A setting of vLLM's own, as JSON or text; repeatable.")
    ] = field(default_factory=list)
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any that is free.")] = 8000
    allow_origin: Annotated[
        list[str], typer.Option(metavar="ORIGIN", help="A web page's origin that may ask, or *; repeatable.")
    ] = field(default_factory=list)
    artifacts: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of vectors, controllers and value heads; clients' too.")
    ] = None
    require: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="An artifact that has to be there before /health says ok; repeatable."),
    ] = field(default_factory=list)
    generation_config: Annotated[
        str | None,
        typer.Option(
            metavar="checkpoint", help="Draw as the model's generation_config.json says, where requests do not say."
        ),
    ] = None
    split_special_tokens: Annotated[
        bool, typer.Option("--split-special-tokens/--parse-special-tokens", help="Control tokens in messages are text.")
    ] = True
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Steer as its last generate job does where nothing is asked.")
    ] = None
    preset: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE[:STRENGTH]", help="A steered model of its own, MODEL:NAME; repeatable."),
    ] = field(default_factory=list)
    allow_reward: Annotated[
        list[str], typer.Option(metavar="[NAME=]REWARD", help="A reward that requests may name; repeatable.")
    ] = field(default_factory=list)
    max_rows: Annotated[int, typer.Option(help="Texts that decode together.")] = 32
    cache_tokens: Annotated[
        int, typer.Option(help="Room of the running batch, texts times the longest's tokens; not vLLM.")
    ] = 65_536
    searches: Annotated[int, typer.Option(help="Searches that take turns; others wait.")] = 4
    search_share: Annotated[
        float, typer.Option(help="Of the time, for searches, while plain requests are there; not vLLM.")
    ] = 0.15
    max_body_bytes: Annotated[int, typer.Option(help="Size of a request.")] = 4 << 20
    max_choices: Annotated[int, typer.Option(help="Texts that a request gets back.")] = 32
    max_candidates: Annotated[int, typer.Option(help="Texts that a request may draw.")] = 256
    max_tokens: Annotated[int, typer.Option(help="Tokens of one text.")] = 2048
    max_total_tokens: Annotated[int, typer.Option(help="Tokens that a request may draw, of every candidate.")] = 131_072
    max_requests: Annotated[int, typer.Option(help="Requests that run or wait; one more is answered 429.")] = 256
    max_artifacts: Annotated[int, typer.Option(help="Registered artifacts.")] = 256
    max_artifact_bytes: Annotated[int, typer.Option(help="Of all registered artifacts together.")] = 1 << 30
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="A line for each request on standard error: who, what, status.")
    ] = False
    drain: Annotated[float, typer.Option(metavar="SECONDS", help="For running requests when told to stop.")] = 30.0


@dataclass(frozen=True, kw_only=True)
class TableOptions(Options):
    """Print samples that generate wrote (--out) side by side: mean reward and KL, what they cost, and their texts."""

    files: Annotated[list[Path], typer.Argument(metavar="FILE.json...", help="Samples of the same prompts.")]
    texts: Annotated[bool, typer.Option("--texts", help="Also the texts, in columns.")] = False
    markdown: Annotated[bool, typer.Option("--markdown", help="The texts as a table in Markdown.")] = False


@dataclass(frozen=True, kw_only=True)
class BatchOptions(ModelOptions):
    """Answer a file of rows, one record each, whatever the engine and the sampler; what is done is never done again.

    A row is a line of JSON with prompt or messages, or a row of CSV or Parquet, with an id and with fields of a
    request (temperature, max_tokens, n, seed, steer) where it differs; or a line of OpenAI's batch format. A row that
    fails has a record with its error. Two rows with one id, and columns that no request has, are refused at the start.
    """

    source: Annotated[str, typer.Argument(metavar="IN", help="Rows: .jsonl, .csv or .parquet, a path or a URL.")]
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
    set: _Settings = field(default_factory=list)
    reward: Annotated[str | None, _Reward] = None
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
    overwrite: Annotated[bool, _Overwrite] = False


@dataclass(frozen=True, kw_only=True)
class DemoOptions(ListenOptions):
    """Open a page in a browser on which steering is seen as it happens, and what it costs."""

    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A language model or a diffusion model, as everywhere.")
    ] = "smollm2-135m"
    artifacts: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of vectors, controllers and value heads to choose from.")
    ] = None
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any that is free.")] = 7860
    open: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser where there is one.")] = (
        True
    )


COMMANDS: dict[str, type[Options]] = {
    "generate": GenerateOptions,
    "batch": BatchOptions,
    "train vector": TrainVectorOptions,
    "train controller": TrainControllerOptions,
    "train value": TrainValueOptions,
    "train reward": TrainRewardOptions,
    "train stimulus": TrainStimulusOptions,
    "train policy": TrainPolicyOptions,
    "train images": TrainImagesOptions,
    "train router": TrainRouterOptions,
    "eval strength": StrengthOptions,
    "eval frontier": FrontierOptions,
    "eval search": SearchOptions,
    "eval distance": DistanceOptions,
    "eval guidance": GuidanceOptions,
    "eval goals": GoalsOptions,
    "eval concept": ConceptOptions,
    "eval reliability": ReliabilityOptions,
    "eval pairs": PairsOptions,
    "play": PlayOptions,
    "table": TableOptions,
    "serve": ServeOptions,
    "demo": DemoOptions,
}
"""Commands that a recipe can hold."""

RENAMED = {
    "eval": "eval strength",
    "compare": "eval distance",
    "race": "eval search",
    "frontier": "eval frontier",
    "guide": "eval guidance",
}
"""Old names of commands, which are taken for one release."""

PANELS = {
    "ModelOptions": "Model",
    "SampleOptions": "Prompts and sampling",
    "TextOptions": "Language models",
    "ImageOptions": "Diffusion models",
    "ListenOptions": "Address and keys",
    "EvalOptions": "Report",
    "TrainOptions": "Training",
}
"""Titles in the help, by the class that declares an option."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "generate": (
        'steer generate --model smollm2-135m --prompt "Tell me of your day" --edit calm.safetensors:0.15',
        'steer generate --model smollm2-135m --prompt "Hi" --sampler fk -n 8 --reward sentiment --beta 0.1',
        "steer generate --model fashion-ddpm --class boot --sampler best-of-n -n 8 --reward brightness",
    ),
    "batch": (
        "steer batch rows.jsonl records.jsonl --model smollm2-135m --edit calm.safetensors:0.15",
        "steer batch rows.csv part.jsonl --model smollm2-135m --sampler best-of-n -n 8 --reward sentiment --shard 0/4",
    ),
    "train vector": ("steer train vector --model smollm2-135m --pairs pairs.jsonl --out calm.safetensors",),
    "train value": (
        "steer train value --model smollm2-135m --prompts prompts.json --reward sentiment --out value.safetensors",
    ),
    "train reward": (
        "steer train reward --model smollm2-135m --data pairs.jsonl --out helpful.safetensors --members 5",
        "steer generate --model smollm2-135m --prompt Hi --sampler fk -n 8 --reward helpful.safetensors:how=worst",
    ),
    "train stimulus": (
        "steer train stimulus --model smollm2-135m --data articles.jsonl --reward rouge --out hints.safetensors",
        "steer generate --model openai:https://host/v1#name --edit hints.safetensors --prompt TEXT",
    ),
    "train policy": ("steer train policy --model smollm2-135m --method dpo --data pairs.jsonl --out bright",),
    "eval strength": (
        "steer eval strength --model smollm2-135m --edit calm.safetensors --prompts prompts.json --out report",
    ),
    "eval frontier": (
        "steer eval frontier --model smollm2-135m --prompts prompts.json --reward sentiment --edit calm.safetensors "
        "--out f",
    ),
    "eval search": (
        "steer eval search --model smollm2-135m --prompts prompts.json --reward sentiment --budgets 100,400 --out race",
    ),
    "eval distance": ("steer eval distance --model fashion-ddpm --task bright=brightness@0.125 --out distance",),
    "eval goals": (
        "steer eval goals --model smollm2-135m --texts texts.jsonl --edit sentiment=calm.safetensors --out g",
    ),
    "eval concept": (
        "steer eval concept --model smollm2-135m --concepts c.jsonl --prompts prompts.json --out concept",
    ),
    "eval reliability": (
        "steer eval reliability --model smollm2-135m --edit calm.safetensors --choices rows.jsonl --out reliability",
    ),
    "eval pairs": ("steer eval pairs --model smollm2-135m --pairs pairs.jsonl --reward sentiment --out pairs",),
    "eval guidance": (
        "steer eval guidance --model smollm2-135m --tuned bright --prompts prompts.json --reward sentiment --out w",
    ),
    "play": (
        "steer play --env courier --sampler turn-search --episodes 20 --out played",
        "steer play --env bandit:show=guided --model smollm2-135m --sampler critique --critic legal --out played",
    ),
    "table": ("steer table plain.json calm.json best-of-8.json --texts",),
    "serve": ("steer serve --model smollm2-135m --artifacts vectors --port 8000",),
    "demo": ("steer demo", "steer demo --model ./my-model --artifacts vectors"),
}
"""Command lines at the end of a command's help."""

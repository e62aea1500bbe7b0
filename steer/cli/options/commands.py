"""Commands that a recipe can hold, by name: their options, old names, titles and examples in the help."""

from __future__ import annotations

from steer.cli.options.bulk import BatchOptions
from steer.cli.options.generating import GenerateOptions, TableOptions
from steer.cli.options.judging import ConceptOptions, GoalsOptions, PairsOptions, ReliabilityOptions
from steer.cli.options.measuring import (
    DistanceOptions,
    FrontierOptions,
    GuidanceOptions,
    SearchOptions,
    StrengthOptions,
)
from steer.cli.options.playing import PlayOptions, TrainRouterOptions
from steer.cli.options.serving import DemoOptions, ServeOptions
from steer.cli.options.shared import Options
from steer.cli.options.training import (
    TrainControllerOptions,
    TrainImagesOptions,
    TrainPolicyOptions,
    TrainRewardOptions,
    TrainStimulusOptions,
    TrainValueOptions,
    TrainVectorOptions,
)

__all__ = ["COMMANDS", "EXAMPLES", "PANELS", "RENAMED"]

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

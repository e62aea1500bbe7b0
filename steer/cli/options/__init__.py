"""Options of every command, declared once for the command line and for recipes.

A field is an option; its annotation carries type and help. Nothing heavy is imported here, so that help is quick.
"""

from __future__ import annotations

from steer.cli.options.bulk import BatchOptions
from steer.cli.options.commands import COMMANDS, EXAMPLES, PANELS, RENAMED
from steer.cli.options.generating import GenerateOptions, ImageOptions, SampleOptions, TableOptions, TextOptions
from steer.cli.options.judging import ConceptOptions, GoalsOptions, PairsOptions, ReliabilityOptions
from steer.cli.options.measuring import (
    DistanceOptions,
    EvalOptions,
    FrontierOptions,
    GuidanceOptions,
    SearchOptions,
    StrengthOptions,
)
from steer.cli.options.playing import PlayOptions, TrainRouterOptions
from steer.cli.options.serving import DemoOptions, ListenOptions, ServeOptions
from steer.cli.options.shared import ModelOptions, Options
from steer.cli.options.training import (
    TrainControllerOptions,
    TrainImagesOptions,
    TrainOptions,
    TrainPolicyOptions,
    TrainRewardOptions,
    TrainStimulusOptions,
    TrainValueOptions,
    TrainVectorOptions,
)

__all__ = [
    "BatchOptions",
    "COMMANDS",
    "ConceptOptions",
    "DemoOptions",
    "DistanceOptions",
    "EXAMPLES",
    "EvalOptions",
    "FrontierOptions",
    "GenerateOptions",
    "GoalsOptions",
    "GuidanceOptions",
    "ImageOptions",
    "ListenOptions",
    "ModelOptions",
    "Options",
    "PANELS",
    "PairsOptions",
    "PlayOptions",
    "RENAMED",
    "ReliabilityOptions",
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
    "TrainStimulusOptions",
    "TrainValueOptions",
    "TrainVectorOptions",
]

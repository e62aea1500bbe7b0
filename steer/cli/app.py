"""The commands, made from the declarations in `options`."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from copy import copy
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from steer.cli.options import COMMANDS, EXAMPLES, PANELS
from steer.cli.verbosity import talking

__all__ = ["app"]


def _switches_alone(params: list[Any]) -> list[Any]:
    """Options of which those without a value have no word for one in the help, typer's own among them."""
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


class _Command(typer.core.TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _switches_alone(super().get_params(ctx))


class _Group(typer.core.TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _switches_alone(super().get_params(ctx))


_HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="steer",
    cls=_Group,
    help="Steer and align open-weight models at inference time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=_HELP,
)
models = typer.Typer(cls=_Group, help="Models that come with steer.", no_args_is_help=True)
train = typer.Typer(
    cls=_Group,
    help="Train a vector, a controller, a value head, a reward, a stimulus, a policy or a router.",
    no_args_is_help=True,
)
evaluation = typer.Typer(
    cls=_Group,
    help="Measure edits, samplers, rewards and policies: each a page, a table and a recipe.",
    no_args_is_help=True,
)
app.add_typer(models, name="models")
imports = typer.Typer(cls=_Group, help="Make artifacts of what other tools wrote.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")
app.add_typer(imports, name="import")
app.add_typer(train, name="train")

_LM_EVAL = "$ steer lm-eval --model smollm2-135m --edit calm.safetensors:0.15 --tasks arc_easy --limit 100"
Edits = Annotated[Path, typer.Argument(metavar="FILE", help="An artifact.")]


def _version(shown: bool) -> None:
    if shown:
        import steer

        typer.echo(f"steer {steer.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, metavar="", help="Print the version.")
    ] = False,
) -> None:
    """Steer and align open-weight models at inference time."""


def _command(name: str) -> Callable[..., None]:
    """The command line's view of an entry in `COMMANDS`: a function with one parameter for each option."""
    options = COMMANDS[name]
    hints = get_type_hints(options, include_extras=True)

    panels = _panels(options)

    def parameter(option: Any) -> inspect.Parameter:
        kind_, shown = get_args(hints[option.name])
        hints[option.name] = Annotated[kind_, _as_shown(shown, kind_, panels[option.name])]
        default = option.default if option.default_factory is MISSING else option.default_factory()
        default = inspect.Parameter.empty if default is MISSING else default
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(option.name, kind, default=default, annotation=hints[option.name])

    def call(**given: Any) -> None:
        results, dry = sys.stdout, given.pop("dry_run")
        quiet, verbose = given.pop("quiet"), given.pop("verbose")
        # Whatever a library or a reward prints belongs beside the results, not among them.
        with redirect_stdout(sys.stderr), talking(verbose):
            from steer.cli.jobs import JOBS, check_ranks
            from steer.cli.session import Session, kept_on_interrupt, silent
            from steer.progress import note

            shared = check_ranks(name)
            run = JOBS[name](options(**given))
            if dry:
                from steer.cli.estimates import estimated

                cost = estimated(options(**given), Session(results, progress=False)) if shared.first else ""
                note(shared.first, f"{name}: everything checks; nothing was run; {cost}")
                return
            session = Session(results if shared.first else silent(), not quiet and shared.first, verbose)
            began = time.monotonic()
            with kept_on_interrupt(given.get("out")):
                run(session)
            note(verbose, f"{name} took {time.monotonic() - began:.1f} s")

    declared = [*(parameter(f) for f in fields(options)), *_RUN]
    call.__signature__ = inspect.Signature(declared)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in declared}
    call.__doc__ = "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(options.__doc__ or "").split("\n\n"))
    return call


def _switch(name: str, *spelling: str, help: str) -> inspect.Parameter:
    option = typer.Option(*spelling, help=help, metavar="", rich_help_panel="Run")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])


_RUN = (
    _switch("dry_run", "--dry-run", help="Check everything, say about what it costs and how long it takes, then stop."),
    _switch("quiet", "--quiet", "-q", help="No progress and no notes: results and errors alone."),
    _switch(
        "verbose", "--verbose", "-v", help="Say what is loaded, how long things take, and where an error comes from."
    ),
)


def _panels(options: type) -> dict[str, str]:
    """The title under which each option stands in the help: that of the class that declares it."""
    found: dict[str, str] = {}
    for kind in reversed(options.__mro__):
        title = PANELS.get(kind.__name__, "Options")
        found |= dict.fromkeys(vars(kind).get("__annotations__", {}), title)
    return found


_VALUES = {bool: "", int: "N", float: "NUMBER", str: "NAME"}
"""What stands for a value in the help; a switch has none."""


def _as_shown(option: Any, kind: Any, title: str) -> Any:
    """The option under a title, with a word for its value."""
    shown = copy(option)
    shown.rich_help_panel = title if isinstance(option, typer.models.OptionInfo) else "Arguments"
    if shown.metavar is None:
        kinds = [one for one in (get_args(kind) or (kind,)) if one is not type(None)]
        shown.metavar = _VALUES.get(kinds[0])
    return shown


_GROUPS = {"": app, "train": train, "eval": evaluation}
for _name in COMMANDS:
    _group, _, _last = _name.rpartition(" ")
    _epilog = "\n\n".join(f"$ {line}" for line in EXAMPLES.get(_name, ()))
    _GROUPS[_group].command(_last, cls=_Command, epilog=_epilog or None)(_command(_name))


@app.command("help", cls=_Command)
def explain_topic(
    topic: Annotated[
        list[str] | None,
        typer.Argument(metavar="TOPIC", help="A sampler, an edit, train-value and its kin, a method, a command."),
    ] = None,
) -> None:
    """What --set takes for a sampler or a kind of training, and --edit for an artifact; rewards; recipes; commands."""
    from steer.cli.help import explain, topics

    words = " ".join(topic or ()).split()
    known = {name.replace(" ", "-") for name in topics()} if words else set()
    if words and "-".join(words) not in known and _is_command(words):
        app([*words, "--help"], prog_name="steer", standalone_mode=False)
        return
    listed = f"steer help TOPIC, with one of: {', '.join(topics())}, or a command"
    typer.echo(explain(" ".join(words)) if words else listed)


def _is_command(words: list[str]) -> bool:
    """Whether words after `steer` lead to a command or to a group of them."""
    at: Any = typer.main.get_command(app)
    for word in words:
        at = getattr(at, "commands", {}).get(word)
    return at is not None


@app.command(
    "lm-eval",
    cls=_Command,
    context_settings={**_HELP, "ignore_unknown_options": True, "allow_extra_args": True},
    epilog=_LM_EVAL,
)
def lm_eval(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="As everywhere; `steer` where --model_args names it.")] = "smollm2-135m",
    edit: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:STRENGTH][:KEY=VALUE]", help="An edit; repeatable.")
    ] = None,
    engine: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """EleutherAI's lm-evaluation-harness over a steered model; all other options are the harness's own."""
    from steer.cli.harness import lm_eval as run_harness

    run_harness(model, edit or [], engine, dtype, context.args)


@app.command("recipes", cls=_Command)
def list_recipes() -> None:
    """Recipes that come with steer."""
    from steer.cli.help import list_recipes as listed

    typer.echo(listed())


@app.command("rewards", cls=_Command)
def list_rewards() -> None:
    """Rewards that come with steer, and how they are written."""
    from steer.cli.help import list_rewards as listed

    typer.echo(listed())


@app.command(cls=_Command)
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of text.")] = False,
) -> None:
    """What is installed, devices, caches, models, and what each feature lacks."""
    from steer.cli.doctor import diagnose
    from steer.files import as_json

    found = diagnose()
    typer.echo(as_json(found.to_dict()) if json else str(found))
    if not found.sound:
        raise typer.Exit(1)


@models.command("list", cls=_Command)
def list_models() -> None:
    """What can be fetched, and what is here."""
    from steer.embedded import list_models as entries

    for entry in entries():
        state = "fetched" if entry.fetched else "not fetched"
        typer.echo(
            f"{entry.name}  {entry.kind}  {entry.license}  {entry.size / 1e6:.0f} MB  {state}\n    {entry.description}"
        )


@models.command("fetch", cls=_Command)
def fetch_model(name: Annotated[str, typer.Argument(metavar="NAME", help="See `steer models list`.")]) -> None:
    """Download a model and convert it, once."""
    from steer.embedded import fetch

    typer.echo(str(fetch(name, lambda message: print(message, file=sys.stderr))))


@app.command(cls=_Command)
def show(
    file: Annotated[
        Path, typer.Argument(metavar="FILE or DIR", help="An artifact, a policy or a model; or a log of training.")
    ],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the curves of its training; .svg and .pdf, too.")
    ] = None,
) -> None:
    """Print the card of an artifact, a policy or a model, and draw how its training went."""
    from steer.cli.cards import describe, described, draw_training, folder_of

    folder = folder_of(file)
    if plot is not None:
        typer.echo(draw_training(folder, plot))
        return
    if folder.is_dir():
        typer.echo(describe(folder))
        return
    if file.suffix == ".gguf":
        from steer.gguf import load_gguf

        directions, hint = load_gguf(file)
        width = len(next(iter(directions.values())))
        typer.echo(f"control vector for {hint}\nlayers: {', '.join(map(str, directions))}\nwidth: {width}")
        return
    from steer.artifacts import read_card

    typer.echo(described(read_card(file)))


@app.command(cls=_Command)
def export(
    file: Edits,
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    layers: Annotated[
        str | None, typer.Option(help="10-19, or 3,5,8, or all; default: those that the vector steers.")
    ] = None,
    hint: Annotated[str | None, typer.Option(help="Architecture named in the file; default: the model's.")] = None,
) -> None:
    """Write a steering vector as a control vector for llama.cpp: its directions as they are, without a strength."""
    from steer.cli.export import export_vector

    typer.echo(export_vector(file, out, layers, hint))


@app.command(cls=_Command)
def push(
    file: Edits,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="A repository of models, made if it is new.")],
    name: Annotated[str | None, typer.Option(help="Of the file there; default: its own.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A `steer eval strength` whose table goes on the page.")
    ] = None,
) -> None:
    """Share an artifact on the Hugging Face hub, with a page that says what it is; prints its address."""
    from steer.cli.sharing import push as share

    typer.echo(share(file, repository, name, private, report))


@imports.command("sae", cls=_Command)
def import_sae(
    source: Annotated[Path, typer.Argument(metavar="DIR or FILE", help="SAELens: cfg.json; Gemma Scope: params.npz.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The model that it was trained on.")],
    feature: Annotated[int, typer.Option(help="The feature's number, from 0.")],
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Where the vector goes.")],
    layer: Annotated[
        int | None, typer.Option(help="The block after which it acts, where the files do not say.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over a file that is there.")] = False,
) -> None:
    """A feature of a sparse autoencoder as a steering vector: its row of the decoder."""
    from steer.cli.sharing import import_feature

    typer.echo(import_feature(source, model, feature, out, layer, overwrite))


@app.command(cls=_Command)
def run(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="The name of a shipped recipe, or a YAML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="A variable, or STEP.OPTION.")
    ] = None,
) -> None:
    """Run a recipe: everything in it is checked before anything starts. Without one: list those that there are."""
    if recipe is None:
        list_recipes()
        raise typer.Exit(2)
    results = sys.stdout
    with redirect_stdout(sys.stderr):
        from steer.cli.jobs import run_recipe
        from steer.cli.recipe import load_recipe
        from steer.cli.session import Session, kept_on_interrupt, silent
        from steer.ranks import ranks

        first = ranks().first
        with kept_on_interrupt(None):
            run_recipe(load_recipe(recipe, overrides or []), Session(results if first else silent(), first))

"""Options of `serve` and `demo`: where they listen, and what requests may ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from steer.cli.options.shared import ModelOptions

__all__ = ["DemoOptions", "ListenOptions", "ServeOptions"]


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
    inline_vectors: Annotated[
        bool, typer.Option("--inline-vectors", help="Requests may bring vectors of their own, as numbers.")
    ] = False
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
    max_vector_bytes: Annotated[int, typer.Option(help="Of the vectors that come with one request.")] = 4 << 20
    max_artifacts: Annotated[int, typer.Option(help="Registered artifacts.")] = 256
    max_artifact_bytes: Annotated[int, typer.Option(help="Of all registered artifacts together.")] = 1 << 30
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="A line for each request on standard error: who, what, status.")
    ] = False
    otlp: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenTelemetry collector for a span of each request; no texts.")
    ] = None
    otlp_text: Annotated[bool, typer.Option("--otlp-text", help="Prompts and answers in the spans, too.")] = False
    drain: Annotated[float, typer.Option(metavar="SECONDS", help="For running requests when told to stop.")] = 30.0


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

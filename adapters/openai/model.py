"""Black-box models: any OpenAI-compatible endpoint, steered by prompts, by choice and by its top log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from steer.adapters.language.decoding import Decoding
from steer.adapters.language.model import shown
from steer.adapters.openai.connection import Connection, EndpointError, Retry, base_url, read_key
from steer.adapters.openai.dialect import END_TOKENS, Dialect
from steer.adapters.openai.endpoint import Endpoint
from steer.adapters.openai.process import EndpointProcess
from steer.adapters.openai.results import Results
from steer.core import InputError, Process, Prompt, Run, Sampler, Samples, check
from steer.core.edit import Prompts
from steer.model import Model, Plan, execute

__all__ = ["EndpointModel", "load"]


_HONOURED = ("max_new_tokens", "min_p", "stop", "temperature", "top_k", "top_p")
"""Settings of decoding that mean something behind an endpoint."""


def load(
    url: str,
    *,
    model: str | None = None,
    key_env: str | None = "OPENAI_API_KEY",
    chat: bool | None = None,
    prefill: str | None = None,
    top_logprobs: int = 20,
    max_choices: int = 16,
    max_concurrency: int = 8,
    retries: int | Retry = 5,
    timeout: float = 120.0,
    send_seed: bool = True,
    length_field: str = "max_tokens",
    end_tokens: Sequence[str] = END_TOKENS,
    extra: Mapping[str, Any] | None = None,
    insecure: bool = False,
    name: str | None = None,
) -> EndpointModel:
    """A model behind an OpenAI-compatible endpoint: `load("http://127.0.0.1:8000/v1", model="name")`, or with the model
    in the address, `http://host/v1#name`. Nothing is asked of the endpoint yet, unless no model is named: then the one
    that it serves is taken.

    Args:
        url: up to and including `/v1`. Other machines are asked over https.
        key_env: the environment variable with the key, read now. OPENAI_API_KEY may be unset.
        chat: True asks for chat completions only, False for completions only (text is continued as it stands). None:
            chat completions, but completions for `RawText`.
        prefill: how the endpoint is told to continue a reply that was begun, which blocks and transition edits of chats
            need: "continue_final_message" (vLLM, SGLang), "prefix" (a field of the last message: Mistral, DeepSeek),
            "last" (it continues a last message of the assistant unasked: steer serve, llama.cpp). None: it cannot.
        top_logprobs: candidates of a token that is drawn here, 1 to 20, as many as the endpoint names.
        max_choices: texts asked for in one request; 1 for endpoints without `n`.
        max_concurrency: requests at once.
        retries: tries after the first, or a `Retry`.
        timeout: seconds for one request.
        send_seed: whether requests carry a seed; without one the endpoint's texts differ from run to run.
        length_field: "max_completion_tokens" for endpoints that refuse "max_tokens".
        end_tokens: how the endpoint shows tokens that end a text.
        extra: more fields of every request, as the endpoint understands them.
        insecure: allow http to another machine.

    Raises `InputError` for a field out of range, `EndpointError` where the served models had to be asked for and cannot
    be.
    """
    address = base_url(url, insecure)
    retry = retries if isinstance(retries, Retry) else Retry(retries)
    connection = Connection(address, read_key(key_env), retry, timeout, max_concurrency)
    served = model or urlsplit(url).fragment or _only_model(connection)
    dialect = Dialect(served, chat, prefill, send_seed, max_choices, length_field, tuple(end_tokens), dict(extra or {}))
    return EndpointModel(connection, dialect, top_logprobs, name or f"{address}#{served}")


def _only_model(connection: Connection) -> str:
    listed = connection.get("/models")
    entries = listed.get("data") if isinstance(listed, dict) else None
    names = [str(entry["id"]) for entry in entries or () if isinstance(entry, dict) and "id" in entry]
    if len(names) != 1:
        raise InputError("model", None, f"the name of a model of {connection.url}: {', '.join(names[:20]) or 'none'}")
    return names[0]


class EndpointModel(Model):
    """A model of which nothing is known but what it answers. Close it, or use it in a `with` block, to close its
    sockets.
    """

    max_rows = 1024

    def __init__(self, connection: Connection, dialect: Dialect, top_logprobs: int, name: str) -> None:
        whole = isinstance(top_logprobs, int) and 1 <= top_logprobs <= 20
        check(whole, "top_logprobs", top_logprobs, "1 to 20")
        self.connection, self.dialect, self.top_logprobs, self.name = connection, dialect, top_logprobs, name

    def __repr__(self) -> str:
        return f"EndpointModel({self.url!r}, model={self.dialect.model!r})"

    def __enter__(self) -> EndpointModel:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        self.connection.close()

    @property
    def url(self) -> str:
        return self.connection.url

    def show(self, prompt: Prompt) -> Any:
        """The prompt as it appears in results."""
        return shown(prompt)

    def process(
        self,
        *,
        block: int | None = None,
        top_logprobs: int | None = None,
        logprobs: bool = False,
        results: str | Path | Results | None = None,
        base: str = "truncated",
        **settings: Any,
    ) -> EndpointProcess:
        """The model as a `Process`, with settings of decoding: `max_new_tokens`, `temperature`, `top_p`, `stop`, and
        `top_k` and `min_p` where the endpoint has them.

        Args:
            block: tokens of one step; None draws whole texts. Samplers that weigh or choose on the way need it.
            top_logprobs: draw every token here, from this many candidates, also without edits.
            logprobs: ask for the log-probabilities of texts that the endpoint draws.
            results: a file in which answers are kept.
            base: of samplers that weigh, as for `EndpointProcess`.
        """
        for given in settings:
            check(given in _HONOURED, "generate()", given, ", ".join(_HONOURED))
        kept = Results(results) if isinstance(results, str | Path) else results
        return EndpointProcess(
            Endpoint(self.connection, self.dialect, kept),
            Decoding.create(**settings),
            block=block,
            top_logprobs=top_logprobs,
            candidates=self.top_logprobs,
            logprobs=logprobs,
            base=base,
        )

    def generate(
        self,
        prompts: Prompts = "",
        *,
        seed: int | None = None,
        results: str | Path | None = None,
        **request: Any,
    ) -> Any:
        """Generate for every prompt; `request` is as for other models (`steer.model.Model.generate`). See
        `EndpointProcess` for what is exact and what is not.

        Args:
            results: a file in which answers are kept as they come, and from which a repeat with the same seed takes
                those that are there.

        Raises:
            InputError: a field is out of range; nothing has been asked.
            EndpointError: the endpoint failed for good; its `samples` are the texts that were finished.
        """
        check(results is None or seed is not None, "seed", seed, "an integer: results are found again by it")
        return super().generate(prompts, seed=seed, results=results, **request)

    def run(self, plan: Plan) -> Samples:
        keeping = _Keeping(plan.sampler)
        try:
            return execute(replace(plan, sampler=keeping))
        except EndpointError as error:
            if error.samples is not None:
                error.samples = Samples.join([*keeping.batches, error.samples])
            raise


@dataclass(frozen=True)
class _Keeping(Sampler):
    """A sampler whose results are kept, batch by batch, until all have come."""

    inner: Sampler
    batches: list[Samples] = field(default_factory=list)

    def updates(self, process: Process) -> int:
        return self.inner.updates(process)

    def run(self, process: Process, prompts: Sequence[Prompt], **settings: Any) -> Samples:
        self.batches.append(super().run(process, prompts, **settings))
        return self.batches[-1]

    def begin(self, process: Process, prompts: Sequence[Prompt], **settings: Any) -> Run:
        return self.inner.begin(process, prompts, **settings)

    def draw(self, run: Run) -> Samples:
        return self.inner.draw(run)

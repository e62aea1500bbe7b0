"""Requests and answers as OpenAI's clients write and read them, with `steer` beside their fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from steer.serving.wire import SteerRequest, encodable

__all__ = [
    "Artifact",
    "ArtifactList",
    "ChatAnswer",
    "ChatRequest",
    "CompletionAnswer",
    "CompletionRequest",
    "Deleted",
    "ErrorAnswer",
    "Health",
    "Model",
    "ModelList",
    "RegisterRequest",
    "RewardList",
]


Text = Annotated[StrictStr, AfterValidator(encodable)]
Number = StrictFloat | StrictInt
Count = StrictInt


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------- requests


def _says_nothing(value: Any) -> bool:
    return value is None or value in ("", [], {})


class _FromClients(_Request):
    """What OpenAI's clients send. A field that is null or empty says nothing, whatever it is called: clients write out
    what their types have, and send a message back as it came.
    """

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {k: v for k, v in given.items() if not (_says_nothing(v) and _is_absent(cls.model_fields.get(k)))}


def _same(value: Any, other: Any) -> bool:
    """Equal, and either both or neither a truth."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _is_absent(field: FieldInfo | None) -> bool:
    """Whether there is no such field, or none that could be anything."""
    return field is None or field.annotation is type(None)


def _ignored(text: str = "Ignored.") -> Any:
    return Field(default=None, description=text)


class TextPart(_FromClients):
    """A part of a message; text is all there is."""

    type: Literal["text"]
    text: Text
    cache_control: dict[str, Any] | None = _ignored()


_NULL_FROM_THE_ASSISTANT: list[JsonValue] = [
    {"properties": {"role": {"enum": ["system", "developer", "user"]}, "content": {"type": ["string", "array"]}}},
    {"properties": {"role": {"const": "assistant"}}},
]
"""For the server's description: whose content may be null."""


class Message(_FromClients):
    """One message of a chat. A chat that ends with the assistant's own words is continued there.

    An answer's message can be sent back as it came: what an assistant's message has beside its text is taken where it
    is empty, and a content that is null is an empty text.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": _NULL_FROM_THE_ASSISTANT})
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None
    name: Text | None = None
    prefix: StrictBool | None = Field(default=None, description="Mistral's and DeepSeek's: this reply is continued.")
    refusal: None = _ignored("Taken where empty.")
    annotations: None = _ignored("Taken where empty.")
    audio: None = _ignored("Taken where empty.")
    tool_calls: None = _ignored("Taken where empty.")
    function_call: None = _ignored("Taken where empty.")

    @field_validator("content")
    @classmethod
    def _has_text(cls, content: Any, about: ValidationInfo) -> Any:
        if content is None and about.data.get("role") != "assistant":
            raise ValueError("allowed: a text, or parts of one; null from the assistant alone")
        return content

    def plain(self) -> dict[str, str]:
        """As the chat template reads it."""
        parts = [] if self.content is None else self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_FromClients):
    """`include_usage` sends the usage in a last chunk without choices."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool | None = _ignored()


class ResponseFormat(_FromClients):
    """Text is all there is."""

    type: Literal["text"]


_OFF: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "length_penalty": 1,
    "min_tokens": 0,
    "no_repeat_ngram_size": 0,
    "priority": 0,
    "repetition_penalty": 1,
    "safe_prompt": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "stop": "",
    "use_beam_search": False,
}
"""Settings of other servers at the value that changes nothing, as their clients write them out."""
_OF_NO_MATTER = ("cache_prompt", "keep_alive", "request_id")
"""Fields of other servers that say nothing about the text."""


class _Common(_FromClients):
    @model_validator(mode="before")
    @classmethod
    def _without_what_is_off(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        off = {k for k in given if k in _OF_NO_MATTER or (k in _OFF and _same(given[k], _OFF[k]))}
        kept = {k: v for k, v in given.items() if k not in off}
        # vLLM's way to say that nothing is cut off.
        return kept | {"top_k": 0} if _same(kept.get("top_k"), -1) else kept

    model: Text
    n: Annotated[Count, Field(ge=1)] | None = None
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Count, Field(ge=0, lt=2**31)] | None = Field(default=None, description="Not OpenAI's; 0 is off.")
    min_p: Annotated[Number, Field(ge=0, lt=1)] | None = Field(default=None, description="Not OpenAI's; 0 is off.")
    stop: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = None
    seed: Annotated[Count, Field(ge=-(2**63), lt=2**64)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=1024)
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    steer: SteerRequest | None = None
    user: Text | None = _ignored()
    metadata: dict[str, Any] | None = _ignored()
    store: StrictBool | None = _ignored("Ignored: nothing is stored.")
    service_tier: Text | None = _ignored()
    prompt_cache_key: Text | None = _ignored()
    prompt_cache_retention: Text | None = _ignored()
    safety_identifier: Text | None = _ignored()


_CONTINUED = "a chat that ends with the assistant's own words is continued, every other is answered"


class ChatRequest(_Common):
    """A request for `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Count, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = _ignored("Text is all there is.")
    tools: None = _ignored("Not supported.")
    functions: None = _ignored("Not supported.")
    tool_choice: Literal["none", "auto"] | None = _ignored("Ignored: there are no tools.")
    function_call: Literal["none", "auto"] | None = _ignored("Ignored: there are no functions.")
    parallel_tool_calls: StrictBool | None = _ignored("Ignored: there are no tools.")
    prediction: dict[str, Any] | None = _ignored("Ignored: it would change how fast the text comes, not the text.")
    continue_final_message: StrictBool | None = Field(default=None, description="Not OpenAI's; see `messages`.")
    add_generation_prompt: StrictBool | None = Field(default=None, description="Not OpenAI's; see `messages`.")

    @field_validator("messages")
    @classmethod
    def _prefix_is_last(cls, messages: list[Message]) -> list[Message]:
        *before, last = messages
        if any(m.prefix for m in before) or last.prefix not in (None, last.role == "assistant"):
            raise ValueError(f"allowed: prefix in the last message alone; {_CONTINUED}")
        return messages

    @field_validator("continue_final_message", "add_generation_prompt")
    @classmethod
    def _as_it_ends(cls, given: bool | None, about: ValidationInfo) -> bool | None:
        ends = about.data.get("messages")
        if given is not None and ends:
            continued = ends[-1].role == "assistant"
            if (given is continued) is not (about.field_name == "continue_final_message"):
                raise ValueError(f"allowed: the other; {_CONTINUED}")
        return given


class CompletionRequest(_Common):
    """A request for `/v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Count], Field(min_length=1)]
        | Annotated[list[Annotated[list[Count], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[Count, Field(ge=0, le=5)] | None = None
    echo: StrictBool | None = Field(default=None, description="Begin with the prompt, with its logprobs where asked.")
    suffix: None = Field(default=None, description="Not supported.")
    best_of: Literal[1] | None = Field(default=None, description="Use steer.sampler best-of-n.")


Name = Annotated[Text, Field(max_length=256)]


class RegisterRequest(_Request):
    """Register a file that lies in the configured folder."""

    file: Name
    name: Name | None = None


class RegisterReward(_Request):
    """Give a reward a name: an expression of others, a reward model's folder in the configured folder, or a registered
    artifact of kind reward.
    """

    name: Name
    reward: Annotated[Text, Field(max_length=4096)] | None = None
    folder: Name | None = None
    label: Name | None = None
    """Of the model's classes, where it has several: the reward is its log-probability."""
    file: Name | None = None
    options: Annotated[Text, Field(max_length=1024)] | None = None
    """Of the file, as in an expression: how=worst, attribute=safe, or angle=20."""


# ----------------------------------------------------------------------------------------------------------- answers


class PromptDetails(BaseModel):
    cached_tokens: int = 0


class Usage(BaseModel):
    """`completion_tokens` are those of the choices that came back; `steer.cost` counts every candidate's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()


class CostAnswer(BaseModel):
    """What a request took, over all candidates."""

    prompt_tokens: int
    generated_tokens: int
    model_calls: int
    nfe: int
    reward_calls: int
    critic_calls: int
    price: float
    seconds: float


class SteerChoice(BaseModel):
    """The reward of a choice, and the drift of its law from the unsteered model in nats."""

    reward: float | None
    kl: float | None


class ReadChoice(SteerChoice):
    """The same of a choice with readings."""

    readings: dict[str, list[float | None]]
    """A number for each token that was drawn, the end of the text included, by name."""
    stopped: bool
    """Whether `stop_if` ended it."""


class SteerAnswer(BaseModel):
    """The best reward and the mean drift over the choices, the texts that were drawn, and what it took."""

    reward: float | None
    candidates: int
    kl: float | None
    cost: CostAnswer


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


Reason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason
    steer: ReadChoice | SteerChoice | None = None


class ChatAnswer(BaseModel):
    """The answer of `/v1/chat/completions`. `steer` is there where the request had it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    steer: SteerAnswer | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Reason
    steer: ReadChoice | SteerChoice | None = None


class CompletionAnswer(BaseModel):
    """The answer of `/v1/completions`. `steer` is there where the request had it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    steer: SteerAnswer | None = None


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Every error has this shape."""

    error: ErrorBody


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "steer"
    max_model_len: int | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Artifact(BaseModel):
    """A registered artifact. One that lies in the folder itself is `fixed`: it is never evicted."""

    id: str
    object: Literal["steer.artifact"] = "steer.artifact"
    kind: str
    bytes: int
    sha256: str
    created: int
    fixed: bool
    layers: list[int]
    settings: dict[str, Any]
    model: dict[str, Any]


class ArtifactList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Artifact]


class Deleted(BaseModel):
    id: str
    object: Literal["steer.artifact", "steer.reward"] = "steer.artifact"
    deleted: Literal[True] = True


class Reward(BaseModel):
    """A reward that requests may name, and how it is written or what it stands for."""

    id: str
    object: Literal["steer.reward"] = "steer.reward"
    usage: str
    fixed: bool
    """Whether it cannot be deleted."""


class RewardList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Reward]


class Health(BaseModel):
    status: Literal["ok", "draining", "waiting"]
    waiting: list[str] = []
    """Artifacts that the server was told to wait for and that are not registered yet."""


class Capabilities(BaseModel):
    """What a server can do."""

    object: Literal["steer.capabilities"] = "steer.capabilities"
    version: str
    """Of steer."""
    engine: str
    model: str
    max_model_len: int | None
    samplers: dict[str, list[str]]
    """Samplers that requests may name, and the settings that each takes."""
    edits: list[str]
    """Kinds of artifacts that can be registered and named."""
    own_edits: list[str]
    """Edits that the engine has by itself."""
    inline_vectors: bool
    """Whether requests may bring vectors of their own."""
    rewards: list[str]
    limits: dict[str, int]
    registering: bool
    """Whether clients may register artifacts and rewards."""
    shared: bool
    """Whether what is registered here is known to every server of the same folder."""

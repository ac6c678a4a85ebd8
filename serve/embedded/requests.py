"""What may be asked of the embedded engine: the part of OpenAI's API that it implements. Any other key is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.embedded.sampling import MAX_LOGPROBS, Sampling

Ids = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1)]
Texts = Annotated[list[Annotated[str, Field(strict=True)]], Field(min_length=1)]


class Request(BaseModel):
    """A request's common base."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str


class Told(BaseModel):
    """Keys that OpenAI's clients send and that change no answer."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Generate(Sampling, Told):
    """What completions and chats share."""

    model: str
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    return_tokens_as_token_ids: bool = False
    """Name tokens by their number (`token_id:5`), so that none is lost where two look alike."""

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> "Generate":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: allowed with stream only")
        return self


class Complete(Generate):
    """The body of /v1/completions."""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None


class Chat(Generate):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "Chat":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: allowed with logprobs only")
        return self


class Tokenize(Request):
    """The body of /tokenize: a text, or a conversation."""

    prompt: str | None = None
    add_special_tokens: bool = True
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> "Tokenize":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class Adapter(BaseModel):
    """The body of /v1/load_lora_adapter and /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lora_name: str
    lora_path: str | None = None


class Read(Request):
    """The body of /v1/embeddings, /classify and /pooling: texts, or their tokens."""

    input: str | Texts | Ids | Annotated[list[Ids], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

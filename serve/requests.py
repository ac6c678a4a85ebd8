"""What may be asked: the bodies of all paths, one class each. The gateway checks them, the embedded engine reads them, and
`/openapi.json` is made of them, so that the same is refused in the same words whichever engine is behind.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tuner.errors import nearest

# As many alternatives as engines are started to give.
MAX_LOGPROBS = 5
# To one request; each of them counts as a row of the engine's.
MOST_ANSWERS = 128
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=2048)]
Input = str | Texts | Ids | Annotated[list[Ids], Field(min_length=1, max_length=2048)]
# Said where one of these is sent, since the reason is not that it is unknown.
REASONS = {
    "chat_template": "the template is the one that the model was trained with",
    "chat_template_kwargs": "the template is the one that the model was trained with",
    "continue_final_message": "an answer always begins as it was trained to",
    "functions": "it is OpenAI's old name for tools",
    "function_call": "it is OpenAI's old name for tool_choice",
    "previous_response_id": "nothing is kept between two requests",
    "reasoning": "no model here reasons apart from its answer",
}


class Form(BaseModel):
    """A body: unknown keys are refused, and text is not taken for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Sampling(Form):
    """The keys by which tokens are chosen, in completions and chats alike."""

    temperature: float | None = Field(1.0, ge=0.0, le=2.0)
    """0 takes the likeliest token."""
    top_p: float | None = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=-1, lt=2**31)
    """0 and -1 leave all tokens."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    """To vLLM -1 means none, so what is below 0 is refused."""
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    logit_bias: dict[Annotated[int, Field(ge=0, lt=2**31)], Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024
    )
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    ignore_eos: bool = False

    @property
    def stops(self) -> list[str]:
        """The texts at which an answer ends."""
        listed = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [each for each in listed if each]


ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys of a message. What a client got as an answer it may send back, with all keys of it that hold nothing.
SPOKEN = frozenset({"role", "content", "name", "tool_calls", "tool_call_id"})


def _said_by_somebody(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for at, turn in enumerate(messages):
        if turn.get("role") not in ROLES:
            raise ValueError(f"the role of turn {at} is {turn.get('role')!r:.40}, expected one of {', '.join(ROLES)}")
        for key in (key for key, value in turn.items() if value and key not in SPOKEN):
            raise ValueError(f"turn {at} has the key {key!r:.40}, which nothing here reads{nearest(key, SPOKEN)}")
        content = turn.get("content")
        calls = turn["role"] == "assistant" and turn.get("tool_calls")
        if not isinstance(content, str | list) and not (content is None and calls):
            raise ValueError(f"the content of turn {at} is {content!r:.40}, expected a text or a list of parts")
    return messages


Turns = Annotated[list[dict[str, Any]], Field(min_length=1), AfterValidator(_said_by_somebody)]


class Told(Form):
    """Keys that OpenAI's clients send and that change no answer; they go no further than the gateway."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class StreamOptions(Form):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Generate(Sampling, Told):
    """What completions and chats share."""

    model: str
    n: int | None = Field(1, ge=1, le=16)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    return_tokens_as_token_ids: bool = False
    """Name tokens by their number (`token_id:5`), so that none is lost where two look alike."""

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> "Generate":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams; add stream: true")
        return self


class Complete(Generate):
    """The body of /v1/completions."""

    prompt: Input
    max_tokens: int | None = Field(16, ge=1, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _few_at_once(self) -> "Complete":
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        if (len(self.prompt) if several else 1) * (self.n or 1) > MOST_ANSWERS:
            raise ValueError(f"prompts times n are more than {MOST_ANSWERS} answers; send several requests")
        return self


class Chat(Generate):
    """The body of /v1/chat/completions."""

    messages: Turns
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "Chat":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs are alternatives of logprobs; add logprobs: true")
        return self


class Respond(Told):
    """The body of /v1/responses."""

    model: str
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None
    background: Literal[False] | None = None


class Read(Form):
    """The body of /v1/classify and /v1/tokens/classify: texts, or their tokens."""

    model: str
    input: Input
    user: str | None = None


class Embed(Read):
    """The body of /v1/embeddings."""

    encoding_format: Literal["float", "base64"] = "float"


class Score(Form):
    """The body of /v1/score: texts on the left and on the right, under one or the other pair of names."""

    model: str
    text_1: str | Texts | None = None
    text_2: str | Texts | None = None
    queries: str | Texts | None = None
    documents: str | Texts | None = None
    user: str | None = None


class Rerank(Form):
    """The body of /v1/rerank."""

    model: str
    query: str = Field(min_length=1)
    documents: list[str | dict[str, Any]] = Field(min_length=1, max_length=1024)
    top_n: int | None = Field(None, ge=1, lt=2**31)
    return_documents: bool = True
    user: str | None = None


class Tokenize(Form):
    """The body of /tokenize: a text, or a conversation."""

    model: str
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Turns | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> "Tokenize":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class Adapter(Form):
    """The body of /v1/load_lora_adapter and /v1/unload_lora_adapter, which no client reaches."""

    lora_name: str
    lora_path: str | None = None


def mistake(form: type[BaseModel], error: ValidationError) -> str:
    """The first thing that is wrong with a body, in one sentence."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    key = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        why = REASONS.get(key)
        return f"{place!r:.80} is not taken from clients{f': {why}' if why else nearest(key, form.model_fields)}"
    others = [each["msg"] for each in error.errors(include_url=False, include_context=False) if each["loc"][:1] == first["loc"][:1]]
    if len(first["loc"]) > 1 and first["loc"][1] == "str" and len(others) > 1:
        return f"{key}: {' or '.join(dict.fromkeys(others)).lower()}"  # none of the types that it may have
    if first["type"] == "missing":
        return f"the key {place!r} is missing"
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first['msg']}"
    said = first["msg"].removeprefix("Value error, ")
    return f"{place}: {said}" if place else said

"""What clients may ask: each path with the heads that answer it, where the engine does, and the keys its body may have.

A key that is not here is refused by name: an engine would ignore it, or do with it what a client must not.
"""

from dataclasses import dataclass, field
from types import ModuleType

from serve.gateway import labels, rerank, responses, score, tags

SAMPLING = frozenset(
    {
        "model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "max_tokens", "presence_penalty",
        "frequency_penalty", "logit_bias", "ignore_eos", "stream", "stream_options", "response_format",
    }
)  # fmt: skip
# Clients of OpenAI's send these; they change no answer here, and go no further.
TOLD = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
CHAT = SAMPLING | TOLD | {
    "messages", "max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls",
}  # fmt: skip
COMPLETE = SAMPLING | TOLD | {"prompt", "logprobs", "prompt_logprobs", "return_tokens_as_token_ids"}
READ = frozenset({"model", "input", "user"})
# Said where one of these is sent, since the reason is not that it is unknown.
REASONS = {
    "chat_template": "the template is the one that the model was trained with",
    "chat_template_kwargs": "the template is the one that the model was trained with",
    "add_generation_prompt": "an answer always begins as it was trained to",
    "continue_final_message": "an answer always begins as it was trained to",
    "functions": "it is OpenAI's old name for tools",
    "function_call": "it is OpenAI's old name for tool_choice",
}


@dataclass(frozen=True)
class Question:
    """A path."""

    to: str
    """Where the engine answers it."""
    heads: frozenset[str]
    keys: frozenset[str]
    streams: bool = False
    translate: ModuleType | None = None
    """Turns bodies into those of `to` (`asks`) and answers back (`Telling`), where engines have no such path or say less."""
    needed: tuple[str, ...] = field(default=())


CAUSAL, EMBEDDING = frozenset({"causal"}), frozenset({"embedding"})
SURFACE = {
    "/v1/chat/completions": Question("/v1/chat/completions", CAUSAL, CHAT, streams=True, needed=("messages",)),
    "/v1/completions": Question("/v1/completions", CAUSAL, COMPLETE, streams=True, needed=("prompt",)),
    "/v1/responses": Question(
        "/v1/chat/completions", CAUSAL, responses.KEYS | TOLD, streams=True, translate=responses, needed=("input",)
    ),
    "/v1/embeddings": Question("/v1/embeddings", EMBEDDING, READ | {"encoding_format"}, needed=("input",)),
    "/v1/score": Question("/v1/embeddings", EMBEDDING, score.KEYS | TOLD, translate=score),
    "/v1/rerank": Question("/v1/embeddings", EMBEDDING, rerank.KEYS | TOLD, translate=rerank, needed=("query", "documents")),
    "/v1/classify": Question("/classify", frozenset({"sequence"}), READ, translate=labels, needed=("input",)),
    "/v1/tokens/classify": Question("/pooling", frozenset({"token"}), READ, translate=tags, needed=("input",)),
    "/tokenize": Question(
        "/tokenize",
        frozenset({"causal", "embedding", "sequence", "token"}),
        frozenset({"model", "prompt", "add_special_tokens", "messages", "tools", "add_generation_prompt"}),
    ),
}


def paths_of(head: str) -> list[str]:
    """What a model with this head answers."""
    return [path for path, question in SURFACE.items() if head in question.heads]


def unknown_key(path: str, asked: dict[str, object]) -> str | None:
    """What is wrong with the keys of a body, in one sentence, or None."""
    question = SURFACE[path]
    for key in asked:
        if key not in question.keys:
            why = REASONS.get(key, f"{path} takes {', '.join(sorted(question.keys - TOLD))}")
            return f"{key!r:.80} is not taken from clients: {why}"
    if missing := [key for key in question.needed if key not in asked]:
        return f"the key {missing[0]!r} is missing"
    return None

"""What clients may ask: each path with the heads that answer it, where the engine does, and the form of its body.

A key that the form has not is refused by name: an engine would ignore it, or do with it what a client must not.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError

from serve import requests
from serve.gateway import labels, rerank, responses, score, tags

# They change no answer here, and go no further.
TOLD = frozenset(requests.Told.model_fields)


@dataclass(frozen=True)
class Question:
    """A path."""

    to: str
    """Where the engine answers it."""
    heads: frozenset[str]
    form: type[BaseModel]
    streams: bool = False
    translate: ModuleType | None = None
    """Turns bodies into those of `to` (`asks`) and answers back (`Telling`), where engines have no such path or say less."""


CAUSAL, EMBEDDING = frozenset({"causal"}), frozenset({"embedding"})
SURFACE = {
    "/v1/chat/completions": Question("/v1/chat/completions", CAUSAL, requests.Chat, streams=True),
    "/v1/completions": Question("/v1/completions", CAUSAL, requests.Complete, streams=True),
    "/v1/responses": Question("/v1/chat/completions", CAUSAL, requests.Respond, streams=True, translate=responses),
    "/v1/embeddings": Question("/v1/embeddings", EMBEDDING, requests.Embed),
    "/v1/score": Question("/v1/embeddings", EMBEDDING, requests.Score, translate=score),
    "/v1/rerank": Question("/v1/embeddings", EMBEDDING, requests.Rerank, translate=rerank),
    "/v1/classify": Question("/classify", frozenset({"sequence"}), requests.Read, translate=labels),
    "/v1/tokens/classify": Question("/pooling", frozenset({"token"}), requests.Read, translate=tags),
    "/tokenize": Question("/tokenize", frozenset({"causal", "embedding", "sequence", "token"}), requests.Tokenize),
}


def paths_of(head: str) -> list[str]:
    """What a model with this head answers."""
    return [path for path, question in SURFACE.items() if head in question.heads]


def wrong(path: str, body: bytes) -> str | None:
    """What is wrong with a body, in one sentence, or None."""
    form = SURFACE[path].form
    try:
        form.model_validate_json(body)
    except ValidationError as error:
        return requests.mistake(form, error)
    return None


def document() -> dict[str, Any]:
    """All of it as OpenAPI 3.1 describes it."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {"Error": ERROR}
    refusals = {
        str(status): {"description": what, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
        for status, what in REFUSALS.items()
    }
    for path, question in SURFACE.items():
        form = question.form
        schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[form.__name__] = schema
        kinds = {"application/json": {"schema": {"type": "object"}}}
        if question.streams:
            kinds["text/event-stream"] = {}
        body = {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{form.__name__}"}}}}
        answers = {"200": {"description": "the answer", "content": kinds}, **refusals}
        paths[path] = {"post": {"summary": str(form.__doc__).splitlines()[0], "requestBody": body, "responses": answers}}
    for path in ("/health", "/ready", "/v1/models"):
        answer = {"application/json": {"schema": {"type": "object"}}}
        said = {"200": {"description": "the answer", "content": answer}, "503": {"description": "not ready", "content": answer}}
        paths[path] = {"get": {"responses": {**said, "401": refusals["401"]}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tuner", "version": "1", "description": "Models that were proven to be what was trained."},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


REFUSALS = {
    400: "the body cannot be answered", 401: "a valid key is missing", 404: "there is no such model", 408: "the body did not come",
    413: "the body is too large", 429: "the key has used what it may", 503: "the model cannot be asked now",
    504: "it took too long",
}  # fmt: skip
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}

"""Answers in numbers: vectors, and probabilities of labels."""

import asyncio
import base64
import struct
from collections.abc import Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from serve.embedded.served import CLIENT_LOOK_S, Refused, Served, failure
from serve.embedded.served import tokens as tokens_of
from serve.requests import Embed, Read


def reading(form: Callable[[Served, Any, int, Any], dict[str, Any]]) -> Any:
    """A route that answers each text with what `form` makes of its numbers."""

    async def answer(served: Served, body: Read, request: HttpRequest) -> Response:
        texts = await asyncio.to_thread(tokens_of, served, body.input)
        for number, ids in enumerate(texts):
            if len(ids) > served.longest:
                raise Refused(f"input {number} has {len(ids)} tokens, this model reads {served.longest}")
            if not ids or max(ids) >= served.vocabulary:
                raise Refused(f"input {number} is empty, or has a token that is none of the {served.vocabulary} of this model")
        futures = [served.worker.submit(ids) for ids in texts]  # type: ignore[arg-type]
        gathering = asyncio.gather(*map(asyncio.wrap_future, futures))  # type: ignore[arg-type]
        try:
            while not gathering.done():
                await asyncio.wait([gathering], timeout=CLIENT_LOOK_S)
                if not gathering.done() and await request.is_disconnected():
                    return failure(499, "the client went away")
            answers: list[Any] = gathering.result()
        except Exception as error:
            return failure(500, f"reading failed ({type(error).__name__}: {error})")
        finally:
            gathering.cancel()
        read = sum(map(len, texts))
        return JSONResponse(
            {
                "object": "list",
                "model": body.model,
                "data": [form(served, body, index, value) for index, value in enumerate(answers)],
                "usage": {"prompt_tokens": read, "total_tokens": read},
            }
        )

    return answer


def embedding(served: Served, body: Embed, index: int, value: list[float]) -> dict[str, Any]:  # noqa: ARG001 - common signature
    """A vector (D)."""
    packed = base64.b64encode(struct.pack(f"<{len(value)}f", *value)).decode() if body.encoding_format == "base64" else value
    return {"object": "embedding", "index": index, "embedding": packed}


def classes(served: Served, body: Read, index: int, value: list[float]) -> dict[str, Any]:  # noqa: ARG001 - common signature
    """The probability of each label (L)."""
    label = served.labels[value.index(max(value))] if len(served.labels) == len(value) else None
    return {"index": index, "label": label, "probs": value, "num_classes": len(value)}


def scores(served: Served, body: Read, index: int, value: list[list[float]]) -> dict[str, Any]:  # noqa: ARG001 - common signature
    """That of each token (T, L)."""
    return {"object": "pooling", "index": index, "data": value}

"""The one address that clients speak to: a few routes, forwarded to the engine that serves the model they name.

Everything else is 404: the engine behind has routes that no client should reach.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

# A request waits this long for the engine's next byte; a long answer without streaming sends none until it is whole.
READ_TIMEOUT_S = 600.0
MAX_BODY_BYTES = 16_000_000
# How often it is looked whether a client that waits for a whole answer is still there.
CLIENT_LOOK_S = 0.5


# What a client may ask of a model with each head, and where the engine answers it.
PATHS = {
    "causal": {"/v1/chat/completions": "/v1/chat/completions", "/v1/completions": "/v1/completions"},
    "embedding": {"/v1/embeddings": "/v1/embeddings"},
    "sequence": {"/v1/classify": "/classify"},
    "token": {"/v1/tokens/classify": "/pooling"},
}
POSTED = [path for paths in PATHS.values() for path in paths]


class Backend(Protocol):
    """An engine as the gateway sees it."""

    @property
    def head(self) -> str:
        """What its models answer with: a key of PATHS."""
        ...

    client: httpx.AsyncClient

    failure: str | None
    """Why it stays down, once it does."""

    @property
    def ready(self) -> bool:
        """It runs, and has answered its probe."""
        ...

    def suspect(self) -> None:
        """A request to it failed: look at it now rather than at the next turn."""
        ...


class Traffic:
    """Counts requests under way, and refuses new ones while the endpoint shuts down."""

    def __init__(self) -> None:
        self.active = 0
        self.draining = False


def gateway(models: dict[str, Backend], describe: Callable[[], list[dict[str, Any]]], traffic: Traffic) -> Starlette:
    """The application. `models` maps a served name to its engine, `describe` gives the entries of /v1/models."""

    async def list_models(request: Request) -> Response:  # noqa: ARG001 - the signature is Starlette's
        return JSONResponse({"object": "list", "data": describe()})

    async def forward(request: Request) -> Response:
        if traffic.draining:
            return failure(503, "the endpoint is shutting down", "service_unavailable", retry=True)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return failure(413, f"the request has more than the {MAX_BODY_BYTES} bytes allowed", "invalid_request_error")
        try:
            asked = json.loads(body)
            name, stream = asked["model"], bool(asked.get("stream"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return failure(400, 'the body must be a JSON object with the key "model"', "invalid_request_error")
        if not isinstance(name, str) or name not in models:
            return failure(404, f"there is no model {name!r} here; there is: {', '.join(models)}", "model_not_found")
        backend = models[name]
        paths = PATHS[backend.head]
        if request.url.path not in paths:
            text = f"{name} answers POST {', '.join(paths)}; it has a {backend.head} head"
            return failure(400, text, "invalid_request_error")
        if backend.failure:
            return failure(503, f"the engine of {name} does not stay up and was given up", "service_unavailable")
        if not backend.ready:
            return failure(503, f"the engine of {name} is starting or being restarted", "service_unavailable", retry=True)
        return await _pass_on(request, paths[request.url.path], bytes(body), backend, traffic, stream=stream)

    async def unknown(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        text = "there is no such path" if status == 404 else "this path takes no such method"
        return failure(
            status, f"{request.method} {request.url.path}: {text}; there is {', '.join(ROUTES)}", "invalid_request_error"
        )

    routes = [Route("/v1/models", list_models, methods=["GET"]), *(Route(path, forward, methods=["POST"]) for path in POSTED)]
    return Starlette(routes=routes, exception_handlers={HTTPException: unknown})


ROUTES = ("GET /v1/models", *(f"POST {path}" for path in POSTED))


def failure(status: int, message: str, kind: str, *, retry: bool = False) -> JSONResponse:
    """An error in OpenAI's form, which its clients turn into their own exceptions."""
    headers = {"retry-after": "5"} if retry else None
    return JSONResponse(failure_body(status, message, kind), status, headers)


def failure_body(status: int, message: str, kind: str) -> dict[str, Any]:
    """The JSON of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


async def _pass_on(asked: Request, path: str, body: bytes, backend: Backend, traffic: Traffic, *, stream: bool) -> Response:
    traffic.active += 1
    reply: httpx.Response | None = None
    try:
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=2.0)
        request = backend.client.build_request(
            "POST", path, content=body, timeout=timeout, headers={"content-type": "application/json"}
        )
        reply = await _unless_gone(asked, backend.client.send(request, stream=True))
        if reply is None:
            traffic.active -= 1
            return failure(499, "the client went away", "invalid_request_error")
        if stream and reply.status_code == 200:
            return StreamingResponse(_chunks(reply, backend, traffic), media_type="text/event-stream")
        content = await reply.aread()
    except httpx.HTTPError as error:
        backend.suspect()
        traffic.active -= 1
        return failure(503, f"the engine did not answer ({type(error).__name__})", "service_unavailable", retry=True)
    except BaseException:
        traffic.active -= 1
        raise
    traffic.active -= 1
    await reply.aclose()
    if reply.status_code >= 500:
        # The engine's own words for "my core died" are a 500; whether it is so is for the supervisor to see.
        backend.suspect()
        return failure(503, "the engine failed on this request", "service_unavailable", retry=True)
    return Response(content, reply.status_code, media_type=reply.headers.get("content-type", "application/json"))


async def _unless_gone(asked: Request, work: Coroutine[Any, Any, httpx.Response]) -> httpx.Response | None:
    """The engine's reply, or None where the client leaves first: the engine then stops working for nobody."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=CLIENT_LOOK_S)
            if not task.done() and await asked.is_disconnected():
                return None
        return task.result()
    finally:
        task.cancel()


async def _chunks(reply: httpx.Response, backend: Backend, traffic: Traffic) -> AsyncIterator[bytes]:
    """The engine's events as they come; an engine that dies in the middle is told to the client as an error event."""
    try:
        async for chunk in reply.aiter_raw():
            yield chunk
    except httpx.HTTPError:
        backend.suspect()
        error = failure_body(503, "the engine died while it was answering", "service_unavailable")
        yield f"data: {json.dumps(error)}\n\n".encode()
    finally:
        traffic.active -= 1
        with suppress(httpx.HTTPError):
            await reply.aclose()

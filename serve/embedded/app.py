"""The embedded engine's routes: those of vLLM that the endpoint uses, with the same bodies and answers."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.embedded.generation import Generator
from serve.embedded.numbers import classes, embedding, reading, scores
from serve.embedded.served import Refused, Served, failure, render
from serve.embedded.words import chat, complete
from serve.requests import Adapter, Chat, Complete, Embed, Read, Tokenize, mistake

Body = TypeVar("Body", bound=BaseModel)


def application(served: Served) -> Starlette:
    """The engine's HTTP side."""
    looks = _Looks(served)
    routes = [
        Route("/health", looks.health),
        Route("/metrics", looks.metrics),
        Route("/tokenize", _route(served, Tokenize, _tokenize), methods=["POST"]),
    ]
    if isinstance(served.worker, Generator):
        routes += [
            Route("/v1/completions", _route(served, Complete, complete), methods=["POST"]),
            Route("/v1/chat/completions", _route(served, Chat, chat), methods=["POST"]),
            Route("/v1/load_lora_adapter", _route(served, Adapter, _load), methods=["POST"]),
            Route("/v1/unload_lora_adapter", _route(served, Adapter, _unload), methods=["POST"]),
        ]
    else:
        for path, body, form in (("/v1/embeddings", Embed, embedding), ("/classify", Read, classes), ("/pooling", Read, scores)):
            routes.append(Route(path, _route(served, body, reading(form)), methods=["POST"]))
    return Starlette(routes=routes)


class _Looks:
    """What is looked at from outside, in the form of the other engine."""

    def __init__(self, served: Served) -> None:
        self._served = served

    async def health(self, request: HttpRequest) -> Response:  # noqa: ARG002 - Starlette's signature
        return Response(status_code=200 if self._served.worker.alive else 503)

    async def metrics(self, request: HttpRequest) -> Response:  # noqa: ARG002 - Starlette's signature
        running, waiting = self._served.worker.load
        return Response(f"num_requests_running {running}\nnum_requests_waiting {waiting}\n", media_type="text/plain")


def _route(served: Served, form: type[Body], answer: Callable[[Served, Any, HttpRequest], Any]) -> Any:
    async def handle(request: HttpRequest) -> Response:
        try:
            body = form.model_validate_json(await request.body())
            name = getattr(body, "model", served.names[0])
            if name not in served.names:
                raise Refused(f"there is no model {name!r} here", 404)
            response: Response = await answer(served, body, request)
        except ValidationError as error:
            return failure(400, mistake(form, error))
        except Refused as error:
            return failure(error.status, str(error))
        return response

    return handle


def _generator(served: Served) -> Generator:
    assert isinstance(served.worker, Generator)  # or the route would not be there
    return served.worker


async def _load(served: Served, body: Adapter, request: HttpRequest) -> Response:  # noqa: ARG001 - common signature
    if body.lora_name in served.names or not body.lora_path or len(served.names) == 1:
        raise Refused(f"{body.lora_name} is there already, or has no path, or this engine was started without adapters")
    try:
        await asyncio.wrap_future(_generator(served).load_adapter(body.lora_name, body.lora_path))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise Refused(f"{body.lora_path}: cannot be loaded ({error})") from None
    served.names.append(body.lora_name)
    return JSONResponse({})


async def _unload(served: Served, body: Adapter, request: HttpRequest) -> Response:  # noqa: ARG001 - common signature
    if body.lora_name not in served.names[1:]:
        raise Refused(f"there is no adapter {body.lora_name!r} here", 404)
    served.names.remove(body.lora_name)
    await asyncio.wrap_future(_generator(served).unload_adapter(body.lora_name))
    return JSONResponse({})


async def _tokenize(served: Served, body: Tokenize, request: HttpRequest) -> Response:  # noqa: ARG001 - common signature
    if body.messages is not None:
        ids = await asyncio.to_thread(render, served, body.messages, body.tools, begin_answer=body.add_generation_prompt)
    else:
        told = await asyncio.to_thread(served.tokenizer, body.prompt, add_special_tokens=body.add_special_tokens)
        ids = told["input_ids"]
    return JSONResponse({"count": len(ids), "max_model_len": served.longest, "tokens": ids})

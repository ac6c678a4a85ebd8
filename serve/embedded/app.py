"""The embedded engine's routes: those of vLLM that the endpoint uses, with the same bodies and answers."""

import asyncio
import base64
import json
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.embedded.answers import Calls, Text
from serve.embedded.generation import Generator, Job, Token
from serve.embedded.reading import Reader
from serve.embedded.sampling import Chooser
from serve.requests import Adapter, Chat, Complete, Embed, Generate, Read, Tokenize, mistake

# How often it is looked whether a client that waits for a whole answer is still there.
CLIENT_LOOK_S = 0.25
Body = TypeVar("Body", bound=BaseModel)


class Refused(Exception):
    """A request that cannot be answered: the reason goes to the client, with 400 or another status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Served:
    """What the engine serves."""

    names: list[str]
    """The base's name, then those of its adapters."""
    tokenizer: Any
    longest: int
    """Tokens of prompt and answer together."""
    ends: frozenset[int]
    worker: Generator | Reader
    labels: list[str] = field(default_factory=list)
    vocabulary: int = 0
    guide: Any = None
    """The tokenizer as llguidance reads it, or the ValueError that says why it cannot."""


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
            Route("/v1/completions", _route(served, Complete, _complete), methods=["POST"]),
            Route("/v1/chat/completions", _route(served, Chat, _chat), methods=["POST"]),
            Route("/v1/load_lora_adapter", _route(served, Adapter, _load), methods=["POST"]),
            Route("/v1/unload_lora_adapter", _route(served, Adapter, _unload), methods=["POST"]),
        ]
    else:
        for path, body, form in (("/v1/embeddings", Embed, _embedding), ("/classify", Read, _classes), ("/pooling", Read, _scores)):
            routes.append(Route(path, _route(served, body, _reading(form)), methods=["POST"]))
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
            return _error(400, mistake(form, error))
        except Refused as error:
            return _error(error.status, str(error))
        return response

    return handle


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


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
        ids = _render(served, body.messages, body.tools, begin_answer=body.add_generation_prompt)
    else:
        ids = served.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens)["input_ids"]
    return JSONResponse({"count": len(ids), "max_model_len": served.longest, "tokens": ids})


def _render(served: Served, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, begin_answer: bool) -> list[int]:
    """The conversation as the tokens that training saw; raises Refused with what the template says against it."""
    from jinja2 import TemplateError

    if not served.tokenizer.chat_template:
        raise Refused("this model has no chat template; ask /v1/completions")
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise Refused(f"messages.{number}.role: must be a text")
    plain = [{**message, "content": _words(number, message)} for number, message in enumerate(messages)]
    try:
        text = served.tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=begin_answer)
    except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise Refused(f"the chat template does not take these messages: {error}") from None
    ids: list[int] = served.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _words(number: int, message: dict[str, Any]) -> Any:
    """A content that comes in parts as one text; models here read nothing but words."""
    content = message.get("content")
    if not isinstance(content, list):
        if content is not None and not isinstance(content, str):
            raise Refused(f"messages.{number}.content: must be a text or a list of parts")
        return content
    if any(not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str) for part in content):
        raise Refused(f"messages.{number}.content: only parts of type text can be read")
    return "\n".join(part["text"] for part in content)


async def _complete(served: Served, body: Complete, request: HttpRequest) -> Response:
    prompts = _tokens(served, body.prompt)
    top = body.logprobs
    answers = [
        _Answer(served, body, index * (body.n or 1) + copy, copy, ids, body.max_tokens, top, read_back=body.prompt_logprobs)
        for index, ids in enumerate(prompts)
        for copy in range(body.n or 1)
    ]
    return await _answered(_Completion(served, body, answers), request)


async def _chat(served: Served, body: Chat, request: HttpRequest) -> Response:
    tools = body.tools if body.tool_choice != "none" else None
    ids = _render(served, body.messages, tools, begin_answer=True)
    longest = body.max_completion_tokens or body.max_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    answers = [_Answer(served, body, copy, copy, ids, longest, top) for copy in range(body.n or 1)]
    return await _answered(_Conversation(served, body, answers, reads_calls=bool(tools)), request)


class _Answer:
    """One answer under way: its job, its text so far, and a queue of what the generator's thread tells."""

    def __init__(
        self,
        served: Served,
        body: Generate,
        index: int,
        copy: int,
        prompt: list[int],
        max_tokens: int | None,
        top: int | None,
        *,
        read_back: int | None = None,
    ) -> None:
        room = served.longest - len(prompt)
        if not prompt:
            raise Refused("the prompt is empty")
        if room < (max_tokens or 1):
            raise Refused(
                f"this model reads {served.longest} tokens, prompt and answer together; the prompt has {len(prompt)} and "
                f"{max_tokens or 1} are to follow"
            )
        if not max(prompt) < served.vocabulary:
            raise Refused(f"token {max(prompt)} is none of the {served.vocabulary} of this model")
        self.index, self.prompt, self.top, self.count = index, prompt, top, 0
        self.text = Text(served.tokenizer, prompt, body.stops)
        self.prompt_logprobs: list[Any] | None = None
        loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[Any] = asyncio.Queue()

        def hear(event: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self._told.put_nowait, event)

        self.job = Job(
            prompt,
            Chooser(body, copy=copy, grammar=_grammar(served, body.response_format)),
            max_tokens or room,
            frozenset() if body.ignore_eos else served.ends,
            hear,
            adapter=None if body.model == served.names[0] else body.model,
            top=max(top or 0, read_back or 0),
            read_back=self._read if read_back is not None else None,
        )

    def _read(self, values: list[tuple[float, list[tuple[int, float]], int]]) -> None:
        entries: list[Any] = [None]
        for token, (logprob, top, rank) in zip(self.prompt[1:], values, strict=True):
            best = {str(other): {"logprob": value, "rank": place} for place, (other, value) in enumerate(top, 1)}
            entries.append({str(token): {"logprob": logprob, "rank": rank}, **best})
        self.prompt_logprobs = entries

    async def pieces(self) -> AsyncIterator[tuple[str, list[Token], str | None]]:
        """(text, the tokens that it is made of, why it ends) as they come. Raises whatever ended the generation."""
        tokens: list[Token] = []
        while True:
            event = await self._told.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, str):
                yield self.text.rest(), tokens, event
                return
            self.count += 1
            tokens.append(event)
            piece = self.text.add(event.id)
            if self.text.stopped:
                self.job.stopped.set()
                yield piece, tokens, "stop"
                return
            if piece:
                yield piece, tokens, None
                tokens = []


class _Completion:
    """The form of /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, served: Served, body: Complete, answers: list[_Answer]) -> None:
        self.served, self.body, self.answers = served, body, answers

    def first(self, answer: _Answer) -> Iterator[dict[str, Any]]:  # noqa: ARG002 - common signature
        """What a stream begins with."""
        yield from ()

    def chunk(self, answer: _Answer, piece: str, tokens: list[Token], finish: str | None) -> Iterator[dict[str, Any]]:
        """What a stream tells of a piece."""
        yield {"index": answer.index, "text": piece, "logprobs": self._logprobs(answer, tokens), "finish_reason": finish}

    def whole(self, answer: _Answer, text: str, tokens: list[Token], finish: str) -> dict[str, Any]:
        """The answer at once."""
        (choice,) = self.chunk(answer, text, tokens, finish)
        return {**choice, "prompt_logprobs": answer.prompt_logprobs}

    def _logprobs(self, answer: _Answer, tokens: list[Token]) -> dict[str, Any] | None:
        if answer.top is None:
            return None
        named = [(self._name(each.id), {self._name(other): value for other, value in each.top[: answer.top]}) for each in tokens]
        return {
            "tokens": [name for name, _ in named],
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [
                {**top, name: each.logprob} if answer.top else None for (name, top), each in zip(named, tokens, strict=True)
            ],
            "text_offset": [],
        }

    def _name(self, token: int) -> str:
        return _token_name(self.served, self.body, token)


class _Conversation:
    """The form of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, served: Served, body: Chat, answers: list[_Answer], *, reads_calls: bool) -> None:
        self.served, self.body, self.answers = served, body, answers
        self._calls = {answer.index: Calls() for answer in answers} if reads_calls else {}

    def first(self, answer: _Answer) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        yield {"index": answer.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunk(self, answer: _Answer, piece: str, tokens: list[Token], finish: str | None) -> Iterator[dict[str, Any]]:
        """What a stream tells of a piece: words, calls that have become whole, the end."""
        calls = self._calls.get(answer.index)
        before = len(calls.found) if calls else 0
        found: list[dict[str, Any]] = []
        if calls:
            piece, found = calls.add(piece)
            piece += calls.rest() if finish else ""
            finish = "tool_calls" if finish == "stop" and calls.found else finish
        delta: dict[str, Any] = {"content": piece} if piece or not found else {}
        if found:
            delta["tool_calls"] = [{"index": before + at, **call} for at, call in enumerate(found)]
        yield {"index": answer.index, "delta": delta, "logprobs": self._logprobs(answer, tokens), "finish_reason": finish}

    def whole(self, answer: _Answer, text: str, tokens: list[Token], finish: str) -> dict[str, Any]:
        """The answer at once."""
        (choice,) = self.chunk(answer, text, tokens, finish)
        calls = self._calls[answer.index].found if self._calls else []
        message: dict[str, Any] = {"role": "assistant", "content": choice["delta"].get("content") or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": answer.index, "message": message, "logprobs": choice["logprobs"], "finish_reason": choice["finish_reason"],
        }  # fmt: skip

    def _logprobs(self, answer: _Answer, tokens: list[Token]) -> dict[str, Any] | None:
        if answer.top is None:
            return None
        return {
            "content": [
                {**self._entry(each.id, each.logprob), "top_logprobs": [self._entry(*other) for other in each.top[: answer.top]]}
                for each in tokens
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name = _token_name(self.served, self.body, token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}


def _token_name(served: Served, body: Generate, token: int) -> str:
    return f"token_id:{token}" if body.return_tokens_as_token_ids else str(served.tokenizer.decode([token]))


async def _answered(form: Any, request: HttpRequest) -> Response:
    """Start every answer; give them as events as they come, or at once when all have ended."""
    served: Served = form.served
    head = {"id": f"{form.prefix}-{uuid4().hex}", "created": int(time.time()), "model": form.body.model}
    for answer in form.answers:
        served.worker.submit(answer.job)
    if form.body.stream:
        return StreamingResponse(_events(form, {**head, "object": form.chunk_kind}), media_type="text/event-stream")
    gathering = asyncio.gather(*(_gathered(form, answer) for answer in form.answers))
    try:
        while not gathering.done():
            await asyncio.wait([gathering], timeout=CLIENT_LOOK_S)
            if not gathering.done() and await request.is_disconnected():
                return _error(499, "the client went away")
        choices = gathering.result()
    except Exception as error:
        return _error(500, f"the generation failed ({type(error).__name__}: {error})")
    finally:
        gathering.cancel()
        for answer in form.answers:
            answer.job.stopped.set()
    return JSONResponse({**head, "object": form.kind, "choices": choices, "usage": _usage(form.answers)})


async def _gathered(form: Any, answer: _Answer) -> dict[str, Any]:
    text, finish = "", "length"
    tokens: list[Token] = []
    async for piece, more, end in answer.pieces():
        text, tokens, finish = text + piece, tokens + more, end or finish
    choice: dict[str, Any] = form.whole(answer, text, tokens, finish)
    return choice


async def _events(form: Any, head: dict[str, Any]) -> AsyncIterator[bytes]:
    merged: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()

    async def follow(answer: _Answer) -> None:
        try:
            async for piece in answer.pieces():
                for choice in form.chunk(answer, *piece):
                    merged.put_nowait(choice)
            merged.put_nowait(None)
        except Exception as error:
            merged.put_nowait(error)

    tasks = [asyncio.ensure_future(follow(answer)) for answer in form.answers]
    try:
        for answer in form.answers:
            for choice in form.first(answer):
                yield _event({**head, "choices": [choice]})
        left = len(tasks)
        while left:
            told = await merged.get()
            if isinstance(told, Exception):
                message = f"the generation failed ({type(told).__name__}: {told})"
                yield _event({"error": {"message": message, "type": "server_error", "param": None, "code": 500}})
                return
            if told is None:
                left -= 1
            else:
                yield _event({**head, "choices": [told]})
        if form.body.stream_options and form.body.stream_options.include_usage:
            yield _event({**head, "choices": [], "usage": _usage(form.answers)})
        yield b"data: [DONE]\n\n"
    finally:
        # Also where the client went away: nothing is generated for nobody.
        for answer, task in zip(form.answers, tasks, strict=True):
            answer.job.stopped.set()
            task.cancel()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _usage(answers: list[_Answer]) -> dict[str, int]:
    read = sum({id(answer.prompt): len(answer.prompt) for answer in answers}.values())  # n answers to one prompt read it once
    written = sum(answer.count for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _grammar(served: Served, wanted: dict[str, Any] | None) -> Any:
    """What lets only tokens pass that keep to `response_format`; None where it asks for nothing."""
    kind = (wanted or {}).get("type", "text")
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise Refused(f"response_format.type: {kind!r} is none of text, json_object, json_schema")
    described = wanted.get("json_schema") if wanted and kind == "json_schema" else {}
    schema = described.get("schema") if isinstance(described, dict) and kind == "json_schema" else {"type": "object"}
    if not isinstance(schema, dict):
        raise Refused("response_format.json_schema.schema: is missing")
    if isinstance(served.guide, ValueError):
        raise Refused(f"response_format: cannot be kept to with this tokenizer ({served.guide})")
    from llguidance import LLMatcher

    # A model that may write white space may write nothing else until its answer is cut off.
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_flexible": False})
    matcher = LLMatcher(served.guide, grammar)
    if matcher.is_error():
        raise Refused(f"response_format.json_schema: {matcher.get_error().splitlines()[0]}")
    return matcher


def _tokens(served: Served, given: Any) -> list[list[int]]:
    """One text, several, the tokens of one, or of several: as lists of tokens."""
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    return [served.tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in given]


def _reading(form: Callable[[Served, Any, int, Any], dict[str, Any]]) -> Any:
    async def answer(served: Served, body: Read, request: HttpRequest) -> Response:
        texts = _tokens(served, body.input)
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
                    return _error(499, "the client went away")
            answers: list[Any] = gathering.result()
        except Exception as error:
            return _error(500, f"reading failed ({type(error).__name__}: {error})")
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


def _embedding(served: Served, body: Embed, index: int, value: list[float]) -> dict[str, Any]:  # noqa: ARG001 - common signature
    packed = base64.b64encode(struct.pack(f"<{len(value)}f", *value)).decode() if body.encoding_format == "base64" else value
    return {"object": "embedding", "index": index, "embedding": packed}


def _classes(served: Served, body: Read, index: int, value: list[float]) -> dict[str, Any]:  # noqa: ARG001 - common signature
    label = served.labels[value.index(max(value))] if len(served.labels) == len(value) else None
    return {"index": index, "label": label, "probs": value, "num_classes": len(value)}


def _scores(served: Served, body: Read, index: int, value: list[list[float]]) -> dict[str, Any]:  # noqa: ARG001 - common signature
    return {"object": "pooling", "index": index, "data": value}

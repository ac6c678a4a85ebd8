"""Answers in words: whole or as events, as completions or as a conversation."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any
from uuid import uuid4

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from serve.embedded.answers import Calls, Text
from serve.embedded.generation import Job, Token
from serve.embedded.sampling import Chooser
from serve.embedded.served import CLIENT_LOOK_S, Refused, Served, failure, render
from serve.embedded.served import tokens as tokens_of
from serve.requests import Chat, Complete, Generate


async def complete(served: Served, body: Complete, request: HttpRequest) -> Response:
    """`/v1/completions`. Raises Refused."""
    prompts = await asyncio.to_thread(tokens_of, served, body.prompt)  # a long text must not hold up the others
    top = body.logprobs
    answers = [
        _Answer(served, body, index * (body.n or 1) + copy, copy, ids, body.max_tokens, top, read_back=body.prompt_logprobs)
        for index, ids in enumerate(prompts)
        for copy in range(body.n or 1)
    ]
    return await _answered(_Completion(served, body, answers), request)


async def chat(served: Served, body: Chat, request: HttpRequest) -> Response:
    """`/v1/chat/completions`. Raises Refused."""
    tools = body.tools if body.tool_choice != "none" else None
    ids = await asyncio.to_thread(render, served, body.messages, tools, begin_answer=True)
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
                return failure(499, "the client went away")
        choices = gathering.result()
    except Exception as error:
        return failure(500, f"the generation failed ({type(error).__name__}: {error})")
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

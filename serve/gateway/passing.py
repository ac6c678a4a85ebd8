"""Passes a request on to an engine and its answer back, byte for byte but for the model's name.

The engine calls a model by its content, clients by their name for it. An answer that nobody waits for is ended at the engine, too.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from starlette.types import Receive, Send

from serve.gateway.surface import SURFACE, TOLD
from serve.state import Key
from serve.version import Version

CONNECT_TIMEOUT_S, LAST_WORDS_S = 2.0, 5.0
# As engines write them; in the text of an answer quotes have a backslash before them.
READ_TOKENS, WRITTEN_TOKENS = re.compile(rb'"prompt_tokens":(\d+)'), re.compile(rb'"completion_tokens":(\d+)')
ERROR = b'data: {"error"'
END = b"\n\n"


@dataclass
class Asked:
    """A request."""

    path: str
    request_id: str
    began: float
    """Monotonic seconds."""
    body: dict[str, Any] = field(default_factory=dict)
    key: Key | None = None
    version: str | None = None
    traceparent: str | None = None
    """W3C's header, by which a client's trace goes on here."""
    telling: Any = None
    """What tells the engine's answer in the words of the path that was asked, where these are others."""
    heard: bytearray | None = None
    """The answer as the client gets it, where it is to be compared."""


@dataclass
class Outcome:
    """How it went."""

    status: int
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_s: float | None = None
    """From the request to the first byte of the answer."""
    pieces: int = 0
    """Parts that a streamed answer came in."""
    reason: str = ""
    """What went wrong on the way, where something did."""


async def pass_on(asked: Asked, version: Version, receive: Receive, send: Send, *, timeout_s: float) -> Outcome:
    """Ask the version's engine and send its answer as it comes."""
    engine = version.engine
    assert engine is not None
    outcome = Outcome(200)
    stream = SURFACE[asked.path].streams and asked.body.get("stream") is True
    body = {key: value for key, value in asked.body.items() if key not in TOLD}
    body["model"] = version.served
    # Tokens are counted in streams, too; who has not asked for the count does not get it.
    options = body.get("stream_options") or {}
    hide_usage = stream and isinstance(options, dict) and not options.get("include_usage") and not asked.telling
    if hide_usage or (stream and asked.telling):
        body["stream_options"] = {**options, "include_usage": True}
    named = (f'"model":"{version.served}"'.encode(), f'"model":"{version.id}"'.encode())
    reply: aiohttp.ClientResponse | None = None
    begun = False
    leaving = _Leaving(receive)
    try:
        async with asyncio.timeout(timeout_s):
            if engine.session is None:
                raise aiohttp.ClientConnectionError
            reply = await engine.session.post(
                SURFACE[asked.path].to,
                data=json.dumps(body, separators=(",", ":")).encode(),
                headers={"content-type": "application/json", **({"traceparent": asked.traceparent} if asked.traceparent else {})},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            )
            outcome.status = reply.status
            outcome.first_s = time.monotonic() - asked.began
            if reply.status < 500:
                engine.heard = time.monotonic()
            if stream and reply.status == 200:
                begun = True
                await _begin(send, 200, b"text/event-stream", asked, version)
                for event in asked.telling.begin() if asked.telling else []:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                async for events in _whole_events(reply):
                    engine.heard = time.monotonic()
                    outcome.pieces += 1
                    if ERROR in events:
                        engine.suspect()
                        outcome.status, outcome.reason = 503, "the engine failed in the middle of its answer"
                    if b'"usage":{' in events:
                        _count(outcome, events)
                        if hide_usage:
                            events = _without_counts(events)
                    if asked.heard is not None:
                        asked.heard += events
                    if asked.telling:
                        events = b"".join(event for told in _told(events) for event in asked.telling.go_on(told))
                    await send({"type": "http.response.body", "body": events.replace(*named), "more_body": True})
                for event in asked.telling.end() if asked.telling else []:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                if asked.telling and asked.telling.failure:
                    outcome.status, outcome.reason = 503, str(asked.telling.failure)
                leaving.matters = False
                await send({"type": "http.response.body", "body": b""})
                return outcome
            content = await reply.read()
        leaving.matters = False
        if reply.status >= 500:
            # The engine's own words for "my core died" are a 500; whether it is so is for the supervisor to see.
            engine.suspect()
            outcome.status, outcome.reason = 503, f"the engine answered {reply.status}"
            await _fail(send, asked, version, outcome, "the engine failed on this request")
            return outcome
        _count(outcome, content)
        content = content.replace(*named)
        if asked.heard is not None:
            asked.heard += content
        if asked.telling and reply.status == 200:
            try:
                content = json.dumps(asked.telling.whole(json.loads(content)), ensure_ascii=False).encode()
            except (ValueError, KeyError, TypeError, IndexError) as error:
                outcome.status, outcome.reason = 503, f"the engine's answer cannot be read ({type(error).__name__}: {error})"
                await _fail(send, asked, version, outcome, outcome.reason)
                return outcome
        kind = reply.headers.get("content-type", "application/json").encode()
        await _begin(send, reply.status, kind, asked, version, length=len(content))
        await send({"type": "http.response.body", "body": content})
    except asyncio.CancelledError:
        if not leaving.took_place:
            raise
        outcome.status, outcome.reason = 499, "the client went away"
    except (aiohttp.ClientError, ConnectionError) as error:
        engine.suspect()
        outcome.status, outcome.reason = 503, f"the engine did not answer ({type(error).__name__})"
        await _fail(
            send, asked, version, outcome, "the engine died while it was answering" if begun else outcome.reason, begun=begun
        )
    except TimeoutError:
        outcome.status, outcome.reason = 504, f"the answer was not whole after {timeout_s:.0f} s"
        with suppress(TimeoutError):  # a client that reads nothing is not told, and its connection ends
            async with asyncio.timeout(LAST_WORDS_S):
                await _fail(send, asked, version, outcome, outcome.reason, begun=begun)
    finally:
        leaving.end()
        if outcome.status != 200:
            # What was cut off was not counted to its end; a piece is a token or more.
            outcome.completion_tokens = max(outcome.completion_tokens, outcome.pieces)
        if reply is not None:
            # The connection of a whole answer went back already; that of any other is ended, and with it the engine's work.
            reply.close()
    return outcome


class _Leaving:
    """Cancels the task that answers a client once that has left: nothing then waits for the engine any more."""

    def __init__(self, receive: Receive) -> None:
        self.matters = True
        self.took_place = False
        self._task = asyncio.current_task()
        self._watching = asyncio.ensure_future(self._watch(receive))

    def end(self) -> None:
        """The answer is given."""
        self.matters = False
        self._watching.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if self.matters and self._task is not None:
            self.took_place = True
            self._task.cancel()


async def _whole_events(reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """What has come, up to the end of an event."""
    held = b""
    while chunk := await reply.content.readany():
        data = held + chunk if held else chunk
        if data.endswith(END):
            held = b""
            yield data
            continue
        at = data.rfind(END) + len(END)
        whole, held = (data[:at], data[at:]) if at >= len(END) else (b"", data)
        if whole:
            yield whole
    if held:
        yield held


def _told(events: bytes) -> Iterator[dict[str, Any]]:
    """The JSON in events."""
    for event in events.split(END):
        if event.startswith(b"data: {"):
            yield json.loads(event[6:])


def _without_counts(events: bytes) -> bytes:
    """The events but for the one that only counts tokens."""
    kept = [event for event in events.split(END) if not (b'"choices":[]' in event and b'"usage":{' in event)]
    return END.join(kept)


def _count(outcome: Outcome, content: bytes) -> None:
    if found := READ_TOKENS.findall(content):
        outcome.prompt_tokens = int(found[-1])
    if found := WRITTEN_TOKENS.findall(content):
        outcome.completion_tokens = int(found[-1])


async def _begin(send: Send, status: int, kind: bytes, asked: Asked, version: Version, *, length: int | None = None) -> None:
    headers = [
        (b"content-type", kind),
        (b"x-request-id", asked.request_id.encode()),
        (b"x-tuner-version", version.id.encode()),
        (b"x-tuner-manifest", version.manifest.encode()),
    ]
    headers += [(b"content-length", str(length).encode())] if length is not None else [(b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _fail(send: Send, asked: Asked, version: Version, outcome: Outcome, message: str, *, begun: bool = False) -> None:
    """An error in OpenAI's form; in a stream that has begun as its last event."""
    error = {"error": {"message": message, "type": "service_unavailable", "param": None, "code": outcome.status}}
    content = json.dumps(error).encode()
    if begun:
        last = b"".join(asked.telling.end(message)) if asked.telling else b"data: " + content + END
        await send({"type": "http.response.body", "body": last})
        return
    await _begin(send, outcome.status, b"application/json", asked, version, length=len(content))
    await send({"type": "http.response.body", "body": content})

"""Asks a version in the shadow of another the same, compares what both say, and returns nothing of it to anybody."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp

from serve.gateway.passing import Asked
from serve.gateway.surface import SURFACE, TOLD
from serve.version import Version

# What is asked while so many shadows are at work is not compared: they must not slow down the answers that count.
MOST_AT_ONCE = 4
TIMEOUT_S = 600.0
# Numbers of two right computations of the same model are nearer than this.
SAME_NUMBER = 0.01


class Shadows:
    """Those under way."""

    def __init__(self, told: Callable[[Asked, Version, str], None]) -> None:
        self._told = told
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, asked: Asked, version: Version, answer: bytes) -> None:
        """Ask the shadow what was asked, and compare with the answer that the client got."""
        if len(self._tasks) >= MOST_AT_ONCE:
            self._told(asked, version, "skipped")
            return
        task = asyncio.ensure_future(self._compare(asked, version, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End those under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compare(self, asked: Asked, version: Version, answer: bytes) -> None:
        body = {key: value for key, value in asked.body.items() if key not in TOLD | {"stream", "stream_options"}}
        body["model"] = version.served
        engine = version.engine
        assert engine is not None
        version.active += 1
        result = "failed"
        try:
            if engine.session is not None:
                timeout = aiohttp.ClientTimeout(total=TIMEOUT_S, sock_connect=2.0)
                async with engine.session.post(SURFACE[asked.path].to, json=body, timeout=timeout) as reply:
                    other = await reply.read()
                    if reply.status == 200:
                        result = "same" if alike(said(answer), said(other)) else "different"
                        if result == "different" and _drawn(asked):
                            result = "drawn"  # by chance, so that the same model says something else, too
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            engine.suspect()
        finally:
            version.active -= 1
        self._told(asked, version, result)


def _drawn(asked: Asked) -> bool:
    return SURFACE[asked.path].streams and asked.body.get("temperature", 1) != 0


def said(answer: bytes) -> Any:
    """What an answer says, without what differs each time: its texts and calls by index, or its numbers. Raises ValueError."""
    if answer.startswith(b"data: "):
        choices = [
            choice
            for event in answer.split(b"\n\n")
            if event.startswith(b"data: {")
            for choice in json.loads(event[6:]).get("choices", [])
        ]
        texts: dict[int, str] = {}
        for choice in choices:
            piece = choice.get("text") or _words(choice.get("delta") or {})
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
        return texts
    told = json.loads(answer)
    if "choices" in told:
        return {each["index"]: each.get("text") or _words(each.get("message") or {}) for each in told["choices"]}
    return [each.get("embedding") or each.get("probs") or each.get("data") for each in told.get("data", [])] or told.get("tokens")


def _words(message: dict[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls") or [] if call.get("function")]
    named = "".join((call.get("name") or "") + (call.get("arguments") or "") for call in calls)
    return (message.get("content") or "") + named


def alike(one: Any, other: Any) -> bool:
    """Both say the same; numbers nearly."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(alike(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= SAME_NUMBER
    return bool(one == other)

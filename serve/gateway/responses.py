"""OpenAI's Responses API, told in terms of chat: both engines answer it alike, and neither knows it.

Nothing is kept: an answer cannot be gone on with by its id, and what was said before is sent again by the client.
"""

import json
import time
from typing import Any
from uuid import uuid4

from serve.version import Version

# These are called otherwise in a chat, or the same.
SAME = {"max_output_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "stream": "stream"}


def asks(asked: dict[str, Any], version: Version) -> dict[str, Any]:  # noqa: ARG001 - a translation's common signature
    """The body of a chat that asks the same. Raises ValueError with what is wrong."""
    body: dict[str, Any] = {"model": asked["model"], "messages": _messages(asked)}
    body |= {SAME[key]: asked[key] for key in SAME if asked.get(key) is not None}
    if asked.get("tools"):
        body["tools"] = [_tool(each) for each in asked["tools"]]
        if asked.get("tool_choice") is not None:
            body["tool_choice"] = asked["tool_choice"]
    form = (asked.get("text") or {}).get("format")
    if form and form["type"] == "json_schema":
        body["response_format"] = {"type": "json_schema", "json_schema": _only(form, "name", "schema", "strict")}
    elif form:
        body["response_format"] = {"type": form["type"]}
    return body


def _only(given: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: given[key] for key in keys if key in given}


def _messages(asked: dict[str, Any]) -> list[dict[str, Any]]:
    given = asked["input"]
    messages = [{"role": "system", "content": asked["instructions"]}] if asked.get("instructions") else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise ValueError("input: expected a text or a list of items")
    for number, item in enumerate(given):
        kind = item.get("type", "message")
        if kind == "message":
            role = {"developer": "system"}.get(item.get("role", ""), item.get("role"))
            messages.append({"role": role, "content": _text(number, item.get("content"))})
        elif kind == "function_call":
            call = {
                "id": item.get("call_id"),
                "type": "function",
                "function": {key: item.get(key) for key in ("name", "arguments")},
            }
            if messages and messages[-1]["role"] == "assistant":  # one turn says something and calls, or calls several
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(number, item.get("output"))})
        else:
            raise ValueError(
                f"input.{number}: items of type {kind!r} are not read, only message, function_call, function_call_output"
            )
    return messages


def _text(number: int, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or any(
        not isinstance(part, dict) or part.get("type") not in ("input_text", "output_text") or not isinstance(part.get("text"), str)
        for part in content
    ):
        raise ValueError(f"input.{number}.content: expected a text or parts of it")
    return "\n".join(part["text"] for part in content)


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise ValueError("tools: only functions with a name can be called")
    return {
        "type": "function",
        "function": {key: tool[key] for key in ("name", "description", "parameters", "strict") if key in tool},
    }


class Telling:
    """An answer of a chat, as it comes, in the words of Responses."""

    def __init__(self, asked: dict[str, Any], version: Version) -> None:
        self._asked, self._model = asked, version.id
        self._id, self._created = f"resp_{uuid4().hex}", int(time.time())
        self._output: list[dict[str, Any]] = []
        self._usage: dict[str, Any] | None = None
        self._finish = "stop"
        self._number = 0
        self._places: dict[int, int] = {}
        self.failure: str | None = None
        """What the engine said went wrong in the middle, where something did."""

    def whole(self, told: dict[str, Any]) -> dict[str, Any]:
        """The answer at once."""
        (choice,) = told["choices"]
        self._finish, self._usage = choice["finish_reason"], told.get("usage")
        message = choice["message"]
        if message.get("content") or not message.get("tool_calls"):
            self._output.append(self._message(message.get("content") or ""))
        self._output += [self._call(call) for call in message.get("tool_calls") or []]
        return self._response(self._status())

    def begin(self) -> list[bytes]:
        """The events before the first word."""
        return [self._event(f"response.{kind}", response=self._response("in_progress")) for kind in ("created", "in_progress")]

    def go_on(self, told: dict[str, Any]) -> list[bytes]:
        """The events of a piece of the answer."""
        events: list[bytes] = []
        if "error" in told:
            self.failure = str((told["error"] or {}).get("message"))
            return events
        self._usage = told.get("usage") or self._usage
        for choice in told.get("choices", []):
            self._finish = choice.get("finish_reason") or self._finish
            delta = choice.get("delta") or {}
            if delta.get("content"):
                events += self._words(delta["content"])
            for call in delta.get("tool_calls") or []:
                events += self._calls(call)
        return events

    def end(self, failure: str | None = None) -> list[bytes]:
        """The events after the last word."""
        events: list[bytes] = []
        failure = failure or self.failure
        for index, item in enumerate(self._output):
            item["status"] = "completed"
            if item["type"] == "message":
                part, place = item["content"][0], {"item_id": item["id"], "output_index": index, "content_index": 0}
                events.append(self._event("response.output_text.done", text=part["text"], logprobs=[], **place))
                events.append(self._event("response.content_part.done", part=part, **place))
            else:
                place = {"item_id": item["id"], "output_index": index}
                events.append(
                    self._event("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"], **place)
                )
            events.append(self._event("response.output_item.done", output_index=index, item=item))
        if failure:
            response = {**self._response("failed"), "error": {"code": "server_error", "message": failure}}
            return [*events, self._event("response.failed", response=response)]
        status = self._status()
        return [*events, self._event(f"response.{status}", response=self._response(status))]

    def _words(self, piece: str) -> list[bytes]:
        events = []
        if not self._output or self._output[-1]["type"] != "message":
            item = {**self._message(""), "status": "in_progress"}
            self._output.append(item)
            index = len(self._output) - 1
            events.append(self._event("response.output_item.added", output_index=index, item={**item, "content": []}))
            events.append(
                self._event(
                    "response.content_part.added", item_id=item["id"], output_index=index, content_index=0, part=item["content"][0]
                )
            )
        item = self._output[-1]
        item["content"][0]["text"] += piece
        place = {"item_id": item["id"], "output_index": len(self._output) - 1, "content_index": 0}
        return [*events, self._event("response.output_text.delta", delta=piece, logprobs=[], **place)]

    def _calls(self, call: dict[str, Any]) -> list[bytes]:
        events = []
        function = call.get("function") or {}
        if function.get("name"):
            self._places[call.get("index", 0)] = len(self._output)
            self._output.append({**self._call({**call, "function": {**function, "arguments": ""}}), "status": "in_progress"})
            events.append(
                self._event("response.output_item.added", output_index=len(self._output) - 1, item=dict(self._output[-1]))
            )
        if function.get("arguments") and call.get("index", 0) in self._places:
            index = self._places[call.get("index", 0)]
            item = self._output[index]
            item["arguments"] += function["arguments"]
            place = {"item_id": item["id"], "output_index": index}
            events.append(self._event("response.function_call_arguments.delta", delta=function["arguments"], **place))
        return events

    def _message(self, text: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "status": "completed", "content": [part]}

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {
            "id": f"fc_{uuid4().hex}", "type": "function_call", "status": "completed", "call_id": call["id"],
            "name": function["name"], "arguments": function["arguments"],
        }  # fmt: skip

    def _status(self) -> str:
        return "incomplete" if self._finish == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        asked, used = self._asked, self._usage
        read, written = (used or {}).get("prompt_tokens", 0), (used or {}).get("completion_tokens", 0)
        usage = {
            "input_tokens": read, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": read + written,
        }  # fmt: skip
        return {
            "id": self._id, "object": "response", "created_at": self._created, "model": self._model, "status": status,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.get("instructions"), "max_output_tokens": asked.get("max_output_tokens"), "output": self._output,
            "parallel_tool_calls": True, "previous_response_id": None, "store": False, "temperature": asked.get("temperature"),
            "text": asked.get("text") or {"format": {"type": "text"}}, "tool_choice": asked.get("tool_choice") or "auto",
            "tools": asked.get("tools") or [], "top_p": asked.get("top_p"), "truncation": "disabled",
            "metadata": asked.get("metadata"), "usage": usage if used else None,
        }  # fmt: skip

    def _event(self, kind: str, **values: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **values}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()

"""Turns tokens into what clients read: text as it becomes whole, up to a stop, and the calls of tools in it."""

import json
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from tokenizers.decoders import DecodeStream

# Qwen, Hermes and SmolLM templates let a model write its calls like this; the other engine reads them by the same marks.
CALL, END_OF_CALL = "<tool_call>", "</tool_call>"


class Text:
    """The text of an answer, piece by piece."""

    def __init__(self, tokenizer: Any, prompt: list[int], stops: list[str]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        # Some tokenizers write a word's space before it, but not at the very beginning: what came before is needed.
        self._stream = DecodeStream(ids=prompt[-8:], skip_special_tokens=True)
        self._stops = stops
        self._held = ""
        self.stopped = False
        """A stop was found; the text ends before it."""

    def add(self, token: int) -> str:
        """What can be told now: nothing while a letter is not whole, or while what is held back may be the beginning of a stop."""
        if self.stopped:
            return ""
        self._held += self._stream.step(self._tokenizer, token) or ""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            told, self._held = self._held[: min(found)], ""
            return told
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        told, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return told

    def rest(self) -> str:
        """What was held back, once nothing follows."""
        told, self._held = self._held, ""
        return told


@dataclass
class Calls:
    """Takes the calls of tools out of a text that comes in pieces."""

    found: list[dict[str, Any]] = field(default_factory=list)
    _held: str = ""
    _behind: bool = False
    """A call has ended, and nothing but white space has come since: the line breaks between two calls are no words to the user."""

    def add(self, piece: str) -> tuple[str, list[dict[str, Any]]]:
        """(what is no part of a call, calls that have just become whole). What is no JSON stays in the text as it is."""
        self._held += piece
        self._pass_space()
        told = ""
        calls: list[dict[str, Any]] = []
        while (begin := self._held.find(CALL)) >= 0:
            told, self._held = told + self._held[:begin], self._held[begin:]
            end = self._held.find(END_OF_CALL)
            if end < 0:
                return told, calls
            written = self._held[: end + len(END_OF_CALL)]
            self._held = self._held[len(written) :]
            call = self._read(written[len(CALL) : -len(END_OF_CALL)])
            if call is None:
                told += written
            else:
                calls.append(call)
                self.found.append(call)
                self._behind = True
                self._pass_space()
        keep = _overlap(self._held, CALL)
        told, self._held = told + self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return told, calls

    def rest(self) -> str:
        """What was held back, once nothing follows: the beginning of a call that has no end."""
        told, self._held = self._held, ""
        return told

    def _pass_space(self) -> None:
        if self._behind:
            self._held = self._held.lstrip()
            self._behind = not self._held

    def _read(self, written: str) -> dict[str, Any] | None:
        try:
            value = json.loads(written)
            name, arguments = value["name"], value.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function}


def _overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` that `mark` begins with."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-size:])), 0)

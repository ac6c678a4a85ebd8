"""What the embedded engine's routes share: what is served, and how texts and conversations become its tokens."""

from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from serve.embedded.generation import Generator
from serve.embedded.reading import Reader

# How often it is looked whether a client that waits for a whole answer is still there.
CLIENT_LOOK_S = 0.25


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


def failure(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def render(served: Served, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, begin_answer: bool) -> list[int]:
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


def tokens(served: Served, given: Any) -> list[list[int]]:
    """One text, several, the tokens of one, or of several: as lists of tokens."""
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    return [served.tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in given]

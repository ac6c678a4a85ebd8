"""Supervised fine-tuning: conversations in the model's own chat template, or plain prompt and completion.

Learned are the assistant's words and the token that ends its turn; everything else is only read.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cache
from typing import Any, Literal

from pydantic import Field

from tuner.checkpoint import ends_of_turn
from tuner.data.example import IGNORE, Example
from tuner.data.rows import BadRows, Row, lacking, usable
from tuner.data.text import asked, require_one_beginning
from tuner.errors import DataError, SourceError
from tuner.kinds import Options as BaseOptions
from tuner.score import of_answers as scores
from tuner.score import scored

__all__ = ["HEAD", "KEYS", "SHAPES", "Options", "check_row", "examples", "objective", "question", "reference", "scored", "scores"]

HEAD = "causal"
# What a message may hold; `tools` are the functions that the model may call.
SPOKEN = frozenset(
    {"messages", *(f"messages.{each}" for each in ("role", "content", "tool_calls", "tool_call_id", "name", "weight"))}
)
KEYS = SPOKEN | {"prompt", "completion", "tools", "tools.type", "tools.function"}
PLAIN = "prompt and completion"
# Of rows as tuner/data/shapes.py names them: those that this task reads, with the options that they want.
SHAPES: dict[str, dict[str, Any]] = {"messages": {}, "ShareGPT": {}, "Alpaca": {}, PLAIN: {}}
# What an expression in a chat template can raise beside jinja's own errors.
FAILS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)
ROLES = ("system", "user", "assistant", "tool")


class Options(BaseOptions):
    """Keys of `task: {kind: sft}`."""

    kind: Literal["sft"] = "sft"
    max_tokens: int = Field(512, gt=1)
    """Longest conversation in tokens. A longer row is a bad row: see `data.on_bad_row`. Nothing is cut off silently."""
    packing: bool = False
    """Put short rows behind each other into rows of max_tokens, which batch_size then counts. Each still reads itself alone."""


def check_row(record: dict[str, Any], options: Options, *, chat_template: bool = True) -> None:  # noqa: ARG001 - a task's common signature
    """Raises DataError unless the record is {"messages": [...]} in a sensible order, or {"prompt", "completion"}.

    Only a model with a chat template reads messages.
    """
    if "messages" in record:
        if not chat_template:
            raise DataError(
                'the model has no chat template, so "messages" cannot be rendered; use rows with "prompt" and "completion", '
                "or an instruction-tuned model"
            )
        _check_messages(record["messages"])
    elif "prompt" in record or "completion" in record:
        for key in ("prompt", "completion"):
            if key not in record:
                raise DataError(f'the key "{key}" is missing beside {keys(record)}')
            if not isinstance(record[key], str) or not record[key]:
                raise DataError(f'"{key}" is {_shown(record[key])}, expected text', lacking(record[key]))
    else:
        raise DataError(f'found the keys {keys(record)}, expected "messages", or "prompt" and "completion"')


def examples(rows: Iterator[Row], tokenizer: Any, options: Options, bad: BadRows) -> Iterator[tuple[Row, Example]]:
    """Each usable row with its tokens; bad rows stop the run with a DataError, or are counted in `bad`."""

    def tokens(row: Row) -> Example:
        check_row(row.record, options, chat_template=bool(tokenizer.chat_template))
        example = fitted(encode(row.record, tokenizer), options.max_tokens, cut=bad.truncates)
        if not example.supervised:
            where = " before max_tokens" if example.cut else ""
            raise DataError(f"no token of this row would be learned: the assistant says nothing{where}", "unlearned")
        return example

    return usable(rows, tokens, bad)


def question(record: dict[str, Any], tokenizer: Any, options: Options) -> dict[str, Any]:  # noqa: ARG001 - a task's common signature
    """`ids` of everything before the last answer, and the `messages` and `tools` that they were rendered from."""
    if "messages" not in record:
        return {**asked(record["prompt"], question_ids(record, tokenizer), tokenizer), "messages": None}
    tools = {"tools": record["tools"]} if record.get("tools") else {}
    return {"ids": question_ids(record, tokenizer), "messages": [_sent(each) for each in _spoken(record)[:-1]], **tools}


def _sent(message: dict[str, Any]) -> dict[str, Any]:
    """A message as a client of OpenAI's sends it: the arguments of its calls are text."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {"id": f"call_{at}", "type": "function", "function": {**call["function"], "arguments": _as_text(call["function"])}}
        for at, call in enumerate(message["tool_calls"])
    ]
    return {**message, "tool_calls": calls}


def _as_text(function: dict[str, Any]) -> str:
    given = function.get("arguments", {})
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def objective(model: Any, tokenizer: Any, options: Options) -> Any:  # noqa: ARG001 - a task's common signature
    """The next token's negative log-likelihood."""
    from tuner.heads.causal import NextTokenLoss

    return NextTokenLoss(model, tokenizer.pad_token_id)


def reference(record: dict[str, Any]) -> str:
    """The last answer's text."""
    return str(record["messages"][-1]["content"] if "messages" in record else record["completion"])


def question_ids(record: dict[str, Any], tokenizer: Any) -> list[int]:
    """What an endpoint makes of the same messages (or of the same plain prompt)."""
    if "messages" not in record:
        return list(tokenizer(record["prompt"])["input_ids"])
    text = _render(_spoken(record)[:-1], tokenizer, record.get("tools"), add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(record: dict[str, Any], tokenizer: Any) -> Example:
    """The whole row, every answer in it supervised. Raises DataError where a server would render it otherwise."""
    if "messages" not in record:
        prompt = question_ids(record, tokenizer)
        answer = [*tokenizer(record["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        require_one_beginning(prompt, tokenizer)
        return Example(prompt + answer, [IGNORE] * len(prompt) + answer)
    unlearned = {index for index, message in enumerate(record["messages"]) if message.get("weight") == 0}
    messages, tools = _spoken(record), record.get("tools")

    @cache
    def render(count: int, answer: bool) -> str:
        return _render(messages[:count], tokenizer, tools, add_generation_prompt=answer)

    _check_tools_are_shown(messages, tools, render(len(messages), False), tokenizer)
    if has_markers(tokenizer):
        ids, learned = _by_markers(messages, tools, tokenizer)
    else:
        ids, learned = _by_prefixes(messages, render, tokenizer)
    if unlearned:
        _, others = _by_prefixes(messages, render, tokenizer, left_out=unlearned)
        learned = [wanted and other for wanted, other in zip(learned, others, strict=True)]
    prompt = list(tokenizer(render(len(messages) - 1, True), add_special_tokens=False)["input_ids"])
    if ids[: len(prompt)] != prompt:
        raise DataError("the chat template joins the question and the answer into one token, which no server would send")
    labels = [token if wanted else IGNORE for token, wanted in zip(ids, learned, strict=True)]
    require_one_beginning(ids, tokenizer)
    return _end_turns(ids, labels, tokenizer)


def _spoken(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages as a server is sent them: what they weigh is for training alone."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in record["messages"]]


def has_markers(tokenizer: Any) -> bool:
    """The chat template says itself what the assistant writes, between {% generation %} and {% endgeneration %}."""
    templates = tokenizer.chat_template or ""
    each = templates.values() if isinstance(templates, dict) else [templates]
    return all(re.search(r"{%-?\s*generation\s*-?%}", template) for template in each)


def told(tokenizer: Any, options: Options, shapes: dict[str, int]) -> list[str]:  # noqa: ARG001 - a task's common signature
    """How it is known which words are the assistant's, and what ends them, in rows of these shapes."""
    if not tokenizer.chat_template:
        return []
    said = []
    if PLAIN in shapes:
        said.append("prompts and completions are learned as they are, without the chat template: ask for them at /v1/completions")
    if not set(shapes) - {PLAIN}:
        return said
    if has_markers(tokenizer):
        said.append("what is learned is what the chat template marks as the assistant's")
    else:
        said.append("the chat template marks no answers: what is learned is derived from renderings of each turn, and verified")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with suppress(DataError):
        rendered = _render(turns, tokenizer, None, add_generation_prompt=False)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if not set(ids[-3:]) & ends_of_turn(tokenizer):
            said.append(f"the chat template ends no answer, so {tokenizer.eos_token} is added behind the last, or none would end")
    return said


def _by_markers(messages: list[dict[str, Any]], tools: Any, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """(ids, which of them are learned) by what the template marks."""
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = tokenizer.apply_chat_template(messages, tools=tools, **options)
    return list(encoded["input_ids"]), [bool(each) for each in encoded["assistant_masks"]]


def _by_prefixes(
    messages: list[dict[str, Any]], render: Callable[[int, bool], str], tokenizer: Any, left_out: Collection[int] = ()
) -> tuple[list[int], list[bool]]:
    """(ids, which of them are learned): what each answer adds to the rendering of all that came before it.

    `render` gives so many of the messages as text, asking for an answer or not. Of answers that are `left_out` nothing is learned.
    """
    text = render(len(messages), False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index not in left_out:
            start, end = render(index, True), render(index + 1, False)
            if not (text.startswith(start) and text.startswith(end)):
                raise DataError(
                    f"messages[{index}]: this model's chat template renders the turns before it differently once it is there, "
                    "so what is learned would not be what a server sends"
                )
            spans.append((len(start), len(end)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learned = [any(_within(left, right, *span) for span in spans) for left, right in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), learned


def _within(left: int, right: int, start: int, end: int) -> bool:
    """A token with these characters belongs to an answer with those. Some tokenizers give blanks no characters of their own."""
    return start <= left and right <= end and (left < right or start < left)


def _end_turns(ids: list[int], labels: list[int], tokenizer: Any) -> Example:
    """Learn nothing after the token that ends a turn (templates put a newline there that no one generates).

    Where the template ends the last answer with no such token it is added, or the model would never learn to stop.
    """
    ended, ends, eos_id = False, ends_of_turn(tokenizer), tokenizer.eos_token_id
    for index, label in enumerate(labels):
        if label == IGNORE:
            # A template may mark an answer without the token that ends it.
            ends_it = bool(index) and labels[index - 1] != IGNORE and not ended and ids[index] in ends
            labels[index] = ids[index] if ends_it else IGNORE
            ended = ends_it
        elif ended:
            labels[index] = IGNORE
        else:
            ended = label in ends
    learned = [index for index, label in enumerate(labels) if label != IGNORE]
    if learned and ids[learned[-1]] not in ends:
        end = learned[-1] + 1
        ids, labels = [*ids[:end], eos_id], [*labels[:end], eos_id]
    return Example(ids, labels)


def fitted(example: Example, max_tokens: int, *, cut: bool, what: str = "") -> Example:
    """The example if it is no longer than allowed, or its beginning where it may be cut. Raises DataError otherwise."""
    if len(example.ids) <= max_tokens:
        return example
    if not cut:
        raise DataError(f"{len(example.ids)} tokens{what}, expected at most max_tokens: {max_tokens}", "too_long")
    return Example(example.ids[:max_tokens], example.labels[:max_tokens], cut=True)


def _render(messages: list[dict[str, Any]], tokenizer: Any, tools: Any, *, add_generation_prompt: bool) -> str:
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    try:
        text = str(
            tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt)
        )
        text.encode()  # half of a surrogate pair is no character
    except TemplateSyntaxError as error:
        raise SourceError(f"the model's chat template cannot be read: {error}, in its line {error.lineno}") from None
    except (TemplateError, *FAILS) as error:
        raise DataError(f"the model's chat template refuses this conversation: {error or type(error).__name__}", "turns") from None
    return text


def _check_tools_are_shown(messages: list[dict[str, Any]], tools: Any, text: str, tokenizer: Any) -> None:
    """Raises DataError where the chat template leaves tools or calls out: the model would learn calls of what it never saw."""
    if tools and text == _render(messages, tokenizer, None, add_generation_prompt=False):
        raise DataError("the model's chat template does not show tools; use a model that was made for them, or rows without")
    for index, message in enumerate(messages):
        for call in message.get("tool_calls") or []:
            if call["function"]["name"] not in text:
                raise DataError(f"messages[{index}]: the model's chat template does not show tool calls, so none would be learned")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'"messages" is {_shown(messages)}, expected a list of {{"role", "content"}}')
    expected: tuple[str, ...] = ("system", "user")
    after = {"system": ("user",), "user": ("assistant",), "tool": ("tool", "assistant")}
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            missing = [key for key in ("role", "content") if not isinstance(message, dict) or key not in message]
            raise DataError(f'messages[{index}]: the key "{missing[0]}" is missing')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise DataError(f"messages[{index}]: the role is {_shown(role)}, expected one of {', '.join(ROLES)}", "turns")
        if role not in expected:
            raise DataError(f'messages[{index}]: the role is "{role}", expected {" or ".join(expected)} here', "turns")
        calls = message.get("tool_calls") or []
        _check_calls(calls, index, role)
        weight = message.get("weight")
        if weight is not None and (role != "assistant" or weight not in (0, 1)):
            raise DataError(f"messages[{index}]: the weight is {_shown(weight)}, expected 0 or 1, of an assistant's message")
        if not isinstance(content, str) or (role in ("user", "assistant") and not content.strip() and not calls):
            raise DataError(f"messages[{index}]: the content is {_shown(content)}, expected text", lacking(content))
        expected = after.get(role) or (("tool",) if calls else ("user",))
    if messages[-1].get("weight") == 0:
        raise DataError("the last answer has the weight 0, so nothing of it would be learned; end the row before it", "unlearned")
    if messages[-1]["role"] != "assistant":
        last = messages[-1]["role"]
        raise DataError(f'the last message is from "{last}", expected "assistant": there is no answer to learn', "turns")


def _check_calls(calls: Any, index: int, role: str) -> None:
    if calls and role != "assistant":
        raise DataError(f'messages[{index}]: "{role}" calls tools, and only the assistant may', "turns")
    if not isinstance(calls, list):
        raise DataError(f'messages[{index}]: "tool_calls" is {_shown(calls)}, expected a list')
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wanted = '{"type": "function", "function": {"name", "arguments"}}'
            raise DataError(f"messages[{index}]: a tool call is {_shown(call)}, expected {wanted}")


def keys(record: dict[str, Any]) -> str:
    """The record's keys for a message."""
    return ", ".join(f'"{key}"' for key in record) or "of an empty object"


def _shown(value: Any) -> str:
    return repr(value)[:60]

"""Recognises the forms in which people keep rows, and writes each in the one form that the tasks read.

| shape                     | keys that tell it                              | becomes |
|---------------------------|------------------------------------------------|---------|
| messages (OpenAI)         | messages; tools                                | itself  |
| ShareGPT                  | conversations: from, value; system, tools      | messages |
| Alpaca                    | instruction, output; input, system, history    | messages |
| prompt and completion     | prompt, completion, also as lists of messages  | itself, or messages |
| preference pairs          | chosen, rejected, also as lists of messages    | messages or prompt, chosen, rejected |
| judged answers            | completion, label: true or false               | itself  |
| words and tags            | words, tags; or tokens, ner_tags               | words, tags |
| pairs, triples            | anchor, positive; negative, or score           | itself  |
| sentence pairs            | sentence1, sentence2; score                    | itself  |
| label, labels, score      | text and one of these                          | itself  |
| text                      | text                                           | itself  |
"""

import json
from typing import Any

from tuner.data.rows import Row
from tuner.errors import DataError, nearest

# What a shape is told by; the first that fits counts.
SHAPES: dict[str, tuple[str, ...]] = {
    "preference pairs": ("chosen", "rejected"),
    "judged answers": ("completion", "label"),
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "prompt and completion": ("prompt", "completion"),
    "words and tags": ("words", "tags"),
    "words and tags (tokens, ner_tags)": ("tokens", "ner_tags"),
    "triples": ("anchor", "positive", "negative"),
    "pairs with a score": ("anchor", "positive", "score"),
    "pairs": ("anchor", "positive"),
    "sentence pairs with a score": ("sentence1", "sentence2", "score"),
    "sentence pairs": ("sentence1", "sentence2"),
    "text with a label": ("text", "label"),
    "text with labels": ("text", "labels"),
    "text with a score": ("text", "score"),
    "text": ("text",),
}
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
}
# Texts that a row of their shape cannot be without: an empty cell under one of these is a text that is missing.
WANTED = ("text", "prompt", "completion", "chosen", "rejected", "anchor", "positive", "sentence1", "sentence2")
# Columns of a table, where every value is text, that mean something else.
LISTS = {
    "messages",
    "conversations",
    "tools",
    "words",
    "tags",
    "tokens",
    "ner_tags",
    "labels",
    "negative",
    "chosen",
    "rejected",
    "prompt",
}

# Those of them that are plain text more often than not.
TEXTS = frozenset(["chosen", "rejected", "prompt", "completion"])


def shape_of(record: dict[str, Any]) -> str:
    """The name of the record's shape; empty where none fits."""
    return next((name for name, keys in SHAPES.items() if all(key in record for key in keys)), "")


def told(shapes: dict[str, int]) -> str:
    """Which shapes rows have, how many have them, and which keys say so."""
    each = [f"{name} ({', '.join(SHAPES[name])})" if name else "no known shape" for name in shapes]
    return each[0] if len(each) == 1 else ", ".join(f"{count} {name}" for count, name in zip(shapes.values(), each, strict=True))


def canonical(row: Row, columns: dict[str, str | int], *, table: bool) -> Row:
    """The row in the form that tasks read, with the name of the shape that it had.

    `columns` says what the row calls its columns; in a `table` all values are text. Raises DataError, without the place, for a
    column that is not there, and for turns that are none.
    """
    record = _renamed(row.record, columns) if columns else row.record
    if table:
        record = _typed(record)
    shape = shape_of(record)
    change = {
        "messages": _messages,
        "ShareGPT": _sharegpt,
        "Alpaca": _alpaca,
        "prompt and completion": _prompt,
        "preference pairs": _preference,
        "judged answers": _judged,
        "words and tags (tokens, ner_tags)": _tokens,
        "words and tags": _named,
        "text with a label": _named,
        "text with labels": _named,
    }.get(shape)
    return Row(row.place, change(record) if change else record, shape)


def _renamed(record: dict[str, Any], columns: dict[str, str | int]) -> dict[str, Any]:
    renamed = dict(record)
    for name, column in columns.items():
        column = str(column)  # a name that is a number
        if column not in record:
            raise DataError(f'there is no column "{column}" (data.map.{name}){nearest(column, record)}', "shape")
        renamed.pop(str(column), None)
    return {**renamed, **{name: record[str(column)] for name, column in columns.items()}}


def _typed(record: dict[str, Any]) -> dict[str, Any]:
    """A table's row with its lists, numbers and truths; an empty cell is no value."""
    typed: dict[str, Any] = {}
    for name, cell in record.items():
        value: Any = cell
        if isinstance(cell, str) and name in LISTS and cell.lstrip()[:1] in ("[", "{"):
            try:
                value = json.loads(cell)
                value = value if name not in TEXTS or _is_messages(value) else cell
            except ValueError as error:
                if name in TEXTS:
                    typed[name] = cell
                    continue
                raise DataError(f'"{name}" begins like JSON and is none ({getattr(error, "msg", error)}): {cell[:60]!r}') from None
        elif name in ("words", "tags") and isinstance(cell, str):
            value = cell.split()
        elif name == "score" and isinstance(cell, str) and cell.strip():
            try:
                value = float(cell)
            except ValueError:
                raise DataError(f'"score" is {cell!r:.60}, expected a number') from None
        elif name == "label" and "completion" in record and isinstance(cell, str):
            value = {"true": True, "1": True, "false": False, "0": False}.get(cell.strip().lower(), cell)
        if value != "" or name in ("input", *WANTED):
            typed[name] = value
    return typed


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _messages(record: dict[str, Any]) -> dict[str, Any]:
    return _with_tools({**record, "messages": _turns(record["messages"])})


def _with_tools(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its tools as templates want them; without the key where there are none, which some files write as "[]"."""
    tools = _tools(record["tools"]) if record.get("tools") else []
    return {**{key: value for key, value in record.items() if key != "tools"}, **({"tools": tools} if tools else {})}


def _turns(messages: Any) -> Any:
    """Messages whose content is one text, and whose tool calls have their arguments as objects, as templates want them."""
    if not isinstance(messages, list):
        return messages
    return [_turn(each) if isinstance(each, dict) else each for each in messages]


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(each, dict) and isinstance(each.get("text"), str) for each in content):
        message = {**message, "content": "\n".join(each["text"] for each in content)}  # as vLLM joins them
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls:
        message = {**message, "content": message.get("content") or "", "tool_calls": [_call(each) for each in calls]}
    return message


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": _parsed(function["arguments"], "the arguments of a tool call")}}


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{what} are no JSON ({getattr(error, 'msg', error)}): {text[:60]!r}", "shape") from None


def _tools(tools: Any) -> Any:
    found = _parsed(tools, "the tools") if isinstance(tools, str) else tools
    if found != [] and not _is_messages(found):
        raise DataError(f'"tools" is {found!r:.60}, expected a list of {{"type": "function", "function": {{...}}}}')
    return [_tool(each) for each in found]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A function as vLLM hands it to a chat template, whatever a client sends: these keys, in this order."""
    function = tool.get("function", tool)  # some leave the outer object out
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        wanted = '{"type": "function", "function": {"name", "description", "parameters"}}'
        raise DataError(f"a tool is {tool!r:.60}, expected {wanted}")
    strict = {} if function.get("strict") is None else {"strict": function["strict"]}
    return {"type": "function", "function": {**{key: function.get(key) for key in ("name", "description", "parameters")}, **strict}}


def _sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise DataError(f'"conversations" is {turns!r:.60}, expected a list of {{"from", "value"}}')
    messages: list[Any] = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for at, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            if isinstance(turn, dict) and {"role", "content"} <= set(turn):
                messages.append(_turn(turn))
                continue
            raise DataError(f'conversations[{at}] is {turn!r:.60}, expected {{"from", "value"}}')
        role = str(turn["from"])
        if role == "function_call":
            call = _parsed(str(turn["value"]), f"conversations[{at}]: the function call's words")
            messages.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]})
        else:
            messages.append({"role": SPEAKERS.get(role, role), "content": turn["value"]})
    rest = {key: value for key, value in record.items() if key not in ("conversations", "system")}
    return _with_tools({**rest, "messages": messages})


def _alpaca(record: dict[str, Any]) -> dict[str, Any]:
    for key in ("instruction", "output", "input", "system"):
        if not isinstance(record.get(key, ""), str) and (record[key] is not None or key == "output"):
            raise DataError(f'"{key}" is {record[key]!r:.60}, expected text')
    if not isinstance(record.get("history") or [], list):
        raise DataError(f'"history" is {record["history"]!r:.60}, expected a list of [question, answer]')
    messages: list[Any] = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for at, pair in enumerate(record.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history[{at}] is {pair!r:.60}, expected [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]
    rest = {key: value for key, value in record.items() if key not in ("instruction", "input", "output", "system", "history")}
    return _with_tools({**rest, "messages": messages})


def _prompt(record: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = record["prompt"], record["completion"]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return record
    rest = {key: value for key, value in record.items() if key not in ("prompt", "completion")}
    return _messages({**rest, "messages": prompt + completion})


def _preference(record: dict[str, Any]) -> dict[str, Any]:
    """Answers that are lists of messages end with the answer; what they have in common before it is the question."""
    chosen, rejected = record["chosen"], record["rejected"]
    if not (_said(chosen) and _said(rejected)):
        return _messages(record) if "messages" in record else record
    prompt = record.get("prompt") or record.get("messages") or []
    before = [*(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])]
    if chosen[:-1] != rejected[:-1]:
        raise DataError('"chosen" and "rejected" differ before their last message, so they answer different questions')
    shared = chosen[:-1]
    rest = {key: value for key, value in record.items() if key not in ("prompt", "messages", "chosen", "rejected")}
    answers = {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    # Some files repeat the question in both answers, some do not.
    return _with_tools({**rest, "messages": _turns(shared if shared[: len(before)] == before else before + shared), **answers})


def _judged(record: dict[str, Any]) -> dict[str, Any]:
    """A question and an answer that are lists of messages, as in preference pairs."""
    completion, prompt = record["completion"], record.get("prompt")
    if not (_said(completion) and isinstance(prompt, list)):
        return record
    rest = {key: value for key, value in record.items() if key not in ("prompt", "completion")}
    return _with_tools({**rest, "messages": _turns([*prompt, *completion[:-1]]), "completion": completion[-1]["content"]})


def _named(record: dict[str, Any]) -> dict[str, Any]:
    """Labels that are whole numbers, true or false are names all the same."""
    named = {key: label_name(record[key]) for key in ("label",) if key in record}
    named |= {key: [label_name(each) for each in record[key]] for key in ("labels", "tags") if isinstance(record.get(key), list)}
    return {**record, **named}


def label_name(value: Any) -> Any:
    """A label as recipes write it: `true` of true, "3" of 3; what is no label stays as it is."""
    return json.dumps(value) if isinstance(value, int) else value


def _said(answer: Any) -> bool:
    return isinstance(answer, list) and bool(answer) and isinstance(answer[-1], dict) and "content" in answer[-1]


def _tokens(record: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in record.items() if key not in ("tokens", "ner_tags")}
    return _named({**rest, "words": record["tokens"], "tags": record["ner_tags"]})

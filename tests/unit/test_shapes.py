"""The forms in which people keep rows, and the one in which tasks read them."""

from typing import Any

import pytest

from tuner.data.rows import Row
from tuner.data.shapes import canonical
from tuner.errors import DataError

ASKED, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CHAT = {"messages": [ASKED, SAID]}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "description": None, "parameters": {}}}


def changed(record: dict[str, Any], *, table: bool = False, **columns: str) -> tuple[str, dict[str, Any]]:
    row = canonical(Row("f:1", record), dict(columns), table=table)
    return row.shape, row.record


@pytest.mark.parametrize(
    ("record", "shape", "becomes"),
    [
        (CHAT, "messages", CHAT),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, "ShareGPT", CHAT),
        ({"system": "be kind", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, "ShareGPT", {"messages": [{"role": "system", "content": "be kind"}, ASKED, SAID]}),
        ({"instruction": "hi", "input": "", "output": "hello"}, "Alpaca", CHAT),
        ({"instruction": "add", "input": "1 2", "output": "3", "history": [["hi", "hello"]]}, "Alpaca", {"messages": [ASKED, SAID, {"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}]}),
        ({"prompt": "a", "completion": "b"}, "prompt and completion", {"prompt": "a", "completion": "b"}),
        ({"prompt": [ASKED], "completion": [SAID]}, "prompt and completion", CHAT),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, SAID]}, "messages", CHAT),
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "preference pairs", {"prompt": "hi", "chosen": "a", "rejected": "b"}),
        ({"chosen": [ASKED, SAID], "rejected": [ASKED, {**SAID, "content": "no"}]}, "preference pairs", {"messages": [ASKED], "chosen": "hello", "rejected": "no"}),
        ({"prompt": [ASKED], "chosen": [SAID], "rejected": [{**SAID, "content": "no"}]}, "preference pairs", {"messages": [ASKED], "chosen": "hello", "rejected": "no"}),
        ({"prompt": "hi", "chosen": [ASKED, SAID], "rejected": [ASKED, {**SAID, "content": "no"}]}, "preference pairs", {"messages": [ASKED], "chosen": "hello", "rejected": "no"}),
        ({"prompt": [ASKED], "completion": [SAID], "label": True}, "judged answers", {"messages": [ASKED], "completion": "hello", "label": True}),
        ({"messages": [ASKED, SAID], "tools": "[]"}, "messages", CHAT),
        ({"messages": [ASKED, SAID], "tools": None}, "messages", CHAT),
        ({"anchor": "a", "positive": "b", "score": 0.5}, "pairs with a score", {"anchor": "a", "positive": "b", "score": 0.5}),
        ({"sentence1": "a", "sentence2": "b"}, "sentence pairs", {"sentence1": "a", "sentence2": "b"}),
        ({"prompt": "a", "completion": "b", "label": True}, "judged answers", {"prompt": "a", "completion": "b", "label": True}),
        ({"tokens": ["a"], "ner_tags": ["O"]}, "words and tags (tokens, ner_tags)", {"words": ["a"], "tags": ["O"]}),
        ({"anchor": "a", "positive": "b"}, "pairs", {"anchor": "a", "positive": "b"}),
        ({"anchor": "a", "positive": "b", "negative": "c"}, "triples", {"anchor": "a", "positive": "b", "negative": "c"}),
        ({"sentence1": "a", "sentence2": "b", "score": 0.5}, "sentence pairs with a score", {"sentence1": "a", "sentence2": "b", "score": 0.5}),
        ({"text": "a", "label": "x"}, "text with a label", {"text": "a", "label": "x"}),
        ({"text": "a"}, "text", {"text": "a"}),
        ({"body": "a"}, "", {"body": "a"}),
    ],
)  # fmt: skip
def test_a_row_is_recognised_and_put_into_the_tasks_form(record: dict[str, Any], shape: str, becomes: dict[str, Any]) -> None:
    assert changed(record) == (shape, becomes)


def test_tool_calls_have_their_arguments_as_objects_as_vllm_gives_them_to_templates() -> None:
    openai = {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}]}], "tools": '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'}  # fmt: skip
    wanted = {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [TOOL]}
    assert changed(openai) == ("messages", wanted)
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    seen = {"from": "observation", "value": "3"}
    assert changed({"conversations": [{"from": "human", "value": "hi"}, call, seen], "tools": [TOOL]})[1] == {
        "messages": [*wanted["messages"], {"role": "tool", "content": "3"}],
        "tools": [TOOL],
    }


def test_columns_are_called_what_the_recipe_says() -> None:
    assert changed({"review": "good", "1": "5"}, text="review", label=1)[1] == {"text": "good", "label": "5"}  # type: ignore[arg-type]
    assert changed({"review": "good", "stars": "5", "id": 1}, text="review", label="stars") == (
        "text with a label",
        {"text": "good", "label": "5", "id": 1},
    )
    with pytest.raises(DataError, match=r'there is no column "reviw" \(data\.map\.text\); did you mean "review"'):
        changed({"review": "good"}, text="reviw")


def test_labels_that_are_numbers_are_names(tmp_path: object) -> None:
    assert changed({"text": "a", "label": 0})[1] == {"text": "a", "label": "0"}
    assert changed({"words": ["a"], "tags": [3]})[1] == {"words": ["a"], "tags": ["3"]}
    assert changed({"prompt": "a", "completion": "b", "label": True})[1]["label"] is True


def test_text_that_looks_like_json_stays_text(tmp_path: object) -> None:
    row = {"prompt": "[INST] hi", "completion": '{"a": 1}'}
    assert changed(row, table=True)[1] == row


def test_a_tables_cells_become_what_they_mean() -> None:
    assert changed({"sentence1": "a", "sentence2": "b", "score": "0.5"}, table=True)[1]["score"] == 0.5
    assert changed({"words": "a b", "tags": "O O"}, table=True)[1] == {"words": ["a", "b"], "tags": ["O", "O"]}
    assert changed({"messages": '[{"role": "user", "content": "hi"}]'}, table=True)[1] == {"messages": [ASKED]}
    assert changed({"prompt": "a", "completion": "b", "label": "False"}, table=True)[1]["label"] is False
    assert changed({"text": "7", "label": "1"}, table=True)[1] == {"text": "7", "label": "1"}, "a label is a name"
    with pytest.raises(DataError, match="\"score\" is 'good', expected a number"):
        changed({"sentence1": "a", "sentence2": "b", "score": "good"}, table=True)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"conversations": "hi"}, "\"conversations\" is 'hi', expected a list"),
        ({"conversations": [{"from": "human"}]}, "conversations[0] is {'from': 'human'}, expected {\"from\", \"value\"}"),
        ({"instruction": "a", "output": None}, '"output" is None, expected text'),
        ({"instruction": "a", "output": "b", "input": 5}, '"input" is 5, expected text'),
        ({"instruction": "a", "output": "b", "history": 5}, '"history" is 5, expected a list'),
        ({"messages": [ASKED, SAID], "tools": [1]}, '"tools" is [1], expected a list of'),
        ({"messages": [ASKED, SAID], "tools": [{"type": "function"}]}, "a tool is {'type': 'function'}, expected"),
        ({"chosen": [ASKED, SAID], "rejected": [SAID, SAID]}, "they answer different questions"),
        ({"messages": [{**SAID, "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}]}, "the arguments of a tool call are no JSON"),
    ],
)  # fmt: skip
def test_what_looks_like_a_shape_and_is_none_is_said(record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        changed(record)
    assert said in str(error.value)

"""Data that is not what the task reads, and what the user is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_rows, write_rows
from tuner.data import formats
from tuner.data.dataset import training_examples
from tuner.data.files import Source, parts
from tuner.errors import DataError, TunerError
from tuner.plan import make_plan
from tuner.recipe import read_recipe


def rows_in(path: Path, **source: Any) -> list[Any]:
    """The rows of one file; the first that is damaged is raised."""
    found = [row for part in parts(Source(path=str(path), **source))[0] for row in formats.rows(part)]
    for row in found:
        if isinstance(row, DataError):
            raise row
    return found


GOOD = chat_rows(1)[0]
SAID = {"role": "assistant", "content": "hello"}
ASKED = {"role": "user", "content": "hi"}

BAD_ROWS = [
    ("{not json", "not JSON"),
    ("[1, 2]", "found a list, expected an object"),
    ({"message": []}, 'found the keys "message", expected "messages"'),
    ({"messages": []}, '"messages" is [], expected a list'),
    ({"messages": [{"role": "user"}]}, 'messages[0]: the key "content" is missing'),
    ({"messages": [SAID, ASKED]}, 'messages[0]: the role is "assistant", expected system or user here'),
    ({"messages": [ASKED, ASKED]}, 'messages[1]: the role is "user", expected assistant here'),
    ({"messages": [ASKED]}, 'the last message is from "user", expected "assistant"'),
    ({"messages": [ASKED, {"role": "robot", "content": "x"}]}, "the role is 'robot', expected one of system, user, assistant"),
    ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "messages[1]: the content is None, expected text"),
    ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "messages[1]: the content is ' ', expected text"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
    ({"prompt": "x"}, 'the key "completion" is missing beside "prompt"'),
]


@pytest.mark.parametrize(("row", "said"), BAD_ROWS, ids=[said[:40] for _, said in BAD_ROWS])
def test_a_bad_row_stops_with_its_place_what_was_found_and_what_was_expected(
    recipe_file: Callable[..., Path], tmp_path: Path, row: Any, said: str
) -> None:
    recipe = recipe_file()
    write_rows(tmp_path / "train.jsonl", [GOOD, row, GOOD])
    with pytest.raises(DataError) as error:
        make_plan(read_recipe(recipe), tmp_path / "out")
    assert str(error.value).startswith(f"{tmp_path / 'train.jsonl'}:2: ")
    assert said in str(error.value)


@pytest.mark.parametrize("row", [row for row, _ in BAD_ROWS], ids=[said[:40] for _, said in BAD_ROWS])
def test_a_bad_row_is_counted_and_listed_where_the_recipe_skips(
    recipe_file: Callable[..., Path], tmp_path: Path, tokenizer: Any, row: Any
) -> None:
    recipe = read_recipe(recipe_file(lambda tree: tree["data"].update(on_bad_row="skip")))
    write_rows(tmp_path / "train.jsonl", [GOOD, row, GOOD])
    examples, data = training_examples(recipe, recipe.stages[0][1].task, tokenizer)
    assert (len(examples), data["skipped_rows"]) == (2, 1)
    assert data["skipped"][0].startswith(f"{tmp_path / 'train.jsonl'}:2: ")


def test_a_row_that_is_too_long_is_named_with_its_length(recipe_file: Callable[..., Path], tmp_path: Path, tokenizer: Any) -> None:
    recipe = read_recipe(recipe_file(lambda tree: tree["stages"][0]["tune"]["task"].update(max_tokens=16)))
    with pytest.raises(DataError, match=r"train\.jsonl:1: \d+ tokens, expected at most max_tokens: 16"):
        training_examples(recipe, recipe.stages[0][1].task, tokenizer)


def test_an_empty_and_a_missing_file_are_told_apart(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_file(lambda tree: tree["data"].update(made_by="make_it.py"))
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"train\.jsonl:1: the file is empty; expected rows, one JSON object a line"):
        make_plan(read_recipe(recipe), tmp_path / "out")
    (tmp_path / "train.jsonl").rename(tmp_path / "trains.jsonl")
    with pytest.raises(TunerError, match=r'train\.jsonl: there is no such file; did you mean "trains\.jsonl"\?'):
        make_plan(read_recipe(recipe), tmp_path / "out")
    (tmp_path / "trains.jsonl").unlink()
    with pytest.raises(
        TunerError, match=r"recipe\.yaml:3: data\.train: .*no such file; `.venv/bin/python .*make_it\.py` writes it"
    ):
        make_plan(read_recipe(recipe), tmp_path / "out")


def test_a_file_of_bad_rows_only_is_refused_even_where_they_are_skipped(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_file(lambda tree: tree["data"].update(on_bad_row="skip"))
    write_rows(tmp_path / "train.jsonl", ["{", "{"])
    with pytest.raises(DataError, match="none of its rows can be used; the first: .*:1: not JSON"):
        make_plan(read_recipe(recipe), tmp_path / "out")


def test_text_files_have_a_document_a_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    rows = rows_in(path)
    assert [(row.place, row.record["text"]) for row in rows] == [(f"{path}:1", "one\ntwo\n"), (f"{path}:5", "three\n")]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n')
    assert [row.record for row in rows_in(tmp_path / "a.jsonl")] == [{"text": "x"}]


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xf1\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        rows_in(tmp_path / "a.jsonl")

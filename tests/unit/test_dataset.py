"""Rows of several sources as examples, what is kept of them on the disk, and rows that cannot be used."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_rows, write_rows
from tuner.data import cache, reading
from tuner.data.dataset import heldout_rows, training_examples
from tuner.data.quality import examine
from tuner.errors import DataError, RecipeError
from tuner.plan import make_plan
from tuner.recipe import Recipe, read_recipe

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def read(recipe_file: Callable[..., Path]) -> Callable[..., Recipe]:
    """Writes the usual recipe with other `data` keys, and reads it."""
    return lambda **data: read_recipe(recipe_file(lambda tree: tree["data"].update(data)))


def encoded(recipe: Recipe, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    return training_examples(recipe, recipe.stages[0][1].task, tokenizer)


def entries() -> set[str]:
    folder = cache.folder() / "examples"
    return set(os.listdir(folder)) if folder.is_dir() else set()


def test_sources_of_different_forms_are_one_data_set(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    recipe = read(
        train=[
            "train.jsonl",
            {"path": "more/*.csv", "map": {"prompt": "question", "completion": "answer"}},
            {"function": "mine.py:rows"},
        ]
    )
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.csv").write_text("question,answer\nlist,az list\nshow,az show\n")
    (tmp_path / "mine.py").write_text("def rows():\n    yield {'instruction': 'list', 'output': 'az list'}\n")
    examples, data = encoded(recipe, tokenizer)
    assert len(examples) == data["rows"] == 51
    assert data["shapes"] == {"messages": 48, "prompt and completion": 2, "Alpaca": 1}
    assert data["files"] == 3


def test_a_weight_says_how_often_an_epoch_sees_a_row(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    write_rows(tmp_path / "other.jsonl", chat_rows(40, start=500))
    other = {tuple(each.ids) for each in encoded(read(train="other.jsonl"), tokenizer)[0]}
    for weight, seen in ((2.0, 80), (0.5, 20), (1.5, 60), (0.33, 13), (0.01, 1)):
        found = [
            tuple(each.ids)
            for each in encoded(read(train=["train.jsonl", {"path": "other.jsonl", "weight": weight}]), tokenizer)[0]
        ]
        assert sum(ids in other for ids in found) == seen
        assert sum(ids not in other for ids in found) == 48
    with pytest.raises(RecipeError, match="every held-out row is measured once"):
        read(heldout={"path": "heldout.jsonl", "weight": 2.0})


def test_a_weighted_source_is_drawn_from_the_same_wherever_one_stands(
    read: Any, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    recipe = read(train={"path": "train.jsonl", "weight": 0.5})
    for there, path in ((tmp_path, "recipe.yaml"), (tmp_path.parent, f"{tmp_path.name}/recipe.yaml"), ("/", recipe.path)):
        monkeypatch.chdir(there)
        drawn.append([each.ids for each in encoded(read_recipe(Path(path)), tokenizer)[0]])
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(drawn[0]) == 24


def test_each_source_is_looked_at_however_long_the_one_before_it_is(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.plan.CHECKED_ROWS", 10)
    recipe = read(train=["train.jsonl", {"path": "heldout.jsonl", "map": {"text": "nope"}}])
    with pytest.raises(DataError, match=r'heldout\.jsonl:1: there is no column "nope"'):
        make_plan(recipe, tmp_path / "out")
    for name in ("a", "b", "c"):
        (tmp_path / "many").mkdir(exist_ok=True)
        write_rows(tmp_path / "many" / f"{name}.jsonl", chat_rows(12, start=ord(name) * 100))
    for train in ("many", "many/*.jsonl"):
        looked = make_plan(read(train=train), tmp_path / "out").data
        assert (looked.rows["train"], looked.skipped["train"], looked.more) == (10, 0, ["train"]), "the other files are not empty"
    looked = make_plan(read(), tmp_path / "out").data
    assert (looked.rows["train"], looked.rows["heldout"], looked.more) == (10, 8, ["train"])


def test_equal_texts_are_held_out_together_whatever_else_their_rows_have(read: Any, tmp_path: Path) -> None:
    rows = [{**each, "id": number} for number, each in enumerate(chat_rows(60) + chat_rows(60))]
    recipe = read(heldout=None, heldout_fraction=0.3)
    write_rows(tmp_path / "train.jsonl", rows)
    train, heldout = ({json.dumps(row.record["messages"]) for row in reading.read(recipe, side)} for side in ("train", "heldout"))
    assert heldout
    assert not train & heldout
    assert len(train | heldout) == 60


def test_a_share_is_held_out_by_content(recipe_file: Any, tmp_path: Path, tokenizer: Any) -> None:
    def change(tree: dict[str, Any]) -> None:
        del tree["data"]["heldout"]
        tree["data"]["heldout_fraction"] = 0.25

    path = recipe_file(change)
    rows = chat_rows(200)
    write_rows(tmp_path / "train.jsonl", rows + rows)

    def sides() -> tuple[set[str], set[str]]:
        recipe = read_recipe(path)
        return tuple({json.dumps(row.record) for row in reading.read(recipe, which)} for which in ("train", "heldout"))  # type: ignore[return-value]

    train, heldout = sides()
    assert not train & heldout, "equal rows are on the same side"
    assert len(train | heldout) == 200
    assert 30 <= len(heldout) <= 70
    write_rows(tmp_path / "train.jsonl", chat_rows(300))
    assert heldout <= sides()[1], "more rows move none of the old ones"
    recipe = read_recipe(path)
    assert make_plan(recipe, tmp_path / "out").data.rows["heldout"] == len(sides()[1])
    assert len(heldout_rows(recipe, recipe.stages[0][1].task, tokenizer)[0]) == len(sides()[1])


LONG = {"prompt": "list " * 90, "completion": " az"}
KINDS = {
    "broken": "{",
    "control": {"prompt": "a\u0000b", "completion": "c"},
    "shape": {"prompt": "a"},
    "turns": {"messages": [{"role": "robot", "content": "a"}]},
    "empty": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
    "too_long": LONG,
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_bad_row_is_decided_by_itself(read: Any, tmp_path: Path, tokenizer: Any, kind: str) -> None:
    row = KINDS[kind]
    recipe = read(on_bad_row={kind: "skip"})
    write_rows(tmp_path / "train.jsonl", [*chat_rows(3), row])
    _, data = encoded(recipe, tokenizer)
    assert (data["rows"], data["skipped_by_kind"]) == (3, {kind: 1})
    other = {each: "skip" for each in ("broken", "control", "shape", "turns", "empty", "too_long") if each != kind}
    recipe = read(on_bad_row=other)
    write_rows(tmp_path / "train.jsonl", [*chat_rows(3), row])
    with pytest.raises(DataError, match=rf"train\.jsonl:4: .*; `data\.on_bad_row: {{{kind}: skip}}` leaves such rows out"):
        encoded(recipe, tokenizer)


@pytest.mark.parametrize("kind", ["encoding", "label", "unlearned"])
def test_the_other_kinds_are_left_out_through_a_recipe_too(recipe_file: Any, tmp_path: Path, tokenizer: Any, kind: str) -> None:
    good: list[Any] = chat_rows(3)
    task: dict[str, Any] = {"kind": "sft", "max_tokens": 128}
    if kind == "label":
        good = [{"text": f"list {number}", "label": "good"} for number in range(3)]
        task = {"kind": "classify", "labels": ["good", "bad"], "max_tokens": 128}
    rows = {
        "encoding": b'{"prompt": "caf\xe9", "completion": "az"}',
        "label": b'{"text": "list", "label": "neither"}',
        # What is learned begins behind max_tokens.
        "unlearned": json.dumps({"prompt": "list " * 200, "completion": "az"}).encode(),
    }

    def change(policy: Any) -> Callable[[dict[str, Any]], None]:
        def write(tree: dict[str, Any]) -> None:
            tree["data"] = {"train": "train.jsonl", "on_bad_row": policy}
            tree["stages"][0]["tune"]["task"] = task

        return write

    def read(policy: Any) -> Any:
        recipe = read_recipe(recipe_file(change(policy)))
        with write_rows(tmp_path / "train.jsonl", good).open("ab") as file:
            file.write(rows[kind] + b"\n")
        return recipe

    cut = {"too_long": "truncate"} if kind == "unlearned" else {}
    _, data = encoded(read({kind: "skip", **cut}), tokenizer)
    assert (data["rows"], data["skipped_by_kind"]) == (3, {kind: 1})
    with pytest.raises(DataError, match=rf"train\.jsonl:4: .*; `data\.on_bad_row: {{{kind}: skip}}` leaves such rows out"):
        encoded(read(cut), tokenizer)


def test_without_held_out_rows_the_first_training_rows_are_asked_and_no_others_read(
    read: Any, tmp_path: Path, tokenizer: Any
) -> None:
    recipe = read(heldout=None)
    write_rows(tmp_path / "train.jsonl", [*chat_rows(400), "{"])
    rows, skipped = heldout_rows(recipe, recipe.stages[0][1].task, tokenizer)
    assert [row.record for row, _ in rows] == chat_rows(recipe.evaluate.rows)
    assert skipped["skipped_rows"] == 0, "the damaged row was not reached"


ENCODE_AND_READ = """
import re, sys, threading, time
from pathlib import Path
from tuner.checkpoint import load_tokenizer
from tuner.data.dataset import heldout_rows, training_examples
from tuner.recipe import read_recipe

def memory_kb():  # without pages of files, which the system takes back when it needs them
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def watch():
    while True:
        most[0] = max(most[0], memory_kb())
        time.sleep(0.02)

recipe, tokenizer = read_recipe(Path(sys.argv[1])), load_tokenizer(Path(sys.argv[2]))
task, most = recipe.stages[0][1].task, [0]
threading.Thread(target=watch, daemon=True).start()
tokens = sum(len(each.ids) for each in training_examples(recipe, task, tokenizer)[0])
heldout_rows(recipe, task, tokenizer)
print(tokens, max(most[0], memory_kb()))
"""


@pytest.mark.slow
def test_data_need_not_fit_into_memory(tmp_path: Path, recipe_file: Any, tiny_model: Path) -> None:
    """Two thousand more rows of 10 kB take what is kept of each, its place and a few numbers, and what a library keeps for itself."""

    def measured(rows: int) -> tuple[int, int]:
        def change(tree: dict[str, Any]) -> None:
            del tree["data"]["heldout"]
            tree["stages"][0]["tune"]["task"]["max_tokens"] = 8192

        recipe = recipe_file(change)
        with (tmp_path / "train.jsonl").open("w") as file:
            for number in range(rows):
                file.write(json.dumps({"prompt": f"list {number}", "completion": " network storage account" * 400}) + "\n")
        done = subprocess.run([sys.executable, "-c", ENCODE_AND_READ, recipe, tiny_model], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        tokens, memory_kb = map(int, done.stdout.split())
        return tokens, memory_kb * 1024

    (few, before), (many, after) = measured(300), measured(2_300)
    assert (many - few) * 8 > 18_000_000, "ids and labels, of four bytes each, and as much text"
    assert after - before < 9_000_000


def test_rows_that_are_too_long_are_cut_where_the_recipe_says_so(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    recipe = read(on_bad_row={"too_long": "truncate"})
    answer = {"prompt": "list", "completion": " az vm" * 200}
    write_rows(tmp_path / "train.jsonl", [*chat_rows(3), answer])
    examples, data = encoded(recipe, tokenizer)
    assert data["cut_rows"] == 1
    assert max(len(each.ids) for each in examples) == 128 == recipe.stages[0][1].task.max_tokens
    write_rows(tmp_path / "train.jsonl", [LONG])
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: no token of this row would be learned: the assistant says nothing before max_tokens"
    ):
        encoded(read_recipe(recipe.path), tokenizer)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("stop", 'on_bad_row: "stop" is not one of the values; it is called error now'),
        ({"too_lon": "skip"}, 'there is no key "too_lon" here; did you mean "too_long"'),
        ({"control": "truncate"}, '"truncate" is not one of the values'),
    ],
)
def test_what_to_do_with_bad_rows_is_checked(read: Any, value: Any, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        read(on_bad_row=value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "a", "hub": "b"}, "a source has one of path, hub and function; found path and hub"),
        ({}, "a source has one of path, hub and function; found none"),
        ({"path": "a", "split": "test"}, "split is for a hub, and this source is a path"),
        ({"pth": "a"}, 'there is no key "pth" here; did you mean "path"'),
        ({"function": "rows"}, "function is "),
        ([], "at least 1 item"),
    ],
)
def test_a_source_that_says_too_little_or_too_much_is_refused(read: Any, source: Any, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        read(train=source)
    assert said in str(error.value)
    assert "recipe.yaml:" in str(error.value)


def test_the_second_time_nothing_is_encoded(read: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read()
    before, _ = encoded(recipe, tokenizer)
    monkeypatch.setattr("tuner.data.formats.rows", lambda part: pytest.fail("the file was read again"))
    after, _ = encoded(read_recipe(recipe.path), tokenizer)
    assert list(after) == list(before)
    assert after.lengths == [len(each.ids) for each in before]


def test_every_change_makes_an_entry_of_its_own(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    """One option after the other; each must leave what is kept under another key, or what is found is stale."""
    import copy

    changes: dict[str, Any] = {
        "another file": lambda: read(train="heldout.jsonl"),
        "a policy": lambda: read(on_bad_row={"too_long": "skip"}),
        "a map": lambda: read(map={"messages": "messages"}),
        "a fraction": lambda: read(heldout=None, heldout_fraction=0.5),
        "a source's options": lambda: read(train={"path": "train.jsonl", "format": "json"}),
    }
    recipe = read()
    encoded(recipe, tokenizer)
    known = entries()
    for what, make in changes.items():
        encoded(make(), tokenizer)
        assert len(entries() - known) == 1, what
        known = entries()
    recipe = read()
    training_examples(recipe, recipe.stages[0][1].task.model_copy(update={"max_tokens": 120}), tokenizer)
    assert len(entries() - known) == 1, "a task's option"
    known = entries()
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template + "{# another one, by its bytes #}"
    training_examples(recipe, recipe.stages[0][1].task, other)
    assert len(entries() - known) == 1, "the chat template"
    known = entries()
    write_rows(tmp_path / "train.jsonl", chat_rows(47))
    assert len(encoded(read_recipe(recipe.path), tokenizer)[0]) == 47
    assert len(entries() - known) == 1, "the file's content"


def test_nothing_half_written_is_kept_where_a_row_stops_the_run(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    recipe = read()
    write_rows(tmp_path / "train.jsonl", [*chat_rows(3, start=900), "{"])
    before = entries()
    with pytest.raises(DataError, match="train.jsonl:4"):
        encoded(recipe, tokenizer)
    assert entries() == before


@pytest.mark.slow
def test_two_runs_may_make_the_same_at_once(read: Any, tmp_path: Path, tiny_model: Path) -> None:
    recipe = read()
    code = (
        "import sys;from pathlib import Path;from tuner.checkpoint import load_tokenizer;from tuner.recipe import read_recipe;"
        "from tuner.data.dataset import training_examples;r=read_recipe(Path(sys.argv[1]));"
        "print(sum(len(each.ids) for each in training_examples(r,r.stages[0][1].task,load_tokenizer(Path(sys.argv[2])))[0]))"
    )
    environment = {**os.environ, "TUNER_CACHE": str(tmp_path / "cache")}
    runs = [
        subprocess.Popen([sys.executable, "-c", code, recipe.path, tiny_model], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    said = [run.communicate()[0].strip() for run in runs]
    assert all(said)
    assert len(set(said)) == 1
    assert len(os.listdir(tmp_path / "cache" / "examples")) == 1, "one of them was kept, and no part of another"


def test_a_file_that_changes_during_the_run_stops_it(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    recipe = read()
    reading.identity(recipe, "train")
    write_rows(tmp_path / "train.jsonl", chat_rows(20))
    with pytest.raises(DataError, match=r"train\.jsonl: changed since the run began; start it again"):
        encoded(recipe, tokenizer)
    recipe = read()
    rows = reading.read(recipe, "train")
    next(rows)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps(chat_rows(1, start=77)[0]) + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl: changed while it was read"):
        list(rows)


def test_a_function_that_draws_its_rows_anew_is_refused(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    recipe = read(train={"function": "mine.py:rows"})
    (tmp_path / "mine.py").write_text(
        "import time\ndef rows():\n    for _ in range(3):\n        yield {'prompt': f'{time.time_ns()}', 'completion': 'b'}\n"
    )
    with pytest.raises(DataError, match=r"mine\.py:rows: gives other rows each time; seed what it draws"):
        encoded(recipe, tokenizer)


def test_two_copies_of_a_function_do_not_take_each_others_place(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    """Its first rows are drawn again while the first copy waits at row 100; what it defines must still be found by name."""
    recipe = read(train={"function": "mine.py:rows"})
    (tmp_path / "mine.py").write_text(
        "import pickle\ndef work():\n    pass\ndef rows():\n    for number in range(150):\n        pickle.dumps(work)\n"
        "        yield {'prompt': f'list {number}', 'completion': ' az'}\n"
    )
    assert len(encoded(recipe, tokenizer)[0]) == 150


def test_a_function_is_called_as_seldom_as_can_be(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    """Once for all its rows, which are kept, and once more for the first hundred, to see whether they come again."""
    recipe = read(train={"function": "mine.py:rows"}, heldout=None, heldout_fraction=0.2)
    (tmp_path / "mine.py").write_text(
        "from datetime import date\nfrom pathlib import Path\ndef rows():\n    for number in range(500):\n"
        "        with (Path(__file__).parent / 'calls').open('a') as file:\n            file.write('.')\n"
        "        yield {'prompt': f'list {number}', 'completion': ' az', 'when': date(2026, 1, 1)}\n"
    )
    make_plan(recipe, tmp_path / "out")
    _, data = encoded(recipe, tokenizer)
    examine(recipe)
    heldout = heldout_rows(recipe, recipe.stages[0][1].task, tokenizer)[0]
    assert data["rows"] + len(heldout) == 500
    assert (tmp_path / "calls").stat().st_size == 500 + 100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def rows():\n    yield {'prompt': 'a', 'completion': 'b'}\n    raise ValueError('no')\n", "mine.py:3: rows failed at row 2: ValueError: no"),
        ("\nx = 1 / 0\n", "mine.py:2: cannot be imported: ZeroDivisionError"),
        ("import json\ndef rows():\n    yield json.loads('{')\n", "mine.py:3: rows failed at row 1: JSONDecodeError"),
        ("def rows():\n    raise SystemExit(3)\n", "mine.py:2: rows failed at row 1: SystemExit: 3"),
        ("def rows():\n    return []\n", "mine.py:rows: gives no rows"),
        ("import random\ndef rows():\n    return [{'prompt': str(random.random()), 'completion': 'b'}]\n", "mine.py:rows: gives other rows each time"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_function_is_said_by_check_with_its_line(
    recipe_file: Any, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "sub").mkdir()
    recipe = read_recipe(recipe_file(lambda tree: tree["data"].update(train={"function": "sub/../mine.py:rows"})))
    with pytest.raises(DataError) as error:
        make_plan(recipe, tmp_path / "out")
    assert said in str(error.value)


def test_sources_of_one_name_are_told_apart_by_their_arguments(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    recipe = read(train={"function": "mine.py:rows", "args": {"n": 3}}, heldout={"function": "mine.py:rows", "args": {"n": 2}})
    (tmp_path / "mine.py").write_text(
        "def rows(n):\n    for each in range(n):\n        yield {'prompt': f'{n} {each}', 'completion': 'b'}\n"
    )
    assert reading.identity(recipe, "train") != reading.identity(recipe, "heldout")
    assert encoded(recipe, tokenizer)[1]["rows"] == 3
    assert len(heldout_rows(recipe, recipe.stages[0][1].task, tokenizer)[0]) == 2


def test_a_fraction_is_held_out_of_the_training_rows_alone(read: Any, tmp_path: Path) -> None:
    recipe = read(heldout=None, heldout_fraction=0.5, test="test.jsonl", on_bad_row={"broken": "skip"})
    write_rows(tmp_path / "test.jsonl", chat_rows(30, start=300))
    write_rows(tmp_path / "train.jsonl", [*chat_rows(30), "{"])
    counts = {which: [isinstance(row, DataError) for row in reading.read(recipe, which)] for which in ("train", "heldout", "test")}
    assert len(counts["test"]) == 30
    assert (sum(counts["train"]), sum(counts["heldout"])) == (1, 0), "a row that cannot be read is counted once"


def test_a_list_on_one_line_loses_no_row(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    recipe = read(train="a.json", heldout="b.json")
    (tmp_path / "a.json").write_text(json.dumps(chat_rows(20)))
    (tmp_path / "b.json").write_text(json.dumps(chat_rows(7, start=50)))
    assert encoded(recipe, tokenizer)[1]["rows"] == 20
    assert len(heldout_rows(recipe, recipe.stages[0][1].task, tokenizer)[0]) == 7


def test_an_empty_file_among_others_can_be_left_out(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    recipe = read(train="*rows.jsonl", on_bad_row={"broken": "skip"})
    write_rows(tmp_path / "a-rows.jsonl", chat_rows(3))
    write_rows(tmp_path / "b-rows.jsonl", [])
    _, data = encoded(recipe, tokenizer)
    assert (data["rows"], data["skipped_by_kind"]) == (3, {"broken": 1})


def test_columns_of_conll_files_are_chosen_by_number(read: Any, tmp_path: Path) -> None:
    recipe = read(train={"path": "a.conll", "map": {"words": 1, "tags": 2}})
    (tmp_path / "a.conll").write_text("U.N. NNP B-ORG\n\nEkeus NNP B-PER\n")
    rows = [row.record for row in reading.read(recipe, "train") if not isinstance(row, DataError)]
    assert rows == [{"words": ["U.N."], "tags": ["NNP"]}, {"words": ["Ekeus"], "tags": ["NNP"]}]


def test_a_data_set_of_which_nothing_is_left_is_said(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    recipe = read(on_bad_row="skip")
    write_rows(tmp_path / "train.jsonl", ["{"])
    examples, data = encoded(recipe, tokenizer)
    assert (len(examples), data["skipped_rows"]) == (0, 1)


def test_a_cache_that_cannot_be_written_is_said_and_one_that_is_damaged_made_again(
    read: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    recipe = read()
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    os.utime(tmp_path / "train.jsonl", (0, 0))  # long enough ago for its hash to be remembered
    wanted = list(encoded(recipe, tokenizer)[0])
    (entry,) = (tmp_path / "cache" / "examples").iterdir()
    (entry / "info.json").unlink()
    assert list(encoded(recipe, tokenizer)[0]) == wanted
    for name, damage in (("examples.arrow", b"ARROW1"), ("examples.arrow", b""), ("info.json", b"{}"), ("info.json", b"[")):
        (entry / name).write_bytes(damage)
        assert list(encoded(recipe, tokenizer)[0]) == wanted, name
    for note in (tmp_path / "cache" / "hashes").iterdir():
        note.write_text("{}")
    assert list(encoded(read_recipe(recipe.path), tokenizer)[0]) == wanted
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="nothing can be kept there .*; TUNER_CACHE names another folder"):
        encoded(recipe, tokenizer)


def test_what_no_one_has_used_for_a_month_is_removed(
    read: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    days = 86_400
    for name, age in (("old", 31), ("new", 29), (".killed.part", 2), (".at-work.part", 0)):
        (tmp_path / "cache/examples" / name).mkdir(parents=True)
        os.utime(tmp_path / "cache/examples" / name, (time.time() - age * days,) * 2)
    encoded(read(), tokenizer)
    left = {each.name for each in (tmp_path / "cache/examples").iterdir()}
    assert {"new", ".at-work.part"} < left
    assert not {"old", ".killed.part"} & left


def test_a_files_hash_is_remembered_until_it_is_written_to(tmp_path: Path) -> None:
    from tuner.data.files import sha256_of

    path = tmp_path / "a.jsonl"
    path.write_text("one")
    first = sha256_of(str(path))
    path.write_text("two")
    assert sha256_of(str(path)) != first, "written within the same tick of the clock"
    old = time.time() - 60
    os.utime(path, (old, old))
    second = sha256_of(str(path))
    asked = []
    assert cache.remembered(os.path.realpath(path), path.stat(), lambda: asked.append(1) or "new") == second
    assert not asked
    path.write_text("six")
    os.utime(path, (old, old))
    assert sha256_of(str(path)) != second, "the same size and the same time of writing"


def test_examples_of_every_task_come_back_as_they_were(tmp_path: Path) -> None:
    from tuner.data.example import Example, Labelled, Tagged, Texts
    from tuner.preference import Judged, Pair
    from tuner.tasks.masked import Maskable

    one, two = Example([1, 2, 3], [-100, 2, 3]), Example([1, 9], [-100, 9], cut=True)
    for kept in (
        one,
        Tagged([1, 2], [0, -100]),
        Labelled([1, 2], [0.0, 1.0], 2.5, True),
        Texts([[1], [2, 3]], None),
        Texts([[1], [2, 3]], 0.25),
        Pair(one, two),
        Judged(one, False),
        Judged(one, True, two, (0.5, -1.0)),
        Maskable([1, 2, 3], [[0], [1, 2]], 0.15),
    ):
        found = cache.stored(f"test-{tmp_path.name}-{hash(str(kept))}", lambda info, kept=kept: iter([("f:1", None, 0, kept)] * 3))
        assert list(found) == [kept] * 3
        assert found.column("length") == [len(kept.ids)] * 3


def test_conversations_with_tools_are_learned_where_the_template_shows_them(read: Any, tmp_path: Path, tokenizer: Any) -> None:
    import copy

    call = {"type": "function", "function": {"name": "list_vms", "arguments": '{"group": "one"}'}}
    turns = [
        {"role": "user", "content": "list"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "vm one"},
        {"role": "assistant", "content": "there is one"},
    ]
    row = {"messages": turns, "tools": [{"type": "function", "function": {"name": "list_vms", "parameters": {}}}]}
    recipe = read()
    write_rows(tmp_path / "train.jsonl", [row])
    with pytest.raises(DataError, match=r"train\.jsonl:1: the model's chat template does not show tools"):
        encoded(recipe, tokenizer)
    write_rows(tmp_path / "train.jsonl", [{"messages": turns}])
    with pytest.raises(DataError, match=r"messages\[1\]: the model's chat template does not show tool calls"):
        encoded(read_recipe(recipe.path), tokenizer)
    write_rows(tmp_path / "train.jsonl", [row])
    able = copy.deepcopy(tokenizer)
    able.chat_template = (
        "{% if tools %}{{ tools[0].function | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments.group }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (example,), _ = encoded(read_recipe(recipe.path), able)
    learned = able.decode([token for token, label in zip(example.ids, example.labels, strict=True) if label != -100])
    assert learned == "list_vms one<|im_end|>there is one<|im_end|>"
    write_rows(tmp_path / "train.jsonl", [{"messages": [turns[0], turns[2]]}])
    with pytest.raises(DataError, match='the role is "tool", expected assistant here'):
        encoded(read_recipe(recipe.path), able)


def test_rows_that_begin_with_the_same_question_are_held_out_together(read: Any, tmp_path: Path) -> None:
    """In whatever case, blanks and form of Unicode it is written, and however the conversation goes on."""
    import unicodedata

    from tuner.data import reading

    rows = []
    for number in range(60):
        asked = f"Où est la numéro {number} ?"
        first = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"là {number}"}]
        other = [
            {"role": "user", "content": unicodedata.normalize("NFD", asked.upper()).replace(" ", "  ")},
            {"role": "assistant", "content": "ici"},
        ]
        longer = [*first, {"role": "user", "content": "et après ?"}, {"role": "assistant", "content": f"{number} encore"}]
        rows += [{"messages": each} for each in (first, other, longer)]
    recipe = read(heldout=None, heldout_fraction=0.3)
    write_rows(tmp_path / "train.jsonl", rows)
    sides = [[int(row.place.rpartition(":")[2]) - 1 for row in reading.read(recipe, side)] for side in ("train", "heldout")]
    train, heldout = ({at // 3 for at in side} for side in sides)
    assert train & heldout == set()
    assert train | heldout == set(range(60))
    assert 5 < len(heldout) < 35

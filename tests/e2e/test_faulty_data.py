"""Data that is damaged, closed, endless or changing, met by the real command line: a sentence that helps, or the right result."""

import gzip
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.conftest import chat_rows, command, tuner, write_rows

ROWS = chat_rows(60)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def cut_gzip(folder: Path) -> str:
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(LINES)[:-20])
    return "rows.jsonl.gz"


def half_parquet(folder: Path) -> str:
    parquet.write_table(pa.table({"prompt": ["list"] * 99, "completion": ["az"] * 99}), folder / "rows.parquet")
    whole = (folder / "rows.parquet").read_bytes()
    (folder / "rows.parquet").write_bytes(whole[: len(whole) // 2])
    return "rows.parquet"


def long_line(folder: Path, name: str = "rows.jsonl") -> str:
    with (folder / name).open("wb") as file:
        file.write(b'[{"prompt": "' if name.endswith(".json") else b'{"prompt": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'", "completion": "az"}]\n' if name.endswith(".json") else b'", "completion": "az"}\n')
    return name


def many_rows_on_one_line(folder: Path) -> str:
    """An ordinary JSON file of 200 MB, as `json.dump` writes it: nothing is wrong with it."""
    row = json.dumps({**ROWS[0], "note": "x" * 100_000})
    with (folder / "rows.json").open("w") as file:
        file.write("[" + ", ".join([row] * 2_000) + "]")
    return "rows.json"


def stray_quote(folder: Path) -> str:
    (folder / "rows.csv").write_text('prompt,completion\nlist,az\n"list,az\nshow,az\n')
    return "rows.csv"


def closed_folder(folder: Path) -> str:
    (folder / "rows").mkdir()
    (folder / "rows" / "a.jsonl").write_bytes(LINES)
    (folder / "rows").chmod(0)
    return "rows"


def closed_to_a_pattern(folder: Path) -> str:
    return f"{closed_folder(folder)}/*.jsonl"


def link_that_leads_back(folder: Path) -> str:
    (folder / "rows").mkdir()
    (folder / "rows" / "a.jsonl").write_bytes(LINES)
    (folder / "rows" / "again").symlink_to(folder / "rows")
    return "rows"


def link_to_itself(folder: Path) -> str:
    (folder / "rows.jsonl").symlink_to(folder / "rows.jsonl")
    return "rows.jsonl"


# What is prepared, and what is said of it, or how many rows there are.
FAULTS: dict[str, tuple[Callable[[Path], str], str | int]] = {
    "a truncated gzip": (cut_gzip, "rows.jsonl.gz: cannot be unpacked: Truncated compressed stream; is it whole?"),
    "half a Parquet file": (half_parquet, "rows.parquet: not a whole Parquet file: "),
    "a JSON line of 200 MB": (long_line, "rows.jsonl:1: longer than 32 MB, expected one row a line"),
    "a row of 200 MB in a list": (
        lambda folder: long_line(folder, "rows.json"),
        "rows.json:1: longer than 32 MB, expected one row of many",
    ),
    "200 MB of rows on one line": (many_rows_on_one_line, 2_000),
    "a stray quote": (
        stray_quote,
        "rows.csv:3: not CSV (unexpected end of data) in the row that begins here; is there a stray quote",
    ),
    "a folder that may not be read": (closed_folder, "rows: cannot be read: Permission denied"),
    "such a folder, by a pattern": (closed_to_a_pattern, "rows: cannot be read: Permission denied"),
    "a link that leads back": (link_that_leads_back, 60),
    "a link to itself": (link_to_itself, "rows.jsonl: cannot be read: Too many levels of symbolic links"),
}


# Nearly a minute.
SLOW = {"200 MB of rows on one line"}


def as_anyone(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user whom permissions concern: root, too, without the right to pass over them."""
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    return subprocess.run([*without, *command(*arguments)], capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize("fault", [pytest.param(each, marks=pytest.mark.slow if each in SLOW else ()) for each in FAULTS])
def test_faulty_data_is_a_sentence_or_the_right_result(recipe_file: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    prepare, expected = FAULTS[fault]

    def change(tree: dict[str, Any]) -> None:
        tree["data"]["train"] = f"data/{prepare(tmp_path / 'data')}"

    (tmp_path / "data").mkdir()
    cache = tmp_path / "cache"
    # `check` meets what is wrong, as `data` and `run` would at their beginning; only the latter two make something to keep.
    asked = ["data", recipe_file(change), "--rows", "0"] if isinstance(expected, int) else ["check", recipe_file(change)]
    done = as_anyone(*asked, TUNER_CACHE=str(cache))
    assert "Traceback" not in done.stderr
    if isinstance(expected, int):
        assert done.returncode == 0, done.stderr
        assert f"{expected} rows, " in done.stdout
    else:
        assert done.returncode == 2, done.stdout
        assert expected in done.stderr


def test_a_file_that_grows_during_the_run_stops_it(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """It grows while it is read: by the user's own function, which stands behind it."""
    recipe = recipe_file(lambda tree: tree["data"].update(train=["train.jsonl", {"function": "grow.py:rows"}]))
    (tmp_path / "grow.py").write_text(
        "import json\nfrom pathlib import Path\ndef rows():\n"
        "    with (Path(__file__).parent / 'train.jsonl').open('a') as file:\n        file.write('{}\\n')\n"
        "    yield {'prompt': 'list', 'completion': 'az'}\n"
    )
    done = tuner("run", recipe, "--out", tmp_path / "out", TUNER_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2, done.stderr
    assert "train.jsonl: changed since the run began; start it again" in done.stderr


@pytest.mark.slow
def test_two_runs_at_once_share_a_cache_and_end_alike(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_file()
    write_rows(tmp_path / "train.jsonl", chat_rows(2_000, start=1_000))
    environment = {**os.environ, "TUNER_CACHE": str(tmp_path / "cache")}
    runs = [
        subprocess.Popen(command("run", recipe, "--out", tmp_path / name), stderr=subprocess.PIPE, text=True, env=environment)
        for name in ("one", "two")
    ]
    for each in runs:
        _, said = each.communicate(timeout=300)
        assert each.returncode == 0, said
    weights = [(tmp_path / name / "tune" / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert not list((tmp_path / "cache").rglob("*.part"))

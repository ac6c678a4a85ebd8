"""Files in every form that people keep rows in, and files that are damaged."""

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner.data import formats, reading
from tuner.data.files import Source, parts
from tuner.data.rows import Row, check_texts
from tuner.errors import DataError
from tuner.recipe import rows_only

ROWS = [{"text": "eins", "label": "a"}, {"text": 'zwei, "drei"\nvier', "label": "b"}, {"text": "fünf", "label": "a"}]


def read(path: Any, **source: Any) -> list[Row | DataError]:
    return [row for part in parts(Source(path=str(path), **source))[0] for row in formats.rows(part)]


def records(path: Any, **source: Any) -> list[dict[str, Any]]:
    found = read(path, **source)
    for row in found:
        if isinstance(row, DataError):
            raise row
    return [row.record for row in found if isinstance(row, Row)]


def places(path: Any, **source: Any) -> list[str]:
    return [row.place.rpartition("/")[2] for row in read(path, **source) if isinstance(row, Row)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[Any]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def csv_of(rows: list[Any], delimiter: str) -> bytes:
    import csv
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(path: Path, rows: list[Any]) -> None:
    pyarrow.parquet.write_table(table(rows), path)


def arrow(path: Path, rows: list[Any], *, stream: bool) -> None:
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table(rows).schema) as writer:
        writer.write_table(table(rows))


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(lines(ROWS)),
    "rows.ndjson": lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n")),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(ROWS[:1])) + gzip.compress(lines(ROWS[1:]))),
    "rows.jsonl.zst": lambda path: path.write_bytes(pa.compress(lines(ROWS), codec="zstd", asbytes=True)),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "inside.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "lines.json": lambda path: path.write_bytes(lines(ROWS)),
    "rows.csv": lambda path: path.write_bytes(csv_of(ROWS, ",")),
    "semicolons.csv": lambda path: path.write_bytes(csv_of(ROWS, ";")),
    "rows.tsv": lambda path: path.write_bytes(csv_of(ROWS, "\t")),
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_of(ROWS, ","))),
    "rows.parquet": lambda path: parquet(path, ROWS),
    "file.arrow": lambda path: arrow(path, ROWS, stream=False),
    "stream.arrow": lambda path: arrow(path, ROWS, stream=True),
    "rows.feather": lambda path: arrow(path, ROWS, stream=False),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_come_out_of_every_format(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert records(tmp_path / name) == ROWS


def test_every_row_knows_its_line_or_its_number(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "list.json", "rows.csv", "rows.parquet"):
        WRITERS[name](tmp_path / name)
    assert places(tmp_path / "rows.jsonl") == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    assert places(tmp_path / "list.json") == ["list.json:2", "list.json:6", "list.json:10"]
    assert places(tmp_path / "rows.csv") == ["rows.csv:2", "rows.csv:3", "rows.csv:5"], "the second row is two lines long"
    assert places(tmp_path / "rows.parquet") == ["rows.parquet:row 1", "rows.parquet:row 2", "rows.parquet:row 3"]


def test_conll_files_give_words_and_tags(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("-DOCSTART- -X- O\n\nU.N. NNP B-ORG\nofficial NN O\n\n\nEkeus NNP B-PER\n")
    assert records(tmp_path / "a.conll") == [
        {"words": ["U.N.", "official"], "tags": ["B-ORG", "O"]},
        {"words": ["Ekeus"], "tags": ["B-PER"]},
    ]
    assert records(tmp_path / "a.conll", map={"words": 1, "tags": 2})[1] == {"words": ["Ekeus"], "tags": ["NNP"]}
    rows = ["# text = do gato", "1-2\tdo\t_\t_", "1\tde\tde\tADP", "2\to\to\tDET", "3\tgato\tgato\tNOUN", "", ""]
    (tmp_path / "b.conllu").write_text("\n".join(rows))
    assert records(tmp_path / "b.conllu") == [{"words": ["de", "o", "gato"], "tags": ["ADP", "DET", "NOUN"]}]
    (tmp_path / "c.conll").write_text("one B-X\ntwo\n")
    with pytest.raises(DataError, match=r"c\.conll:2: 1 columns, expected a word and its tag"):
        records(tmp_path / "c.conll")


def test_text_is_cut_into_documents_as_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    (tmp_path / "b.md").write_text("# one\n\ntwo\n")
    assert [row["text"] for row in records(tmp_path / "a.txt")] == ["one\ntwo\n", "three\n"]
    assert [row["text"] for row in records(tmp_path / "b.md")] == ["# one\n\ntwo\n"]
    assert [row["text"] for row in records(tmp_path / "a.txt", documents="file")] == ["one\ntwo\n\n\nthree\n"]
    assert [row["text"] for row in records(tmp_path / "a.txt", documents="line")] == ["one", "two", "three"]
    assert places(tmp_path / "a.txt") == ["a.txt:1", "a.txt:5"]


def test_folders_and_patterns_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "a/notes.pdf", ".git/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert [row["text"] for row in records(tmp_path)] == ["a/1.jsonl", "b/2.jsonl"]
    assert [Path(path).name for path in parts(Source(path=str(tmp_path)))[1]] == ["notes.pdf"], "said, not dropped"
    assert [row["text"] for row in records(tmp_path / "*" / "*.jsonl")] == ["a/1.jsonl", "b/2.jsonl"]
    with pytest.raises(DataError, match="no file matches this pattern"):
        records(tmp_path / "*.parquet")
    with pytest.raises(
        DataError, match=r"notes\.pdf: its ending says nothing; in a recipe a source can have format: jsonl, json, csv"
    ):
        records(tmp_path / "a" / "notes.pdf")
    assert records(tmp_path / "a" / "notes.pdf", format="jsonl") == [{"text": "a/notes.pdf"}]


def test_what_the_datasets_library_writes_beside_rows_is_no_row(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([{"text": "a"}, {"text": "b"}])}).save_to_disk(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").rglob("*.json")} == {"dataset_dict.json", "dataset_info.json", "state.json"}
    assert [row["text"] for row in records(tmp_path / "saved")] == ["a", "b"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "state.json").write_text('[{"text": "of a state"}]')
    assert records(tmp_path / "mine") == [{"text": "of a state"}]
    one = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    one.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-0123.arrow").write_bytes((tmp_path / "one" / "data-00000-of-00001.arrow").read_bytes())
    assert [row["text"] for row in records(tmp_path / "one")] == ["a", "b"]
    DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="is a data set of the splits train, test; name one, such as .*two/train"):
        records(tmp_path / "two")


def test_a_pipe_beside_files_is_said_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    os.mkfifo(tmp_path / "b.jsonl")
    for path in (tmp_path, tmp_path / "*.jsonl", tmp_path / "b.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl: is no ordinary file"):
            records(path)


def test_two_links_that_lead_back_are_two_to_the_fortieth_ways_for_a_pattern_and_one_here(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "one").symlink_to(".")
    (tmp_path / "two").symlink_to(".")
    assert records(tmp_path / "**" / "*.jsonl") == ROWS
    assert records(tmp_path / "**") == ROWS


@pytest.mark.parametrize(
    "pattern",
    ["*/*.jsonl", "**/*.jsonl", "*/**/*.jsonl", "*/", "a/*", "?/[12].jsonl", "*/2*", "*/.x.jsonl", "**/b/2.jsonl", "none/*"],
)
def test_a_pattern_finds_what_globs_own_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    from glob import glob

    for name in ("0.jsonl", "a/1.jsonl", "a/b/2.jsonl", "b/2.jsonl", "b/.x.jsonl", ".c/3.jsonl", "b/[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    for base in (str(tmp_path / pattern), pattern):
        monkeypatch.chdir(tmp_path)
        wanted = sorted(os.path.realpath(each) for each in glob(base, recursive=True) if not os.path.isdir(each))
        if wanted:
            assert sorted(os.path.realpath(part.path) for part in parts(Source(path=base))[0]) == wanted
        else:
            with pytest.raises(DataError, match="no file matches this pattern"):
                parts(Source(path=base))


def test_values_that_are_no_text_are_found_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from datetime import date\nfrom decimal import Decimal\nimport numpy\n"
        "def half():\n    yield {'text': 'a \\ud800 b'}\ndef call():\n    yield {'text': 'a'}\n    yield {'text': 'a', 'f': len}\n"
        "def plain():\n    yield {'text': 'a', 'on': date(2026, 1, 2), 'of': Decimal('1.5'), 'n': numpy.int64(3), 'v': numpy.ones(2)}\n"
    )

    def made(name: str) -> list[Any]:
        return list(formats.rows(parts(Source(function=f"{tmp_path}/mine.py:{name}"))[0][0]))

    assert made("plain")[0].record == {"text": "a", "on": "2026-01-02", "of": "1.5", "n": 3, "v": [1.0, 1.0]}
    with pytest.raises(DataError, match=r"half of a surrogate pair, which is no character: U\+D800"):
        check_texts(made("half")[0].record)
    with pytest.raises(DataError, match=r"mine\.py:call:row 2: found a builtin_function_or_method, expected text, numbers"):
        made("call")
    turns = json.dumps([{"role": "user", "content": "a \ud83d"}, {"role": "assistant", "content": "b"}])
    nul = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "\x00b"}])
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [turns], [nul]])
    recipe = rows_only(str(tmp_path / "a.csv"), [])
    found = [str(row) for row in reading.read(recipe, "train")]
    assert "a.csv:2: half of a surrogate pair, which is no character: U+D83D" in found[0]
    assert "a.csv:3: the control character U+0000" in found[1]


def test_a_json_file_of_lines_that_is_no_utf8_has_bad_rows_and_a_list_says_why_not(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "b"}\n')
    found = read(str(tmp_path / "a.json"))
    assert [isinstance(row, DataError) for row in found] == [False, True, False]
    assert found[1].kind == "encoding"
    (tmp_path / "b.json").write_bytes(b'[{"text": "a"}, {"text": "caf\xe9"}]')
    with pytest.raises(DataError, match="a list is read whole, so no row of it can be left out"):
        read(str(tmp_path / "b.json"))


def test_a_link_that_leads_back_is_followed_once(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "in" / "again").symlink_to(tmp_path)
    assert records(tmp_path) == ROWS
    (tmp_path / "x").symlink_to(tmp_path / "y")
    (tmp_path / "y").symlink_to(tmp_path / "x")
    with pytest.raises(DataError, match=r"x: cannot be read: Too many levels of symbolic links"):
        records(tmp_path / "x")


def test_values_of_a_parquet_file_that_python_has_not_are_said_of_their_row(tmp_path: Path) -> None:
    late = pa.array([0, 400_000_000_000_000_000], pa.timestamp("us"))
    text = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\4\0\0\0"), pa.py_buffer(b"afr\xf6"))
    for name, table in (("late", pa.table({"text": ["a", "b"], "when": late})), ("latin", pa.table({"text": text}))):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        good, bad = read(tmp_path / f"{name}.parquet")
        assert isinstance(good, Row) and good.record["text"] == "a"
        assert isinstance(bad, DataError)
        said = (
            ("broken", 'the column "when" holds')
            if name == "late"
            else ("encoding", 'the column "text" holds bytes that are not UTF-8')
        )
        assert bad.kind == said[0] and f"{name}.parquet:row 2: {said[1]}" in str(bad)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_an_empty_cell_where_a_text_belongs_is_empty(tmp_path: Path, name: str) -> None:
    from tuner.data.reading import read as read_rows
    from tuner.recipe import rows_only
    from tuner.tasks import sft

    cells = [{"prompt": "a", "completion": "b", "note": None}, {"prompt": None, "completion": "c", "note": "d"}]
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text("prompt,completion,note\na,b,\n,c,d\n")
    else:
        parquet(path, cells)
    good, bad = (row for row in read_rows(rows_only(str(path)), "train") if isinstance(row, Row))
    assert good.record == {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError) as refused:
        sft.check_row(bad.record, sft.Options())
    assert refused.value.kind == "empty"


def test_a_url_is_read_through_its_file_system(tmp_path: Path) -> None:
    """A real server on loopback; object stores come through the same interface."""
    WRITERS["rows.jsonl.gz"](tmp_path / "rows.jsonl.gz")
    WRITERS["rows.parquet"](tmp_path / "rows.parquet")
    code = "import http.server as h,os;s=h.ThreadingHTTPServer(('127.0.0.1',0),h.SimpleHTTPRequestHandler);print(s.server_port,flush=True);s.serve_forever()"
    server = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        for name in ("rows.jsonl.gz", "rows.parquet"):
            assert records(f"{url}/{name}") == ROWS
            (part,) = parts(Source(path=f"{url}/{name}"))[0]
            assert len(part.identity()) == 64
        with pytest.raises(DataError, match=r"missing\.jsonl"):
            records(f"{url}/missing.jsonl")
    finally:
        server.kill()
        server.wait()
    with pytest.raises(DataError, match=r"rows\.parquet: nothing is found there"):
        records(f"{url}/rows.parquet")
    with pytest.raises(DataError, match="nosuch://x/a.jsonl"):
        records("nosuch://x/a.jsonl")


def test_an_object_store_is_read_by_folder_pattern_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kind of file that s3fs and gcsfs give, which is not Python's own."""
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.spec import AbstractBufferedFile

    class Stored(AbstractBufferedFile):  # type: ignore[misc]
        def _fetch_range(self, start: int, end: int) -> bytes:
            return bytes(self.fs.cat_file(self.path, start, end))

    store = MemoryFileSystem()
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.parquet"):
        WRITERS[name](tmp_path / name)
        store.pipe_file(f"/bucket/{name}", (tmp_path / name).read_bytes())
    try:
        monkeypatch.setattr(MemoryFileSystem, "open", lambda own, path: Stored(own, path, "rb", size=own.info(path)["size"]))
        for name in ("rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.parquet"):
            assert records(f"memory://bucket/{name}") == records(str(tmp_path / name))
        assert records("memory://bucket/rows.jsonl*") == ROWS * 2
        assert len(records("memory://bucket/")) == 4 * len(ROWS)
    finally:
        store.rm("/bucket", recursive=True)


def test_a_data_set_of_the_hub_is_read_by_the_datasets_library(tmp_path: Path) -> None:
    """From a local folder in the hub's form, since tests have no hub; the call is the same."""
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set" / "train.parquet", ROWS)
    (part,) = parts(Source(hub=str(tmp_path / "set")))[0]
    assert [row.record for row in formats.rows(part) if isinstance(row, Row)] == ROWS
    assert part.identity() == part.identity()
    from datasets import ClassLabel, Dataset, Features, List, Value

    (tmp_path / "named").mkdir()
    label = ClassLabel(names=["bad", "good"])
    features = Features({"text": Value("string"), "label": label, "tags": List(ClassLabel(names=["O", "B-X"]))})
    given = {"text": ["a", "b"], "label": [1, 0], "tags": [[0, 1], [0]]}
    Dataset.from_dict(given, features=features).to_parquet(str(tmp_path / "named" / "train.parquet"))
    (part,) = parts(Source(hub=str(tmp_path / "named")))[0]
    named = [row.record for row in formats.rows(part) if isinstance(row, Row)]
    assert named == [{"text": "a", "label": "good", "tags": ["O", "B-X"]}, {"text": "b", "label": "bad", "tags": ["O"]}]
    with pytest.raises(DataError, match="split test"):
        list(formats.rows(parts(Source(hub=str(tmp_path / "set"), split="test"))[0][0]))


def test_a_function_of_the_users_own_gives_rows(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def rows(count):\n    for number in range(count):\n        yield {'text': f'{number}'}\n\n\n"
        "def wrong():\n    yield {'text': 'x'}\n    raise KeyError('gone')\n"
    )

    def made(name: str, **args: Any) -> list[Any]:
        (part,) = parts(Source(function=f"{tmp_path}/mine.py:{name}", args=args))[0]
        return list(formats.rows(part))

    assert [row.record for row in made("rows", count=2)] == [{"text": "0"}, {"text": "1"}]
    with pytest.raises(DataError, match=r"mine\.py:8: wrong failed at row 2: KeyError: 'gone'"):
        made("wrong")
    with pytest.raises(DataError, match='there is no function "row"; did you mean "rows"'):
        made("row")
    with pytest.raises(DataError, match="TypeError: rows.. missing 1 required positional argument"):
        made("rows")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("rows.jsonl", b"PAR1\x15\x04", "rows.jsonl: a Parquet file; call it .parquet, expected jsonl"),
        ("rows.csv", "text\nx\n".encode("utf-16"), "rows.csv: UTF-16 text; write it as UTF-8, expected csv"),
        ("rows.jsonl", gzip.compress(b"{}"), "rows.jsonl: packed by gzip; call it .gz, expected jsonl"),
        ("cut.jsonl.gz", gzip.compress(lines(ROWS * 99))[:-20], "cut.jsonl.gz: cannot be unpacked: Truncated compressed stream; is it whole?"),
        ("cut.jsonl.zst", pa.compress(lines(ROWS * 99), codec="zstd", asbytes=True)[:-8], "cut.jsonl.zst: cannot be unpacked: Truncated"),
        ("no.jsonl.gz", b"plain", "no.jsonl.gz: cannot be unpacked"),
        ("half.parquet", None, "half.parquet: not a whole Parquet file: "),
        ("half.arrow", None, "half.arrow: not a whole Arrow file: "),
        ("cut.json", b'[{"text": "a"}, {"text": "b"}', "cut.json:1, row 2: expected a comma or the end of the list behind this row; is the file whole?"),
        ("cut2.json", b'[\n{"text": "a"},\n{"text"', "cut2.json:3: not JSON (Expecting ':' delimiter)"),
        ("number.json", b"17", "number.json:1: found a int, expected a list of objects"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "b"\n', "bad.jsonl:2: not JSON (Expecting ',' delimiter), found '{\"text\": \"b\"'; expected one object a line"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "latin.jsonl:2: not UTF-8 text: byte 0xe9 at column 14"),
        ("latin.csv", b"text,label\na,b\ncaf\xe9,b\n", "latin.csv:3: not UTF-8 text: byte 0xe9 at column 4"),
        ("quote.csv", b'text,label\na,b\n"c,d\ne,f\n', 'quote.csv:3: not CSV (unexpected end of data) in the row that begins here; is there a stray quote (")?'),
        ("quote2.csv", b'text,label\n"a"b,c\n', "quote2.csv:2: not CSV (',' expected after '\"')"),
        ("fields.csv", b"text,label\na,b,c\n", "fields.csv:2: 3 fields, expected 2: text, label"),
        ("names.csv", b"text,text\na,b\n", 'names.csv:1: the name "text" twice'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_said(tmp_path: Path, name: str, data: bytes | None, said: str) -> None:
    path = tmp_path / name
    if data is None:
        WRITERS["rows.parquet" if name.endswith("parquet") else "file.arrow"](path)
        data = path.read_bytes()
        data = data[: len(data) // 2]
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        records(path)
    assert said in str(error.value)
    assert str(error.value).startswith(str(tmp_path))


def test_a_line_of_200_mb_is_refused_in_little_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "b"}\n')
    code = (
        "import re,sys;from tests.unit.test_formats import read;found=read(sys.argv[1]);"
        "print([getattr(row,'record',row) for row in found]);"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)',open('/proc/self/status').read())[1])//1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.jsonl"], capture_output=True, text=True)
    said, memory_mb = done.stdout.splitlines()
    assert "{'text': 'a'}, DataError(" in said
    assert "a.jsonl:2: longer than 32 MB, expected one row a line" in said
    assert said.endswith("{'text': 'b'}]")
    assert int(memory_mb) < 400, "the file alone is 200 MB, and its text and tree would be four times that"


def test_words_that_begin_like_the_mark_of_a_format_are_words(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ARROWS fly.\n")
    (tmp_path / "b.csv").write_text("PARTY,label\nx,y\n")
    (tmp_path / "c.csv").write_text("PAR1,label\nx,y\n")
    assert [len(read(tmp_path / name)) for name in ("a.txt", "b.csv", "c.csv")] == [1, 1, 1]


def test_a_byte_that_is_no_text_costs_one_line_wherever_it_stands(tmp_path: Path) -> None:
    good = b'{"text": "a"}\n'
    for name, data in (("first", b'{"text": "caf\xe9"}\n' + good), ("mark", b"\xef\xbb\xbf" + good + b'{"text": "caf\xe9"}\n')):
        (tmp_path / f"{name}.json").write_bytes(data)
        found = read(tmp_path / f"{name}.json")
        assert [type(each).__name__ for each in found].count("Row") == 1
        assert ["byte 0xe9" in str(each) for each in found].count(True) == 1


def test_a_folder_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can become another user")
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(ROWS))
    for each in (tmp_path, *list(tmp_path.parents)[:-2]):
        each.chmod(0o755)
    folder.chmod(0o700)
    code = (
        "import os,sys;from tests.unit.test_formats import read\nfrom tuner.errors import DataError\nos.setuid(65534)\n"
        "try:\n    print(read(sys.argv[1]))\nexcept DataError as error:\n    print(error)"
    )
    for path, named in ((folder, folder), (folder / "a.jsonl", folder / "a.jsonl"), (folder / "*.jsonl", folder),
                        (tmp_path / "*" / "*.jsonl", folder), (tmp_path / "**" / "*.jsonl", folder), (tmp_path / "*" / "a.jsonl", folder / "a.jsonl")):  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
        assert done.stdout.strip() == f"{named}: cannot be read: Permission denied", done.stderr


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("two.json", '[{"text": "a"}]\n[{"text": "b"}]', "two.json:1, row 2: there is more behind the end of the list"),
        ("one.json", '{\n"a": "text"\n}', "one.json:1: found an object without one list of rows in it"),
    ],
)
def test_nothing_behind_a_list_is_left_unread(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        records(tmp_path / name)
    assert said in str(error.value)


def test_rows_on_one_line_have_places_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert places(tmp_path / "a.json") == ["a.json:1", "a.json:1, row 2", "a.json:1, row 3"]


def test_the_rows_are_those_of_the_outermost_list(tmp_path: Path) -> None:
    tree = {"meta": {"data": [{"text": "wrong"}]}, "data": [{"text": "right"}]}
    (tmp_path / "a.json").write_text(json.dumps(tree))
    assert records(tmp_path / "a.json") == [{"text": "right"}]


def test_a_bad_line_takes_no_good_one_with_it(tmp_path: Path) -> None:
    (tmp_path / "a.TXT").write_bytes(b"one\r\n\xff\r\nthree\r\n")
    found = read(tmp_path / "a.TXT", documents="line")
    assert [row.record["text"] if isinstance(row, Row) else row.kind for row in found] == ["one", "encoding", "three"]


def test_a_word_of_conll_may_be_a_number_sign(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("# id = 1\nPaid NN O\n# # O\n5 CD O\n\n# comment\n#win NN O\n")
    assert [row["words"] for row in records(tmp_path / "a.conll")] == [["Paid", "#", "5"], ["#win"]]


def test_a_pattern_reads_a_file_once_whatever_leads_to_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "loop").symlink_to(tmp_path)
    assert records(tmp_path / "**" / "*.jsonl") == ROWS


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=40)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"text": TEXT, "label": TEXT}), min_size=1, max_size=5))
def test_whatever_is_written_is_read_again(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    for name, write in {
        "a.jsonl": lambda path: path.write_bytes(lines(rows)),
        "b.json": lambda path: path.write_text(json.dumps(rows)),
        "c.csv": lambda path: path.write_bytes(csv_of(rows, ",")),
        "d.parquet": lambda path: parquet(path, rows),
    }.items():
        write(tmp_path / name)
        assert records(tmp_path / name) == rows, name


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    data=st.binary(max_size=200),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.txt", "a.conll", "a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst"]),
)
def test_no_bytes_at_all_are_a_crash(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    said = None
    try:
        found = read(tmp_path / name)
    except DataError as error:
        said, found = str(error), []
    assert said is None or str(tmp_path / name) in said
    assert all(isinstance(row, Row | DataError) for row in found)


def test_an_object_that_is_a_row_is_one_and_its_lists_are_none(tmp_path: Path) -> None:
    told = {"text": "the whole of it", "segments": [{"id": 0, "text": "a part"}, {"id": 1, "text": "another"}]}
    (tmp_path / "one.json").write_text(json.dumps(told, indent=1))
    assert records(tmp_path / "one.json") == [told]


@pytest.mark.parametrize(
    ("name", "text", "good", "said"),
    [
        ("two.csv", "text,label\na,x\ntext,label\nb,y\n", 2, "two.csv:3: the columns' names once more, expected a row"),
        ("quote.tsv", 'text\tlabel\n"quote start\tx\nmiddle\ty\nend"\tx\nd\ty\n', 1,
         "quote.tsv:2: 3 lines with all fields each in one row; a stray quote (\") does this"),
        ("odd.conll", "EU B-ORG\nrejects B-X O\n\na O\n", 1, "odd.conll:2: 3 columns, expected 2 as before"),
    ],
)  # fmt: skip
def test_rows_that_are_not_what_they_seem_are_said(tmp_path: Path, name: str, text: str, good: int, said: str) -> None:
    (tmp_path / name).write_text(text)
    found = read(tmp_path / name)
    assert [str(each).rpartition("/")[2] for each in found if isinstance(each, DataError)] == [said]
    assert sum(isinstance(each, Row) for each in found) == good


def test_blanks_around_columns_names_and_within_words_stay_where_they_belong(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text, label\n"two\nlines", x\n')
    assert records(tmp_path / "a.csv") == [{"text": "two\nlines", "label": " x"}]
    (tmp_path / "a.conll").write_text("10\u00a0000  B-N\n")
    assert records(tmp_path / "a.conll") == [{"words": ["10\u00a0000"], "tags": ["B-N"]}]


def test_labels_that_a_file_names_have_their_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["neg", "pos"]), "tags": Sequence(ClassLabel(names=["O", "B"]))}
    )
    made = Dataset.from_list([{"text": "a", "label": 1, "tags": [0, 1]}, {"text": "b", "label": 0, "tags": []}], features=features)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    expected = [{"text": "a", "label": "pos", "tags": ["O", "B"]}, {"text": "b", "label": "neg", "tags": []}]
    assert records(tmp_path / "a.parquet") == expected
    assert records(tmp_path / "saved") == expected
    # What the library works out of them lies beside them, and is no rows for a pattern either.
    mapped = Dataset.load_from_disk(str(tmp_path / "saved")).map(lambda row: {"text": row["text"] * 2})
    assert mapped.cache_files[0]["filename"].rpartition("/")[2].startswith("cache-")
    assert records(tmp_path / "saved" / "*.arrow") == expected


def test_a_column_that_is_there_twice_is_said(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match='the column "text" is there twice'):
        records(tmp_path / "a.parquet")


def test_functions_in_two_folders_import_what_lies_beside_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helper.py").write_text(f"WHO = {name!r}\n")
        (tmp_path / name / "my.py").write_text("def rows():\n    import helper\n    yield {'text': helper.WHO}\n")
    for name in ("a", "b", "a"):
        (part,) = parts(Source(function=f"{tmp_path}/{name}/my.py:rows"))[0]
        assert [row.record for row in formats.rows(part)] == [{"text": name}]


@pytest.mark.parametrize(
    "code",
    [
        "import helper\ndef rows():\n    for _ in range(3):\n        yield {'text': helper.WHO}\n",
        "def rows():\n    for _ in range(3):\n        from helper import WHO\n        yield {'text': WHO}\n",
        "def rows():\n    for _ in range(3):\n        from space.inner import WHO\n        yield {'text': WHO}\n",
    ],
)
def test_functions_that_are_read_by_turns_keep_their_own_helpers(tmp_path: Path, code: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "space").mkdir(parents=True)
        (tmp_path / name / "helper.py").write_text(f"WHO = {name!r}\n")
        (tmp_path / name / "space" / "inner.py").write_text(f"WHO = {name!r}\n")
        (tmp_path / name / "my.py").write_text(code)
    readers = [formats.rows(parts(Source(function=f"{tmp_path}/{name}/my.py:rows"))[0][0]) for name in ("a", "b")]
    assert [[row.record["text"] for row in turn if not isinstance(row, DataError)] for turn in zip(*readers, strict=True)] == [
        ["a", "b"]
    ] * 3


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("class Panic(BaseException): pass\n    raise Panic('gone')", "my.py:3: rows failed at row 1: Panic: gone"),
        ("class Mute(Exception):\n        def __str__(self): raise ValueError\n    raise Mute", "rows failed at row 1: Mute"),
        ("raise MemoryError", "my.py:2: rows failed at row 1: MemoryError"),
        ("raise ValueError('one\\ntwo')", "ValueError: one two"),
    ],
)
def test_whatever_a_function_raises_is_one_sentence(tmp_path: Path, raised: str, said: str) -> None:
    (tmp_path / "my.py").write_text(f"def rows():\n    {raised}\n    yield\n")
    with pytest.raises(DataError) as error:
        list(formats.rows(parts(Source(function=f"{tmp_path}/my.py:rows"))[0][0]))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_header_with_a_mark_of_byte_order_in_the_middle_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffprompt,completion\nq one,a\n\ufeffprompt,completion\nq two,b\n")
    with pytest.raises(DataError, match=r"a\.csv:3: the columns' names once more"):
        records(tmp_path / "a.csv")


def test_a_link_that_leads_nowhere_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="is a link that leads nowhere"):
        records(tmp_path / "a.jsonl")

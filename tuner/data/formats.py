"""Reads the rows of a file, each with the place it came from, so that every complaint can say `file:line`.

A row that is damaged is given as a DataError in the place of its record, since the recipe may say that such rows are left out. A
file that is damaged (cut short, not what its ending says) is an error at once: no one knows what is missing.
"""

import csv
import json
import sys
from collections.abc import Iterator
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, Any

from tuner.data import functions
from tuner.data.files import Part, Source
from tuner.data.rows import MOST_ROW_BYTES, Row
from tuner.data.shapes import SHAPES, WANTED, shape_of
from tuner.errors import DataError

# A list of objects is read whole; JSON lines are not.
MOST_JSON_BYTES = 1_000_000_000
BLOCK_ROWS = 1024
# How files begin that are often called something else.
MARKS = {
    b"PAR1\x15": "a Parquet file; call it .parquet",
    b"ARROW1\0\0": "an Arrow file; call it .arrow",
    b"\x1f\x8b": "packed by gzip; call it .gz",
    b"\x28\xb5\x2f\xfd": "packed by zstd; call it .zst",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xff\xfe": "UTF-16 text; write it as UTF-8",
    b"\xfe\xff": "UTF-16 text; write it as UTF-8",
}


def rows(part: Part) -> Iterator[Row | DataError]:
    """The rows of a part, in order. Raises DataError for a part that is damaged as a whole."""
    if part.format is None:
        yield from hub_records(part.source) if part.source.hub else functions.rows(part.source)
        return
    readers = {"jsonl": _json_lines, "json": _json, "text": _text, "conll": _conll, "parquet": _parquet, "arrow": _arrow}
    try:
        with part.open() as file:
            if not file.peek(1):  # type: ignore[attr-defined]
                return  # whoever counts rows says so
            _check_beginning(part, file)
            if part.format in ("csv", "tsv"):
                yield from _csv(part, file, "\t" if part.format == "tsv" else None)
            else:
                yield from readers[part.format](part, file)
    except EOFError:
        raise DataError(f"{part.path}: ends in the middle; is it whole?") from None
    except OSError as error:
        if part.compression and not error.errno:  # pyarrow's own have no number
            raise DataError(f"{part.path}: cannot be unpacked: {error}; is it whole?") from None
        raise DataError(f"{part.path}: cannot be read: {error.strerror or error}") from None


def _check_beginning(part: Part, file: Any) -> None:
    """Raises DataError for what is plainly no text where text is expected."""
    start = file.peek(8)[:8]
    what = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
    if what and part.format not in ("parquet", "arrow"):
        raise DataError(f"{part.path}: {what}, expected {part.format}")


def bad(place: str, message: str, kind: str) -> DataError:
    """What is wrong with a row, as its reader gives it."""
    return DataError(f"{place}: {message}", kind)


def _lines(part: Part, file: IO[bytes]) -> Iterator[tuple[int, str | DataError]]:
    """Each line with its number, its end kept."""
    number = 0
    while line := file.readline(MOST_ROW_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # Windows editors begin a file with a mark
        if len(line) > MOST_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MOST_ROW_BYTES)
            message = f"longer than {MOST_ROW_BYTES // 1_000_000} MB, expected one row a line"
            yield number, bad(f"{part.path}:{number}", message, "broken")
            continue
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            message = f"not UTF-8 text: byte 0x{line[error.start]:02x} at column {error.start + 1}"
            yield number, bad(f"{part.path}:{number}", message, "encoding")


def _json_lines(part: Part, file: IO[bytes]) -> Iterator[Row | DataError]:
    for number, line in _lines(part, file):
        place = f"{part.path}:{number}"
        if isinstance(line, DataError):
            yield line
        elif not line.isspace():
            try:
                yield Row(place, _object(line))
            except DataError as error:
                yield bad(place, str(error), "broken")


def _object(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text.strip()[:40]
        raise DataError(f"not JSON ({getattr(error, 'msg', error)}), found {shown!r}; expected one object a line") from None
    return _checked_object(record)


def _checked_object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f'found a {type(record).__name__}, expected an object such as {{"text": "..."}}')
    return record


def _json(part: Part, file: IO[bytes]) -> Iterator[Row | DataError]:
    """A list of objects, or an object with one such list in it, or one row; a file with an object a line is read as that, too."""
    data = file.read(MOST_JSON_BYTES + 1)
    if len(data) > MOST_JSON_BYTES:
        raise DataError(
            f"{part.path}: more than {MOST_JSON_BYTES // 1_000_000} MB of JSON in one piece; write one object a line (.jsonl)"
        )
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if data.lstrip()[:1] == b"{" and _is_object(data.lstrip().split(b"\n", 1)[0].decode(errors="replace")):
            yield from _json_lines(part, BytesIO(data))
            return
        line = data.count(b"\n", 0, error.start) + 1
        why = "a list is read whole, so no row of it can be left out"
        raise DataError(f"{part.path}:{line}: not UTF-8 text: byte 0x{data[error.start]:02x}; {why}") from None
    del data
    if (row := _one_row(text)) is not None:
        yield Row(f"{part.path}:1", row)
        return
    start = _list_start(part, text)
    if start is None:
        yield from _json_lines(part, BytesIO(text.encode()))
        return
    whole = text[_next(text, 0)] == "["
    decoder, at, line, counted = json.JSONDecoder(), start, 1, 0
    number, last = 0, 0
    while True:
        at = _next(text, at)
        line, counted = line + text.count("\n", counted, at), at
        number += 1
        # Of several rows in a line each has a place of its own, by which it is known from here on.
        place, last = f"{part.path}:{line}" + (f", row {number}" if line == last else ""), line
        if text[at : at + 1] == "]":
            if whole and _next(text, at + 1) < len(text):
                raise DataError(f"{place}: there is more behind the end of the list; expected one list, or one object a line")
            return
        try:
            record, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON ({getattr(error, 'msg', error)}), found {text[at : at + 40]!r}") from None
        try:
            yield Row(place, _checked_object(record))
        except DataError as error:
            yield bad(place, str(error), "broken")
        at = _next(text, end)
        if text[at : at + 1] not in (",", "]"):
            raise DataError(f"{place}: expected a comma or the end of the list behind this row; is the file whole?")
        at += text[at] == ","


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _one_row(text: str) -> dict[str, Any] | None:
    """The object that the whole file is, where its keys are those of a row."""
    if text[_next(text, 0) :][:1] != "{":
        return None
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return tree if shape_of(tree) in SHAPES else None


def _next(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _list_start(part: Part, text: str) -> int | None:
    """Where the list of rows begins; None where the file has an object a line."""
    at = _next(text, 0)
    if text[at : at + 1] == "[":
        return at + 1
    first, _, rest = text[at:].partition("\n")
    try:
        whole = json.loads(first)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, dict) and rest.strip():
        return None
    if isinstance(whole, dict) and not any(_is_rows(each) for each in whole.values()):
        return None
    try:
        tree = json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{part.path}:{line}: not JSON ({getattr(error, 'msg', error)}); expected a list of objects") from None
    lists = [key for key, value in tree.items() if _is_rows(value)] if isinstance(tree, dict) else []
    if len(lists) == 1:
        return _value_start(text, lists[0]) + 1
    what = "an object without one list of rows in it" if isinstance(tree, dict) else f"a {type(tree).__name__}"
    raise DataError(f"{part.path}:1: found {'nothing' if tree is None else what}, expected a list of objects")


def _value_start(text: str, wanted: str) -> int:
    """Where the value of a key of the outermost object begins; of a key that is there twice the last one, which counts."""
    decoder, at, found = json.JSONDecoder(), _next(text, 0) + 1, 0
    while text[(at := _next(text, at))] != "}":
        key, at = decoder.raw_decode(text, at)
        at = _next(text, _next(text, at) + 1)  # behind the colon
        found = at if key == wanted else found
        _, at = decoder.raw_decode(text, at)
        at = _next(text, at)
        at += text[at] == ","
    return found


def _is_rows(value: Any) -> bool:
    """A list of objects that are no turns of one conversation."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not {"role", "from"} & set(value[0])


def _csv(part: Part, file: IO[bytes], delimiter: str | None) -> Iterator[Row | DataError]:
    """Rows by the names in the first line. Every value is text: what should be a number or a list is made one later."""

    def lines() -> Iterator[str]:
        for _, line in _lines(part, file):
            if isinstance(line, DataError):
                # No one knows where the next row begins.
                raise DataError(f"{line}; in a table such a row cannot be left out, so the file has to be put right")
            yield line

    source = lines()
    head = next(source, "")
    if not head.strip():
        raise DataError(f"{part.path}:1: the file is empty; expected the columns' names in the first line")
    # Where decimals have commas, columns have semicolons.
    delimiter = delimiter or max(",;\t|", key=head.count)

    taken: list[str] = []  # the lines of one row

    def again() -> Iterator[str]:
        for each in chain([head], source):
            taken.append(each)
            yield each

    csv.field_size_limit(MOST_ROW_BYTES)
    reader = csv.reader(again(), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        taken.clear()
        place = f"{part.path}:{reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f'{place}: not CSV ({error}) in the row that begins here; is there a stray quote (")?') from None
        if fields is None:
            return
        if not names:
            names = [each.strip() for each in fields]
            twice = [name for name in names if names.count(name) > 1]
            if twice or not all(names):
                what = f'the name "{twice[0]}" twice' if twice else "a column without a name"
                raise DataError(f"{place}: {what}, expected the columns' names in the first line")
        elif len(taken) > 1 and delimiter == "\t" and all(each.count("\t") >= len(names) - 1 > 0 for each in taken):
            yield bad(place, f'{len(taken)} lines with all fields each in one row; a stray quote (") does this', "broken")
        elif [each.strip("\ufeff \t\r\n") for each in fields] == names:
            yield bad(place, "the columns' names once more, expected a row", "broken")
        elif fields and len(fields) != len(names):
            shown = ", ".join(names)[:80]
            yield bad(
                place, f"{len(fields)} fields, expected {len(names)}: {shown}; a stray quote or separator does this", "broken"
            )
        elif fields:
            yield Row(place, dict(zip(names, fields, strict=True)))


def _text(part: Part, file: IO[bytes]) -> Iterator[Row | DataError]:
    """{"text": ...} for each document."""
    name = part.path.lower().removesuffix(".gz").removesuffix(".zst")
    unit = part.source.documents or ("file" if name.endswith((".md", ".markdown")) else "paragraph")
    if unit == "line":
        for number, line in _lines(part, file):
            if isinstance(line, DataError):
                yield line
            elif line.strip():
                yield Row(f"{part.path}:{number}", {"text": line.rstrip("\r\n")})
        return
    start, broken = 1, None
    document: list[str] = []
    for number, line in _lines(part, file):
        if isinstance(line, DataError):
            broken = broken or line
            continue
        ends = unit == "paragraph" and not line.strip()
        if line.strip() or (document and not ends):
            start = number if not document else start
            document.append(line.replace("\r\n", "\n"))
        if ends and (document or broken):
            yield broken or Row(f"{part.path}:{start}", {"text": "".join(document)})
            document, broken = [], None
    if document or broken:
        yield broken or Row(f"{part.path}:{start}", {"text": "".join(document)})


def _conll(part: Part, file: IO[bytes]) -> Iterator[Row | DataError]:
    """{"words", "tags"} for each sentence: a word a line, an empty line after each sentence."""
    # Where nothing is said: the first column and the last; of CoNLL-U FORM and UPOS.
    universal = ".conllu" in Path(part.path).suffixes
    columns: dict[str, Any] = {**({"words": 2, "tags": 4} if universal else {"words": 1, "tags": -1}), **part.source.map}
    for name, column in columns.items():
        if not isinstance(column, int) or column == 0:
            raise DataError(f"{part.path}: map.{name} is {column!r}, expected the number of a column, from 1")
    start, record, broken = 1, _sentence(columns), None
    width: int | None = None
    for number, line in _lines(part, file):
        if isinstance(line, DataError):
            broken = broken or line
            continue
        fields = line.rstrip("\r\n").split("\t") if "\t" in line else [each for each in line.rstrip("\r\n").split(" ") if each]
        if not line.strip():
            if record["words"] or broken:
                yield broken or Row(f"{part.path}:{start}", record)
            record, broken = _sentence(columns), None
        elif fields[0] == "-DOCSTART-" or (universal and not fields[0].isdecimal()):
            continue  # the mark of a document; a comment, or a contraction's own line
        elif line.startswith("#") and not record["words"] and _is_comment(line, len(fields), width):
            continue
        elif max(2, *map(abs, columns.values())) > len(fields):
            broken = broken or bad(f"{part.path}:{number}", f"{len(fields)} columns, expected a word and its tag", "broken")
        elif width and len(fields) != width:
            broken = broken or bad(f"{part.path}:{number}", f"{len(fields)} columns, expected {width} as before", "broken")
        else:
            width = width or len(fields)
            start = start if record["words"] else number
            for name, column in columns.items():
                record[name].append(fields[column - 1 if column > 0 else column])
    if record["words"] or broken:
        yield broken or Row(f"{part.path}:{start}", record)


def _is_comment(line: str, fields: int, width: int | None) -> bool:
    """A line that begins with # before a sentence, and is no word of a file whose words have so many fields."""
    return fields != width if width else " = " in line or fields == 1 or line.startswith(("#begin", "#end"))


def _sentence(columns: dict[str, Any]) -> dict[str, list[str]]:
    return {name: [] for name in columns}


def _parquet(part: Part, file: IO[bytes]) -> Iterator[Row | DataError]:
    import pyarrow.parquet

    with _whole(part, "Parquet"):
        opened = pyarrow.parquet.ParquetFile(file)
        yield from _batches(part, opened.schema_arrow, opened.iter_batches(BLOCK_ROWS))


def _arrow(part: Part, file: IO[bytes]) -> Iterator[Row | DataError]:
    """Arrow's file format (Feather, too) or its stream format, which is what the datasets library writes."""
    import pyarrow as pa

    with _whole(part, "Arrow"):
        begins = file.read(6)
        file.seek(0)
        if begins == b"ARROW1":
            reader = pa.ipc.open_file(file)
            yield from _batches(part, reader.schema, (reader.get_batch(index) for index in range(reader.num_record_batches)))
        else:
            stream = pa.ipc.open_stream(file)
            yield from _batches(part, stream.schema, iter(stream))


class _whole:
    """Turn pyarrow's complaints into a DataError that names the file."""

    def __init__(self, part: Part, kind: str) -> None:
        self.part, self.kind = part, kind

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        import pyarrow as pa

        if isinstance(error, pa.ArrowException | OSError) and not getattr(error, "errno", None):
            raise DataError(f"{self.part.path}: not a whole {self.kind} file: {str(error).splitlines()[0][:120]}") from None


def _batches(part: Part, schema: Any, batches: Iterator[Any]) -> Iterator[Row | DataError]:
    if twice := [name for name in schema.names if schema.names.count(name) > 1]:
        raise DataError(f'{part.path}: the column "{twice[0]}" is there twice')
    features: dict[str, Any] = {}
    if b"huggingface" in (schema.metadata or {}):  # written by the datasets library, which says what the numbers of labels mean
        from datasets import Features

        features = dict(Features.from_arrow_schema(schema))
    number = 0
    for batch in batches:
        try:
            records: Iterator[Any] = iter(batch.to_pylist())
        except _NO_PYTHON:
            records = (_record(batch, at) for at in range(batch.num_rows))
        for record in records:
            number += 1
            place = f"{part.path}:row {number}"
            if isinstance(record, DataError):
                yield bad(place, str(record), str(record.kind))
            else:
                named = {key: _named(features.get(key), value) for key, value in record.items()} if features else record
                yield Row(place, without_nulls(named))


# What pyarrow raises for values that Python has not: bytes in a text that are no UTF-8, a time after the year 9999.
_NO_PYTHON = (ValueError, OverflowError)


def _record(batch: Any, at: int) -> dict[str, Any] | DataError:
    """One row of a batch; of a value that Python cannot have the column is named."""
    record: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            record[name] = column[at].as_py()
        except _NO_PYTHON as error:
            kind = "encoding" if isinstance(error, UnicodeDecodeError) else "broken"
            return DataError(f'the column "{name}" holds {"bytes that are not UTF-8" if kind == "encoding" else error}', kind)
    return record


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """Columnar formats give every object the keys of all others, with nothing in them. A text that is missing stays null."""
    conversation = record.get("messages") or record.get("conversations")
    texts = () if conversation else WANTED
    return {key: _dense(value) for key, value in record.items() if value is not None or key in texts}


def _dense(value: Any) -> Any:
    if isinstance(value, list):
        return [_dense(each) for each in value]
    if isinstance(value, dict):
        return {key: _dense(each) for key, each in value.items() if each is not None}
    return value


def hub_rows(source: Source) -> Any:
    """The data set of the hub (or of a local folder in its form), as the datasets library gives it. Raises DataError."""
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        return load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
    except Exception as error:
        # The library has a dozen ways to say that there is none.
        raise DataError(f"hub {source.hub}, split {source.split}: {str(error).strip().splitlines()[0][:200]}") from None


def hub_records(source: Source) -> Iterator[Row]:
    """The rows of `hub_rows`, with the names of labels in place of their numbers."""
    rows = hub_rows(source)
    for number, record in enumerate(rows, 1):
        named = {key: _named(rows.features[key], value) for key, value in record.items()}
        yield Row(f"{source.hub}/{source.split}:row {number}", without_nulls(named))


def _named(feature: Any, value: Any) -> Any:
    """What a label's number stands for, where the data set says so; -1 stands for none."""
    if isinstance(value, list) and hasattr(getattr(feature, "feature", None), "int2str"):
        return [_named(feature.feature, each) for each in value]
    if hasattr(feature, "int2str") and isinstance(value, int):
        return feature.int2str(value) if value >= 0 else None
    return value

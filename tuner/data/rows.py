"""Reads rows of data, each with the place it came from, so that every complaint can say `file:line`."""

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tuner.errors import DataError, nearest

T = TypeVar("T")
# The report lists this many of the rows that were left out; all of them are counted.
LISTED = 20


@dataclass(frozen=True)
class Row:
    """One record and where it stands."""

    place: str
    record: dict[str, Any]


@dataclass
class Skipped:
    """Rows that were left out because the recipe says `on_bad_row: skip`."""

    count: int = 0
    listed: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        """Count one row, and keep its message while the list is short."""
        self.count += 1
        if len(self.listed) < LISTED:
            self.listed.append(message)


def read_rows(path: Path, made_by: str | None, on_bad_row: str, skipped: Skipped) -> Iterator[Row]:
    """Rows of a JSON-lines file, or of a .txt file with one document a paragraph ({"text": ...}).

    Raises DataError for a file that is missing or empty, and for a line that is no JSON object unless bad rows are skipped.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is {'a directory' if path.is_dir() else 'no ordinary file'}, expected a file of rows")
    if not path.is_file():
        siblings = [each.name for each in path.parent.glob("*") if each.is_file()] if path.parent.is_dir() else []
        mistyped = difflib.get_close_matches(path.name, siblings, cutoff=0.8) or not made_by
        advice = nearest(path.name, siblings) if mistyped else f"; `.venv/bin/python {made_by}` writes it"
        raise DataError(f"{path}: there is no such file{advice}")
    found = False
    for line, text in _records(path):
        found = True
        try:
            yield Row(f"{path}:{line}", text if isinstance(text, dict) else _parse(text))
        except DataError as error:
            message = f"{path}:{line}: {error}"
            if on_bad_row == "stop":
                raise DataError(message) from None
            skipped.add(message)
    if not found:
        raise DataError(f"{path}:1: the file is empty; expected one JSON object a line")


def usable(rows: Iterator[Row], use: Callable[[Row], T], on_bad_row: str, skipped: Skipped) -> Iterator[tuple[Row, T]]:
    """Each row with `use(row)`; a DataError from `use` gets the row's place, and stops or is counted as the recipe says."""
    for row in rows:
        try:
            result = use(row)
        except DataError as error:
            message = f"{row.place}: {error}"
            if on_bad_row == "stop":
                raise DataError(message + "; `data.on_bad_row: skip` leaves such rows out and counts them") from None
            skipped.add(message)
        else:
            yield row, result


def first_of_each(rows: list[Any]) -> list[Any]:
    """The first example of each row: a long document has several."""
    first: dict[str, Any] = {}
    for row, example in rows:
        first.setdefault(row.place, (row, example))
    return list(first.values())


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:  # Windows editors begin a file with a mark
            if path.suffix != ".txt":
                yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
                return
            start, paragraph = 1, ""
            for number, line in enumerate(file, 1):
                if line.strip():
                    start, paragraph = (start if paragraph else number), paragraph + line
                elif paragraph:
                    yield start, {"text": paragraph}
                    paragraph = ""
            if paragraph:
                yield start, {"text": paragraph}
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _parse(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("half of a surrogate pair (\\ud800 to \\udfff), which is no character; expected text") from None
    except (ValueError, RecursionError) as error:
        shown = text.strip()[:40]
        raise DataError(f"not JSON ({getattr(error, 'msg', error)}), found {shown!r}; expected one object a line") from None
    if not isinstance(record, dict):
        raise DataError(f'found a {type(record).__name__}, expected an object such as {{"text": "..."}}')
    return record

"""Rows of a Python function of the user's own, which is called as seldom as can be: it may take an hour."""

import hashlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import date, time
from decimal import Decimal
from itertools import islice
from pathlib import Path, PurePath
from types import ModuleType
from typing import IO, Any
from uuid import UUID, uuid4

from tuner.data.cache import folder, temporary
from tuner.data.files import Source, readable
from tuner.data.rows import Row
from tuner.errors import DataError, disk_errors, nearest
from tuner.progress import counted

# Folders of functions that are not being called now, and the modules that were imported from there.
_BESIDE: dict[Path, dict[str, ModuleType]] = {}
# The folder whose modules can be imported now, and what could be imported before.
_here: tuple[Path, set[str]] | None = None
# Of a function that draws by chance these many rows are never the same twice.
DRAWN_AGAIN = 100
END = object()


class Kept:
    """A function's rows in a file without a name, which is gone with the process; drawn as they are asked for, and once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._fresh = rows(source)
        self._failure: DataError | None = None
        self._file: IO[bytes] | None = None
        self._count = 0
        self._same = False

    def rows(self) -> Iterator[Row]:
        """All of them, from the first one on. Raises DataError where the function fails."""
        at, number = 0, 0
        while True:
            if number == self._count and not self._draw():
                return
            assert self._file is not None
            self._file.seek(at)  # another reader may have moved it
            record = json.loads(self._file.readline())
            at = self._file.tell()
            number += 1
            yield Row(_place(self._source, number), record)

    def identity(self) -> str:
        """The sha256 of all rows."""
        digest = hashlib.sha256()
        for row in counted(f"keeping the rows of {self._source.name}", self.rows()):
            digest.update(row.content + b"\n")
        return digest.hexdigest()

    def require_same(self) -> None:
        """Raises DataError where the first rows are others when the function is called again. It is called once."""
        if self._same:
            return
        self._same = True
        if [row.record for row in islice(self.rows(), DRAWN_AGAIN)] != [
            row.record for row in islice(rows(self._source), DRAWN_AGAIN)
        ]:
            raise DataError(f"{self._source.name}: gives other rows each time; seed what it draws")

    def _draw(self) -> bool:
        """Keep one more row; False where there is none."""
        if self._failure:
            raise self._failure
        try:
            row = next(self._fresh, None)
        except DataError as error:
            self._failure = error
            raise
        if row is None:
            return False
        if self._file is None:
            self._file = temporary()
        with disk_errors(folder()):
            self._file.seek(0, 2)
            self._file.write(json.dumps(row.record).encode() + b"\n")
            self._file.flush()  # or a full disk would be noticed by whoever reads next
        self._count += 1
        return True


def _place(source: Source, number: int) -> str:
    return f"{source.function}:row {number}"


def rows(source: Source) -> Iterator[Row]:
    """What the user's function gives. Raises DataError with the line of the user's file where the function fails."""
    file, _, name = str(source.function).rpartition(":")
    with readable(file):
        Path(file).read_bytes()
    # A name of its own each time: two of one name would take each other's place where Python looks for their classes.
    spec = importlib.util.spec_from_file_location(f"tuner_user_rows_{uuid4().hex[:8]}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    beside = Path(file).resolve().parent
    number, started = 0, False
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        _only_beside(beside)
        spec.loader.exec_module(module)
        if not callable(getattr(module, name, None)):
            known = [each for each in vars(module) if callable(getattr(module, each)) and not each.startswith("_")]
            raise DataError(f'{file}: there is no function "{name}"{nearest(name, known)}')
        started = True
        given = iter(getattr(module, name)(**source.args))
        while True:
            _only_beside(beside)  # another one may have been called since the last row
            record = next(given, END)
            if record is END:
                break
            number += 1
            if not isinstance(record, dict):
                raise DataError(f"{file}:{name}: row {number} is a {type(record).__name__}, expected a mapping")
            if not all(isinstance(key, str) for key in record):
                raise DataError(f"{file}:{name}: row {number} has the keys {list(record)!r:.60}, expected text")
            place = _place(source, number)
            try:
                yield Row(place, json.loads(json.dumps(record, default=_plain)))
            except (TypeError, ValueError) as error:
                raise DataError(f"{place}: {error}, expected text, numbers, and lists and mappings of them") from None
    except (DataError, GeneratorExit):
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # libraries written in Rust panic with one that is no Exception
        own = Path(file).resolve()
        inside = [each.lineno for each in traceback.extract_tb(error.__traceback__) if Path(each.filename).resolve() == own]
        line = inside[-1] if inside else 1
        if isinstance(error, SyntaxError) and Path(error.filename or "").resolve() == own:
            line = error.lineno or line
        what = f"{name} failed at row {number + 1}" if started else "cannot be imported"
        raise DataError(f"{file}:{line}: {what}: {_said(error)}") from None
    if not number:
        raise DataError(f"{file}:{name}: gives no rows")


def _said(error: BaseException) -> str:
    """An exception in one line; one that cannot even say what it is has its name."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # the user's own __str__
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _only_beside(folder: Path) -> None:
    """Let what lies in this folder be imported, and not what the function of another folder found in its own."""
    global _here
    if _here and _here[0] == folder:
        return
    if _here:
        other, before = _here
        _BESIDE[other] = {name: sys.modules.pop(name) for name in _imported_from(other, before)}
        sys.path[:] = [each for each in sys.path if each != str(other)]
    _here = folder, {name.partition(".")[0] for name in sys.modules}
    sys.modules.update(_BESIDE.pop(folder, {}))
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that nothing there takes a library's place


def _imported_from(folder: Path, before: set[str]) -> list[str]:
    """Names of the modules that were imported from a folder; packages `before` it are others'."""
    found = []
    for name, module in list(sys.modules.items()):
        first, known = name.partition(".")[0], getattr(module, "__dict__", {})  # some modules import what they are asked for
        place = known.get("__file__") or next(iter(known.get("__path__") or []), None)
        inside = first not in before and str(place).startswith(f"{folder}{os.sep}")
        # Not a library's, though its environment may lie in this folder, too.
        if inside and Path(str(place)).relative_to(folder).parts[0] in (first, f"{first}.py"):
            found.append(name)
    return found


def _plain(value: Any) -> Any:
    """What JSON has for a value of another library. Raises TypeError where that has nothing for it."""
    if isinstance(value, date | time | Decimal | UUID | PurePath):
        return str(value)
    if callable(getattr(value, "tolist", None)):  # numpy's arrays and numbers
        return value.tolist()
    raise TypeError(f"found a {type(value).__name__}")

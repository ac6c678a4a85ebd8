"""Rows of a Python function of the user's own, which is called as seldom as can be: it may take an hour."""

import hashlib
import importlib.util
import pickle
import sys
import tempfile
import traceback
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tuner.data.cache import folder
from tuner.data.files import Source, readable
from tuner.data.rows import Row
from tuner.errors import DataError, nearest

# Of a function that draws by chance these many rows are never the same twice.
DRAWN_AGAIN = 100


class Kept:
    """A function's rows in a file without a name, which is gone with the process.

    Raises DataError where the first rows are others when it is called again.
    """

    def __init__(self, source: Source) -> None:
        where = folder()
        where.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=where)  # noqa: SIM115 - open for as long as this is
        digest = hashlib.sha256()
        first: list[bytes] = []
        for row in rows(source):
            pickle.dump(row, self._file)
            digest.update(row.content + b"\n")
            if len(first) < DRAWN_AGAIN:
                first.append(row.content)
        if first != [row.content for row in islice(rows(source), DRAWN_AGAIN)]:
            raise DataError(f"{source.name}: gives other rows each time; seed what it draws")
        self.identity = digest.hexdigest()
        """The sha256 of all rows."""

    def rows(self) -> Iterator[Row]:
        """The rows again."""
        at, end = 0, self._file.seek(0, 2)
        while at < end:
            self._file.seek(at)  # another reader may have moved it
            row: Row = pickle.load(self._file)
            at = self._file.tell()
            yield row


def rows(source: Source) -> Iterator[Row]:
    """What the user's function gives. Raises DataError with the line of the user's file where the function fails."""
    file, _, name = str(source.function).rpartition(":")
    with readable(file):
        Path(file).read_bytes()
    spec = importlib.util.spec_from_file_location("tuner_user_rows", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    number = 0
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, name, None)):
            known = [each for each in vars(module) if callable(getattr(module, each)) and not each.startswith("_")]
            raise DataError(f'{file}: there is no function "{name}"{nearest(name, known)}')
        for record in getattr(module, name)(**source.args):
            number += 1
            if not isinstance(record, dict):
                raise DataError(f"{file}:{name}: row {number} is a {type(record).__name__}, expected a mapping")
            if not all(isinstance(key, str) for key in record):
                raise DataError(f"{file}:{name}: row {number} has the keys {list(record)!r:.60}, expected text")
            yield Row(f"{file}:{name}:row {number}", record)
    except (DataError, GeneratorExit):
        raise
    except Exception as error:
        inside = [each.lineno for each in traceback.extract_tb(error.__traceback__) if Path(each.filename) == Path(file)]
        line = getattr(error, "lineno", None) or (inside[-1] if inside else 1)
        raise DataError(f"{file}:{line}: {name} failed at row {number + 1}: {type(error).__name__}: {error}") from None

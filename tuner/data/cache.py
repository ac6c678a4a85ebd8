"""What was worked out of data and can be used again: hashes of files, and examples on the disk, read where they lie.

Everything here can be deleted at any time. Nothing is found again under another key, and nothing half-written is ever found: a
result is written beside its place and renamed into it. Two runs that make the same result both make it; one of them keeps it.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, get_args, get_origin, get_type_hints, overload
from uuid import uuid4

from tuner.data.example import Example
from tuner.errors import DataError, disk_errors

# A file written to this recently could be written to again without its times changing.
SETTLED_S = 2.0
KEPT_S, LEFT_S = 30 * 86_400.0, 86_400.0
# What is kept of an example beside its own fields.
BESIDE: dict[str, Any] = {
    "_place": str, "_record": str | None, "_source": int, "_length": int, "_supervised": float, "_cut": bool
}  # fmt: skip
# What is turned into a block of the file together, whichever comes first; as Python's own numbers tokens take much memory.
BLOCK_ROWS, BLOCK_TOKENS = 1024, 250_000


def folder() -> Path:
    """$TUNER_CACHE, or ~/.cache/tuner."""
    given = os.environ.get("TUNER_CACHE")
    return Path(given).expanduser() if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tuner"


def made(path: Path) -> Path:
    """The directory, which is there now. Raises DataError where it cannot be."""
    with _kept_in(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def temporary() -> IO[bytes]:
    """A file in the cache that is gone once it is closed. Raises DataError where there can be none."""
    place = made(folder())
    with _kept_in(place):
        return tempfile.TemporaryFile(dir=place)


@contextmanager
def _kept_in(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: nothing can be kept there ({error.strerror}); TUNER_CACHE names another folder") from None


def remembered(path: str, found: os.stat_result, work: Callable[[], str]) -> str:
    """`work()` for a file as it is now; from the last time where neither its size nor its times nor its place have changed."""
    import hashlib

    stamp = [path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]
    note = folder() / "hashes" / hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    with suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads(note.read_text())
        if said["stamp"] == stamp:
            return str(said["value"])
    value = work()
    if time.time() - found.st_mtime > SETTLED_S:
        with suppress(OSError):  # a cache that cannot be written costs time, nothing else
            note.parent.mkdir(parents=True, exist_ok=True)
            part = note.with_name(f"{note.name}.{uuid4().hex}.part")
            part.write_text(json.dumps({"stamp": stamp, "value": value}))
            part.replace(note)
    return value


class Stored(Sequence[Any]):
    """Examples that lie in a file and are read one at a time, so that a data set need not fit in memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.info: dict[str, Any] = json.loads((path / "info.json").read_text())
        self._kind = _kind(self.info["kind"])
        self._table = pa.ipc.open_file(pa.memory_map(str(path / "examples.arrow"))).read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        names = [each.name for each in fields(self._kind)]
        return rebuilt(self._kind, {name: self._table.column(name)[index].as_py() for name in names})

    def column(self, name: str) -> list[Any]:
        """One of `place`, `source`, `length`, `supervised` and `cut` of all examples."""
        return list(self._table.column(f"_{name}").to_pylist())

    def record(self, index: int) -> str:
        """The row of an example, as JSON."""
        return str(self._table.column("_record")[index].as_py())


def stored(key: str, make: Callable[[dict[str, Any]], Iterator[tuple[str, str | None, int, Any]]]) -> Stored:
    """The examples of `key`, made by `make` where they are not there yet.

    `make` gives (place, the record as JSON where it is wanted, number of the source, example) and leaves in the mapping it is given
    what else there is to say. Raises whatever `make` raises, and DiskFull.
    """
    path = folder() / "examples" / key
    if (found := _opened(path)) is not None:
        return found
    _tidy(path.parent)
    part = made(path.with_name(f".{key}.{os.getpid()}.{uuid4().hex[:8]}.part"))
    try:
        with disk_errors(part), _kept_in(part):
            _write(part, make)
        try:
            part.rename(path)
        except OSError:
            if not (path / "info.json").is_file():  # not another run's, but what someone left of it
                shutil.rmtree(path, ignore_errors=True)
                with suppress(OSError):
                    part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Stored(path)


def _opened(path: Path) -> Stored | None:
    """What is kept there; None where nothing is, or what is there was damaged, which is removed."""
    import pyarrow as pa

    if not (path / "info.json").is_file():
        return None
    try:
        with suppress(PermissionError):
            os.utime(path)  # when it was used last, for whoever tidies up
        return Stored(path)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        shutil.rmtree(path, ignore_errors=True)
        return None


def _tidy(examples: Path) -> None:
    """Remove what was not used for a month, and what a run that was killed more than a day ago has left."""
    with suppress(OSError):
        for entry in examples.iterdir():
            unused_s = time.time() - entry.stat().st_mtime
            if unused_s > (LEFT_S if entry.name.endswith(".part") else KEPT_S):
                shutil.rmtree(entry, ignore_errors=True)


def _write(part: Path, make: Callable[[dict[str, Any]], Iterator[tuple[str, str | None, int, Any]]]) -> None:
    import pyarrow as pa

    info: dict[str, Any] = {}
    examples = make(info)
    first = next(examples, None)
    kind: type[Any] = type(first[3]) if first else Example
    schema = pa.schema([*_schema(kind), *(pa.field(name, _arrow(hint)) for name, hint in BESIDE.items())])
    block: list[dict[str, Any]] = []
    tokens = 0
    with pa.OSFile(str(part / "examples.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for place, record, source, example in chain([first] if first else [], examples):
            said = {
                "_place": place,
                "_record": record,
                "_source": source,
                "_length": len(example.ids),
                "_supervised": float(example.supervised),
                "_cut": bool(getattr(example, "cut", False)),
            }
            block.append({**flattened(example), **said})
            tokens += len(example.ids)
            if len(block) == BLOCK_ROWS or tokens >= BLOCK_TOKENS:
                writer.write_batch(pa.RecordBatch.from_pylist(block, schema=schema))
                block, tokens = [], 0
        if block:
            writer.write_batch(pa.RecordBatch.from_pylist(block, schema=schema))
    info["kind"] = f"{kind.__module__}:{kind.__qualname__}"
    (part / "info.json").write_text(json.dumps(info))
    for name in ("examples.arrow", "info.json"):
        with (part / name).open("rb") as written:
            os.fsync(written.fileno())


def flattened(value: Any) -> Any:
    """A dataclass as a mapping, those inside it, too."""
    if is_dataclass(value):
        return {each.name: flattened(getattr(value, each.name)) for each in fields(value)}
    return value


def rebuilt(kind: Any, value: Any) -> Any:
    """The dataclass that was flattened."""
    if value is None:
        return None
    hints = get_type_hints(kind)
    return kind(**{name: _member(hints[name], each) for name, each in value.items()})


def _member(hint: Any, value: Any) -> Any:
    inner = [each for each in get_args(hint) if is_dataclass(each)]
    if is_dataclass(hint) or inner:
        return rebuilt(hint if is_dataclass(hint) else inner[0], value)
    return tuple(value) if get_origin(hint) is tuple else value


def _kind(name: str) -> type[Any]:
    """The class of the examples; only this project's own are looked for."""
    import importlib

    module, _, cls = name.partition(":")
    if not module.startswith("tuner."):
        raise ValueError(f"{name}: no example of this project")
    found: type[Any] = getattr(importlib.import_module(module), cls)
    return found


def _schema(kind: type[Any]) -> list[Any]:
    import pyarrow as pa

    hints = get_type_hints(kind)
    return [pa.field(each.name, _arrow(hints[each.name])) for each in fields(kind)]


def _arrow(hint: Any) -> Any:
    """Arrow's type for a field. Token ids and labels fit in 32 bits."""
    import pyarrow as pa

    if is_dataclass(hint):
        return pa.struct(_schema(hint))  # type: ignore[arg-type]
    members = [each for each in get_args(hint) if each is not type(None)]
    if get_origin(hint) in (list, tuple):
        return pa.list_(_arrow(members[0]))
    if members:
        return _arrow(members[0])
    return {int: pa.int32(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}[hint]

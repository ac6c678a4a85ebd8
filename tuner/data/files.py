"""Where rows come from: files, folders, patterns and URLs, data sets on the hub, and functions of the user's own.

`parts` says what a source stands for without reading a row; `tuner/data/formats.py` reads what it found.
"""

import difflib
import fnmatch
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field, model_validator

from tuner.errors import DataError, nearest
from tuner.kinds import Options

Format = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "text", "conll"]
ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".md": "text",
    ".markdown": "text",
    ".conll": "conll",
    ".conllu": "conll",
    ".bio": "conll",
}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# What the datasets library writes above its splits, and beside the rows of each.
ABOVE_ROWS, BESIDE_ROWS = "dataset_dict.json", {"dataset_info.json", "state.json"}


class Source(Options):
    """One place that rows come from. A plain text in a recipe is its `path`."""

    path: str | None = None
    """A file, a folder, a pattern such as "logs/*.jsonl.gz", or a URL (https://, s3://, gs://, ...)."""
    hub: str | None = None
    """A data set on the hub (owner/name), or a local one that `datasets.load_dataset` reads."""
    config: str | None = None
    """Which configuration of the hub's data set."""
    split: str = "train"
    """Which split of the hub's data set."""
    revision: str | None = None
    """The hub's commit."""
    function: str | None = None
    """A Python function of yours, FILE.py:NAME; it gives one mapping for each row."""
    args: dict[str, Any] = Field(default_factory=dict)
    """What the function is called with."""
    format: Format | None = None
    """What kind of file it is; by its ending where nothing is said."""
    documents: Literal["paragraph", "file", "line"] | None = None
    """What a document is in plain text: by default a paragraph of a .txt file, and the whole of a Markdown file."""
    map: dict[str, str | int] = Field(default_factory=dict)
    """What the rows' columns are called, {text: review, label: stars}; in CoNLL files the number of the column, from 1."""
    weight: float = Field(1.0, gt=0, le=100)
    """How often an epoch sees each row; 0.5 takes half of them, drawn with the recipe's seed. For training rows."""

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        given = [key for key in ("path", "hub", "function") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"a source has one of path, hub and function; found {' and '.join(given) or 'none'}")
        for key, of in (("config", "hub"), ("split", "hub"), ("revision", "hub"), ("args", "function"), ("documents", "path")):
            if key in self.model_fields_set and given != [of]:
                raise ValueError(f"{key} is for a {of}, and this source is a {given[0]}")
        if self.function and not self.function.rpartition(":")[0].endswith(".py"):
            raise ValueError(f"function is {self.function!r}, expected FILE.py:NAME")
        return self

    @property
    def name(self) -> str:
        """What to call it in a sentence."""
        return str(self.path or self.hub or self.function)


@dataclass(frozen=True)
class Part:
    """A file of a source, or the whole of one that is no file."""

    source: Source
    path: str
    format: Format | None = None
    """None for rows that come from the hub or a function."""
    compression: str | None = None

    @property
    def remote(self) -> bool:
        """It lies behind a URL."""
        return "://" in self.path

    def identity(self) -> str:
        """Changes whenever the rows do: the sha256 of a file's bytes, or what a server or library says of its version.

        A function has none but its rows.
        """
        if self.source.hub:
            from tuner.data import formats

            return str(formats.hub_rows(self.source)._fingerprint)  # datasets' own name for what it loaded
        if self.remote:
            return _remote_identity(self.path)
        return sha256_of(self.path)

    def stamp(self) -> tuple[int, ...] | None:
        """Size, times and number of a local file: differs where the file was written to or exchanged."""
        if self.format is None or self.remote:
            return None
        with readable(self.path):
            found = os.stat(self.path)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Its bytes, unpacked. Raises DataError where it cannot be read; what is cut short says so when it is read to there."""
        import io

        import pyarrow as pa

        with readable(self.path):
            # The library's own files read no more than whole lines, however long these are.
            raw: IO[bytes] = (
                io.BufferedReader(_file_system(self.path)[0].open(self.path)) if self.remote else Path(self.path).open("rb")  # noqa: SIM115
            )
        with raw:
            if self.compression is None:
                yield raw
            else:
                # One library for both, which unlike others complains where the end is missing.
                yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), self.compression))


def parts(source: Source, made_by: str | None = None) -> tuple[list[Part], list[str]]:
    """(the files of a source in the order of their names, those in its folders that are no data).

    Raises DataError where there is none, and for one whose kind cannot be told.
    """
    if source.path is None:
        return [Part(source, source.name)], []
    paths, passed_over, chosen = _paths(source.path, made_by)
    found = []
    for path in paths:
        if not path.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in path):
            raise DataError(f"{path.encode('utf-8', 'backslashreplace').decode()}: its name is not UTF-8; rename it")
        stem, ending = os.path.splitext(path)
        compression = COMPRESSED.get(ending.lower())
        kind = source.format or ENDINGS.get((os.path.splitext(stem)[1] if compression else ending).lower())
        if kind is None and chosen:
            known = ", ".join(dict.fromkeys(ENDINGS.values()))
            raise DataError(f"{path}: its ending says nothing; in a recipe a source can have format: {known}")
        if kind is None:
            passed_over.append(path)
        elif compression and kind in ("parquet", "arrow"):
            raise DataError(f"{path}: {kind} files are compressed inside; unpack it")
        else:
            found.append(Part(source, path, kind, compression))
    if source.documents and not any(each.format == "text" for each in found):
        raise DataError(f"{source.path}: documents: {source.documents} is for plain text, and none of this is")
    if not found:
        raise DataError(
            f"{source.path}: no data in there, expected files that end in {', '.join(ENDINGS)}, or these with .gz or .zst"
        )
    return found, passed_over


def _paths(path: str, made_by: str | None) -> tuple[list[str], list[str], bool]:
    """(files, other files of a folder, whether each file was chosen by name)."""
    if "://" in path:
        return _remote_paths(path)
    if any(letter in path for letter in "*?[") and not os.path.lexists(path):
        names = [each for each in path.split("/") if each]
        found = [] if path.endswith("/") else _expanded("/" if path[0] == "/" else "", names)
        matches = _once(each for each in found if not os.path.isdir(each) and not _is_worked_out(each))
        if not matches:
            raise DataError(f"{path}: no file matches this pattern")
        return matches, [], True
    with readable(path, made_by):
        if os.path.isdir(path):
            return _once(_walk(path)), [], False
        if not os.path.isfile(path):
            os.stat(path)  # says what is wrong with it, if anything is
            raise DataError(f"{path}: is no ordinary file")
    return [path], [], True


def _expanded(folder: str, names: list[str]) -> Iterator[str]:
    """Every path that a pattern's `names` lead to from a folder. As `glob` has it, but a folder that may not be read is an error,
    and one that links lead back to is followed once."""
    first, rest = names[0], names[1:]
    if not os.path.isdir(folder or "."):
        return
    if first == "**":
        for where, files in _folders(folder or "."):
            yield from _expanded(where, rest) if rest else (os.path.join(where, each) for each in files if each[0] != ".")
    elif os.path.lexists(path := os.path.join(folder, first)) or not glob.has_magic(first):  # a name may have brackets of its own
        if _is_there(path):
            yield from _expanded(path, rest) if rest else [path]
    else:
        with readable(folder):
            inside = sorted(os.listdir(folder or "."))
        for each in inside:
            if fnmatch.fnmatchcase(each, first) and (each[0] != "." or first[0] == "."):
                yield from _expanded(os.path.join(folder, each), rest) if rest else [os.path.join(folder, each)]


def _once(paths: Iterable[str]) -> list[str]:
    """The files in the order of their names; of several ways to one the shortest. Raises DataError for what is no ordinary file."""
    places = {os.path.realpath(each): each for each in sorted(paths, key=len, reverse=True)}
    for place, path in places.items():
        if os.path.lexists(place) and not os.path.isfile(place):
            raise DataError(f"{path}: is no ordinary file")
    return sorted(places.values())


def _is_there(path: str) -> bool:
    """Something has this name. Raises DataError where its folder does not let us look."""
    with readable(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def _walk(folder: str) -> list[str]:
    """Every file below, by name, that is no other program's note."""
    found = []
    for where, files in _folders(folder):
        splits = _saved(where, ABOVE_ROWS).get("splits") if ABOVE_ROWS in files else None
        if splits and len(splits) > 1:
            raise DataError(f"{where}: is a data set of the splits {', '.join(splits)}; name one, such as {where}/{splits[0]}")
        if "state.json" in files and (listed := _saved(where, "state.json").get("_data_files")):
            # Beside its rows the library leaves what it worked out of them.
            found += [os.path.join(where, os.path.basename(each["filename"])) for each in listed]
            continue
        others = {ABOVE_ROWS, *(BESIDE_ROWS if any(each.endswith((".arrow", ".parquet")) for each in files) else ())}
        found += [os.path.join(where, each) for each in files if each[0] != "." and each not in others]
    return sorted(found)


def _is_worked_out(path: str) -> bool:
    """A file that the datasets library made of the rows beside it."""
    folder, name = os.path.split(path)
    listed = _saved(folder, "state.json").get("_data_files") if name.startswith("cache-") else None
    return bool(listed) and name not in [each["filename"] for each in listed or ()]


def _saved(folder: str, name: str) -> dict[str, Any]:
    """What the datasets library wrote down of its files; nothing where the name stands for something else."""
    try:
        value = json.loads(Path(folder, name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _folders(folder: str) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of this one and all below; one that links lead back to is given once."""

    def stop(error: OSError) -> None:
        raise error

    seen = set()
    with readable(folder):
        for where, folders, files in os.walk(folder, followlinks=True, onerror=stop):
            place = os.path.realpath(where)
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(each for each in folders if each[0] != ".")
            yield where, files


@contextmanager
def readable(path: str, made_by: str | None = None) -> Iterator[None]:
    """Turn what the system says of a file that cannot be opened into a DataError."""
    try:
        yield
    except FileNotFoundError:
        # Of a server that does not answer the library says the same.
        missing = f"{path}: nothing is found there" if "://" in path else _missing(Path(path), made_by)
        raise DataError(missing) from None
    except ImportError as error:
        raise DataError(f"{path}: {error}") from None
    except DataError:
        raise
    except Exception as error:
        # Libraries for object stores have exceptions of their own.
        if not isinstance(error, OSError) and "://" not in path:
            raise
        where = getattr(error, "filename", None) or path
        raise DataError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error or type(error).__name__}") from None


def _missing(path: Path, made_by: str | None) -> str:
    if path.is_symlink():
        return f"{path}: is a link that leads nowhere"
    siblings = [each.name for each in path.parent.glob("*")] if path.parent.is_dir() else []
    mistyped = difflib.get_close_matches(path.name, siblings, cutoff=0.8) or not made_by
    advice = nearest(path.name, siblings) if mistyped else f"; `.venv/bin/python {made_by}` writes it"
    return f"{path}: there is no such file{advice}"


def sha256_of(path: str) -> str:
    """The hash of a file's bytes, remembered for as long as the file is not written to: hashing 10 GB takes half a minute."""
    from tuner.data.cache import remembered

    with readable(path):
        found = os.stat(path)
        return remembered(os.path.realpath(path), found, lambda: _digest(path))


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    return system, path


def _remote_paths(url: str) -> tuple[list[str], list[str], bool]:
    with readable(url):
        system, path = _file_system(url)
        if any(letter in path for letter in "*["):
            found, chosen = sorted(system.glob(path)), True
        elif "?" not in path and not os.path.splitext(path)[1] and system.isdir(path):
            found, chosen = sorted(system.find(path)), False
        else:
            found, chosen = [path], True
    if not found:
        raise DataError(f"{url}: no file is there")
    return [each if "://" in each else system.unstrip_protocol(each) for each in found], [], chosen


def _remote_identity(url: str) -> str:
    """What the store says of this version of a file; its bytes hashed where it says nothing."""
    with readable(url):
        system, path = _file_system(url)
        said = {key: str(value) for key, value in system.info(path).items() if key.lower() in ("etag", "md5hash", "crc32c")}
        if said:
            return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        digest = hashlib.sha256()
        with system.open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

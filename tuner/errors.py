"""What can go wrong by the user's hand. Each is one sentence that says what was asked, what was found and what works.

TunerError            exit code 2, printed without a traceback
├── RecipeError       the recipe, an override, or a combination in it
├── DataError         a row or a file of the user's data
├── SourceError       a model that cannot be found, or is not what it claims to be
├── BundleError       a directory that is not a whole bundle
├── GateError         a stage ran, and its result is not good enough to go on with
├── DiskFull          nothing could be written; what was finished before is untouched
└── Interrupted       Ctrl-C or SIGTERM, exit code 130; the same command continues

Anything else that escapes is a bug of ours: it keeps its traceback and ends with exit code 1.
"""

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What a terminal would obey rather than show: control characters but for the line end and the tab, and turns of direction.
UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text for a terminal: what it would obey stands there as its number."""
    return UNSHOWN.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


class TunerError(Exception):
    """A mistake that the user can put right."""

    exit_code = 2


class RecipeError(TunerError):
    """The recipe asks for something that does not exist or does not go together."""


class DataError(TunerError):
    """A row or a file of the data is not what the task reads."""

    def __init__(self, message: str, kind: str | None = None) -> None:
        """`kind` says what is wrong with a row, as a key of `data.on_bad_row`; a file that is wrong as a whole has none."""
        super().__init__(message)
        self.kind = kind


class SourceError(TunerError):
    """The model that the recipe names cannot be found or read."""


class BundleError(TunerError):
    """A directory is not a bundle, or not the one that its manifest describes."""


class GateError(TunerError):
    """A stage's result failed the check that the stage or the recipe sets."""


class DiskFull(TunerError):
    """There is no room for what is being written."""


class Interrupted(TunerError):
    """The user or the system asked the run to stop."""

    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` where a known word is close, else the known words, else nothing: the end of an error's sentence."""
    words = sorted(set(known))
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if close:
        return f'; did you mean "{close[0]}"?'
    more = f" and {len(words) - 40} more" if len(words) > 40 else ""
    return f"; there is: {', '.join(words[:40])}{more}" if words else ""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" into DiskFull, whichever library reports it: safetensors and tokenizers raise errors of their own."""
    try:
        yield
    except Exception as error:
        no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not no_space and "No space left on device" not in str(error):
            raise
        raise DiskFull(
            f"the disk is full while writing {path}; make room and run the same command again: what was finished before is intact"
        ) from error

"""What a person sees while long work runs: bars in a terminal; elsewhere, as in a log, a line a stage, and one a minute."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from tuner.errors import visible

T = TypeVar("T")

console = Console(stderr=True, highlight=False)

# Between two lines about the same work, where there is no terminal (seconds).
LINE_EVERY_S = 60


class Advance(Protocol):
    """Call it after each unit of work with what there is to say about it."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...


def say(text: str) -> None:
    """One line for the user on standard error."""
    console.print(visible(text), soft_wrap=True, markup=False)


@contextmanager
def track(title: str, total: int | None, done: int = 0) -> Iterator[Advance]:
    """A bar with count, note, elapsed and remaining time while the block runs; a line a minute when not a terminal."""
    if not console.is_terminal:
        yield _lines(title, total, done)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")
        yield lambda count=1, note="": progress.update(task, advance=count, note=note)


def _lines(title: str, total: int | None, done: int) -> Advance:
    """Says how far the work is when a minute has gone by since it last did."""
    first, start = done, time.monotonic()
    told = start

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, told
        done, now = done + count, time.monotonic()
        if now - told < LINE_EVERY_S:
            return
        told = now
        left = (now - start) * ((total or done) - done) / max(1, done - first)
        of = f" of {total}, about {left / 60:.0f} min left" if total else ""
        say(f"{title}: {done}{of}{'; ' if note else ''}{note}")

    return advance


def counted(title: str, items: Iterable[T]) -> Iterator[T]:
    """The items, with a count that moves as they are taken; how many there are need not be known."""
    with track(title, None) as advance:
        for number, item in enumerate(items, 1):
            yield item
            if number % 100 == 0:
                advance(100)


@contextmanager
def silent() -> Iterator[None]:
    """A block of which nothing is said."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


@contextmanager
def timed(title: str) -> Iterator[None]:
    """Say what begins, turn a spinner in a terminal, and say how long it took once it has ended well."""
    start = time.monotonic()
    say(f"{title} ...")
    with console.status(Text(title)) if console.is_terminal else nullcontext():
        yield
    say(f"{title}: {time.monotonic() - start:.0f} s")

"""What a person sees while long work runs: bars in a terminal, one line a stage elsewhere."""

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


class Advance(Protocol):
    """Call it after each unit of work with what there is to say about it."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...


def say(text: str) -> None:
    """One line for the user on standard error."""
    console.print(visible(text), soft_wrap=True, markup=False)


@contextmanager
def track(title: str, total: int | None, done: int = 0) -> Iterator[Advance]:
    """A bar with count, note, elapsed and remaining time while the block runs; nothing when not a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")
        yield lambda count=1, note="": progress.update(task, advance=count, note=note)


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

"""Short documents behind each other in one row, as full as they get: best-fit decreasing, over all rows or as they come."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from tuner.data.example import Packed

# Documents that are looked at together. Most data sets have fewer; of a longer one, what is left over is packed with what follows.
WINDOW = 16_384
# A row this full is not worth waiting with.
FULL = 0.98


def best_fit(lengths: Iterable[int], row_tokens: int, window: int = WINDOW) -> Iterator[list[int]]:
    """Indices for each row: the longest document first, each into the fullest row that has room for it.

    `lengths` may be any stream: `window` documents at a time are in memory, beside as many rows that wait for a better fit. Only a
    document of more than `row_tokens` makes a longer row.
    """
    stream = enumerate(lengths)
    waiting: list[tuple[int, list[int]]] = []
    while True:
        fresh = [(length, [index]) for index, length in islice(stream, window)]
        rows = _packed([*waiting, *fresh], row_tokens)
        if len(fresh) < window:
            yield from (row for _, row in rows)
            return
        rows.sort(key=lambda each: -each[0])
        full = sum(length >= FULL * row_tokens for length, _ in rows)
        done = max(full, len(rows) - window)
        yield from (row for _, row in rows[:done])
        waiting = rows[done:]


def _packed(items: list[tuple[int, list[int]]], row_tokens: int) -> list[tuple[int, list[int]]]:
    """(tokens, indices) of each row, made of items of the same form."""
    rows: list[tuple[int, list[int]]] = []
    # For each amount of room the rows that have it; which amounts there are, as bits of a number.
    with_room: dict[int, list[int]] = {}
    amounts = 0
    for length, indices in sorted(items, key=lambda item: -item[0]):
        fitting = amounts >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            at = with_room[room].pop()
            if not with_room[room]:
                amounts &= ~(1 << room)
            rows[at] = (rows[at][0] + length, rows[at][1] + indices)
        else:
            room, at = max(row_tokens, length), len(rows)
            rows.append((length, list(indices)))
        if left := room - length:
            with_room.setdefault(left, []).append(at)
            amounts |= 1 << left
    return rows


class PackedRows(Sequence[Packed]):
    """Examples in rows of at most `row_tokens`. They are packed once, and read when they are asked for."""

    def __init__(self, examples: Any, row_tokens: int) -> None:
        """`examples` know their `lengths`."""
        self._examples = examples
        self._rows = list(best_fit(examples.lengths, row_tokens))
        self.lengths = [sum(examples.lengths[index] for index in row) for row in self._rows]
        """Tokens of each row."""
        self.padding = 1 - sum(self.lengths) / (row_tokens * len(self._rows)) if self._rows else 0.0
        """Share of the rows that no document fills."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return Packed([self._examples[each] for each in self._rows[index]])

"""The rows of a recipe: its sources in order, each row in the form that tasks read, and what tells one state from another."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tuner.data import formats, functions
from tuner.data.files import Part, Source, parts
from tuner.data.rows import Row, check_texts, opening, plain, words_of
from tuner.data.shapes import canonical
from tuner.errors import DataError
from tuner.recipe import Recipe

# The sides between which `heldout_fraction` divides the training rows.
SPLIT = ("train", "heldout")


def sources(recipe: Recipe, which: str) -> list[Source]:
    """The sources of `train`, `heldout` or `test`. Rows that are held out by a fraction are among those of `train`."""
    if which == "heldout" and recipe.data.heldout is None:
        which = "train"
    return list(getattr(recipe.data, which))


def named(recipe: Recipe, which: str) -> str:
    """What to call them in a sentence."""
    return ", ".join(source.name for source in sources(recipe, which))


def found(recipe: Recipe, which: str) -> list[tuple[int, Part]]:
    """Each part with the number of its source, looked for once a run. Raises DataError where there is none."""
    key = ("parts", which)
    if key not in recipe.seen:
        wanted = [source.model_copy(update={"map": {**recipe.data.map, **source.map}}) for source in sources(recipe, which)]
        each = [parts(source, recipe.data.made_by) for source in wanted]
        recipe.seen[key] = [(number, part) for number, (inside, _) in enumerate(each) for part in inside]
        recipe.seen["passed over", which] = [path for _, others in each for path in others]
    there: list[tuple[int, Part]] = recipe.seen[key]
    return there


def passed_over(recipe: Recipe, which: str) -> list[str]:
    """Files in the recipe's folders that are no data."""
    found(recipe, which)
    paths: list[str] = recipe.seen["passed over", which]
    return paths


def not_read(paths: list[str]) -> list[str]:
    """A line on files that are no data, where there are any."""
    if not paths:
        return []
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return [f"not read, since their endings are those of no data: {', '.join(paths[:3])}{more}"]


def identity(recipe: Recipe, which: str) -> dict[str, Any]:
    """For the manifest: `path`, and the `sha256` of the one file or of what identifies each part. Worked out once a run."""
    identities = [_identity(recipe, part) for _, part in found(recipe, which)]
    whole = identities[0] if len(identities) == 1 else hashlib.sha256("\n".join(identities).encode()).hexdigest()
    files = {"files": len(identities)} if len(identities) > 1 else {}
    return {"path": named(recipe, which), "sha256": whole, **files}


def state(recipe: Recipe, which: str, *, places: bool = False) -> list[Any]:
    """Everything that the rows follow from; with `places` also where they lie, which is what errors name."""
    each = [
        [_identity(recipe, part), part.format, part.source.documents, part.source.map, part.path if places else None, number]
        for number, part in found(recipe, which)
    ]
    drawn = [which, recipe.data.heldout_fraction] if recipe.data.heldout_fraction and which in SPLIT else None
    return [each, drawn, recipe.data.on_bad_row.model_dump()]


def read(recipe: Recipe, which: str, first: int | None = None) -> Iterator[Row | DataError]:
    """Rows in order; one that is damaged is a DataError in its place, for `usable` to decide about.

    `first` ends each source after so many of its rows, though not before one is given: a small share may begin late. An empty file
    counts as a damaged row. Raises DataError for a file that is damaged as a whole, or has changed since the run began.
    """
    seen, given = Counter[int](), set[int]()
    for number, part in found(recipe, which):
        if first is not None and number in given and seen[number] >= first:
            recipe.seen["more", which] = True
            continue
        before = _stamp(recipe, part)
        share = recipe.data.heldout_fraction if which in SPLIT else None
        rows = 0
        if part.source.function:
            _kept(recipe, part).require_same()
        for row in _kept(recipe, part).rows() if part.source.function else formats.rows(part):
            if first is not None and number in given and seen[number] >= first:
                recipe.seen["more", which] = True
                break
            rows += 1
            seen[number] += 1
            if isinstance(row, DataError):
                if not share or which == "train":  # once is enough
                    given.add(number)
                    yield row
                continue
            try:
                columns = {} if part.format == "conll" else part.source.map  # there they are numbers, and read already
                row = canonical(row, columns, table=part.format in ("csv", "tsv"))
                if share and _held_out(row, share) != (which == "heldout"):
                    continue
                check_texts(row.record)
                given.add(number)
                yield Row(row.place, row.record, row.shape, number)
            except DataError as error:
                if share and which != "train":
                    continue
                given.add(number)
                smaller = "; `documents: paragraph` or `line` makes smaller ones" if part.format == "text" else ""
                yield DataError(f"{row.place}: {error}{smaller if error.kind == 'broken' else ''}", error.kind or "shape")
        if not rows and (not share or which == "train"):
            yield DataError(f"{part.path}:1: the file is empty; expected rows" + _form(part), "broken")
        if part.stamp() != before:
            raise DataError(f"{part.path}: changed while it was read; start the run again")


def _key(what: str, part: Part) -> tuple[str, ...]:
    """Two sources may have one name and differ in their arguments or split."""
    return what, part.path, part.source.model_dump_json()


def _kept(recipe: Recipe, part: Part) -> functions.Kept:
    kept: functions.Kept = recipe.seen.setdefault(_key("kept", part), functions.Kept(part.source))
    return kept


def _form(part: Part) -> str:
    return ", one JSON object a line" if part.format == "jsonl" else ""


def _stamp(recipe: Recipe, part: Part) -> tuple[int, ...] | None:
    """The file's size and times, which stay what they were when the run first looked at it."""
    stamp: tuple[int, ...] | None = recipe.seen.setdefault(_key("stamp", part), part.stamp())
    if stamp != part.stamp():
        raise DataError(f"{part.path}: changed since the run began; start it again")
    return stamp


def _identity(recipe: Recipe, part: Part) -> str:
    key = _key("identity", part)
    _stamp(recipe, part)
    if key not in recipe.seen:
        recipe.seen[key] = _kept(recipe, part).identity() if part.source.function else part.identity()
        _stamp(recipe, part)
    return str(recipe.seen[key])


def _held_out(row: Row, share: float) -> bool:
    """By what the row asks first, or says where it asks nothing: rows that begin with the same question are never on both sides,
    and adding rows moves none of the old ones."""
    said = plain(opening(row.record) or words_of(row.record)).encode("utf-8", "surrogatepass") or row.content
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big") < share * 2**64

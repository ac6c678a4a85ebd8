"""The text of rows, and a text as the tokens that an encoder reads."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tuner.data import reading
from tuner.data.rows import BadRows, lacking, usable, words_of
from tuner.errors import DataError
from tuner.progress import counted
from tuner.recipe import Recipe

T = TypeVar("T")
# Characters that the library encodes together, on all cores; a token takes it a quarter of a kilobyte meanwhile.
BATCH_CHARACTERS = 1_000_000
# Keys of a record whose text is read by a stage that has no task.
TEXT_KEYS = frozenset({"text", "messages", "messages.role", "messages.content", "prompt", "completion"})


def texts(recipe: Recipe, bad: BadRows, key: str = "train") -> Iterator[str]:
    """The text in each row of `train` or `heldout`. A row that has none raises DataError with its place, or is counted in `bad`."""
    rows = counted("reading text", reading.read(recipe, key))
    for _, text in usable(rows, lambda row: text_of(row.record), bad):
        yield text


def text_of(record: dict[str, Any]) -> str:
    """All the text that a model reads in the record, system messages too; raises DataError where it has none."""
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        text = str(record["prompt"] + record["completion"])
    else:
        text = words_of(record, system=True)
    if not text.strip():
        kind = "empty" if any(lacking(value) == "empty" for value in record.values()) else "shape"
        raise DataError(f"found no text under the keys {', '.join(record) or 'of an empty object'}", kind)
    return text


def require_text(record: dict[str, Any], beside: str = "") -> None:
    """Raises DataError unless the record has a text under "text"; `beside` names what else was expected."""
    if "text" not in record:
        found = ", ".join(f'"{key}"' for key in record) or "nothing"
        raise DataError(f'found {found}, expected the key "text"{beside}')
    if not isinstance(record["text"], str) or not record["text"].strip():
        raise DataError(f'"text" is {record["text"]!r:.60}, expected text', lacking(record["text"]))


def batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """The items in lists of which each has BATCH_CHARACTERS by their `size`, and the last what is left."""
    batch: list[T] = []
    characters = 0
    for each in items:
        batch.append(each)
        characters += size(each)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def asked(text: str, ids: list[int], tokenizer: Any) -> dict[str, Any]:
    """What a probe asks: the `text`, its `ids`, and whether these are the `whole` of it, or the text goes on."""
    return {"ids": ids, "text": text, "whole": list(tokenizer(text)["input_ids"]) == ids}


def require_one_beginning(ids: list[int], tokenizer: Any) -> None:
    """Raises DataError for tokens that begin twice, which no model has seen."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    if begin is not None and ids[:2] == [begin, begin]:
        name = tokenizer.convert_ids_to_tokens(begin)
        raise DataError(f"begins with {name} twice: the tokenizer puts one there by itself; take it out of the text")


def encode(text: str, tokenizer: Any, *, max_tokens: int, cut: bool) -> tuple[list[int], bool]:
    """(ids with the tokenizer's own special tokens, whether they were cut off at `max_tokens`).

    Raises DataError for a longer text where that is not allowed.
    """
    ids = list(tokenizer(text)["input_ids"])
    require_one_beginning(ids, tokenizer)
    if len(ids) <= max_tokens:
        return ids, False
    if not cut:
        raise DataError(f"{len(ids)} tokens, expected at most max_tokens: {max_tokens}", "too_long")
    return list(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]), True

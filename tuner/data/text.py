"""A text as the tokens that an encoder reads."""

from typing import Any

from tuner.errors import DataError


def encode(text: str, tokenizer: Any, *, max_tokens: int, cut: bool) -> tuple[list[int], bool]:
    """(ids with the tokenizer's own special tokens, whether they were cut off at `max_tokens`).

    Raises DataError for a longer text where that is not allowed.
    """
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) <= max_tokens:
        return ids, False
    if not cut:
        raise DataError(f"{len(ids)} tokens, expected at most max_tokens: {max_tokens}", "too_long")
    return list(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]), True

"""Causal language modelling on plain text: every token is learned from the ones before it."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from tuner.data.example import Example
from tuner.data.rows import BadRows, Row, usable
from tuner.data.text import asked, require_one_beginning, require_text
from tuner.errors import DataError
from tuner.kinds import Options as BaseOptions
from tuner.score import of_answers as scores
from tuner.score import scored

__all__ = [
    "BLOCK_TOKENS",
    "HEAD",
    "KEYS",
    "SHAPES",
    "Options",
    "check_row",
    "examples",
    "objective",
    "question",
    "reference",
    "scored",
    "scores",
]

HEAD = "causal"
KEYS = frozenset({"text"})
SHAPES: dict[str, dict[str, Any]] = {"text": {}}
# Longer documents become several.
BLOCK_TOKENS = 512


class Options(BaseOptions):
    """Keys of `task: {kind: pretrain}`."""

    kind: Literal["pretrain"] = "pretrain"
    max_tokens: int = Field(256, gt=1)
    """Length of a block in tokens. A longer document becomes several; two documents never share one."""
    prompt_tokens: int = Field(16, gt=0)
    """How much of a held-out document the probe shows before the model goes on by itself."""
    packing: bool = False
    """Put short rows behind each other into rows of max_tokens, which batch_size then counts. Each still reads itself alone."""


def check_row(record: dict[str, Any], options: Options, *, chat_template: bool = True) -> None:  # noqa: ARG001 - a task's common signature
    """Raises DataError unless the record is {"text": "..."}."""
    require_text(record)


def examples(rows: Iterator[Row], tokenizer: Any, options: Options, bad: BadRows) -> Iterator[tuple[Row, Example]]:
    """Each document's blocks; bad rows stop the run with a DataError, or are counted in `bad`."""

    def tokens(row: Row) -> list[int]:
        check_row(row.record, options)
        ids = [*tokenizer(row.record["text"])["input_ids"], tokenizer.eos_token_id]
        if len(ids) < 3:
            raise DataError(f"{len(ids)} tokens: too short to predict anything")
        require_one_beginning(ids, tokenizer)
        return ids

    for row, ids in usable(rows, tokens, bad):
        for start in range(0, len(ids), options.max_tokens):
            # A single token that is left over is shown with the one before it, or nothing would predict it.
            block = ids[min(start, len(ids) - 2) : start + options.max_tokens]
            yield row, Example(block, list(block))


def question(record: dict[str, Any], tokenizer: Any, options: Options) -> dict[str, Any]:
    """`ids` of the document's beginning, and the `text` that it is the beginning of."""
    ids = list(tokenizer(record["text"])["input_ids"])[: options.prompt_tokens]
    # A little more than what is asked, so that the last token of that is what it is in the whole.
    return {**asked(record["text"][: len(tokenizer.decode(ids)) + 200], ids, tokenizer), "messages": None}


def objective(model: Any, tokenizer: Any, options: Options) -> Any:  # noqa: ARG001 - a task's common signature
    """The next token's negative log-likelihood."""
    from tuner.heads.causal import NextTokenLoss

    return NextTokenLoss(model, tokenizer.pad_token_id)


def reference(record: dict[str, Any]) -> str:
    """The document."""
    return str(record["text"])

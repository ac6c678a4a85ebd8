"""Train a byte-level BPE tokenizer on the recipe's text (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2)."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from tuner.bundle import Manifest
from tuner.data import reading
from tuner.data.rows import BadRows, usable
from tuner.errors import DataError
from tuner.kinds import Options as BaseOptions
from tuner.progress import counted
from tuner.stages import Job

TAKES = frozenset({"nothing"})
RESULT = "tokenizer"
VERSION = 1
KEYS = frozenset({"text", "messages", "messages.role", "messages.content", "prompt", "completion"})


class Options(BaseOptions):
    """Keys of `- tokenizer:`."""

    vocab_size: int = Field(4096, ge=257)
    """Entries: 256 bytes, the end token, and merges for the rest."""
    eos_token: str = Field("<|endoftext|>", min_length=1)
    """Ends a document and pads."""


def gives(options: Options) -> str:  # noqa: ARG001 - a stage's common signature
    """A tokenizer."""
    return "tokenizer"


def run(job: Job) -> Manifest:
    """Count pairs in the training text, write tokenizer.json and its configuration."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from tuner.source import versions

    options: Any = job.options
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=[options.eos_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bad = BadRows(job.recipe.data.on_bad_row)
    tokenizer.train_from_iterator(texts(job, bad), trainer)
    eos = options.eos_token
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=eos, eos_token=eos, pad_token=eos).save_pretrained(job.folder)
    return Manifest(
        kind="tokenizer",
        stage="tokenizer",
        fingerprint=job.fingerprint,
        recipe=job.told(),
        data={**reading.identity(job.recipe, "train"), **bad.told()},
        metrics={"tokenizer": {"vocab_size": tokenizer.get_vocab_size()}},
        versions=versions(),
    )


def texts(job: Job, bad: BadRows) -> Iterator[str]:
    """The text in each training row. A row that has none raises DataError with its place, or is counted in `bad`."""
    rows = counted("reading text", reading.read(job.recipe, "train"))
    for _, text in usable(rows, lambda row: text_of(row.record), bad):
        yield text


def check_row(record: dict[str, Any], options: Options, *, chat_template: bool) -> None:  # noqa: ARG001 - a row's common signature
    """Raises DataError for a record without text."""
    text_of(record)


def text_of(record: dict[str, Any]) -> str:
    """The record's text; raises DataError where it has none."""
    if isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record.get("messages"), list):
        return "\n".join(str(message.get("content", "")) for message in record["messages"] if isinstance(message, dict))
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return str(record["prompt"] + record["completion"])
    raise DataError(
        f'found the keys {", ".join(record) or "of an empty object"}, expected "text", "messages", or "prompt" and "completion"'
    )

"""Give a model's tokenizer the words of a domain, and the model an embedding for each: the mean of what it was cut into before.

On text without the new tokens the model ranks its answers as it did: the mean of some logits is never above the largest of them.
"""

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from tuner.bundle import Manifest
from tuner.data import reading
from tuner.data.example import repeated
from tuner.data.rows import BadRows
from tuner.data.text import text_of, texts
from tuner.errors import DataError, GateError, RecipeError, SourceError
from tuner.kinds import Options as BaseOptions
from tuner.progress import say
from tuner.stages import Job

if TYPE_CHECKING:
    from collections import Counter

    from tuner.plan import Plan, Step

TAKES = frozenset({"model"})
RESULT = "extended"
VERSION = 1
ADDS_TOKENS = True
# Named where the run says what it found.
SHOWN = 8


class Options(BaseOptions):
    """Keys of `- extend:`."""

    learned: int = Field(500, ge=0)
    """Tokens to learn from the training text: those that save most. For tokenizers of BPE and WordPiece."""
    min_frequency: int = Field(20, ge=1)
    """What occurs less often is not learned: an embedding needs examples."""
    listed: list[str] = Field(default_factory=list)
    """Tokens that you name, such as "<|tool|>" or "HbA1c": found before anything else is cut, words only as whole words."""

    @model_validator(mode="after")
    def _something(self) -> "Options":
        if not self.learned and not self.listed:
            raise ValueError("there is nothing to add: say how many tokens are to be learned, or list some")
        if (twice := repeated(self.listed)) is not None:
            raise ValueError(f"listed: {twice!r} stands there twice")
        if any(each != each.strip() or not each for each in self.listed):
            raise ValueError("listed: a token is empty, or begins or ends with a space, which would then be a part of it")
        return self


def gives(options: Options) -> str:  # noqa: ARG001 - a stage's common signature
    """A model."""
    return "model"


def check(plan: "Plan", step: "Step") -> None:
    """Raises RecipeError where nothing would train the new tokens."""
    if not any(later.trains for later in plan.steps[step.index + 1 :]):
        message = (
            "a new token stays the mean of its parts, which says next to nothing, until it is trained: put a tune stage after it"
        )
        raise plan.recipe.error(message, "stages", step.index, "extend")


def check_row(record: dict[str, Any], options: Options, *, chat_template: bool) -> None:  # noqa: ARG001 - a row's common signature
    """Raises DataError for a record without text."""
    text_of(record)


def run(job: Job) -> Manifest:
    """Learn tokens, write the tokenizer, make room in the embeddings and fill it.

    Raises RecipeError for a listed token that there is already, DataError for one that is in no training row.
    """
    from tuner import kinds, vocabulary
    from tuner.checkpoint import load_model, load_tokenizer, quiet
    from tuner.source import describe_model, pooling_of

    options: Any = job.options
    assert job.parent is not None
    quiet()
    old = load_tokenizer(job.parent.path)
    if not old.is_fast:
        raise _at(job, "the model has no tokenizer.json, and no other tokenizer can be extended", "learned")
    if known := [token for token in options.listed if token in old.get_vocab()]:
        raise _at(job, f"{known[0]!r} is a token of this model already; leave it out", "listed")
    bad = BadRows(job.recipe.data.on_bad_row)
    learned = vocabulary.Entries()
    if options.learned:
        try:
            learned = vocabulary.learn(old, vocabulary.words(old, texts(job.recipe, bad)), options.learned, options.min_frequency)
        except SourceError as error:
            raise _at(job, str(error), "learned") from None
    listed = [token for token in options.listed if token not in learned.pieces]
    if not learned.pieces and not listed:
        raise DataError(
            f"{reading.named(job.recipe, 'train')}: nothing to learn: no two tokens follow each other within a word "
            f"{options.min_frequency} times"
        )
    try:
        new = vocabulary.extend(old, learned, listed, job.folder)
    except SourceError as error:
        raise _at(job, str(error), "listed") from None
    figures = _saved(job, old, new, [*learned.pieces, *listed])
    model = load_model(job.parent)
    parts = {new.convert_tokens_to_ids(token): old.convert_tokens_to_ids(pieces) for token, pieces in learned.pieces.items()}
    parts |= {new.convert_tokens_to_ids(token): old(token, add_special_tokens=False)["input_ids"] for token in listed}
    _fill(model, parts)
    model.save_pretrained(job.folder)
    serving: dict[str, Any] = {}
    if pooling := job.parent.manifest.serving.get("pooling") or pooling_of(job.parent.path):
        serving["pooling"] = pooling
        kinds.load("heads", str(job.parent.manifest.head)).describe(job.folder, serving)
    return describe_model(
        job.folder,
        stage="extend",
        fingerprint=job.fingerprint,
        recipe=job.told(),
        data={**reading.identity(job.recipe, "train"), **bad.told()},
        metrics={"extend": figures},
        serving={**serving, "new_tokens": [min(parts), max(parts) + 1]},
    )


def _at(job: Job, message: str, key: str) -> RecipeError:
    return job.recipe.error(message, "stages", job.index, "extend", key)


def _saved(job: Job, old: Any, new: Any, tokens: list[str]) -> dict[str, Any]:
    """How many tokens the rows were and are, and what was added. Raises DataError for a listed token that is in no training row."""
    from tuner import vocabulary

    figures: dict[str, Any] = {"tokens": len(tokens)}
    for key in ("train", "heldout") if job.recipe.data.holds_out else ("train",):
        before, after = (
            vocabulary.count(tokenizer, texts(job.recipe, BadRows(job.recipe.data.on_bad_row), key)) for tokenizer in (old, new)
        )
        figures[key] = {"before": before.total(), "after": after.total()}
        if key == "train":
            _require_examples(job, new, after)
            used = sum(1 for token in tokens if after[new.convert_tokens_to_ids(token)])
            figures["used"] = used
            shown = ", ".join(repr(new.decode([new.convert_tokens_to_ids(token)])) for token in tokens[:SHOWN])
            say(f"extend: {len(tokens)} new tokens, such as {shown}; {len(tokens) - used} are only parts of others")
        saved = 1 - after.total() / before.total()
        say(f"extend: {key} is {after.total():,} tokens, and was {before.total():,}: {saved:.1%} fewer")
    return figures


def _require_examples(job: Job, new: Any, seen: "Counter[int]") -> None:
    unseen = [token for token in job.options.listed if not seen[new.convert_tokens_to_ids(token)]]
    if unseen:
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        raise DataError(f"extend.listed: {unseen[0]!r}{more} is in no training row, so nothing would teach the model what it means")


def _fill(model: Any, parts: dict[int, list[int]]) -> None:
    """Each new row of the embeddings, and of an output layer of its own, becomes the mean of the rows of its parts."""
    import torch

    if (most := max(parts) + 1) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(most, mean_resizing=False)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    tensors = {id(tensor): tensor for layer in layers if layer is not None for tensor in layer.parameters(recurse=False)}
    with torch.no_grad():
        for tensor in tensors.values():
            for number, pieces in parts.items():
                tensor[number] = tensor[pieces].mean(0)


def gate(options: Options, metrics: dict[str, Any], before: dict[str, Any]) -> None:  # noqa: ARG001 - a stage's common signature
    """Raises GateError where nothing was saved, or where text without the new tokens is answered in another way than before."""
    train = metrics["extend"]["train"]
    if not train["after"] < train["before"]:
        # In byte-level BPE the space before a word belongs to it: " vm" is one token, and " " and a listed "vm" are two.
        raise GateError(
            f"the training text is {train['after']:,} tokens with the new ones, and was {train['before']:,} without; "
            "a listed word is cut from the space before it, so list what was cut into three or more"
        )
    agreement = metrics.get("probe", {}).get("agreement", 1.0)
    if agreement < 1:
        raise GateError(f"the model answers {agreement:.1%} of its probe as it did; text without new tokens must not change")

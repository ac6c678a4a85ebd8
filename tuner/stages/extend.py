"""Give a model's tokenizer the words of a domain, and the model an embedding for each: the mean of what it was cut into before.

On text without the new tokens the model ranks its answers as it did: the mean of some logits is never above the largest of them.
"""

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from tuner import kinds
from tuner.bundle import Manifest
from tuner.data import reading
from tuner.data.example import repeated
from tuner.data.rows import BadRows
from tuner.data.text import TEXT_KEYS, text_of, texts
from tuner.errors import DataError, GateError, SourceError
from tuner.kinds import Options as BaseOptions
from tuner.progress import say
from tuner.recipe import Recipe
from tuner.stages import Job, kept_of_head

if TYPE_CHECKING:
    from tuner.plan import Plan, Step

TAKES = frozenset({"model"})
RESULT = "extended"
VERSION = 2
KEYS = TEXT_KEYS
ADDS_TOKENS = True
# Named where the run says what it found.
SHOWN = 8


class Options(BaseOptions):
    """Keys of `- extend:`."""

    learned: int = Field(0, ge=0)
    """Tokens to learn from the training text, say 1000: those that save most. For tokenizers of BPE and WordPiece."""
    min_frequency: int = Field(20, ge=1)
    """What occurs less often is not learned: an embedding needs examples."""
    listed: list[str] = Field(default_factory=list)
    """Tokens that you name, such as "<|tool|>" or "HbA1c": found before anything else is cut, words only as whole words."""

    @model_validator(mode="after")
    def _something(self) -> "Options":
        if not self.learned and not self.listed:
            raise ValueError("there is nothing to add: say how many tokens are to be `learned`, or list some under `listed`")
        if (twice := repeated(self.listed)) is not None:
            raise ValueError(f"listed: {twice!r} stands there twice")
        if any(each != each.strip() or not each for each in self.listed):
            raise ValueError("listed: a token is empty, or begins or ends with a space, which would then be a part of it")
        return self


def gives(options: Options) -> str:  # noqa: ARG001 - a stage's common signature
    """A model."""
    return "model"


def check(plan: "Plan", step: "Step") -> None:
    """Raises RecipeError where nothing would train the new tokens, or the method or the tokenizer cannot have them."""
    trains = next((later for later in plan.steps[step.index + 1 :] if later.trains), None)
    if trains is None:
        message = (
            "a new token stays the mean of its parts, which says next to nothing, until it is trained: put a tune stage after it"
        )
        raise plan.recipe.error(message, "stages", step.index, "extend")
    beside = kinds.load("methods", trains.options.method.kind).GIVES == "adapter"
    if beside and plan.facts.output_bias and plan.facts.head == kinds.load("tasks", trains.options.task.kind).HEAD:
        message = "the model's output layer has a bias, and beside an adapter no new tokens of it are trained; use full"
        raise plan.recipe.error(message, "stages", trains.index, trains.name, "method")
    if step.index == 0 and plan.source is not None:
        from pathlib import Path
        from tempfile import TemporaryDirectory

        from tuner import vocabulary
        from tuner.tokens import tokenizer_of

        try:
            old = tokenizer_of(plan.source)
            _require(old, step.options)
            with TemporaryDirectory() as folder:
                vocabulary.extend(old, vocabulary.Entries(), step.options.listed, Path(folder))
        except SourceError as error:
            raise plan.recipe.error(str(error), "stages", step.index, "extend") from None


def check_row(record: dict[str, Any], options: Options, *, chat_template: bool) -> None:  # noqa: ARG001 - a row's common signature
    """Raises DataError for a record without text."""
    text_of(record)


def reads(recipe: Recipe, options: Options) -> list[Any]:  # noqa: ARG001 - a stage's common signature
    """The held-out text, whose tokens are counted."""
    return [reading.state(recipe, "heldout")] if recipe.data.holds_out else []


def run(job: Job) -> Manifest:
    """Learn tokens, write the tokenizer, make room in the embeddings and fill it.

    Raises RecipeError for a tokenizer that cannot have the tokens, DataError where there is nothing to learn.
    """
    from tuner.checkpoint import load_model, load_tokenizer, save_model
    from tuner.source import describe_model

    assert job.parent is not None
    old = load_tokenizer(job.parent.path)
    bad = BadRows(job.recipe.data.on_bad_row)
    try:
        new, pieces = _tokenizer(job, old, bad)
    except SourceError as error:
        raise job.recipe.error(str(error), "stages", job.index, "extend") from None
    figures = _figures(job, old, new, list(pieces))
    for line in told(figures):
        say(line)
    model = load_model(job.parent)
    _fill(model, {new.convert_tokens_to_ids(token): parts for token, parts in pieces.items()})
    save_model(model, job.folder, like=job.parent.path)
    first, _ = job.parent.manifest.serving.get("new_tokens", (max(old.get_vocab().values()) + 1, 0))
    return describe_model(
        job.folder,
        stage="extend",
        fingerprint=job.fingerprint,
        recipe=job.told(),
        data={**reading.identity(job.recipe, "train"), **bad.told()},
        metrics={"extend": figures},
        # What an extend stage before this one added has not been trained either.
        serving={**kept_of_head(job), "new_tokens": [first, max(new.get_vocab().values()) + 1]},
    )


def _tokenizer(job: Job, old: Any, bad: BadRows) -> tuple[Any, dict[str, list[int]]]:
    """The new tokenizer, in the job's folder, and each new token with the old ones that it stands for. Raises SourceError."""
    from tuner import vocabulary

    options: Any = job.options
    parts = _require(old, options)
    # What is listed is cut out first, so that nothing is learned of it.
    new, learned = vocabulary.extend(old, vocabulary.Entries(), options.listed, job.folder), vocabulary.Entries()
    if options.learned:
        learned = vocabulary.learn(new, vocabulary.words(new, texts(job.recipe, bad)), options.learned, options.min_frequency)
        if not learned.pieces:
            raise DataError(
                f"{reading.named(job.recipe, 'train')}: nothing to learn: no two tokens follow each other within a word "
                f"{options.min_frequency} times"
            )
        new = vocabulary.extend(old, learned, options.listed, job.folder)
    return new, {**{token: old.convert_tokens_to_ids(own) for token, own in learned.pieces.items()}, **parts}


def _require(old: Any, options: Options) -> dict[str, list[int]]:
    """What each listed token is cut into. Raises SourceError for a tokenizer that cannot have what the options ask for."""
    from tuner import vocabulary

    if not old.is_fast:
        raise SourceError("the model has no tokenizer.json, and no other tokenizer can be extended")
    if options.learned:
        vocabulary.require_learnable(old)
    if known := [token for token in options.listed if token in old.get_vocab()]:
        raise SourceError(f"listed: {known[0]!r} is a token of this model already; leave it out")
    parts = {token: list(old(token, add_special_tokens=False)["input_ids"]) for token in options.listed}
    if nothing := [token for token, own in parts.items() if not own]:
        raise SourceError(f"listed: {nothing[0]!r} is nothing to this tokenizer, which leaves such characters out")
    return parts


def _figures(job: Job, old: Any, new: Any, tokens: list[str]) -> dict[str, Any]:
    """How many tokens the rows were and are, and which of the new ones occur."""
    from tuner import vocabulary

    numbers = {token: new.convert_tokens_to_ids(token) for token in tokens}
    figures: dict[str, Any] = {"tokens": len(tokens), "asked": job.options.learned + len(job.options.listed)}
    figures["first"] = [new.decode([numbers[token]]) for token in tokens[:SHOWN]]
    for key in ("train", "heldout") if job.recipe.data.holds_out else ("train",):
        before, after = (
            vocabulary.count(tokenizer, texts(job.recipe, BadRows(job.recipe.data.on_bad_row), key)) for tokenizer in (old, new)
        )
        figures[key] = {"before": before.total(), "after": after.total()}
        if key == "train":
            figures["unused"] = sum(1 for token in tokens if not after[numbers[token]])
            figures["unseen"] = [token for token in job.options.listed if not after[numbers[token]]]
    return figures


def told(figures: dict[str, Any]) -> list[str]:
    """What was added, and what it saves, for the run and its report."""
    lines = [f"extend: {figures['tokens']} new tokens, such as {', '.join(map(repr, figures['first']))}"]
    if figures.get("asked", figures["tokens"]) > figures["tokens"]:
        lines[0] += f"; {figures['asked']} were asked for, and the text has no more that occur often enough"
    if parts := figures["unused"] - len(figures["unseen"]):
        lines[0] += f"; {parts} are only parts of others"
    if figures["unseen"]:
        names = ", ".join(map(repr, figures["unseen"]))
        lines.append(f"extend: in no training text, so trained only where a chat template writes them: {names}")
    for key in ("train", "heldout"):
        if key in figures:
            before, after = figures[key]["before"], figures[key]["after"]
            lines.append(f"extend: {key} is {after:,} tokens, and was {before:,}: {1 - after / before:.1%} fewer")
    return lines


def _fill(model: Any, parts: dict[int, list[int]]) -> None:
    """Each new row of the embeddings, and of an output layer of its own, becomes the mean of the rows of its parts.

    Rows for numbers in between, of tokens that the model never had embeddings for, become the mean of all.
    """
    import torch

    room, most = model.get_input_embeddings().weight.shape[0], max(parts) + 1
    if most > room:
        model.resize_token_embeddings(most, mean_resizing=False)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    tensors = {id(tensor): tensor for layer in layers if layer is not None for tensor in layer.parameters(recurse=False)}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor[room:most] = tensor[:room].mean(0)
            for number, pieces in parts.items():
                # The mean of equal rows is not always that row, in floats.
                tensor[number] = tensor[pieces].mean(0) if len(set(pieces)) > 1 else tensor[pieces[0]]


def gate(options: Options, metrics: dict[str, Any], before: dict[str, Any]) -> None:  # noqa: ARG001 - a stage's common signature
    """Raises GateError where the text got longer, or where text without the new tokens is answered in another way than before."""
    train = metrics["extend"]["train"]
    if train["after"] > train["before"]:
        # In byte-level BPE the space before a word belongs to it: " vm" is one token, and " " and a listed "vm" are two.
        raise GateError(
            f"the training text is {train['after']:,} tokens with the new ones, and was {train['before']:,} without; "
            "a listed word is cut from the space before it, so list what was cut into three or more"
        )
    agreement = metrics.get("probe", {}).get("agreement", 1.0)
    if agreement < 1:
        raise GateError(f"the model answers {agreement:.1%} of its probe as it did; text without new tokens must not change")

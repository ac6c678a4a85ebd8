"""Token classification: a label for each word, such as a part of speech or, in BIO form, the entity that it belongs to."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from tuner.data.example import IGNORE, Tagged
from tuner.data.rows import Row, Skipped, usable
from tuner.errors import DataError, nearest
from tuner.kinds import Options as BaseOptions
from tuner.recipe import Evaluate

HEAD = "token"
KEYS = frozenset({"words", "tags"})


class Options(BaseOptions):
    """Keys of `task: {kind: tokens}`."""

    kind: Literal["tokens"] = "tokens"
    labels: list[str] = Field(min_length=2)
    """The tags, in the order of the model's scores: [NOUN, VERB, ...] or [O, B-PER, I-PER, ...]."""
    max_tokens: int = Field(256, gt=1)
    """Longest sentence in tokens. A longer row is a bad row unless `cut` says otherwise."""
    cut: bool = False
    """Cut longer sentences off at max_tokens; how many is in the report. Words behind the cut get no tag."""

    @model_validator(mode="after")
    def _bio_is_whole(self) -> "Options":
        for label in self.labels:
            if label.startswith("I-") and "B-" + label[2:] not in self.labels:
                raise ValueError(f"labels: {label} continues an entity that no B-{label[2:]} begins")
        return self

    @property
    def is_bio(self) -> bool:
        """The tags say where entities begin and go on."""
        return any(label.startswith("B-") for label in self.labels)


def check_row(record: dict[str, Any], options: Options, *, chat_template: bool = True) -> None:  # noqa: ARG001 - a task's common signature
    """Raises DataError unless the record is {"words": [...], "tags": [...]}, one tag for each word."""
    for key in ("words", "tags"):
        if not isinstance(record.get(key), list) or not all(isinstance(each, str) and each for each in record[key]):
            raise DataError(f'"{key}" is {record.get(key)!r:.60}, expected a list of words')
    if len(record["words"]) != len(record["tags"]) or not record["words"]:
        raise DataError(
            f"{len(record['words'])} words and {len(record['tags'])} tags, expected one tag for each of one or more words"
        )


def examples(
    rows: Iterator[Row], tokenizer: Any, options: Options, on_bad_row: str, skipped: Skipped
) -> Iterator[tuple[Row, Tagged]]:
    """Each sentence with the number of the tag at the first token of each word; bad rows stop the run, or are counted."""

    def tagged(row: Row) -> Tagged:
        check_row(row.record, options)
        for tag in row.record["tags"]:
            if tag not in options.labels:
                raise DataError(f'"tags": {tag!r:.60} is none of the recipe\'s labels{nearest(tag, options.labels)}')
        ids, first = encode(row.record["words"], tokenizer, options)
        labels = [IGNORE] * len(ids)
        for word, position in first.items():
            labels[position] = options.labels.index(row.record["tags"][word])
        return Tagged(ids, labels, len(first) < len(row.record["words"]))

    return usable(rows, tagged, on_bad_row, skipped)


def encode(words: list[str], tokenizer: Any, options: Options) -> tuple[list[int], dict[int, int]]:
    """(ids, number of each word to the position of its first token). A tag stands there alone, as is usual since BERT's paper."""
    encoded = tokenizer(words, is_split_into_words=True)
    ids, word_ids = list(encoded["input_ids"]), encoded.word_ids()
    if len(ids) > options.max_tokens:
        if not options.cut:
            raise DataError(
                f"{len(ids)} tokens, expected at most max_tokens: {options.max_tokens}; `cut: true` cuts longer sentences off"
            )
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=options.max_tokens)
        ids, word_ids = list(encoded["input_ids"]), encoded.word_ids()
    first: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            first.setdefault(word, position)
    if not options.cut and len(first) < len(words):
        lost = next(word for word in range(len(words)) if word not in first)
        raise DataError(f"words[{lost}]: the tokenizer makes no token of {words[lost]!r:.40}")
    return ids, first


def head_config(options: Options) -> dict[str, Any]:
    """What the model's configuration has to say about its head."""
    return {
        "num_labels": len(options.labels),
        "id2label": dict(enumerate(options.labels)),
        "label2id": {name: index for index, name in enumerate(options.labels)},
    }


def question(record: dict[str, Any], tokenizer: Any, options: Options) -> dict[str, Any]:
    """`ids` of the sentence and the `positions` of its words' first tokens."""
    ids, first = encode(record["words"], tokenizer, options)
    return {"ids": ids, "positions": sorted(first.values())}


def objective(model: Any, tokenizer: Any, options: Options) -> Any:  # noqa: ARG001 - a task's common signature
    """Cross entropy of the tags."""
    from tuner.heads.token import TagLoss

    return TagLoss(model, tokenizer.pad_token_id)


def scores(
    model: Any,
    tokenizer: Any,  # noqa: ARG001 - common signature
    rows: list[tuple[Row, Tagged]],
    options: Options,
    evaluate: Evaluate,  # noqa: ARG001 - common signature
) -> dict[str, float]:
    """Of all held-out words the accuracy, and of BIO tags the entity F1."""
    from tuner.heads import token

    found = token.scores(model, [example for _, example in rows], str(model.device))
    guesses = [[options.labels[row.index(max(row))] for row in sentence] for sentence in found]
    truth = [[options.labels[label] for label in example.labels if label != IGNORE] for _, example in rows]
    pairs = [pair for each in zip(truth, guesses, strict=True) for pair in zip(*each, strict=True)]
    accuracy = {"rows": len(rows), "accuracy": round(sum(one == other for one, other in pairs) / len(pairs), 4)}
    return {**accuracy, "entity F1": entity_f1(truth, guesses)} if options.is_bio else accuracy


def entity_f1(truth: list[list[str]], guesses: list[list[str]]) -> float:
    """Micro F1 over whole entities: type, first and last word must all be right (as in CoNLL-2003)."""
    wanted = {(row, *entity) for row, tags in enumerate(truth) for entity in entities(tags)}
    found = {(row, *entity) for row, tags in enumerate(guesses) for entity in entities(tags)}
    return round(2 * len(wanted & found) / (len(wanted) + len(found)), 4) if wanted or found else 1.0


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """(type, first word, last word) of each entity. An I- without its B- begins one, as CoNLL's own script has it."""
    found: list[tuple[str, int, int]] = []
    kind, start = "", 0
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        goes_on = prefix == "I" and name == kind
        if kind and not goes_on:
            found.append((kind, start, index - 1))
            kind = ""
        if prefix in ("B", "I") and not goes_on:
            kind, start = name, index
    return found

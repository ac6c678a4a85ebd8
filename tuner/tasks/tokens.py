"""Token classification: a label for each word, such as a part of speech or, in BIO form, the entity that it belongs to."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from tuner.data.example import IGNORE, Example, Tagged, repeated
from tuner.data.rows import BadRows, Row, usable
from tuner.data.text import asked
from tuner.errors import DataError, nearest
from tuner.kinds import Options as BaseOptions
from tuner.recipe import Evaluate

if TYPE_CHECKING:
    from tuner.families import Family
    from tuner.source import Facts

HEAD = "token"
TOO_LONG = "truncate"
KEYS = frozenset({"words", "tags"})
SHAPES: dict[str, dict[str, Any]] = {"words and tags": {}, "words and tags (tokens, ner_tags)": {}}


class Options(BaseOptions):
    """Keys of `task: {kind: tokens}`."""

    kind: Literal["tokens"] = "tokens"
    labels: list[str] = Field(min_length=2)
    """The tags, in the order of the model's scores: [NOUN, VERB, ...] or [O, B-PER, I-PER, ...]."""
    max_tokens: int = Field(256, gt=1)
    """Longest sentence in tokens. A longer row is a bad row: see `data.on_bad_row`. Words behind a cut get no tag."""
    at: Literal["first", "last"] = "first"
    """Which token of a word carries its tag. `last` is for models that read from left to right, such as GPT: at a word's first
    token they have not seen the rest of it."""

    @model_validator(mode="after")
    def _labels_fit(self) -> "Options":
        if twice := repeated(self.labels):
            raise ValueError(f"labels: {twice} stands there twice")
        other = [label for label in self.labels if label != "O" and not label.startswith(("B-", "I-"))]
        if self.is_bio and other:
            raise ValueError(
                f"labels: {other[0]} is neither O nor begins with B- or I-, as the others do; only BIO tags are scored as entities"
            )
        for label in self.labels:
            if label.startswith("I-") and "B-" + label[2:] not in self.labels:
                raise ValueError(f"labels: {label} continues an entity that no B-{label[2:]} begins")
        return self

    @property
    def is_bio(self) -> bool:
        """The tags say where entities begin and go on."""
        return any(label.startswith("B-") for label in self.labels)


def proposed(shape: str, labels: list[str], family: "Family", known: "Facts") -> dict[str, Any]:  # noqa: ARG001 - common signature
    """The labels that were found, and where the model carries them."""
    return {"labels": labels, **({"at": "last"} if "causal" in family.heads else {})}


def check_row(record: dict[str, Any], options: Options, *, chat_template: bool = True) -> None:  # noqa: ARG001 - a task's common signature
    """Raises DataError unless the record is {"words": [...], "tags": [...]}, one tag for each word."""
    for key in ("words", "tags"):
        if not isinstance(record.get(key), list) or not all(isinstance(each, str) and each for each in record[key]):
            raise DataError(f'"{key}" is {record.get(key)!r:.60}, expected a list of words')
    if len(record["words"]) != len(record["tags"]) or not record["words"]:
        raise DataError(
            f"{len(record['words'])} words and {len(record['tags'])} tags, expected one tag for each of one or more words"
        )
    before = "O"
    for at, tag in enumerate(record["tags"]):
        if tag not in options.labels:
            raise DataError(f"tags[{at}]: {tag!r:.60} is none of the recipe's labels{nearest(tag, options.labels)}", "label")
        if options.is_bio and tag.startswith("I-") and before[2:] != tag[2:]:
            raise DataError(
                f"tags[{at}]: {tag} goes on with an entity that did not begin; found {before} before it, expected B-{tag[2:]} here"
            )
        before = tag


def examples(rows: Iterator[Row], tokenizer: Any, options: Options, bad: BadRows) -> Iterator[tuple[Row, Tagged]]:
    """Each sentence with the number of each word's tag at one of its tokens; bad rows stop the run, or are counted."""

    def tagged(row: Row) -> Tagged:
        check_row(row.record, options)
        ids, places = encode(row.record["words"], tokenizer, options, cut=bad.truncates)
        labels = [IGNORE] * len(ids)
        for word, position in places.items():
            labels[position] = options.labels.index(row.record["tags"][word])
        return Tagged(ids, labels, len(places) < len(row.record["words"]))

    return usable(rows, tagged, bad)


def encode(words: list[str], tokenizer: Any, options: Options, *, cut: bool) -> tuple[list[int], dict[int, int]]:
    """(ids of the words with spaces between them, as a client would send them; number of each word to the position of its tag).

    A tag stands at one token of its word alone, as is usual since BERT's paper. Raises DataError for a sentence that is too long,
    or a word of which no token is left.
    """
    text = " ".join(words)
    encoded = tokenizer(text, return_offsets_mapping=True)
    long = len(encoded["input_ids"]) > options.max_tokens
    if long:
        if not cut:
            raise DataError(f"{len(encoded['input_ids'])} tokens, expected at most max_tokens: {options.max_tokens}", "too_long")
        encoded = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=options.max_tokens)
    # The word that each character belongs to; spaces between words belong to none.
    word_of = [number for index, word in enumerate(words) for number in [*[index] * len(word), None]]
    places: dict[int, int] = {}
    for position, (left, right) in enumerate(encoded["offset_mapping"]):
        # A token may begin with the space before its word.
        word = next((number for number in word_of[left:right] if number is not None), None)
        if word is not None and (options.at == "last" or word not in places):
            places[word] = position
    ends = [right for _, right in encoded["offset_mapping"]]
    if long and options.at == "last" and places and max(ends) < len(" ".join(words[: max(places) + 1])):
        del places[max(places)]  # the cut went through it
    if not places or (not long and len(places) < len(words)):
        lost = next(word for word in range(len(words)) if word not in places)
        raise DataError(f"words[{lost}]: the tokenizer leaves no token of {words[lost]!r:.40}")
    return list(encoded["input_ids"]), places


def remarks(options: Options, family: "Family") -> list[str]:
    """What is probably not meant."""
    if options.at == "first" and "causal" in family.heads:
        return ["a tag is learned at its word's first token, where this model has not read the rest of it; write `at: last`"]
    return []


def head_config(options: Options) -> dict[str, Any]:
    """What the model's configuration has to say about its head."""
    return {
        "num_labels": len(options.labels),
        "id2label": dict(enumerate(options.labels)),
        "label2id": {name: index for index, name in enumerate(options.labels)},
    }


def question(record: dict[str, Any], tokenizer: Any, options: Options) -> dict[str, Any]:
    """`ids` of the sentence, its `text`, and the `positions` of its words' tags."""
    ids, places = encode(record["words"], tokenizer, options, cut=True)
    return {**asked(" ".join(record["words"]), ids, tokenizer), "positions": sorted(places.values())}


def objective(model: Any, tokenizer: Any, options: Options) -> Any:  # noqa: ARG001 - a task's common signature
    """Cross entropy of the tags."""
    from tuner.heads.token import TagLoss

    return TagLoss(model, tokenizer.pad_token_id)


def scored(options: Options, evaluate: Evaluate) -> list[str]:  # noqa: ARG001 - common signature
    """Names of the scores: of BIO tags whole entities count, too."""
    return ["accuracy", "entity F1"] if options.is_bio else ["accuracy"]


def unseen(examples: list[Tagged], options: Options) -> list[str]:
    """The tags that no word of the training rows has."""
    seen = {label for each in examples for label in each.labels}
    return [f'no training row has the tag "{name}"' for at, name in enumerate(options.labels) if at not in seen]


def shown(example: Tagged, options: Options) -> list[tuple[str, Example]]:
    """The tags in order, and the sentence, where the tokens that carry them are what is learned."""
    return [(" ".join(options.labels[label] for label in example.labels if label != IGNORE), Example(example.ids, example.labels))]


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

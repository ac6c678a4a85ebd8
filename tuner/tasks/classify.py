"""Classification of whole texts: one class, several at once, or a number (regression)."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from tuner.data.example import IGNORE, Example, Labelled, repeated
from tuner.data.rows import BadRows, Row, usable
from tuner.data.text import asked, encode, require_text
from tuner.errors import DataError, nearest
from tuner.kinds import Options as BaseOptions
from tuner.recipe import Evaluate

if TYPE_CHECKING:
    from tuner.families import Family
    from tuner.source import Facts

HEAD = "sequence"
PASSES = True
# The beginning of a text says what it is.
TOO_LONG = "truncate"
KEYS = frozenset({"text", "label", "labels", "score"})
SHAPES: dict[str, dict[str, Any]] = {
    "text with a label": {},
    "text with labels": {"form": "multi"},
    "text with a score": {"form": "number"},
}
# transformers' words for what a model's scores mean.
PROBLEMS = {"single": "single_label_classification", "multi": "multi_label_classification", "number": "regression"}


class Options(BaseOptions):
    """Keys of `task: {kind: classify}`."""

    kind: Literal["classify"] = "classify"
    labels: list[str] = Field(default_factory=list)
    """The classes, in the order of the model's scores."""
    form: Literal["single", "multi", "number"] = "single"
    """`single`: {"text", "label"}; `multi`: {"text", "labels": [...]}, any number of them; `number`: {"text", "score"}."""
    class_weights: list[Annotated[float, Field(gt=0)]] | None = None
    """How much a row of each class counts in the loss; all alike by default. For `single`."""
    max_tokens: int = Field(256, gt=1)
    """Longest text in tokens. A longer row is a bad row: see `data.on_bad_row`."""

    @model_validator(mode="after")
    def _labels_fit(self) -> "Options":
        if self.form == "number" and self.labels:
            raise ValueError("labels: a number has none; leave them out")
        if self.form != "number" and len(set(self.labels)) < (2 if self.form == "single" else 1):
            raise ValueError('the classes are missing; write them down, such as "labels: [negative, positive]"')
        if twice := repeated(self.labels):
            raise ValueError(f"labels: {twice} stands there twice")
        if self.class_weights and (self.form != "single" or len(self.class_weights) != len(self.labels)):
            raise ValueError(f"class_weights: one for each of {len(self.labels)} classes is meant, for form single")
        return self


def proposed(shape: str, labels: list[str], family: "Family", known: "Facts") -> dict[str, Any]:  # noqa: ARG001 - common signature
    """The options that rows of a shape want, with the labels that were found."""
    options = SHAPES[shape]
    return options if options.get("form") == "number" else {**options, "labels": labels}


def check_row(record: dict[str, Any], options: Options, *, chat_template: bool = True) -> None:  # noqa: ARG001 - a task's common signature
    """Raises DataError unless the record has a text, and the label or number that the options ask for."""
    require_text(record, ', and "label", "labels" or "score"')
    target(record, options)


def target(record: dict[str, Any], options: Options) -> list[float]:
    """What is to be learned: [number of the class], [0 or 1 for each class], or [the number]. Raises DataError."""
    key = {"single": "label", "multi": "labels", "number": "score"}[options.form]
    if key not in record:
        found = ", ".join(f'"{name}"' for name in record)
        raise DataError(f'the key "{key}" is missing beside {found}', "label")
    value = record[key]
    if options.form == "number":
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f'"score" is {value!r:.60}, expected a number', "label")
        return [float(value)]
    given = value if options.form == "multi" else [value]
    if not isinstance(given, list):
        raise DataError(f'"labels" is {value!r:.60}, expected a list', "label")
    for each in given:
        if each not in options.labels:
            raise DataError(f'"{key}": {each!r:.60} is none of the recipe\'s labels{nearest(str(each), options.labels)}', "label")
    return [float(options.labels.index(value))] if options.form == "single" else [float(each in given) for each in options.labels]


def examples(rows: Iterator[Row], tokenizer: Any, options: Options, bad: BadRows) -> Iterator[tuple[Row, Labelled]]:
    """Each text with what it is; bad rows stop the run with a DataError, or are counted in `bad`."""

    def labelled(row: Row) -> Labelled:
        check_row(row.record, options)
        wanted = target(row.record, options)
        ids, cut = encode(row.record["text"], tokenizer, max_tokens=options.max_tokens, cut=bad.truncates)
        weight = options.class_weights[int(wanted[0])] if options.class_weights else 1.0
        return Labelled(ids, wanted, weight, cut)

    return usable(rows, labelled, bad)


def head_config(options: Options) -> dict[str, Any]:
    """What the model's configuration has to say about its head."""
    names = options.labels or ["score"]
    return {
        "problem_type": PROBLEMS[options.form],
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def unnamed(options: Options) -> bool:
    """A number is a number, whatever it is called."""
    return options.form == "number"


def question(record: dict[str, Any], tokenizer: Any, options: Options) -> dict[str, Any]:
    """`ids` of the text, and the text."""
    ids, _ = encode(record["text"], tokenizer, max_tokens=options.max_tokens, cut=True)
    return {**asked(record["text"], ids, tokenizer), "problem": PROBLEMS[options.form]}


def objective(model: Any, tokenizer: Any, options: Options) -> Any:
    """Cross entropy, binary cross entropies or squared error, by form."""
    from tuner.heads.sequence import LabelLoss

    return LabelLoss(model, tokenizer.pad_token_id, PROBLEMS[options.form])


def scored(options: Options, evaluate: Evaluate) -> list[str]:  # noqa: ARG001 - common signature
    """Names of the scores, by form."""
    return {"single": ["accuracy", "macro F1", "MCC"], "multi": ["micro F1"], "number": ["Spearman"]}[options.form]


def unseen(examples: list[Labelled], options: Options) -> list[str]:
    """The classes that no training row has."""
    multi = options.form == "multi"
    seen = (
        {at for each in examples for at, given in enumerate(each.target) if given}
        if multi
        else {int(each.target[0]) for each in examples}
    )
    return [f'no training row has the label "{name}"' for at, name in enumerate(options.labels) if at not in seen]


def shown(example: Labelled, options: Options) -> list[tuple[str, Example]]:
    """The text, and what it is."""
    if options.form == "number":
        said = f"score {example.target[0]:g}"
    elif options.form == "multi":
        said = ", ".join(name for name, given in zip(options.labels, example.target, strict=True) if given) or "no label"
    else:
        said = options.labels[int(example.target[0])]
    return [(said, Example(example.ids, [IGNORE] * len(example.ids)))]


def scores(
    model: Any,
    tokenizer: Any,  # noqa: ARG001 - common signature
    rows: list[tuple[Row, Labelled]],
    options: Options,
    evaluate: Evaluate,  # noqa: ARG001 - common signature
) -> dict[str, float]:
    """Of all held-out rows: accuracy, macro F1 and Matthews correlation; for several classes micro F1; for a number Spearman's."""
    import numpy as np
    from scipy.stats import spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    from tuner.heads import sequence

    found = sequence.scores(model, [example.ids for _, example in rows], PROBLEMS[options.form], str(model.device))
    wanted = [example.target for _, example in rows]
    if options.form == "number":
        # Of one number repeated there is no rank.
        correlation = spearmanr([row[0] for row in found], [row[0] for row in wanted]).statistic
        return _rounded(rows, {"Spearman": 0.0 if math.isnan(correlation) else correlation})
    if options.form == "multi":
        chosen = [[value > sequence.LOG_HALF for value in row] for row in found]
        return _rounded(rows, {"micro F1": f1_score(np.ravel(wanted) > 0, np.ravel(chosen), zero_division=1.0)})
    guesses, truth = [row.index(max(row)) for row in found], [int(row[0]) for row in wanted]
    return _rounded(
        rows,
        {
            "accuracy": accuracy_score(truth, guesses),
            "macro F1": f1_score(truth, guesses, average="macro", zero_division=1.0),
            "MCC": matthews_corrcoef(truth, guesses),
        },
    )


def _rounded(rows: list[Any], values: dict[str, float]) -> dict[str, float]:
    return {"rows": len(rows), **{name: round(float(value), 4) for name, value in values.items()}}

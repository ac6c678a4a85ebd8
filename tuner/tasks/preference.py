"""Preference: learn which of two answers is better (dpo, orpo, simpo), or from answers judged good or bad (kto).

A row is {"prompt" or "messages", "chosen", "rejected"}; for kto {"prompt" or "messages", "completion", "label": true or false}
does, too, and a pair counts as one good and one bad answer. `messages` end with the user's turn.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from tuner import kinds
from tuner.data.example import IGNORE, Example
from tuner.data.rows import BadRows, Row, lacking, usable
from tuner.errors import DataError
from tuner.kinds import Options as BaseOptions
from tuner.recipe import Evaluate
from tuner.tasks import sft

HEAD = "causal"
PASSES = True
KEYS = (sft.SPOKEN - {"messages.weight"}) | {"prompt", "chosen", "rejected", "completion", "label"}
SHAPES = {"preference pairs": {"loss": "dpo"}, "judged answers": {"loss": "kto"}}
# Nats that float sums in another order can make; a model that was not trained yet prefers neither answer.
TIE = 1.0e-3
BETA = {"dpo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}


class Options(BaseOptions):
    """Keys of `task: {kind: preference}`."""

    kind: Literal["preference"] = "preference"
    loss: Literal["dpo", "kto", "orpo", "simpo"] = "dpo"
    """`dpo` and `kto` compare with the model before training; `orpo` and `simpo` need nothing to compare with."""
    beta: float = Field(0.1, gt=0)
    """How strongly a difference counts (`orpo`: the odds ratio's weight). By default 0.1, for `simpo` 2.0."""
    margin: float = Field(1.0, ge=0)
    """By how much the chosen answer is to win, for `simpo` (its gamma)."""
    good_weight: float = Field(1.0, gt=0)
    """How much a good answer counts, for `kto`."""
    bad_weight: float = Field(1.0, gt=0)
    """How much a bad answer counts, for `kto`. Where one kind is rarer, weigh it more: the sums should differ by 1.33 at most."""
    max_tokens: int = Field(512, gt=1)
    """Longest prompt and answer in tokens. A longer row is a bad row."""

    @model_validator(mode="after")
    def _read(self) -> "Options":
        for key, loss in (("margin", "simpo"), ("good_weight", "kto"), ("bad_weight", "kto")):
            if key in self.model_fields_set and self.loss != loss:
                raise ValueError(f"{key} is for loss: {loss}, and {self.loss} does not read it")
        return self

    @model_validator(mode="before")
    @classmethod
    def _beta_by_loss(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("loss") in BETA:
            return {"beta": BETA[values["loss"]], **values}
        return values


def asks_first(options: Options) -> bool:
    """Its loss asks the model before the forward pass of a step: how far it has moved."""
    return options.loss == "kto"


def check_row(record: dict[str, Any], options: Options, *, chat_template: bool = True) -> None:
    """Raises DataError unless the record has a prompt and the answers that the loss learns from."""
    if "messages" in record:
        turns = record["messages"]
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
            raise DataError('the last message is from "assistant", expected "user": the answers stand beside "messages"')
    elif not isinstance(record.get("prompt"), str):
        raise DataError(f'found the keys {sft.keys(record)}, expected "prompt" with text in it, or "messages"')
    if options.loss == "kto" and "completion" in record:
        if not isinstance(record.get("label"), bool):
            said = f'"label" is {record.get("label")!r:.60}, expected true for a good answer or false for a bad one'
            raise DataError(said, "label")
        answers = ["completion"]
    else:
        answers = ["chosen", "rejected"]
    for key in answers:
        if not isinstance(record.get(key), str) or not record[key].strip():
            unpaired = ', or "completion" and "label"' if options.loss == "kto" else ""
            why = lacking(record.get(key), there=key in record)
            raise DataError(f'"{key}" is {record.get(key)!r:.60}, expected text{unpaired}', why)
        sft.check_row(_answered(record, key), sft.Options(), chat_template=chat_template)
    if len(answers) == 2 and record["chosen"] == record["rejected"]:
        raise DataError('"chosen" and "rejected" are the same, so there is nothing to prefer')


def examples(rows: Iterator[Row], tokenizer: Any, options: Options, bad: BadRows) -> Iterator[tuple[Row, Any]]:
    """Each usable row as a pair, or for kto as one or two judged answers."""
    from tuner.preference import Judged, Pair

    def made(row: Row) -> list[Any]:
        check_row(row.record, options, chat_template=bool(tokenizer.chat_template))
        if options.loss == "kto" and "completion" in row.record:
            return [Judged(_encoded(row.record, "completion", tokenizer, options, bad), row.record["label"])]
        chosen, rejected = (_encoded(row.record, key, tokenizer, options, bad) for key in ("chosen", "rejected"))
        return [Judged(chosen, True), Judged(rejected, False)] if options.loss == "kto" else [Pair(chosen, rejected)]

    for row, found in usable(rows, made, bad):
        yield from ((row, each) for each in found)


def question(record: dict[str, Any], tokenizer: Any, options: Options) -> dict[str, Any]:  # noqa: ARG001 - a task's common signature
    """`ids` of the prompt, and the `messages` or the `text` that they were made from."""
    return sft.question(_answered(record, _first_answer(record)), tokenizer, sft.Options())


def reference(record: dict[str, Any]) -> str:
    """The chosen answer's text."""
    return str(record[_first_answer(record)])


def objective(model: Any, tokenizer: Any, options: Options) -> Any:
    """The loss that the options name."""
    from tuner.preference import JudgedLoss, PairLoss

    return (JudgedLoss if options.loss == "kto" else PairLoss)(model, tokenizer.pad_token_id, options)


def scored(options: Options, evaluate: Evaluate) -> list[str]:  # noqa: ARG001 - common signature
    """Names of the scores."""
    return ["preferred", "margin", *evaluate.metrics]


def shown(example: Any, options: Options) -> list[tuple[str, Example]]:
    """The answers that are compared, or the one that is judged."""
    if options.loss == "kto":
        return [("good" if example.good else "bad", example.answer)]
    return [("chosen", example.chosen), ("rejected", example.rejected)]


def loss_bytes(sizes: Any, positions: int, supervised: int) -> int:
    """As its head says; where the output layer is trained, logits of the answers and log-probabilities, with their gradients."""
    if not (sizes.output_trained or sizes.output_copied):
        return int(kinds.load("heads", HEAD).loss_bytes(sizes, positions, supervised))
    return int(sizes.vocabulary * supervised * (2 * sizes.width + 3 * 4))


def scores(model: Any, tokenizer: Any, rows: list[tuple[Row, Any]], options: Options, evaluate: Evaluate) -> dict[str, float]:
    """How often the better answer is preferred, a tie counting half, by how much on average (nats); scores of answers.

    For kto: how often a good answer got likelier and a bad one less likely.
    """
    margins = objective(model, tokenizer, options).margins([example for _, example in rows])
    return {
        "rows": len(margins),
        "preferred": round(sum(0.5 if abs(margin) < TIE else margin > 0 for margin in margins) / len(margins), 4),
        "margin": round(sum(margins) / len(margins), 4),
        **{name: value for name, value in sft.scores(model, tokenizer, rows, options, evaluate).items() if name != "rows"},
    }


def _first_answer(record: dict[str, Any]) -> str:
    return "chosen" if "chosen" in record else "completion"


def _answered(record: dict[str, Any], key: str) -> dict[str, Any]:
    """The row as `sft` would learn the answer."""
    if "messages" not in record:
        return {"prompt": record["prompt"], "completion": record[key]}
    turns = record["messages"] if isinstance(record["messages"], list) else []
    return {"messages": [*turns, {"role": "assistant", "content": record[key]}]}


def _encoded(record: dict[str, Any], key: str, tokenizer: Any, options: Options, bad: BadRows) -> Example:
    """The prompt and one answer; earlier answers in the conversation are read, not learned."""
    answered = _answered(record, key)
    example, prompt = sft.encode(answered, tokenizer), len(sft.question_ids(answered, tokenizer))
    example = sft.fitted(example, options.max_tokens, cut=bad.truncates, what=f" with {key}")
    answer = Example(example.ids, ([IGNORE] * prompt + example.labels[prompt:])[: len(example.ids)], example.cut)
    if not answer.supervised:
        raise DataError(f"no token of {key} would be learned: nothing of it is left before max_tokens", "unlearned")
    return answer

"""Masked language modelling (Devlin et al. 2018, arXiv:1810.04805, section 3.1): some tokens are hidden and guessed from both
sides. Which ones is drawn anew each time a row is read (Liu et al. 2019, arXiv:1907.11692, section 4.1)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tuner.data.example import IGNORE, Example
from tuner.data.rows import BadRows, Row, usable
from tuner.data.text import require_one_beginning, require_text
from tuner.errors import DataError
from tuner.kinds import Options as BaseOptions
from tuner.recipe import Evaluate

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "masked"
KEYS = frozenset({"text"})
SHAPES: dict[str, dict[str, Any]] = {"text": {}}
# Longer documents become several.
BLOCK_TOKENS = 512


class Options(BaseOptions):
    """Keys of `task: {kind: masked}`."""

    kind: Literal["masked"] = "masked"
    max_tokens: int = Field(128, gt=2)
    """Length of a block in tokens, special ones included. A longer document becomes several; two never share one."""
    fraction: float = Field(0.15, gt=0, lt=1)
    """Part of the tokens that is guessed. Of those 80% are shown as the mask, 10% as another token, 10% as they are."""
    whole_words: bool = False
    """Hide all tokens of a word together, so that its beginning does not give its end away."""


@dataclass(frozen=True)
class Maskable:
    """A block's token ids, and the positions of its words: what is hidden together."""

    ids: list[int]
    words: list[list[int]]
    fraction: float

    @property
    def supervised(self) -> int:
        """How many tokens are to be guessed."""
        return max(1, round(self.fraction * sum(map(len, self.words))))


def check_row(record: dict[str, Any], options: Options, *, chat_template: bool = True) -> None:  # noqa: ARG001 - a task's common signature
    """Raises DataError unless the record is {"text": "..."}."""
    require_text(record)


def examples(rows: Iterator[Row], tokenizer: Any, options: Options, bad: BadRows) -> Iterator[tuple[Row, Maskable]]:
    """Each document's blocks, special tokens around each; bad rows stop the run with a DataError, or are counted."""

    def blocks(row: Row) -> list[Maskable]:
        check_row(row.record, options)
        if tokenizer.mask_token_id is None:
            raise DataError("the model's tokenizer has no mask token, so nothing can be hidden")
        found = tokenizer(row.record["text"], truncation=True, max_length=options.max_tokens, return_overflowing_tokens=True)
        made = [_maskable(ids, found.word_ids(block), options) for block, ids in enumerate(found["input_ids"])]
        require_one_beginning(made[0].ids, tokenizer)
        if not made[0].words:
            raise DataError("the tokenizer makes no token of this text, so nothing can be hidden")
        return [block for block in made if block.words]

    for row, made in usable(rows, blocks, bad):
        yield from ((row, block) for block in made)


def _maskable(ids: list[int], word_ids: list[int | None], options: Options) -> Maskable:
    """The tokenizer's special tokens belong to no word and are never hidden."""
    words: dict[int, list[int]] = {}
    for place, word in enumerate(word_ids):
        if word is not None:
            words.setdefault(word if options.whole_words else place, []).append(place)
    return Maskable(list(ids), list(words.values()), options.fraction)


def question(record: dict[str, Any], tokenizer: Any, options: Options) -> dict[str, Any]:
    """`ids` of the first block."""
    return {"ids": list(tokenizer(record["text"], truncation=True, max_length=options.max_tokens)["input_ids"])}


def objective(model: Any, tokenizer: Any, options: Options) -> Any:  # noqa: ARG001 - a task's common signature
    """Cross entropy of the hidden tokens."""
    return _objective(model, tokenizer)


def _objective(model: Any, tokenizer: Any) -> Any:
    import torch

    from tuner.data.example import Tagged
    from tuner.heads.causal import collate
    from tuner.heads.masked import hidden_log_likelihood
    from tuner.objective import Objective

    class HiddenLoss(Objective):
        """Sum of the negative log-likelihood of a batch's hidden tokens (nats)."""

        def begin(self, rows: list[Maskable], micro_batch_size: int) -> list[Tagged]:  # noqa: ARG002 - every objective's signature
            """Draws what is hidden, with torch's own generator, whose state is in every checkpoint."""
            return [self._hide(row) for row in rows]

        def collate(self, examples: list[Tagged], device: Any = "cpu") -> "dict[str, Tensor]":
            """The batch that `forward` takes."""
            return collate(examples, self.pad_id, device)

        def _hide(self, example: Maskable) -> Tagged:
            ids, labels = list(example.ids), [IGNORE] * len(example.ids)
            places: list[int] = []
            for word in torch.randperm(len(example.words)).tolist():
                # Words of several tokens are hidden whole or not at all, so a few tokens fewer may be hidden than were asked for.
                if not places or len(places) + len(example.words[word]) <= example.supervised:
                    places += example.words[word]
            for place in places:
                labels[place], draw = ids[place], torch.rand(()).item()
                if draw < 0.8:
                    ids[place] = tokenizer.mask_token_id
                elif draw < 0.9:
                    ids[place] = int(torch.randint(len(tokenizer), ()))
            return Tagged(ids, labels)

        def forward(self, batch: "dict[str, Tensor]") -> "Tensor":
            """A scalar."""
            return -hidden_log_likelihood(self.model, batch)[0].sum()

    return HiddenLoss(model, tokenizer.pad_token_id)


def scored(options: Options, evaluate: Evaluate) -> list[str]:  # noqa: ARG001 - common signature
    """None beside the loss."""
    return []


def shown(example: Maskable, options: Options) -> list[tuple[str, Example]]:  # noqa: ARG001 - common signature
    """The block, and how much of it is hidden: what, is drawn anew each time."""
    return [(f"{example.supervised} of its tokens are hidden", Example(example.ids, [IGNORE] * len(example.ids)))]


def scores(
    model: Any,  # noqa: ARG001 - common signature
    tokenizer: Any,  # noqa: ARG001 - common signature
    rows: list[tuple[Row, Maskable]],  # noqa: ARG001 - common signature
    options: Options,  # noqa: ARG001 - common signature
    evaluate: Evaluate,  # noqa: ARG001 - common signature
) -> dict[str, float]:
    """None beside the loss."""
    return {}

"""Embedding: texts that belong together get vectors that point the same way.

A row is {"anchor", "positive"} with "negative" or "negatives" where there are some, for the contrastive loss: each anchor is to
find its positive among all positives and negatives of the step. For `loss: cosine` it is {"sentence1", "sentence2", "score"}.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tuner.data.example import IGNORE, Example, Texts
from tuner.data.rows import BadRows, Row, lacking, usable
from tuner.data.text import asked, encode
from tuner.errors import DataError, RecipeError
from tuner.kinds import Options as BaseOptions
from tuner.recipe import Evaluate

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.families import Family
    from tuner.source import Facts

HEAD = "embedding"
TOO_LONG = "truncate"
PASSES = True
KEYS = frozenset({"anchor", "positive", "negative", "negatives", "sentence1", "sentence2", "score"})
SHAPES: dict[str, dict[str, Any]] = {
    "pairs": {},
    "triples": {},
    "sentence pairs": {},
    "pairs with a score": {"loss": "cosine"},
    "sentence pairs with a score": {"loss": "cosine"},
}


class Options(BaseOptions):
    """Keys of `task: {kind: embed}`."""

    kind: Literal["embed"] = "embed"
    loss: Literal["contrastive", "cosine"] = "contrastive"
    """`contrastive` wants large batches, and `micro_batch_size` makes them fit; `cosine` learns given similarities."""
    scale: float = Field(20.0, gt=0)
    """What cosines are multiplied by before the softmax of the contrastive loss: one over its temperature."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """A text's vector: the mean over its tokens, its first, or its last; use what the model was trained with."""
    max_tokens: int = Field(256, gt=1)
    """Longest text in tokens. A longer one makes a bad row: see `data.on_bad_row`."""


def proposed(shape: str, labels: list[str], family: "Family", known: "Facts") -> dict[str, Any]:  # noqa: ARG001 - common signature
    """The options that rows of a shape want, and how the model makes its vectors."""
    return {**SHAPES[shape], **({"pooling": known.pooling} if known.pooling else {})}


def check_row(record: dict[str, Any], options: Options, *, chat_template: bool = True) -> None:  # noqa: ARG001 - a task's common signature
    """Raises DataError unless the record has the texts that the loss compares."""
    texts(record, options)


def asks_first(options: Options) -> bool:
    """Its loss asks the model before the forward pass of a step: every vector is made by all of them."""
    return options.loss == "contrastive"


def check(options: Options, known: "Facts") -> None:
    """Raises RecipeError where the model says how it makes its vectors, and the recipe says nothing."""
    if known.pooling not in (None, options.pooling) and "pooling" not in options.model_fields_set:
        raise RecipeError(f"the model makes its vectors with pooling: {known.pooling}; write that down, or another one")


def texts(record: dict[str, Any], options: Options) -> list[str]:
    """Anchor, positive and negatives, or the two sentences. Raises DataError."""
    pairs = [["anchor", "positive"], ["sentence1", "sentence2"]]
    usual = pairs[options.loss == "cosine"]
    keys = next((list(each) for each in pairs if set(each) <= set(record)), usual)
    found = [record.get(key) for key in keys]
    if options.loss == "contrastive":
        negatives = record.get("negatives", [record["negative"]] if "negative" in record else [])
        if not isinstance(negatives, list):
            raise DataError(f'"negatives" is {negatives!r:.60}, expected a list of texts')
        keys += [f"negatives[{at}]" for at in range(len(negatives))]
        found += negatives
    else:
        score = record.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score) or not -1 <= score <= 1:
            raise DataError(
                f'"score" is {score!r:.60}, expected a number from -1 to 1, as a cosine is; divide those of another scale'
            )
    for key, text in zip(keys, found, strict=True):
        if not isinstance(text, str) or not text.strip():
            there = ", ".join(f'"{name}"' for name in record)
            why = lacking(text, there=key.partition("[")[0] in record)
            raise DataError(f'"{key}" is {text!r:.60}, expected text; found {there}', why)
        if key.startswith("negatives") and text in found[:2]:
            raise DataError(f'"{key}" is the anchor or its positive: {text!r:.60}; it would be learned as both', "shape")
    return [str(text) for text in found]


def examples(rows: Iterator[Row], tokenizer: Any, options: Options, bad: BadRows) -> Iterator[tuple[Row, Texts]]:
    """Each row's texts as tokens; bad rows stop the run with a DataError, or are counted in `bad`."""

    def made(row: Row) -> Texts:
        pieces = [encode(text, tokenizer, max_tokens=options.max_tokens, cut=bad.truncates) for text in texts(row.record, options)]
        score = float(row.record["score"]) if options.loss == "cosine" else None
        return Texts([ids for ids, _ in pieces], score, any(cut for _, cut in pieces))

    return usable(rows, made, bad)


def question(record: dict[str, Any], tokenizer: Any, options: Options) -> dict[str, Any]:
    """`ids` of the first text, and how its vector is made."""
    text = texts(record, options)[0]
    ids, _ = encode(text, tokenizer, max_tokens=options.max_tokens, cut=True)
    return {**asked(text, ids, tokenizer), "pooling": options.pooling}


def serving(options: Options) -> dict[str, Any]:
    """Facts for whoever makes vectors with the result."""
    return {"pooling": options.pooling}


def objective(model: Any, tokenizer: Any, options: Options) -> Any:
    """The contrastive or the cosine loss."""
    return _objective(model, tokenizer.pad_token_id, options)


def _objective(model: Any, pad_id: int, options: Options) -> Any:
    import torch
    from torch.nn.functional import cross_entropy

    from tuner.heads import embedding
    from tuner.objective import Objective

    class VectorLoss(Objective):
        """Sum over a batch's rows.

        Contrastive: cross entropy of each anchor's positive among all positives and negatives of the step (van den Oord et al.
        2018, arXiv:1807.03748; Henderson et al. 2017, arXiv:1705.00652). Cosine: squared error of the cosine.
        """

        # A single row without negatives has nothing to be told apart from.
        least_rows = 2 if options.loss == "contrastive" else 1
        passes = True

        def __init__(self) -> None:
            super().__init__(model, pad_id)
            self._parts: dict[int, tuple[Any, Tensor, float]] = {}

        def begin(self, rows: list[Texts], micro_batch_size: int) -> list[Texts]:
            """Where a step does not fit into memory at once: the gradient of every vector first, by all of them.

            The vectors are then made again, a micro-batch at a time, with the same dropout (Gao et al. 2021, arXiv:2101.06983).
            """
            self._parts = {}
            alone = options.loss == "contrastive" and len(rows) == 1 and len(rows[0].texts) == 2
            if self.model.training and alone:
                raise DataError("a step of one row without negatives has nothing to tell apart; batch_size has to be 2 or more")
            if options.loss == "cosine" or len(rows) <= micro_batch_size:
                return rows
            chunks = [rows[at : at + micro_batch_size] for at in range(0, len(rows), micro_batch_size)]
            states, made = [], []
            batches = [self.collate(chunk, self.model.device) for chunk in chunks]
            for batch in batches:
                states.append(_random_state())
                with torch.no_grad():
                    made.append(embedding.embed(self.model, batch, options.pooling))
            vectors = [part.clone().requires_grad_() for part in made]
            roles = [_roles(batch) for batch in batches]
            kinds = [torch.cat([part[role[kind]] for part, role in zip(vectors, roles, strict=True)]) for kind in range(3)]
            keys = [torch.cat([batch["keys"][role[kind]] for batch, role in zip(batches, roles, strict=True)]) for kind in range(3)]
            losses_B = self._contrastive(kinds, keys)
            torch.autograd.backward(losses_B.sum())
            shares = torch.split(losses_B.detach(), [len(chunk) for chunk in chunks])
            for chunk, state, part, share in zip(chunks, states, vectors, shares, strict=True):
                assert part.grad is not None
                self._parts[id(chunk[0])] = (state, part.grad, float(share.sum()))
            return rows

        def collate(self, examples: list[Texts], device: Any = "cpu") -> "dict[str, Tensor]":
            """Anchors, positives, then negatives (M, T); `keys` (M,) are equal for equal texts, `counts` says how many rows."""
            given = [row.texts[0] for row in examples] + [row.texts[1] for row in examples]
            given += [text for row in examples for text in row.texts[2:]]
            return {
                **embedding.collate(given, self.pad_id, device),
                "keys": torch.tensor([hash(tuple(ids)) for ids in given], device=device),
                "rows": torch.tensor(len(examples)),
                "part": torch.tensor(id(examples[0])),
                "score": torch.tensor([row.score or 0.0 for row in examples], device=device),
            }

        def forward(self, batch: "dict[str, Tensor]") -> "Tensor":
            """A scalar."""
            if part := self._parts.get(int(batch["part"])):
                state, gradient_MD, loss = part
                with _randomness(state):
                    vectors_MD = embedding.embed(self.model, batch, options.pooling)
                surrogate = (vectors_MD * gradient_MD).sum()
                return surrogate - surrogate.detach() + loss
            vectors_MD = embedding.embed(self.model, batch, options.pooling)
            kinds = [vectors_MD[role] for role in _roles(batch)]
            if options.loss == "cosine":
                return (((kinds[0] * kinds[1]).sum(-1) - batch["score"]) ** 2).sum()
            return self._contrastive(kinds, [batch["keys"][role] for role in _roles(batch)]).sum()

        def _contrastive(self, kinds: "list[Tensor]", keys: "list[Tensor]") -> "Tensor":
            """(B,) losses of anchors, positives and negatives. A text that is an anchor's positive, too, is no negative for it."""
            anchors_BD, candidates_CD = kinds[0], torch.cat(kinds[1:])
            with torch.autocast(anchors_BD.device.type, enabled=False):  # cosines that differ by less than bfloat16 shows decide
                scores_BC = options.scale * anchors_BD @ candidates_CD.T
            own_B = torch.arange(len(anchors_BD), device=scores_BC.device)
            same_BC = torch.cat(keys[1:])[None, :] == keys[1][:, None]
            same_BC[own_B, own_B] = False
            return cross_entropy(scores_BC.masked_fill(same_BC, -math.inf), own_B, reduction="none")

    return VectorLoss()


def _roles(batch: "dict[str, Tensor]") -> list[slice]:
    """Where the anchors, positives and negatives of a batch are."""
    rows = int(batch["rows"])
    return [slice(0, rows), slice(rows, 2 * rows), slice(2 * rows, None)]


def _random_state() -> Any:
    import torch

    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _randomness(state: Any) -> Any:
    """A block in which chance repeats itself from `state` on, and goes on after it as if the block had not been."""
    from contextlib import contextmanager

    import torch

    @contextmanager
    def block() -> Iterator[None]:
        with torch.random.fork_rng():
            torch.set_rng_state(state[0])
            if state[1]:
                torch.cuda.set_rng_state_all(state[1])
            yield

    return block()


def scored(options: Options, evaluate: Evaluate) -> list[str]:  # noqa: ARG001 - common signature
    """Names of the scores, by loss."""
    return ["Spearman"] if options.loss == "cosine" else list(retrieval([1]))


def shown(example: Texts, options: Options) -> list[tuple[str, Example]]:  # noqa: ARG001 - common signature
    """The texts that are compared."""
    scored = example.score is not None
    names = ["one", f"other, {example.score}"] if scored else ["anchor", "positive", *["negative"] * (len(example.texts) - 2)]
    return [(name, Example(ids, [IGNORE] * len(ids))) for name, ids in zip(names, example.texts, strict=True)]


def scores(
    model: Any,
    tokenizer: Any,  # noqa: ARG001 - common signature
    rows: list[tuple[Row, Texts]],
    options: Options,
    evaluate: Evaluate,  # noqa: ARG001 - common signature
) -> dict[str, float]:
    """How well each anchor finds its positive among all held-out texts; for given scores Spearman's correlation."""
    from tuner.heads import embedding

    device = str(model.device)
    first_BD = embedding.vectors(model, [example.texts[0] for _, example in rows], options.pooling, device)
    if options.loss == "cosine":
        from scipy.stats import spearmanr

        second_BD = embedding.vectors(model, [example.texts[1] for _, example in rows], options.pooling, device)
        found = spearmanr((first_BD * second_BD).sum(-1).tolist(), [example.score for _, example in rows]).statistic
        return {"rows": len(rows), "Spearman": 0.0 if math.isnan(found) else round(float(found), 4)}
    candidates = list(dict.fromkeys(tuple(text) for _, example in rows for text in example.texts[1:]))
    candidates_CD = embedding.vectors(model, [list(text) for text in candidates], options.pooling, device)
    similar_BC = first_BD @ candidates_CD.T
    place = {text: at for at, text in enumerate(candidates)}
    own = [place[tuple(example.texts[1])] for _, example in rows]
    # As good as its own counts against it, and so does what is no number: a model that gives one vector to all finds nothing.
    ranks = [int((~(row_C < row_C[at])).sum()) for row_C, at in zip(similar_BC, own, strict=True)]
    return {"rows": len(rows), **retrieval(ranks)}


def retrieval(ranks: list[int], k: int = 10) -> dict[str, float]:
    """Of the rank of each one right candidate, from 1: recall, mean reciprocal rank and nDCG, each cut off at k."""
    found = {
        "recall@1": sum(rank <= 1 for rank in ranks),
        f"recall@{k}": sum(rank <= k for rank in ranks),
        f"MRR@{k}": sum(1 / rank for rank in ranks if rank <= k),
        f"nDCG@{k}": sum(1 / math.log2(rank + 1) for rank in ranks if rank <= k),
    }
    return {name: round(total / len(ranks), 4) for name, total in found.items()}

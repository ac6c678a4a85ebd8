"""Losses that learn from which answer is better: pairs of a chosen and a rejected one, or single answers judged good or bad.

Shapes: B pairs or judged answers. A log-likelihood is the sum over an answer's tokens, in nats.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tuner.data.example import IGNORE, Example
from tuner.heads.causal import collate, supervised_losses
from tuner.likelihood import plain_output
from tuner.objective import BATCH_ROWS, Objective
from tuner.passes import in_passes
from tuner.progress import track

if TYPE_CHECKING:
    from tuner.parallel import Parallel


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, and the log-likelihood of each before training."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float] = (0.0, 0.0)
    supervised: float = 1.0

    @property
    def ids(self) -> list[int]:
        """Both, one after the other."""
        return self.chosen.ids + self.rejected.ids

    @property
    def cut(self) -> bool:
        """One of them was longer than the task allows."""
        return self.chosen.cut or self.rejected.cut

    @property
    def labels(self) -> list[int]:
        """What is learned of both."""
        return self.chosen.labels + self.rejected.labels


@dataclass(frozen=True)
class Judged:
    """An answer that is good or bad, and the same prompt with the answer to another one."""

    answer: Example
    good: bool
    mismatched: Example | None = None
    reference: tuple[float, float] = (0.0, 0.0)
    """Log-likelihood of the answer and of the mismatched one before training."""
    supervised: float = 1.0

    @property
    def ids(self) -> list[int]:
        """Prompt and answer."""
        return self.answer.ids

    @property
    def cut(self) -> bool:
        """It was longer than the task allows."""
        return self.answer.cut

    @property
    def labels(self) -> list[int]:
        """The answer."""
        return self.answer.labels


def dpo(chosen_B: Tensor, rejected_B: Tensor, reference_B2: Tensor, beta: float) -> Tensor:
    """(B,) of Rafailov et al. 2023 (arXiv:2305.18290), equation 7."""
    margin_B = (chosen_B - reference_B2[:, 0]) - (rejected_B - reference_B2[:, 1])
    return -logsigmoid(beta * margin_B)


def orpo(chosen_B: Tensor, rejected_B: Tensor, lengths_B2: Tensor, weight: float) -> Tensor:
    """(B,) of Hong et al. 2024 (arXiv:2403.07691), equations 3 to 7: the chosen answer's mean loss and the weighted odds ratio."""
    chosen_B, rejected_B = chosen_B / lengths_B2[:, 0], rejected_B / lengths_B2[:, 1]
    odds_B = (chosen_B - rejected_B) - (_log_one_minus_exp(chosen_B) - _log_one_minus_exp(rejected_B))
    return -chosen_B - weight * logsigmoid(odds_B)


def simpo(chosen_B: Tensor, rejected_B: Tensor, lengths_B2: Tensor, beta: float, margin: float) -> Tensor:
    """(B,) of Meng et al. 2024 (arXiv:2405.14734), equation 6; `margin` is the paper's gamma."""
    return -logsigmoid(beta * (chosen_B / lengths_B2[:, 0] - rejected_B / lengths_B2[:, 1]) - margin)


def kto(answer_B: Tensor, reference_B: Tensor, good_B: Tensor, divergence: Tensor, beta: float, weights: Sequence[float]) -> Tensor:
    """(B,) of Ethayarajh et al. 2024 (arXiv:2402.01306), equations 7 and 8; `weights` are those of good and of bad answers."""
    ratio_B = answer_B - reference_B
    good, bad = 1 - torch.sigmoid(beta * (ratio_B - divergence)), 1 - torch.sigmoid(beta * (divergence - ratio_B))
    return torch.where(good_B, weights[0] * good, weights[1] * bad)


class Comparison(Objective):
    """What PairLoss and JudgedLoss share: how likely answers are, now and before training."""

    passes = True

    def __init__(self, model: Any, pad_id: int, options: Any) -> None:
        super().__init__(model, pad_id)
        self.options = options
        self._layer = (plain_output(model),)  # a tuple, or it would be registered as one more module

    def train(self, mode: bool = True) -> "Comparison":
        """Training mode, in which only an adapter's dropout drops anything: with its own on, a model is not what it was."""
        super().train(mode)
        for name, module in self.named_modules() if self.compares else ():
            for key, value in vars(module).items():
                # The rate is a Dropout's `p`, or what attention passes on to a function.
                if "lora_dropout" not in name and isinstance(value, float) and ("drop" in key or isinstance(module, nn.Dropout)):
                    setattr(module, key, 0.0)
        return self

    def log_likelihoods(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) of each row's supervised tokens together."""

        def summed(part: dict[str, Tensor]) -> Tensor:
            losses_N = supervised_losses(self.model, part, self._layer[0])
            keep_BT = part["labels"][:, 1:] != IGNORE
            sums_B = torch.zeros(len(keep_BT), dtype=losses_N.dtype, device=losses_N.device)
            return -sums_B.index_add(0, keep_BT.nonzero()[:, 0], losses_N)

        return in_passes(self.model, batch, summed)

    def answers(self, examples: Sequence[Example], rows: int = BATCH_ROWS) -> list[float]:
        """The log-likelihood of each answer, without a gradient, so many of them at a time."""
        found = [0.0] * len(examples)
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for at in range(0, len(order), rows):
                chosen = order[at : at + rows]
                batch = collate([examples[index] for index in chosen], self.pad_id, self.model.device)
                for index, value in zip(chosen, self.log_likelihoods(batch).tolist(), strict=True):
                    found[index] = value
        self.model.train(training)
        return found

    def before(self, examples: list[Example], at_a_time: int, among: "Parallel | None" = None) -> list[float]:
        """The log-likelihood of each answer by the model without its adapter, if it has one: no second model is needed."""

        def asked(own: list[Example]) -> list[float]:
            found: list[float] = []
            with track("log-probabilities before training", len(own)) as advance:
                for at in range(0, len(own), 8 * BATCH_ROWS):
                    part = own[at : at + 8 * BATCH_ROWS]
                    found += self.answers(part, min(at_a_time, BATCH_ROWS))
                    advance(len(part))
            return found

        with self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext():
            return among.shared(asked, examples) if among else asked(examples)


class PairLoss(Comparison):
    """Sum over a batch's pairs of the loss that the task's options name."""

    def __init__(self, model: Any, pad_id: int, options: Any) -> None:
        super().__init__(model, pad_id, options)
        self.compares = options.loss == "dpo"

    def prepared(self, examples: Sequence[Pair], at_a_time: int = BATCH_ROWS, among: "Parallel | None" = None) -> Sequence[Pair]:
        """The pairs with the log-likelihoods of the model as it is, an adapter switched off."""
        if not self.compares:
            return examples
        both = [each for pair in examples for each in (pair.chosen, pair.rejected)]
        found = self.before(both, 2 * at_a_time, among)
        return [replace(pair, reference=(found[2 * at], found[2 * at + 1])) for at, pair in enumerate(examples)]

    def collate(self, examples: list[Pair], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Chosen answers, then rejected ones, (2B, T); `reference` and `lengths` (B, 2)."""
        both = [pair.chosen for pair in examples] + [pair.rejected for pair in examples]
        return {
            **collate(both, self.pad_id, device),
            "reference": torch.tensor([pair.reference for pair in examples], device=device),
            "lengths": torch.tensor([(pair.chosen.supervised, pair.rejected.supervised) for pair in examples], device=device),
        }

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A scalar."""
        chosen_B, rejected_B = self.log_likelihoods(batch).chunk(2)
        options = self.options
        if options.loss == "dpo":
            return dpo(chosen_B, rejected_B, batch["reference"], options.beta).sum()
        if options.loss == "orpo":
            return orpo(chosen_B, rejected_B, batch["lengths"], options.beta).sum()
        return simpo(chosen_B, rejected_B, batch["lengths"], options.beta, options.margin).sum()

    def margins(self, pairs: list[Pair]) -> list[float]:
        """How much better the chosen answer of each pair is by the loss's own measure, before its scale and margin (nats)."""
        chosen, rejected = self.answers([pair.chosen for pair in pairs]), self.answers([pair.rejected for pair in pairs])
        if self.compares:
            return [(a - p.reference[0]) - (b - p.reference[1]) for a, b, p in zip(chosen, rejected, pairs, strict=True)]
        return [a / p.chosen.supervised - b / p.rejected.supervised for a, b, p in zip(chosen, rejected, pairs, strict=True)]


class JudgedLoss(Comparison):
    """Sum over a batch's judged answers of KTO's loss.

    Its point of comparison is how far the model has moved on answers to other prompts, over all rows of a step.
    """

    compares = True

    def __init__(self, model: Any, pad_id: int, options: Any) -> None:
        super().__init__(model, pad_id, options)
        self._divergence = torch.zeros(())

    def prepared(
        self, examples: Sequence[Judged], at_a_time: int = BATCH_ROWS, among: "Parallel | None" = None
    ) -> Sequence[Judged]:
        """Each answer with a mismatched one, and the log-likelihoods of both by the model as it is."""
        # Half the rows away: neighbours may be two answers to one prompt.
        if len(examples) < 2:
            # There is no other prompt, so nothing says how far the model has moved there.
            alone = self.before([row.answer for row in examples], at_a_time, among)
            return [replace(row, reference=(value, 0.0)) for row, value in zip(examples, alone, strict=True)]
        away, most = len(examples) // 2, self.options.max_tokens
        mixed = [_swapped(row.answer, examples[at - away].answer, most) for at, row in enumerate(examples)]
        found = self.before([row.answer for row in examples] + mixed, at_a_time, among)
        halves = zip(found[: len(examples)], found[len(examples) :], strict=True)
        return [replace(row, mismatched=other, reference=both) for row, other, both in zip(examples, mixed, halves, strict=True)]

    def begin(self, rows: list[Judged], micro_batch_size: int) -> list[Judged]:
        """Measures the divergence, of which no gradient is taken: the mean over the rows, not below zero."""
        mixed = [row.mismatched for row in rows if row.mismatched is not None]
        now = self.answers(mixed, micro_batch_size)
        moved = sum(value - row.reference[1] for value, row in zip(now, rows, strict=bool(mixed))) / len(rows)
        self._divergence = torch.tensor(max(0.0, moved))
        return rows

    def collate(self, examples: list[Judged], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Answers (B, T), `reference` and `good` (B,)."""
        return {
            **collate([row.answer for row in examples], self.pad_id, device),
            "reference": torch.tensor([row.reference[0] for row in examples], device=device),
            "good": torch.tensor([row.good for row in examples], device=device),
        }

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A scalar."""
        answer_B = self.log_likelihoods(batch)
        weights = (self.options.good_weight, self.options.bad_weight)
        divergence = self._divergence.to(answer_B.device)
        return kto(answer_B, batch["reference"], batch["good"], divergence, self.options.beta, weights).sum()

    def margins(self, rows: list[Judged]) -> list[float]:
        """How much likelier each answer has become, less likely counting as more for a bad one (nats)."""
        now = self.answers([row.answer for row in rows])
        return [(1 if row.good else -1) * (value - row.reference[0]) for value, row in zip(now, rows, strict=True)]


def _swapped(one: Example, other: Example, most: int) -> Example:
    """The prompt of one with the answer of the other, up to `most` tokens."""
    prompt = next(at for at, label in enumerate(one.labels) if label != IGNORE)
    start = next(at for at, label in enumerate(other.labels) if label != IGNORE)
    return Example((one.ids[:prompt] + other.ids[start:])[:most], (one.labels[:prompt] + other.labels[start:])[:most])


def _log_one_minus_exp(value_B: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0; a mean log-likelihood of exactly zero is taken for one just below."""
    return torch.log1p(-torch.exp(value_B.clamp(max=-1e-7)))

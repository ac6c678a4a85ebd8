"""Says what a whole text is: one class, several, or a number. The probe holds the score of each label.

Shapes: B batch, T tokens, L labels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tuner.data.example import Labelled
from tuner.objective import Objective, in_turn
from tuner.passes import in_passes

AUTO = "AutoModelForSequenceClassification"
LABELLED = True
# transformers' words for what the scores mean; a server picks softmax or sigmoid by them.
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
# Two numbers predicted by right computations of one model are closer than this.
SAME_NUMBER = 0.01


def collate(examples: list[Labelled], pad_id: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B, T) padded on the right, `target` (B, 1) or for several classes (B, L), `weight` (B,)."""
    longest = max(len(each.ids) for each in examples)
    return {
        "input_ids": torch.tensor([each.ids + [pad_id] * (longest - len(each.ids)) for each in examples], device=device),
        "attention_mask": torch.tensor([[1] * len(each.ids) + [0] * (longest - len(each.ids)) for each in examples], device=device),
        "target": torch.tensor([each.target for each in examples], device=device),
        "weight": torch.tensor([each.weight for each in examples], device=device),
    }


class LabelLoss(Objective):
    """Sum over a batch of the loss of each text, as transformers defines it for this `problem_type`, times its weight.

    Cross entropy for one class, the mean of binary cross entropies for several, squared error for a number.
    """

    passes = True

    def __init__(self, model: Any, pad_id: int, problem: str) -> None:
        super().__init__(model, pad_id)
        self.problem = problem

    def collate(self, examples: list[Labelled], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The batch that `forward` takes."""
        return collate(examples, self.pad_id, device)

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, L)."""
        found: Tensor = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        return found

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A scalar."""
        logits_BL = in_passes(self.model, batch, self._logits)
        if self.problem == SINGLE:
            loss_B = nn.functional.cross_entropy(logits_BL, batch["target"][:, 0].long(), reduction="none")
        elif self.problem == MULTI:
            loss_B = nn.functional.binary_cross_entropy_with_logits(logits_BL, batch["target"], reduction="none").mean(-1)
        else:
            loss_B = (logits_BL[:, 0] - batch["target"][:, 0]) ** 2
        return (loss_B * batch["weight"]).sum()


def scores(model: Any, all_ids: list[list[int]], problem: str, device: str) -> list[list[float]]:
    """For each text the log-probability (nats) of each label, or the number, in the order of the texts."""
    pad_id = model.config.get_text_config().pad_token_id or 0
    found: list[list[float]] = [[] for _ in all_ids]
    for chosen in in_turn([len(ids) for ids in all_ids]):
        batch = collate([Labelled(all_ids[index], [0.0]) for index in chosen], pad_id, device)
        with torch.inference_mode():
            logits_BL = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        by_problem: dict[str, Callable[[Tensor], Tensor]] = {
            SINGLE: lambda each: each.log_softmax(-1),
            MULTI: nn.functional.logsigmoid,
            REGRESSION: lambda each: each,
        }
        values = by_problem[problem](logits_BL)
        for index, row in zip(chosen, values.tolist(), strict=True):
            found[index] = row
    return found


def record(model: Any, tokenizer: Any, questions: list[dict[str, Any]], answer_tokens: int) -> list[dict[str, Any]]:  # noqa: ARG001 - a head's common signature
    """Each question {"ids", "text", "problem"}, of which the last says what scores mean, with `scores` of the labels."""
    answers = ask(model, questions, str(model.device))
    return [
        {**question, "scores": [round(value, 5) for value in answer["scores"]]}
        for question, answer in zip(questions, answers, strict=True)
    ]


def ask(model: Any, items: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """For each item its `scores` now."""
    return [{"scores": row} for row in scores(model, [item["ids"] for item in items], items[0]["problem"], device)]


def difference(item: dict[str, Any], answer: dict[str, Any]) -> tuple[list[float], list[bool]]:
    """Per label: the difference in log-probability (nats, or of the number); per text: whether the same is chosen."""
    old, new = item["scores"], answer["scores"]
    apart = [abs(now - then) for now, then in zip(new, old, strict=True)]
    return apart, [same_choice(item["problem"], old, new)]


def same_choice(problem: str, one: list[float], other: list[float]) -> bool:
    """Both scores lead to the same answer."""
    if problem == SINGLE:
        return one.index(max(one)) == other.index(max(other))
    if problem == MULTI:
        return [value > LOG_HALF for value in one] == [value > LOG_HALF for value in other]
    return abs(one[0] - other[0]) <= SAME_NUMBER


LOG_HALF = -0.6931471805599453

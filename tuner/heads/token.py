"""Gives every token a label. The probe holds the log-probability of each label for each word.

Shapes: B batch, T tokens, L labels, N labelled tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tuner.data.example import IGNORE, Tagged
from tuner.heads.causal import collate
from tuner.objective import Objective, in_turn

AUTO = "AutoModelForTokenClassification"
LABELLED = True


class TagLoss(Objective):
    """Sum of the cross entropy over a batch's labelled tokens (nats)."""

    def collate(self, examples: list[Tagged], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The batch that `forward` takes."""
        return collate(examples, self.pad_id, device)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A scalar."""
        logits_NL, labels_N = labelled_logits(self.model, batch)
        return nn.functional.cross_entropy(logits_NL, labels_N, reduction="sum")


def labelled_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits (N, L) in float32, labels (N,)) at every token that has a label, row by row."""
    logits_BTL = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    keep_BT = batch["labels"] != IGNORE
    return logits_BTL[keep_BT].float(), batch["labels"][keep_BT]


def scores(model: Any, examples: list[Tagged], device: str) -> list[list[list[float]]]:
    """For each example the log-probability (nats) of each label at each of its labelled tokens."""
    pad_id = model.config.get_text_config().pad_token_id or 0
    found: list[list[list[float]]] = [[] for _ in examples]
    for chosen in in_turn([len(each.ids) for each in examples]):
        batch = collate([examples[index] for index in chosen], pad_id, device)
        with torch.inference_mode():
            logits_NL, _ = labelled_logits(model, batch)
        parts = torch.split(logits_NL.log_softmax(-1), [examples[index].supervised for index in chosen])
        for index, part in zip(chosen, parts, strict=True):
            found[index] = part.tolist()
    return found


def record(model: Any, tokenizer: Any, questions: list[dict[str, Any]], answer_tokens: int) -> list[dict[str, Any]]:  # noqa: ARG001 - a head's common signature
    """Each question {"ids", "positions"} with the `scores` of the labels at each position."""
    answers = ask(model, questions, str(model.device))
    return [
        {**question, "scores": [[round(value, 5) for value in row] for row in answer["scores"]]}
        for question, answer in zip(questions, answers, strict=True)
    ]


def ask(model: Any, items: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """For each item its `scores` now."""
    asked = []
    for item in items:
        labels = [IGNORE] * len(item["ids"])
        for position in item["positions"]:
            labels[position] = 0
        asked.append(Tagged(item["ids"], labels))
    return [{"scores": rows} for rows in scores(model, asked, device)]


def difference(item: dict[str, Any], answer: dict[str, Any]) -> tuple[list[float], list[bool]]:
    """Per word and label: the difference in log-probability (nats); per word: whether the same label is chosen."""
    apart, same = [], []
    for old, new in zip(item["scores"], answer["scores"], strict=True):
        apart += [abs(now - then) for now, then in zip(new, old, strict=True)]
        same.append(old.index(max(old)) == new.index(max(new)))
    return apart, same

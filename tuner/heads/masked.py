"""Says which word was hidden. The probe hides some tokens of each text and holds the log-probabilities of the true ones."""

from typing import Any

import torch
from torch import Tensor, nn

from tuner.data.example import IGNORE, Tagged
from tuner.heads.causal import collate

AUTO = "AutoModelForMaskedLM"


def hidden_log_likelihood(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(log-likelihood (N,) of the true token at each hidden position, logits (N, V)), in float32, row by row."""
    keep_BT = batch["labels"] != IGNORE
    logits_NV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[keep_BT].float()
    return -nn.functional.cross_entropy(logits_NV, batch["labels"][keep_BT], reduction="none"), logits_NV


def record(model: Any, tokenizer: Any, questions: list[dict[str, Any]], answer_tokens: int) -> list[dict[str, Any]]:
    """Each question {"ids"} with every seventh of its tokens hidden: `answer_ids` that the model puts there, and `logprobs`."""
    items = []
    for question in questions:
        special = tokenizer.get_special_tokens_mask(question["ids"], already_has_special_tokens=True)
        places = [place for place, each in enumerate(special) if not each][3::7][:answer_tokens] or [0]
        ids = [tokenizer.mask_token_id if place in places else each for place, each in enumerate(question["ids"])]
        items.append({"ids": ids, "positions": places, "answer_ids": [0] * len(places)})
    for item, answer in zip(items, ask(model, items, str(model.device)), strict=True):
        item["answer_ids"] = answer["preferred"]
    for item, answer in zip(items, ask(model, items, str(model.device)), strict=True):
        item["logprobs"] = [round(value, 5) for value in answer["logprobs"]]
    return items


def ask(model: Any, items: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """For each item the `logprobs` of the recorded answers, and the tokens `preferred` now."""
    examples = []
    for item in items:
        labels = [IGNORE] * len(item["ids"])
        for position, token in zip(item["positions"], item["answer_ids"], strict=True):
            labels[position] = token
        examples.append(Tagged(item["ids"], labels))
    with torch.inference_mode():
        log_likelihood_N, logits_NV = hidden_log_likelihood(model, collate(examples, 0, device))
    lengths = [len(item["positions"]) for item in items]
    values = {"logprobs": log_likelihood_N, "preferred": logits_NV.argmax(-1)}
    parts = {name: torch.split(value, lengths) for name, value in values.items()}
    return [{name: parts[name][index].tolist() for name in parts} for index in range(len(items))]


def difference(item: dict[str, Any], answer: dict[str, Any]) -> tuple[list[float], list[bool]]:
    """Per hidden token: the difference in log-probability (nats), and whether it is still preferred."""
    apart = [abs(new - old) for new, old in zip(answer["logprobs"], item["logprobs"], strict=True)]
    return apart, [new == old for new, old in zip(answer["preferred"], item["answer_ids"], strict=True)]


def loss_bytes(sizes: Any, positions: int, supervised: int) -> int:
    """Logits of every position, or later their gradient; in float32 log-probabilities of the hidden ones, and their gradient."""
    return int(sizes.vocabulary * (positions * sizes.width + 2 * supervised * 4))

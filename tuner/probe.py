"""The probe: a few fixed questions with a model's own answers, which travel with its bundle and are asked again after each
hand-over.

An answer is the model's greedy continuation, token by token, with each token's log-probability and its margin over the
runner-up. Asking again is teacher-forced: the recorded answer is read in one pass, so one early difference does not hide
the rest.
"""

from typing import Any

import torch

from tuner.causal import collate, supervised_log_likelihood
from tuner.data.example import IGNORE, Example

Question = dict[str, Any]
"""{"ids": token ids of the prompt, "messages": the conversation it was rendered from, or None}"""


def record(model: Any, questions: list[Question], answers: list[list[int]], device: str) -> list[dict[str, Any]]:
    """Each question with its greedy answer's `answer_ids`, `logprobs` and `margins` (nats), all of one length."""
    items = [{**question, "answer_ids": answer} for question, answer in zip(questions, answers, strict=True)]
    return [
        {**item, "logprobs": _rounded(logprobs), "margins": _rounded(margins)}
        for item, (logprobs, margins, _) in zip(items, replay(model, items, device), strict=True)
    ]


def replay(model: Any, items: list[dict[str, Any]], device: str) -> list[tuple[list[float], list[float], list[int]]]:
    """For each item: log-probability of every recorded answer token, the top margin there, and the token preferred now."""
    batch = collate([example(item) for item in items], 0, device)
    with torch.inference_mode():
        log_likelihood_N, logits_NV = supervised_log_likelihood(model, batch)
        top_N2 = logits_NV.log_softmax(-1).topk(2).values
    lengths = [len(item["answer_ids"]) for item in items]
    values = (log_likelihood_N, top_N2[:, 0] - top_N2[:, 1], logits_NV.argmax(-1))
    parts = [[part.tolist() for part in torch.split(value, lengths)] for value in values]
    return list(zip(*parts, strict=True))


def example(item: dict[str, Any]) -> Example:
    """A probe item as an example whose answer is supervised."""
    return Example(item["ids"] + item["answer_ids"], [IGNORE] * len(item["ids"]) + item["answer_ids"])


def compare(items: list[dict[str, Any]], now: list[tuple[list[float], list[float], list[int]]]) -> dict[str, float]:
    """`agreement` (fraction of recorded tokens that are still preferred) and differences in log-probability (nats)."""
    differences, same = [], []
    for item, (logprobs, _, preferred) in zip(items, now, strict=True):
        differences += [abs(new - old) for new, old in zip(logprobs, item["logprobs"], strict=True)]
        same += [new == old for new, old in zip(preferred, item["answer_ids"], strict=True)]
    return {
        "agreement": round(sum(same) / len(same), 4),
        "max_difference": round(max(differences), 5),
        "mean_difference": round(sum(differences) / len(differences), 5),
    }


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]

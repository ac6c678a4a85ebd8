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


def record(model: Any, questions: list[Question], answer_tokens: int, eos_id: int, device: str) -> list[dict[str, Any]]:
    """Each question with `answer_ids`, `logprobs` and `margins` (nats), all of one length, ending at the first eos."""
    items = []
    for question in questions:
        with torch.inference_mode():
            ids = torch.tensor([question["ids"]], device=device)
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=answer_tokens, do_sample=False, pad_token_id=eos_id
            )
        answer = output[0, len(question["ids"]) :].tolist()
        if eos_id in answer:
            answer = answer[: answer.index(eos_id) + 1]
        logprobs, margins, _ = replay(model, [{**question, "answer_ids": answer}], device)[0]
        items.append({**question, "answer_ids": answer, "logprobs": _rounded(logprobs), "margins": _rounded(margins)})
    return items


def replay(model: Any, items: list[dict[str, Any]], device: str) -> list[tuple[list[float], list[float], list[int]]]:
    """For each item: log-probability of every recorded answer token, the top margin there, and the token preferred now."""
    results = []
    for item in items:
        example = Example(item["ids"] + item["answer_ids"], [IGNORE] * len(item["ids"]) + item["answer_ids"])
        with torch.inference_mode():
            log_likelihood_N, logits_NV = supervised_log_likelihood(model, collate([example], 0, device))
            top_N2 = logits_NV.log_softmax(-1).topk(2).values
            margins = (top_N2[:, 0] - top_N2[:, 1]).tolist()
            results.append((log_likelihood_N.tolist(), margins, logits_NV.argmax(-1).tolist()))
    return results


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

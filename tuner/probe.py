"""The probe: a few fixed questions with a model's own answers, which travel with its bundle and are asked again after each
hand-over. What an answer is, the head says (tuner/heads): a greedy continuation, scores of labels, a vector.
"""

from typing import Any

from tuner import kinds


def compare(head: str, items: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, float]:
    """`agreement` (fraction of the recorded answers' parts that are still the same), and the `max_difference` and
    `mean_difference` of the numbers behind them: of log-probabilities (nats), or of what else the head says."""
    differences, same = [], []
    for item, answer in zip(items, answers, strict=True):
        apart, equal = kinds.load("heads", head).difference(item, answer)
        differences += apart
        same += equal
    return {
        "agreement": round(sum(same) / len(same), 4),
        "max_difference": round(max(differences), 5),
        "mean_difference": round(sum(differences) / len(differences), 5),
    }


def asked(head: str, model: Any, items: list[dict[str, Any]]) -> dict[str, float]:
    """How a model answers questions that were recorded with another."""
    return compare(head, items, kinds.load("heads", head).ask(model, items, str(model.device)))

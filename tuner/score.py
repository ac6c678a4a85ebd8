"""Scores of an answer against the reference, as a recipe's `evaluate.metrics` describes them."""

import re

from tuner.recipe import Metric


def score(metric: Metric, answer: str, reference: str) -> float:
    """Between 0 and 1. With two empty sets of matches `f1` is 1: nothing was asked for and nothing was added."""
    if metric.kind == "exact":
        found, wanted = (re.search(metric.pattern, text.strip()) for text in (answer, reference))
        return float(found is not None and wanted is not None and found.group(0) == wanted.group(0))
    answered, expected = (set(_matches(metric.pattern, text)) for text in (answer, reference))
    if not answered and not expected:
        return 1.0
    return 2 * len(answered & expected) / (len(answered) + len(expected))


def mean_scores(metrics: dict[str, Metric], pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Metric name to its mean over (answer, reference) pairs."""
    return {name: round(sum(score(metric, *pair) for pair in pairs) / len(pairs), 4) for name, metric in metrics.items()}


def _matches(pattern: str, text: str) -> list[str]:
    return [match.group(0) for match in re.finditer(pattern, text)]

"""Scores of an answer against the reference, as a recipe's `evaluate.metrics` describes them."""

import re
from typing import Any

from tuner import kinds
from tuner.data.rows import first_of_each
from tuner.recipe import Evaluate, Metric


def of_answers(model: Any, tokenizer: Any, rows: list[Any], options: Any, evaluate: Evaluate) -> dict[str, float]:
    """The recipe's metrics over answers that the model generates to held-out rows; nothing where it names none.

    `options` are those of the task whose questions and references are meant.
    """
    from tuner.heads.causal import generate

    if not evaluate.metrics:
        return {}
    task = kinds.load("tasks", options.kind)
    asked = [row for row, _ in first_of_each(rows)[: evaluate.rows]]
    given = generate(
        model, tokenizer, [task.question(row.record, tokenizer, options)["ids"] for row in asked], evaluate.max_new_tokens
    )
    answers = tokenizer.batch_decode(given, skip_special_tokens=True)
    pairs = [(answer, task.reference(row.record)) for answer, row in zip(answers, asked, strict=True)]
    return {"rows": len(pairs), **mean_scores(evaluate.metrics, pairs)}


def scored(options: Any, evaluate: Evaluate) -> list[str]:  # noqa: ARG001 - a task's common signature
    """Names of the recipe's metrics."""
    return list(evaluate.metrics)


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

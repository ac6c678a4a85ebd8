"""Scores of answers, with values worked out by hand."""

import pytest

from tuner.recipe import Metric
from tuner.score import score

COMMAND = Metric(kind="exact", pattern="^az(?: [a-z][a-z0-9-]*)*")
FLAGS = Metric(kind="f1", pattern=r"(?<!\S)--?[a-z][a-z0-9-]*")
REFERENCE = "az webapp traffic-routing clear --name MyWebApp -g MyGroup"


@pytest.mark.parametrize(
    ("answer", "exact", "f1"),
    [
        (REFERENCE, 1.0, 1.0),
        ("az webapp traffic-routing clear --name Other", 1.0, 2 / 3),  # precision 1, recall 1/2
        ("az webapp traffic-routing show --name X -g Y --foo Z", 0.0, 4 / 5),  # precision 2/3, recall 1
        ("Sure! Here it is.", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_an_answer_is_scored_by_the_parts_that_match(answer: str, exact: float, f1: float) -> None:
    assert score(COMMAND, answer, REFERENCE) == exact
    assert score(FLAGS, answer, REFERENCE) == pytest.approx(f1)


def test_no_flags_where_none_are_wanted_is_right() -> None:
    assert score(FLAGS, "az account list", "az account list") == 1.0

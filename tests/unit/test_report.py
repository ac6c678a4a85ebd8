"""The closing table."""

from pathlib import Path

from tuner.bundle import Bundle, Manifest
from tuner.report import rows


def bundle(stage: str, **metrics: object) -> Bundle:
    return Bundle(Path("/b"), Manifest(kind="model", stage=stage, fingerprint=stage, metrics=dict(metrics)))


PROBE = {"agreement": 0.5, "max_difference": 1.0, "mean_difference": 0.1}


def test_a_run_of_which_nothing_was_measured_has_no_rows(tmp_path: Path) -> None:
    assert rows([bundle("tokenizer")], tmp_path) == []
    assert rows([], tmp_path) == []


def test_the_base_is_shown_with_its_answers_to_the_tuned_models_questions(tmp_path: Path) -> None:
    asked = {**PROBE, "agreement": 0.25}
    found = rows(
        [bundle("base", heldout_loss=2.0, probe=PROBE), bundle("tune", heldout_loss=1.0, probe=PROBE, base=asked)], tmp_path
    )
    assert [(row[""], row["held-out loss"], row["probe agreement"]) for row in found] == [
        ("base", "2.000", "25.0%"),
        ("tuned", "1.000", "50.0%"),
    ]

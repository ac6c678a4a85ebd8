"""The closing table."""

import io
from pathlib import Path

from tuner.bundle import Bundle, Manifest
from tuner.report import read_served, rows, table, write_report, write_served


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


def test_figures_of_another_question_are_not_shown_as_served(tmp_path: Path) -> None:
    asked = bundle("quantize", key="one", heldout_loss=1.0, probe=PROBE)
    write_served(tmp_path, asked, {"heldout_loss": 1.0, "probe": PROBE})
    assert [row[""] for row in rows([asked], tmp_path)] == ["quantized", "served"]
    asked_otherwise = bundle("quantize", key="two", heldout_loss=1.0, probe=PROBE)
    assert read_served(tmp_path) is not None
    assert [row[""] for row in rows([asked_otherwise], tmp_path)] == ["quantized"]


def test_square_brackets_in_a_name_are_no_markup() -> None:
    from rich.console import Console

    console = Console(record=True, width=80, file=io.StringIO())
    console.print(table([{"": "tuned", "f1 [strict]": "1", "a [/b]": "2"}], "my [/x] run"))
    said = console.export_text()
    assert "f1 [strict]" in said and "a [/b]" in said and "my [/x] run" in said


def test_the_report_names_the_shapes_of_the_rows_and_what_was_left_out(tmp_path: Path) -> None:
    data = {
        "path": "a.jsonl",
        "rows": 7,
        "shapes": {"messages": 5, "Alpaca": 2},
        "skipped_rows": 1,
        "skipped": ["a.jsonl:3: found"],
    }
    made = Bundle(Path("/b"), Manifest(kind="model", stage="tune", fingerprint="f", data=data))
    text = write_report([made], tmp_path).read_text()
    assert "tune: 7 rows of a.jsonl: 5 messages (messages), 2 Alpaca (instruction, output)." in text
    made = Bundle(Path("/b"), Manifest(kind="model", stage="tune", fingerprint="f", data={**data, "rows": 3}))
    assert "tune: 7 rows of a.jsonl, 3 of them drawn: 5 messages" in write_report([made], tmp_path).read_text()
    assert "tune: 1 rows of a.jsonl were left out, such as:\n\n- a.jsonl:3: found" in text

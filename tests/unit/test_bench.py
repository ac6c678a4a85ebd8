"""What `make bench` writes down."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.bench import __main__ as cells
from tests.bench import keep
from tuner.recipe import read_recipe


def test_each_table_is_a_command() -> None:
    assert all(find_spec(module) for module in keep.TABLES.values())


def test_a_table_is_written_with_its_command_hardware_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setitem(keep.TABLES, "cells", "this")  # the Zen of Python prints itself
    written = keep.keep("cells", tmp_path / "new").read_text()
    first, rest = written.split("\n", 1)
    assert first.startswith("`python -m this`") and keep.hardware() in first and f"torch {torch.__version__}" in first
    assert "Beautiful is better than ugly." in rest
    assert "Beautiful is better than ugly." in capsys.readouterr().out


def test_a_table_that_fails_leaves_what_was_there_and_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "RESULTS", tmp_path)
    monkeypatch.setattr(keep, "TABLES", {"cells": "no_such_module", "scan": "this"})
    monkeypatch.setattr(keep, "hardware", lambda: "Two Cores!")
    (tmp_path / "two-cores").mkdir()
    (tmp_path / "two-cores/cells.md").write_text("of before")
    with pytest.raises(SystemExit, match=r"not measured: cells; .*two-cores/NAME\.md\.part"):
        keep.main([])
    assert (tmp_path / "two-cores/cells.md").read_text() == "of before"
    assert "Beautiful" in (tmp_path / "two-cores/scan.md").read_text()
    assert [each.name for each in tmp_path.rglob("*.part")] == ["cells.md.part"]


def test_a_table_that_there_is_not_is_named() -> None:
    with pytest.raises(SystemExit, match="no table cell; there are cells, scan"):
        keep.main(["cell"])


@pytest.mark.parametrize("name", [name for name, *_ in cells.CELLS])
def test_each_cell_is_a_recipe(name: str, tmp_path: Path) -> None:
    (model, task, data) = next(tuple(rest) for cell, *rest in cells.CELLS if cell == name)
    (tmp_path / "recipe.json").write_text(json.dumps(cells.recipe(name, model, task, data, "full", tmp_path)))
    recipe = read_recipe(tmp_path / "recipe.json")
    (tune,) = [options for kind, options in recipe.stages if kind == "tune"]
    assert tune.task.max_tokens == 64

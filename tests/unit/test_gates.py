"""What a stage's result must have achieved; a figure that is no number never passes."""

import math
from pathlib import Path
from typing import Any

import pytest

from tuner.bundle import Bundle, Manifest
from tuner.errors import GateError
from tuner.prove import _gate as served_gate
from tuner.stages import merge, quantize, tune


def metrics(loss: float, **probe: float) -> dict[str, Any]:
    return {
        "heldout_loss": loss,
        "probe": {"difference_from_base": 1.0, "max_difference": 0.0, "mean_difference": 0.0, **probe},
        "training": {},
    }


TUNE = tune.Options(task={"kind": "sft"}, gate={"heldout_loss_drop": 0.5})


def test_training_must_lower_the_loss_as_far_as_asked() -> None:
    tune.gate(TUNE, metrics(1.0), metrics(1.6))
    for after in (1.2, 2.0, math.nan):
        with pytest.raises(GateError, match="gate.heldout_loss_drop asks for more than 0.5"):
            tune.gate(TUNE, metrics(after), metrics(1.6))


def test_an_adapter_that_changes_no_answer_had_no_effect() -> None:
    with pytest.raises(GateError, match="training had no effect"):
        tune.gate(TUNE, metrics(1.0, difference_from_base=0.0), metrics(2.0))
    # What rounding the base alone changes is not the adapter's doing.
    rounded = {**metrics(1.0, difference_from_base=0.01), "training": {"difference_from_base": 0.0}}
    with pytest.raises(GateError, match="training had no effect"):
        tune.gate(TUNE, rounded, metrics(2.0))


def test_a_merge_must_answer_as_the_tuned_model() -> None:
    merge.gate(merge.Options(), metrics(1.0, max_difference=1e-4), {})
    for worst in (0.01, math.nan, math.inf):
        with pytest.raises(GateError, match="tolerance is 0.001"):
            merge.gate(merge.Options(), metrics(1.0, max_difference=worst), {})


def test_a_quantization_may_cost_only_so_much() -> None:
    quantize.gate(quantize.Options(), metrics(1.05), metrics(1.0))
    for after in (1.2, math.nan):
        with pytest.raises(GateError, match="gate.heldout_loss_rise allows 0.1"):
            quantize.gate(quantize.Options(), metrics(after), metrics(1.0))


def test_an_endpoint_that_answers_otherwise_or_too_well_is_refused() -> None:
    from pathlib import Path

    bundle = Bundle(
        Path("/b"), Manifest(kind="quantized", stage="quantize", fingerprint="f", metrics=metrics(1.2, mean_difference=0.08))
    )
    served_gate(bundle, metrics(1.21, mean_difference=0.1))
    for loss in (1.3, 1.0, math.nan):
        with pytest.raises(GateError, match="it does not serve"):
            served_gate(bundle, metrics(loss, mean_difference=0.1))
    with pytest.raises(GateError, match="it serves the unquantized weights"):
        served_gate(bundle, metrics(1.2, mean_difference=0.00001))


def test_a_run_that_was_started_several_times_over_is_refused(recipe_file: Any, tmp_path: Path) -> None:
    from tests.conftest import tuner

    done = tuner("run", recipe_file(), "--out", tmp_path / "out", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "WORLD_SIZE is 2, and the recipe's `launch` makes it 1: let `tuner run` start its processes itself" in done.stderr

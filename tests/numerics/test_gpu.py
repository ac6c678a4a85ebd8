"""The script for a GPU, at a size for a CPU: what is to be measured where one is lent has to run before."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.__main__ import LARGE, work_of_a_token


def printed(only: str) -> str:
    """What a process of its own prints: torch's compiler changes where Python looks for packages."""
    command = [sys.executable, "-m", "tests.gpu", "--toy", "--only", only]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_its_speeds_are_measured_on_a_cpu_too() -> None:
    rows = [line.split(" | ") for line in printed("speed").splitlines() if line.startswith("| ") and "tokens/s" not in line]
    assert [row[0].removeprefix("| ") for row in rows[:4]] == [
        "LoRA, Tuner",
        "LoRA, TRL",
        "LoRA, Tuner, gradient checkpointing",
        "LoRA, TRL, gradient checkpointing",
    ]
    assert len(rows) == 11 and all(float(row[1].replace(",", "")) > 0 for row in rows)


def test_the_work_of_a_token_is_that_of_the_frozen_weights() -> None:
    """Llama-3.2-1B has 1.236 billion weights, nearly all of them in products: each is read once forward and once backward."""
    assert work_of_a_token(LARGE) == pytest.approx(4 * 1.236e9, rel=1e-3)


@pytest.mark.slow
def test_losses_are_the_cpus() -> None:
    assert printed("losses").count("0.00000, ") == 3, "the same device twice"


@pytest.mark.slow
def test_mamba_is_measured_on_a_cpu_too() -> None:
    said = printed("mamba")
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| Mamba-2")]
    assert said.count("0.00000, ") == 1, "the same device twice"
    assert len(rows) == 4 and all(float(row[1].replace(",", "")) > 0 for row in rows)

"""A run that kill -9 ends in its second epoch, in the middle of a step, goes on to the same bytes: for each family."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_rows, write_rows

TEXTS = [{"text": f"list the virtual machine my{number} of group {number * 7919 % 101} az vm"} for number in range(18)]
# 18 rows in steps of 8, and 6 packed ones in steps of 2, are three steps an epoch; a checkpoint comes after every second, the end in
# the fifth, in the second epoch.
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], int]] = {
    "gpt": ("llama", {"kind": "sft", "max_tokens": 120, "packing": True}, chat_rows(18), 2),
    "bert": ("bert", {"kind": "masked", "max_tokens": 64, "whole_words": True}, TEXTS, 8),
    "mamba": ("mamba", {"kind": "pretrain", "max_tokens": 60, "packing": True}, TEXTS, 2),
}
DYING = """
import os, signal, sys
import tuner.cli, tuner.fit

accumulate, steps = tuner.fit._accumulate, 0

def counted(objective, *rest):
    global steps
    steps += 1
    if steps == 5:
        batches = objective.collate
        def last(*given):  # the step's second micro-batch
            objective.collate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            return batches(*given)
        objective.collate = last
    return accumulate(objective, *rest)

tuner.fit._accumulate = counted
tuner.cli.main()
"""


def tuned(out: Path) -> dict[str, str]:
    weights = [file for file in (out / "tune").iterdir() if file.suffix in (".safetensors", ".json") and file.name != "bundle.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in weights}


@pytest.mark.parametrize("family", ["gpt", *(pytest.param(each, marks=pytest.mark.slow) for each in ("mamba", "bert"))])
def test_killed_in_the_second_epoch_and_resumed_ends_with_the_same_bytes(checkpoints: Any, tmp_path: Path, family: str) -> None:
    from tuner.plan import make_plan
    from tuner.recipe import read_recipe
    from tuner.run import run

    model_type, task, rows, batch_size = CASES[family]
    write_rows(tmp_path / "train.jsonl", rows)
    tune = {
        "task": task, "method": {"kind": "lora", "rank": 4, "dropout": 0.2}, "epochs": 3, "batch_size": batch_size, "micro_batch_size": batch_size // 2,
        "learning_rate": 0.01, "checkpoint_every_steps": 2,
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"model": str(checkpoints(model_type).path), "data": {"train": "train.jsonl"}, "stages": [{"tune": tune}]})
    )
    child = subprocess.run(
        [sys.executable, "-c", DYING, "run", recipe, "--out", tmp_path / "killed"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [found.name for found in (tmp_path / "killed").glob(".1-tune-*.work/step-*")] == ["step-00000004"]
    plan = make_plan(read_recipe(recipe, None), tmp_path / "killed")
    run(plan, tmp_path / "killed")
    resumed = tuned(tmp_path / "killed")
    assert "adapter_model.safetensors" in resumed
    (tmp_path / "killed").rename(tmp_path / "resumed")
    run(plan, tmp_path / "killed")  # the same place, since peft writes the path of the base into the adapter's configuration
    assert tuned(tmp_path / "killed") == resumed
    assert json.loads((tmp_path / "killed/tune/bundle.json").read_text())["metrics"]["training"]["steps"] == 9

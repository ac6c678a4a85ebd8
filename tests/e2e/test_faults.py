"""What a person meets when something goes wrong in the middle of a run, with the real command line on a tiny model."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import command, tuner

STAGES = ["tokenizer", "init", "tune", "tune-lora", "merge", "quantize"]


def all_stages(tree: dict[str, Any]) -> None:
    """A chain through every stage there is: tokenizer -> init -> full tuning -> LoRA -> merge -> quantize."""
    del tree["model"]
    tree["data"] = {"train": "text.jsonl", "heldout": "text-heldout.jsonl"}
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    tune = {"task": {"kind": "pretrain", "max_tokens": 64}, "steps": 12, "checkpoint_every_steps": 3, "learning_rate": 0.003}
    tree["stages"] = [
        {"tokenizer": {"vocab_size": 300}},
        {"init": {"config": config}},
        {"tune": {**tune, "method": "full"}},
        {"tune": {**tune, "method": {"kind": "lora", "rank": 4}}},
        {"merge": {}},
        {"quantize": {"gate": {"heldout_loss_rise": 0.5}, "calibration_rows": 8}},
    ]


@pytest.fixture
def recipe(recipe_file: Callable[..., Path], tmp_path: Path) -> Path:
    for name, start, count in (("text", 0, 60), ("text-heldout", 500, 6)):
        lines = [
            json.dumps({"text": f"Row {n} says that {n * 7919 % 1000} boats and {n * 104729 % 997} trains left the harbour."})
            for n in range(start, start + count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return recipe_file(all_stages)


def adapter(out: Path) -> bytes:
    return (out / "tune-2" / "adapter_model.safetensors").read_bytes()


def kill_in(stage: str, recipe: Path, out: Path) -> str:
    """Start the run, kill -9 it once the named stage is at work, and return what it had said."""
    prefix = {"tune": "3-tune", "tune-lora": "4-tune"}.get(stage, stage)
    process = subprocess.Popen(
        command("run", recipe, "--out", out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if "tune" in stage:
            # In the middle of training: after a checkpoint, before the end.
            reached = list(out.glob(f".{prefix}-*.work/step-*"))
        else:
            reached = list(out.glob(f".*{prefix}-*.part"))
        if reached:
            break
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"the run was over before {stage} could be killed:\n{said}"
    return said


@pytest.mark.slow
def test_a_run_killed_in_each_of_its_stages_finishes_with_the_same_adapter(recipe: Path, tmp_path: Path) -> None:
    whole = tuner("run", recipe, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    for stage in STAGES:
        kill_in(stage, recipe, out)
    last = tuner("run", recipe, "--out", out)
    assert last.returncode == 0, last.stderr
    assert "finished before" in last.stderr
    assert adapter(out) == adapter(tmp_path / "whole")
    assert not list(out.glob(".*.part")) and not list(out.glob(".*.work"))
    again = tuner("run", recipe, "--out", out)
    assert again.returncode == 0
    assert again.stderr.count("finished before") == len(STAGES)


@pytest.mark.slow
def test_an_interrupted_run_says_that_it_can_be_continued_and_can(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_file(lambda tree: tree["stages"][0]["tune"].update(steps=400))
    out = tmp_path / "out"
    process = subprocess.Popen(command("run", recipe, "--out", out), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and not list(out.glob(".1-tune-*.work/step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command continues" in said
    assert "Traceback" not in said
    continued = tuner("run", recipe, "--out", out)
    assert continued.returncode == 0, continued.stderr
    assert "continuing at step" in continued.stderr


def test_a_run_that_learns_nothing_fails_and_says_so(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    # A held-out loss that must fall by 100 nats cannot: the gate is heard.
    recipe = recipe_file(lambda tree: tree["stages"][0]["tune"].update(gate={"heldout_loss_drop": 100.0}))
    done = tuner("run", recipe, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "tune: held-out loss went from" in done.stderr
    assert "gate.heldout_loss_drop asks for more than 100.0" in done.stderr


@pytest.mark.slow
def test_a_bundle_of_an_earlier_run_can_be_merged_without_held_out_rows(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    first = tuner("run", recipe_file(), "--out", tmp_path / "first")
    assert first.returncode == 0, first.stderr

    def change(tree: dict[str, Any]) -> None:
        tree.update(model="first/tune", stages=[{"merge": None}])
        del tree["data"]["heldout"]

    done = tuner("run", recipe_file(change), "--out", tmp_path / "second")
    assert done.returncode == 0, done.stderr
    assert "no data.heldout" in done.stderr
    manifest = json.loads((tmp_path / "second" / "merge" / "bundle.json").read_text())
    assert 0 <= manifest["metrics"]["probe"]["max_difference"] < 1e-3
    assert "heldout_loss" not in manifest["metrics"]
    assert [each["stage"] for each in manifest["parents"]] == ["base", "tune", "base"]
    for each in manifest["parents"]:
        assert (tmp_path / "second" / "merge").resolve().joinpath(each["path"], "bundle.json").is_file()


@pytest.mark.slow
def test_layers_without_a_gradient_end_the_run_with_their_names(
    recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    dead = tmp_path / "dead"
    shutil.copytree(tiny_model, dead)
    with torch.no_grad():
        model.save_pretrained(dead)
    recipe = recipe_file(
        lambda tree: (tree.update(model="dead"), tree["stages"][0]["tune"]["method"].update(targets=".*down_proj"))
    )
    done = tuner("run", recipe, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "1 of 2 trained layers get no gradient, so they would learn nothing: model.layers.1.mlp.down_proj" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "stages.0.tune.stepz=1"], "--set stages.0.tune.stepz: stages.0.tune.stepz: there is no key"),
        (["--set", "model=./none"], "--set model: model: ./none: there is no such file"),
        (["--set", "stages.0.tune.task.kind=sftt"], 'there is no "sftt"; did you mean "sft"?'),
        (["--bogus"], "No such option"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(recipe_file: Callable[..., Path], arguments: list[str], said: str) -> None:
    done = tuner("check", recipe_file(), *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bug_keeps_its_traceback_and_exit_code_1(tmp_path: Path) -> None:
    # A bug, brought in from outside: Python imports this file at its start.
    (tmp_path / "sitecustomize.py").write_text("import tuner.recipe\ntuner.recipe.json_schema = lambda: 1 / 0\n")
    done = tuner("schema", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_help_and_check_are_quick(recipe_file: Callable[..., Path]) -> None:
    def seconds(until: str, *arguments: Any) -> float:
        taken = []
        for _ in range(3):
            start = time.monotonic()
            with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True) as started:
                assert started.stdout is not None
                assert any(until in line for line in started.stdout)
                taken.append(time.monotonic() - start)
                started.kill()
        return min(taken)

    # The best of three, so that a busy machine does not decide.
    assert seconds("Usage: tuner", "--help") < 0.5
    # What is left is the memory that it takes, for which torch has to be there.
    assert seconds("needs:", "check", recipe_file()) < 3.0


def test_two_runs_in_one_directory_are_kept_apart(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = tuner("run", recipe_file(), "--out", out)
    assert done.returncode == 2
    assert "another run is at work there" in done.stderr

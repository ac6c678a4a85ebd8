"""A step is the same however it is divided: in memory at once, in micro-batches, over two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.grid.shares import ON, trained
from tests.grid.test_grid import TASKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoints")
    for model_type in {"llama", *ON.values()}:
        (made / model_type).symlink_to(checkpoints(model_type).path.resolve())
    return made


@pytest.fixture(scope="module")
def two_processes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave, which accelerate connects: each step's rows are shared between them."""
    out = tmp_path_factory.mktemp("shared")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # torch's own launcher: that of accelerate starts a single process where there is no GPU, whatever --num_processes says.
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(port),
    ]
    done = subprocess.run(
        [*launch, "-m", "tests.grid.shares", str(folder), str(out), "8"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of any weight."""
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("task", TASKS)
def test_micro_batches_and_processes_leave_the_weights_of_one_large_batch(
    folder: Path, two_processes: Path, tmp_path: Path, task: str
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    checkpoint = folder / ON.get(task, "llama")
    loss, moved, whole = trained(task, checkpoint, 8, tmp_path / "a")
    loss_of_parts, _, parts = trained(task, checkpoint, 3, tmp_path / "b")
    shared = load_file(two_processes / f"{task}.safetensors")
    with safe_open(two_processes / f"{task}.safetensors", "pt") as file:
        assert file.metadata()["processes"] == "2"
        loss_of_two = float(file.metadata()["loss"])
    assert loss_of_parts == pytest.approx(loss, abs=1e-4) and loss_of_two == pytest.approx(loss, abs=1e-4)
    assert moved > 1e-5
    # Losses are summed in float32, which has seven digits. Half a gradient, or a mean of means, would be off in the first.
    assert apart(whole, parts) < 1e-3 * moved
    assert apart(whole, shared) < 1e-3 * moved


# Some of which measure before a step is divided: a divergence, the gradient of every vector, likelihoods.
@pytest.mark.parametrize("task", ["sft", "masked", "embed", "preference-dpo", "preference-kto"])
def test_mixed_precision_leaves_nearly_the_same_weights_however_a_step_is_divided(folder: Path, tmp_path: Path, task: str) -> None:
    checkpoint = folder / ON.get(task, "llama")
    loss, moved, whole = trained(task, checkpoint, 8, tmp_path / "a")
    for rows in (8, 3):
        mixed_loss, _, weights = trained(task, checkpoint, rows, tmp_path / str(rows), mixed=True)
        assert mixed_loss == pytest.approx(loss, rel=0.02)
        difference = apart({name: value.double() for name, value in weights.items()}, whole)
        # Half a gradient would be 0.5 of it.
        assert 0 < difference < 0.1 * moved

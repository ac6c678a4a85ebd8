"""Trains every task for three steps and keeps the weights: `python -m tests.grid.shares CHECKPOINTS OUT MICRO_BATCH_SIZE`.

Started as several processes (torchrun) it shares each step among several processes. CHECKPOINTS has a directory for each model type.
"""

import sys
from pathlib import Path
from typing import Any

from tests.grid.test_grid import TASKS, named

# Each task on one of the architectures that have its head.
ON = {"masked": "bert", "classify": "bert", "tokens": "bert", "embed": "bert", "embed-cosine": "bert", "embed-last": "llama"}
ON |= {f"classify-{form}": "bert" for form in ("multi", "number", "weighted")}
# Plain gradient descent and no clipping: what is added to a weight is the gradient itself, so its scale counts.
SCHEDULE: dict[str, Any] = {
    "steps": 3, "batch_size": 8, "learning_rate": 1.0e-2, "warmup_fraction": 0.0, "decay": "constant", "weight_decay": 0.0,
    "max_grad_norm": 1.0e9, "checkpoint_every_steps": 100, "seed": 0,
}  # fmt: skip
# Rows in which more is learned than in the others: a mean of means would show.
LONGER: dict[str, dict[str, Any]] = {
    "tokens": {"words": ["list", "vm", "vnet", "vm", "vnet", "vm"], "tags": ["VERB", *["NOUN"] * 5]},
    "masked": {"text": "list the virtual machine az vm network " * 3},
    "pretrain": {"text": "show the vm"},
}


def trained(
    task_name: str, checkpoint: Path, micro_batch_size: int, work: Path, *, mixed: bool = False
) -> tuple[float, float, dict[str, Any]]:
    """The last step's loss, how far a weight has moved at most, and the weights after three steps of full training in float64.

    Without dropout, which is drawn anew for each micro-batch. `mixed`: in float32 with products in bfloat16.
    """
    from unittest.mock import patch

    import torch

    from tuner.bundle import open_bundle
    from tuner.checkpoint import load_tokenizer, open_base
    from tuner.data.rows import BadRows, Row
    from tuner.fit import Schedule, fit
    from tuner.methods import full

    task, options = named(task_name), named(task_name).Options(**TASKS[task_name][0])
    base, tokenizer = open_bundle(checkpoint), load_tokenizer(checkpoint)
    torch.manual_seed(0)
    config = {**task.head_config(options), "pad_token_id": 0} if hasattr(task, "head_config") else {}
    model, _ = open_base(base, task.HEAD, config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = (model.float() if mixed else model.double()).requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # Rows of different lengths, and with different numbers of learned tokens.
    records = [record for _ in range(3) for record in TASKS[task_name][1]]
    records += [LONGER[task_name]] if task_name in LONGER else []
    rows = (Row(f"rows:{number}", record) for number, record in enumerate(records, 1))
    examples = [example for _, example in task.examples(rows, tokenizer, options, BadRows())]
    schedule = Schedule(micro_batch_size=micro_batch_size, precision="bf16" if mixed else "fp32", **SCHEDULE)
    with patch("tuner.optimizers.optimizer", lambda _, trained, *, learning_rate, **rest: torch.optim.SGD(trained, learning_rate)):
        measured = fit(task.objective(model, tokenizer, options), examples, schedule, layers=full.layers(model), work=work)
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return measured["train_loss_last"], max(float((after[name] - before[name]).abs().max()) for name in after), after


def main() -> None:
    """Keep what was trained, one file for each task."""
    from accelerate import PartialState
    from safetensors.torch import save_file

    checkpoints, out, micro_batch_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    state = PartialState(cpu=True)
    for task in TASKS:
        # Each process with a directory of its own for checkpoints, of which none is written.
        work = out / f"work-{task}-{state.process_index}"
        loss, _, weights = trained(task, checkpoints / ON.get(task, "llama"), micro_batch_size, work)
        if state.is_main_process:
            said = {"loss": str(loss), "processes": str(state.num_processes)}
            save_file({name: value.clone().contiguous() for name, value in weights.items()}, out / f"{task}.safetensors", said)
    state.wait_for_everyone()


if __name__ == "__main__":
    main()

"""Every cell of the grid: architecture x task x method, on a small random model, for three steps; and every refused one."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_rows
from tests.grid.architectures import SMALL
from tuner import kinds
from tuner.bundle import Bundle
from tuner.data.rows import BadRows, Row
from tuner.families import family_of
from tuner.methods import lora

ARCHITECTURES = [name for family in kinds.names("families") for name in kinds.load("families", family).FAMILY.architectures]
# What each task is given: options, and rows that can be learned in three steps.
TASKS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "pretrain": ({"max_tokens": 32}, [{"text": f"list the virtual machine my{number} az vm"} for number in range(4)]),
    "sft": ({"max_tokens": 64}, chat_rows(4)),
    "masked": ({"max_tokens": 32, "fraction": 0.4}, [{"text": "list the virtual machine az vm network"}] * 4),
    "classify": (
        {"labels": ["machine", "network"], "max_tokens": 32},
        [{"text": f"show the {kind} {number}", "label": kind} for number, kind in enumerate(["machine", "network"] * 2)],
    ),
    "tokens": (
        {"labels": ["VERB", "NOUN"], "max_tokens": 32},
        [{"words": [verb, noun], "tags": ["VERB", "NOUN"]} for verb in ("list", "show") for noun in ("vm", "vnet")],
    ),
}

# Pairs, and for kto answers judged one by one.
PAIRS = [
    {"prompt": f"{verb} the vm", "chosen": f" az vm {verb}", "rejected": " network"}
    for verb in ("list", "show", "create", "delete")
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
    for row in PAIRS[:2]
    for key in ("chosen", "rejected")
]
LOSSES = {"dpo": PAIRS, "orpo": PAIRS, "simpo": PAIRS, "kto": JUDGED}
TEXTS = [
    {"anchor": f"{verb} it", "positive": f"az vm {verb}", "negative": f"vm my{verb}"}
    for verb in ("list", "show", "create", "delete")
]
SCORED = [{"sentence1": row["anchor"], "sentence2": row["positive"], "score": 0.2 * number} for number, row in enumerate(TEXTS)]
TASKS |= {
    "embed": ({"max_tokens": 32}, TEXTS),
    "embed-cosine": ({"loss": "cosine", "pooling": "cls", "max_tokens": 32}, SCORED),
    "embed-last": ({"pooling": "last", "max_tokens": 32}, TEXTS),
}
LABELS, READ = (
    {"labels": ["machine", "network"], "max_tokens": 32},
    ["show the machine", "list the network", "show both", "list none"],
)
GIVEN = (["machine"], ["network"], ["machine", "network"], [])
TASKS |= {
    "classify-multi": (
        {"form": "multi", **LABELS}, [{"text": text, "labels": names} for text, names in zip(READ, GIVEN, strict=True)],
    ),
    "classify-number": ({"form": "number", "max_tokens": 32}, [{"text": text, "score": len(text) / 10} for text in READ]),
    "classify-weighted": (
        {"class_weights": [1.0, 5.0], **LABELS}, [{"text": text, "label": LABELS["labels"][at == 0]} for at, text in enumerate(READ)],
    ),
}  # fmt: skip
TASKS |= {f"preference-{loss}": ({"loss": loss, "max_tokens": 64}, rows) for loss, rows in LOSSES.items()}


def named(task: str) -> Any:
    """The task's module: what follows a dash says which of its forms is meant."""
    return kinds.load("tasks", task.partition("-")[0])


def has_head(model_type: str, task: str) -> bool:
    """The family, and the architecture in it, has the head that the task trains."""
    family, architecture = family_of(model_type)
    return named(task).HEAD in family.heads - architecture.lacks


CELLS = [
    (model_type, task, method)
    for model_type in ARCHITECTURES
    for task in TASKS
    if has_head(model_type, task)
    # One form of a task is enough where only the architecture changes; the others are tried on one of each family.
    and ("-" not in task or task == "preference-dpo" or model_type in ("llama", "bert", "mamba2"))
    for method in ("full", "lora")
]


# Other ways of LoRA, on one task of each architecture.
WAYS: dict[str, dict[str, Any]] = {
    "nf4": {"storage": "nf4"}, "int8": {"storage": "int8"}, "dora": {"dora": True}, "rslora": {"rslora": True, "alpha": 4.0},
}  # fmt: skip
CELLS += [
    (model_type, "masked" if family_of(model_type)[0].name == "bert" else "pretrain", way)
    for model_type in ARCHITECTURES
    for way in WAYS
    if way not in lora.ROUNDED or not family_of(model_type)[1].not_rounded
]


def test_every_listed_architecture_has_a_small_configuration() -> None:
    assert sorted(SMALL) == sorted(ARCHITECTURES)


# What these add to LoRA is the same code on every architecture: one of each family, and the rest where there is time.
SLOW = {(name, way) for name in ARCHITECTURES for way in ("int8", "rslora", "dora") if name not in ("llama", "bert", "mamba2")}


@pytest.mark.parametrize(
    ("model_type", "task_name", "method_name"),
    [pytest.param(*cell, marks=pytest.mark.slow if (cell[0], cell[2]) in SLOW else (), id="-".join(cell)) for cell in CELLS],
)
def test_the_loss_falls_and_every_layer_learns(
    checkpoints: Any, tokenizer: Any, tmp_path: Path, model_type: str, task_name: str, method_name: str
) -> None:
    import torch

    from tuner.checkpoint import open_base
    from tuner.fit import Schedule, fit
    from tuner.objective import heldout_loss

    base: Bundle = checkpoints(model_type)
    family, architecture = family_of(model_type)
    task, method = named(task_name), kinds.load("methods", "full" if method_name == "full" else "lora")
    way = method.Options() if method_name == "full" else method.Options(**{"storage": "fp32", **WAYS.get(method_name, {})})
    options, records = TASKS[task_name][0], TASKS[task_name][1]
    options = task.Options(**options)
    torch.manual_seed(0)
    config = {**task.head_config(options), "pad_token_id": 0} if hasattr(task, "head_config") else {}
    model, fresh = open_base(base, task.HEAD, config, method.storage(way))
    model = method.prepare(model, way, family, architecture, fresh)
    rows = (Row(f"rows:{number}", record) for number, record in enumerate(records, 1))
    examples = [example for _, example in task.examples(rows, tokenizer, options, BadRows())]
    layers = method.layers(model)
    before = {name: [parameter.detach().clone() for parameter in own] for name, own in layers.items()}
    schedule = Schedule(
        steps=3, batch_size=4, micro_batch_size=2, learning_rate=3.0e-4, warmup_fraction=0.0, decay="constant",
        weight_decay=0.0, max_grad_norm=1.0, checkpoint_every_steps=100, seed=0,
    )  # fmt: skip
    objective = task.objective(model, tokenizer, options)
    examples = objective.prepared(examples[:4])
    # Without dropout, and of the same rows: what the three steps were taken on.
    untrained = heldout_loss(objective, examples)["heldout_loss"]
    fit(objective, examples, schedule, layers=layers, work=tmp_path)
    assert heldout_loss(objective, examples)["heldout_loss"] < untrained
    still = [name for name, own in layers.items() if all(torch.equal(a, b) for a, b in zip(before[name], own, strict=True))]
    assert still == []

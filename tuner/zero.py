"""Steps that DeepSpeed makes: ZeRO splits the optimizer (stage 1), gradients (2) and weights (3) among the processes.

Rajbhandari et al. 2020, arXiv:1910.02054. How it does so is told by its own configuration; what is trained, in which batches and by
which rates, stands in the recipe. Weights are put together again for whoever writes them, as with the other strategies.
"""

import json
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.errors import RecipeError
from tuner.parallel import Parallel
from tuner.progress import silent

# Keys of DeepSpeed's configuration, and of a `tune` stage, which says the same.
SAID = {
    "train_batch_size": "batch_size", "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size", "gradient_clipping": "max_grad_norm", "optimizer": "optimizer",
    "scheduler": "decay", "fp16": "method.storage", "bf16": "method.storage",
}  # fmt: skip
# What AdamW remembers of a parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")


def settings(given: str | dict[str, Any] | None) -> dict[str, Any]:
    """DeepSpeed's configuration, from the recipe or from a JSON file; stage 2 unless it says another.

    What is "auto", as in files for transformers' Trainer, is left to DeepSpeed or to the recipe.
    Raises RecipeError where the file cannot be read or says what the recipe says, and where there is no DeepSpeed.
    """
    found: Any = given or {}
    if isinstance(given, str):
        try:
            found = json.loads(Path(given).read_text())
        except (OSError, ValueError) as error:
            raise RecipeError(f"launch.deepspeed: {given}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise RecipeError(f"launch.deepspeed: {given}: found {type(found).__name__}, expected an object")
    found = _not_auto(found)
    for key, ours in SAID.items():
        if key in found and found[key] not in ({}, {"enabled": False}):
            raise RecipeError(f'launch.deepspeed: "{key}" is for the recipe to say (tune.{ours}); leave it out, or "auto"')
    found.setdefault("zero_optimization", {}).setdefault("stage", 2)
    if (stage := found["zero_optimization"]["stage"]) not in (1, 2, 3):
        raise RecipeError(f"launch.deepspeed: zero_optimization.stage is {stage}, and 1, 2 and 3 split something; use ddp")
    if find_spec("deepspeed") is None:
        raise RecipeError("launch.strategy: deepspeed needs a package that is not there: `.venv/bin/pip install deepspeed`")
    return {name: found[name] for name in found if name not in SAID}


def _not_auto(tree: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _not_auto(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in inner.items() if value != "auto"}


class Zero(Parallel):
    """One of several processes whose steps DeepSpeed makes."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self._given, self.sharded = given, True

    def place(self, objective: Any) -> None:
        """The whole model goes on the device; it is split once it is known what is trained."""
        objective.to(self.device)

    def joined(self, objective: Any, optimizer: Any, trained: Sequence[nn.Parameter], max_grad_norm: float) -> Any:
        """Split model and optimizer, with what it remembers. Raises RecipeError where DeepSpeed takes its configuration not."""
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        with silent():
            import deepspeed
            from deepspeed.utils import safe_set_full_optimizer_state

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, and gloo does without
        remembered = [optimizer.state.pop(each, {}) for each in trained]
        weights = self._given["zero_optimization"]["stage"] == 3
        fixed = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": max_grad_norm,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        try:
            with silent():
                self._engine, *_ = deepspeed.initialize(
                    model=objective, optimizer=optimizer, model_parameters=list(trained), config={**fixed, **self._given},
                    dist_init_required=False,
                )  # fmt: skip
        except (ValueError, AssertionError, KeyError) as error:  # pydantic's are ValueErrors
            raise RecipeError(f"DeepSpeed does not take launch.deepspeed: {error}") from None
        inside = self._engine.optimizer
        if remembered[0]:
            for flat in inside.fp32_partitioned_groups_flat if weights else inside.single_partition_of_fp32_groups:
                optimizer.state[flat] = {name: torch.zeros_like(flat) for name in MOMENTS}
                optimizer.state[flat]["step"] = remembered[0]["step"].clone()
            if not weights:
                inside._lazy_init_hp_params_optimizer_state()
            for parameter, state in zip(trained, remembered, strict=True):
                for name in MOMENTS:
                    safe_set_full_optimizer_state(parameter, state[name], name)
        return _Steps(self._engine, optimizer, trained)

    def loss(self, objective: Any, batch: Any) -> Tensor:  # noqa: ARG002
        """Through DeepSpeed's own module, which gathers what it needs."""
        found: Tensor = self._engine(batch)
        return found

    def learn(self, loss: Tensor, *, last: bool) -> None:
        """DeepSpeed divides by the number of processes; the loop does so by what is learned in all rows."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.count, scale_wrt_gas=False)
        if not last:
            self._engine.step()

    def add_up(self, total: float, trained: Any) -> float:  # noqa: ARG002
        """Gradients are summed up already."""
        return self._reduced(total, torch.distributed.ReduceOp.SUM)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """All of it; every process has to ask."""
        from deepspeed.utils import safe_get_full_grad

        found: Tensor | None = safe_get_full_grad(parameter)
        return found

    def clip(self, trained: Any, max_grad_norm: float) -> None:
        """A part of DeepSpeed's own step."""


class _Steps:
    """DeepSpeed's engine in the place of an optimizer, whose state is whole."""

    def __init__(self, engine: Any, optimizer: Any, trained: Sequence[nn.Parameter]) -> None:
        self._engine, self._optimizer, self._trained = engine, optimizer, trained
        self.param_groups = engine.optimizer.param_groups

    def step(self) -> None:
        self._engine.step()

    def zero_grad(self) -> None:
        """A part of the step."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's AdamW has it; every process has to ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next(iter(self._optimizer.state.values()))["step"]
        return {
            "state": {
                index: {"step": step, **{name: safe_get_full_optimizer_state(each, name).reshape(_shape(each)) for name in MOMENTS}}
                for index, each in enumerate(self._trained)
            }
        }


def _shape(parameter: Any) -> torch.Size:
    """Of the whole parameter."""
    found: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return found

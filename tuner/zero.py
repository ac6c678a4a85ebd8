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

from tuner.errors import GateError, RecipeError, nearest
from tuner.parallel import Parallel
from tuner.passes import in_one
from tuner.progress import silent

# Keys of DeepSpeed's configuration, and of a `tune` stage, which says the same.
SAID = {
    "train_batch_size": "batch_size", "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size", "gradient_clipping": "max_grad_norm", "optimizer": "optimizer",
    "scheduler": "decay", "fp16": "method.storage", "bf16": "method.storage",
}  # fmt: skip
# Those that say nothing of what is learned.
READ = (
    "zero_optimization", "zero_force_ds_cpu_optimizer", "prescale_gradients", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "comms_logger", "flops_profiler", "aio",
)  # fmt: skip
# Numbers that are summed at a time; DeepSpeed's own 500 million are 2 GB in each process.
BUCKET = 50_000_000
INSTALL = "pip install 'deepspeed>=0.19.8,<0.20'"
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
    for key, value in found.items():
        if key in SAID and not _says_nothing(key, value):
            raise RecipeError(f'launch.deepspeed: "{key}" is for the recipe to say (tune.{SAID[key]}); leave it out, or "auto"')
        if key not in SAID and key not in READ:
            raise RecipeError(f'launch.deepspeed: "{key}" is not read here{nearest(key, READ)}')
    zero = found.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise RecipeError(f"launch.deepspeed: zero_optimization: found {zero!r}, expected an object")
    zero = {"stage": 2, "reduce_bucket_size": BUCKET, **zero}
    if zero["stage"] not in (1, 2, 3):
        raise RecipeError(
            f"launch.deepspeed: zero_optimization.stage is {zero['stage']!r}, and 1, 2 and 3 split something; use ddp"
        )
    for part in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(part), dict) and zero[part].get("device") == "nvme":
            raise RecipeError(f"launch.deepspeed: {part}: nvme was not tried with checkpoints of a whole state; use cpu")
    _check(zero)
    return {**{name: found[name] for name in found if name in READ}, "zero_optimization": zero}


def _says_nothing(key: str, value: Any) -> bool:
    """As it stands in the usual files: half precision that is not switched on, an optimizer all of whose settings were "auto"."""
    if key in ("fp16", "bf16"):
        return isinstance(value, dict) and value.get("enabled") is not True
    return key in ("optimizer", "scheduler") and isinstance(value, dict) and not value.get("params")


def _check(zero: dict[str, Any]) -> None:
    """Raises RecipeError where DeepSpeed has no such settings, or is not there."""
    if find_spec("deepspeed") is None:
        raise RecipeError(f"launch.strategy: deepspeed needs a package that is not there: `{INSTALL}`")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:
        raise RecipeError(f"launch.deepspeed: zero_optimization: {' '.join(str(error).split())}") from None


def shares(launch: Any) -> tuple[int, int, int]:
    """Among how many processes weights, gradients and what the optimizer remembers are split."""
    if not launch.splits:
        return 1, 1, 1
    stage = 3 if launch.strategy == "fsdp" else settings(launch.deepspeed)["zero_optimization"]["stage"]
    weights, gradients, state = (launch.total if stage >= least else 1 for least in (3, 2, 1))
    return weights, gradients, state


def _not_auto(tree: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _not_auto(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in inner.items() if value != "auto"}


class Zero(Parallel):
    """One of several processes whose steps DeepSpeed makes."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self._given, self.sharded, self._read = given, True, _Read()

    def place(self, objective: Any) -> None:
        """The whole model goes on the device; it is split once it is known what is trained."""
        in_one(objective.model)
        objective.to(self.device)

    def remembering(self, optimizer: Any) -> Any:  # noqa: ARG002
        """What a checkpoint held of the optimizer stays in the processor's memory until it is split."""
        return self._read

    def joined(self, objective: Any, optimizer: Any, trained: Sequence[nn.Parameter], max_grad_norm: float) -> Any:
        """Split model and optimizer, with what it remembers. Raises RecipeError where DeepSpeed takes its configuration not."""
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError
        from deepspeed.runtime.zero.utils import ZeRORuntimeException

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, and gloo does without
        self._weights = self._given["zero_optimization"]["stage"] == 3
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
        except (ValueError, AssertionError, KeyError, RuntimeError, DeepSpeedConfigError, ZeRORuntimeException) as error:
            raise RecipeError(f"DeepSpeed does not take launch.deepspeed, or this model: {error}") from None
        if self._read.state:
            self._remember(optimizer, trained)
        return _Steps(self._engine, optimizer, trained)

    def _remember(self, optimizer: Any, trained: Sequence[nn.Parameter]) -> None:
        """Give each process its part of what a checkpoint held of every parameter."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        inside, step = self._engine.optimizer, next(iter(self._read.state.values()))["step"]
        for flat in inside.fp32_partitioned_groups_flat if self._weights else inside.single_partition_of_fp32_groups:
            optimizer.state[flat] = {name: torch.zeros_like(flat) for name in MOMENTS}
            optimizer.state[flat]["step"] = torch.as_tensor(step).to(flat.device, copy=True)
        if not self._weights:
            inside._lazy_init_hp_params_optimizer_state()
        for index, parameter in enumerate(trained):
            for name in MOMENTS:
                if (value := self._read.state.get(index, {}).get(name)) is None:
                    continue  # it had no gradient yet
                if not self._weights:
                    safe_set_full_optimizer_state(parameter, value, name)
                    continue
                # Parts are of one size, and the last is filled up.
                size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
                filled = torch.cat([value.flatten(), value.new_zeros(size * self.count - value.numel())])
                safe_set_local_optimizer_state(parameter, filled[self.index * size :][:size], name)
        self._read.state = {}

    def leave(self) -> None:
        """Let go of what DeepSpeed keeps, which would stay beside the next model."""
        from deepspeed.runtime.zero import parameter_offload

        self._engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()
        for parameter in self._engine.module.parameters():
            vars(parameter).pop("_z3_optimizer", None)
        del self._engine

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


class _Read:
    """Holds an optimizer's state as it was in a checkpoint."""

    def __init__(self) -> None:
        self.state: dict[int, dict[str, Any]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        self.state = found["state"]


class _Steps:
    """DeepSpeed's engine in the place of an optimizer, whose state is whole."""

    def __init__(self, engine: Any, optimizer: Any, trained: Sequence[nn.Parameter]) -> None:
        self._engine, self._optimizer, self._trained = engine, optimizer, trained
        self.param_groups = engine.optimizer.param_groups

    def step(self) -> None:
        """Raises GateError where DeepSpeed left the step out."""
        self._engine.step()
        if not self._engine.was_step_applied():
            raise GateError("the gradient is no number; a lower learning_rate usually helps")

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

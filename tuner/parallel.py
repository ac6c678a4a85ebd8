"""Processes that share the steps of one training: which rows each computes, sums over all of them, and weights that are split up.

With `ddp` each has the whole model. With `fsdp` each keeps a part of every block's weights and gathers them while the block
computes (Zhao et al. 2023, arXiv:2304.11277; torch's fully_shard); the numbers that are stored, checkpoints and results, are whole.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from tuner.errors import RecipeError
from tuner.passes import in_one
from tuner.processes import PATIENCE

Strategy = Literal["ddp", "fsdp", "deepspeed"]
T = TypeVar("T")
S = TypeVar("S")
# Numbers that are summed over the processes at a time.
BUCKET = 2**24


class Parallel:
    """This process among those that the launcher started; one by itself is the usual case."""

    def __init__(self, strategy: Strategy = "ddp", *, mixed: bool = False) -> None:
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
        )
        self.count, self.index = self._accelerator.num_processes, self._accelerator.process_index
        self.device = self._accelerator.device
        self.sharded, self.mixed = strategy == "fsdp" and self.count > 1, mixed

    @property
    def first(self) -> bool:
        """The one that says things and writes files."""
        return bool(self.index == 0)

    def products(self) -> AbstractContextManager[Any]:
        """A block in which a model in float32 multiplies in bfloat16, if it is to; a split one does so by itself."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed and not self.sharded)

    def place(self, objective: Any) -> None:
        """Put the model, or this process's part of it, on the device. Raises RecipeError where it has no blocks to split."""
        if not self.sharded:
            objective.to(self.device)
            return
        in_one(objective.model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from transformers.modeling_layers import GradientCheckpointingLayer

        mesh = init_device_mesh(self.device.type, (self.count,))
        marked = [each for each in objective.model.modules() if isinstance(each, GradientCheckpointingLayer)]
        # Of blocks within blocks only the inner ones.
        blocks = [
            each for each in marked if not any(isinstance(part, GradientCheckpointingLayer) for part in list(each.modules())[1:])
        ]
        if not blocks:
            raise RecipeError(f"launch.strategy: fsdp: {type(objective.model).__name__} has no blocks to split; use ddp")
        # Weights are gathered in bfloat16, gradients summed in float32.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.mixed else MixedPrecisionPolicy()
        for each in (*blocks, objective.model):
            fully_shard(each, mesh=mesh, mp_policy=policy)
            each.set_gradient_divide_factor(1.0)  # sums: the loop divides once, by what is learned in all rows
            each.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    def shares(self, rows: list[T], at_a_time: int) -> list[tuple[list[T], bool]]:
        """This process's micro-batches, and whether they count: of a split model all compute as often, so some compute in vain."""
        parts = [rows[at : at + at_a_time] for at in range(0, len(rows), at_a_time)]
        own = parts[self.index :: self.count]
        vain = math.ceil(len(parts) / self.count) - len(own) if self.sharded else 0
        return [(part, True) for part in own] + [(parts[0], False)] * vain

    def remembering(self, optimizer: Any) -> Any:
        """What a checkpoint's state of the optimizer is loaded into."""
        return optimizer

    def leave(self) -> None:
        """All steps are made, and what was trained is written."""

    def joined(self, objective: Any, optimizer: Any, trained: Sequence[nn.Parameter], max_grad_norm: float) -> Any:  # noqa: ARG002
        """What makes the steps: the optimizer, unless something stands in front of it."""
        return optimizer

    def loss(self, objective: Any, batch: Any) -> Tensor:
        """The sum over all that is learned in a batch, ready to learn from."""
        found: Tensor = objective(batch)
        return found

    def learn(self, loss: Tensor, *, last: bool) -> None:  # noqa: ARG002
        """Add to the gradients; the `last` is the last of this step."""
        loss.backward()  # type: ignore[no-untyped-call]

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """What of a gradient is in this process."""
        return None if parameter.grad is None else own(parameter.grad)

    def clip(self, trained: Iterable[nn.Parameter], max_grad_norm: float) -> None:
        """Scale the gradients of all together down to this norm."""
        nn.utils.clip_grad_norm_(trained, max_grad_norm)

    def add_up(self, total: float, trained: Iterable[nn.Parameter]) -> float:
        """Leave the sum of all processes' gradients in the parameters of each, and return the sum of their losses."""
        if self.count == 1:
            return total
        if not self.sharded:
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            for grads in _buckets([parameter.grad for parameter in trained if parameter.grad is not None]):
                flat = torch.cat([grad.flatten() for grad in grads])
                torch.distributed.all_reduce(flat)
                for grad, part in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
                    grad.copy_(part.view_as(grad))
        return self._reduced(total, torch.distributed.ReduceOp.SUM)

    @contextmanager
    def apart(self, step: int, seed: int) -> Iterator[None]:
        """A block in which each process draws by itself, such as what dropout leaves out; after it all go on as if none had.

        What they draw follows from the seed, the step and the process alone, so a resume needs no state of each.
        """
        if self.count == 1:
            yield
            return
        common = torch.get_rng_state()
        torch.manual_seed((seed * 1_000_003 + step + 2**40 * (self.index + 1)) % 2**63)
        yield
        torch.set_rng_state(common)

    def same(self, number: int, what: str) -> None:
        """Raises RecipeError where the processes do not have the same number."""
        if self.least(number) != -self.least(-number):
            raise RecipeError(f"the processes have different {what}; they need the run's directory (--out) in common")

    def least(self, number: int) -> int:
        """The smallest of what the processes have."""
        return int(self._reduced(number, torch.distributed.ReduceOp.MIN)) if self.count > 1 else number

    def any(self, flags: list[bool]) -> list[bool]:
        """Each flag is raised where any process raises it."""
        if self.count == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
        return [bool(each) for each in raised.tolist()]

    def told(self, what: T) -> T:
        """What the first process has to say, to all."""
        if self.count == 1:
            return what
        listed = [what]
        torch.distributed.broadcast_object_list(listed)
        return listed[0]

    def prepared(self, objective: Any, examples: Sequence[Any], at_a_time: int) -> Sequence[Any]:
        """The examples with what the model says of them before it is trained."""
        with self.products():
            found: Sequence[Any] = objective.prepared(examples, at_a_time, self)
        if again := getattr(objective.model, "reshard", None):
            again()  # without a backward pass fully_shard leaves what lies outside of the blocks put together
        return found

    def shared(self, work: Callable[[list[T]], list[S]], given: list[T]) -> list[S]:
        """What `work` makes of each of those given, some in each process: as many in all, since a split model is gathered."""
        if self.count == 1 or not given:
            return work(given)
        most = math.ceil(len(given) / self.count)
        own = [given[min(at, len(given) - 1)] for at in range(self.index, most * self.count, self.count)]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, work(own))
        return [each for turn in zip(*found, strict=True) for each in turn][: len(given)]

    def _reduced(self, number: float, operation: Any) -> float:
        tensor = torch.tensor(number, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor, operation)
        return float(tensor)


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type together, up to BUCKET numbers: many small sums take long, and one of all takes memory."""
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        bucket: list[Tensor] = []
        for grad in (each for each in grads if each.dtype == dtype):
            if bucket and sum(each.numel() for each in bucket) + grad.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(grad)
        yield bucket


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may have a part. Where it has, every process has to ask."""
    if hasattr(tensor, "ds_id") and hasattr(tensor, "ds_shape"):  # DeepSpeed's marks on what it split
        from deepspeed.utils import safe_get_full_fp32_param

        found: Tensor = safe_get_full_fp32_param(tensor).view(tensor.ds_shape)
        return found
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def part_of(value: Tensor, parameter: Any) -> Tensor:
    """The part of a whole value that belongs to this process, as it is split in the parameter."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    found: Tensor = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return found


def own(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found

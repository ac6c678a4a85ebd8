"""The training loop, on accelerate: exact normalization, a gradient for every layer, and a resume that changes no bit."""

import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from tuner.bundle import write_json
from tuner.data.order import plan
from tuner.errors import GateError, Interrupted, RecipeError, disk_errors
from tuner.progress import say, track


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    batch_size: int
    """Rows an optimizer step learns from."""
    micro_batch_size: int
    """Rows in memory at a time; any divisor gives the same result in exact arithmetic."""
    learning_rate: float
    warmup_fraction: float
    decay: Literal["cosine", "linear", "constant"]
    weight_decay: float
    max_grad_norm: float
    checkpoint_every_steps: int
    seed: int

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step 0 .. steps-1: linear warm-up, then the decay."""
        warmup = max(1, round(self.warmup_fraction * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.decay]
        return self.learning_rate * factor


def fit(
    objective: Any, examples: list[Any], schedule: Schedule, *, layers: dict[str, list[nn.Parameter]], work: Path
) -> dict[str, Any]:
    """Train `objective.model` in place and return what was measured. Checkpoints in `work` are picked up by the same call again.

    `objective` is a task's: `collate` makes a batch of examples, and its forward the sum of their losses.
    Raises GateError where a layer gets no gradient or the loss is no number, Interrupted (after saving) on SIGINT and SIGTERM.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.num_processes > 1:
        raise RecipeError(f"{accelerator.num_processes} processes were started; this version trains in one")
    torch.manual_seed(schedule.seed)
    model = objective.model
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    loss_sum, optimizer = accelerator.prepare(objective, optimizer)
    state = _resume(work, trained, optimizer) or {"step": 0, "tokens": 0, "supervised": 0, "seconds": 0.0, "losses": []}
    if state["step"]:
        say(f"continuing at step {state['step']} of {schedule.steps}")
    model.train()
    first, order = state["step"], _Order(examples, schedule)
    with _signals() as stop, track("training", schedule.steps, done=first) as advance:
        for step in range(first, schedule.steps):
            started = time.monotonic()
            rows = [examples[index] for index in order.rows(step)]
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            # The sum over all micro-batches is divided once, by their common count: a mean of means would weigh a token by
            # how few others it shares its micro-batch with.
            supervised = sum(row.supervised for row in rows)
            total = 0.0
            for at in range(0, len(rows), schedule.micro_batch_size):
                loss = loss_sum(objective.collate(rows[at : at + schedule.micro_batch_size], accelerator.device))
                accelerator.backward(loss / supervised)
                total += loss.item()
            if not math.isfinite(total):
                raise GateError(f"the loss is {total} at step {step + 1}; a lower learning_rate usually helps")
            if step == first:
                _require_gradients(layers)
            accelerator.clip_grad_norm_(trained.values(), schedule.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.monotonic() - started
            state["step"] = step + 1
            state["tokens"] += sum(len(row.ids) for row in rows)
            state["supervised"] += supervised
            state["seconds"] += seconds
            state["losses"].append(total / supervised)
            advance(note=f"loss {total / supervised:.3f}  {sum(len(row.ids) for row in rows) / seconds:.0f} tokens/s")
            if stop or (step + 1) % schedule.checkpoint_every_steps == 0:
                _checkpoint(work, trained, optimizer, state)
            if stop:
                raise Interrupted(f"stopped at step {step + 1} of {schedule.steps}; the same command continues there")
    model.eval()
    tenth = max(1, schedule.steps // 10)
    return {
        "steps": schedule.steps,
        "tokens": state["tokens"],
        "supervised_tokens": state["supervised"],
        "tokens_per_s": round(state["tokens"] / state["seconds"], 1),
        "seconds": round(state["seconds"], 1),
        "train_loss_first": round(sum(state["losses"][:tenth]) / tenth, 4),
        "train_loss_last": round(sum(state["losses"][-tenth:]) / tenth, 4),
    }


class _Order:
    """Which rows an optimizer step learns from: a function of the seed and the step alone, so a resume needs no state."""

    def __init__(self, examples: list[Any], schedule: Schedule) -> None:
        self._lengths = [len(each.ids) for each in examples]
        self._schedule = schedule
        self._epoch, self._batches = -1, [[0]]

    def rows(self, step: int) -> list[int]:
        """Indices for optimizer step 0, 1, ..."""
        epoch, within = divmod(step, math.ceil(len(self._lengths) / self._schedule.batch_size))
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, plan(self._lengths, self._schedule.batch_size, self._schedule.seed, epoch)
        return self._batches[within]


def _require_gradients(layers: dict[str, list[nn.Parameter]]) -> None:
    """Raises GateError that names the layers whose parameters all have a zero or no gradient."""
    dead = [
        name
        for name, parameters in layers.items()
        if not any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters)
    ]
    if dead:
        shown = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
        raise GateError(f"{len(dead)} of {len(layers)} trained layers get no gradient, so they would learn nothing: {shown}")


def _checkpoint(work: Path, trained: dict[str, nn.Parameter], optimizer: Any, state: dict[str, Any]) -> None:
    """Write everything that the next step depends on into `work`, replacing the last checkpoint only once this one is whole."""
    target = work / f"step-{state['step']:08d}"
    partial = work / "partial"
    with disk_errors(work):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: parameter.detach().contiguous() for name, parameter in trained.items()}, partial / "trained.safetensors")
        moments = {
            f"{index}.{key}": value for index, entry in optimizer.state_dict()["state"].items() for key, value in entry.items()
        }
        generators = {"random.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators |= {f"random.cuda{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
        save_file({**moments, **generators}, partial / "optimizer.safetensors")
        write_json(partial / "state.json", state)
        for file in partial.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        partial.rename(target)
    for old in work.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def _resume(work: Path, trained: dict[str, nn.Parameter], optimizer: Any) -> dict[str, Any] | None:
    """Load the newest checkpoint in `work`, if there is one, and return its counters."""
    import json

    found = sorted(work.glob("step-*"))
    if not found:
        return None
    saved = load_file(found[-1] / "trained.safetensors")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    moments = load_file(found[-1] / "optimizer.safetensors")
    torch.set_rng_state(moments.pop("random.cpu"))
    for name in sorted(name for name in moments if name.startswith("random.cuda")):
        torch.cuda.set_rng_state(moments.pop(name), int(name.removeprefix("random.cuda")))
    entries: dict[int, dict[str, Any]] = {}
    for name, value in moments.items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
    state: dict[str, Any] = json.loads((found[-1] / "state.json").read_text())
    return state


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that gets the signal's number on the first SIGINT or SIGTERM; the second one acts as usual."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is Python's
        received.append(number)
        say("stopping after this step; once more stops at once")
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

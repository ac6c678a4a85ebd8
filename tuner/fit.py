"""The training loop, on accelerate: exact normalization, a gradient for every layer, and a resume that changes no bit."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn

from tuner import fused, optimizers, processes, resume
from tuner.data.order import plan
from tuner.errors import GateError, Interrupted, RecipeError
from tuner.memory import held, peak, ran_out, room, tidy
from tuner.objective import Objective
from tuner.parallel import Parallel, Strategy
from tuner.progress import say, track


@dataclass(frozen=True)
class Watch:
    """Held-out rows that are measured while training goes on; the weights that did best are kept."""

    measure: Callable[[], dict[str, float]]
    """What there is to say of the model now, by name."""
    by: str
    """The name that decides. Of a loss less is better, of anything else more."""
    every_steps: int
    patience: int | None
    """Stop after so many measurements without a better one."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    batch_size: int
    """Rows an optimizer step learns from."""
    micro_batch_size: int
    """Rows in memory at a time, at most; any number gives the same result in exact arithmetic."""
    learning_rate: float
    warmup_fraction: float
    decay: Literal["cosine", "linear", "constant"]
    weight_decay: float
    max_grad_norm: float
    checkpoint_every_steps: int
    seed: int
    optimizer: optimizers.Name = "adamw"
    strategy: Strategy = "ddp"
    """What several processes do with the weights: each has all of them, or a part."""
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's configuration (tuner/zero.py), where it makes the steps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products of float32 weights; `bf16` is mixed precision (Micikevicius et al. 2018, arXiv:1710.03740)."""

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step 0 .. steps-1: linear warm-up, then the decay."""
        warmup = max(1, round(self.warmup_fraction * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.decay]
        return self.learning_rate * factor


def fit(
    objective: Objective,
    examples: Sequence[Any],
    schedule: Schedule,
    *,
    layers: dict[str, list[nn.Parameter]],
    work: Path,
    watch: Watch | None = None,
    expected: int | None = None,
) -> dict[str, Any]:
    """Train `objective.model` in place and return what was measured. Checkpoints in `work` are picked up by the same call again.

    The first step is on the largest batch. Where it runs out of memory it is tried again with half as many rows at a time, and
    what it took is said beside what was `expected` (bytes, beside what is held now).
    Processes that accelerate started share each step: the result is that of one process, up to the order of float sums.
    Raises GateError where a layer gets no gradient or the loss is no number, Interrupted (after saving) on SIGINT and SIGTERM,
    RecipeError where memory runs out.
    """
    parallel = among(schedule)
    micro_batch_size = parallel.least(min(schedule.micro_batch_size, math.ceil(schedule.batch_size / parallel.count)))
    torch.manual_seed(schedule.seed)
    names = {parameter: name for name, parameter in objective.model.named_parameters()}
    parallel.place(objective)
    objective.eval()
    earlier = resume.counters(work) or {"processes": 0}
    # As many at a time as at the first start: other batches are rounded otherwise.
    asked_rows = min(micro_batch_size, earlier["asked_rows"] if earlier["processes"] == parallel.count else micro_batch_size)
    examples = parallel.prepared(objective, examples, asked_rows)
    trained = {name: parameter for name, parameter in objective.model.named_parameters() if parameter.requires_grad}
    layers = {layer: [trained[names[each]] for each in parameters] for layer, parameters in layers.items()}
    optimizer = optimizers.optimizer(
        schedule.optimizer, list(trained.values()), learning_rate=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    torch.manual_seed(schedule.seed)
    fresh = {"step": 0, "tokens": 0, "supervised": 0, "seconds": 0.0, "losses": [], "watched": [], "peak": None}
    expected = expected and expected + held()
    state: dict[str, Any] = resume.load(work, trained, parallel.remembering(optimizer)) or {**fresh, "processes": 0}
    optimizer = parallel.joined(objective, optimizer, list(trained.values()), schedule.max_grad_norm)
    parallel.same(state["step"], "checkpoints")
    if state["processes"] == parallel.count:
        # With another one, sums would be rounded otherwise than before; less memory than before is another matter.
        micro_batch_size = min(micro_batch_size, state["micro_batch_size"])
    state |= {"processes": parallel.count, "micro_batch_size": micro_batch_size, "asked_rows": asked_rows}
    if state["step"]:
        say(f"continuing at step {state['step']} of {schedule.steps}")
    if watch and not state["step"] and (parallel.first or parallel.sharded):
        # Before the first step: a name that is not measured stops a run that would have been for nothing.
        say(f"before training, held out: {_figures(watch)[1]}")
    objective.train()
    first, order = state["step"], _Order(examples, schedule, objective.least_rows, passes=objective.passes and not parallel.sharded)
    with _signals() as stop, peak() as most, track("training", schedule.steps, done=first) as advance:
        for step in range(first, schedule.steps):
            if watch and _worn_out(state["watched"], watch):
                break  # all have been told the same
            started = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            given = [examples[index] for index in order.rows(step)]
            while True:
                generator = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
                try:
                    with parallel.products():
                        rows = objective.begin(given, micro_batch_size)
                    supervised = sum(row.supervised for row in rows)
                    with parallel.apart(step, schedule.seed):
                        loss = _accumulate(objective, rows, micro_batch_size, supervised, parallel, list(trained.values()))
                    break
                except (RuntimeError, MemoryError) as error:
                    if not ran_out(error):
                        raise
                    fused.forget()
                    alone = parallel.count == 1  # others would be in the middle of the step
                    micro_batch_size = _fewer(micro_batch_size, step, first=step == 0 and alone)
                state["micro_batch_size"] = micro_batch_size
                optimizer.zero_grad()
                torch.set_rng_state(generator[0])
                torch.cuda.set_rng_state_all(generator[1])
            if not math.isfinite(loss):
                raise GateError(f"the loss is {loss} at step {step + 1}; a lower learning_rate usually helps")
            if step == first:
                _require_gradients(layers, parallel)
            if step == 0 and expected and (now := most()):
                # What the optimizer remembers is there from the next step on.
                state["expected"], now = expected, now + optimizers.state_bytes(schedule.optimizer, trained.values())
                say(
                    f"memory: the largest step takes {now / 1e9:.2f} GB, {expected / 1e9:.2f} were expected; "
                    f"{min(micro_batch_size, len(rows))} rows at a time, {room()[0] / 1e9:.1f} GB are left"
                )
            tidy()
            parallel.clip(trained.values(), schedule.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.monotonic() - started
            tokens = sum(len(row.ids) for row in rows)
            state["step"] = step + 1
            state["tokens"] += tokens
            state["supervised"] += supervised
            state["seconds"] += seconds
            state["losses"].append(loss)
            state["peak"] = max(filter(None, (state["peak"], most())), default=None)
            advance(note=f"loss {loss:.3f}  {tokens / seconds:.0f} tokens/s")
            if watch and ((step + 1) % watch.every_steps == 0 or step + 1 == schedule.steps):
                _look(watch, objective, state, work, trained, parallel)
            (stopping,) = parallel.any([bool(stop)])
            if stopping or (step + 1) % schedule.checkpoint_every_steps == 0:
                resume.save(work, trained, optimizer, state, writes=parallel.first)
            if stopping:
                raise Interrupted(f"stopped at step {step + 1} of {schedule.steps}; the same command continues there")
    measured = _measured(state)
    if watch and state["watched"]:
        resume.load_best(work, trained)
        best = _best(state["watched"], watch)
        early = f"; stopped early, {schedule.steps} were meant" if state["step"] < schedule.steps else ""
        say(f"kept: step {best['step']} of {state['step']}, {watch.by} {best[watch.by]:.4g}{early}")
        measured |= {"watched": state["watched"], "kept_step": best["step"]}
    if parallel.sharded:  # the model is of no use outside: whoever opens another one finds its weights here
        resume.save_best(work, trained, writes=parallel.first)
    parallel.leave()
    objective.eval()
    return measured


def among(schedule: Schedule) -> Parallel:
    """This process among those that share the schedule's steps."""
    if schedule.strategy == "deepspeed" and processes.started():
        from tuner.zero import Zero

        return Zero(schedule.deepspeed or {})
    return Parallel(schedule.strategy, mixed=schedule.precision == "bf16")


def _accumulate(
    objective: Objective, rows: list[Any], micro_batch_size: int, supervised: float, parallel: Parallel, trained: list[Any]
) -> float:
    """Leave the gradient of the mean loss of all rows in the parameters, and return that mean.

    The sum over all micro-batches and processes is divided once, by their common count: a mean of means would weigh a token
    by how few others it shares its micro-batch with.
    """
    total = 0.0
    shares = parallel.shares(rows, micro_batch_size)
    for number, (part, counts) in enumerate(shares, 1):
        batch = objective.collate(part, parallel.device)
        with parallel.products():
            loss = parallel.loss(objective, batch)
        parallel.learn(loss * (counts / supervised), last=number == len(shares))
        total += loss.item() * counts
    return parallel.add_up(total, trained) / supervised


def _fewer(rows: int, step: int, *, first: bool) -> int:
    """Half as many rows at a time. Raises RecipeError where that is no way out."""
    free, where = room()
    if not first or rows == 1:
        advice = "`micro_batch_size` takes fewer rows at a time" if rows > 1 else "a smaller task.max_tokens takes less"
        raise RecipeError(
            f"memory ran out in step {step + 1} with {rows} rows at a time: {max(free, 0) / 1e9:.2f} GB are left of {where}; "
            f"{advice}, and so does gradient_checkpointing: true"
        ) from None
    say(f"memory ran out with {rows} rows at a time, and {free / 1e9:.2f} GB are left of {where}: {-(-rows // 2)} from here on")
    return -(-rows // 2)


def _look(
    watch: Watch, objective: Objective, state: dict[str, Any], work: Path, trained: dict[str, nn.Parameter], parallel: Parallel
) -> None:
    """Measure held-out rows, say so, and keep the weights where they are the best so far."""
    figures: dict[str, float] = {}
    if parallel.first or parallel.sharded:
        objective.eval()
        figures, said = _figures(watch)
        objective.train()
        say(f"step {state['step']}: train loss {state['losses'][-1]:.4g}; held out: {said}")
    state["watched"].append({"step": state["step"], **parallel.told(figures)})
    if _best(state["watched"], watch)["step"] == state["step"]:
        resume.save_best(work, trained, writes=parallel.first)


def _figures(watch: Watch) -> tuple[dict[str, float], str]:
    """What is measured now, and how to say it."""
    with torch.compiler.set_stance("force_eager"):  # answers grow token by token, and each length would be compiled
        figures = watch.measure()
    if watch.by not in figures:
        raise GateError(f'watch.by is "{watch.by}", and what is measured is {", ".join(figures)}')
    return figures, ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _best(watched: list[dict[str, Any]], watch: Watch) -> dict[str, Any]:
    """The best measurement; of two that are as good that with the lower loss, then the first."""
    sign = 1 if watch.by.endswith("loss") else -1
    return min(watched, key=lambda each: (sign * each[watch.by], each.get("heldout_loss", 0.0)))


def _worn_out(watched: list[dict[str, Any]], watch: Watch) -> bool:
    return bool(watched and watch.patience and len(watched) - 1 - watched.index(_best(watched, watch)) >= watch.patience)


def _measured(state: dict[str, Any]) -> dict[str, Any]:
    tenth = max(1, state["step"] // 10)
    return {
        "steps": state["step"],
        "tokens": state["tokens"],
        "supervised_tokens": state["supervised"],
        "tokens_per_s": round(state["tokens"] / state["seconds"], 1),
        "seconds": round(state["seconds"], 1),
        "peak_memory_bytes": state["peak"],
        "expected_memory_bytes": state.get("expected"),
        "micro_batch_size": state["micro_batch_size"],
        "train_loss_first": round(sum(state["losses"][:tenth]) / tenth, 4),
        "train_loss_last": round(sum(state["losses"][-tenth:]) / tenth, 4),
    }


class _Order:
    """Which rows an optimizer step learns from: a function of the seed and the step alone, so a resume needs no state."""

    def __init__(self, examples: Sequence[Any], schedule: Schedule, least_rows: int, *, passes: bool) -> None:
        self._lengths = getattr(examples, "lengths", None) or [len(each.ids) for each in examples]
        self._schedule, self._least = schedule, least_rows
        self._batches = plan(self._lengths, schedule.batch_size, schedule.seed, 0, least_rows, passes=passes)
        self._epoch = 0

    def rows(self, step: int) -> list[int]:
        """Indices for optimizer step 0, 1, ..."""
        epoch, within = divmod(step, len(self._batches))  # as many in every epoch
        if epoch != self._epoch:
            size, seed = self._schedule.batch_size, self._schedule.seed
            self._epoch, self._batches = epoch, plan(self._lengths, size, seed, epoch, self._least)
        return self._batches[within]


def _require_gradients(layers: dict[str, list[nn.Parameter]], parallel: Parallel) -> None:
    """Raises GateError that names the layers whose parameters all have a zero or no gradient."""
    alive = parallel.any(
        [
            any((gradient := parallel.gradient(parameter)) is not None and bool(gradient.any()) for parameter in parameters)
            for parameters in layers.values()
        ]
    )
    dead = [name for name, learns in zip(layers, alive, strict=True) if not learns]
    if dead:
        shown = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
        raise GateError(f"{len(dead)} of {len(layers)} trained layers get no gradient, so they would learn nothing: {shown}")


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

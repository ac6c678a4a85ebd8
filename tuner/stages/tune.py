"""Fine-tune (or pretrain) a model: a task says what is learned, a method says which weights learn it."""

import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from tuner import kinds, optimizers
from tuner.bundle import Bundle, Manifest
from tuner.errors import DataError, GateError, RecipeError, nearest
from tuner.families import family_of
from tuner.kinds import Options as BaseOptions
from tuner.stages import Job
from tuner.tasks import fits, labels_of

if TYPE_CHECKING:
    from tuner.fit import Schedule
    from tuner.plan import Plan, Step

TAKES = frozenset({"model"})
# Also of the task, the method and the loop.
VERSION = 13
RESULT = "tuned"
# The same sums in the same types on the same machine: what is saved loses nothing (nats, or components of vectors).
REOPENED_TOLERANCE = 1.0e-3


class Gate(BaseOptions):
    """What training must have achieved."""

    heldout_loss_drop: float = 0.0
    """Held-out loss must be below the untrained model's (with a new head: that head's) by more than this (nats a token)."""


class Watch(BaseOptions):
    """How held-out rows are measured while training goes on. What is chosen by them is measured on them too kindly."""

    every_steps: int = Field(50, gt=0)
    """Optimizer steps between two measurements; there is one at the end, too."""
    by: str = "heldout_loss"
    """What decides which weights are kept: `heldout_loss`, or one of the task's scores, such as `accuracy`."""
    patience: int | None = Field(None, gt=0)
    """Stop after this many measurements without a better one; never by default."""


class Options(BaseOptions):
    """Keys of `- tune:`."""

    task: kinds.choice("tasks")  # type: ignore[valid-type]
    """What is learned: a file in tuner/tasks."""
    method: kinds.choice("methods", "lora") = kinds.load("methods", "lora").Options()  # type: ignore[valid-type]
    """Which weights learn it: a file in tuner/methods."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps; give this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training rows; 1 where neither is given."""
    batch_size: int = Field(8, gt=0)
    """Rows an optimizer step learns from."""
    micro_batch_size: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """Rows in memory at a time; `auto` takes all of `batch_size`, or the fewest parts of it that fit. It changes no loss."""
    learning_rate: float = Field(5.0e-4, gt=0)
    """Peak learning rate. LoRA wants about ten times what full tuning does."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Part of the steps in which the rate rises from zero."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after that."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are scaled down to this length."""
    optimizer: optimizers.Name = "adamw"
    """`adamw-8bit` keeps a quarter of AdamW's state, `adafactor` hardly any; `-paged` lets a GPU move it to the host's memory."""
    gradient_checkpointing: bool = False
    """Compute each block twice instead of keeping what is inside it: a third slower, much less memory."""
    compile: bool = False
    """Fuse what lies between products (torch.compile): a GPU is up to a seventh faster after a minute, a CPU hardly. Wants g++."""
    watch: Watch | None = None
    """Measure held-out rows while training, keep the best weights, stop when nothing gets better."""
    checkpoint_every_steps: int = Field(50, gt=0)
    """How much can be lost to a power cut."""
    gate: Gate = Gate()

    @model_validator(mode="after")
    def _one_length(self) -> "Options":
        if self.steps and self.epochs:
            raise ValueError("steps and epochs both say how long to train; give one (`epochs: null` takes the other away)")
        if self.micro_batch_size != "auto" and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self


def gives(options: Options) -> str:
    """An adapter or a model, as the method says."""
    return str(kinds.load("methods", options.method.kind).GIVES)


def check(plan: "Plan", step: "Step") -> None:
    """Raises RecipeError where the model lacks the task's head, is too short for its rows, or the method would train nothing."""
    options, place = step.options, ("stages", step.index, "tune")
    if options.watch and not plan.recipe.data.holds_out:
        raise plan.recipe.error("there are no held-out rows to watch; name some with data.heldout", *place, "watch")
    if options.watch:
        names = ["heldout_loss", *kinds.load("tasks", options.task.kind).scored(options.task, plan.recipe.evaluate)]
        if options.watch.by not in names:
            message = f'"{options.watch.by}" is not measured{nearest(options.watch.by, names)}'
            raise plan.recipe.error(message, *place, "watch", "by")
    head, heads = kinds.load("tasks", options.task.kind).HEAD, plan.family.heads - plan.architecture.lacks
    if head not in heads:
        fitting = [name for name in kinds.names("tasks") if kinds.load("tasks", name).HEAD in heads]
        message = (
            f"{options.task.kind} needs a {head} head, which {plan.facts.model_type} has not; tasks for it are {', '.join(fitting)}"
        )
        raise plan.recipe.error(message, *place, "task")
    if getattr(options.task, "packing", False) and (why := plan.architecture.not_packed):
        raise plan.recipe.error(f"packing is not for {plan.facts.model_type}: {why}", *place, "task", "packing")
    most = plan.facts.max_tokens
    if most and options.task.max_tokens > most:
        message = f"max_tokens {options.task.max_tokens} is more than the {most} that {plan.facts.model_type} reads"
        raise plan.recipe.error(message, *place, "task", "max_tokens")
    if (count := plan.recipe.launch.total) > options.batch_size:
        message = f"{count} processes share a step of {options.batch_size} rows, so some would have none"
        raise plan.recipe.error(message, *place, "batch_size")
    if plan.recipe.launch.splits:
        strategy = plan.recipe.launch.strategy
        parts = _zero(plan.recipe)["zero_optimization"]["stage"] if strategy == "deepspeed" else 0
        storage = kinds.load("methods", options.method.kind).storage(options.method)
        asks_first = getattr(kinds.load("tasks", options.task.kind), "asks_first", None)
        for key, used, instead in (
            ("watch", options.watch is not None, "ddp measures while it trains"),
            ("optimizer", options.optimizer != "adamw", "use adamw, whose state is split as well"),
            ("method", parts > 0 and getattr(options.method, "precision", "fp32") == "bf16", "use ddp or fsdp"),
            ("method", storage == "int8", "use bf16" if parts == 3 else "use nf4 or bf16"),
            ("method", storage == "nf4" and parts == 3, "ZeRO's stage 2 and fsdp take weights of 4 bits"),
            ("compile", options.compile, "leave it out"),
            (
                "task",
                parts == 3 and asks_first and asks_first(options.task),
                "it asks the model before a step; use stage 2 or fsdp",
            ),
        ):
            if used:
                raise plan.recipe.error(f"with launch.strategy: {strategy} this does not work; {instead}", *place, key)
    compiler = os.environ.get("CXX") or "g++"
    if options.compile and not shutil.which(compiler):
        message = f"compile wants a compiler for C++, and {compiler} is not there; install it, or name one in CXX"
        raise plan.recipe.error(message, *place, "compile")
    _check_labels(plan, step, head)
    for part, check_part, given in (
        ("task", getattr(kinds.load("tasks", options.task.kind), "check", None), plan.facts),
        ("method", kinds.load("methods", options.method.kind).check, plan),
    ):
        try:
            if check_part is not None:
                check_part(getattr(options, part), given)
        except RecipeError as error:
            raise plan.recipe.error(str(error), *place, part) from None


def _check_labels(plan: "Plan", step: "Step", head: str) -> None:
    """Raises RecipeError where the model tells the same labels apart in another order: its scores would change places."""
    from tuner.data.dataset import tasks_of

    earlier = tasks_of(plan.recipe, step.index - 1)[-1:] if step.index else []
    if earlier and head == kinds.load("tasks", earlier[0].kind).HEAD:
        _same_order(plan.recipe, step.index, getattr(earlier[0], "labels", []))
    elif not earlier and plan.facts.head == head:
        _same_order(plan.recipe, step.index, list(plan.facts.labels))


def _same_order(recipe: Any, index: int, own: list[str]) -> None:
    wanted = getattr(recipe.stages[index][1].task, "labels", [])
    if own != wanted and sorted(own) == sorted(wanted):
        message = f"the model's head has these labels in another order; write labels: [{', '.join(own)}]"
        raise recipe.error(message, "stages", index, "tune", "task", "labels")


def decided_by(options: Options, parent: Bundle | None) -> str | None:  # noqa: ARG001 - a stage's common signature
    """Held-out rows decide which weights are kept, by this figure."""
    return options.watch.by if options.watch else None


def run(job: Job) -> Manifest:
    """Encode the data, train, save what was trained, and see that it answers when it is opened again."""
    from tuner import processes
    from tuner.checkpoint import copy_generation_config

    processes.call(job)
    options: Any = job.options
    assert job.parent is not None
    task, method = kinds.load("tasks", options.task.kind), kinds.load("methods", options.method.kind)
    model, tokenizer, head, training, data = train(job)
    answers, effect = _answers(job, task, model, tokenizer)
    method.save(model, job.folder)
    tokenizer.save_pretrained(job.folder)
    copy_generation_config(model, job.parent.path, job.folder)
    manifest = _manifest(job, task, method, head, data=data, metrics={"training": training | effect})
    del model  # one in memory at a time
    manifest.metrics["training"]["reopened"] = _reopened(Bundle(job.folder, manifest), method, answers)
    return manifest


def train(job: Job) -> tuple[Any, Any, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(the trained model, its tokenizer, facts of its head, figures of the training, figures of its data).

    Of several processes each calls this, and the first goes on with the result.
    """
    import torch

    from tuner import fused
    from tuner.checkpoint import device, load_tokenizer
    from tuner.data.dataset import training_examples
    from tuner.data.packing import PackedRows
    from tuner.fit import fit
    from tuner.processes import first, sharing
    from tuner.progress import say

    options: Any = job.options
    assert job.parent is not None
    base = job.parent
    task, method = kinds.load("tasks", options.task.kind), kinds.load("methods", options.method.kind)
    tokenizer = load_tokenizer(base.path)
    examples, data = training_examples(job.recipe, options.task, tokenizer)
    if not examples:
        raise DataError(f"{data['path']}: no row is left to train on ({data['skipped_rows']} were left out)")
    counts = f"{data['rows']} rows, {data['tokens']} tokens, {data['supervised_tokens']:.12g} supervised"
    say(f"{counts}; {data['skipped_rows']} rows left out, {data['cut_rows']} cut")
    for remark in getattr(task, "told", lambda *_: [])(tokenizer, options.task, data["shapes"]):
        say(remark)
    for remark in getattr(task, "unseen", lambda *_: [])(examples, options.task):
        say(remark)
    torch.manual_seed(job.recipe.seed)
    model, head = _model(job, tokenizer)
    layers = method.layers(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    say(f"{options.method.kind}: {len(layers)} layers, {trained:,} parameters are trained on {device()}")
    objective = task.objective(model, tokenizer, options.task)
    watch = _watch(job, task, objective, tokenizer) if options.watch else None
    untrained = {}
    if first() and not fits(base, options.task):
        untrained = {"heldout_loss_before": _loss_now(job, objective, tokenizer)}
    rows: Any = examples
    if getattr(options.task, "packing", False):
        rows = PackedRows(examples, options.task.max_tokens)
        data |= {"packed_rows": len(rows), "padding": round(rows.padding, 4)}
        say(
            f"packed: {len(examples)} documents in {len(rows)} rows of {options.task.max_tokens} tokens, {rows.padding:.1%} padding"
        )
    schedule, expected = _within_memory(job, objective, rows, _schedule(options, len(rows), job.recipe))
    with fused.compiled(model) if options.compile else nullcontext(), sharing():
        measured = fit(objective, rows, schedule, layers=layers, work=job.work, watch=watch, expected=expected)
    training = {**measured, **untrained, "layers": len(layers), "trained_parameters": trained}
    if first() and job.recipe.launch.splits:
        from tuner import resume

        # Of the one that was trained this process has a part.
        del model, objective, watch, layers
        torch.manual_seed(job.recipe.seed)
        model, _ = _model(job, tokenizer)
        resume.load_best(job.work, {name: each for name, each in model.named_parameters() if each.requires_grad})
        model.eval()
    return model, tokenizer, head, training, data


def _manifest(job: Job, task: Any, method: Any, head: dict[str, Any], **rest: Any) -> Manifest:
    """Of what was saved: a model that anything can open, or an adapter that needs its base."""
    from tuner.source import describe_model, versions

    options, base = job.options, job.parent
    assert base is not None
    _, architecture = family_of(str(base.manifest.model_type))
    serving = {
        **method.serving(options.method, architecture, new_tokens="new_tokens" in base.manifest.serving),
        **(task.serving(options.task) if hasattr(task, "serving") else {}),
        **head,
    }
    if task.HEAD != "causal":
        serving.pop("live_adapter", None)
    rest |= {"stage": "tune", "fingerprint": job.fingerprint, "recipe": job.told(), "serving": serving}
    if method.GIVES == "model":
        if describe := getattr(kinds.load("heads", task.HEAD), "describe", None):
            describe(job.folder, serving)
        return describe_model(job.folder, **rest)
    return Manifest(
        kind=method.GIVES,
        family=base.manifest.family,
        head=task.HEAD,
        model_type=base.manifest.model_type,
        base=os.path.relpath(base.path.resolve(), job.folder.resolve()),
        versions=versions(),
        **rest,
    )


def _model(job: Job, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """The base as the method trains it, and what whoever opens the result has to know of its head."""
    from tuner import attention, scan
    from tuner.checkpoint import device, open_base
    from tuner.documents import computed_again
    from tuner.progress import say

    options, base = job.options, job.parent
    assert base is not None
    task, method = kinds.load("tasks", options.task.kind), kinds.load("methods", options.method.kind)
    family, architecture = family_of(str(base.manifest.model_type))
    head: dict[str, Any] = {}
    if hasattr(task, "head_config"):
        head["head_config"] = {**task.head_config(options.task), "pad_token_id": tokenizer.pad_token_id}
        if base.manifest.head == task.HEAD:
            _same_order(job.recipe, job.index, labels_of(base))
    head["new_head"] = not fits(base, options.task)
    model, fresh = open_base(
        base, task.HEAD, head.get("head_config", {}), method.storage(options.method), new_head=head["new_head"]
    )
    if fresh:
        say(f"{'a new' if head['new_head'] else 'the'} {task.HEAD} head is trained in full: {', '.join(fresh)}")
    for line in scan.paths(model, architecture.kernels):
        say(line)
    if getattr(options.task, "packing", False) and device() != "cpu" and architecture.kernels:
        # The fused kernels know nothing of documents.
        message = "packing is not for this architecture on a GPU: its kernel carries the state over from document to document"
        raise job.recipe.error(message, "stages", job.index, "tune", "task", "packing")
    if getattr(options.task, "packing", False) and architecture.packed_here and model.config._attn_implementation != attention.NAME:
        message = f"packing wants an attention that its checkpoint does not ask for: {model.config._attn_implementation}"
        raise job.recipe.error(message, "stages", job.index, "tune", "task", "packing")
    if options.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            message = f"transformers has no gradient checkpointing for {base.manifest.model_type}"
            raise job.recipe.error(message, "stages", job.index, "tune", "gradient_checkpointing")
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": computed_again})
    try:
        new_tokens = range(*base.manifest.serving.get("new_tokens", (0, 0)))
        return method.prepare(model, options.method, family, architecture, fresh, new_tokens), head
    except RecipeError as error:
        raise job.recipe.error(str(error), "stages", job.index, "tune", "method") from None


def _zero(recipe: Any) -> dict[str, Any]:
    """DeepSpeed's configuration. Raises RecipeError where there is no DeepSpeed, or it is told what the recipe says."""
    from tuner.zero import settings

    try:
        return settings(recipe.launch.deepspeed)
    except RecipeError as error:
        raise recipe.error(str(error), "launch") from None


def _schedule(options: Options, rows: int, recipe: Any) -> "Schedule":
    import math

    from tuner.fit import Schedule

    told = {name: getattr(options, name) for name in Schedule.__dataclass_fields__ if hasattr(options, name)}
    told["steps"] = options.steps or math.ceil((options.epochs or 1) * math.ceil(rows / options.batch_size))
    told["micro_batch_size"] = options.batch_size if options.micro_batch_size == "auto" else options.micro_batch_size
    launch = recipe.launch
    zero = _zero(recipe) if launch.splits and launch.strategy == "deepspeed" else None
    told["precision"] = getattr(options.method, "precision", "fp32")
    return Schedule(**told, seed=recipe.seed, strategy=launch.strategy, deepspeed=zero)


def _within_memory(job: Job, objective: Any, rows: Any, schedule: "Schedule") -> tuple["Schedule", int]:
    """(The schedule with as many rows at a time as there is memory for, the bytes that a step on the largest batch will take).

    Raises RecipeError where that is too few.
    """
    from transformers import AutoConfig

    from tuner import budget
    from tuner.footprint import Footprint
    from tuner.memory import room
    from tuner.progress import say
    from tuner.zero import shares

    options, place, launch = job.options, ("stages", job.index, "tune"), job.recipe.launch
    assert job.parent is not None
    sizes = Footprint(
        AutoConfig.from_pretrained(job.parent.path.resolve()), kinds.load("tasks", options.task.kind).HEAD, options.method,
        optimizer=options.optimizer, gradient_checkpointing=options.gradient_checkpointing,
        new_tokens=range(*job.parent.manifest.serving.get("new_tokens", (0, 0))),
        shares=shares(launch),
    )  # fmt: skip
    row, (free, where) = budget.longest(options.task, rows), room(launch.processes)
    batch = -(-min(schedule.batch_size, len(rows)) // launch.total)
    if options.micro_batch_size == "auto":
        try:
            most = budget.rows_that_fit(sizes, options.task, row, batch, free, where)
        except RecipeError as error:
            raise job.recipe.error(str(error), *place) from None
        if most < batch:
            say(f"{most} of {batch} rows at a time, as many as {free / 1e9:.2f} GB of {where} have room for")
        schedule = replace(schedule, micro_batch_size=most)
    at_a_time = schedule.micro_batch_size
    told = (options.task, rows, schedule.batch_size, schedule.seed, objective.least_rows, at_a_time)
    first, largest = budget.batches(*told, passes=objective.passes and not sizes.in_one_pass)
    expected, worst = (budget.learning(sizes, options.task, each, more=at_a_time < batch) for each in (first, largest))
    if worst > free:
        raise job.recipe.error(budget.refusal(sizes, worst, largest, free, where), *place, "micro_batch_size")
    if (watched := sizes.state + budget.looking(sizes, options.task, row)) > free and options.watch:
        message = f"measuring held-out rows while training takes about {watched / 1e9:.2f} GB beside the model"
        raise job.recipe.error(f"{message}, and {max(free, 0) / 1e9:.2f} GB are left of {where}; leave it out", *place, "watch")
    return schedule, expected


def _loss_now(job: Job, objective: Any, tokenizer: Any) -> float | None:
    """Held-out loss of a head that has yet to learn anything; None without held-out rows."""
    from tuner.data.dataset import heldout_rows
    from tuner.objective import heldout_loss

    if not job.recipe.data.holds_out:
        return None
    rows, _ = heldout_rows(job.recipe, job.options.task, tokenizer)
    objective.eval()
    return float(heldout_loss(objective, objective.prepared([example for _, example in rows]))["heldout_loss"])


def _answers(job: Job, task: Any, model: Any, tokenizer: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The trained model's own answers to the probe, and by how much they differ with its adapter off, if it has one."""
    from tuner import probe
    from tuner.data.dataset import questions

    items = kinds.load("heads", task.HEAD).record(
        model, tokenizer, questions(job.recipe, job.options.task, tokenizer), job.recipe.probe.answer_tokens
    )
    if not hasattr(model, "disable_adapter"):
        return items, {}
    with model.disable_adapter():
        return items, {"difference_from_base": probe.asked(task.HEAD, model, items)["mean_difference"]}


def _reopened(bundle: Bundle, method: Any, answers: list[dict[str, Any]]) -> dict[str, float]:
    """How what was saved answers, computed as it was in training. Raises GateError where that is not what was trained."""
    from tuner import probe

    found = probe.asked(str(bundle.manifest.head), method.reopen(bundle), answers)
    if not found["max_difference"] <= REOPENED_TOLERANCE:
        raise GateError(
            f"tune: what was saved does not answer as what was trained: its probe differs by {found['max_difference']}, "
            f"{REOPENED_TOLERANCE} is allowed"
        )
    return found


def _watch(job: Job, task: Any, objective: Any, tokenizer: Any) -> Any:
    """Held-out loss and the task's scores of the model as it is now, on the rows that the result will be measured on."""
    from tuner import fit
    from tuner.data.dataset import heldout_rows
    from tuner.objective import heldout_loss

    options = job.options
    rows, _ = heldout_rows(job.recipe, options.task, tokenizer)
    examples = objective.prepared([example for _, example in rows])
    rows = [(row, example) for (row, _), example in zip(rows, examples, strict=True)]

    def measure() -> dict[str, float]:
        loss = heldout_loss(objective, examples)["heldout_loss"]
        scores = task.scores(objective.model, tokenizer, rows, options.task, job.recipe.evaluate)
        return {"heldout_loss": loss, **{name: value for name, value in scores.items() if name != "rows"}}

    return fit.Watch(measure, options.watch.by, options.watch.every_steps, options.watch.patience)


def gate(options: Options, metrics: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises GateError where training changed nothing, or held-out loss did not fall as far as the recipe asks."""
    seen = (metrics["training"].get("difference_from_base"), metrics["probe"].get("difference_from_base"))
    if next((value for value in seen if value is not None), None) == 0.0:
        raise GateError("the tuned model answers every probe exactly as the base does: training had no effect")
    start, end = before.get("heldout_loss", metrics["training"].get("heldout_loss_before")), metrics.get("heldout_loss")
    if start is not None and end is not None and not start - end > options.gate.heldout_loss_drop:
        raise GateError(
            f"held-out loss went from {start:.3f} to {end:.3f}, a drop of {start - end:.3f}; "
            f"gate.heldout_loss_drop asks for more than {options.gate.heldout_loss_drop}"
        )

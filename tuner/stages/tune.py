"""Fine-tune (or pretrain) a model: a task says what is learned, a method says which weights learn it."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from tuner import kinds, optimizers
from tuner.bundle import Manifest
from tuner.errors import DataError, GateError, RecipeError
from tuner.kinds import Options as BaseOptions
from tuner.stages import Job

if TYPE_CHECKING:
    from tuner.plan import Plan, Step

TAKES = frozenset({"model"})
# Also of the task, the method and the loop.
VERSION = 2
RESULT = "tuned"


class Gate(BaseOptions):
    """What training must have achieved."""

    heldout_loss_drop: float = 0.0
    """Held-out loss must be below the untrained model's by more than this (nats a token)."""


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
    micro_batch_size: int | None = Field(None, gt=0)
    """Rows in memory at a time; all of `batch_size` by default. Less needs less memory and takes longer."""
    learning_rate: float = Field(5.0e-4, gt=0)
    """Peak learning rate of AdamW. LoRA wants about ten times what full tuning does."""
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
    watch: Watch | None = None
    """Measure held-out rows while training, keep the best weights, stop when nothing gets better."""
    checkpoint_every_steps: int = Field(50, gt=0)
    """How much can be lost to a power cut."""
    gate: Gate = Gate()

    @model_validator(mode="after")
    def _one_length(self) -> "Options":
        if self.steps and self.epochs:
            raise ValueError("steps and epochs both say how long to train; give one")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self


def gives(options: Options) -> str:
    """An adapter or a model, as the method says."""
    return str(kinds.load("methods", options.method.kind).GIVES)


def check(plan: "Plan", step: "Step") -> None:
    """Raises RecipeError where the model lacks the task's head, is too short for its rows, or the method would train nothing."""
    options, place = step.options, ("stages", step.index, "tune")
    if options.watch and plan.recipe.data.heldout is None:
        raise plan.recipe.error("there are no held-out rows to watch; name some with data.heldout", *place, "watch")
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
    try:
        kinds.load("methods", options.method.kind).check(options.method, plan)
    except RecipeError as error:
        raise plan.recipe.error(str(error), *place, "method") from None


def run(job: Job) -> Manifest:
    """Encode the data, train, save what was trained."""
    import math

    import torch

    from tuner import scan
    from tuner.checkpoint import device, load_tokenizer, open_base
    from tuner.data.dataset import training_examples
    from tuner.families import family_of
    from tuner.fit import Schedule, fit
    from tuner.progress import say
    from tuner.source import describe_model, versions

    options: Any = job.options
    assert job.parent is not None
    base = job.parent
    tokenizer = load_tokenizer(base.path)
    examples, data = training_examples(job.recipe, options.task, tokenizer)
    if not examples:
        raise DataError(f"{job.recipe.data.train}: no row is left to train on ({data['skipped_rows']} were left out)")
    counts = f"{data['rows']} rows, {data['tokens']} tokens, {data['supervised_tokens']:g} supervised"
    say(f"{counts}; {data['skipped_rows']} rows left out, {data['cut_rows']} cut")
    method = kinds.load("methods", options.method.kind)
    family, architecture = family_of(str(base.manifest.model_type))
    torch.manual_seed(job.recipe.seed)
    task = kinds.load("tasks", options.task.kind)
    head_config: dict[str, Any] = {}
    fresh: list[str] = []
    if hasattr(task, "head_config"):
        head_config = {**task.head_config(options.task), "pad_token_id": tokenizer.pad_token_id}
    new = base.manifest.head != task.HEAD
    model, fresh = open_base(base, task.HEAD, head_config if new else {}, method.storage(options.method))
    if new:
        say(f"a new {task.HEAD} head is trained in full: {', '.join(fresh)}")
    if scan.use(model):
        if device() == "cpu":
            say("Mamba's scan: compiled for this CPU by numba")
        elif getattr(options.task, "packing", False):
            # The fused kernels know nothing of documents.
            message = "packing is not for this architecture on a GPU: its kernel carries the state over from document to document"
            raise job.recipe.error(message, "stages", job.index, "tune", "task", "packing")
        else:
            say("Mamba's scan: transformers' own, by a fused kernel where mamba_ssm is installed")
    if options.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            message = f"transformers has no gradient checkpointing for {base.manifest.model_type}"
            raise job.recipe.error(message, "stages", job.index, "tune", "gradient_checkpointing")
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": scan.computed_again})
    try:
        model = method.prepare(model, options.method, family, architecture, fresh)
    except RecipeError as error:
        raise job.recipe.error(str(error), "stages", job.index, "tune", "method") from None
    layers = method.layers(model)
    trained = sum(parameter.numel() for parameters in layers.values() for parameter in parameters)
    say(f"{options.method.kind}: {len(layers)} layers, {trained:,} parameters are trained on {device()}")
    per_epoch = math.ceil(len(examples) / options.batch_size)
    schedule = Schedule(
        steps=options.steps or math.ceil((options.epochs or 1) * per_epoch),
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size or options.batch_size,
        learning_rate=options.learning_rate,
        warmup_fraction=options.warmup_fraction,
        decay=options.decay,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optimizer=options.optimizer,
        checkpoint_every_steps=options.checkpoint_every_steps,
        seed=job.recipe.seed,
    )
    objective = task.objective(model, tokenizer, options.task)
    watch = _watch(job, task, objective, tokenizer) if options.watch else None
    measured = fit(objective, examples, schedule, layers=layers, work=job.work, watch=watch)
    method.save(model, job.folder)
    tokenizer.save_pretrained(job.folder)
    rest: dict[str, Any] = {
        "data": data,
        "recipe": job.told(),
        "metrics": {"training": {**measured, "layers": len(layers), "trained_parameters": trained}},
        "serving": {
            **method.serving(options.method, architecture),
            **(task.serving(options.task) if hasattr(task, "serving") else {}),
            **({"head_config": head_config} if head_config else {}),
        },
    }
    if task.HEAD != "causal":
        rest["serving"].pop("live_adapter", None)
    if method.GIVES == "model":
        if describe := getattr(kinds.load("heads", task.HEAD), "describe", None):
            describe(job.folder, rest["serving"])
        return describe_model(job.folder, stage="tune", fingerprint=job.fingerprint, **rest)
    return Manifest(
        kind=method.GIVES,
        stage="tune",
        fingerprint=job.fingerprint,
        family=base.manifest.family,
        head=task.HEAD,
        model_type=base.manifest.model_type,
        base="base",  # run.py writes the way there
        versions=versions(),
        **rest,
    )


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
    if metrics["probe"].get("difference_from_base") == 0.0:
        raise GateError("the tuned model answers every probe exactly as the base does: training had no effect")
    if "heldout_loss" in metrics and "heldout_loss" in before:
        drop = before["heldout_loss"] - metrics["heldout_loss"]
        if not drop > options.gate.heldout_loss_drop:
            raise GateError(
                f"held-out loss went from {before['heldout_loss']:.3f} to {metrics['heldout_loss']:.3f}, a drop of {drop:.3f}; "
                f"gate.heldout_loss_drop asks for more than {options.gate.heldout_loss_drop}"
            )

"""Store a model's linears in fewer bits, in the compressed-tensors format that vLLM reads, through llm-compressor."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tuner.bundle import Manifest
from tuner.errors import DataError, GateError, RecipeError
from tuner.families import Architecture, Family
from tuner.kinds import Options as BaseOptions
from tuner.stages import Job

if TYPE_CHECKING:
    from tuner.plan import Plan, Step

TAKES = frozenset({"model"})
VERSION = 2
RESULT = "quantized"
# Kernels exist for these sizes; the largest that divides the layers costs least and is as exact.
GROUP_SIZES = (128, 64, 32)


class Gate(BaseOptions):
    """What quantization may cost."""

    heldout_loss_rise: float = Field(0.1, ge=0)
    """Held-out loss may rise above the unquantized model's by at most this (nats a token)."""


class Options(BaseOptions):
    """Keys of `- quantize:`."""

    scheme: Literal["w8a8-int8", "w4a16"] = "w8a8-int8"
    """`w8a8-int8`: weights and activations in 8 bits. `w4a16`: weights in 4 bits, activations as they are."""
    algorithm: Literal["gptq", "round"] = "gptq"
    """`gptq` corrects each column's rounding error with those not rounded yet (Frantar et al. 2022, arXiv:2210.17323) on
    calibration rows; `round` needs none."""
    calibration_rows: int = Field(128, gt=0)
    """Training rows that `gptq` looks at."""
    gate: Gate = Gate()


def gives(options: Options) -> str:  # noqa: ARG001 - a stage's common signature
    """A quantized model, which can be served and not trained further."""
    return "quantized"


def check(plan: "Plan", step: "Step") -> None:
    """Raises RecipeError for an architecture that cannot be quantized, or whose linears no group divides."""
    try:
        refuse(plan.facts.model_type, plan.architecture)
        widths = {shape[1] for shape in plan.linears().values()} or set(plan.facts.widths)
        if step.options.scheme == "w4a16" and widths:
            group_size(widths)
    except RecipeError as error:
        raise plan.recipe.error(str(error), "stages", step.index, "quantize") from None


def run(job: Job) -> Manifest:
    """Calibrate, quantize, store compressed."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    from tuner.checkpoint import load_model, load_tokenizer, no_bars, save_model
    from tuner.data.dataset import task_of, training_examples
    from tuner.families import family_of
    from tuner.source import describe_model

    options: Any = job.options
    assert job.parent is not None
    family, architecture = family_of(str(job.parent.manifest.model_type))
    refuse(str(job.parent.manifest.model_type), architecture)
    tokenizer = load_tokenizer(job.parent.path)
    model = load_model(job.parent)
    linears = quantized_linears(model, family)
    rest = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear} - {name for name, _ in linears}
    scheme = _scheme(options.scheme, {module.in_features for _, module in linears})
    common: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": sorted(rest)}
    data: dict[str, Any] = {}
    if options.algorithm == "round":
        with no_bars():
            oneshot(model=model, recipe=QuantizationModifier(**common))
    else:
        examples, data = training_examples(job.recipe, task_of(job.recipe, job.index), tokenizer, rows=options.calibration_rows)
        if not examples:
            raise DataError(f"{data['path']}: no row is left to calibrate on ({data['skipped_rows']} were left out)")
        rows = Dataset.from_list([{"input_ids": each.ids, "attention_mask": [1] * len(each.ids)} for each in examples])
        oneshot(
            model=model,
            dataset=rows,
            recipe=GPTQModifier(**common),
            num_calibration_samples=len(examples),
            max_seq_length=max(len(each.ids) for each in examples),
            shuffle_calibration_samples=False,
        )
    with no_bars():
        save_model(model, job.folder, like=job.parent.path, save_compressed=True)
    tokenizer.save_pretrained(job.folder)
    serving = {"scheme": options.scheme, "group_size": scheme["weights"].get("group_size")}
    return describe_model(
        job.folder, kind="quantized", stage="quantize", fingerprint=job.fingerprint, recipe=job.told(), data=data, serving=serving
    )


def quantized_linears(model: Any, family: Family) -> list[tuple[str, Any]]:
    """Name and module of every linear whose weights are rounded: all but those that the family keeps."""
    import torch

    named = [(name, module) for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    return [(name, module) for name, module in named if name.rsplit(".", 1)[-1] not in family.keep]


def refuse(model_type: str, architecture: Architecture) -> None:
    """Raises RecipeError for an architecture that is not quantized, with its family's reason."""
    if architecture.not_quantized:
        raise RecipeError(f"{model_type} is not quantized: {architecture.not_quantized}; serve the model as it is")


def group_size(widths: set[int]) -> int:
    """The largest group that divides every linear's input; raises RecipeError where none does."""
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise RecipeError(
        f"w4a16 needs a group of {' or '.join(map(str, GROUP_SIZES))} that divides the inputs of all linears, "
        f"which are {', '.join(map(str, sorted(widths)))} wide; use w8a8-int8"
    )


def gate(options: Options, metrics: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises GateError where held-out loss rose by more than the recipe allows."""
    if "heldout_loss" in metrics and "heldout_loss" in before:
        rise = metrics["heldout_loss"] - before["heldout_loss"]
        if not rise <= options.gate.heldout_loss_rise:  # also where it is no number
            raise GateError(
                f"held-out loss rose from {before['heldout_loss']:.3f} to {metrics['heldout_loss']:.3f}, by {rise:.3f}; "
                f"gate.heldout_loss_rise allows {options.gate.heldout_loss_rise}"
            )


def _scheme(name: str, widths: set[int]) -> dict[str, Any]:
    """The scheme as compressed-tensors writes it."""
    if name == "w8a8-int8":
        return {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        }
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size(widths)}
    return {"targets": ["Linear"], "weights": weights}

"""LoRA: each chosen linear W gets a trained product of two thin matrices, W x + (alpha / rank) B A x (Hu et al. 2021,
arXiv:2106.09685, equation 3). The adapter itself is peft's."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tuner.bundle import Bundle
from tuner.checkpoint import ROUNDED, block_linears, head_options, open_base
from tuner.errors import RecipeError, nearest
from tuner.families import Architecture, Family
from tuner.kinds import Options as BaseOptions
from tuner.progress import say

if TYPE_CHECKING:
    from torch import nn

    from tuner.plan import Plan

GIVES = "adapter"
WORDS = ("all-linear", "attention")
# vLLM's largest buffer for adapters.
MAX_LIVE_RANK = 512


class Options(BaseOptions):
    """Keys of `method: {kind: lora}`."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, gt=0)
    """Width of the two matrices. More learns more and costs more memory; 8 to 64 is usual."""
    alpha: float | None = Field(None, gt=0)
    """Scale of the adapter's output is alpha / rank; twice the rank by default."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Fraction of the adapter's inputs dropped while training."""
    targets: str = "all-linear"
    """`all-linear`, `attention`, or a regular expression that matches whole module names."""
    storage: Literal["fp32", "bf16", "nf4", "int8"] = "bf16"
    """How the frozen weights are kept in memory. `nf4` is QLoRA: 4 bits a weight, for models that would not fit otherwise."""
    dora: bool = False
    """Learn the length of each weight's columns apart from their direction (Liu et al. 2024, arXiv:2402.09353)."""
    rslora: bool = False
    """Scale the adapter by alpha / sqrt(rank), so that high ranks learn (Kalajdzievski 2023, arXiv:2312.03732)."""


def check(options: Options, plan: "Plan") -> None:
    """Raises RecipeError where a pattern in `targets` matches nothing; the words always match what their family lists."""
    if options.storage in ROUNDED and (why := plan.architecture.not_rounded):
        raise RecipeError(f"storage: {options.storage} is not for {plan.facts.model_type}: {why}; use bf16")
    if options.targets == "attention" and not plan.architecture.attention:
        raise RecipeError(f'targets: attention means nothing for {plan.facts.model_type}, which has none; use "all-linear"')
    names = list(plan.linears())
    if options.targets not in WORDS and names:
        # A checkpoint may be saved from inside the model that will open it.
        names += [f"{prefix}.{name}" for prefix in ("model", "transformer") for name in names]
        adaptable(matching(names, options.targets), options.targets, plan.architecture)


def prepare(
    model: Any, options: Options, family: Family, architecture: Architecture, fresh: list[str], new_tokens: Sequence[int] = ()
) -> Any:
    """The model with a fresh adapter, the `fresh` modules of its head trained in full beside it, and its `new_tokens`' embeddings.

    Raises RecipeError where `targets` matches nothing.
    """
    from peft import LoraConfig, get_peft_model

    from tuner import fused

    names = targets(model, options.targets, family, architecture)
    known = block_linears(model, architecture.linears | set(architecture.left_out))
    last = {name.rsplit(".", 1)[-1] for name in names}
    same = {name for name, _ in _linears(model) if name.rsplit(".", 1)[-1] in last}
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha or 2 * options.rank,
        lora_dropout=options.dropout,
        # Last names where they say the same, since every server reads those; whole names otherwise.
        target_modules=sorted(last) if same == set(names) else sorted(names),
        # GPT-2's Conv1D stores its weight transposed.
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for _, module in _linears(model)),
        bias="none",
        use_dora=options.dora,
        use_rslora=options.rslora,
        modules_to_save=fresh or None,
        trainable_token_indices={name: list(new_tokens) for name in _embeddings(model)} if new_tokens else None,
        task_type="CAUSAL_LM" if model.can_generate() else None,
    )
    most = max(_most_rank(model.get_submodule(name)) for name in names)
    if options.rank > most:
        raise RecipeError(f"rank: {options.rank} is more than any of these linears has, {most} at the most; 8 to 64 is usual")
    _in_float32(model, fresh)
    adapted = get_peft_model(model, config)
    reached = len(layers(adapted)) - len(fresh)
    if reached != len(names):
        raise RecipeError(f"the adapter was meant for {len(names)} linears and reached {reached}")
    fused.use(adapted)
    rows = f", and the embeddings of {len(new_tokens)} new tokens" if new_tokens else ""
    say(f"adapter: {reached} of {len(known)} linears{rows}")
    return adapted


def _embeddings(model: Any) -> list[str]:
    """Names of the layers with a row for each token: the embeddings, and an output layer that is not tied to them.

    Raises RecipeError for an output layer with a bias, which peft 0.21 leaves out where rows are trained.
    """
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if output is None:
        return [names[id(embeddings)]]
    if output.bias is not None:
        raise RecipeError("the model's output layer has a bias, and beside an adapter no new tokens of it are trained; use full")
    return [names[id(each)] for each in ([embeddings] if output.weight is embeddings.weight else [embeddings, output])]


def targets(model: Any, wanted: str, family: Family, architecture: Architecture) -> list[str]:
    """Names of the linears that `targets` means. Raises RecipeError, with the nearest name, where that is none."""
    known = [name for name, _ in _linears(model) if not set(name.split(".")) & set(family.keep)]
    if wanted not in WORDS:
        return adaptable(matching(known, wanted), wanted, architecture)
    chosen = architecture.linears if wanted == "all-linear" else architecture.attention
    return [name for name in block_linears(model, chosen) if name in set(known)]


def adaptable(names: list[str], wanted: str, architecture: Architecture) -> list[str]:
    """The names; raises RecipeError where one is of a linear that the architecture's family says to leave out."""
    for name in names:
        if why := architecture.left_out.get(name.rsplit(".", 1)[-1]):
            raise RecipeError(f'targets: "{wanted}" matches {name}, which cannot be adapted: {why}')
    return names


def matching(names: list[str], pattern: str) -> list[str]:
    """The names that the pattern matches whole. Raises RecipeError, with the nearest name, where that is none."""
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise RecipeError(f'targets: "{pattern}" is not a regular expression: {error}') from None
    if not found:
        advice = nearest(pattern, names) if difflib.get_close_matches(pattern, names) else f"; the first is {names[0]}"
        raise RecipeError(f'targets: "{pattern}" matches the whole name of no linear of the model{advice}')
    return found


def layers(model: Any) -> dict[str, list["nn.Parameter"]]:
    """Adapted module name to the parameters of its adapter. New tokens are none: a first step need not have one of them."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".token_adapter." not in name:
            module = name.split(".lora_")[0].split(".modules_to_save.")[0].removeprefix("base_model.model.")
            found.setdefault(module, []).append(parameter)
    return found


def save(model: Any, folder: Path) -> None:
    """Write an ordinary PEFT adapter, the same bytes each time: peft keeps names in sets, whose order is Python's mood."""
    config = model.peft_config["default"]
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def reopen(bundle: Bundle) -> Any:
    """The adapter from its files, on the base kept and computed as it was in training."""
    from peft import PeftModel

    from tuner import fused

    model, fresh = open_base(
        bundle.base(), str(bundle.manifest.head), storage=bundle.manifest.serving["storage"], **head_options(bundle)
    )
    _in_float32(model, fresh)
    model = PeftModel.from_pretrained(model, bundle.path.resolve()).eval()
    fused.use(model)
    return model


def _in_float32(model: Any, fresh: list[str]) -> None:
    """Let the modules that are trained in full compute in float32, whatever the frozen model around them does."""
    import torch

    for name in fresh:
        module = model.get_submodule(name).to(dtype=torch.float32)
        module.register_forward_pre_hook(lambda module, inputs: tuple(each.float() for each in inputs))  # noqa: ARG005 - torch's signature
    output = model.get_output_embeddings()
    if fresh and output is not None:
        # Tied to the embeddings it is frozen behind a new layer, and computes in their type.
        output.register_forward_pre_hook(lambda module, inputs: tuple(each.to(module.weight.dtype) for each in inputs))


def serving(options: Options, architecture: Architecture, *, new_tokens: bool = False) -> dict[str, Any]:
    """Facts for an engine, and for whoever opens the adapter again: how the base was rounded when it was trained."""
    why = not_live(options, architecture, new_tokens=new_tokens)
    return {"adapter_rank": options.rank, "live_adapter": not why, "not_live": why, "storage": options.storage}


def not_live(options: Options, architecture: Architecture, *, new_tokens: bool = False) -> str | None:
    """Why no engine takes the adapter while it runs; None where vLLM does."""
    if new_tokens:
        return "it has embeddings of new tokens, and vLLM takes none"
    if options.storage in ROUNDED:
        return f"it was trained on weights rounded to {options.storage}, and an engine has others"
    if options.dora:
        return "vLLM takes no DoRA"
    if options.rank > MAX_LIVE_RANK:
        return f"vLLM takes ranks up to {MAX_LIVE_RANK}"
    return None if architecture.live_adapter else "vLLM takes no live adapters for this architecture"


def storage(options: Options) -> str:
    """How the weights are kept in memory."""
    return options.storage


def _most_rank(layer: Any) -> int:
    """The smaller side of a linear's weight, which may be kept in 4 bits."""
    return int(min(layer.weight.shape if type(layer).__name__ == "Conv1D" else (layer.in_features, layer.out_features)))


def _linears(model: Any) -> list[tuple[str, Any]]:
    kinds = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ in kinds]

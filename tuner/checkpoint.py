"""Opens what a bundle holds: model, adapter and tokenizer, on the device that there is."""

import gc
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tuner import kinds
from tuner.bundle import Bundle
from tuner.errors import SourceError
from tuner.memory import give_back
from tuner.progress import say


def device() -> str:
    """ "cuda" where there is an NVIDIA GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# A call in a chat template that writes down today's date, as Llama 3's does, and the date that stands there instead.
TODAY = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(['\"])([^'\"]*)\1\s*\)")
DATE = date(2024, 7, 26)


def dateless(template: str) -> str:
    """The chat template with one date for all days: what was trained yesterday could not be proven today, as other tokens are sent.

    It is the one that Llama 3's own templates name where they know no other.
    """
    return TODAY.sub(lambda found: json.dumps(DATE.strftime(found[2])), template)


def say_of_date(template: str) -> None:
    """Tell the user that a chat template writes down today's date, and what is done about it."""
    if dateless(template) != template:
        say(f"base: the chat template writes down today's date; from here on it is {DATE:%d %b %Y}, in training and when served")
    if "strftime_now(" in dateless(template):
        say("base: the chat template makes a date that is not understood here; what is trained today may be refused tomorrow")


def name_one_date(tokenizer: Any) -> None:
    """Make its chat template dateless, or each of them where it has several by name."""
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {name: dateless(each) for name, each in tokenizer.chat_template.items()}
    elif tokenizer.chat_template:
        tokenizer.chat_template = dateless(tokenizer.chat_template)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a checkpoint directory, padding on the right with a token that it has. Raises SourceError."""
    quiet()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise SourceError(f"{folder}: its tokenizer cannot be opened ({' '.join(str(error).split())[:200]})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    tokenizer.padding_side = "right"
    name_one_date(tokenizer)
    with suppress(FileNotFoundError):
        named = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
        tokenizer.ends_of_turn = named if isinstance(named, list) else [named]
    return tokenizer


def ends_of_turn(tokenizer: Any) -> set[int]:
    """The ids at which an answer stops, for transformers and vLLM: eos, and those of the checkpoint's generation_config.json."""
    return {tokenizer.eos_token_id, *getattr(tokenizer, "ends_of_turn", [])} - {None}


# How frozen weights are kept in memory while an adapter is trained on them, and what the model computes in meanwhile.
COMPUTE = {"fp32": "float32", "bf16": "bfloat16", "nf4": "bfloat16", "int8": "bfloat16"}
# Those of which the values are not what they were.
ROUNDED = ("nf4", "int8")


def load_model(bundle: Bundle, storage: str = "fp32", *, original: bool = False) -> Any:
    """The bundle's model in evaluation mode; a quantized one computes as it is served.

    An adapter is put on the base that it was trained on: where that was rounded to 4 or 8 bits, on float32 weights that hold
    the rounded values, unless the `original` ones are asked for. `storage` says how the weights of a model are kept in memory.
    """
    quiet()
    manifest = bundle.manifest
    if manifest.kind == "adapter":
        from peft import PeftModel

        model, _ = open_base(bundle.base(), str(manifest.head), **head_options(bundle))
        stored = manifest.serving.get("storage")
        if stored in ROUNDED and not original:
            _round(model, str(manifest.model_type), stored)
        return PeftModel.from_pretrained(model, bundle.path.resolve()).eval()
    options: dict[str, Any] = {}
    if manifest.kind == "quantized":
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with no_bars():
        model, _ = _open(bundle, str(manifest.head), options, storage)
    if manifest.serving.get("scheme") == "w8a8-int8":
        _compute_in_int8(model)
    return model.to(device()).eval()


def save_model(model: Any, folder: Path, like: Path | None = None, **options: Any) -> None:
    """Write an ordinary checkpoint. How it generates stands in a file that is taken from `like` as it is, where there is one:
    transformers reads settings that contradict each other, which many checkpoints have, and refuses to write them."""
    from transformers import GenerationConfig

    if model.can_generate():
        model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder, **options)
    if like is not None:
        copy_generation_config(model, like, folder)


def copy_generation_config(model: Any, like: Path, folder: Path) -> None:
    """Take over the file that says where a model's answers end, where there is one."""
    said = like / "generation_config.json"
    if model.can_generate() and said.is_file():
        (folder / said.name).write_bytes(said.read_bytes())


def head_options(adapter: Bundle) -> dict[str, Any]:
    """What `open_base` has to know of the head that an adapter was trained with."""
    serving = adapter.manifest.serving
    new = serving.get("new_head", adapter.base().manifest.head != adapter.manifest.head)
    return {"config": serving.get("head_config", {}), "new_head": new}


def open_base(
    bundle: Bundle, head: str, config: dict[str, Any], storage: str = "fp32", *, new_head: bool = False
) -> tuple[Any, list[str]]:
    """The bundle's model with this head, and the names of its head's modules, which are trained in full beside an adapter.

    These are modules that the files have no weights for and, where the head gives labels, all that stands behind the blocks.
    `config` is what the model's configuration has to say about the head. With `new_head` its weights are random, and follow from
    torch's seed, even where the files have a head of that name: that one tells other labels apart.
    """
    quiet()
    model, fresh = _open(bundle, head, dict(config), storage, new_head=new_head)
    return model.to(device()).eval(), fresh


def rounded(weight: Any, storage: str) -> Any:
    """The weight, in float32, as bitsandbytes' `nf4` or `int8` leaves it: rounded from bfloat16, as it is in training."""
    from types import SimpleNamespace

    import bitsandbytes
    import torch
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    short = weight.to("cpu", torch.bfloat16)  # moving them from there is what makes bitsandbytes round
    if storage == "nf4":
        kept = bitsandbytes.nn.Params4bit(short, requires_grad=False, quant_type="nf4", compress_statistics=True)
    else:
        kept = bitsandbytes.nn.Int8Params(short, requires_grad=False, has_fp16_weights=False)
    kept = kept.to(weight.device)
    return dequantize_bnb_weight(kept, SimpleNamespace(SCB=getattr(kept, "SCB", None))).float()


def _round(model: Any, model_type: str, storage: str) -> None:
    """Give the linears that are rounded in training the values that rounding leaves them."""
    from tuner.families import family_of

    for name in block_linears(model, family_of(model_type)[1].linears):
        weight = model.get_submodule(name).weight
        weight.data = rounded(weight.data, storage)


def block_linears(model: Any, names: frozenset[str]) -> list[str]:
    """Names of the model's linears that end in one of `names` and stand in a numbered block; heads have linears of these names."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
        and name.rsplit(".", 1)[-1] in names
        and any(part.isdecimal() for part in name.split("."))
    ]


def _open(bundle: Bundle, head: str, options: dict[str, Any], storage: str, *, new_head: bool = False) -> tuple[Any, list[str]]:
    import torch
    import transformers

    from tuner import attention, elementwise, scan

    # One model in memory at a time: what was let go of waits for the collector, since peft's layers point back at each other.
    gc.collect()
    with suppress(AttributeError):
        give_back()
    module = kinds.load("heads", head)
    opener = getattr(transformers, module.AUTO)
    path = bundle.path.resolve()
    if storage in ROUNDED:
        options = {**options, "quantization_config": _rounding(opener, path, bundle, storage)}
    # The files' own head may have the names of a new one, for other labels.
    renewed = new_head and all(getattr(kinds.load("heads", each), "LABELLED", False) for each in (str(bundle.manifest.head), head))
    model, info = opener.from_pretrained(
        path,
        dtype=getattr(torch, COMPUTE[storage]),
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=renewed,
        **options,
    )
    if renewed:
        for part in (model.get_submodule(name) for name in _behind_the_blocks(model)):
            for each in (*part.modules(), *part.parameters()):
                each._is_hf_initialized = False  # transformers' own mark of what was read from the files
            part.apply(model._initialize_weights)
    if adjust := getattr(module, "opened", None):
        adjust(model)
    scan.use(model)
    attention.use(model)
    elementwise.use(model)
    if storage in ROUNDED:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                # A view of the mapped file, which would keep every page of it: the weights as they were before they were rounded.
                parameter.data = parameter.data.clone()
    for each in model.modules():
        if hasattr(each, "support_avx512bf16_for_cpu"):
            # One evaluation would repack the weights for a kernel that has no gradient, and the training after it would teach
            # only what lies behind the last such layer (bitsandbytes 0.50, CPUs with bfloat16 products).
            each.support_avx512bf16_for_cpu = False
    fresh = set(_fresh(model, set(info["missing_keys"])))
    if getattr(module, "LABELLED", False):
        fresh |= set(_behind_the_blocks(model)) | _head_parts(model, str(bundle.manifest.model_type))
    return model, sorted(name for name in fresh if name.rpartition(".")[0] not in fresh)


def _behind_the_blocks(model: Any) -> list[str]:
    """Names of the modules with parameters that a model has beside its base model."""
    return [
        name for name, child in model.named_children() if child is not model.base_model and any(True for _ in child.parameters())
    ]


def _head_parts(model: Any, model_type: str) -> set[str]:
    """Modules within the base model that, as its family says, only a head reads."""
    from tuner.families import family_of

    parts = family_of(model_type)[0].head_parts
    return {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in parts}


def _fresh(model: Any, missing: set[str]) -> list[str]:
    """Modules that the files have no weights for at all; an output layer that is tied to the embeddings lacks a bias at most."""
    tied = set(model.all_tied_weights_keys)
    names = {name.rsplit(".", 1)[0] for name in missing}
    new = [
        name
        for name, module in model.named_modules()
        if name in names and not {f"{name}.{key}" for key, _ in module.named_parameters()} - (missing - tied)
    ]
    return sorted(name for name in new if name.rpartition(".")[0] not in new)


def _rounding(opener: Any, path: Path, bundle: Bundle, storage: str) -> Any:
    """bitsandbytes' storage for the linears that its family lists, and for no other: kernels read some weights themselves.

    nf4 is the 4-bit normal float with double quantization of Dettmers et al. 2023 (QLoRA, arXiv:2305.14314).
    """
    import re

    import torch
    from transformers import AutoConfig, BitsAndBytesConfig

    from tuner.families import family_of

    with torch.device("meta"):
        model = opener.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    chosen = set(block_linears(model, family_of(str(bundle.manifest.model_type))[1].linears))
    # transformers reads these as regular expressions that match from the start.
    kept = [re.escape(name) + "$" for name, module in model.named_modules() if name and name not in chosen]
    if storage == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=kept,
    )


def _compute_in_int8(model: Any) -> None:
    """Make the quantized linears round their inputs as vLLM's kernels do: each token by its own largest value over 127.

    compressed-tensors' own forward divides by 127.5 and rounds the weights anew at every call, which takes twice as long.
    """
    from torch import Tensor
    from torch.nn.functional import linear

    def rounding(module: Any) -> Any:
        def forward(hidden: Tensor) -> Tensor:
            scale = hidden.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
            return linear((hidden / scale).round() * scale, module.weight, module.bias)

        return forward

    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.forward = rounding(module)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without a terminal, keep back the bars of compressed-tensors, which do not heed TQDM_DISABLE. Its errors are exceptions."""
    with ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        yield


def quiet() -> None:
    """Keep the libraries' own remarks off the terminal; errors still come through. Call it before they are imported."""
    import logging
    import warnings

    # bitsandbytes suggests a package for faster 4-bit products at every import.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    for name in ("LLM_COMPRESSOR", "COMPRESSED_TENSORS"):
        # Not LOG_DISABLED: llm-compressor 0.14 then lacks a level that its GPTQ logs to, and dies.
        os.environ.setdefault(f"{name}_LOG_LEVEL", "ERROR")
    # Advice to programmers about arguments that are meant as they are.
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
    # torch's own, with a stack of C++, where memory has run out: what is tried instead ends with an error that is told.
    warnings.filterwarnings("ignore", message="mkldnn_matmul failed")
    # scikit-learn takes a second to import, and is there for the models that guess ahead for another.
    with patch("transformers.utils.is_sklearn_available", return_value=False):
        import transformers.generation.candidate_generator  # noqa: F401 - imported with the next model otherwise
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

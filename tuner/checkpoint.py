"""Opens what a bundle holds: model, adapter and tokenizer, on the device that there is."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from tuner import kinds
from tuner.bundle import Bundle


def device() -> str:
    """ "cuda" where there is an NVIDIA GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a checkpoint directory, padding on the right with a token that it has."""
    quiet()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    tokenizer.padding_side = "right"
    return tokenizer


# How frozen weights are kept in memory while an adapter is trained on them, and what the model computes in meanwhile.
COMPUTE = {"fp32": "float32", "bf16": "bfloat16", "nf4": "bfloat16", "int8": "bfloat16"}


def load_model(bundle: Bundle, storage: str = "fp32", *, original: bool = False) -> Any:
    """The bundle's model in evaluation mode; a quantized one computes as it is served.

    An adapter is put on the base that it was trained on: where that was rounded to 4 or 8 bits, on float32 weights that hold
    the rounded values, unless the `original` ones are asked for. `storage` says how the weights of a model are kept in memory.
    """
    quiet()
    manifest = bundle.manifest
    if manifest.kind == "adapter":
        from peft import PeftModel

        base = bundle.base()
        config = {} if base.manifest.head == manifest.head else manifest.serving.get("head_config", {})
        stored = "fp32" if original else manifest.serving.get("storage", "fp32")
        model, _ = open_base(base, str(manifest.head), config, stored, rounded=True)
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


def open_base(
    bundle: Bundle, head: str, config: dict[str, Any], storage: str = "fp32", *, rounded: bool = False
) -> tuple[Any, list[str]]:
    """The bundle's model with this head, and the names of the modules that its files have no weights at all for.

    `config` is what the model's configuration has to say about a new head, whose random weights follow from torch's seed.
    With `rounded`, storage in 4 or 8 bits is float32 again, with the values that the rounding left.
    """
    quiet()
    model, fresh = _open(bundle, head, dict(config), "fp32" if rounded and storage == "bf16" else storage, exact=rounded)
    if rounded and storage in ("nf4", "int8"):
        import torch

        model = model.dequantize(dtype=torch.float32)
        # It is an ordinary model now; what remembers the rounding would refuse to move or save it.
        model.hf_quantizer, model.is_quantized, model.config.quantization_config = None, False, None
        del model.config.quantization_config
        for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_4bit_serializable", "is_8bit_serializable"):
            if hasattr(model, name):
                setattr(model, name, False)
    return model.to(device()).eval(), fresh


def block_linears(model: Any, names: frozenset[str]) -> list[str]:
    """Names of the model's linears that end in one of `names` and stand in a numbered block; heads have linears of these names."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
        and name.rsplit(".", 1)[-1] in names
        and any(part.isdecimal() for part in name.split("."))
    ]


def _open(bundle: Bundle, head: str, options: dict[str, Any], storage: str, *, exact: bool = False) -> tuple[Any, list[str]]:
    import torch
    import transformers

    from tuner import scan

    opener = getattr(transformers, kinds.load("heads", head).AUTO)
    path = bundle.path.resolve()
    if storage in ("nf4", "int8"):
        options = {**options, "quantization_config": _rounding(opener, path, bundle, storage)}
    model, info = opener.from_pretrained(
        path,
        dtype=torch.float32 if exact else getattr(torch, COMPUTE[storage]),
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    if adjust := getattr(kinds.load("heads", head), "opened", None):
        adjust(model)
    scan.use(model)
    if storage in ("nf4", "int8"):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                # A view of the mapped file, which would keep every page of it: the weights as they were before they were rounded.
                parameter.data = parameter.data.clone()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # One evaluation would repack the weights for a kernel that has no gradient, and the training after it would teach
            # only what lies behind the last such layer (bitsandbytes 0.50, CPUs with bfloat16 products).
            module.support_avx512bf16_for_cpu = False
    return model, _fresh(model, set(info["missing_keys"]))


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
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

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


def load_model(bundle: Bundle, dtype: str = "float32") -> Any:
    """The bundle's model in evaluation mode; an adapter is put on its base, a quantized model computes as it is served."""
    quiet()
    manifest = bundle.manifest
    if manifest.kind == "adapter":
        from peft import PeftModel

        base = bundle.base()
        same = base.manifest.head == manifest.head
        model = load_model(base, dtype) if same else new_head(base, str(manifest.head), manifest.serving["head_config"], dtype)[0]
        return PeftModel.from_pretrained(model, bundle.path.resolve()).eval()
    options: dict[str, Any] = {}
    if manifest.kind == "quantized":
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with no_bars():
        model = _open(bundle, str(manifest.head), dtype, options)
    if manifest.serving.get("scheme") == "w8a8-int8":
        _compute_in_int8(model)
    return model.to(device()).eval()


def new_head(bundle: Bundle, head: str, config: dict[str, Any], dtype: str = "float32") -> tuple[Any, list[str]]:
    """The bundle's model with another head, and the names of the modules that its files have no weights for.

    `config` is what the model's configuration has to say about the head. Its random weights follow from torch's seed.
    """
    quiet()
    model, info = _open(bundle, head, dtype, {**config, "output_loading_info": True})
    fresh = sorted({name.rsplit(".", 1)[0] for name in info["missing_keys"]})
    return model.to(device()).eval(), fresh


def _open(bundle: Bundle, head: str, dtype: str, options: dict[str, Any]) -> Any:
    import torch
    import transformers

    opener = getattr(transformers, kinds.load("heads", head).AUTO)
    return opener.from_pretrained(
        bundle.path.resolve(), dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True, **options
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

"""Folds an adapter into its base tensor by tensor: a model larger than the memory is merged all the same.

peft's own layers do the sums, one at a time; transformers' own rules say which tensor of a file belongs to which module.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner import kinds
from tuner.bundle import Bundle
from tuner.checkpoint import ROUNDED, block_linears, copy_generation_config, head_options, quiet, rounded
from tuner.errors import SourceError
from tuner.families import family_of
from tuner.source import weight_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# Tensors of an adapter, beside those of the model.
_ADDED = re.compile(r"\.lora_|\.trainable_tokens_")


def merge(adapter: Bundle, folder: Path, dtype: "torch.dtype", *, original: bool = False) -> None:
    """Write the adapter's base with the adapter added to it, computed in float32 and stored as `dtype`, into `folder`.

    Where the adapter was trained on weights in 4 or 8 bits, it is added to what the rounding left, unless the `original` ones are
    asked for. In memory at a time: the adapter, and as many tensors as the base's largest file has bytes. Raises SourceError where
    the base has no weights for something that the model needs.
    """
    model = _outline(adapter)
    inner = model.get_base_model()
    stored = str(adapter.manifest.serving.get("storage", "fp32"))
    rounding = stored if stored in ROUNDED and not original else None
    files = weight_files(adapter.base().path)
    largest = max(file.stat().st_size for file in files)
    # A head that the base had not makes no second file.
    shards = _Shards(folder, limit=largest + sum(file.stat().st_size for file in weight_files(adapter.path)))
    for name, tensor in _tensors(inner, files, str(adapter.manifest.model_type), rounding):
        shards.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    shards.close()
    inner.config.architectures, inner.config.dtype = [type(inner).__name__], str(dtype).removeprefix("torch.")
    inner.config.save_pretrained(folder)
    if inner.can_generate():
        inner.generation_config.save_pretrained(folder)
        copy_generation_config(inner, adapter.base().path, folder)


def _outline(adapter: Bundle) -> Any:
    """The model with its adapter; the weights of the base have shapes and no values."""
    quiet()
    import torch
    import transformers
    from peft import PeftModel

    base, manifest = adapter.base(), adapter.manifest
    head = kinds.load("heads", str(manifest.head))
    options = head_options(adapter)["config"]
    config = transformers.AutoConfig.from_pretrained(base.path.resolve(), trust_remote_code=False, **options)
    with torch.device("meta"):
        model = getattr(transformers, head.AUTO).from_config(config, dtype=torch.float32)
    if adjust := getattr(head, "opened", None):
        adjust(model)
    # peft moves an adapter to where its base is, and "meta" is nowhere. A single zero of any shape takes four bytes.
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return PeftModel.from_pretrained(model, adapter.path.resolve(), torch_device="cpu")


def _tensors(inner: Any, files: list[Path], model_type: str, rounding: str | None) -> "Iterator[tuple[str, Tensor]]":
    """Each tensor of the merged checkpoint under the name that it has in one; adapted weights are merged."""
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
    from safetensors import safe_open

    modules = dict(inner.named_modules())
    adapted: dict[str, Any] = {f"{name}.weight": module for name, module in modules.items() if isinstance(module, LoraLayer)}
    tokens = {f"{name}.weight": each for name, each in modules.items() if isinstance(each, TrainableTokensWrapper)}
    adapted |= {name: each.token_adapter for name, each in tokens.items() if not each.token_adapter.tied_adapter}
    trained = {
        f"{name}.{part}": tensor
        for name, module in modules.items()
        if isinstance(module, ModulesToSaveWrapper)
        for part, tensor in module.modules_to_save["default"].state_dict().items()
    }
    linears = {_plain(name) for name in block_linears(inner, family_of(model_type)[1].linears)} if rounding else set()
    shapes = {_plain(name): tensor for name, tensor in inner.state_dict().items() if not _ADDED.search(name)}
    names = _Names(inner, shapes)
    left, missing = dict(trained), set(shapes) - set(inner.all_tied_weights_keys)
    for file in files:
        with safe_open(file, "pt", backend="pread") as stream:  # pages of a mapped file would all stay in memory
            for key in stream.keys():  # noqa: SIM118 - no dictionary
                name, stored = names.of(key)
                if name is None or name in inner.all_tied_weights_keys:
                    continue
                missing.discard(name)
                if name in trained:
                    left.pop(name, None)
                    yield stored, trained[name]
                    continue
                tensor = stream.get_tensor(key)
                if name.removesuffix(".weight") in linears:
                    tensor = rounded(tensor, str(rounding))
                yield stored, _merged(adapted.pop(name), tensor) if name in adapted else tensor
    yield from left.items()
    lost = sorted(missing - set(left))
    for name in [name for name in lost if name.endswith(".bias")]:
        # That of a new output layer that is tied to the embeddings, say: transformers makes it zero.
        lost.remove(name)
        yield name, torch.zeros(shapes[name].shape)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise SourceError(f"{files[0].parent}: has no weights for {lost[0]}{more}")
    if adapted:
        raise SourceError(f"{files[0].parent}: has no weight {next(iter(adapted))}, which the adapter changes")


def _plain(name: str) -> str:
    """A module's name as it is without peft's layers around it."""
    for layer in (".token_adapter", ".base_layer", ".original_module", ".modules_to_save.default"):
        name = name.replace(layer, "")
    return name


class _Names:
    """Which parameter a tensor of a checkpoint's file belongs to, as transformers decides it when it reads the file."""

    def __init__(self, inner: Any, shapes: dict[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        rules = get_model_conversion_mapping(inner)
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        self.shapes, self.prefix = shapes, inner.base_model_prefix

    def of(self, key: str) -> tuple[str | None, str]:
        """The parameter's name, None where the model has no such one, and the name to store its tensor under."""
        from transformers.core_model_loading import rename_source_key

        for renamings, converters in ((self.renamings, self.converters), ([], [])):
            name, _ = rename_source_key(key, renamings, converters, self.prefix, self.shapes)
            bare, _ = rename_source_key(key, renamings, converters)
            if name in self.shapes:
                if name == f"{self.prefix}.{bare}":
                    return name, f"{self.prefix}.{key}"
                return name, key.removeprefix(f"{self.prefix}.") if bare == f"{self.prefix}.{name}" else key
        return None, key


def _merged(layer: Any, weight: "Tensor") -> "Tensor":
    """The weight with what the layer's adapter adds to it, in float32."""
    import torch

    linear = layer.get_base_layer()
    empty = linear.weight
    linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    layer.merge(safe_merge=True)
    merged: Tensor = linear.weight.data
    linear.weight = empty
    return merged


class _Shards:
    """Writes tensors into files of a limited size, and the index that says which has which."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.waiting: dict[str, Tensor] = {}
        self.written: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: "Tensor") -> None:
        """Take one tensor; what no longer fits beside it is written first."""
        if self.waiting and sum(each.nbytes for each in self.waiting.values()) + tensor.nbytes > self.limit:
            self._write()
        self.waiting[name] = tensor.contiguous()
        self.total += tensor.nbytes

    def close(self) -> None:
        """Write what waits, then name the files as transformers does."""
        self._write()
        count = len(self.written)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        index = {}
        for number, names in enumerate(self.written):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file)
            index.update(dict.fromkeys(names, file))
        text = json.dumps({"metadata": {"total_size": self.total}, "weight_map": index}, indent=2)
        (self.folder / "model.safetensors.index.json").write_text(text + "\n")

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def _write(self) -> None:
        from safetensors.torch import save_file

        save_file(self.waiting, self._part(len(self.written)), metadata={"format": "pt"})
        self.written.append(list(self.waiting))
        self.waiting = {}

"""How much memory training will take, told from shapes: the model goes through a step whose tensors have no numbers in them.

torch's FakeTensorMode gives every tensor its shape and nothing else. So what a step keeps for its backward pass, and what it needs
in between, is added up for any architecture before a weight is loaded.
"""

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tuner import attention, dropout, elementwise, kinds, scan
from tuner.checkpoint import COMPUTE, ROUNDED, block_linears, device, quiet
from tuner.families import family_of
from tuner.memory import LARGE
from tuner.optimizers import STATE_BYTES
from tuner.progress import silent

# Of a weight: one of 4 bits with its scales, which have 8 bits themselves (QLoRA, section 3), and one of 8 bits.
ROUNDED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
# What is smaller than a large page is in glibc's heap, which has holes: an aligned piece is cut out of a larger one, and what is
# left over at its sides is soon something small of somebody else's, so that the hole it leaves has no room for another like it
# (glibc 2.36, malloc.c, _int_memalign). Larger pieces, up to what lies apart, find their own holes again (told 1.54 GB, 1.43 and
# 1.44 held). And a first step loads code and makes buffers (bytes). Measured on a CPU with SmolLM2.
HOLES, LOADED = 0.6, 50_000_000


# What configurations call it when logits are more than what the output layer makes of the hidden states.
CAPS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")


class Footprint:
    """A model that is trained by a method, without its numbers; all sizes are bytes."""

    weights: int
    """All weights as they are kept, an adapter's too."""
    gradients: int
    """Of all that is trained."""
    state: int
    """The optimizer's."""

    def __init__(
        self,
        config: Any,
        head: str,
        method: Any,
        *,
        optimizer: str = "adamw",
        gradient_checkpointing: bool = False,
        new_tokens: Sequence[int] = (),
        shares: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        """Of the architecture in transformers' `config` with this head, trained by a method with these options.

        `new_tokens` are trained beside an adapter; weights, gradients and optimizer are each split into so many `shares`.
        Raises RecipeError where the method's targets match nothing.
        """
        quiet()
        import transformers

        kind, module = kinds.load("methods", method.kind), kinds.load("heads", head)
        stored, self.mixed = kind.storage(method), getattr(method, "precision", "fp32") == "bf16"
        with torch.device("meta"):
            model = getattr(transformers, module.AUTO).from_config(config, dtype=getattr(torch, COMPUTE[stored]))
        if adjust := getattr(module, "opened", None):
            adjust(model)
        scan.use(model)
        attention.use(model)
        elementwise.use(model)
        family, architecture = family_of(config.model_type)
        small = {id(model.get_submodule(name).weight) for name in block_linears(model, architecture.linears) if stored in ROUNDED}
        if gradient_checkpointing and model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.device("meta"), silent():
            model = kind.prepare(model, method, family, architecture, [], new_tokens)
        if stored == "int8":
            from peft.tuners.lora import LoraLayer

            for each in model.modules():
                if isinstance(each, LoraLayer):
                    each.__dict__.pop("forward", None)  # peft's own is left to them, as it is by tuner/fused.py
                if isinstance(each, torch.nn.Linear) and id(each.weight) in small:
                    each.forward = partial(_KeepsInput.apply, each)  # type: ignore[method-assign]
        parameters = list(model.parameters())
        self.parameters = sum(each.numel() for each in parameters)
        text = config.get_text_config()
        self.vocabulary, self.hidden = int(text.vocab_size), int(text.hidden_size)
        self.width = parameters[0].element_size()
        self.weights = round(
            sum(each.numel() * (ROUNDED_BYTES[stored] if id(each) in small else each.element_size()) for each in parameters)
        )
        count = sum(each.numel() for each in parameters if each.requires_grad)
        output = model.get_output_embeddings()
        # Where rows of it are trained, peft makes a copy with them in it.
        self.output_copied = hasattr(output, "token_adapter")
        self.output_trained = output is not None and output.weight.requires_grad
        self.weights = round(self.weights / shares[0])
        # All rows go through the model at once; products are in bfloat16.
        self.in_one_pass = shares != (1, 1, 1)
        self.gradients, self.state = 4 * count // shares[1], round(count * STATE_BYTES[optimizer] / shares[2])
        # Some architectures scale or cap their logits, which are then there whole (tuner/likelihood.py).
        self.whole_logits = any(getattr(text, name, None) not in (None, 1, 1.0) for name in CAPS)
        # One of them is unpacked at a time.
        self._unpacked = 2 * max((each.numel() for each in parameters if id(each) in small), default=0)
        rounded = stored in ROUNDED or architecture.not_rounded
        self.lighter = [
            *([] if gradient_checkpointing or not model.supports_gradient_checkpointing else ["gradient_checkpointing: true"]),
            *([] if kind.GIVES == "adapter" else ["an adapter (method: lora)"]),
            *([] if rounded else ["weights of 4 bits (method: {kind: lora, storage: nf4})"]),
            "a smaller task.max_tokens",
        ]
        """What of the recipe would take less memory."""
        self._body = getattr(model, "get_base_model", lambda: model)().base_model
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            _without_numbers(model)
        self._found: dict[tuple[Any, ...], tuple[int, int]] = {}

    def step(self, rows: int, length: int, loss: int, *, more: bool) -> int:
        """The most that a step on so many rows, padded to so many tokens, holds beside weights and optimizer.

        `loss` bytes are held between the forward and the backward pass; with `more` rows before these there are gradients from the
        start, otherwise they take the place of what is kept for them.
        """
        kept, most = self._gone_through(rows, length, learning=True)
        return self._allocated(max(kept + loss, most) + self._unpacked + (self.gradients if more else 0))

    def reading(self, rows: int, length: int, loss: int) -> int:
        """The same for rows of which nothing is learned, while there are no gradients."""
        return self._allocated(self._gone_through(rows, length, learning=False)[1] + loss + self._unpacked)

    def answering(self, rows: int, length: int) -> int:
        """What so many answers that grow together to so many tokens hold: most of it keys and values."""
        return self._allocated(self._gone_through(rows, length, learning=False, use_cache=True)[1] + self._unpacked)

    @staticmethod
    def _allocated(size: int) -> int:
        return size if torch.cuda.is_available() else size + LOADED

    def _gone_through(self, rows: int, length: int, *, learning: bool, **options: Any) -> tuple[int, int]:
        """(bytes that are kept for the backward pass, the most that there are at a time, new gradients among them)."""
        key = (rows, length, learning, *options)
        if key not in self._found:
            body = self._body.train(learning)
            with ExitStack() as stack:
                # All blocks of queries are alike, and there may be thousands.
                blocks = attention._blocks
                stack.enter_context(patch.object(attention, "_blocks", lambda *given: blocks(*given)[:1]))
                for place in (attention, dropout):
                    stack.enter_context(patch.object(place, "seed", lambda: 0))
                    stack.enter_context(patch.object(place, "kept", lambda like, *_: torch.empty_like(like)))
                stack.enter_context(patch.object(scan, "_kernels", lambda: (_nothing, _nothing)))
                stack.enter_context(torch.set_grad_enabled(learning))
                stack.enter_context(torch.autocast(device(), torch.bfloat16, enabled=self.mixed and learning))
                stack.enter_context(self._mode)
                ids = torch.zeros(rows, length, dtype=torch.long, device=device())
                held = stack.enter_context(_Held([*body.parameters(), *body.buffers()]))
                out = body(input_ids=ids, **options)[0]
                kept = held.now
                if learning:
                    out.backward(torch.empty_like(out))
            for each in body.parameters():
                each.grad = None
            self._found[key] = (kept, held.most)
        return self._found[key]


def _nothing(*_: Any) -> None:
    """In place of a compiled kernel, which would want numbers and allocates nothing."""


GROUPED = torch.ops.aten._grouped_mm.default


def _grouped(one: torch.Tensor, other: torch.Tensor, offs: torch.Tensor | None = None, *_: Any, **__: Any) -> torch.Tensor:
    """What experts' products have for a result; torch's own function without numbers knows bfloat16 alone."""
    if one.dim() == 2 and other.dim() == 2:
        assert offs is not None
        return one.new_empty(len(offs), one.shape[0], other.shape[1])
    return one.new_empty(*one.shape[:-1], other.shape[-1])


class _KeepsInput(torch.autograd.Function):
    """What bitsandbytes keeps of a frozen 8-bit linear: its input."""

    @staticmethod
    def forward(ctx: Any, layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return None, gradients[0] @ ctx.layer.weight


def _without_numbers(model: Any) -> None:
    """Give the model, which is on the meta device, tensors that claim to be where it will be trained.

    Some of what transformers does depends on where a tensor is, and it looks at no values in tensors of this kind.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device=device())
                    learned = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if learned else empty
                kept[name] = made[id(tensor)]


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that there are at a time, and the most of them, without those that were there before."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._before = [each.untyped_storage() for each in before]  # a weak reference alone would forget them
        self._known = weakref.WeakSet(self._before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return False  # such as whether OPT is to leave this layer out by chance
        result = _grouped(*args, **(kwargs or {})) if func is GROUPED else func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and (storage := each.untyped_storage()) not in self._known:
                self._known.add(storage)
                size = storage.nbytes()
                if size < LARGE and not torch.cuda.is_available():
                    size = round((1 + HOLES) * size)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, size)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size

"""Optimizers by name. What is trained is float32 in all of them; they differ in how much they remember of it."""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

Name = Literal["adamw", "adamw-8bit", "adamw-paged", "adamw-8bit-paged", "adafactor"]
# Bytes of state for each trained parameter; Adafactor keeps a row and a column for each matrix.
STATE_BYTES: dict[str, float] = {"adamw": 8, "adamw-8bit": 2, "adamw-paged": 8, "adamw-8bit-paged": 2, "adafactor": 0.1}


def state_bytes(name: Name, parameters: "Iterable[torch.nn.Parameter]") -> int:
    """About what the optimizer remembers of these parameters."""
    return round(sum(each.numel() for each in parameters) * STATE_BYTES[name])


def optimizer(name: Name, parameters: list["torch.nn.Parameter"], *, learning_rate: float, weight_decay: float) -> Any:
    """AdamW by torch (Loshchilov and Hutter 2019, arXiv:1711.05101), or by bitsandbytes with its state in 8 bits (Dettmers et al.
    2022, arXiv:2110.02861) or in memory that a GPU can page out; or transformers' Adafactor (Shazeer and Stern 2018,
    arXiv:1804.04235), whose steps have this very rate: relative to a parameter's own size they would be next to nothing for an
    adapter, which begins at zero.

    bitsandbytes keeps parameters of less than 4,096 numbers in 32 bits.
    """
    import torch

    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        rate = {"lr": learning_rate, "scale_parameter": False, "relative_step": False}
        return Adafactor(parameters, weight_decay=weight_decay, **rate)
    import warnings

    from bitsandbytes import optim

    # On a CPU nothing is paged, and bitsandbytes says so at every step.
    warnings.filterwarnings("ignore", message=".*[Pp]aged.*", module="bitsandbytes")
    kinds = {"adamw-8bit": optim.AdamW8bit, "adamw-paged": optim.PagedAdamW, "adamw-8bit-paged": optim.PagedAdamW8bit}
    return kinds[name](parameters, lr=learning_rate, weight_decay=weight_decay)

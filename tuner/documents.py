"""Which tokens of a packed batch belong together, told to layers that are called from inside somebody else's model.

Shapes: B rows, T tokens.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor


class Documents:
    """Where the documents of a batch begin: `starts_BT` is true at the first token of each, the first column included."""

    def __init__(self, starts_BT: Tensor) -> None:
        self.starts_BT = starts_BT

    @cached_property
    def bounds(self) -> Tensor:
        """(documents + 1,) int32: where each begins if the rows are laid behind each other, and the end of the last."""
        begins = self.starts_BT.flatten().nonzero().squeeze(-1)
        return torch.cat([begins, begins.new_tensor([self.starts_BT.numel()])]).int()

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, T), true where a token reads another one: itself, and what came before it in its document."""
        number_BT = self.starts_BT.cumsum(-1)
        return (number_BT[:, :, None] == number_BT[:, None, :]).tril()[:, None]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [int(each) for each in self.bounds.diff().tolist()]


_now: Documents | None = None


def now() -> Documents | None:
    """The documents of the batch that is being computed; None where no row has several."""
    return _now


@contextmanager
def documents(which: Documents | None) -> Iterator[None]:
    """A block in which attention, state and convolution begin anew with each document."""
    global _now
    before, _now = _now, which
    try:
        yield
    finally:
        _now = before


def computed_again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For torch.utils.checkpoint's `context_fn`: the second computation of a block of layers has the documents of the first."""
    return nullcontext(), documents(_now)

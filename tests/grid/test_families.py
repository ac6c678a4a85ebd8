"""The facts of the family files, against the modules that transformers really builds."""

from typing import Any

import pytest

from tests.grid.architectures import SMALL
from tuner import kinds
from tuner.checkpoint import block_linears, load_model
from tuner.families import family_of


@pytest.mark.parametrize("model_type", SMALL)
def test_every_linear_of_a_block_is_adapted_or_left_out_with_a_reason(checkpoints: Any, model_type: str) -> None:
    family, architecture = family_of(model_type)
    model = load_model(checkpoints(model_type))
    every = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdecimal() for part in name.split("."))
    }
    assert every - set(family.keep) == architecture.linears | set(architecture.left_out)
    assert architecture.attention <= architecture.linears
    assert not architecture.linears & set(architecture.left_out)
    assert all(architecture.left_out.values())
    assert block_linears(model, architecture.linears)


def test_every_architecture_is_in_one_family() -> None:
    found = [name for family in kinds.names("families") for name in kinds.load("families", family).FAMILY.architectures]
    assert len(found) == len(set(found))

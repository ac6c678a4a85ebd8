"""Small random checkpoints of every architecture."""

import copy
from typing import Any

import pytest

from tests.grid.architectures import SMALL, TOKENS
from tuner import kinds
from tuner.bundle import Bundle
from tuner.families import family_of


@pytest.fixture(scope="session")
def tokenizer(tokenizer: Any) -> Any:
    """The small tokenizer, with a mask for those who hide words."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"mask_token": "<|mask|>"})
    return own


@pytest.fixture(scope="session")
def checkpoints(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a model type to the bundle of a small random checkpoint, made once."""
    made: dict[str, Bundle] = {}

    def checkpoint(model_type: str) -> Bundle:
        if model_type not in made:
            import torch
            import transformers

            from tuner.source import base_bundle, find

            head = "causal" if "causal" in family_of(model_type)[0].heads else "masked"
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(model_type, **SMALL[model_type], **TOKENS, vocab_size=len(tokenizer))
            folder = tmp_path_factory.mktemp(model_type)
            model = getattr(transformers, kinds.load("heads", head).AUTO).from_config(config)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[model_type] = base_bundle(find(str(folder)), tmp_path_factory.mktemp("base"))
        return made[model_type]

    return checkpoint

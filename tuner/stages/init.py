"""Make a model with random weights from a configuration and the tokenizer that came before: the start of pretraining."""

from typing import Any

from pydantic import field_validator

from tuner import kinds
from tuner.bundle import Manifest
from tuner.errors import RecipeError, SourceError, nearest
from tuner.families import family_of
from tuner.kinds import Options as BaseOptions
from tuner.source import Facts, describe_model
from tuner.stages import Job

TAKES = frozenset({"tokenizer"})
RESULT = "untrained"
VERSION = 2
FROM_TOKENIZER = frozenset({"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"})


class Options(BaseOptions):
    """Keys of `- init:`."""

    config: dict[str, Any]
    """`model_type` and whatever that type's transformers configuration has; the vocabulary comes from the tokenizer."""

    @field_validator("config")
    @classmethod
    def _typed(cls, config: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(config.get("model_type"), str):
            raise ValueError("config needs model_type, such as gpt2 or llama")
        if taken := sorted(FROM_TOKENIZER & set(config)):
            raise ValueError(f"{', '.join(taken)}: the tokenizer says that; leave it out")
        return config


def facts(options: Options, vocabulary: int) -> Facts:
    """About what the model will be, before there is one. A vocabulary of so many entries."""
    numbers = {key: value for key, value in options.config.items() if isinstance(value, int)}
    hidden = numbers.get("hidden_size") or numbers.get("n_embd") or 768
    blocks = numbers.get("num_hidden_layers") or numbers.get("n_layer") or 12
    length = numbers.get("max_position_embeddings") or numbers.get("n_positions") or 0
    # A block is about 12 x hidden^2: four projections in attention, eight in the two layers behind it.
    parameters = 12 * blocks * hidden * hidden + vocabulary * hidden
    widths = frozenset({hidden, numbers.get("intermediate_size") or 4 * hidden})
    kind = str(options.config["model_type"])
    return Facts(kind, parameters, length, chat_template=False, widths=widths, head=_head(kind))


def _head(model_type: str) -> str:
    """What a new model of this type is trained to answer with first: words, or those that are hidden."""
    try:
        heads = family_of(model_type)[0].heads
    except SourceError:
        return "causal"  # said of the recipe's key later
    return "causal" if "causal" in heads else "masked"


def gives(options: Options) -> str:  # noqa: ARG001 - a stage's common signature
    """A model."""
    return "model"


def run(job: Job) -> Manifest:
    """Build the model with the recipe's seed; raises RecipeError for a key that the configuration does not have."""
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from tuner.checkpoint import load_tokenizer

    assert job.parent is not None
    tokenizer = load_tokenizer(job.parent.path)
    values = dict(job.options.config)
    known = AutoConfig.for_model(values["model_type"])
    names = set(known.to_dict()) | set(known.attribute_map)
    for key in values:
        if key not in names:
            raise job.recipe.error(
                f'{values["model_type"]} has no setting "{key}"{nearest(key, names)}', "stages", job.index, "init", "config", key
            )
    ids = {name: len(tokenizer) if name == "vocab_size" else getattr(tokenizer, name) for name in FROM_TOKENIZER & names}
    opener = getattr(transformers, kinds.load("heads", _head(values["model_type"])).AUTO)
    torch.manual_seed(job.recipe.seed)
    try:
        model = opener.from_config(AutoConfig.for_model(**{**values, **ids}), dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise RecipeError(
            f"{job.recipe.at('stages', job.index, 'init', 'config')}: no model can be made from it: {error}"
        ) from None
    model.save_pretrained(job.folder)
    tokenizer.save_pretrained(job.folder)
    return describe_model(job.folder, stage="init", fingerprint=job.fingerprint, recipe=job.told())

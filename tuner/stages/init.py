"""Make a model with random weights from a configuration and the tokenizer that came before: the start of pretraining."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from tuner import kinds
from tuner.bundle import Manifest
from tuner.errors import SourceError, nearest
from tuner.families import family_of
from tuner.kinds import Options as BaseOptions
from tuner.source import Facts, describe_model
from tuner.stages import Job

if TYPE_CHECKING:
    from tuner.plan import Plan, Step

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


def check(plan: "Plan", step: "Step") -> None:
    """Raises RecipeError for a setting that the architecture has not, and for settings that make no model. Makes no weights."""
    import torch

    with torch.device("meta"):
        _made(plan.recipe, step.index, step.options.config, dict.fromkeys(FROM_TOKENIZER, 0) | {"vocab_size": 8})


def _made(recipe: Any, index: int, config: dict[str, Any], from_tokenizer: dict[str, Any]) -> Any:
    """A model with random weights. Raises RecipeError."""
    import torch
    import transformers
    from transformers import AutoConfig

    from tuner.checkpoint import quiet

    quiet()
    kind = config["model_type"]
    known = AutoConfig.for_model(kind)
    names = set(known.to_dict()) | set(known.attribute_map)
    for key in config:
        if key not in names:
            raise recipe.error(f'{kind} has no setting "{key}"{nearest(key, names)}', "stages", index, "init", "config", key)
    ids = {name: value for name, value in from_tokenizer.items() if name in names}
    opener = getattr(transformers, kinds.load("heads", _head(kind)).AUTO)
    with _refusals(recipe, index):
        return opener.from_config(AutoConfig.for_model(**{**config, **ids}), dtype=torch.float32)


@contextmanager
def _refusals(recipe: Any, index: int) -> Iterator[None]:
    """What a model of these settings fails at is the recipe's mistake. Raises RecipeError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        said = f"transformers knows no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise recipe.error(f"no model can be made from it: {said}", "stages", index, "init", "config") from None


def gives(options: Options) -> str:  # noqa: ARG001 - a stage's common signature
    """A model."""
    return "model"


def run(job: Job) -> Manifest:
    """Build the model with the recipe's seed; raises RecipeError where its configuration makes none that computes."""
    import torch

    from tuner import scan
    from tuner.checkpoint import load_tokenizer

    assert job.parent is not None
    tokenizer = load_tokenizer(job.parent.path)
    ids = {name: len(tokenizer) if name == "vocab_size" else getattr(tokenizer, name) for name in FROM_TOKENIZER}
    torch.manual_seed(job.recipe.seed)
    model = _made(job.recipe, job.index, job.options.config, ids)
    scan.use(model)
    with _refusals(job.recipe, job.index), torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    model.save_pretrained(job.folder)
    tokenizer.save_pretrained(job.folder)
    return describe_model(job.folder, stage="init", fingerprint=job.fingerprint, recipe=job.told())

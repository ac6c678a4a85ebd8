"""A word after `kind:`, and a stage's name, is the name of a file: this finds the files and the option types in them.

Every file in tuner/tasks, tuner/methods and tuner/stages defines a class `Options`. Nothing is registered anywhere.
"""

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tuner.errors import RecipeError, nearest


class Options(BaseModel):
    """Keys of a recipe: unknown ones are refused, text is not taken for a number, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


@cache
def names(folder: str) -> tuple[str, ...]:
    """The words that a recipe can use for this folder of `tuner`: its file names."""
    package = importlib.import_module(f"tuner.{folder}")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")))


def load(folder: str, name: str) -> Any:
    """The module `tuner.<folder>.<name>`; raises RecipeError with the nearest name where there is no such file."""
    if name not in names(folder):
        raise RecipeError(f'there is no "{name}" in tuner/{folder}/{nearest(name, names(folder))}')
    module: ModuleType = importlib.import_module(f"tuner.{folder}.{name}")
    return module


def choice(folder: str, default: str | None = None) -> Any:
    """The type of a key whose value is `{kind: NAME, ...}`, or just NAME: any one of the folder's Options.

    `default` is the kind of a value that says none.
    """
    members = tuple(load(folder, name).Options for name in names(folder))
    union: Any = Annotated[Union[members], Field(discriminator="kind")] if len(members) > 1 else members[0]  # noqa: UP007

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        return {"kind": default, **value} if isinstance(value, dict) and default else value

    return Annotated[union, BeforeValidator(expand, json_schema_input_type=Union[union, Literal[names(folder)]])]  # noqa: UP007

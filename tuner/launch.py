"""Writes what runs a recipe on a cluster, and hands it in."""

import shutil
import subprocess
from pathlib import Path

from tuner import kinds
from tuner.clusters import Task
from tuner.errors import RecipeError
from tuner.recipe import Recipe


def write(
    recipe: Recipe,
    overrides: list[str],
    out: Path,
    *,
    on: str,
    gpus: bool,
    cpus: int,
    image: str | None = None,
    to: Path | None = None,
) -> tuple[Path, list[str]]:
    """(the file that was written, the command that hands it in). Raises RecipeError for an engine that there is not."""
    engine = kinds.load("clusters", on)
    launch = recipe.launch
    image = image or f"tuner:train-{'cuda' if gpus else 'cpu'}"
    task = Task(recipe.path, overrides, out, launch.nodes, launch.processes, gpus, cpus, image)
    path = to or Path(f"{recipe.path.stem}.{engine.ENDING}")
    try:
        path.write_text(engine.text(task), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {error.strerror}") from None
    return path, [*engine.SUBMIT, str(path)]


def hand_in(command: list[str]) -> None:
    """Run the engine's own command. Raises RecipeError where it is not installed, or fails: it has said why."""
    if not shutil.which(command[0]):
        raise RecipeError(f"{command[0]} is not there; where it is: {' '.join(command)}")
    if code := subprocess.run(command, check=False).returncode:
        raise RecipeError(f"`{' '.join(command)}` ended with {code}, and says above why; the file is written")

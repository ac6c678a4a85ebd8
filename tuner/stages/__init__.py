"""Steps from one bundle to the next. One file each; a file defines

Options             the stage's keys in a recipe
TAKES               the kinds of bundle that it can start from; "nothing" where it can be the first
gives(options)      the kind of bundle that it leaves
RESULT              what to call the result in the report
VERSION             raised when the code changes what comes out, so that old results are made again
run(job)            fills `job.folder` and returns the manifest
train(job)          of a stage that trains: what the other processes do that share its steps (tuner/processes.py)

and, where there is something to say, what else is asked of it:

gate(...)           raises GateError where the measured result is not good enough to go on with
decided_by(options, parent)
                    the held-out figure that decides what comes out, beside measuring it; None where none does
check(plan, step)   raises RecipeError where the stage cannot work in this recipe
KEYS, check_row(record, options, *, chat_template)
                    the keys of a record that it reads; raises DataError for a row that it cannot read; a stage whose options have a
                    `task` leaves both to the task
reads(recipe, options)
                    what else the result follows from, such as the text of a file that an option names
told(figures)       what to say of its figures in the manifest's metrics
ADDS_TOKENS         the model that it gives has tokens that it has yet to learn
facts(options, n)   what is known of a model that the stage makes, with a vocabulary of n
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner import kinds
from tuner.bundle import Bundle
from tuner.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """What a stage is given."""

    recipe: Recipe
    index: int
    options: Any
    parent: Bundle | None
    folder: Path
    """Empty; becomes the bundle once `run` has returned."""
    work: Path
    """Survives a kill, for checkpoints; removed after the stage is finished."""
    fingerprint: str

    def told(self) -> dict[str, Any]:
        """The part of the recipe that this stage followed, for the manifest."""
        told: dict[str, Any] = self.options.model_dump(mode="json")
        return {**told, "seed": self.recipe.seed}


def kept_of_head(job: Job) -> dict[str, Any]:
    """What the manifest of a model says of the head that it has from the job's parent; other programs' files on it are written."""
    from tuner.source import pooling_of

    assert job.parent is not None
    head = kinds.load("heads", str(job.parent.manifest.head))
    pooling = job.parent.manifest.serving.get("pooling") or pooling_of(job.parent.path)
    if pooling is None or not hasattr(head, "describe"):
        return {}
    head.describe(job.folder, {"pooling": pooling})
    return {"pooling": pooling}

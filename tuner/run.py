"""START HERE. Runs a recipe: each stage turns one bundle into the next, and each result is opened again and measured.

The way from a recipe to a served token, in the order in which a reader would follow it:

recipes/demo.yaml     what the user wrote
tuner/recipe.py       reads it, with a place for every complaint
tuner/plan.py         whether the stages fit together, before anything is loaded
tuner/source.py       the model as the first bundle
tuner/stages/tune.py  task (tuner/tasks/sft.py) and method (tuner/methods/lora.py) meet in the loop, tuner/fit.py
tuner/stages/merge.py and tuner/stages/quantize.py
tuner/measure.py      held-out loss, scores and probe of every result
tuner/bundle.py       bundle.json, which is all that the serving side knows
serve/endpoint.py     opens serve/gateway; serve/fleet.py leads names to versions, serve/host.py these to engines
serve/engine.py       starts serve/engines/vllm.py, and watches over it
serve/replay.py       asks the engine the bundle's probe, before anybody else may ask it
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuner.bundle import Bundle, Manifest, add_results, fingerprint, open_bundle, verify, write_bundle
from tuner.data.dataset import task_of
from tuner.data.reading import state
from tuner.errors import BundleError, GateError, RecipeError
from tuner.plan import Plan, Step
from tuner.processes import leading
from tuner.progress import say, timed
from tuner.source import base_bundle, base_folder
from tuner.stages import Job
from tuner.tasks import fits

# Options from which nothing in the result follows, but for the order of sums.
NOT_TOLD = {"gate", "tolerance", "checkpoint_every_steps", "chat_template", "micro_batch_size", "gradient_checkpointing"}


def run(plan: Plan, out_dir: Path) -> list[Bundle]:
    """Every bundle of the recipe, oldest first; finished ones are found again by their fingerprint.

    Raises GateError where a result is not good enough to go on with; what was finished stays.
    """
    from tuner.measure import base_on_probe, measured, with_loss_before
    from tuner.needs import measurable

    bundles: list[Bundle] = []
    reference: Bundle | None = None  # the tuned model, whose probe the later ones should answer alike
    base: Bundle | None = None  # the model before tuning
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / ".lock").touch()
    except OSError as error:
        raise RecipeError(f"--out {out_dir}: nothing can be written there: {error.strerror}") from None
    for remark in plan.remarks():
        say(remark)
    measurable(plan)
    with _alone(out_dir), leading():
        if plan.source is not None:
            with timed(f"base: {plan.source.reference}"):
                given, task = base_bundle(plan.source, out_dir), task_of(plan.recipe, 0)
                if fits(given, task):  # another head has yet to be trained
                    given = measured(given, plan.recipe, task=task)
                bundles.append(_named(out_dir, "base", given))
        for step in plan.steps:
            before = bundles[-1] if bundles else None
            bundle = _finished(plan, step, before, out_dir) or _made(plan, step, before, out_dir)
            task = task_of(plan.recipe, step.index)
            if step.gives != "tokenizer" and plan.learns and (step.trains or fits(bundle, task)):
                base = before if step.trains else base
                # A recipe that tunes nothing compares with the model that it was given.
                untrained = before if before and before.manifest.probe else None
                like = None if step.trains else reference or untrained
                with timed(f"{step.name}: measuring what was saved"):
                    bundle = measured(bundle, plan.recipe, task=task, reference=like, base=base)
                    if step.trains and base is not None:
                        bundle = base_on_probe(bundle, base, task)
                bundle = add_results(bundle, serving={"serve_max_tokens": plan.served_tokens()})
            earlier = before.manifest.metrics if before else {}
            if step.trains and before:
                bundle = with_loss_before(bundle, before, plan.recipe, task)
                earlier = bundle.manifest.metrics.get("before") or {}
            _gate(step, bundle, earlier)
            reference = bundle if step.trains else reference
            bundles.append(_named(out_dir, _link_name(plan, step), bundle))
    return bundles


def tokenizer_now(plan: Plan, out_dir: Path) -> tuple[Any, str]:
    """(the tokenizer that the recipe's tasks read with, None where it is not there; what is to be said of it)."""
    from tuner.checkpoint import load_tokenizer
    from tuner.tokens import tokenizer_of

    changing = [step for step in plan.steps if step.gives == "tokenizer" or getattr(step.stage, "ADDS_TOKENS", False)]
    made = _made_before(plan, changing[-1], out_dir) if changing else None
    later = f"`tuner run {plan.recipe.path}`"
    if not plan.learns:
        then = f"`tuner tokens {made.path} --data FILE` shows" if made else f"{later} trains a tokenizer, and `tuner tokens` shows"
        return None, f"no model reads these rows; {then} what it makes of text"
    if made:
        return load_tokenizer(made.path), f"in the tokens of {made.path}"
    if plan.source is None:
        return None, f"not shown in tokens: {later} has yet to train the recipe's tokenizer in {out_dir}"
    return tokenizer_of(plan.source), f"in the tokens of the model as it is: {later} has yet to extend them" if changing else ""


def _made_before(plan: Plan, step: Step, out_dir: Path) -> Bundle | None:
    """What a stage of this very recipe and data has left in `out_dir`; None where it has yet to run, or something has changed."""
    found: Bundle | None = None
    with suppress(BundleError):
        if plan.source and not (found := _opened(*base_folder(plan.source, out_dir))):
            return None
        for each in plan.steps[: step.index + 1]:
            if not (found := _opened(*_folder(plan, each, found, out_dir))):
                return None
        return found
    return None


def _opened(key: str, path: Path) -> Bundle | None:
    """The bundle at `path`, unless it is another's. Raises BundleError where none is there, or not all of it."""
    bundle = open_bundle(path)
    return bundle if bundle.manifest.fingerprint == key else None


def stage_fingerprint(plan: Plan, step: Step, parent: Bundle | None) -> str:
    """Changes with the stage's options and code version, the parent, the seed and the bytes of the training data."""
    data = plan.recipe.data
    told = step.options.model_dump(mode="json", exclude=NOT_TOLD)
    read: list[Any] = getattr(step.stage, "reads", lambda *_: [])(plan.recipe, step.options)
    decided: list[Any] = []
    figure = getattr(step.stage, "decided_by", lambda *_: None)(step.options, parent)
    if data.holds_out and figure:
        decided = [state(plan.recipe, "heldout"), data.heldout_rows]
        decided += [] if figure == "heldout_loss" else [plan.recipe.evaluate.model_dump(mode="json")]
    return fingerprint(
        step.name,
        step.stage.VERSION,
        [told, *read],
        parent.manifest.fingerprint if parent else None,
        plan.recipe.seed,
        [state(plan.recipe, "train"), [source.weight for source in data.train], data.train_rows, *decided],
    )


def _folder(plan: Plan, step: Step, parent: Bundle | None, out_dir: Path) -> tuple[str, Path]:
    key = stage_fingerprint(plan, step, parent)
    return key, out_dir / f"{step.index + 1}-{step.name}-{key[:8]}"


def _finished(plan: Plan, step: Step, parent: Bundle | None, out_dir: Path) -> Bundle | None:
    key, path = _folder(plan, step, parent, out_dir)
    if not path.exists():
        return None
    try:
        bundle = _opened(key, path)
        if bundle:
            verify(bundle)
    except BundleError as error:
        say(f"{step.name}: made again, since {error}")
        return None
    if bundle:
        say(f"{step.name}: finished before, in {path}")
    return bundle


def _made(plan: Plan, step: Step, parent: Bundle | None, out_dir: Path) -> Bundle:
    key, path = _folder(plan, step, parent, out_dir)
    work = out_dir / f".{path.name}.work"

    def fill(folder: Path) -> Manifest:
        job = Job(plan.recipe, step.index, step.options, parent, folder, work, key)
        manifest: Manifest = step.stage.run(job)
        return _with_lineage(manifest, parent, path)

    if parent is not None:
        verify(parent)
    with timed(step.name):
        bundle = write_bundle(path, out_dir / f".{path.name}.part", fill)
    shutil.rmtree(work, ignore_errors=True)
    return bundle


def _with_lineage(manifest: Manifest, parent: Bundle | None, path: Path) -> Manifest:
    """Paths to the parents, relative to where the bundle will lie."""
    if parent is None:
        return manifest
    way = os.path.relpath(parent.path.resolve(), path.resolve())
    parents = [{**each, "path": os.path.normpath(os.path.join(way, each["path"]))} for each in parent.manifest.parents] + [
        {"path": way, "stage": parent.manifest.stage, "fingerprint": parent.manifest.fingerprint}
    ]
    return replace(manifest, parents=parents, base=way if manifest.kind == "adapter" else None)


def _gate(step: Step, bundle: Bundle, before: dict[str, Any]) -> None:
    gate: Any = getattr(step.stage, "gate", None)
    if gate is None:
        return
    try:
        gate(step.options, bundle.manifest.metrics, before)
    except GateError as error:
        raise GateError(f"{step.name}: {error}; the result is kept in {bundle.path}") from None


def _link_name(plan: Plan, step: Step) -> str:
    earlier = sum(1 for other in plan.steps if other.name == step.name and other.index < step.index)
    return step.name if not earlier else f"{step.name}-{earlier + 1}"


def _named(out_dir: Path, name: str, bundle: Bundle) -> Bundle:
    """A name without a fingerprint that always leads to the newest result of a stage."""
    link, partial = out_dir / name, out_dir / f".{name}.link"
    if link.is_dir() and not link.is_symlink():
        raise RecipeError(f"{link}: a directory stands where the link to the newest result belongs; move it away")
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(bundle.path.resolve(), out_dir.resolve()))
    partial.replace(link)
    return open_bundle(link)


@contextmanager
def _alone(out_dir: Path) -> Iterator[None]:
    """Hold the run's directory; raises RecipeError where another process is at work in it."""
    with (out_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"{out_dir}: another run is at work there; wait for it or choose another --out") from None
        yield

"""Pictures in a terminal: training examples as the model reads them, and what a bundle is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuner import kinds
from tuner.bundle import Bundle
from tuner.data.example import IGNORE, Example
from tuner.plan import Plan

BINS = 10
BAR_WIDTH = 40


def show(plan: Plan, out_dir: Path, rows: int) -> None:
    """Print `rows` examples with what is learned in colour, the counts, and a histogram of lengths.

    A recipe that trains its own tokenizer is shown with the one in `out_dir`. Raises RecipeError where there is none yet.
    """
    from tuner.data.dataset import task_of, tasks_of

    tokenizer = _tokenizer(plan, out_dir)
    for task in tasks_of(plan.recipe) or [task_of(plan.recipe)]:
        _show_task(plan, task, tokenizer, rows)


def _show_task(plan: Plan, task: Any, tokenizer: Any, rows: int) -> None:
    from tuner.data.dataset import training_examples

    console = Console(highlight=False)
    examples, data = training_examples(plan.recipe, task, tokenizer)
    shown = getattr(kinds.load("tasks", task.kind), "shown", lambda example, _: [("", example)])
    for number, example in enumerate(examples[:rows], 1):
        console.rule(f"{task.kind}, example {number}: {len(example.ids)} tokens, {example.supervised:g} learned")
        for name, part in shown(example, task):
            console.print(Text(f"{name}: " if name else "", style="bold") + render(part, tokenizer), soft_wrap=True)
    console.rule("counts")
    console.print(
        f"{data['rows']} rows, {data['tokens']} tokens, {data['supervised_tokens']:g} learned, {data['skipped_rows']} rows left out"
    )
    for reason in data["skipped"]:
        console.print(f"  {reason}", markup=False, soft_wrap=True)
    for line in histogram([len(each.ids) for each in examples]):
        console.print(line, markup=False)


def render(example: Example, tokenizer: Any) -> Text:
    """The example's text: learned tokens green and underlined, the rest dim. Joined, the pieces are what the model reads."""
    text, start = Text(), 0
    learned = [label != IGNORE for label in example.labels]
    for index in range(1, len(learned) + 1):
        if index == len(learned) or learned[index] != learned[start]:
            text.append(tokenizer.decode(example.ids[start:index]), style="green underline" if learned[start] else "dim")
            start = index
    return text


def histogram(lengths: list[int]) -> list[str]:
    """One line for each of ten equal ranges of length, with a bar and the count."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = [0] * BINS
    for length in lengths:
        counts[(length - low) // width] += 1
    most = max(counts)
    return [
        f"{low + index * width:>6}-{low + (index + 1) * width - 1:<6} {'█' * round(BAR_WIDTH * count / most):<{BAR_WIDTH}} {count}"
        for index, count in enumerate(counts)
        if low + index * width <= high
    ]


def show_bundle(bundle: Bundle, *, as_json: bool) -> None:
    """Print what a bundle is, what it was made from, and what was measured."""
    console = Console(highlight=False)
    manifest = bundle.manifest
    if as_json:
        # Not through rich, which would break long lines.
        import sys

        sys.stdout.write(json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n")
        return
    table = Table(show_header=False, box=None)

    def row(name: str, said: str) -> None:
        table.add_row(name, Text(said))  # square brackets in it are no markup

    row("kind", f"{manifest.kind}, from stage {manifest.stage}, fingerprint {manifest.fingerprint}")
    row("model", f"{manifest.model_type} ({manifest.family})")
    row("made from", " -> ".join([*(f"{each['stage']} ({each['path']})" for each in manifest.parents), bundle.path.name]))
    row("recipe", json.dumps(manifest.recipe))
    if manifest.data:
        row("data", ", ".join(f"{key} {value}" for key, value in manifest.data.items() if key != "skipped"))
    row("serving", ", ".join(f"{key} {value}" for key, value in manifest.serving.items() if value is not None))
    for name, values in manifest.metrics.items():
        if name != "key":
            said = ", ".join(f"{key} {value}" for key, value in values.items()) if isinstance(values, dict) else str(values)
            row(name, said)
    row("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    size = sum(each["size_bytes"] for each in manifest.files.values())
    row("files", f"{len(manifest.files)}, {size / 1e6:.1f} MB, {len(manifest.probe)} probe questions")
    console.print(table)


def _tokenizer(plan: Plan, out_dir: Path) -> Any:
    """The tokenizer of the recipe's model, without its weights."""
    from tuner import gguf
    from tuner.checkpoint import load_tokenizer
    from tuner.errors import RecipeError

    if plan.source is None:
        if (out_dir / "tokenizer").is_dir():
            return load_tokenizer(out_dir / "tokenizer")
        raise RecipeError(
            f"{plan.recipe.path}: trains its own tokenizer, and there is none in {out_dir} yet; "
            f"`tuner run {plan.recipe.path}` makes it"
        )
    if plan.source.is_gguf:
        return gguf.load_tokenizer(plan.source.path)
    return load_tokenizer(plan.source.checkpoint)

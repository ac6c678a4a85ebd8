"""Pictures in a terminal: training examples as the model reads them, and what is wrong with the data."""

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from tuner import kinds
from tuner.data.example import IGNORE, Example
from tuner.data.quality import Quality
from tuner.data.reading import not_read
from tuner.data.shapes import told
from tuner.errors import visible
from tuner.plan import Plan

BINS = 10
# Of each kind of finding; a page has more.
SHOWN = 3
BAR_WIDTH = 40


@dataclass(frozen=True)
class Pictured:
    """A task's examples, as a person looks at them."""

    kind: str
    told: list[str]
    """How what is learned was found."""
    rows: int
    tokens: int
    supervised: float
    skipped: list[str]
    skipped_rows: int
    cut_rows: int
    lengths: list[int]
    """Tokens of each example."""
    examples: list[list[tuple[str, list[tuple[str, bool]]]]]
    """Of the first ones: parts with a name, each in pieces that are learned or only read."""


def pictured(plan: Plan, tokenizer: Any, rows: int) -> list[Pictured]:
    """Every task of a recipe with its first `rows` examples."""
    from tuner.data.dataset import task_of, tasks_of, training_examples

    found: list[Pictured] = []
    for task in tasks_of(plan.recipe) or [task_of(plan.recipe)]:
        examples, data = training_examples(plan.recipe, task, tokenizer)
        shown = getattr(kinds.load("tasks", task.kind), "shown", lambda example, _: [("", example)])
        first = [[(name, pieces(part, tokenizer)) for name, part in shown(each, task)] for each in examples[:rows]]
        counts = {key: data[key] for key in ("rows", "tokens", "skipped", "skipped_rows", "cut_rows")}
        said: list[str] = getattr(kinds.load("tasks", task.kind), "told", lambda *_: [])(tokenizer, task, data["shapes"])
        counts |= {"supervised": data["supervised_tokens"], "lengths": examples.lengths}
        found.append(Pictured(task.kind, said, examples=first, **counts))
    return found


def show(tasks: list[Pictured], quality: Quality, remark: str = "") -> None:
    """Print examples with what is learned in colour, the counts, a histogram of lengths, and what is wrong with the data."""
    console = Console(highlight=False)
    for task in tasks:
        for number, parts in enumerate(task.examples, 1):
            console.rule(f"{task.kind}, example {number}")
            for name, part in parts:
                console.print(Text(f"{name}: " if name else "", style="bold") + render(part), soft_wrap=True)
        console.rule(f"{task.kind}, lengths in tokens")
        console.print(
            f"{task.rows} rows, {task.tokens} tokens, {task.supervised:.12g} learned, "
            f"{task.skipped_rows} rows left out, {task.cut_rows} cut"
        )
        for said in task.told:
            console.print(visible(said), markup=False, soft_wrap=True)
        _print_some(console, task.skipped, task.skipped_rows)
        _print_bars(console, bins(task.lengths))
    if remark:
        console.print(remark, markup=False, soft_wrap=True)
    if not tasks:
        console.rule("lengths in characters")
        _print_bars(console, bins(quality.characters))
    console.rule("the data")
    rows = ", ".join(f"{count} {side} rows" for side, count in quality.rows.items())
    console.print(f"{rows}: {told(quality.shapes)}", markup=False, soft_wrap=True)
    for said in not_read(quality.passed_over):
        console.print(visible(said), markup=False, soft_wrap=True)
    for side, bad in quality.bad.items():
        if bad["skipped_rows"]:
            console.print(f"{bad['skipped_rows']} {side} rows cannot be used", style="bold red", markup=False)
            _print_some(console, bad["skipped"], bad["skipped_rows"])
    for name, counts in (("labels", quality.labels), ("languages of rows drawn by chance", quality.languages)):
        if counts:
            most = ", ".join(f"{each} {count / sum(counts.values()):.1%}" for each, count in counts.most_common(12))
            console.print(f"{name}: {visible(most)}{', ...' if len(counts) > 12 else ''}", markup=False, soft_wrap=True)
    for name, found in quality.lines():
        if found.count:
            console.print(f"{found.count} {name}", style="bold red", markup=False)
            _print_some(console, found.listed, found.count)
    nothing = [name for name, found in quality.lines() if not found.count]
    if nothing:
        console.print(f"none: {'; '.join(nothing)}", markup=False, soft_wrap=True)


def _print_some(console: Console, listed: list[str], count: int) -> None:
    for each in listed[:SHOWN]:
        console.print(f"  {visible(each)}", markup=False, soft_wrap=True)
    if count > SHOWN:
        console.print(f"  and {count - SHOWN} more")


def pieces(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Each token's text, and whether it is learned. Joined, they are what the model reads, of tokenizers that keep spaces.

    Tokens that are a part of a character only stand together with those that complete it.
    """
    found: list[tuple[str, bool]] = []
    start = 0
    inside = _inside_words(tokenizer)
    for at in range(1, len(example.ids) + 1):
        text = tokenizer.decode(example.ids[start:at])
        if inside:
            own = tokenizer.convert_ids_to_tokens(example.ids[start])
            text = text.removeprefix(inside) if own.startswith(inside) else f"{' ' if found else ''}{text}"
        if "\ufffd" not in text or at == len(example.ids) or at - start > 8:
            found.append((text, any(label != IGNORE for label in example.labels[start:at])))
            start = at
    return found


def _inside_words(tokenizer: Any) -> str:
    """What WordPiece writes before a piece within a word, since it keeps no spaces; nothing for tokenizers that do."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return str(model["continuing_subword_prefix"]) if model["type"] == "WordPiece" else ""


def render(each: list[tuple[str, bool]]) -> Text:
    """The pieces of an example: learned ones green and underlined, the rest dim."""
    text = Text()
    for piece, learned in each:
        text.append(visible(piece), style="green underline" if learned else "dim")
    return text


def bins(lengths: list[int]) -> list[tuple[str, int]]:
    """Ten equal ranges of length, each with how many there are."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = [0] * BINS
    for length in lengths:
        counts[(length - low) // width] += 1
    starts = range(low, high + 1, width)
    return [(f"{start}-{start + width - 1}", count) for start, count in zip(starts, counts, strict=False)]


def _print_bars(console: Console, counts: list[tuple[str, int]]) -> None:
    most = max((count for _, count in counts), default=1) or 1
    for name, count in counts:
        console.print(f"{name:>15} {'█' * round(BAR_WIDTH * count / most):<{BAR_WIDTH}} {count}", markup=False)

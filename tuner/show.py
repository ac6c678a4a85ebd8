"""Tables in a terminal: what a bundle is, and what tokenizers make of a text."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuner.bundle import Bundle

TOKEN_COLOURS = ("bright_cyan", "bright_yellow", "bright_green", "bright_magenta")
# Entries of a vocabulary that are named beside their count.
NAMED = 8


def show_bundle(bundle: Bundle, *, as_json: bool) -> None:
    """Print what a bundle is, what it was made from, and what was measured."""
    console = Console(highlight=False)
    manifest = bundle.manifest
    if as_json:
        # Not through rich, which would break long lines.
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


def show_tokens(
    references: list[str], data: str | None, text: str | None, *, top: int, list_to: Path | None = None, **groups: Any
) -> None:
    """Print a text in the tokens of each tokenizer, and a table of what they make of the rows of `data`."""
    from tuner.tokens import pieces, tokenizer_of

    console = Console(highlight=False)
    for reference in references if text is not None else []:
        shown, tokenizer = Text(), tokenizer_of(reference)
        parts = pieces(str(text), tokenizer)
        for at, piece in enumerate(parts):
            shown.append(piece.replace("\n", "⏎\n"), style=f"black on {TOKEN_COLOURS[at % len(TOKEN_COLOURS)]}")
            if not console.is_terminal and at + 1 < len(parts):
                shown.append("|")  # a file has no colours
        console.print(Text(f"{reference}: {len(tokenizer(text, add_special_tokens=False)['input_ids'])} tokens\n") + shown)
    if data is not None:
        _show_counts(console, references, data, top=top, list_to=list_to, **groups)


def _show_counts(
    console: Console, references: list[str], data: str, *, top: int, list_to: Path | None, by: str | None, only: list[str] | None
) -> None:
    """A line for each group of rows, and under the table what each tokenizer does not use or has not learned."""
    from tuner.tokens import WHOLE, Counts, measure, write_list

    found = measure(references, data, by, only)
    table = Table(title=Text(f"{data}: tokens a word / bytes a token"))
    table.add_column(Text("rows" if by is None else by))
    for each in found:
        table.add_column(Text(each.name), justify="right", overflow="fold")
    names = sorted(found[0].groups, key=lambda name: (name != WHOLE, -found[0].groups[name].bytes, name))
    for name in names[: top + 1]:
        each_counts = [each.groups.get(name, Counts()) for each in found]
        table.add_row(Text(name or "all"), *(_told(counts) for counts in each_counts))
    console.print(table)
    if len(names) > top + 1:
        console.print(f"and {len(names) - top - 1} smaller groups; `--top {len(names) - 1}` shows all")
    for each in found:
        whole = each.groups[WHOLE]
        console.print(
            f"{each.name}: {whole.tokens} tokens for {whole.bytes} bytes in {whole.texts} texts; "
            f"{whole.unknown} unknown tokens, {whole.changed} texts do not come back as they were",
            markup=False,
            soft_wrap=True,
        )
        if each.example_lost:
            console.print(f"  {each.example_lost}", markup=False, soft_wrap=True)
        lines = [(f"of {len(each.tokenizer)} entries never used", each.unused)]
        if told := each.embeddings:
            lines += [("embeddings are those of another entry", told.same), ("embeddings hardly trained", told.short)]
        for said, ids in lines:
            named = ", ".join(repr(each.token(token_id)) for token_id in ids[:NAMED])
            more = ", ..." if len(ids) > NAMED else ""
            console.print(f"  {len(ids)} {said}{f': {named}{more}' if ids else ''}", markup=False, soft_wrap=True)
        if told and told.beyond:
            console.print(f"  {told.beyond} embeddings beyond the tokenizer")
    if list_to is not None:
        write_list(found, list_to)
        console.print(f"each of these entries: {list_to}", markup=False, soft_wrap=True)


def _told(counts: Any) -> str:
    unknown = f" ({counts.unknown / counts.tokens:.0%} unknown)" if counts.unknown else ""
    return f"{counts.fertility:.2f} / {counts.bytes_per_token:.2f}{unknown}"

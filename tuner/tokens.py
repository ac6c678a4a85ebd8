"""What tokenizers make of a text: how many tokens, what is lost, what is never used; several side by side.

Fertility is tokens a word (Rust et al. 2021, arXiv:2012.15613), where a word is a run of letters and digits; where a language puts
no spaces between words, bytes a token is the figure to compare (Petrov et al. 2023, arXiv:2305.15425).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.data import reading
from tuner.data.quality import WORD, words_of
from tuner.data.rows import BadRows, usable
from tuner.errors import RecipeError, SourceError
from tuner.progress import counted, say
from tuner.recipe import rows_only
from tuner.source import Source, find

# Rows that the library encodes together, on all cores.
BATCH_ROWS = 1_000
WHOLE = "all"
# Names of the weights that a token's number is looked up in.
EMBEDDINGS = tuple(
    f"{name}.weight" for name in ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "backbone.embeddings")
)
# An embedding this much shorter than the middle one has hardly been trained (Land and Bartolo 2024, arXiv:2405.05417, look at such
# ones first).
HARDLY = 0.5


@dataclass
class Counts:
    """Of one tokenizer, over the texts of one group."""

    texts: int = 0
    words: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    """Tokens that stand for something that the tokenizer does not know."""
    changed: int = 0
    """Texts that do not come back as they were."""

    @property
    def fertility(self) -> float:
        """Tokens a word."""
        return self.tokens / max(1, self.words)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that a token stands for."""
        return self.bytes / max(1, self.tokens)


@dataclass
class Measured:
    """A tokenizer and what was found."""

    name: str
    size: int
    groups: dict[str, Counts] = field(default_factory=dict)
    """Counts by group, WHOLE among them."""
    used: int = 0
    """Entries that occur in the texts."""
    example_lost: str = ""
    """The first text that did not come back."""
    embeddings: dict[str, int] = field(default_factory=dict)
    """Of a model: `beyond` entries that no token has, `same` as another one, `short` ones that hardly were trained."""


def measure(references: list[str], data: str, by: str | None = None, only: list[str] | None = None) -> list[Measured]:
    """Each tokenizer over all rows of `data`; `by` is a key of the rows that puts them into groups, of which `only` some may count.

    Raises DataError for rows without text, RecipeError where `by` is no key of theirs, SourceError for what is no tokenizer.
    """
    loaded = [(reference, tokenizer_of(reference)) for reference in references]
    found = [Measured(name, len(tokenizer)) for name, tokenizer in loaded]
    used: list[set[int]] = [set() for _ in loaded]
    for texts, groups in _batches(data, by, only):
        for at, (_, tokenizer) in enumerate(loaded):
            encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
            decoded = tokenizer.batch_decode(encoded, clean_up_tokenization_spaces=False)
            for text, group, ids, again in zip(texts, groups, encoded, decoded, strict=True):
                used[at].update(ids)
                _count(found[at], {WHOLE, group} if group else {WHOLE}, text, ids, again, tokenizer.unk_token_id)
    if not found[0].groups:
        raise RecipeError(f"{data}: no row of it is in any of the groups {', '.join(only or [])}")
    for each, seen, reference in zip(found, used, references, strict=True):
        each.used = len(seen)
        each.embeddings = _embeddings(reference, each.size)
    return found


def tokenizer_of(model: str | Source) -> Any:
    """The tokenizer of a model, a bundle, a directory, a .gguf file or pkg://MODULE/PATH. Raises SourceError."""
    from tuner import gguf
    from tuner.checkpoint import load_tokenizer

    if isinstance(model, str) and (Path(model) / "tokenizer_config.json").is_file():
        return load_tokenizer(Path(model))  # weights are of no interest
    source = find(model) if isinstance(model, str) else model
    return gguf.load_tokenizer(source.path) if source.is_gguf else load_tokenizer(source.checkpoint)


def pieces(text: str, tokenizer: Any) -> list[str]:
    """The text in parts, a token each; tokens that are a part of a character stand together."""
    from tuner.data.example import Example
    from tuner.data.show import pieces as parts

    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [piece for piece, _ in parts(Example(ids, ids), tokenizer)]


def _batches(data: str, by: str | None, only: list[str] | None) -> Iterator[tuple[list[str], list[str]]]:
    recipe = rows_only(data, ["data.on_bad_row=skip"])
    for remark in reading.not_read(reading.passed_over(recipe, "train")):
        say(remark)
    bad = BadRows(recipe.data.on_bad_row)
    texts: list[str] = []
    groups: list[str] = []
    for row, words in counted("reading text", usable(reading.read(recipe, "train"), lambda row: words_of(row.record), bad)):
        if by is not None and by not in row.record:
            raise RecipeError(f"--by {by}: {row.place} has no such key, but {', '.join(row.record)}")
        if only and str(row.record[str(by)]) not in only:
            continue
        texts.append(words)
        groups.append(str(row.record[by]) if by else "")
        if len(texts) == BATCH_ROWS:
            yield texts, groups
            texts, groups = [], []
    if texts:
        yield texts, groups
    if bad.count:
        say(f"{bad.count} rows cannot be used and were left out; the first: {bad.listed[0]}")


def _count(found: Measured, groups: set[str], text: str, ids: list[int], again: str, unknown: int | None) -> None:
    size, words = len(text.encode("utf-8", "surrogatepass")), len(WORD.findall(text))
    for group in groups:
        counts = found.groups.setdefault(group, Counts())
        counts.texts += 1
        counts.words += words
        counts.bytes += size
        counts.tokens += len(ids)
        counts.unknown += ids.count(unknown) if unknown is not None else 0
        counts.changed += again != text
    if again != text and not found.example_lost:
        found.example_lost = f"{text[:60]!r} comes back as {again[:60]!r}"


def _embeddings(reference: str, size: int) -> dict[str, int]:
    """Of a model whose weights lie here: rows of its embeddings that no text can have trained."""
    import torch
    from safetensors import safe_open

    from tuner.source import weight_files

    try:
        source = find(reference)
        files = [] if source.is_gguf or not source.path.is_dir() else weight_files(source.checkpoint)
    except SourceError:
        return {}  # a tokenizer alone
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in (name for name in tensors.keys() if name.endswith(EMBEDDINGS)):  # noqa: SIM118 - no dictionary
                rows = tensors.get_tensor(name).float()
                lengths = rows[:size].norm(dim=1)
                same = len(lengths) - len(torch.unique(rows[:size], dim=0))
                short = int((lengths < HARDLY * lengths.median()).sum())
                return {"beyond": max(0, len(rows) - size), "same": same, "short": short}
    return {}

"""What tokenizers make of a text: how many tokens, what is lost, what is never used; several side by side.

Fertility is tokens a word (Rust et al. 2021, arXiv:2012.15613), where a word is a run of letters and digits; where a language puts
no spaces between words, bytes a token is the figure to compare (Petrov et al. 2023, arXiv:2305.15425).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner import gguf
from tuner.data import reading
from tuner.data.quality import WORD
from tuner.data.rows import BadRows, usable
from tuner.data.text import batches, text_of
from tuner.errors import DataError, RecipeError, SourceError
from tuner.progress import counted, say
from tuner.recipe import rows_only
from tuner.source import Source, find

# Under this name all rows are counted; no group of theirs has it.
WHOLE = ""
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
    tokenizer: Any
    groups: dict[str, Counts] = field(default_factory=dict)
    """Counts by group, WHOLE among them."""
    unused: list[int] = field(default_factory=list)
    """Ids that do not occur in the texts."""
    example_lost: str = ""
    """The first text that did not come back."""
    embeddings: "Embeddings | None" = None
    """Of a model whose weights lie here."""

    def token(self, token_id: int) -> str:
        """The entry as it stands in the vocabulary."""
        return str(self.tokenizer.convert_ids_to_tokens(token_id))

    def listed(self) -> Iterator[dict[str, Any]]:
        """Each entry of which something is to be said."""
        kinds = {"unused": self.unused}
        if self.embeddings:
            kinds |= {"same embedding as another": self.embeddings.same, "hardly trained": self.embeddings.short}
        for why, ids in kinds.items():
            yield from ({"tokenizer": self.name, "id": each, "token": self.token(each), "why": why} for each in ids)


@dataclass
class Embeddings:
    """Rows of a model's embeddings that no text can have trained."""

    same: list[int]
    """Ids whose row is that of an earlier id."""
    short: list[int]
    """Ids whose row is less than half as long as the middle one."""
    beyond: int
    """Rows that no token has."""


def measure(references: list[str], data: str, by: str | None = None, only: list[str] | None = None) -> list[Measured]:
    """Each tokenizer over all rows of `data`; `by` is a key of the rows that puts them into groups, of which `only` some may count.

    Raises DataError where no row has text, RecipeError where `by` is no key of theirs, SourceError for what is no tokenizer.
    """
    found = [Measured(reference, tokenizer_of(reference)) for reference in references]
    used: list[set[int]] = [set() for _ in found]
    for batch in batches(_grouped(data, by, only), lambda each: len(each[0])):
        texts, groups = zip(*batch, strict=True)
        for at, tokenizer in enumerate(each.tokenizer for each in found):
            encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            decoded = tokenizer.batch_decode(encoded, clean_up_tokenization_spaces=False)
            for text, group, ids, again in zip(texts, groups, encoded, decoded, strict=True):
                used[at].update(ids)
                _count(found[at], [WHOLE, *group], text, ids, again, tokenizer.unk_token_id)
    if missing := [name for name in only or [] if name not in found[0].groups]:
        raise RecipeError(f"{data}: no row of it is in the group {missing[0]}")
    for each, seen, reference in zip(found, used, references, strict=True):
        ids = each.tokenizer.get_vocab().values()
        each.unused = sorted(set(ids) - seen)
        rows = _embedding_rows(reference)
        each.embeddings = None if rows is None else untrained(rows, max(ids) + 1)
    return found


def write_list(found: list[Measured], path: Path) -> None:
    """Every entry that is unused or untrained, as JSON lines. Raises RecipeError where nothing can be written."""
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for tokenizer in found for each in tokenizer.listed())
    try:
        path.write_text(lines, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--list {path}: nothing can be written there: {error.strerror}") from None


def tokenizer_of(model: str | Source) -> Any:
    """The tokenizer of a model, a bundle, a directory, a .gguf file or pkg://MODULE/PATH. Raises SourceError."""
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


def _grouped(data: str, by: str | None, only: list[str] | None) -> Iterator[tuple[str, list[str]]]:
    """(text, its group, if there are any) of each row."""
    recipe = rows_only(data, ["data.on_bad_row=skip"])
    for remark in reading.not_read(reading.passed_over(recipe, "train")):
        say(remark)
    bad = BadRows(recipe.data.on_bad_row)
    some = False
    for row, words in counted("reading text", usable(reading.read(recipe, "train"), lambda row: text_of(row.record), bad)):
        some = True
        if by is not None and by not in row.record:
            raise RecipeError(f"--by {by}: {row.place} has no such key, but {', '.join(row.record)}")
        group = [] if by is None else [str(row.record[by]).strip() or "(empty)"]
        if only and group[0] not in only:
            continue
        yield words, group
    if not some:
        raise DataError(f"{data}: none of its rows can be used; the first: {bad.listed[0]}")
    if bad.count:
        say(f"{bad.count} rows cannot be used and were left out; the first: {bad.listed[0]}")


def _count(found: Measured, groups: list[str], text: str, ids: list[int], again: str, unknown: int | None) -> None:
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


def untrained(rows: Any, size: int) -> Embeddings:
    """What stands out in embeddings of shape (ids, width), of which the first `size` belong to tokens."""
    seen: set[bytes] = set()
    same = []
    for at, row in enumerate(rows[:size].numpy()):
        digest = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
        if digest in seen:
            same.append(at)
        seen.add(digest)
    lengths = rows[:size].norm(dim=1)
    short = (lengths < HARDLY * lengths.median()).nonzero().flatten().tolist()
    return Embeddings(same, short, max(0, len(rows) - size))


def _embedding_rows(reference: str) -> Any:
    """(ids, width) of float32; None for what is a tokenizer alone, or whose weights do not lie here."""
    from safetensors import safe_open

    from tuner.source import weight_files

    try:
        source = find(reference)
        if source.is_gguf:
            return gguf.embeddings(source.path)
        files = weight_files(source.checkpoint) if source.path.is_dir() else []
    except SourceError:
        return None
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in (name for name in tensors.keys() if name.endswith(EMBEDDINGS)):  # noqa: SIM118 - no dictionary
                return tensors.get_tensor(name).float()
    return None

"""What is wrong with a data set that no single row shows: duplicates, leaks, contradictions, secrets, and what it is made of.

One pass over the rows; of each a few numbers are kept (about 450 bytes), so that millions fit in memory.
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from random import Random
from typing import Any

import regex

from tuner.data import reading
from tuner.data.rows import BadRows, Row, answered, composed, plain, question, usable, words_of
from tuner.data.shapes import label_name
from tuner.data.text import text_of
from tuner.errors import DataError
from tuner.progress import counted
from tuner.recipe import Recipe

# MinHash of Broder 1997 over sets of three words in a row; 8 bands of 8 find most pairs of which four fifths is common.
PERMUTATIONS, BAND = 64, 8
SIMILAR = 0.8
SHINGLE = 3
# Of rows that share a band, each is compared with so many: thousands of rows from one template would take their square.
MOST_COMPARED = 64
# Brown et al. 2020 (arXiv:2005.14165), appendix C: a text that shares so many words in a row with a benchmark has seen it.
CONTAMINATED_WORDS = 13
# A test text that is shorter counts as a whole; one of fewer words than this is anyone's.
SHORT_WORDS = 5
# Each kind of finding is counted whole and shown in part.
LISTED = 20
# Telling languages apart takes longer than everything else together; this many rows, drawn by chance, give a share to two percent.
LANGUAGE_ROWS = 2_000
BLOCK_ROWS = 10_000
# Where each row's own numbers are kept.
SIDES = ("train", "heldout", "test")
# Letters with their marks, which Python's own \\w cuts apart in Hindi and Tamil, and digits.
WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]+")
# Scripts that write no spaces between words: each letter counts as one.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD_OR_LETTER = regex.compile(rf"[{UNSPACED}]|[[\p{{L}}\p{{M}}\p{{N}}_]--[{UNSPACED}]]+", regex.V1)
# detect-secrets' detectors of secrets with a form of their own; those by entropy or by a keyword find too much in prose.
DETECTORS = (
    "ArtifactoryDetector", "AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector", "CloudantDetector",
    "DiscordBotTokenDetector", "GitHubTokenDetector", "GitLabTokenDetector", "JwtTokenDetector", "MailchimpDetector",
    "NpmDetector", "OpenAIDetector", "PrivateKeyDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector",
    "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector",
)  # fmt: skip
# Nothing that they look for is without one of these.
SUSPICIOUS = re.compile(r"[A-Za-z0-9+/=_\-.]{20,}|://[^/\s:@]+:[^/\s]+@|PRIVATE KEY")
# What may be an address; email-validator says whether it is one.
EMAIL = re.compile(r"([A-Za-z0-9])[A-Za-z0-9._%+-]*(@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,})")
# What chat templates write around turns: in a row's own words it would be read as the end of a turn and the beginning of another.
MARKERS = re.compile(r"<\|[A-Za-z][\w ]{1,40}\|>|\[/?INST\]|<(?:start|end)_of_turn>")
# https://name:password@host is no address, and its password is not repeated.
CREDENTIALS = re.compile(r"://[^/\s@]*@")


@dataclass
class Findings:
    """How often something was found, and where it was found first."""

    count: int = 0
    listed: list[str] = field(default_factory=list)

    def add(self, said: str) -> None:
        """Count one, and keep it while the list is short."""
        self.count += 1
        if len(self.listed) < LISTED:
            self.listed.append(said)


@dataclass
class Quality:
    """What was found in all rows of a recipe."""

    rows: dict[str, int] = field(default_factory=dict)
    shapes: Counter[str] = field(default_factory=Counter)
    passed_over: list[str] = field(default_factory=list)
    """Files in the data's folders that are no data."""
    bad: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of each side the rows that cannot be used, as in a manifest."""
    characters: list[int] = field(default_factory=list)
    """Length of each training row's text."""
    labels: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    """Of the rows that were asked: two letters of ISO 639-1."""
    duplicates: Findings = field(default_factory=Findings)
    near_duplicates: Findings = field(default_factory=Findings)
    contradictions: Findings = field(default_factory=Findings)
    """The same text with another label."""
    leaks: Findings = field(default_factory=Findings)
    """Held-out rows that are training rows, or nearly."""
    contamination: Findings = field(default_factory=Findings)
    """Training rows that hold a text of `data.test`."""
    secrets: Findings = field(default_factory=Findings)
    emails: Findings = field(default_factory=Findings)
    markers: Findings = field(default_factory=Findings)
    """Rows in whose words a turn ends or begins."""
    asked: Findings = field(default_factory=Findings)
    """Held-out rows that ask what a training row asks."""

    def lines(self) -> Iterator[tuple[str, Findings]]:
        """The name of each kind of finding that was looked for, with what was found."""
        yield "rows that are there twice", self.duplicates
        yield "rows that are nearly another one", self.near_duplicates
        yield "texts with two labels", self.contradictions
        if "heldout" in self.rows:
            yield "held-out rows that are training rows, or nearly", self.leaks
            yield "held-out rows that ask what a training row asks", self.asked
        if "test" in self.rows:
            yield "training rows that hold a text of data.test", self.contamination
        yield "rows with a secret in them", self.secrets
        yield "rows with an e-mail address in them", self.emails
        yield "rows whose words hold a mark such as <|im_end|>", self.markers


def examine(recipe: Recipe, check: Callable[[Row], object] = lambda row: row, special: Sequence[str] = ()) -> Quality:
    """Read every row of the recipe's data and say what is in there.

    `check` raises DataError for a row that cannot be used, beside what readers find; `special` are the tokenizer's own special
    tokens. Raises DataError as a run would.
    """
    found, numbers, questions, drawn = Quality(), _Numbers(), _Questions(), _Drawn()
    marks = [re.escape(each) for each in sorted(special, key=len, reverse=True) if not each.isalnum()]
    markers = re.compile("|".join([*marks, MARKERS.pattern]))
    grams: dict[tuple[int, int], int] = {}
    short: set[int] = set()  # how long the test texts are that have fewer words than a run
    contaminated: set[int] = set()
    sides = [side for side in SIDES if side != "heldout" or recipe.data.holds_out]
    # What must not be in the training rows is looked at first.
    for side in reversed([side for side in sides if side != "test" or recipe.data.test]):
        bad = BadRows(recipe.data.on_bad_row)
        found.rows[side] = 0
        # A benchmark need not be in the form that the recipe learns from.
        wanted = check if side != "test" else lambda row: text_of(row.record)
        for row, _ in counted(f"reading {side} rows", usable(reading.read(recipe, side), wanted, bad)):
            found.rows[side] += 1
            words = words_of(row.record)
            numbers.add(side, row.place, words, _label(row.record))
            if side != "test":
                questions.add(side, len(numbers.places) - 1, row.record)
            if side == "test":
                grams.update(dict.fromkeys(_runs(words, CONTAMINATED_WORDS), len(numbers.places) - 1))
                if SHORT_WORDS <= (size := len(_words(words))) < CONTAMINATED_WORDS:
                    short.add(size)
                    grams.update(dict.fromkeys(_runs(words, size), len(numbers.places) - 1))
                continue
            _look(row, found, markers)
            if side == "train":
                drawn.add(words)
                found.shapes[row.shape] += 1
                found.characters.append(len(words))
                for label in labels_of(row.record):
                    found.labels[label] += 1
                runs = (run for size in [CONTAMINATED_WORDS, *short] for run in _runs(words, size)) if grams else iter(())
                if (hit := next((each for each in runs if each in grams), None)) is not None:
                    contaminated.add(len(numbers.places) - 1)
                    found.contamination.add(f"{row.place}: holds words of {numbers.places[grams[hit]]}, {hit[0]} in a row")
        found.bad[side] = bad.told()
        found.passed_over += [each for each in reading.passed_over(recipe, side) if each not in found.passed_over]
        if side == "test" and not found.rows[side]:
            raise DataError(f"{reading.named(recipe, side)}: no row of data.test can be used; the first: {bad.listed[0]}")
    questions.tell(numbers, found, _compare(numbers, found, contaminated))
    found.languages.update(_language(words) for words in drawn.texts if words.strip())
    return found


class _Drawn:
    """A fixed number of texts, each drawn with the same chance from however many there are (Vitter 1985, algorithm R)."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._seen, self._draw = 0, Random(0)

    def add(self, words: str) -> None:
        """Offer one."""
        self._seen += 1
        if len(self.texts) < LANGUAGE_ROWS:
            self.texts.append(words[:1_000])
        elif (at := self._draw.randrange(self._seen)) < LANGUAGE_ROWS:
            self.texts[at] = words[:1_000]


def _everything(value: Any) -> Iterator[str]:
    """Each text in a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _everything(each)


def _label(record: dict[str, Any]) -> str:
    return repr([record[key] for key in ("label", "labels", "tags", "score") if key in record])


def labels_of(record: dict[str, Any]) -> Iterator[str]:
    """The labels of a row, or of its words."""
    listed = [each for key in ("labels", "tags") if isinstance(record.get(key), list) for each in record[key]]
    for each in [record.get("label"), *listed]:
        if isinstance(each, str | int) and str(each).strip():
            yield label_name(each)


def _look(row: Row, found: Quality, markers: re.Pattern[str]) -> None:
    """What one row shows by itself, whatever key it stands under."""
    words = "\n".join(_everything(row.record))
    if "@" in words and (address := next(filter(_is_address, EMAIL.finditer(CREDENTIALS.sub("://", words))), None)):
        found.emails.add(f"{row.place}: {address[1]}...{address[2]}")
    if ("<" in words or "[" in words) and (mark := markers.search(words)):
        found.markers.add(f"{row.place}: {mark.group()}")
    if SUSPICIOUS.search(words) and (kind := _secret(words)):
        found.secrets.add(f"{row.place}: {kind}")


def _is_address(candidate: re.Match[str]) -> bool:
    from email_validator import EmailNotValidError, validate_email

    try:
        validate_email(candidate.group(), check_deliverability=False)  # nothing is asked of the network
    except EmailNotValidError:
        return False
    return True


@cache
def _detectors() -> list[Any]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    there = {each.__name__: each for each in get_mapping_from_secret_type_to_class().values()}
    return [there[name]() for name in DETECTORS if name in there]


def _secret(words: str) -> str | None:
    """The kind of secret in a text. Its value is not repeated."""
    for line in words.splitlines():
        if SUSPICIOUS.search(line):
            for detector in _detectors():
                if next(iter(detector.analyze_string(line)), None):
                    return str(detector.secret_type)
    return None


def _language(words: str) -> str:
    import py3langid

    return str(py3langid.classify(words)[0])


def _runs(words: str, size: int) -> Iterator[tuple[int, int]]:
    """(how many, a number) for each run of so many words."""
    each = _words(words)
    for start in range(len(each) - size + 1):
        yield size, hash(tuple(each[start : start + size]))


def _words(text: str) -> list[str]:
    found: list[str] = (WORD if text.isascii() else WORD_OR_LETTER).findall(composed(text).lower())
    return found


def _number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class _Questions:
    """What held-out rows ask, and the first training row that asks the same, or is a part of the conversation, or goes on with it.

    Held-out rows come first.
    """

    def __init__(self) -> None:
        self._asked: dict[int, list[int]] = {}
        self._trained: dict[int, int] = {}

    def add(self, side: str, at: int, record: dict[str, Any]) -> None:
        """Look at a row."""
        if side == "train" and not self._asked:
            return
        turns = [(plain(before), plain(with_it)) for before, with_it in answered(record)]
        # The whole of one is compared with every part of the other, and all that is asked with all that is answered in training.
        whole, part = ("whole", "part") if side == "heldout" else ("part", "whole")
        keys = {f"{whole} {turns[-1][1]}", *(f"{part} {with_it}" for _, with_it in turns)} if turns else set()
        asked = [*(before for before, _ in turns), *([] if turns and side == "train" else [plain(question(record))])]
        keys |= {f"question {each}" for each in asked if each}
        for key in map(_number, keys):
            if side == "heldout":
                self._asked.setdefault(key, []).append(at)
            else:
                for other in self._asked.pop(key, ()):
                    self._trained.setdefault(other, at)

    def tell(self, numbers: "_Numbers", found: Quality, leaked: set[int]) -> None:
        """Say it, but for rows that were counted as a whole."""
        for at, trained in sorted(self._trained.items()):
            if at not in leaked:
                found.asked.add(f"{numbers.places[at]}: asks what {numbers.places[trained]} asks")


class _Numbers:
    """What is kept of every row: its place, its side, hashes of its text and label, and its MinHash."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.sides = array("b")
        self.texts, self.labels = array("Q"), array("Q")
        self._block: list[list[str]] = []
        self._sketches: list[Any] = []

    def add(self, side: str, place: str, words: str, label: str) -> None:
        """Keep a row's numbers."""
        self.places.append(place)
        self.sides.append(SIDES.index(side))
        self.texts.append(_number(words))
        self.labels.append(_number(label))
        self._block.append(shingles(words))
        if len(self._block) == BLOCK_ROWS:
            self._sketch()

    def alike(self, index: int, other: int, *, nearly: bool = False) -> str:
        """How to say that a row is like another one."""
        return f"{self.places[index]}: {'nearly ' if nearly else ''}the same as {self.places[other]}"

    def contaminate(self, index: int, test: int, found: Quality, known: set[int], *, nearly: bool = False) -> None:
        """Count a training row that is a test row, unless it was counted before."""
        if index not in known:
            known.add(index)
            found.contamination.add(self.alike(index, test, nearly=nearly))

    def _sketch(self) -> None:
        import numpy as np
        from rensa import RMinHash

        if self._block:
            self._sketches.append(np.array(RMinHash.digests_from_token_sets(self._block, PERMUTATIONS, 0), dtype=np.uint32))
            self._block = []

    def sketches(self) -> Any:
        """(rows, PERMUTATIONS) of uint32."""
        import numpy as np

        self._sketch()
        return np.concatenate(self._sketches) if self._sketches else np.zeros((0, PERMUTATIONS), np.uint32)


def shingles(words: str) -> list[str]:
    """Three words in a row each, in lower case."""
    each = _words(words)
    if len(words) > 20 * len(each):
        each = list(words)  # signs, or one long line of code
    return [" ".join(each[at : at + SHINGLE]) for at in range(max(1, len(each) - SHINGLE + 1))]


def _compare(numbers: _Numbers, found: Quality, contaminated: set[int]) -> set[int]:
    """Rows with each other: the same text, and nearly the same. Returns the held-out rows that are training rows."""
    import numpy as np

    texts, labels = np.array(numbers.texts), np.array(numbers.labels)
    order = np.argsort(texts, kind="stable")
    borders = np.flatnonzero(texts[order][1:] != texts[order][:-1]) + 1
    # The first row of each side with each text stands for the others.
    standing: list[int] = []
    leaked: set[int] = set()
    for start, end in zip([0, *borders.tolist()], [*borders.tolist(), len(order)], strict=True):
        if end - start == 1:
            standing.append(int(order[start]))
            continue
        train, heldout, test = ([at for at in order[start:end].tolist() if numbers.sides[at] == side] for side in range(3))
        standing += [each[0] for each in (train, heldout, test) if each]
        for at in heldout if train else []:
            leaked.add(at)
            found.leaks.add(numbers.alike(at, train[0]))
        for at in train if test else []:
            numbers.contaminate(at, test[0], found, contaminated)
        for at in train[1:]:
            differs = labels[at] != labels[train[0]]
            said = numbers.alike(at, train[0])
            (found.contradictions if differs else found.duplicates).add(f"{said}, with another label" if differs else said)
    sketches, single = numbers.sketches(), np.array(sorted(standing), dtype=np.int64)
    sides, repeated = np.array(numbers.sides), set[int]()

    def like(index: int, others: Any) -> int | None:
        """The first of the other rows that has nearly the same text, and not the very same."""
        others = others[:MOST_COMPARED]
        near = (sketches[others] == sketches[index]).mean(axis=1) >= SIMILAR
        alike = others[near & (texts[others] != texts[index])]
        return int(alike[0]) if len(alike) else None

    for start in range(0, PERMUTATIONS, BAND):
        band = np.ascontiguousarray(sketches[single, start : start + BAND]).view(f"V{4 * BAND}").ravel()
        _, groups, counts = np.unique(band, return_inverse=True, return_counts=True)
        members = np.argsort(groups, kind="stable")
        ends = np.cumsum(counts)
        for group in np.flatnonzero(counts > 1):
            inside = np.sort(single[members[ends[group] - counts[group] : ends[group]]])
            train, heldout, test = (inside[sides[inside] == side] for side in range(3))
            # Each row is counted once, however many it is like.
            for at in heldout.tolist():
                if at not in leaked and (other := like(at, train)) is not None:
                    leaked.add(at)
                    found.leaks.add(numbers.alike(at, other, nearly=True))
            for at in train.tolist() if len(test) else []:
                if at not in contaminated and (other := like(at, test)) is not None:
                    numbers.contaminate(at, other, found, contaminated, nearly=True)
            for place, at in enumerate(train.tolist()):
                if place and at not in repeated and (other := like(at, train[:place])) is not None:
                    repeated.add(at)
                    found.near_duplicates.add(numbers.alike(at, other, nearly=True))
    return leaked

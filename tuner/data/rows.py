"""A row with its place, and what happens to rows that cannot be used."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator

from tuner.errors import DataError, nearest
from tuner.kinds import Options

T = TypeVar("T")
# The report lists this many of the rows that were left out; all of them are counted.
LISTED = 20
# A longer one is a file without line ends more often than a row; making tokens of a text takes about 90 times its size in memory.
MOST_ROW_BYTES = 32_000_000
# Nothing that a person wrote has these; tabs, line ends and form feeds it may have, and pages of the web often U+0080 to U+009F.
# Half of a surrogate pair is no character at all.
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]")

# The soft hyphen, Arabic's and Hebrew's points and marks, what has no width, and how an emoji is drawn.
UNSEEN = re.compile(
    "[\u00ad\u034f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u061c\u0640\u064b-\u065f\u0670"
    "\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\u200b-\u200f\u2060-\u2064\ufe00-\ufe0f\ufeff]"
)

BESIDE_SIGN = re.compile(r" ?([^\w\s]) ?")

# Keys whose text tasks read.
SPEAKING = (
    "text", "messages", "prompt", "completion", "chosen", "rejected", "words", "anchor", "positive", "negative", "negatives",
    "sentence1", "sentence2",
)  # fmt: skip
# Keys whose text says what a row is, not what it says.
MARKS = frozenset({"role", "label", "labels", "tags", "score", "id", "type", "tools", "tool_call_id"})
# Keys of a message whose text is compared.
SAID = frozenset({"content", "tool_calls"})

Choice = Literal["error", "skip"]


@dataclass(frozen=True)
class Row:
    """One record and where it stands."""

    place: str
    record: dict[str, Any]
    shape: str = ""
    """The form that it was written in (tuner/data/shapes.py)."""
    source: int = 0
    """Which of the recipe's sources it is from."""

    @property
    def content(self) -> bytes:
        """The record alone, the same bytes for the same record."""
        return json.dumps(self.record, sort_keys=True, default=str).encode("utf-8", "surrogatepass")


def words_of(record: dict[str, Any], *, system: bool = False) -> str:
    """What the record says, without what it is labelled, and unless wanted without what a system message says to all alike.

    That is what stands under the keys that tasks read, or under all where there are none of those.
    """
    read = {key: record[key] for key in SPEAKING if key in record}
    if isinstance(read.get("sentence1"), str) and isinstance(read.get("sentence2"), str):
        read["sentence1"], read["sentence2"] = sorted((read["sentence1"], read["sentence2"]))  # a pair says the same both ways
    return "\n".join(_inside(read or record, system=system))


def plain(text: str) -> str:
    """A text as it is compared: in lower case, each blank once and none beside a sign, and an é in one of its two forms."""
    return BESIDE_SIGN.sub(r"\1", " ".join(composed(text).casefold().split()))


def composed(text: str) -> str:
    """In Unicode's form NFKC, without vowel points of Arabic and Hebrew, and without characters that show nothing."""
    return text if text.isascii() else UNSEEN.sub("", unicodedata.normalize("NFKC", UNSEEN.sub("", text)))


def _asking(record: dict[str, Any]) -> Any:
    return record.get("messages", record.get("prompt", record.get("anchor")))


def opening(record: dict[str, Any]) -> str:
    """What is asked first; nothing for rows of other kinds."""
    turns = _asking(record)
    if isinstance(turns, list):
        turns = next((turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"), None)
    return "\n".join(_inside(turns, system=False))


def question(record: dict[str, Any]) -> str:
    """What stands before the last answer; nothing for rows of other kinds."""
    turns = _asking(record)
    if isinstance(turns, list) and not {"chosen", "completion"} & set(record):
        turns = turns[:-1]
    return "\n".join(_inside(turns, system=False))


def answered(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Of each answer in a conversation (what stands before it, the same with it), the last answer last."""
    turns = record.get("messages")
    if isinstance(turns, list) and "chosen" not in record:
        so_far: list[str] = []
        for turn in turns:
            before = "\n".join(so_far)
            so_far += _inside(turn, system=False)
            if isinstance(turn, dict) and turn.get("role") == "assistant":
                yield before, "\n".join(so_far)


def _inside(value: Any, *, system: bool) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and (system or value.get("role") != "system"):
        for key, each in value.items():
            # Of a message what is said in it; who said it when is not.
            if key in SAID if "role" in value and SAID & set(value) else key not in MARKS:
                yield from _inside(each, system=system)
    elif isinstance(value, list):
        for each in value:
            yield from _inside(each, system=system)


def lacking(value: Any, *, there: bool = True) -> str:
    """What is wrong with a value that is no text: `empty` where its key is `there` and nothing stands under it, else `shape`."""
    return "empty" if there and (value is None or (isinstance(value, str) and not value.strip())) else "shape"


class OnBadRow(Options):
    """What happens to rows that cannot be used, by what is wrong: `error` stops, `skip` leaves them out, counts and lists them."""

    broken: Choice = "error"
    """Not JSON, no object, too few or too many fields."""
    encoding: Choice = "error"
    """Not UTF-8."""
    control: Choice = "error"
    """Text with control characters, such as NUL."""
    shape: Choice = "error"
    """A key is missing, or its value is of another kind."""
    turns: Choice = "error"
    """A role that no one knows, or turns out of order."""
    empty: Choice = "error"
    """There is no text: an empty cell, null, or an assistant that says nothing."""
    label: Choice = "error"
    """No label, or one that the recipe does not name."""
    too_long: Literal["error", "skip", "truncate"] = "error"
    """More tokens than the task's max_tokens; `truncate` cuts their end off, and counts them."""
    unlearned: Choice = "error"
    """Nothing in it would be learned."""


def _for_all(value: Any) -> Any:
    if value in ("error", "skip"):
        return dict.fromkeys(OnBadRow.model_fields, value)
    if isinstance(value, str):
        stop = "; it is called error now" if value == "stop" else nearest(value, ["error", "skip"])
        raise ValueError(f'"{value}" is not one of the values{stop}, or a value for each of {", ".join(OnBadRow.model_fields)}')
    return value


Policy = Annotated[OnBadRow, BeforeValidator(_for_all, json_schema_input_type=OnBadRow | Choice)]


@dataclass
class BadRows:
    """Those that were met, and what the recipe wants done with them."""

    policy: OnBadRow = field(default_factory=OnBadRow)
    count: int = 0
    listed: list[str] = field(default_factory=list)
    by_kind: Counter[str] = field(default_factory=Counter)

    @property
    def truncates(self) -> bool:
        """A row that is too long is cut off."""
        return self.policy.too_long == "truncate"

    def met(self, error: DataError) -> None:
        """Count a row whose error begins with its place, or raise the error where the recipe says so."""
        if error.kind is None:
            raise error
        if getattr(self.policy, error.kind) != "skip":
            other = ", `{too_long: truncate}` cuts them off" if error.kind == "too_long" else ""
            advice = f"; `data.on_bad_row: {{{error.kind}: skip}}` leaves such rows out and counts them{other}"
            raise DataError(f"{error}{advice}", error.kind) from None
        self.count += 1
        self.by_kind[error.kind] += 1
        if len(self.listed) < LISTED:
            self.listed.append(str(error))

    def told(self) -> dict[str, Any]:
        """For the manifest."""
        return {"skipped_rows": self.count, "skipped_by_kind": dict(self.by_kind), "skipped": self.listed}


def usable(rows: Iterator[Row | DataError], use: Callable[[Row], T], bad: BadRows) -> Iterator[tuple[Row, T]]:
    """Each row with `use(row)`; a row that is damaged, or of which `use` raises DataError, stops or is counted in `bad`."""
    for row in rows:
        try:
            if isinstance(row, DataError):
                bad.met(row)
                continue
            result = use(row)
        except DataError as error:
            if isinstance(row, DataError):
                raise
            bad.met(DataError(f"{row.place}: {error}", error.kind or "shape"))
        else:
            yield row, result


def check_texts(record: dict[str, Any]) -> None:
    """Raises DataError for what is no text in a record's texts, and for more text than a row can have."""
    if _check_texts(record) > MOST_ROW_BYTES:
        raise DataError(f"longer than {MOST_ROW_BYTES // 1_000_000} MB, expected one row of many", "broken")


def _check_texts(value: Any) -> int:
    """The bytes of a text, or of the texts and keys of a list or mapping."""
    if isinstance(value, str):
        if found := CONTROL.search(value):
            near = f"U+{ord(found.group()):04X} in {value[max(0, found.start() - 20) : found.start() + 20]!r}"
            if found.group() >= "\ud800":
                raise DataError(f"half of a surrogate pair, which is no character: {near}, expected text", "encoding")
            raise DataError(f"the control character {near}, expected text", "control")
        return len(value) if value.isascii() else len(value.encode())
    if isinstance(value, dict):
        return sum(map(_check_texts, value)) + sum(map(_check_texts, value.values()))
    return sum(map(_check_texts, value)) if isinstance(value, list) else 0


def first_of_each(rows: list[Any]) -> list[Any]:
    """The first example of each row: a long document has several."""
    first: dict[tuple[int, str], Any] = {}
    for row, example in rows:
        first.setdefault((row.source, row.place), (row, example))
    return list(first.values())

"""More entries for the tokenizer of a model: what is learned from text, and what is listed.

BPE goes on merging where its training ended, which leaves no entry that cannot be reached (Purason et al. 2025,
arXiv:2512.03989, section 3.1). WordPiece, which looks for the longest piece, gets whole words. What saves most tokens comes first.
"""

import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tuner.data.text import batches
from tuner.errors import SourceError
from tuner.progress import say

# Tokens of different words that are looked at, about a gigabyte; where spaces stand between words no text of 200 MB has as many.
MOST_TOKENS = 10_000_000
# How SentencePiece marks the beginning of a word, and writes a byte of a character that it does not have.
WORD_BEGINS, BYTE = "▁", re.compile(r"<0x[0-9A-F]{2}>")
# A letter or digit of a script that puts spaces between words: not Thai, Lao, Burmese, Khmer, Chinese, Japanese or Korean.
SPACED = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\uffff]"

Word = tuple[str, ...]


@dataclass(frozen=True)
class Entries:
    """What a tokenizer does not have yet. Tokens are spelled as its vocabulary does it."""

    pieces: dict[str, list[str]] = field(default_factory=dict)
    """Each new token, and the old ones that it stands for; those that save most come first."""
    merges: list[tuple[str, str]] = field(default_factory=list)
    """For BPE: the two tokens that make one, in order."""


def words(tokenizer: Any, texts: Iterable[str]) -> Counter[Word]:
    """How often each word of the texts occurs, as the tokens that it is cut into; a word of one token is left out.

    A word is what the tokenizer's own rules never let a token reach across. Once the different ones have MOST_TOKENS tokens, no
    more are taken up, and that is said.
    """
    backend, names = _whole_texts(tokenizer), {number: token for token, number in tokenizer.get_vocab().items()}
    apart = {*tokenizer.get_added_vocab(), tokenizer.unk_token}
    found: Counter[Word] = Counter()
    kept = 0
    for batch in batches(texts, len):
        for encoding in backend.encode_batch(batch, add_special_tokens=False):
            for word in _split([names[number] for number in encoding.ids], encoding.word_ids, apart):
                if len(word) > 1 and (kept < MOST_TOKENS or word in found):
                    kept += 0 if word in found else len(word)
                    found[word] += 1
    if kept >= MOST_TOKENS:
        say(f"learning from the words that come first, which are {kept:,} tokens; of more only those among them are counted")
    return found


def count(tokenizer: Any, texts: Iterable[str]) -> Counter[int]:
    """How often each token occurs in the texts, by its number."""
    found: Counter[int] = Counter()
    backend = _whole_texts(tokenizer)
    for batch in batches(texts, len):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            found.update(encoding.ids)
    return found


def require_learnable(tokenizer: Any) -> None:
    """Raises SourceError for a tokenizer that is neither BPE nor WordPiece."""
    model = _tree(tokenizer)["model"]
    if model["type"] not in ("BPE", "WordPiece") or (model["type"] == "BPE" and model.get("continuing_subword_prefix")):
        kind = "BPE with marks inside words" if model["type"] == "BPE" else model["type"]
        raise SourceError(f"learned: the tokenizer is {kind}, and tokens are learned for BPE and WordPiece; list some instead")


def learn(tokenizer: Any, found: Counter[Word], most: int, min_frequency: int) -> Entries:
    """At most so many new tokens, of which each occurs at least `min_frequency` times in the words."""
    model = _tree(tokenizer)["model"]
    if model["type"] == "WordPiece":
        return _whole_words(found, most, min_frequency, model)
    return _merges(found, most, min_frequency, model["vocab"])


def extend(tokenizer: Any, learned: Entries, listed: list[str], folder: Path) -> Any:
    """The tokenizer with new entries behind those that it has, written into `folder` and opened from there.

    Listed tokens are found before anything else is cut, words among them only as whole words. Raises SourceError where transformers
    opens the result in another way than it was written, and for a listed token behind which a text does not come back as it was.
    """
    from tuner.checkpoint import load_tokenizer

    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tree["model"]["vocab"]
    old = tokenizer.get_vocab()
    # Marks such as <|im_end|> may be no part of the model's vocabulary; there they keep their numbers, whatever comes behind.
    numbers = {**old, **{token: max(old.values()) + 1 + at for at, token in enumerate([*learned.pieces, *listed])}}
    if isinstance(vocabulary, dict):
        # WordPiece would cut other words by a listed one.
        left_out = set(listed) if tree["model"]["type"] == "WordPiece" else set()
        own = [each for each in numbers.items() if each[0] not in left_out]
        tree["model"]["vocab"] = dict(sorted(own, key=lambda each: each[1]))
    if learned.merges:
        spelled = all(isinstance(each, str) for each in tree["model"]["merges"])
        tree["model"]["merges"] += [" ".join(each) if spelled else list(each) for each in learned.merges]
    tree["added_tokens"] += [
        {"id": numbers[token], "content": token, "single_word": _is_word(token), "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": False}
        for token in listed
    ]
    file.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    opened = load_tokenizer(folder)
    wrong = [token for token, number in numbers.items() if opened.convert_tokens_to_ids(token) != number]
    if wrong:
        raise SourceError(f"transformers opens the extended tokenizer without {wrong[0]!r} and {len(wrong) - 1} others")
    for token in listed:
        text = f"a {token} b"
        again = _again(text, opened)
        if again not in (_again(text, tokenizer), f"{_again('a', tokenizer)} {token} {_again('b', tokenizer)}"):
            # SentencePiece puts a space before each part of a text, and behind a listed token a part begins. Byte-level
            # tokenizers take a listed token's letters beyond ASCII for bytes.
            raise SourceError(
                f"with {token!r} listed this tokenizer does not give a text back: {text!r} becomes {again!r}; leave it to `learned`"
            )
    return opened


def _again(text: str, tokenizer: Any) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _whole_texts(tokenizer: Any) -> Any:
    """The library's own tokenizer, without a length that its file may have for cutting and filling up texts."""
    from tokenizers import Tokenizer

    own: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    return own


def _tree(tokenizer: Any) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return tree


def _is_word(token: str) -> bool:
    """It begins and ends as words do, so that it must not be found within one."""
    return bool(re.fullmatch(rf"{SPACED}(.*{SPACED})?", token, re.DOTALL))


def _split(tokens: list[str], word_ids: list[int | None], apart: set[str]) -> Iterator[Word]:
    word: list[str] = []
    last = None
    for token, number in zip(tokens, word_ids, strict=True):
        alone = token in apart or BYTE.fullmatch(token)
        if word and (alone or number != last or token.startswith(WORD_BEGINS)):
            yield tuple(word)
            word = []
        if not alone:
            word.append(token)
        last = number
    yield tuple(word)


def _whole_words(found: Counter[Word], most: int, min_frequency: int, model: dict[str, Any]) -> Entries:
    """Words that save most. Of a longer one the rest has to be there in letters, or it would become unknown."""
    prefix = model["continuing_subword_prefix"]
    spelled = {word: "".join(piece.removeprefix(prefix) for piece in word) for word in found}
    barred: set[str] = set()
    for text in spelled.values():
        last = max((at for at, letter in enumerate(text) if prefix + letter not in model["vocab"]), default=0)
        barred.update(text[:end] for end in range(1, last + 1))
    gains = {
        word: times * (len(word) - 1) for word, times in found.items() if times >= min_frequency and spelled[word] not in barred
    }
    best = sorted(gains, key=lambda word: (-gains[word], word))[:most]
    return Entries({spelled[word]: list(word) for word in best})


def _merges(found: Counter[Word], most: int, min_frequency: int, old: dict[str, int]) -> Entries:
    """The pair of neighbours that occurs most often becomes one token, again and again (Sennrich et al. 2016, algorithm 1).

    Of two pairs that occur as often that with the lower numbers does, as in the tokenizers library's own training.
    """
    numbers = dict(old)
    spelled, times = [list(word) for word in found], list(found.values())
    pairs: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for at, word in enumerate(spelled):
        for pair in pairwise(word):
            pairs[pair] += times[at]
            where[pair].add(at)
    heap = [(-often, numbers[pair[0]], numbers[pair[1]], pair) for pair, often in pairs.items()]
    heapq.heapify(heap)
    entries = Entries()
    while heap and len(entries.pieces) < most:
        often, *_, pair = heapq.heappop(heap)
        joined = "".join(pair)
        if -often != pairs[pair] or joined in old:
            continue  # it has changed since, and stands there once more
        if -often < min_frequency:
            break
        entries.merges.append(pair)
        numbers.setdefault(joined, len(numbers))
        entries.pieces.setdefault(joined, [piece for each in pair for piece in entries.pieces.get(each, [each])])
        changed: set[tuple[str, str]] = set()
        for at in where.pop(pair):
            before = spelled[at]
            spelled[at] = after = _joined(before, pair, joined)
            for sign, word in ((-1, before), (1, after)):
                for each in pairwise(word):
                    pairs[each] += sign * times[at]
                    changed.add(each)
            for each in pairwise(after):
                where[each].add(at)
        for each in changed:
            if pairs[each] > 0:
                heapq.heappush(heap, (-pairs[each], numbers[each[0]], numbers[each[1]], each))
    return entries


def _joined(word: list[str], pair: tuple[str, str], joined: str) -> list[str]:
    after: list[str] = []
    for piece in word:
        if after and (after[-1], piece) == pair:
            after[-1] = joined
        else:
            after.append(piece)
    return after

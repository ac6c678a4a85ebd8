"""The labels of words in a text: `/v1/tokens/classify`.

An engine knows tokens by their numbers alone; where each stands in the text is found here, with the tokenizer of the bundle.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from serve.gateway.score import texts
from serve.version import Version


def asks(asked: dict[str, Any], version: Version) -> dict[str, Any]:
    """The body for the engine: the tokens of the texts. Raises ValueError with what is wrong."""
    if _is_text(asked["input"]):
        return {**asked, "input": [each.ids for each in _encoded(asked, version)]}
    return asked


class Telling:
    """The answer."""

    def __init__(self, asked: dict[str, Any], version: Version) -> None:
        self._names = [str(each) for each in version.bundle.manifest.serving.get("labels") or []]
        self._encoded = _encoded(asked, version) if _is_text(asked["input"]) else None
        self._texts = texts(asked["input"], "input") if self._encoded else []

    def whole(self, told: dict[str, Any]) -> dict[str, Any]:
        """For each text `data`, the probabilities of each token, and `words`: of each its text, place, label and probability.

        A word has the label of its first token, as it was trained; places count characters.
        """
        if self._encoded is None:
            return told
        entries = [
            {**entry, "words": self._words(text, encoded, entry["data"])}
            for entry, text, encoded in zip(told["data"], self._texts, self._encoded, strict=True)
        ]
        return {**told, "data": entries}

    def _words(self, text: str, encoded: Any, rows: list[list[float]]) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for word, (start, end), values in zip(encoded.word_ids, encoded.offsets, rows, strict=True):
            if word is None:
                continue  # a token of the tokenizer's own
            if word in found:
                found[word] |= {"end": end, "word": text[found[word]["start"] : end]}
                continue
            best = values.index(max(values))
            name = self._names[best] if best < len(self._names) else str(best)
            found[word] = {"word": text[start:end], "start": start, "end": end, "label": name, "score": values[best]}
        return list(found.values())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], str))


def _encoded(asked: dict[str, Any], version: Version) -> list[Any]:
    tokenizer = _tokenizer(version.bundle.path.resolve() / "tokenizer.json")
    return list(tokenizer.encode_batch(texts(asked["input"], "input")))


@lru_cache(maxsize=8)
def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer

"""How alike texts are, by the vectors of an embedding model: `/v1/score` as vLLM has it. The cosine, from -1 to 1."""

import time
from typing import Any
from uuid import uuid4

from serve.version import Version

MOST_TEXTS = 1024


def asks(asked: dict[str, Any], version: Version) -> dict[str, Any]:  # noqa: ARG001 - a translation's common signature
    """The body for /v1/embeddings. Raises ValueError with what is wrong."""
    ones, others = _sides(asked)
    return {"model": asked["model"], "input": [*ones, *others]}


class Telling:
    """The answer."""

    def __init__(self, asked: dict[str, Any], version: Version) -> None:
        self._asked, self._model = asked, version.id

    def whole(self, told: dict[str, Any]) -> dict[str, Any]:
        """A score for each pair; one text on the left is compared with each on the right."""
        ones, _ = _sides(self._asked)
        vectors = [each["embedding"] for each in told["data"]]
        left, right = vectors[: len(ones)], vectors[len(ones) :]
        scores = [cosine(one, other) for one, other in zip(left * (len(right) if len(left) == 1 else 1), right, strict=True)]
        return {
            "id": f"score-{uuid4().hex}", "object": "list", "created": int(time.time()), "model": self._model,
            "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
            "usage": told["usage"],
        }  # fmt: skip


def texts(value: Any, name: str) -> list[str]:
    """One text or several as a list; raises ValueError for anything else."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not listed or not all(isinstance(each, str) and each for each in listed):
        raise ValueError(f"{name}: expected a text, or a list of texts")
    if len(listed) > MOST_TEXTS:
        raise ValueError(f"{name}: {len(listed)} texts, {MOST_TEXTS} are compared at most")
    return listed


def cosine(one: list[float], other: list[float]) -> float:
    """Of two vectors of length one."""
    return sum(a * b for a, b in zip(one, other, strict=True))


def _sides(asked: dict[str, Any]) -> tuple[list[str], list[str]]:
    names = ("queries", "documents") if "queries" in asked or "documents" in asked else ("text_1", "text_2")
    ones, others = (texts(asked.get(name), name) for name in names)
    if len(ones) not in (1, len(others)):
        raise ValueError(
            f"{names[0]} has {len(ones)} texts and {names[1]} {len(others)}; one, or as many as those, can be compared"
        )
    return ones, others

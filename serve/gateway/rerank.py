"""Which documents are nearest to a query, by the vectors of an embedding model: `/v1/rerank`, as Cohere's clients ask it."""

from typing import Any
from uuid import uuid4

from serve.gateway.score import cosine, texts
from serve.version import Version


def asks(asked: dict[str, Any], version: Version) -> dict[str, Any]:  # noqa: ARG001 - a translation's common signature
    """The body for /v1/embeddings. Raises ValueError with what is wrong."""
    return {"model": asked["model"], "input": [asked["query"], *_documents(asked)]}


class Telling:
    """The answer."""

    def __init__(self, asked: dict[str, Any], version: Version) -> None:
        self._asked, self._model = asked, version.id

    def whole(self, told: dict[str, Any]) -> dict[str, Any]:
        """The documents, the nearest first."""
        query, *others = (each["embedding"] for each in told["data"])
        scores = [cosine(query, other) for other in others]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: self._asked.get("top_n") or len(scores)]
        documents = _documents(self._asked)
        shown = self._asked.get("return_documents", True) is not False
        return {
            "id": f"rerank-{uuid4().hex}", "model": self._model, "usage": told["usage"],
            "results": [
                {"index": index, "relevance_score": scores[index], **({"document": {"text": documents[index]}} if shown else {})}
                for index in order
            ],
        }  # fmt: skip


def _documents(asked: dict[str, Any]) -> list[str]:
    listed = asked.get("documents")
    if isinstance(listed, list):
        listed = [each.get("text") if isinstance(each, dict) else each for each in listed]
    return texts(listed, "documents")

"""What an engine is asked before it takes traffic, by one that answers as it is told. The real ones: tests/e2e."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.errors import EngineError
from serve.replay import replay
from tuner.bundle import Bundle, Manifest

CHAT = {"messages": [{"role": "user", "content": "list"}], "ids": [1, 7, 8, 2], "answer_ids": [5, 2], "logprobs": [-0.5, -0.1], "margins": [2.0, 3.0]}  # fmt: skip
TEXT = {"text": "list the", "whole": True, "ids": [7, 8], "answer_ids": [5], "logprobs": [-0.5], "margins": [2.0]}
LABEL = {
    "text": "good film",
    "whole": True,
    "ids": [101, 9, 102],
    "problem": "single_label_classification",
    "scores": [-0.1054, -2.3026],
}
VECTOR = {"text": "good film", "whole": True, "ids": [101, 9, 102], "vector": [0.6, 0.8]}


def engine(item: dict[str, Any], tokens: list[int]) -> httpx.MockTransport:
    """Answers everything as it was recorded, and makes these tokens of the question."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": tokens})
        if request.url.path == "/classify":
            return httpx.Response(200, json={"data": [{"probs": [0.9, 0.1]}]})
        if request.url.path == "/v1/embeddings":
            return httpx.Response(200, json={"data": [{"embedding": item["vector"]}]})
        if "prompt_logprobs" in body:
            entries = [None, *[{}] * (len(item["ids"]) - 1)]
            entries += [
                {str(each): {"logprob": value, "rank": 1}} for each, value in zip(item["answer_ids"], item["logprobs"], strict=True)
            ]
            return httpx.Response(200, json={"choices": [{"prompt_logprobs": entries}]})
        return httpx.Response(
            200, json={"choices": [{"logprobs": {"tokens": [f"token_id:{each}" for each in item["answer_ids"]]}}]}
        )

    return httpx.MockTransport(answer)


async def ask(head: str, item: dict[str, Any], tokens: list[int]) -> Any:
    manifest = Manifest(kind="model", stage="tune", fingerprint="f", head=head, model_type="llama", probe=[item])
    async with httpx.AsyncClient(transport=engine(item, tokens), base_url="http://engine") as client:
        return await replay(client, "m", Bundle(Path("/b"), manifest), "float32")


@pytest.mark.parametrize(
    ("head", "item", "said"),
    [
        ("causal", CHAT, "the engine renders a conversation to other tokens than training did"),
        ("causal", TEXT, "the engine makes other tokens of a text than training did"),
        ("sequence", LABEL, "the engine makes other tokens of a text than training did"),
        ("embedding", VECTOR, "the engine makes other tokens of a text than training did"),
    ],
)
def test_an_engine_that_makes_other_tokens_is_found_by_them_alone(head: str, item: dict[str, Any], said: str) -> None:
    proof = asyncio.run(ask(head, item, item["ids"]))
    assert proof.agreement == 1.0
    assert proof.mean_difference < 1e-4
    for tokens, at in (
        ([item["ids"][0], *item["ids"]], 1),
        (item["ids"][:-1], len(item["ids"]) - 1),
        ([*item["ids"], 2], len(item["ids"])),
    ):
        with pytest.raises(EngineError, match=rf"m: {said}: from token {at} on "):
            asyncio.run(ask(head, item, tokens))


def test_a_prompt_before_two_answers_is_compared_too(tokenizer: Any) -> None:
    from tuner.tasks import preference

    record = {"prompt": "list the machine", "chosen": " az", "rejected": " vm"}
    asked = preference.question(record, tokenizer, preference.Options())
    assert (asked["text"], asked["whole"], asked["messages"]) == ("list the machine", True, None)


def test_of_a_text_that_was_cut_the_beginning_is_compared() -> None:
    item = {**LABEL, "whole": False}
    assert asyncio.run(ask("sequence", item, [101, 9, 17, 18, 102])).agreement == 1.0
    with pytest.raises(EngineError, match="the engine makes other tokens"):
        asyncio.run(ask("sequence", item, [101, 8, 17, 18, 102]))

"""Asks a live engine the probe of the bundle that it should be serving. "Healthy" proves nothing; a right answer does."""

from dataclasses import dataclass
from typing import Any

import httpx

from serve.errors import EngineError
from tuner.bundle import Bundle

# Two right computations of the same model, in nats a token on average. In float32 they differ by 1e-5; bfloat16 has 8 bits,
# float16 11.
FLOAT_TOLERANCE = {"float32": 0.01, "float16": 0.03, "bfloat16": 0.1}
# An 8-bit activation that lies on the edge between two steps falls to either side by the last bit of a float, and thirty blocks
# later two right computations are as far apart as each is from the unquantized model. That distance is in the manifest.
QUANTIZED_FACTOR = 2.0
# A token may give way to its runner-up where it led by less than this many times the tolerance: single tokens move further
# than their mean.
NEAR_TIE_FACTOR = 10.0


@dataclass(frozen=True)
class Proof:
    """How a live engine answered a probe."""

    questions: int
    tokens: int
    """Compared by log-probability, the recorded answers being read in one pass."""
    agreement: float
    """Fraction of the recorded tokens that the engine prefers too."""
    mean_difference: float
    """Mean difference in their log-probabilities (nats)."""
    tolerance: float
    """The most that was allowed."""


def tolerance(bundle: Bundle, dtype: str) -> float:
    """How far a right engine may be from the recorded log-probabilities, on average (nats a token)."""
    allowed = FLOAT_TOLERANCE[dtype]
    if bundle.manifest.kind == "quantized":
        allowed += QUANTIZED_FACTOR * float(bundle.manifest.metrics.get("probe", {}).get("mean_difference", 0.0))
    return allowed


async def replay(client: httpx.AsyncClient, model: str, bundle: Bundle, dtype: str) -> Proof:
    """Raises EngineError, with what was asked, recorded and answered, where the engine does not serve this bundle.

    Three things must hold: the engine renders the conversation to the tokens that training saw, it gives the recorded
    answer the recorded log-probabilities, and it generates that answer itself, but for near ties.
    """
    items = bundle.manifest.probe
    if not items:
        raise EngineError(
            f"{bundle.path}: has no probe, so what is served could not be compared with what was trained; "
            "run its recipe with held-out rows (data.heldout)"
        )
    allowed = tolerance(bundle, dtype)
    differences: list[float] = []
    same: list[bool] = []
    for item in items:
        await _check_template(client, model, item)
        logprobs, preferred = await _read_back(client, model, item)
        differences += [abs(now - then) for now, then in zip(logprobs, item["logprobs"], strict=True)]
        same += [now == then for now, then in zip(preferred, item["answer_ids"], strict=True)]
    proof = Proof(len(items), len(same), sum(same) / len(same), sum(differences) / len(differences), allowed)
    if not proof.mean_difference <= allowed:  # also where it is no number
        raise EngineError(
            f"{model} does not answer as {bundle.path} was trained to: log-probabilities differ by "
            f"{proof.mean_difference:.3f} nats a token on average, {allowed:.3f} is allowed"
        )
    for item in items:
        await _check_answer(client, model, item, bundle, NEAR_TIE_FACTOR * allowed)
    return proof


async def _check_answer(client: httpx.AsyncClient, model: str, item: dict[str, Any], bundle: Bundle, near_tie: float) -> None:
    """What the engine generates is the recorded answer, up to the first near tie: from there the two answer different questions."""
    body = {"model": model, "prompt": item["ids"], "max_tokens": len(item["answer_ids"]), "temperature": 0, "logprobs": 1}
    reply = await _post(client, "/v1/completions", body)
    tokens = [int(token.removeprefix("token_id:")) for token in reply["choices"][0]["logprobs"]["tokens"]]
    for position, (want, margin) in enumerate(zip(item["answer_ids"], item["margins"], strict=True)):
        got = tokens[position] if position < len(tokens) else None
        if got != want and margin < near_tie:
            return
        if got != want:
            raise EngineError(
                f"{model} does not answer as {bundle.path} was trained to: after {item['ids'][-5:]} and "
                f"{item['answer_ids'][:position]} the token {want} led by {margin:.2f} nats, and the engine gave {got}"
            )


async def _read_back(client: httpx.AsyncClient, model: str, item: dict[str, Any]) -> tuple[list[float], list[int]]:
    """Log-probability of each recorded token, and the token that the engine prefers there, from one pass over both."""
    body = {"model": model, "prompt": item["ids"] + item["answer_ids"], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    reply = await _post(client, "/v1/completions", body)
    entries = reply["choices"][0]["prompt_logprobs"][len(item["ids"]) :]
    logprobs = [entry[str(token)]["logprob"] for token, entry in zip(item["answer_ids"], entries, strict=True)]
    return logprobs, [next(int(token) for token, value in entry.items() if value["rank"] == 1) for entry in entries]


async def _check_template(client: httpx.AsyncClient, model: str, item: dict[str, Any]) -> None:
    """The engine renders the conversation into the very ids that the model was trained on."""
    if not item.get("messages"):
        return
    reply = await _post(client, "/tokenize", {"model": model, "messages": item["messages"], "add_generation_prompt": True})
    if reply["tokens"] != item["ids"]:
        raise EngineError(
            f"{model}: the engine renders a conversation to other tokens than training did: {reply['tokens'][:12]} "
            f"instead of {item['ids'][:12]}"
        )


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    try:
        reply = await client.post(path, json=body, timeout=120)
        reply.raise_for_status()
        return reply.json()
    except httpx.HTTPStatusError as error:
        raise EngineError(f"the engine refused a probe on {path}: {error.response.text[:300]}") from None
    except (httpx.HTTPError, ValueError) as error:
        raise EngineError(f"the engine died while it was asked a probe on {path} ({type(error).__name__})") from None

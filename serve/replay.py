"""Asks a live engine the probe of the bundle that it should be serving. "Healthy" proves nothing; a right answer does."""

import math
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


# An endpoint of ours has these paths of engines under other names.
OUTSIDE = {"/classify": "/v1/classify", "/pooling": "/v1/tokens/classify"}


@dataclass(frozen=True)
class Proof:
    """How a live engine answered a probe."""

    questions: int
    answers: int
    """Tokens of the recorded answers, texts or words."""
    agreement: float
    """Fraction of them for which the engine answers the same."""
    mean_difference: float
    """Mean difference of the numbers behind them."""
    tolerance: float
    """The most that was allowed."""
    what: str
    """What the numbers are."""


def tolerance(bundle: Bundle, dtype: str) -> float:
    """How far a right engine may be from the recorded log-probabilities, on average (nats a token)."""
    allowed = FLOAT_TOLERANCE[dtype]
    if bundle.manifest.kind == "quantized":
        allowed += QUANTIZED_FACTOR * float(bundle.manifest.metrics.get("probe", {}).get("mean_difference", 0.0))
    return allowed


async def replay(client: httpx.AsyncClient, model: str, bundle: Bundle, dtype: str) -> Proof:
    """Raises EngineError, with what was asked, recorded and answered, where the engine does not serve this bundle.

    What must hold depends on what the model answers with; see PROOFS.
    """
    items = bundle.manifest.probe
    if not items:
        raise EngineError(
            f"{bundle.path}: has no probe, so what is served could not be compared with what was trained; "
            "run its recipe with held-out rows (data.heldout)"
        )
    proof = await PROOFS[str(bundle.manifest.head)](client, model, bundle, dtype)
    if not proof.mean_difference <= proof.tolerance:  # also where it is no number
        raise EngineError(
            f"{model} does not answer as {bundle.path} was trained to: {proof.what} differ by {proof.mean_difference:.3f} "
            f"on average, {proof.tolerance:.3f} is allowed"
        )
    return proof


async def _words(client: httpx.AsyncClient, model: str, bundle: Bundle, dtype: str) -> Proof:
    """The engine renders the conversation to the tokens that training saw, gives the recorded answer the recorded
    log-probabilities, and generates that answer itself, but for near ties."""
    allowed = tolerance(bundle, dtype)
    differences: list[float] = []
    same: list[bool] = []
    for item in bundle.manifest.probe:
        await _check_template(client, model, item)
        logprobs, preferred = await _read_back(client, model, item)
        differences += [abs(now - then) for now, then in zip(logprobs, item["logprobs"], strict=True)]
        same += [now == then for now, then in zip(preferred, item["answer_ids"], strict=True)]
    proof = _proof(bundle, differences, same, allowed, "log-probabilities of tokens (nats)")
    if proof.mean_difference <= allowed:
        for item in bundle.manifest.probe:
            await _check_answer(client, model, item, bundle, NEAR_TIE_FACTOR * allowed)
    return proof


async def _labels(client: httpx.AsyncClient, model: str, bundle: Bundle, dtype: str) -> Proof:
    """Each text gets the recorded probability of each label, or the recorded number."""
    differences: list[float] = []
    same: list[bool] = []
    for item in bundle.manifest.probe:
        await _check_tokens(client, model, item)
        (answer,) = (await _post(client, "/classify", {"model": model, "input": [item["ids"]]}))["data"]
        number = item["problem"] == "regression"
        recorded = item["scores"] if number else [math.exp(value) for value in item["scores"]]
        differences += [abs(now - then) for now, then in zip(answer["probs"], recorded, strict=True)]
        same.append(number or answer["probs"].index(max(answer["probs"])) == recorded.index(max(recorded)))
    return _proof(bundle, differences, same, FLOAT_TOLERANCE[dtype], "probabilities of labels")


async def _tags(client: httpx.AsyncClient, model: str, bundle: Bundle, dtype: str) -> Proof:
    """Each word gets the recorded probability of each label."""
    differences: list[float] = []
    same: list[bool] = []
    for item in bundle.manifest.probe:
        if "text" in item:
            await _check_tokens(client, model, item)
        (answer,) = (await _post(client, "/pooling", {"model": model, "input": [item["ids"]]}))["data"]
        for position, scores in zip(item["positions"], item["scores"], strict=True):
            now, recorded = answer["data"][position], [math.exp(value) for value in scores]
            differences += [abs(one - other) for one, other in zip(now, recorded, strict=True)]
            same.append(now.index(max(now)) == recorded.index(max(recorded)))
    return _proof(bundle, differences, same, FLOAT_TOLERANCE[dtype], "probabilities of labels")


async def _vectors(client: httpx.AsyncClient, model: str, bundle: Bundle, dtype: str) -> Proof:
    """Each text gets the recorded vector."""
    differences: list[float] = []
    same: list[bool] = []
    for item in bundle.manifest.probe:
        await _check_tokens(client, model, item)
        (answer,) = (await _post(client, "/v1/embeddings", {"model": model, "input": [item["ids"]]}))["data"]
        apart = [abs(now - then) for now, then in zip(answer["embedding"], item["vector"], strict=True)]
        # The largest: of hundreds of small components the mean is small whatever happens.
        differences.append(max(apart))
        same.append(max(apart) <= FLOAT_TOLERANCE[dtype])
    return _proof(bundle, differences, same, FLOAT_TOLERANCE[dtype], "components of vectors")


# By the head of the bundle.
PROOFS = {"causal": _words, "sequence": _labels, "token": _tags, "embedding": _vectors}


async def say_something(client: httpx.AsyncClient, model: str, bundle: Bundle) -> None:
    """Ask the shortest of questions, whatever the answer, and wait for it. Raises EngineError where there is none."""
    ids = bundle.manifest.probe[0]["ids"][:8]
    path, body = {
        "causal": ("/v1/completions", {"prompt": ids, "max_tokens": 1, "temperature": 0}),
        "sequence": ("/classify", {"input": [ids]}),
        "token": ("/pooling", {"input": [ids]}),
        "embedding": ("/v1/embeddings", {"input": [ids]}),
    }[str(bundle.manifest.head)]
    await _post(client, path, {"model": model, **body}, timeout_s=None)


def _proof(bundle: Bundle, differences: list[float], same: list[bool], allowed: float, what: str) -> Proof:
    questions = len(bundle.manifest.probe)
    return Proof(questions, len(same), sum(same) / len(same), sum(differences) / len(differences), allowed, what)


async def _check_answer(client: httpx.AsyncClient, model: str, item: dict[str, Any], bundle: Bundle, near_tie: float) -> None:
    """What the engine generates is the recorded answer, up to the first near tie: from there the two answer different questions."""
    body = {"model": model, "prompt": item["ids"], "max_tokens": len(item["answer_ids"]), "temperature": 0, "logprobs": 1}
    body["return_tokens_as_token_ids"] = True  # two tokens may look alike
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
    """The engine renders the conversation, or makes the text, into the very ids that the model was trained on."""
    if "text" in item:
        await _check_tokens(client, model, item)
    if not item.get("messages"):
        return
    given: dict[str, Any] = {key: item[key] for key in ("messages", "tools") if key in item}
    reply = await _post(client, "/tokenize", {"model": model, **given, "add_generation_prompt": True})
    if reply["tokens"] != item["ids"]:
        raise EngineError(
            f"{model}: the engine renders a conversation to other tokens than training did: {_apart(reply['tokens'], item['ids'])}"
        )


async def _check_tokens(client: httpx.AsyncClient, model: str, item: dict[str, Any]) -> None:
    """The engine makes the text into the very ids that the model was trained on."""
    reply = await _post(client, "/tokenize", {"model": model, "prompt": item["text"]})
    # The end of a text that was cut for training is not compared.
    same = reply["tokens"] == item["ids"] if item.get("whole") else reply["tokens"][: len(item["ids"]) - 1] == item["ids"][:-1]
    if not same:
        raise EngineError(
            f"{model}: the engine makes other tokens of a text than training did: {_apart(reply['tokens'], item['ids'])}"
        )


def _apart(found: list[int], expected: list[int]) -> str:
    """Where two lists part, and what is there."""
    same = (one == other for one, other in zip(found, expected, strict=False))
    at = next((at for at, equal in enumerate(same) if not equal), min(len(found), len(expected)))
    return f"from token {at} on {found[at : at + 12]} instead of {expected[at : at + 12]}"


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any], *, timeout_s: float | None = 120.0) -> Any:
    try:
        reply = await client.post(path, json=body, timeout=timeout_s)
        if reply.status_code == 404 and path in OUTSIDE:
            reply = await client.post(OUTSIDE[path], json=body, timeout=timeout_s)
        reply.raise_for_status()
        return reply.json()
    except httpx.HTTPStatusError as error:
        raise EngineError(f"the engine refused a probe on {path}: {error.response.text[:300]}") from None
    except (httpx.HTTPError, ValueError) as error:
        raise EngineError(f"the engine died while it was asked a probe on {path} ({type(error).__name__})") from None

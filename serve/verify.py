"""Whether a server somewhere serves what a bundle was trained to say: any that speaks OpenAI's API, not only ours.

What it can be asked decides how much is compared: vLLM and our endpoint give the log-probabilities of a given answer and the tokens
that they make of a conversation; others at least generate with log-probabilities.
"""

import asyncio
from pathlib import Path
from typing import Any

import httpx

from serve.errors import EngineError, ServeError
from serve.replay import FLOAT_TOLERANCE, NEAR_TIE_FACTOR, Proof, replay
from serve.version import default_name
from tuner.bundle import Bundle, open_bundle, verify


class Differs(ServeError):
    """The server serves something else than the bundle."""

    exit_code = 1


def verify_served(folder: Path, url: str, *, model: str | None, key: str | None, dtype: str) -> tuple[str, Proof, str]:
    """(the model that was asked, how it answered, what could not be compared).

    Raises Differs where it answers otherwise, ServeError where it cannot be asked.
    """
    bundle = open_bundle(folder)
    verify(bundle)
    if not bundle.manifest.probe:
        raise ServeError(f"{folder}: has no probe to compare with; run its recipe to the end")
    if dtype not in FLOAT_TOLERANCE:
        raise ServeError(f"--dtype {dtype}: is none of {', '.join(FLOAT_TOLERANCE)}")
    return asyncio.run(_verify(bundle, url.rstrip("/").removesuffix("/v1"), model, key, dtype))


async def _verify(bundle: Bundle, address: str, model: str | None, key: str | None, dtype: str) -> tuple[str, Proof, str]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=address, headers=headers) as client:
        name = model or await _only_model(client, bundle)
        try:
            if bundle.manifest.head == "causal" and not await _reads_back(client, name, bundle):
                return name, await _generated(client, name, bundle, dtype), "only answers that it generates could be compared"
            return name, await replay(client, name, bundle, dtype), ""
        except EngineError as error:
            raise Differs(f"{address}: {error}") from None


async def _only_model(client: httpx.AsyncClient, bundle: Bundle) -> str:
    """The bundle's own name where the server has it, else its only model. Raises ServeError where neither is so."""
    try:
        reply = await client.get("/v1/models", timeout=30)
        reply.raise_for_status()
        names = [str(each["id"]) for each in reply.json()["data"]]
    except httpx.HTTPStatusError as error:
        raise ServeError(f"{client.base_url}: {error.response.status_code}: {error.response.text[:200]}") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise ServeError(f"{client.base_url}: no such server answers there ({type(error).__name__})") from None
    if default_name(bundle) in names:
        return default_name(bundle)
    if len(names) != 1:
        raise ServeError(f"{client.base_url}: serves {', '.join(names) or 'nothing'}; name the one to ask with --model")
    return names[0]


async def _reads_back(client: httpx.AsyncClient, model: str, bundle: Bundle) -> bool:
    """The server gives log-probabilities of a prompt's own tokens."""
    body = {"model": model, "prompt": bundle.manifest.probe[0]["ids"], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    reply = await _ask(client, body)
    try:
        return reply.status_code == 200 and bool(reply.json()["choices"][0].get("prompt_logprobs"))
    except (ValueError, KeyError, IndexError, AttributeError, TypeError):
        return False


async def _generated(client: httpx.AsyncClient, model: str, bundle: Bundle, dtype: str) -> Proof:
    """Its greedy answers have the recorded log-probabilities, token by token, up to the first near tie.

    Tokens are not named by all servers, so an answer is compared by its log-probabilities: another answer has others.
    """
    allowed = FLOAT_TOLERANCE[dtype]
    differences: list[float] = []
    for item in bundle.manifest.probe:
        want: list[float] = item["logprobs"]
        body = {"model": model, "prompt": item["ids"], "max_tokens": len(want), "temperature": 0, "logprobs": 1}
        reply = await _ask(client, body)
        if reply.status_code != 200:
            raise ServeError(f"{client.base_url}: {reply.status_code} to a probe: {reply.text[:200]}")
        try:
            got = [float(value) for value in reply.json()["choices"][0]["logprobs"]["token_logprobs"]]
        except (ValueError, KeyError, IndexError, TypeError):
            raise ServeError(f"{client.base_url}: gives no log-probabilities, so nothing can be compared") from None
        for position, (value, margin) in enumerate(zip(want, item["margins"], strict=True)):
            if margin < NEAR_TIE_FACTOR * allowed:
                break  # from here on two right computations may say different things
            differences.append(abs(got[position] - value) if position < len(got) else abs(value))
    if not differences:
        raise ServeError(f"{bundle.path}: every answer of its probe begins with a near tie, so nothing can be compared")
    mean = sum(differences) / len(differences)
    if not mean <= allowed:
        raise EngineError(
            f"{model} does not answer as {bundle.path} was trained to: log-probabilities of its answers differ by {mean:.3f} on "
            f"average, {allowed:.3f} is allowed"
        )
    same = sum(each <= NEAR_TIE_FACTOR * allowed for each in differences) / len(differences)
    return Proof(len(bundle.manifest.probe), len(differences), same, mean, allowed, "log-probabilities of tokens (nats)")


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
    try:
        return await client.post("/v1/completions", json=body, timeout=120)
    except httpx.HTTPError as error:
        raise ServeError(f"{client.base_url}: did not answer ({type(error).__name__})") from None

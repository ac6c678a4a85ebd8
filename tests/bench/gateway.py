"""What the gateway costs: the same requests with it and without, in turn, on the same machine.

    python -m tests.bench.gateway            # prints a table; about three minutes
    python -m tests.bench.gateway --soak 600 # and ten minutes of both kinds of requests, watching the gateway's memory
    python -m tests.bench.gateway --bundle runs/demo/merge   # eight streams of a real model instead, on its real engine

The engine behind computes nothing: it sends 200 tokens a second to each stream, so what is measured is the gateway alone.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

STREAMS, TOKENS_PER_S, TOKENS = 32, 200, 600
# Users do not come in the same millisecond; how long a burst of all of them waits is measured, too.
SPREAD_S = 1.0
CALLS_S, CALLERS = 5.0, 32
PAIRS = 3
# Of a real model: so many streams of so many tokens, in more pairs, since engines are not as even as clocks.
REAL_STREAMS, REAL_TOKENS, REAL_PAIRS = 8, 64, 7
HI = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"inner","choices":[{"index":0,"delta":'
    b'{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
USAGE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"inner","choices":[],"usage":'
    b'{"prompt_tokens":9,"total_tokens":609,"completion_tokens":600}}\n\ndata: [DONE]\n\n'
)
WHOLE = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"inner","choices":[{"index":0,"message":{"role":'
    b'"assistant","content":" word"},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"total_tokens":10,'
    b'"completion_tokens":1}}'
)


async def engine(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application that answers like an engine, without thinking."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    stream = b'"stream":true' in body or b'"stream": true' in body
    kind = b"text/event-stream" if stream else b"application/json"
    headers = [(b"content-type", kind)] + ([] if stream else [(b"content-length", str(len(WHOLE)).encode())])
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if not stream:
        await send({"type": "http.response.body", "body": WHOLE})
        return
    began = time.monotonic()
    for number in range(TOKENS):
        # By the clock, so that a late token makes the next one no later.
        await asyncio.sleep(max(0.0, began + number / TOKENS_PER_S - time.monotonic()))
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": USAGE})


def serve_engine(port: int) -> None:
    """Run it."""
    import uvicorn

    uvicorn.run(engine, port=port, log_level="error", lifespan="off", http="httptools", loop="uvloop")


def serve_gateway(port: int, behind: str, folder: Path) -> None:
    """The gateway as the endpoint runs it, with a key, metrics and a log, before an engine that was not started by it."""
    import uvicorn

    from serve.endpoint import Patient
    from serve.engine import Care, Engine
    from serve.fleet import Fleet
    from serve.gateway.app import Gateway, Limits, Traffic
    from serve.gateway.telemetry import Telemetry
    from serve.keys import Keyring, create
    from serve.state import Pointer, State
    from serve.version import Version
    from tuner.bundle import Bundle, Manifest

    class Known(Engine):
        """An engine that somebody else has started."""

        ready = True  # type: ignore[assignment]

    async def main() -> None:
        state = State(folder / "state.sqlite")
        (folder / "key").write_text(create(state, models=["m"], rpm=10**9, tpm=10**12))
        bundle = Bundle(Path("/b"), Manifest(kind="model", stage="tune", fingerprint="f", head="causal", probe=[{"ids": [1]}]))
        known = Known("transformers", "inner", bundle, {}, Care(), print)
        known.session = aiohttp.ClientSession(behind, connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
        version = Version("m@00000000", "m", bundle, "0" * 64, "0" * 64, "transformers", served="inner", engine=known)
        fleet = Fleet(state, Care(), print)
        fleet.names, fleet.versions = {"m": Pointer(version.id)}, {version.id: version}
        gateway = Gateway(fleet, Keyring(state), Traffic(), Limits(), Telemetry(fleet, folder / "requests.jsonl"))
        await uvicorn.Server(
            uvicorn.Config(gateway.app(), port=port, log_level="error", lifespan="off", http=Patient, proxy_headers=False)
        ).serve()

    import uvloop

    uvloop.run(main())


async def streams(
    url: str, key: str, model: str = "m", *, spread_s: float = SPREAD_S, count: int = STREAMS, tokens: int = TOKENS
) -> dict[str, float]:
    """All streams, begun within so many seconds: tokens a second, and the median times to the first token and between two (ms)."""
    draw = random.Random(0)
    first: list[float] = []
    between: list[float] = []
    body = {"model": model, **HI, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}

    async def one(session: aiohttp.ClientSession) -> None:
        await asyncio.sleep(draw.random() * spread_s)
        began = time.monotonic()
        async with session.post(url + "/v1/chat/completions", json=body) as reply:
            assert reply.status == 200, await reply.text()
            seen, start = 0, 0.0
            async for chunk in reply.content.iter_any():
                now = time.monotonic()
                if not seen:
                    first.append(now - began)
                    start = now
                seen += chunk.count(b'"content"')
            between.append((time.monotonic() - start) / (tokens - 1))
            # A real engine begins with a role, and may tell two tokens at once.
            assert seen == tokens or (model != "m" and tokens // 2 < seen <= tokens + 1), seen

    place, _, path = url.partition("unix:")
    connector = aiohttp.UnixConnector(path, limit=0) if path else aiohttp.TCPConnector(limit=0)
    url = place or "http://engine"
    async with aiohttp.ClientSession(connector=connector, headers={"authorization": f"Bearer {key}"}) as session:
        began = time.monotonic()
        await asyncio.gather(*(one(session) for _ in range(count)))
        took = time.monotonic() - began
    return {
        "tokens/s": count * tokens / (took - spread_s),
        "first ms": 1000 * statistics.median(first),
        "between ms": 1000 * statistics.median(between),
    }


async def calls(url: str, key: str, seconds: float = CALLS_S) -> float:
    """Small calls a second."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    count = 0
    end = time.monotonic() + seconds

    async def caller(session: aiohttp.ClientSession) -> None:
        nonlocal count
        while time.monotonic() < end:
            async with session.post(url + "/v1/chat/completions", data=body) as reply:
                assert reply.status == 200
                await reply.read()
            count += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:
        await asyncio.gather(*(caller(session) for _ in range(CALLERS)))
    return count / seconds


def main() -> int:
    """Start both, ask both in turn, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--soak", type=float, default=0.0)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--as-engine", type=int)
    parser.add_argument("--as-gateway", nargs=3)
    asked = parser.parse_args()
    if asked.as_engine:
        serve_engine(asked.as_engine)
        return 0
    if asked.as_gateway:
        serve_gateway(int(asked.as_gateway[0]), asked.as_gateway[1], Path(asked.as_gateway[2]))
        return 0
    if asked.bundle:
        with tempfile.TemporaryDirectory() as name:
            asyncio.run(_real(asked.bundle, Path(name)))
        return 0
    from tests.conftest import free_port

    with tempfile.TemporaryDirectory() as name:
        ports = free_port(), free_port()
        bare, through = (f"http://127.0.0.1:{port}" for port in ports)
        line = [sys.executable, "-m", "tests.bench.gateway"]
        behind = subprocess.Popen([*line, "--as-engine", str(ports[0])])
        before = subprocess.Popen([*line, "--as-gateway", str(ports[1]), bare, name])
        try:
            asyncio.run(_until_up(through, bare))
            key = (Path(name) / "key").read_text()
            asyncio.run(_measure(bare, through, key, psutil.Process(before.pid), asked.soak))
        finally:
            for process in (before, behind):
                process.terminate()
                process.wait()
    return 0


async def _until_up(*urls: str) -> None:
    async with aiohttp.ClientSession() as session:
        for url in urls:
            for _ in range(200):
                try:
                    await session.get(url + "/health")
                    break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.1)


async def _measure(bare: str, through: str, key: str, gateway: psutil.Process, soak_s: float) -> None:
    found: dict[str, list[dict[str, float]]] = {"bare": [], "gateway": []}
    small: dict[str, list[float]] = {"bare": [], "gateway": []}
    busy = []
    for number in range(PAIRS + 1):
        for kind, url in (("bare", bare), ("gateway", through)):
            one = await streams(url, key)
            one["first of a burst ms"] = (await streams(url, key, spread_s=0.0, tokens=TOKENS))["first ms"]
            before = sum(gateway.cpu_times()[:2])
            each = await calls(url, key)
            used = sum(gateway.cpu_times()[:2]) - before
            if number:  # the first round only warms up
                found[kind].append(one)
                small[kind].append(each)
                if kind == "gateway":
                    busy.append(each * CALLS_S / used)
    print(f"{os.cpu_count()} logical cores, {STREAMS} streams of {TOKENS_PER_S} tokens/s, medians of {PAIRS} pairs\n")
    _table(found)
    one, other = (statistics.median(small[kind]) for kind in ("bare", "gateway"))
    print(f"| small calls/s | {one:.0f} | {other:.0f} | {statistics.median(busy):.0f} a second of the gateway's own CPU time |")
    if soak_s:
        end, sizes = time.monotonic() + soak_s, []
        while time.monotonic() < end:
            await asyncio.gather(streams(through, key), calls(through, key, 3.0))
            sizes.append(gateway.memory_info().rss / 1e6)
        quarter = max(1, len(sizes) // 4)
        early, late = statistics.median(sizes[quarter : 2 * quarter]), statistics.median(sizes[-quarter:])
        print(f"\nmemory of the gateway over {soak_s:.0f} s: {early:.0f} MB in the second quarter, {late:.0f} MB in the last")


def _table(found: dict[str, list[dict[str, float]]]) -> None:
    print("| | bare engine | through the gateway | difference |\n|---|---|---|---|")
    forms = {"tokens/s": "{:.1f}", "first ms": "{:.2f}", "first of a burst ms": "{:.2f}", "between ms": "{:.3f}"}
    for what, form in forms.items():
        if what not in found["bare"][0]:
            continue
        one, other = (statistics.median(each[what] for each in found[kind]) for kind in ("bare", "gateway"))
        apart = f"{other / one:.1%}" if what == "tokens/s" else f"{other - one:+.3f} ms"
        print(f"| {what} | {form.format(one)} | {form.format(other)} | {apart} |")


async def _real(bundle: Path, state: Path) -> None:
    """A bundle as `tuner serve` serves it; the bare one is the same engine, asked at its own address."""
    line = [
        str(Path(sys.executable).parent / "tuner"),
        "serve",
        str(bundle),
        "--name",
        "real",
        "--port",
        "0",
        "--state",
        str(state),
    ]
    endpoint = subprocess.Popen(line)
    try:
        told = state / "operator.json"
        while not told.is_file():
            assert endpoint.poll() is None
            await asyncio.sleep(0.1)
        through = json.loads(told.read_text())["url"]
        async with aiohttp.ClientSession() as session:
            ready = False
            while not ready:
                assert endpoint.poll() is None
                await asyncio.sleep(0.5)
                async with session.get(f"{through}/ready") as reply:
                    ready = reply.status == 200
        commands = [child.cmdline() for child in psutil.Process(endpoint.pid).children() if "--uds" in child.cmdline()]
        said = dict(zip(commands[0], commands[0][1:], strict=False))
        bare, named = f"unix:{said['--uds']}", said.get("--served-model-name") or said["--name"]
        found: dict[str, list[dict[str, float]]] = {"bare": [], "gateway": []}
        for number in range(REAL_PAIRS + 1):
            for kind, url, model in (("bare", bare, named), ("gateway", through, "real")):
                one = await streams(url, "none", model, spread_s=0.0, count=REAL_STREAMS, tokens=REAL_TOKENS)
                if number:
                    found[kind].append(one)
        print(f"\n{os.cpu_count()} logical cores, {REAL_STREAMS} streams of {bundle}, medians of {REAL_PAIRS} pairs\n")
        _table(found)
        for kind, each in found.items():
            print(f"{kind}: {', '.join(format(one['tokens/s'], '.1f') for one in each)} tokens/s")
    finally:
        endpoint.terminate()
        endpoint.wait()


if __name__ == "__main__":
    sys.exit(main())

"""The gateway in front of a stand-in engine; tests/e2e/test_serving.py shows the same in front of vLLM."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from serve.endpoint import Settings, _bind, arrange, free_port, serve_until
from serve.errors import ServeError
from serve.gateway.app import Traffic, gateway
from tuner.bundle import Bundle, Manifest


class StandIn:
    """An engine whose answers are chosen by the request."""

    def __init__(self) -> None:
        self.ready = True
        self.head = "causal"
        self.failure: str | None = None
        self.suspected = 0
        app = Starlette(routes=[Route("/v1/chat/completions", self.answer, methods=["POST"])])
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine")

    def suspect(self) -> None:
        self.suspected += 1

    async def answer(self, request: Request) -> Response:
        asked = await request.json()
        match asked.get("do"):
            case "break":
                raise httpx.RemoteProtocolError("gone")
            case "fail":
                return JSONResponse({"error": "EngineDeadError"}, 500)
            case "refuse":
                return JSONResponse({"error": {"message": "too long"}}, 400)
        if asked.get("stream"):
            return StreamingResponse(iter([b"data: 1\n\n", b"data: [DONE]\n\n"]), media_type="text/event-stream")
        return JSONResponse({"echo": asked})


@pytest.fixture
def engine() -> StandIn:
    return StandIn()


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


@pytest.fixture
def client(engine: StandIn, traffic: Traffic) -> TestClient:
    return TestClient(gateway({"m": engine}, lambda: [{"id": "m"}], traffic))


def ask(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/chat/completions", json={"model": "m", **body})


def test_a_request_is_passed_on_whole(client: TestClient) -> None:
    assert ask(client, temperature=0, odd="kept").json()["echo"] == {"model": "m", "temperature": 0, "odd": "kept"}


def test_events_are_passed_on_as_they_come(client: TestClient, traffic: Traffic) -> None:
    reply = ask(client, stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text == "data: 1\n\ndata: [DONE]\n\n"
    assert traffic.active == 0


def test_the_engines_own_refusal_reaches_the_client(client: TestClient) -> None:
    reply = ask(client, do="refuse")
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "too long")


@pytest.mark.parametrize("do", ["break", "fail"])
def test_an_engine_that_fails_is_503_in_openais_form_and_suspected(
    client: TestClient, engine: StandIn, traffic: Traffic, do: str
) -> None:
    reply = ask(client, do=do)
    assert reply.status_code == 503
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert (engine.suspected, traffic.active) == (1, 0)


def test_an_engine_that_is_not_ready_and_an_endpoint_that_drains_are_503(
    client: TestClient, engine: StandIn, traffic: Traffic
) -> None:
    engine.ready = False
    assert ask(client).status_code == 503
    engine.ready, traffic.draining = True, True
    reply = ask(client)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/health", "/metrics", "/invocations", "/tokenize", "/v1/load_lora_adapter", "/v1/../tokenize"]
)
def test_everything_else_is_404(client: TestClient, path: str) -> None:
    for method in ("GET", "POST"):
        reply = client.request(method, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, 404)


def test_a_wrong_method_is_405(client: TestClient) -> None:
    assert client.get("/v1/chat/completions").status_code == 405


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"a": 1}', b'"m"', b"\xff"])
def test_a_body_that_is_no_request_is_400(client: TestClient, body: bytes) -> None:
    assert client.post("/v1/chat/completions", content=body).status_code == 400


@pytest.mark.parametrize("name", ["other", "", 5, None, ["m"]])
def test_an_unknown_model_is_404_and_names_those_there_are(client: TestClient, name: Any) -> None:
    reply = client.post("/v1/chat/completions", content=json.dumps({"model": name}))
    assert reply.status_code == 404
    assert "there is: m" in reply.json()["error"]["message"]


def test_a_body_that_is_too_large_is_413(client: TestClient) -> None:
    assert client.post("/v1/completions", content=b"x" * 17_000_000).status_code == 413


def test_a_taken_port_is_said_in_one_sentence() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port} on 127.0.0.1 is taken"):
            _bind(port)


def test_a_second_endpoint_cannot_take_the_port_of_one_that_is_still_starting() -> None:
    first = _bind(0)
    with first, pytest.raises(ServeError, match="is taken"):
        _bind(first.getsockname()[1])


def test_what_is_no_bundle_is_refused_before_anything_starts(tmp_path) -> None:
    from tuner.errors import BundleError

    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        arrange([tmp_path], Settings(), print)


@pytest.mark.parametrize(
    ("head", "path", "said"),
    [
        ("sequence", "/v1/chat/completions", "m answers POST /v1/classify; it has a sequence head"),
        ("causal", "/v1/embeddings", "m answers POST /v1/chat/completions, /v1/completions; it has a causal head"),
    ],
)
def test_a_question_that_the_models_head_cannot_answer_is_400(
    client: TestClient, engine: StandIn, head: str, path: str, said: str
) -> None:
    engine.head = head
    reply = client.post(path, json={"model": "m", "input": "x"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == said


class Starting(StandIn):
    """A stand-in that is proven only once it is told to be."""

    def __init__(self) -> None:
        super().__init__()
        self.ready, self.name, self.adapters = False, "m", dict[str, Any]()
        self.model = Bundle(Path("/b"), Manifest(kind="model", stage="tune", fingerprint="f", head="causal"))
        self.proven = asyncio.Event()

    async def start(self) -> None:
        await self.proven.wait()
        self.ready = True

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        self.ready = False


def test_until_an_engine_is_proven_its_model_is_503_and_no_request_waits() -> None:
    async def scenario() -> None:
        engine, stop, address = Starting(), asyncio.Event(), list[str]()
        settings = Settings(port=free_port())
        running = asyncio.create_task(serve_until([engine], settings, stop, address.append))  # type: ignore[list-item]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.port}/v1", timeout=5) as client:
            before = await client.post("/chat/completions", json={"model": "m"})
            assert (before.status_code, before.headers["retry-after"], address) == (503, "5", [])
            assert "the engine of m is starting" in before.json()["error"]["message"]
            engine.proven.set()
            while not address:
                await asyncio.sleep(0.01)
            assert (await client.post("/chat/completions", json={"model": "m"})).status_code == 200
            stop.set()
            await running
        # While it starts it can be stopped, too.
        stop.clear()
        running = asyncio.create_task(serve_until([Starting()], settings, stop, address.append))  # type: ignore[list-item]
        await asyncio.sleep(0.1)
        stop.set()
        await asyncio.wait_for(running, 10)

    asyncio.run(scenario())

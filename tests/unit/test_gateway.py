"""The gateway in front of a stand-in engine, both over real sockets; tests/e2e/test_serving.py shows the same in front of vLLM."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import hypothesis
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve import endpoint
from serve.endpoint import Patient, Settings, _bind, _require_safety, named
from serve.engine import Care
from serve.errors import ServeError
from serve.fleet import Fleet
from serve.gateway.app import Gateway, Limits, Traffic
from serve.gateway.passing import Asked, Outcome
from serve.gateway.surface import SURFACE
from serve.gateway.telemetry import Telemetry
from serve.keys import Keyring, create
from serve.state import Pointer, State
from serve.version import Version
from tests.conftest import free_port
from tuner.bundle import Bundle, Manifest


@contextmanager
def listening(app: Any, **options: Any) -> Iterator[str]:
    """The address of an application that a thread serves."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


class StandIn:
    """An engine whose answers are chosen by the request, and that remembers who left."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.app = Starlette(routes=[Route(question.to, self.answer, methods=["POST"]) for question in SURFACE.values()])

    async def answer(self, request: Request) -> Response:
        asked = await request.json()
        self.got.append(asked)
        match asked.get("user_key") or asked.get("stop"):
            case "fail":
                return JSONResponse({"error": "EngineDeadError"}, 500)
            case "refuse":
                return JSONResponse({"error": {"message": "too long"}}, 400)
            case "wait":
                while not await request.is_disconnected():
                    await asyncio.sleep(0.01)
                self.left.set()
                return JSONResponse({})
        if asked.get("stream"):
            return StreamingResponse(self.events(asked), media_type="text/event-stream")
        usage = {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2}
        message = {"role": "assistant", "content": "hi"}
        choice = {"index": 0, "message": message, "text": "hi", "finish_reason": "stop"}
        count = len(asked["input"]) if isinstance(asked.get("input"), list) else 1
        entry = {"embedding": [1.0], "probs": [0.25, 0.75], "data": [[0.5, 0.5]]}
        told = {"choices": [choice], "data": [entry] * count, "usage": usage}
        return JSONResponse({"model": asked["model"], **told})

    async def events(self, asked: dict[str, Any]) -> Any:
        try:
            for piece in ("a", '"usage":{"prompt_tokens":900}', "b"):
                yield f"data: {json.dumps({'model': asked['model'], 'text': piece, 'usage': None}, separators=(',', ':'))}\n\n"
                await asyncio.sleep(0.01)
            if asked["stop"] == "break":
                raise RuntimeError("the engine dies")
            if asked["stop"] == "memory":
                yield f"data: {json.dumps({'error': {'message': 'no memory', 'type': 'server_error', 'code': 500}})}\n\n"
                return
            while asked["stop"] == "on":
                yield b'data: {"text":"on"}\n\n'
                await asyncio.sleep(0.01)
            usage = {"prompt_tokens": 3, "total_tokens": 9, "completion_tokens": 6}
            if asked["stream_options"]["include_usage"]:
                yield f"data: {json.dumps({'choices': [], 'usage': usage}, separators=(',', ':'))}\n\n"
            yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise


class Behind:
    """What the gateway sees of an engine."""

    def __init__(self, address: str) -> None:
        self.address, self.ready, self.failure, self.refused, self.restarts = address, True, None, {}, 0
        self.suspected, self.heard = 0, 0.0
        self.served: dict[str, Any] = {"inner": None}
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        self._session = self._session or aiohttp.ClientSession(self.address)
        return self._session

    def suspect(self) -> None:
        self.suspected += 1


class World:
    """A gateway and what stands behind it."""

    def __init__(self, address: str, url: str, gateway: Gateway, stand_in: StandIn, behind: Behind, log: Path) -> None:
        self.client = httpx.Client(base_url=url, timeout=10)
        self.url, self.gateway, self.stand_in, self.behind, self.address = url, gateway, stand_in, behind, address
        self.told: list[tuple[Asked, Outcome]] = []
        self.log = log

    def ask(self, path: str = "/v1/completions", headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return self.client.post(path, json={"model": "m", "prompt": "p", **body}, headers=headers)


def version(behind: Any, name: str = "m", digest: str = "0" * 64, head: str = "causal") -> Version:
    bundle = Bundle(Path("/b"), Manifest(kind="model", stage="tune", fingerprint="f", head=head, probe=[{"ids": [1]}]))
    return Version(f"{name}@{digest[:8]}", name, bundle, digest, "ab" * 32, "stand-in", served="inner", engine=behind)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    stand_in, state = StandIn(), State(tmp_path / "state.sqlite")
    with listening(stand_in.app) as address:
        behind = Behind(address)
        fleet = Fleet(state, Care(), lambda text: None)
        one = version(behind)
        fleet.names, fleet.versions = {"m": Pointer(one.id)}, {one.id: one}
        telemetry = Telemetry(fleet, tmp_path / "requests.jsonl")
        limits = Limits(body_bytes=100_000, body_timeout_s=1.0, request_timeout_s=3.0, active=50)
        gateway = Gateway(fleet, Keyring(state), Traffic(), limits, telemetry)
        with listening(gateway.app(), http=Patient) as url:
            found = World(address, url, gateway, stand_in, behind, tmp_path / "requests.jsonl")
            count = telemetry.metrics.count
            telemetry.metrics.count = lambda *both: (found.told.append(both), count(*both))  # type: ignore[method-assign,func-returns-value]
            yield found
        telemetry.close()


def test_a_request_is_passed_on_and_the_answer_has_the_clients_name_for_the_model(world: World) -> None:
    reply = world.ask(temperature=0, user="u-1")
    assert world.stand_in.got == [{"model": "inner", "prompt": "p", "temperature": 0}]
    assert reply.json()["model"] == "m@00000000"
    assert (reply.headers["x-tuner-version"], reply.headers["x-tuner-manifest"]) == ("m@00000000", "ab" * 32)
    assert reply.headers["x-request-id"].startswith("req-")
    asked, outcome = world.told[0]
    assert (asked.version, outcome.status, outcome.prompt_tokens, outcome.completion_tokens) == ("m@00000000", 200, 3, 2)


@pytest.mark.parametrize("wanted", [False, True])
def test_events_are_passed_on_and_counted_and_who_has_not_asked_is_not_told(world: World, wanted: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if wanted else {}
    reply = world.ask(stream=True, stop="", **options)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
    assert [event["text"] for event in events if "text" in event] == ["a", '"usage":{"prompt_tokens":900}', "b"]
    assert {event["model"] for event in events if "model" in event} == {"m@00000000"}
    assert any(event.get("usage") for event in events) == wanted
    assert reply.text.endswith("data: [DONE]\n\n")
    outcome = world.told[0][1]
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (3, 6)
    assert world.gateway.traffic.active == 0


def test_the_engines_own_refusal_reaches_the_client(world: World) -> None:
    reply = world.ask(stop="refuse")
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "too long")


def test_an_engine_that_fails_is_503_in_openais_form_and_suspected(world: World) -> None:
    reply = world.ask(stop="fail")
    assert reply.status_code == 503
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    world.behind.address = f"http://127.0.0.1:{free_port()}"
    world.behind._session = None
    assert "did not answer" in world.ask().json()["error"]["message"]
    assert (world.behind.suspected, world.gateway.traffic.active) == (2, 0)


def test_an_engine_that_dies_in_a_stream_is_an_error_event(world: World) -> None:
    reply = world.ask(stream=True, stop="break")
    last = reply.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
    assert world.behind.suspected == 1


def test_an_engine_that_fails_in_a_stream_is_told_as_it_is_and_suspected(world: World) -> None:
    reply = world.ask(stream=True, stop="memory")
    last = reply.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "no memory"
    assert (world.behind.suspected, world.told[0][1].status) == (1, 503)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_engines_work(world: World, stream: bool) -> None:
    body = {"model": "m", "prompt": "p", "stop": "on" if stream else "wait", "stream": stream}
    if stream:
        with world.client.stream("POST", "/v1/completions", json=body) as reply:
            for _ in zip(range(5), reply.iter_raw(), strict=False):
                pass
    else:
        with pytest.raises(httpx.ReadTimeout):
            world.client.post("/v1/completions", json=body, timeout=0.5)
    assert world.stand_in.left.wait(10)
    while world.gateway.traffic.active:
        time.sleep(0.01)
    assert world.told[-1][1].status == 499


def test_an_answer_that_takes_too_long_is_cut_off(world: World) -> None:
    reply = world.ask(stop="wait")
    assert reply.status_code == 504
    assert world.stand_in.left.wait(10)


def test_what_is_not_ready_and_what_drains_is_503(world: World) -> None:
    world.behind.ready = False
    reply = world.ask()
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    assert world.client.get("/ready").status_code == 503
    assert world.client.get("/health").status_code == 200
    world.behind.ready = True
    assert world.client.get("/ready").json() == {"ready": True, "waiting": []}
    world.gateway.traffic.draining = True
    assert world.ask().status_code == 503
    assert world.client.get("/ready").status_code == 503


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/invocations", "/v1/load_lora_adapter", "/v1/../invocations", "/pooling", "/classify", "/v1/models/m/x"]
)
def test_everything_else_is_404(world: World, path: str) -> None:
    for method in ("GET", "POST"):
        reply = world.client.request(method, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, 404)
    assert world.stand_in.got == []


def test_a_slash_too_many_leads_nowhere(world: World) -> None:
    reply = world.client.get("/v1/models/", headers={"host": "evil.example"})
    assert (reply.status_code, reply.headers.get("location")) == (404, None)


def test_headers_without_end_are_cut_off(world: World) -> None:
    with pytest.raises(httpx.HTTPError):
        world.client.get("/health", headers={"x-long": "x" * 100_000})
    assert world.client.get("/health").status_code == 200


def test_a_version_of_a_name_that_is_gone_is_404(world: World) -> None:
    del world.gateway.fleet.names["m"]
    assert world.ask(model="m@00000000").status_code == 404


def test_a_wrong_method_is_405(world: World) -> None:
    assert world.client.get("/v1/chat/completions").status_code == 405


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"a": 1}', b'"m"', b"\xff", b"[" * 50_000])
def test_a_body_that_is_no_request_is_400(world: World, body: bytes) -> None:
    assert world.client.post("/v1/chat/completions", content=body).status_code == 400


@pytest.mark.parametrize("name", ["other", "", 5, None, ["m"], "../m", "m@ffffffff", "inner", "m\r\nx: y"])
def test_an_unknown_model_is_404_and_names_those_there_are(world: World, name: Any) -> None:
    reply = world.client.post("/v1/chat/completions", content=json.dumps({"model": name}))
    assert reply.status_code == 404
    assert "there is: m" in reply.json()["error"]["message"]
    assert reply.json()["error"]["code"] == "model_not_found"
    assert "x" not in reply.headers


def test_one_version_can_be_asked_by_its_id(world: World) -> None:
    assert world.ask(model="m@00000000").status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_413(world: World, declared: bool) -> None:
    content: Any = b"x" * 100_001 if declared else iter([b"x" * 50_000] * 3)
    assert world.client.post("/v1/completions", content=content).status_code == 413


def test_a_body_that_does_not_come_is_408_and_headers_that_do_not_come_end_the_connection(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "HEADERS_TIMEOUT_S", 1.5)
    address = (world.url.removeprefix("http://").split(":")[0], int(world.url.rsplit(":", 1)[1]))
    with socket.create_connection(address, timeout=5) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{")
        assert b"408" in slow.recv(1000)
    with socket.create_connection(address, timeout=5) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost:")
        assert slow.recv(1000) == b""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"chat_template": "{{ 1 }}"}, "the template is the one that the model was trained with"),
        ({"logit_bais": {}}, "'logit_bais' is not taken from clients; did you mean \"logit_bias\"?"),
        ({"temperature": "1"}, "temperature: Input should be a valid number"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"stream_options": {}}, "stream_options are for streams"),
        ({"best_of": 1}, "not taken from clients"),
    ],
)
def test_a_key_that_no_client_may_send_is_refused_by_name(world: World, body: dict[str, Any], said: str) -> None:
    reply = world.ask(**body)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]
    assert world.stand_in.got == []


@pytest.mark.parametrize(
    ("head", "path", "said"),
    [
        ("sequence", "/v1/chat/completions", "m answers POST /v1/classify, /tokenize; it has a sequence head"),
        ("causal", "/v1/embeddings", "it has a causal head"),
    ],
)
def test_a_question_that_the_models_head_cannot_answer_is_400(world: World, head: str, path: str, said: str) -> None:
    one = version(world.behind, head=head)
    world.gateway.fleet.versions[one.id] = one
    reply = world.client.post(path, json={"model": "m", "input": "x"})
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


# Keys.


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403), ({"host": "localhost.evil.example:8000"}, 403), ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403), ({"host": "localhost:1"}, 200), ({"host": "[::1]:8000", "origin": "http://localhost:3000"}, 200),
    ],
)  # fmt: skip
def test_without_keys_no_page_of_elsewhere_may_ask(world: World, headers: dict[str, str], status: int) -> None:
    """A browser sends such requests without asking: to 127.0.0.1 from any page, or to a name that has come to lead there."""
    assert world.ask(headers=headers).status_code == status
    assert world.client.get("/v1/models", headers=headers).status_code == status
    key = create(State(world.gateway.fleet.state.path), models=["m"])
    time.sleep(0.15)
    assert world.ask(headers={**headers, **bearer(key)}).status_code == 200


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (
            [{"role": "king", "content": "hi"}],
            "the role of turn 0 is 'king', expected one of system, developer, user, assistant, tool",
        ),
        ([{"role": "user", "content": None}], "the content of turn 0 is None, expected a text or a list of parts"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "the role of turn 1 is None"),
        ([{"role": "assistant", "content": None}, {"role": "user", "content": "b"}], "the content of turn 0 is None"),
        ([{"role": "user", "content": "a", "foo": 1}], "turn 0 has the key 'foo', which nothing here reads"),
    ],
)
def test_turns_are_somebodys_and_say_something(world: World, messages: list[dict[str, Any]], said: str) -> None:
    reply = world.client.post("/v1/chat/completions", json={"model": "m", "messages": messages})
    assert (reply.status_code, said in reply.json()["error"]["message"]) == (400, True), reply.text
    assert world.stand_in.got == []


def test_both_engines_hear_of_developers_as_systems_and_of_tools_only_where_templates_show_them(world: World) -> None:
    body = {"model": "m", "messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]}
    assert world.client.post("/v1/chat/completions", json=body).status_code == 200
    assert [turn["role"] for turn in world.stand_in.got[0]["messages"]] == ["system", "user"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert world.client.post("/v1/chat/completions", json={**body, "tools": tools}).status_code == 200
    next(iter(world.gateway.fleet.versions.values())).tools = False
    reply = world.client.post("/v1/chat/completions", json={**body, "tools": tools})
    assert (reply.status_code, "the chat template of m does not show them" in reply.json()["error"]["message"]) == (400, True)
    assert world.client.post("/v1/chat/completions", json={**body, "tools": tools, "tool_choice": "none"}).status_code == 200
    call = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"id": "a", "type": "function", "function": {}}]}
    called = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}, call, {"role": "tool", "tool_call_id": "a", "content": "1"}],
    }
    for path in ("/v1/chat/completions", "/tokenize"):
        reply = world.client.post(path, json=called)
        assert (reply.status_code, "does not show tool calls" in reply.json()["error"]["message"]) == (400, True)
    next(iter(world.gateway.fleet.versions.values())).tools = True
    assert world.client.post("/v1/chat/completions", json=called).status_code == 200


@pytest.mark.parametrize(
    ("path", "more", "said"),
    [
        ("/v1/chat/completions", {"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ("/v1/chat/completions", {"foo": 1}, "top_p, user"),
        ("/v1/completions", {"prompt": 5}, "prompt: input should be a valid string or input should be a valid array"),
        ("/v1/chat/completions", {"stop": [1]}, "stop: input should be a valid string"),
    ],
)
def test_what_is_refused_is_said_in_full(world: World, path: str, more: dict[str, Any], said: str) -> None:
    body = {"model": "m", **({"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {}), **more}
    reply = world.client.post(path, json=body)
    assert (reply.status_code, said in reply.json()["error"]["message"]) == (400, True), reply.text


def test_a_body_that_is_no_json_is_told_why(world: World) -> None:
    for body, said in (
        (b'{"model":', "the body is no JSON: Expecting value"),
        (b"[" * 50_000, "nested too deep"),
        (b"[]", "must be a JSON object"),
    ):
        assert said in world.client.post("/v1/chat/completions", content=body).json()["error"]["message"]


def test_once_there_is_a_key_nobody_without_one_is_answered(world: World) -> None:
    assert world.ask().status_code == 200
    key = create(world.gateway.fleet.state, models=["m"])
    # Made on the same connection, which sees no change of another's.
    world.gateway.keyring._seen, world.gateway.keyring._looked = -1, 0.0
    key_id = key.split("-")[1]
    for wrong in ({}, bearer("x"), bearer("tnr-"), bearer(key[:-1]), bearer(key + "a"), bearer(f"tnr-{key_id}-"), {"authorization": key},
                  bearer("tnr-00000000-x")):  # fmt: skip
        reply = world.ask(headers=wrong)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert world.client.get("/v1/models").status_code == 401
    assert world.ask(headers=bearer(key)).status_code == 200
    assert world.ask(headers={"x-api-key": key}).status_code == 200
    assert [each["id"] for each in world.client.get("/v1/models", headers=bearer(key)).json()["data"]] == ["m"]
    assert key not in (world.gateway.fleet.state.path or Path()).read_bytes().decode("latin-1"), "only its hash is kept"
    assert key.split("-", 2)[2] not in str(world.gateway.fleet.state.keys())


def test_a_key_reaches_only_its_models_and_ends_when_it_is_revoked_by_another_process(world: World) -> None:
    fleet = world.gateway.fleet
    other = version(world.behind, "other")
    fleet.names["other"], fleet.versions[other.id] = Pointer(other.id), other
    state = State(fleet.state.path)  # as `tuner keys` opens it
    assert world.ask().status_code == 200
    mine, ended, every = (create(state, models=["m"]), create(state, models=["m"], expires="1s"), create(state, models=["*"]))
    time.sleep(0.15)
    assert world.ask(headers=bearer(mine)).status_code == 200
    for asked in ("other", "other@00000000"):
        reply = world.ask(headers=bearer(mine), model=asked)
        assert (reply.status_code, reply.json()["error"]["message"]) == (404, f"there is no model {asked!r} here; there is: m")
    assert world.client.get("/v1/models/other", headers=bearer(mine)).status_code == 404
    assert world.ask(headers=bearer(every), model="other").status_code == 200
    time.sleep(1.05)
    assert world.ask(headers=bearer(ended)).status_code == 401
    state.revoke_key(mine.split("-")[1], time.time())
    time.sleep(0.15)
    assert world.ask(headers=bearer(mine)).status_code == 401


def test_keys_from_a_file_are_good_beside_those_of_the_state_and_an_empty_file_lets_nobody_in(tmp_path: Path) -> None:
    file, state, said = tmp_path / "keys.jsonl", State(None), []
    mine, other = (create(file, models=[name], rpm=5, expires="1d", label="käfer") for name in ("m", "n"))
    assert mine.split("-", 2)[2] not in file.read_text()
    keyring = Keyring(state, file, said.append)
    kept = create(state, models=["m"])
    keyring._seen = -1

    def found(*keys: str) -> list[bool]:
        keyring._looked = 0.0
        return [keyring.find(each) is not None for each in keys]

    assert found(mine, other, kept) == [True, True, True]
    assert keyring.find(mine).models == ("m",)  # type: ignore[union-attr]
    lines = file.read_text().splitlines()
    file.write_text(f"{lines[1]}\nnonsense\n")
    assert found(mine, other) == [True, True]
    assert said == [f"{file}:2: is no key as `tuner keys create --file` writes it (invalid json: expected ident at line 1 column 2); "
                    "those that it held before are still good"]  # fmt: skip
    file.write_text(f"{lines[1]}\n")
    assert found(mine, other, kept) == [False, True, True]
    file.write_text("")
    empty = Keyring(State(None), file)
    assert empty.some
    assert empty.find(other) is None
    for text, what in (
        (lines[0].replace('"rpm": 5', '"rpm": "5"'), "rpm input should be a valid integer"),
        (lines[0].replace('"expires"', '"ends"'), "ends unexpected"),
        (lines[0].replace('"sha256": "', '"sha256": "ä'), "no hash"),
        ("[1]", "input should be"),
        (b"\xff", "utf-8"),
    ):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ServeError, match=what):
            Keyring(State(None), file)
    with pytest.raises(ServeError, match="No such file"):
        Keyring(State(None), tmp_path / "none")
    with pytest.raises(ServeError, match="'demo\\*' is no name of a model; '\\*' by itself stands for all"):
        create(file, models=["demo*"])
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_key_has_so_many_requests_and_tokens_a_minute(world: World) -> None:
    state = State(world.gateway.fleet.state.path)
    few, short = create(state, models=["m"], rpm=2), create(state, models=["m"], tpm=6)
    assert [world.ask(headers=bearer(few)).status_code for _ in range(3)] == [200, 200, 429]
    reply = world.ask(headers=bearer(few))
    assert 50 <= int(reply.headers["retry-after"]) <= 60
    assert reply.json()["error"]["message"] == "this key has used what it may in a minute: 2 requests"
    # Five tokens each: the second answer goes over, and no third one begins.
    assert [world.ask(headers=bearer(short)).status_code for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize("text", ["", "5", "-1d", "0d", "3w", "1.5h", "d"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ServeError, match="expected a time such as 30d"):
        create(State(None), models=["m"], expires=text or "x")


# Where it listens, and what it is started with.


def test_a_taken_port_is_said_in_one_sentence() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port} on 127.0.0.1 is taken"):
            _bind("127.0.0.1", port)


def test_a_second_endpoint_cannot_take_the_port_of_one_that_is_still_starting() -> None:
    first = _bind("127.0.0.1", 0)
    with first, pytest.raises(ServeError, match="is taken"):
        _bind("127.0.0.1", first.getsockname()[1])
    with pytest.raises(ServeError, match=r"host 203\.0\.113\.9: is no address of this machine"):
        _bind("203.0.113.9", 0)


def test_other_machines_are_let_in_only_with_a_key() -> None:
    state = State(None)
    with pytest.raises(ServeError, match="make a key first"):
        _require_safety(Settings(host="0.0.0.0"), Keyring(state))
    create(state, models=["*"])
    _require_safety(Settings(host="0.0.0.0"), Keyring(state))


def test_what_is_no_bundle_is_refused_before_anything_starts(tmp_path: Path) -> None:
    from tuner.errors import BundleError

    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        named([tmp_path])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {m: x}\nprot: 1\n", r"d\.yaml:2: there is no key prot; did you mean \"port\""),
        ("models:\n  m: x\nport: many\n", r"d\.yaml:3: port: input should be a valid integer"),
        ("models:\n  m: x\n  m: y\n", r"d\.yaml:3: m stands there twice"),
        ("models: {m: x}\nlimits:\n  body: 3\n", r"d\.yaml:3: there is no key limits\.body"),
        ("port: 1\n", r"d\.yaml:1: models: field required"),
        ("- a\n", r"d\.yaml:1: expected keys such as"),
        ("a: [\n", r"d\.yaml:2: not YAML"),
    ],
)
def test_a_mistake_in_a_deployment_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    from serve.deployment import read_deployment

    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(ServeError, match=said):
        read_deployment(tmp_path / "d.yaml")


# What it says of itself.


def test_the_published_document_holds_whatever_is_sent(world: World) -> None:
    """schemathesis makes bodies from the document, right and wrong ones: none is a 500, each answer is one that is described."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection,
    ]  # fmt: skip
    for path in ("/v1/embeddings", "/v1/classify"):  # for tags a tokenizer is wanted, which a stand-in has not
        head = next(iter(SURFACE[path].heads))
        one = version(world.behind, head, head=head)
        world.gateway.fleet.names[head], world.gateway.fleet.versions[one.id] = Pointer(one.id), one
    schema = schemathesis.openapi.from_url(f"{world.url}/openapi.json")
    asked = set()
    for operation in schema.get_all_operations():
        api = operation.ok()

        @hypothesis.settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(
            case=api.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
            | api.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
            if api.body
            else api.as_strategy()
        )
        def holds(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                head = next(iter(SURFACE[case.path].heads)) if case.path in SURFACE else "causal"
                case.body["model"] = head if head in world.gateway.fleet.names else "m"
            case.call_and_validate(checks=checks)
            asked.add((case.method, case.path))

        holds()
    assert {path for _, path in asked} >= set(SURFACE)


def test_a_full_disk_under_the_log_stops_nothing(small_disk: Path) -> None:
    from serve.gateway.telemetry import Log

    (small_disk / "filler").write_bytes(b"x" * 900_000)
    log = Log(small_disk / "requests.jsonl")
    began = time.monotonic()
    for number in range(2_000):
        log.add("request", number=number, padding="x" * 200)
    assert time.monotonic() - began < 5
    log.close()
    assert log.lost > 0
    written = [json.loads(line)["number"] for line in (small_disk / "requests.jsonl").read_text().splitlines()[:-1]]
    assert written == list(range(len(written)))
    assert written


def test_the_log_has_a_line_for_each_request_and_no_word_of_it(world: World) -> None:
    world.ask(temperature=0, prompt="a secret question")
    world.client.post("/v1/completions", content=b"{")
    world.gateway.telemetry.close()
    lines = [json.loads(line) for line in world.log.read_text().splitlines()]
    assert [(line["kind"], line["status"], line["version"]) for line in lines] == [
        ("request", 200, "m@00000000"), ("request", 400, None),
    ]  # fmt: skip
    assert lines[0]["request_id"].startswith("req-")
    assert (lines[0]["prompt_tokens"], lines[0]["completion_tokens"]) == (3, 2)
    assert "secret" not in world.log.read_text()


def test_spans_are_sent_where_opentelemetry_is_told_to(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got = []

    async def collect(request: Request) -> Response:
        got.append(ExportTraceServiceRequest.FromString(await request.body()))
        return Response()

    with listening(Starlette(routes=[Route("/v1/traces", collect, methods=["POST"])])) as address:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        world = request.getfixturevalue("world")
        trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
        world.ask(headers={"traceparent": f"00-{trace}-{parent}-01"}, prompt="a secret question")
        world.ask(stop="fail")
        world.gateway.telemetry.close()
    spans = [span for each in got for resource in each.resource_spans for scope in resource.scope_spans for span in scope.spans]
    one, other = spans
    told = {each.key: each.value.string_value or each.value.int_value for each in one.attributes}
    assert (one.name, one.trace_id.hex(), one.parent_span_id.hex()) == ("POST /v1/completions", trace, parent)
    assert told["gen_ai.response.model"] == "m@00000000"
    assert (told["http.response.status_code"], told["gen_ai.usage.output_tokens"]) == (200, 2)
    assert 0 < one.end_time_unix_nano - one.start_time_unix_nano < 10e9
    assert (other.status.code, other.trace_id.hex() == trace) == (2, False)
    assert b"secret" not in b"".join(each.SerializeToString() for each in got)


def test_metrics_are_told_by_name_version_and_key(world: World) -> None:
    world.ask()
    text = world.client.get("/metrics").text
    assert 'tuner_requests_total{key="",name="m",path="/v1/completions",status="200",version="m@00000000"} 1.0' in text
    assert 'tuner_tokens_total{direction="written",key="",name="m",version="m@00000000"} 2.0' in text
    assert 'tuner_first_token_seconds_count{name="m",version="m@00000000"} 1.0' in text
    state = State(world.gateway.fleet.state.path)
    mine, seer = create(state, models=["m"]), create(state, models=["/metrics"])
    time.sleep(0.15)
    assert world.client.get("/metrics").status_code == 401
    assert world.client.get("/metrics", headers=bearer(mine)).status_code == 403
    assert "tuner_requests_total" in world.client.get("/metrics", headers=bearer(seer)).text
    assert world.ask(headers=bearer(seer)).status_code == 404

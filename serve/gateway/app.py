"""The one address that clients speak to: a few routes, forwarded to the engine of the version that the named model leads to.

Everything else is 404: the engine behind has routes that no client should reach.
"""

import asyncio
import json
import re
import time
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.fleet import Fleet
from serve.gateway.admin import admin_routes
from serve.gateway.passing import Asked, Outcome, pass_on
from serve.gateway.shadow import Shadows
from serve.gateway.surface import SURFACE, document, paths_of, wrong
from serve.gateway.telemetry import Telemetry
from serve.keys import Keyring
from serve.state import Key
from serve.version import Version

# Hosts and origins of this machine, as clients write them.
LOOPBACK = re.compile(r"(?:https?://)?(?:localhost|127(?:\.\d+){3}|\[::1\])(?::\d+)?", re.IGNORECASE)
# In a key's scope, where no model can have this name.
METRICS = "/metrics"


@dataclass(frozen=True)
class Limits:
    """What a single request may take."""

    body_bytes: int = 16_000_000
    body_timeout_s: float = 30.0
    """A body that is not whole by then is given up."""
    request_timeout_s: float = 600.0
    """An answer that is not whole by then is cut off."""
    active: int = 1024
    """Requests under way; more are answered 503 at once."""


class Traffic:
    """Counts requests under way, and refuses new ones while the endpoint shuts down."""

    def __init__(self) -> None:
        self.active = 0
        self.draining = False


@dataclass
class Gateway:
    """What the routes share."""

    fleet: Fleet
    keyring: Keyring
    traffic: Traffic
    limits: Limits
    telemetry: Telemetry
    created: int = 0
    operator: str | None = None
    """The secret that the endpoint's own commands order with; it is in a file that only the user can read."""

    def __post_init__(self) -> None:
        self.shadows = Shadows(self._compared)

    def app(self) -> ASGIApp:
        """The application. What engines answer goes past the framework, whose routing costs as much as all else of a small call."""
        forwards = {path: _Forward(self, path) for path in SURFACE}
        rest = self._rest()

        async def front(scope: Scope, receive: Receive, send: Send) -> None:
            forward = forwards.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
            await (forward or rest)(scope, receive, send)

        return front

    def _rest(self) -> Starlette:
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            Route("/ready", self.is_ready),
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{name}", self.show_model, methods=["GET"]),
            *(Route(path, unknown, methods=["POST"]) for path in SURFACE),  # named here for what other methods are told
            *admin_routes(self),
        ]
        rest = Starlette(routes=routes, exception_handlers={HTTPException: unknown})
        rest.router.redirect_slashes = False  # to wherever a client's Host header says
        return rest

    async def health(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """The process is there."""
        return JSONResponse({"status": "ok"})

    async def is_ready(self, request: Request) -> Response:
        """Each name leads to a version that was proven and that has lately been heard of."""
        names = {name: self.fleet.versions.get(pointer.current or "") for name, pointer in self.fleet.names.items()}
        waiting = sorted(name for name, version in names.items() if version is None or not version.ready)
        fine = not waiting and bool(names) and not self.traffic.draining
        known = not isinstance(self.who(request.headers), Response)  # to strangers no name is told
        return JSONResponse({"ready": fine, **({"waiting": waiting} if known else {})}, 200 if fine else 503)

    async def openapi(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """What can be asked, for machines."""
        return JSONResponse(document())

    async def metrics(self, request: Request) -> Response:
        """What Prometheus reads; once there are keys, with one that was made for it."""
        key = self.who(request.headers)
        if isinstance(key, Response):
            return key
        if key is not None and not (key.admin or METRICS in key.models):
            return failure(
                403, "this key may not read metrics; `tuner keys create --metrics` makes one that may", "permission_error"
            )
        return Response(await self.telemetry.metrics.text(), media_type="text/plain; version=0.0.4")

    async def list_models(self, request: Request) -> Response:
        """The names that the key may ask."""
        key = self.who(request.headers)
        if isinstance(key, Response):
            return key
        entries = [self._entry(name) for name in self.fleet.names if key is None or key.may_ask(name)]
        return JSONResponse({"object": "list", "data": entries})

    async def show_model(self, request: Request) -> Response:
        """One of them."""
        key, name = self.who(request.headers), request.path_params["name"]
        if isinstance(key, Response):
            return key
        if name not in self.fleet.names or not (key is None or key.may_ask(name)):
            return self.no_model(name, key)
        return JSONResponse(self._entry(name))

    def who(self, headers: Any) -> Key | Response | None:
        """The key that a request carries; None where none has ever been made; the refusal where it carries no valid one."""
        if not self.keyring.some:
            # Then only this machine may ask, and no page of elsewhere that a browser on it has opened.
            strange = [each for each in (headers.get("host"), headers.get("origin")) if each and not LOOPBACK.fullmatch(each)]
            if strange:
                text = f"without keys only this machine may ask, by its own name, and this is from or to {strange[0]!r:.80}"
                return failure(403, text, "permission_error")
            return None
        kind, _, written = headers.get("authorization", "").partition(" ")
        key = self.keyring.find(written.strip() if kind.lower() == "bearer" else headers.get("x-api-key"))
        if key is None:
            return failure(
                401, "a valid key is missing: Authorization: Bearer tnr-...", "authentication_error", code="invalid_api_key"
            )
        return key

    def no_model(self, name: Any, key: Key | None) -> Response:
        """There is none of this name, or not for this key, which is told alike."""
        there = [each for each in self.fleet.names if key is None or key.may_ask(each)]
        text = f"there is no model {name!r:.100} here; there is: {', '.join(there) or 'none'}"
        return failure(404, text, "invalid_request_error", param="model", code="model_not_found")

    def _compared(self, asked: Asked, version: Version, result: str) -> None:
        self.telemetry.metrics.compare(version.name, version.id, result)
        self.telemetry.log.add("shadow", request_id=asked.request_id, version=version.id, result=result)

    def _entry(self, name: str) -> dict[str, Any]:
        version = self.fleet.versions.get(self.fleet.names[name].current or "")
        labels = version.bundle.manifest.serving.get("labels") if version else None
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "tuner",
            **({"version": version.id, "fingerprint": version.bundle.manifest.fingerprint} if version else {}),
            **({"labels": labels} if labels else {}),
        }


class _Forward:
    """A route that engines answer: everything that can be refused is refused before one is asked."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        self._gateway, self._path = gateway, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        asked = Asked(self._path, f"req-{uuid4().hex}", time.monotonic())
        gateway = self._gateway
        gateway.traffic.active += 1
        try:
            try:
                found = await self._checked(request, asked)
            except Exception:
                await failure(500, f"this is a mistake of the endpoint's; its log has {asked.request_id}", "server_error")(
                    scope, receive, send
                )
                gateway.telemetry(asked, Outcome(500, reason="a bug, see the log on standard error"))
                raise  # with its traceback
            if isinstance(found, Response):
                found.headers["x-request-id"] = asked.request_id
                await found(scope, receive, send)
                outcome = Outcome(found.status_code)
            else:
                outcome = await self._passed_on(asked, found, receive, send)
        finally:
            gateway.traffic.active -= 1
        gateway.telemetry(asked, outcome)
        if asked.key:
            gateway.keyring.spend(asked.key, outcome.prompt_tokens + outcome.completion_tokens)

    async def _passed_on(self, asked: Asked, version: Version, receive: Receive, send: Send) -> Outcome:
        shadow = self._gateway.fleet.shadow(version)
        asked.heard = bytearray() if shadow else None
        version.active += 1
        try:
            outcome = await pass_on(asked, version, receive, send, timeout_s=self._gateway.limits.request_timeout_s)
        finally:
            version.active -= 1
        if shadow and asked.heard and outcome.status == 200:
            self._gateway.shadows.follow(asked, shadow, bytes(asked.heard))
        return outcome

    async def _checked(self, request: Request, asked: Asked) -> Version | Response:
        """The version to ask, or the refusal."""
        gateway = self._gateway
        key = gateway.who(request.headers)
        if isinstance(key, Response):
            return key
        asked.key, asked.traceparent = key, request.headers.get("traceparent")
        if gateway.traffic.draining:
            return failure(503, "the endpoint is shutting down", "service_unavailable", retry_s=5)
        if gateway.traffic.active > gateway.limits.active:
            return failure(503, f"{gateway.limits.active} requests are under way already", "service_unavailable", retry_s=1)
        body = await self._body(request)
        if isinstance(body, Response):
            return body
        try:
            asked.body = json.loads(body)
            name = asked.body["model"]
        except RecursionError:
            return failure(400, "the body is nested too deep", "invalid_request_error")
        except ValueError as error:
            return failure(400, f"the body is no JSON: {error}", "invalid_request_error")
        except (KeyError, TypeError):
            return failure(400, 'the body must be a JSON object with the key "model"', "invalid_request_error")
        version = gateway.fleet.find(name) if isinstance(name, str) else None
        if version is None or not (key is None or key.may_ask(version.name)):
            return gateway.no_model(name, key)
        asked.version = version.id
        if version.head not in SURFACE[self._path].heads:
            text = f"{name} answers POST {', '.join(paths_of(version.head))}; it has a {version.head} head"
            return failure(400, text, "invalid_request_error", param="model")
        if why := wrong(self._path, body):
            return failure(400, why, "invalid_request_error")
        asked.body = {key: value for key, value in asked.body.items() if value is not None}
        if translate := SURFACE[self._path].translate:
            try:
                said = asked.body
                # What makes tokens of texts takes its time, in which others want to be answered.
                asked.body = await asyncio.to_thread(translate.asks, said, version)
                asked.telling = await asyncio.to_thread(translate.Telling, said, version)
            except ValueError as error:
                return failure(400, str(error), "invalid_request_error")
            except (KeyError, TypeError, AttributeError) as error:
                return failure(400, f"the body cannot be read ({type(error).__name__}: {error})", "invalid_request_error")
        if asked.body.get("tools") and asked.body.get("tool_choice") != "none" and not version.tools:
            text = f"tools: the chat template of {name} does not show them, so they would never be called"
            return failure(400, text, "invalid_request_error", param="tools")
        for turn in asked.body.get("messages") or ():
            if turn.get("tool_calls") and not version.tools:
                text = f"messages: the chat template of {name} does not show tool calls, so the model would not see what it called"
                return failure(400, text, "invalid_request_error", param="messages")
            if turn.get("role") == "developer":  # OpenAI's newer word, which templates do not know
                turn["role"] = "system"
        if key and (wait_s := gateway.keyring.take(key)):
            may = [f"{count} {what}" for count, what in ((key.rpm, "requests"), (key.tpm, "tokens")) if count is not None]
            text = f"this key has used what it may in a minute: {', '.join(may)}"
            return failure(429, text, "rate_limit_error", retry_s=wait_s, code="rate_limit_exceeded")
        if why := version.why_not:
            given_up = version.status == "failed"
            text = f"{name} cannot be asked now: " + ("it was given up" if given_up else why)
            return failure(503, text, "service_unavailable", retry_s=None if given_up else 5)
        return version

    async def _body(self, request: Request) -> bytes | Response:
        limits = self._gateway.limits
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said) > limits.body_bytes:
            return failure(413, f"the request has more than the {limits.body_bytes} bytes allowed", "invalid_request_error")
        body = bytearray()
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limits.body_bytes:
                        text = f"the request has more than the {limits.body_bytes} bytes allowed"
                        return failure(413, text, "invalid_request_error")
        except ClientDisconnect:
            return failure(499, "the client went away", "invalid_request_error")
        except TimeoutError:
            return failure(408, f"the body was not whole after {limits.body_timeout_s:.0f} s", "invalid_request_error")
        return bytes(body)


async def unknown(request: Request, error: Exception | None = None) -> Response:
    """A path or method that is not there."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    text = "there is no such path" if status == 404 else "this path takes no such method"
    return failure(status, f"{request.method} {request.url.path}: {text}; there is {', '.join(ROUTES)}", "invalid_request_error")


ROUTES = ("GET /v1/models", *(f"POST {path}" for path in SURFACE))


def failure(
    status: int, message: str, kind: str, *, retry_s: float | None = None, param: str | None = None, code: str | int | None = None
) -> JSONResponse:
    """An error in OpenAI's form, which its clients turn into their own exceptions."""
    headers = {"retry-after": str(max(1, round(retry_s)))} if retry_s else None
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code or status}}, status, headers)

"""What operators ask and change, with a key of their own: where names lead, and how deployments went.

Without an admin key these routes are not there; `tuner keys create --admin` makes one.
"""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.requests import mistake
from tuner.errors import TunerError

if TYPE_CHECKING:
    from serve.gateway.app import Gateway

MOST_BYTES = 100_000


class Order(BaseModel):
    """What is common to all orders."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str


class Deploy(Order):
    """POST /admin/deployments: bring a bundle up, prove it, and lead the name to it."""

    bundle: str
    """The path of the bundle on the endpoint's machine."""
    weight: int = Field(100, ge=0, le=100)
    """Percent of the requests; below 100 the version is tried out beside the current one."""
    shadow: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "Deploy":
        if self.shadow and self.weight != 100:
            raise ValueError("a shadow answers no request, so it has no weight")
        return self


class Promote(Order):
    """POST /admin/promote: give the version that is tried out more of the requests, or with 100 the name."""

    weight: int = Field(100, ge=0, le=100)


def admin_routes(gateway: "Gateway") -> list[Route]:
    """The routes of the operator."""
    fleet = gateway.fleet

    async def describe(request: Request) -> Response:  # noqa: ARG001 - Starlette's signature
        return JSONResponse({"names": fleet.described(), "deployments": [asdict(each) for each in reversed(fleet.attempts)]})

    async def deploy(order: Deploy) -> dict[str, Any]:
        # A client that gives up waiting does not undo what it asked for.
        version = await fleet.order(fleet.deploy(order.name, Path(order.bundle), weight=order.weight, shadow=order.shadow))
        return {"name": order.name, "version": version.id}

    async def promote(order: Promote) -> dict[str, Any]:
        return {"name": order.name, "version": fleet.promote(order.name, order.weight).id}

    async def rollback(order: Order) -> dict[str, Any]:
        return {"name": order.name, "version": (await fleet.order(fleet.rollback(order.name))).id}

    async def remove(order: Order) -> dict[str, Any]:
        fleet.remove(order.name)
        return {"name": order.name, "version": None}

    orders: dict[str, tuple[type[Order], Callable[[Any], Awaitable[dict[str, Any]]]]] = {
        "/admin/deployments": (Deploy, deploy),
        "/admin/promote": (Promote, promote),
        "/admin/rollback": (Order, rollback),
        "/admin/remove": (Order, remove),
    }

    def ordered(form: type[Order], work: Callable[[Any], Awaitable[dict[str, Any]]]) -> Any:
        async def handle(request: Request) -> Response:
            body = bytearray()
            if gateway.traffic.draining:
                return _refusal(503, "the endpoint is shutting down")
            try:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > MOST_BYTES:
                        return _refusal(413, "the order is too long")
                return JSONResponse(await work(form.model_validate_json(bytes(body))))
            except ClientDisconnect:
                return _refusal(499, "the client went away")
            except ValidationError as error:
                return _refusal(400, mistake(form, error))
            except TunerError as error:
                return _refusal(409, str(error))

        return handle

    def guarded(work: Any) -> Any:
        async def handle(request: Request) -> Response:
            if (refused := _who(gateway, request)) is not None:
                return refused
            answer: Response = await work(request)
            return answer

        return handle

    return [
        Route("/admin/deployments", guarded(describe), methods=["GET"]),
        *(Route(path, guarded(ordered(*order)), methods=["POST"]) for path, order in orders.items()),
    ]


def _who(gateway: "Gateway", request: Request) -> Response | None:
    """The refusal, unless the request carries the operator's key."""
    kind, _, written = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        own = gateway.operator
        if own and hmac.compare_digest(written.strip().encode("utf-8", "surrogatepass"), own.encode()):
            return None
        key = gateway.keyring.find(written.strip())
        if key is not None and key.admin:
            return None
    return _refusal(401, "an admin key is missing: Authorization: Bearer ..., as `tuner keys create --admin` makes one")


def _refusal(status: int, message: str) -> JSONResponse:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)

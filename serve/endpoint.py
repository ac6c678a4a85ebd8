"""One address for many bundles: the gateway opens at once, the engines start, are proven, and answer; at the end all is gone."""

import asyncio
import fcntl
import ipaddress
import json
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.engine import Care
from serve.errors import ServeError
from serve.fleet import Fleet
from serve.gateway.app import Gateway, Limits, Traffic
from serve.gateway.telemetry import Telemetry
from serve.keys import Keyring
from serve.state import State
from serve.version import default_name
from tuner.bundle import open_bundle

# A client that has not sent its headers by then is cut off; slow ones would keep every connection busy.
HEADERS_TIMEOUT_S = 15.0
MOST_HEADER_BYTES = 65_536
# In the endpoint's state folder: where it listens, and what its own commands order with.
OPERATOR = "operator.json"


@dataclass(frozen=True)
class Settings:
    """How to serve."""

    host: str = "127.0.0.1"
    """Anything but loopback wants a key."""
    port: int = 8000
    """0 takes a free one."""
    engine: str | None = None
    """A file in serve/engines; the preferred one that can serve the bundle by default."""
    state: Path | None = None
    """The folder for what must outlive a crash; without it nothing does."""
    keys: Path | None = None
    """A file of keys beside those of the state, which another machine made."""
    certificate: Path | None = None
    """For TLS, in PEM, with its key beside it."""
    certificate_key: Path | None = None
    drain_timeout_s: float = 30.0
    """Requests under way may finish in this time after Ctrl-C."""
    care: Care = field(default_factory=Care)
    limits: Limits = field(default_factory=Limits)


def named(folders: list[Path], name: str | None = None) -> dict[str, Path]:
    """Names for bundles that are given by their folders alone, and for the bases of adapters among them. Raises ServeError."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ServeError(f"{', '.join(map(str, folders))}: the same bundle is named twice")
    if name and len(folders) > 1:
        raise ServeError(f"--name {name}: {len(folders)} bundles cannot share one name; without it each has its own")
    found: dict[str, Path] = {}

    def claim(name: str, folder: Path) -> None:
        if found.setdefault(name, folder).resolve() != folder.resolve():
            raise ServeError(f"{folder}: another bundle is called {name!r} already; serve them under different directories' names")

    for folder in folders:
        bundle = open_bundle(folder)
        claim(name or default_name(bundle), folder)
        if bundle.manifest.kind == "adapter" and bundle.manifest.serving.get("live_adapter") and bundle.base().manifest.probe:
            claim(default_name(bundle.base()), bundle.base().path)
    return found


async def serve_until(
    bundles: dict[str, Path],
    settings: Settings,
    say: Callable[[str], None],
    stop: asyncio.Event,
    opened: Callable[[str, Fleet], None],
) -> None:
    """Open the gateway, start all engines, call `opened` with the address, and after `stop` drain and end everything.

    Until its version is proven a name answers 503, so that clients and load balancers need not wait for a connection.
    Raises ServeError, BundleError or EngineError where nothing can be served.
    """
    with ExitStack() as held:
        listener = held.enter_context(_bind(settings.host, settings.port))
        if settings.state:
            held.enter_context(_alone(settings.state))
        state = State(settings.state / "state.sqlite" if settings.state else None)
        held.callback(state.close)
        keyring = Keyring(state, settings.keys, say)
        _require_safety(settings, keyring)
        fleet = Fleet(state, settings.care, say, engine=settings.engine)
        fleet.declare(bundles)
        if settings.state and not keyring.some:
            say(f"no key has been made: whoever reaches {settings.host} may ask; `tuner keys create --models NAME` ends that")
        scheme = "https" if settings.certificate else "http"
        url = f"{scheme}://{_shown(settings.host)}:{listener.getsockname()[1]}/v1"
        operator = held.enter_context(_operated(settings.state, url, settings.certificate)) if settings.state else None
        traffic = Traffic()
        telemetry = Telemetry(fleet, settings.state / "requests.jsonl" if settings.state else None)
        held.callback(telemetry.close)
        gateway = Gateway(fleet, keyring, traffic, settings.limits, telemetry, created=int(time.time()), operator=operator)
        await _run(gateway, settings, listener, stop, lambda: opened(url, fleet))


async def _run(
    gateway: Gateway, settings: Settings, listener: socket.socket, stop: asyncio.Event, opened: Callable[[], None]
) -> None:
    server = uvicorn.Server(
        uvicorn.Config(
            gateway.app(),
            http=Patient,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.certificate_key,
        )
    )
    # Signals are ours: uvicorn would stop before the requests under way are answered.
    server.capture_signals = _no_signals  # type: ignore[method-assign]
    answering = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    work = asyncio.create_task(gateway.fleet.start())
    try:
        await asyncio.wait([work, answering, stopping], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            opened()
            work = asyncio.create_task(gateway.fleet.watch())
            await asyncio.wait([work, answering, stopping], return_when=asyncio.FIRST_COMPLETED)
        gateway.traffic.draining = True
        gateway.fleet.give_up()
        end = time.monotonic() + settings.drain_timeout_s
        while gateway.traffic.active and time.monotonic() < end:
            await asyncio.sleep(0.1)
        for task in (work, answering):
            if task.done():
                task.result()
    finally:
        work.cancel()
        stopping.cancel()
        server.should_exit = True
        # Whatever went wrong in them, the engines have still to be ended.
        await asyncio.gather(work, answering, stopping, gateway.shadows.close(), return_exceptions=True)
        await gateway.fleet.stop()


@contextmanager
def serving(folders: list[Path], settings: Settings, say: Callable[[str], None]) -> Iterator[str]:
    """The address of an endpoint that runs in a thread while the block does. Raises ServeError where it does not come up."""
    bundles = named(folders)
    loop = asyncio.new_event_loop()
    stop, address, failed = asyncio.Event(), "", []
    up = threading.Event()

    def opened(url: str, fleet: Fleet) -> None:  # noqa: ARG001 - what the command line wants to know, too
        nonlocal address
        address = url
        up.set()

    def work() -> None:
        try:
            loop.run_until_complete(serve_until(bundles, settings, say, stop, opened))
        except BaseException as error:
            failed.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        up.wait()
        if not failed:
            yield address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
    if failed:
        raise failed[0]


class Patient(HttpToolsProtocol):
    """uvicorn's protocol, which waits for a client's headers for some seconds and not for ever."""

    _late: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """A client has come."""
        super().connection_made(transport)
        self._wait()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._header_bytes = 0
        self._wait()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of them."""
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MOST_HEADER_BYTES:
            self.transport.close()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Its headers are there."""
        self._wait(ends=True)
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._wait(ends=True)
        super().connection_lost(exc)

    def _wait(self, *, ends: bool = False) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = None if ends else self.loop.call_later(HEADERS_TIMEOUT_S, self.transport.close)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)  # now, or a second endpoint could bind the same port until the first one's engines are up
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror) or error.errno in (None, 99):
            raise ServeError(f"host {host}: is no address of this machine") from None
        if error.errno == 13:
            raise ServeError(f"port {port} on {host} is for the administrator; choose one above 1023 with --port") from None
        raise ServeError(f"port {port} on {host} is taken; stop what listens there or choose another with --port") from None
    return listener


def _require_safety(settings: Settings, keyring: Keyring) -> None:
    """Raises ServeError for what would let strangers in."""
    if not _is_loopback(settings.host) and not keyring.some:
        where = f" --state {settings.state}" if settings.state else ""
        raise ServeError(
            f"host {settings.host}: whoever reaches it could ask; make a key first: `tuner keys create --models '*'{where}`"
        )
    for file in (settings.certificate, settings.certificate_key):
        if file and not file.is_file():
            raise ServeError(f"{file}: there is no such file, which TLS wants")
    if settings.certificate and settings.certificate_key:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                settings.certificate, settings.certificate_key, password=_no_word
            )
        except (ssl.SSLError, OSError, ValueError) as error:
            files = f"{settings.certificate} and {settings.certificate_key}"
            raise ServeError(f"{files}: are no certificate and its key without a passphrase, in PEM ({error})") from None


def _no_word() -> str:
    return ""  # asked for at the terminal it would be by default


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(host: str) -> str:
    """A host as it is written into a URL; of all interfaces the one that is always there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other endpoint uses this state meanwhile. Raises ServeError where one does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch(mode=0o600)  # whoever may open it could hold it
        lock: IO[str] = (folder / "lock").open("w")
    except OSError as error:
        raise ServeError(f"{folder}: the endpoint's state cannot be kept there ({error.strerror}); --state names another") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ServeError(f"{folder}: another endpoint keeps its state there; --state FOLDER gives this one its own") from None
        yield


@contextmanager
def _operated(folder: Path, url: str, certificate: Path | None) -> Iterator[str]:
    """A secret for the endpoint's own commands, in a file that only the user can read and that is gone with the endpoint."""
    secret, file = secrets.token_urlsafe(32), folder / OPERATOR
    file.unlink(missing_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        told = {"url": url.removesuffix("/v1"), "secret": secret, "certificate": certificate and str(certificate.resolve())}
        json.dump(told, opened)
    try:
        yield secret
    finally:
        with suppress(OSError):
            file.unlink()


@contextmanager
def _no_signals() -> Iterator[None]:
    yield

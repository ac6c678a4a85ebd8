"""One address that serves one or more bundles: engines as child processes, proven before they take traffic, restarted and
proven again when they die, and gone without a trace when the endpoint stops."""

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvicorn

from serve import engines as kinds
from serve.errors import EngineError, ServeError
from serve.gateway.app import Traffic, gateway
from serve.replay import replay
from tuner.bundle import MANIFEST, Bundle, open_bundle, verify
from tuner.errors import BundleError


@dataclass(frozen=True)
class Settings:
    """How to serve."""

    port: int = 8000
    """On loopback; 0 takes a free one."""
    max_tokens: int | None = None
    """Longest prompt and answer together; what the bundle's recipe says by default."""
    engine: str | None = None
    """A file in serve/engines; the preferred one that can serve the bundle by default."""
    name: str | None = None
    """What clients put into `model`; the bundle's own name by default."""
    start_timeout_s: float = 600.0
    """An engine that is not healthy by then is given up."""
    drain_timeout_s: float = 30.0
    """Requests under way may finish in this time after Ctrl-C."""
    # After this many failed starts in a row an engine stays down; the endpoint ends when none is left.
    max_failed_starts: int = 3


# An engine whose endpoint was killed may end by itself in this time.
GUARD_GRACE_S = 10
# How often a child is looked at. A client must see 503 within 2 s of its death.
WATCH_INTERVAL_S = 0.25


class Engine:
    """One engine's process group: started, proven, watched, restarted."""

    def __init__(
        self, kind: str, name: str, model: Bundle, adapters: dict[str, Bundle], settings: Settings, say: Callable[[str], None]
    ) -> None:
        self.kind, self.name, self.model, self.adapters, self.settings, self.say = kind, name, model, adapters, settings, say
        self.client = httpx.AsyncClient()
        self.failure: str | None = None
        """Why it stays down, once it does."""
        self._ready = False
        self._process: subprocess.Popen[bytes] | None = None
        self._children: list[psutil.Process] = []
        self._guard: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None

    @property
    def ready(self) -> bool:
        """It runs, and has answered its probe."""
        return self._ready and self._alive()

    @property
    def head(self) -> str:
        """What it answers with."""
        return str(self.model.manifest.head)

    def suspect(self) -> None:
        """A request failed: stop sending more if a process is gone."""
        self._ready = self.ready

    async def start(self) -> None:
        """Start, wait until healthy, replay every probe. Raises EngineError with the engine's last error lines."""
        port = free_port()
        plan = kinds.load(self.kind).launch(self.name, self.model, self.adapters, port=port, max_tokens=self.settings.max_tokens)
        await self.client.aclose()
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=httpx.Limits(max_connections=None))
        descriptor, log = tempfile.mkstemp(prefix="tuner-engine-", suffix=".log")
        self._log = Path(log)
        # A session of its own, so that the whole group can be ended and a Ctrl-C in the terminal reaches only us.
        self._process = subprocess.Popen(
            plan.command,
            env=plan.environment,
            stdout=descriptor,
            stderr=descriptor,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        os.close(descriptor)
        self._guard = _guard(self._process.pid)
        started = time.monotonic()
        self.say(f"{self.name}: the engine ({self.kind}) starts (log: {log})")
        await self._wait_until_healthy(started)
        with suppress(psutil.NoSuchProcess):  # died just now, which the probe will find
            self._children = psutil.Process(self._process.pid).children(recursive=True)
        served = {**({self.name: self.model} if self.model.manifest.probe or not self.adapters else {}), **self.adapters}
        for name, bundle in served.items():
            try:
                proof = await replay(self.client, name, bundle, plan.dtype)
            except EngineError as error:
                await asyncio.sleep(1.0)  # a core that died takes its front end along, and its log says why
                raise EngineError(f"{error}{self._last_words() if not self._alive() else ''}") from None
            self.say(
                f"{name}: proven on {proof.questions} questions: {proof.agreement:.1%} of {proof.answers} answers the same, "
                f"{proof.what} {proof.mean_difference:.5f} apart, {proof.tolerance:.3f} allowed"
            )
        self._ready = True
        self.say(f"{self.name}: ready after {time.monotonic() - started:.0f} s")

    async def watch(self) -> None:
        """Restart the engine whenever one of its processes is gone; returns, with `failure` set, when it will not stay up."""
        failures = 0
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if self._alive():
                continue
            self._ready = False
            self.say(f"{self.name}: the engine died{self._last_words()}; starting it again")
            await self.stop()
            try:
                await self.start()
                failures = 0
            except EngineError as error:
                failures += 1
                await self.stop()
                if failures >= self.settings.max_failed_starts:
                    self.failure = f"{self.name}: gave up after {failures} starts: {error}"
                    self.say(self.failure)
                    return
                self.say(str(error))

    async def stop(self) -> None:
        """End the whole process group: politely, then after 15 s by force. The log of an engine that was well goes, too."""
        well, self._ready = self.ready, False
        process = self._process
        if process is None:
            return
        with suppress(psutil.NoSuchProcess):
            self._children = list({*self._children, *psutil.Process(process.pid).children(recursive=True)})
        for number, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 10.0)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            end = time.monotonic() + seconds
            while time.monotonic() < end and (process.poll() is None or _group_exists(process.pid)):
                await asyncio.sleep(0.1)
        for child in self._children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        self._children, self._process = [], None
        if well and self._log:
            self._log.unlink(missing_ok=True)

    async def _wait_until_healthy(self, started: float) -> None:
        while True:
            if not self._alive():
                raise EngineError(f"{self.name}: the engine ended while it was starting{self._last_words()}")
            if time.monotonic() - started > self.settings.start_timeout_s:
                raise EngineError(
                    f"{self.name}: the engine was not healthy after {self.settings.start_timeout_s:.0f} s{self._last_words()}"
                )
            with suppress(httpx.HTTPError):
                if (await self.client.get("/health", timeout=5)).status_code == 200:
                    return
            await asyncio.sleep(0.5)

    def _alive(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            return False
        try:
            return all(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in self._children)
        except psutil.NoSuchProcess:
            return False

    def _last_words(self) -> str:
        code = self._process.poll() if self._process else None
        signalled = f" (ended by signal {-code})" if code is not None and code < 0 else ""
        return f"{signalled}: {kinds.load(self.kind).error_lines(self._log)} (log: {self._log})" if self._log else signalled


def arrange(folders: list[Path], settings: Settings, say: Callable[[str], None]) -> list[Engine]:
    """One engine for each model, and for each base that adapters share. Raises ServeError for what cannot be served."""
    models: dict[Path, tuple[str, str, Bundle]] = {}
    adapters: dict[Path, dict[str, Bundle]] = {}
    claimed: dict[str, Path] = {}

    def claim(name: str, bundle: Bundle) -> None:
        if claimed.setdefault(name, bundle.path.resolve()) != bundle.path.resolve():
            raise ServeError(
                f"{bundle.path}: another bundle is called {name!r} already; serve them under different directories' names"
            )

    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ServeError(f"{', '.join(map(str, folders))}: the same bundle is named twice")
    if settings.name and len(folders) > 1:
        raise ServeError(f"--name {settings.name}: {len(folders)} bundles cannot share one name; without it each has its own")
    for folder in folders:
        bundle = _as_served(open_bundle(folder), say)
        verify(bundle)  # its answers are proven, and so is all else in it, such as the names of labels
        kind, why = kinds.choose(bundle, settings.engine)
        if why:
            say(f"{folder}: served by {kind}; {why}")
        if not bundle.manifest.probe:
            raise ServeError(f"{folder}: has no probe to be proven with; run its recipe to the end")
        name = settings.name if settings.name and len(folders) == 1 else default_name(bundle)
        model, model_name = bundle, name
        if bundle.manifest.kind == "adapter":
            model = bundle.base()
            verify(model)
            model_name = default_name(model)
            claim(name, bundle)
            adapters.setdefault(model.path.resolve(), {})[name] = bundle
        claim(model_name, model)
        taken, *_ = models.setdefault(model.path.resolve(), (kind, model_name, model))
        if taken != kind:
            raise ServeError(f"{folder}: {kind} serves it and {taken} its base's other adapters; name one with --engine")
    return [Engine(kind, name, model, adapters.get(path, {}), settings, say) for path, (kind, name, model) in models.items()]


def _as_served(bundle: Bundle, say: Callable[[str], None]) -> Bundle:
    """The bundle, or, of an adapter that no engine takes while it runs, the model that its run merged it into."""
    why = kinds.unservable(bundle)
    if bundle.manifest.kind != "adapter" or not why:
        return bundle
    for path in sorted(bundle.path.resolve().parent.glob(f"[!.]*/{MANIFEST}")):
        with suppress(BundleError):
            merged = open_bundle(path.parent)
            if merged.manifest.stage == "merge" and merged.manifest.parents[-1]["fingerprint"] == bundle.manifest.fingerprint:
                say(f"{bundle.path}: {why.split(';')[0]}, so it is served merged, as {path.parent.name}")
                return merged
    return bundle


def default_name(bundle: Bundle) -> str:
    """The run's and the stage's name: `runs/demo/merge` is served as `demo-merge`."""
    return f"{bundle.path.resolve().parent.name}-{bundle.name}"


async def serve_until(engines: list[Engine], settings: Settings, stop: asyncio.Event, opened: Callable[[str], None]) -> None:
    """Open the gateway, start all engines, call `opened` with the address, and after `stop` drain and end everything.

    Until its engine is proven a model answers 503, so that clients and load balancers need not wait for a connection.
    """
    listener = _bind(settings.port)
    server: uvicorn.Server | None = None
    tasks: list[asyncio.Future[Any]] = []
    traffic = Traffic()
    try:
        models: dict[str, Any] = {name: engine for engine in engines for name in (engine.name, *engine.adapters)}
        created = int(time.time())
        app = gateway(models, lambda: [_entry(name, engine, created) for name, engine in models.items()], traffic)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=5))
        # Signals are ours: uvicorn would stop before the requests under way are answered.
        server.capture_signals = _no_signals  # type: ignore[method-assign]
        tasks = [asyncio.create_task(server.serve(sockets=[listener]))]
        for engine in engines:
            await _unless(stop, engine.start())
            if stop.is_set():
                return
        watching = asyncio.gather(*(engine.watch() for engine in engines))
        tasks.append(watching)
        opened(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        waiting = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        traffic.draining = True
        end = time.monotonic() + settings.drain_timeout_s
        while traffic.active and time.monotonic() < end:
            await asyncio.sleep(0.1)
        waiting.cancel()
        for task in done - {waiting}:
            task.result()
        if watching in done:
            raise EngineError("; ".join(str(engine.failure) for engine in engines))
    finally:
        for task in tasks[1:]:
            task.cancel()
        if server is not None:
            server.should_exit = True
        # Whatever went wrong in them, the engines have still to be ended.
        await asyncio.gather(*tasks, return_exceptions=True)
        listener.close()
        await asyncio.gather(*(engine.stop() for engine in engines))
        for engine in engines:
            await engine.client.aclose()


@contextmanager
def serving(folders: list[Path], settings: Settings, say: Callable[[str], None]) -> Iterator[str]:
    """The address of an endpoint that runs in a thread while the block does. Raises ServeError where it does not come up."""
    engines = arrange(folders, settings, say)
    loop = asyncio.new_event_loop()
    stop, address, failed = asyncio.Event(), "", []
    up = threading.Event()

    def opened(url: str) -> None:
        nonlocal address
        address = url
        up.set()

    def work() -> None:
        try:
            loop.run_until_complete(serve_until(engines, settings, stop, opened))
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


def free_port() -> int:
    """A port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _bind(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()  # now, or a second endpoint could bind the same port until the first one's engines are up
    except OSError:
        listener.close()
        raise ServeError(f"port {port} on 127.0.0.1 is taken; stop what listens there or choose another with --port") from None
    return listener


async def _unless(stop: asyncio.Event, work: Any) -> None:
    """Run `work`, and cancel it when `stop` is set first."""
    task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    else:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@contextmanager
def _no_signals() -> Iterator[None]:
    yield


def _entry(name: str, engine: Engine, created: int) -> dict[str, Any]:
    bundle = engine.adapters.get(name, engine.model)
    labels = bundle.manifest.serving.get("labels")
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "tuner",
        "fingerprint": bundle.manifest.fingerprint,
        **({"labels": labels} if labels else {}),
    }


# Loaded here rather than in the child, where nothing may be allocated between fork and exec.
_libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Linux: an engine whose endpoint is killed outright is asked to stop, instead of holding its memory for ever."""
    if hasattr(_libc, "prctl"):
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _guard(group: int) -> subprocess.Popen[bytes]:
    """A shell that ends the process group once our end of its pipe is closed, which the kernel does when we are killed outright.

    vLLM's processes are not all our children, and some do not heed a polite signal while they start.
    """
    script = f"read line; kill -TERM -{group}; sleep {GUARD_GRACE_S}; kill -KILL -{group}"  # dash knows no `kill --`
    return subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True

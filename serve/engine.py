"""One engine: a process group that is started, proven, watched, restarted when it dies or hangs, and ended without a trace."""

import asyncio
import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx
import psutil

from serve import engines
from serve.errors import EngineError
from serve.replay import replay, say_something
from tuner.bundle import Bundle, verify
from tuner.errors import TunerError

# So many short questions in a row must fail.
FAILURES = 3
# The path of a socket has 108 bytes at most.
LONGEST_FOLDER = 70
# An engine whose endpoint was killed may end by itself in this time.
GUARD_GRACE_S = 10
# Among an engine's own metrics.
QUEUE = re.compile(r"^(?:vllm:)?num_requests_(running|waiting)(?:\{[^}]*\})? ([\d.e+]+)$", re.MULTILINE)
# What `tuner` sets for trainings (tuner/memory.py): how long threads wait awake, and how many compiled products are kept. An engine
# shares its cores with the gateway, and meets other shapes.
OWN = {"GOMP_SPINCOUNT": "3000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
# How often a child is looked at. A client must see 503 within 2 s of its death.
WATCH_INTERVAL_S = 0.25


@dataclass(frozen=True)
class Care:
    """How engines are started and watched."""

    max_tokens: int | None = None
    """Longest prompt and answer together; what the bundle's recipe says by default."""
    start_timeout_s: float = 600.0
    """An engine that is not healthy by then is given up."""
    pulse_s: float = 10.0
    """An engine of which nothing was heard for so long is asked for one token."""
    hung_after_s: float = 60.0
    """One that has said nothing for so long after that is ended and started again."""
    # After this many failed starts in a row an engine stays down; the endpoint ends when none is left.
    max_failed_starts: int = 3


class Engine:
    """A model and the adapters that it is served with, by the names that the engine knows them by."""

    def __init__(
        self, kind: str, name: str, model: Bundle, adapters: dict[str, Bundle], care: Care, say: Callable[[str], None]
    ) -> None:
        self.kind, self.name, self.model, self.adapters, self.care, self.say = kind, name, model, adapters, care, say
        self.client = httpx.AsyncClient()
        self.session: aiohttp.ClientSession | None = None
        """What requests are passed on with; `client` is for our own questions."""
        self.failure: str | None = None
        """Why it stays down, once it does."""
        self.refused: dict[str, str] = {}
        """Of what it does not serve as it was trained, why."""
        self.threads: int | None = None
        """On a CPU; as many as it likes by default."""
        self.restarts = 0
        self.heard = 0.0
        """When the engine last said anything (monotonic seconds)."""
        self.started = False
        self._ready = False
        self._failed = 0
        self._changing = asyncio.Lock()
        self._dtype, self._longest = "", 0
        self._process: subprocess.Popen[bytes] | None = None
        self._children: list[psutil.Process] = []
        self._guard: subprocess.Popen[bytes] | None = None
        self._log: Path | None = None
        self._folder: Path | None = None

    @property
    def ready(self) -> bool:
        """It runs, and has answered its probes; looked at four times a second, and whenever a request to it fails."""
        return self._ready

    @property
    def served(self) -> dict[str, Bundle]:
        """What it answers for: the adapters, and the model where there is something to prove it by."""
        return {**({self.name: self.model} if self.model.manifest.probe or not self.adapters else {}), **self.adapters}

    def suspect(self) -> None:
        """A request failed: stop sending more if a process is gone, and let it be asked a question of ours at the next look."""
        self.heard = 0.0
        self._ready = self._ready and self._alive()

    async def start(self) -> None:
        """Start, wait until healthy, replay every probe.

        Raises EngineError with the engine's last error lines where it does not come up, or serves nothing as it was trained;
        what it serves wrongly beside others is left in `refused`.
        """
        self.started = True
        for bundle in (self.model, *self.adapters.values()):
            await asyncio.to_thread(verify, bundle)  # again at each start: what lies there may have been exchanged since
        await self._close_clients()
        # In a folder that only this user may enter: whoever else is on the machine asks the gateway.
        self._folder = Path(
            tempfile.mkdtemp(prefix="tuner-engine-", dir=None if len(tempfile.gettempdir()) < LONGEST_FOLDER else "/tmp")
        )
        path = self._folder / "http.sock"
        engine = engines.load(self.kind)
        plan = engine.launch(self.name, self.model, self.adapters, path=path, max_tokens=self.care.max_tokens)
        for name, count in OWN.items():
            if plan.environment.get(name) == count:
                del plan.environment[name]
        if self.threads:
            plan.environment.update(engine.with_threads(self.threads))
        self._longest = engines.longest(self.model, self.adapters, self.care.max_tokens)
        # A proxy of the environment is not for what runs on this machine.
        transport = httpx.AsyncHTTPTransport(uds=str(path), limits=httpx.Limits(max_connections=None))
        self.client = httpx.AsyncClient(base_url="http://engine", transport=transport, trust_env=False)
        connector, cookies = aiohttp.UnixConnector(str(path), limit=0), aiohttp.DummyCookieJar()
        self.session = aiohttp.ClientSession("http://engine", connector=connector, auto_decompress=False, cookie_jar=cookies)
        descriptor, log = tempfile.mkstemp(prefix="tuner-engine-", suffix=".log")
        self._log, self._dtype = Path(log), plan.dtype
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
        self.refused = {}
        for name, bundle in self.served.items():
            await self._prove(name, bundle)
        if len(self.refused) == len(self.served):
            raise EngineError("; ".join(self.refused.values()))
        self._failed, self.heard = 0, time.monotonic()
        self._ready = True
        self.say(f"{self.name}: ready after {time.monotonic() - started:.0f} s")

    def takes(self, bundle: Bundle) -> bool:
        """The adapter can join while it runs: there is room for one of its kind, and for texts of its length."""
        long = not self.care.max_tokens and int(bundle.manifest.serving.get("serve_max_tokens") or 0) > self._longest
        return self.ready and not long and bool(engines.load(self.kind).takes(list(self.adapters.values()), bundle))

    async def load(self, name: str, bundle: Bundle) -> None:
        """Let an adapter join while it runs. Raises EngineError where the engine refuses it or does not serve it as trained."""
        async with self._changing:
            await self._tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(bundle.path.resolve())})
            self.adapters[name] = bundle
            try:
                await self._prove(name, bundle)
                if why := self.refused.pop(name, None):
                    with suppress(EngineError):
                        await self._tell("/v1/unload_lora_adapter", {"lora_name": name})
                    raise EngineError(why)
            except BaseException:
                self.adapters.pop(name, None)  # or it would be loaded again at the next start
                raise

    async def unload(self, name: str) -> None:
        """Let an adapter go."""
        async with self._changing:
            if self.adapters.pop(name, None) is not None and self.ready:
                with suppress(EngineError):  # what is left in it is asked by nobody
                    await self._tell("/v1/unload_lora_adapter", {"lora_name": name})

    async def queue(self) -> dict[str, float]:
        """Requests that run and that wait in it; nothing where it does not say."""
        if not self.ready:
            return {}
        try:
            text = (await self.client.get("/metrics", timeout=2)).text
        except httpx.HTTPError:
            return {}
        return {state: float(count) for state, count in QUEUE.findall(text)}

    async def watch(self) -> None:
        """Restart the engine whenever one of its processes is gone, or it says nothing any more.

        Returns, with `failure` set, when it will not stay up.
        """
        failures = 0
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            what = await self._ailment() if self._alive() else "died"
            if what is None:
                continue
            self._ready = False
            self.restarts += 1
            self.say(f"{self.name}: the engine {what}{self._last_words()}; starting it again")
            await self.stop(politely=not self._alive())
            try:
                await self.start()
                failures = 0
            except (TunerError, OSError) as error:  # also where its bundle was changed or is gone
                failures += 1
                await self.stop()
                if failures >= self.care.max_failed_starts:
                    self.failure = f"{self.name}: gave up after it could not be started {failures} times: {error}"
                    self.say(self.failure)
                    return
                self.say(str(error))

    async def stop(self, *, politely: bool = True) -> None:
        """End the whole process group: politely, then after 15 s by force. The log of an engine that was well goes, too."""
        well, self._ready = self._ready and self._alive(), False
        process = self._process
        if process is not None:
            with suppress(psutil.NoSuchProcess):
                self._children = list({*self._children, *psutil.Process(process.pid).children(recursive=True)})
            for number, seconds in [*([(signal.SIGTERM, 15.0)] if politely else []), (signal.SIGKILL, 10.0)]:
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
            if self._log and self._log.exists() and (well or not self._log.stat().st_size):
                self._log.unlink()
        await self._close_clients()

    async def prove(self, name: str, bundle: Bundle) -> None:
        """Ask the probe of another bundle with the same weights. Raises EngineError where it is not answered rightly."""
        proof = await replay(self.client, name, bundle, self._dtype)
        self.say(f"{bundle.path}: proven on {proof.questions} questions of its own, {proof.mean_difference:.5f} apart")

    async def _prove(self, name: str, bundle: Bundle) -> None:
        """Ask the bundle's probe; what is not right is left in `refused`. Raises EngineError where the engine dies over it."""
        try:
            proof = await replay(self.client, name, bundle, self._dtype)
        except EngineError as error:
            await asyncio.sleep(0.0 if self._alive() else 1.0)  # a core that died takes its front end along, and its log says why
            if not self._alive():
                raise EngineError(f"{error}{self._last_words()}") from None
            self.refused[name] = str(error)
            self.say(str(error))
            return
        self.say(
            f"{name}: proven on {proof.questions} questions: {proof.agreement:.1%} of {proof.answers} answers the same, "
            f"{proof.what} {proof.mean_difference:.5f} apart, {proof.tolerance:.3f} allowed"
        )

    async def _ailment(self) -> str | None:
        """Nothing was heard for a while, or a request failed, and it does not answer the shortest of questions either."""
        if not self._ready or time.monotonic() - self.heard < self.care.pulse_s:
            return None
        right = [(name, each) for name, each in self.served.items() if name not in self.refused]
        if not right:
            return None
        (name, bundle), asked = right[0], time.monotonic()
        try:
            await asyncio.wait_for(say_something(self.client, name, bundle), self.care.hung_after_s)
        except EngineError as error:
            self._failed += 1
            if not self._alive():
                return "died"
            # One failure may be of the connection, or of an adapter that is just let go; and clients may have heard of it.
            failing = self._failed >= FAILURES and self.heard < asked and not self._changing.locked()
            return f"fails at the shortest question ({error})" if failing else None
        except TimeoutError:
            return "says nothing any more" if self.heard < asked else None
        self._failed, self.heard = 0, time.monotonic()
        return None

    async def _tell(self, path: str, body: dict[str, str]) -> None:
        try:
            reply = await self.client.post(path, json=body, timeout=self.care.start_timeout_s)
        except httpx.HTTPError as error:
            raise EngineError(f"{self.name}: the engine did not answer ({type(error).__name__}){self._last_words()}") from None
        if reply.status_code != 200:
            raise EngineError(f"{self.name}: the engine refused {body['lora_name']}: {reply.text[:300]}")

    async def _wait_until_healthy(self, started: float) -> None:
        while True:
            if not self._alive():
                raise EngineError(f"{self.name}: the engine ended while it was starting{self._last_words()}")
            if time.monotonic() - started > self.care.start_timeout_s:
                raise EngineError(
                    f"{self.name}: the engine was not healthy after {self.care.start_timeout_s:.0f} s{self._last_words()}"
                )
            with suppress(httpx.HTTPError):
                if (await self.client.get("/health", timeout=5)).status_code == 200:
                    return
            await asyncio.sleep(0.5)

    async def _close_clients(self) -> None:
        await self.client.aclose()
        if self.session is not None:
            await self.session.close()
            self.session = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _alive(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            return False
        try:
            return all(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in self._children)
        except psutil.NoSuchProcess:
            return False

    def _last_words(self) -> str:
        code = self._process.poll() if self._process else None
        if code == -signal.SIGKILL:  # what it wrote before has nothing to do with it
            return f" (ended by signal {-code}; log: {self._log})"
        signalled = f" (ended by signal {-code})" if code is not None and code < 0 else ""
        return f"{signalled}: {engines.load(self.kind).error_lines(self._log)} (log: {self._log})" if self._log else signalled


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

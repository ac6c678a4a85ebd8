"""Names, the versions that they lead to, and the engines that answer for them.

A name is a pointer: `support` leads to `support@3f2a91c0`, and moving it is one assignment between two requests. What a version
is follows from the bytes of its bundle, so the same bundle is the same version wherever it lies.
"""

import asyncio
import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve import engines
from serve.engine import Care, Engine
from serve.errors import EngineError, ServeError
from serve.memory import require_room
from serve.state import Placed, Pointer, State
from tuner.bundle import MANIFEST, Bundle, fingerprint, open_bundle, sha256, verify
from tuner.errors import BundleError, TunerError, disk_errors, nearest

# What a client writes into `model`, and a part of a key's scope: no path, no header and no log line can be made of it.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Engines that start at the same time share the cores.
STARTS_AT_ONCE = 2
SWEEP_S = 1.0
# Deployments that are remembered beside the latest.
MOST_ATTEMPTS = 49


@dataclass
class Version:
    """A bundle under a name."""

    id: str
    name: str
    bundle: Bundle
    digest: str
    manifest: str
    """sha256 of its bundle.json."""
    kind: str
    """The engine that serves it."""
    served: str = ""
    """What that engine calls it."""
    engine: Engine | None = None
    failure: str | None = None
    """Why it gets no request, once that is known."""
    active: int = 0
    """Requests under way."""
    created: float = field(default_factory=time.time)

    @property
    def head(self) -> str:
        """What it answers with."""
        return str(self.bundle.manifest.head)

    @property
    def ready(self) -> bool:
        """It has answered its probe on an engine that runs."""
        return self.why_not is None

    @property
    def why_not(self) -> str | None:
        """Why it cannot be asked now, or None."""
        if self.failure:
            return self.failure
        if self.engine is None:
            return "it is not started"
        if why := self.engine.failure or self.engine.refused.get(self.served):
            return why
        return None if self.engine.ready and self.served in self.engine.served else "its engine is starting or being restarted"

    @property
    def status(self) -> str:
        """One word of it."""
        down = self.failure or (self.engine and (self.engine.failure or self.engine.refused.get(self.served)))
        return "failed" if down else "ready" if self.ready else "starting" if self.engine else "stopped"


@dataclass
class Attempt:
    """A deployment that was asked for, for the operator to see how it went."""

    name: str
    path: str
    version: str | None = None
    status: str = "under way"
    reason: str | None = None
    at: float = field(default_factory=time.time)


class Fleet:
    """All of them."""

    def __init__(self, state: State, care: Care, say: Callable[[str], None], *, engine: str | None = None) -> None:
        self.state, self.care, self.say, self._wanted_engine = state, care, say, engine
        self.names: dict[str, Pointer] = {}
        self.versions: dict[str, Version] = {}
        self.engines: list[Engine] = []
        self.attempts: list[Attempt] = []
        self._watching: dict[Engine, asyncio.Task[None]] = {}
        self._starting = asyncio.Semaphore(STARTS_AT_ONCE)
        self._placing = asyncio.Lock()
        self._draw = random.Random()

    # What is asked.

    def find(self, asked: str) -> Version | None:
        """The version that answers a request for a name, or for one version by its id; None where there is neither."""
        pointer = self.names.get(asked)
        if pointer is None:
            version = self.versions.get(asked)
            owner = self.names.get(version.name) if version else None
            return version if owner and asked in owner.wanted else None
        if pointer.canary and pointer.weight and self._draw.random() * 100 < pointer.weight:
            canary = self.versions[pointer.canary]
            if canary.ready:  # one that fails costs no request
                return canary
        return self.versions.get(pointer.current or "")

    def shadow(self, version: Version) -> Version | None:
        """The version that is asked the same in the shadow of this one."""
        pointer = self.names.get(version.name)
        if pointer is None or version.id != pointer.current:
            return None
        found = self.versions.get(pointer.shadow or "")
        return found if found and found.ready else None

    # What is served.

    def declare(self, bundles: dict[str, Path]) -> None:
        """The names that the endpoint is started with. Where one has been moved since it was last declared so, it stays moved.

        Raises ServeError or BundleError for what cannot be served, before anything starts.
        """
        known, declared, placed = self.state.pointers(), self.state.declared(), self.state.versions()
        declared = declared or dict.fromkeys(bundles, "")
        for name, path in bundles.items():
            version = self._version(name, path)
            if name in known and declared.get(name) == version.digest:
                pointer = self._reopened(name, known[name], placed, {version.id: version})
                if pointer.current != version.id:
                    self.say(f"{name}: leads to {pointer.current} since it was moved; it was started with {version.id}")
            else:
                pointer = Pointer(version.id)
            if version.id in pointer.wanted:
                self.versions[version.id] = version
            self.names[name] = pointer
            self.state.point(name, pointer, (_placed(version),), declared=version.digest)
        for name, pointer in known.items():
            if name in bundles:
                continue
            if name in declared or not set(declared) & set(bundles):
                self.say(f"{name}: is not served now; where it leads is kept in {self.state.path}")
            else:
                try:
                    self.names[name] = self._reopened(name, pointer, placed, {})
                except ServeError as error:
                    self.say(f"{error}; it is not served")
                    continue
                self.say(f"{name}: served, too, since it was deployed; `tuner remove {name}` ends it")
        if not self.names:
            raise ServeError("nothing is named that could be served")
        for version in self.versions.values():
            self._place(version)
        require_room(self.engines)
        self._share_cores()
        self._drop_adapters()

    def _reopened(self, name: str, pointer: Pointer, placed: dict[str, Placed], there: dict[str, Version]) -> Pointer:
        """Where a name led, as far as that can still be served. Raises ServeError where its current version cannot."""
        gone: set[str] = set()
        for version_id in pointer.wanted - set(there):
            try:
                self.versions[version_id] = self._version(name, Path(placed[version_id].path), version_id)
            except (TunerError, KeyError) as error:
                if version_id == pointer.current:
                    raise ServeError(
                        f"{name} leads to {version_id}, which cannot be served any more ({error}); put it back, or name another "
                        f"bundle for {name}"
                    ) from None
                gone.add(version_id)
                self.say(f"{name}: {version_id} cannot be served any more ({error})")
        return Pointer(
            pointer.current,
            [each for each in pointer.previous if each not in gone],
            None if pointer.canary in gone else pointer.canary,
            pointer.weight,
            None if pointer.shadow in gone else pointer.shadow,
        )

    def _share_cores(self) -> None:
        """Engines are seldom all busy, so together they may have twice the threads that there are cores."""
        cores, count = len(os.sched_getaffinity(0)), len(self.engines)
        for engine in [each for each in self.engines if count > 1 and not each.started]:
            engine.threads = min(cores, max(1, 2 * cores // count))
        if count > 2:
            self.say(f"{count} engines on {cores} cores: {self.engines[-1].threads} threads for each")

    async def start(self) -> None:
        """Start every engine. Raises EngineError where none of the names can be answered."""
        async with self._placing:
            waiting = [asyncio.create_task(self._start(engine)) for engine in self.engines]
            try:
                await asyncio.gather(*waiting)
            finally:
                for task in waiting:
                    task.cancel()
        failures = [version.failure for version in self._current() if version.failure]
        if failures and len(failures) == len(self._current()):
            raise EngineError("; ".join(dict.fromkeys(failures)))

    async def watch(self) -> None:
        """Let go of what no name leads to any more; returns once every engine is given up."""
        while not self.engines or any(not engine.failure for engine in self.engines):
            await asyncio.sleep(SWEEP_S)
            for task in [each for each in self._watching.values() if each.done()]:
                task.result()  # a bug in there must not leave an engine unwatched
            await self._sweep()
        raise EngineError("; ".join(str(engine.failure) for engine in self.engines))

    async def stop(self) -> None:
        """End every engine."""
        for task in self._watching.values():
            task.cancel()
        await asyncio.gather(*self._watching.values(), return_exceptions=True)
        await asyncio.gather(*(engine.stop() for engine in self.engines))

    # What is changed while it runs.

    async def deploy(self, name: str, path: Path, *, weight: int = 100, shadow: bool = False) -> Version:
        """Bring up a bundle, prove it, and lead the name to it; or try it out with a weight below 100, or as a shadow.

        Raises ServeError or BundleError where it cannot be served or proven: then nothing has changed.
        """
        attempt = Attempt(name, str(path))
        self.attempts = [*self.attempts[-MOST_ATTEMPTS:], attempt]
        try:
            version = await asyncio.to_thread(self._version, name, path)
            attempt.version = version.id
            async with self._placing:
                self._require_same_head(name, version)
                if shadow or weight < 100:
                    self._require_beside(name, version)
                old = self.versions.get(version.id)
                if old and old.ready:
                    version = old
                else:
                    await self._bring_up(version)
                if shadow or weight < 100:
                    self.try_out(name, version, weight=weight, shadow=shadow)
                else:
                    self.point(name, version)
        except OSError as error:
            attempt.status, attempt.reason = "failed", f"{error.strerror or error}"
            raise ServeError(f"{str(path)[:200]}: {attempt.reason}") from None
        except BaseException as error:
            attempt.status, attempt.reason = "failed", str(error) or type(error).__name__
            self.say(f"{name}: {path} is not deployed: {attempt.reason}")
            raise
        attempt.status = "done"
        self.say(f"{name}: {version.id} {'is tried out' if shadow or weight < 100 else 'answers from now on'}")
        return version

    def point(self, name: str, version: Version) -> None:
        """From now on the name leads to this version; what it led to is kept for a rollback."""
        old = self.names.get(name, Pointer())
        if old.current == version.id:
            pointer = Pointer(version.id, old.previous)
        else:
            earlier = [each for each in (old.current, *old.previous) if each and each != version.id]
            pointer = Pointer(version.id, earlier[:9])
        self._point(name, pointer, version)

    def try_out(self, name: str, version: Version, *, weight: int = 0, shadow: bool = False) -> None:
        """Let a version answer so many percent of the requests, or be asked in the shadow of the current one."""
        self._require_beside(name, version)
        old = self.pointer(name)
        if shadow:
            pointer = Pointer(old.current, old.previous, old.canary, old.weight, version.id)
        else:
            pointer = Pointer(old.current, old.previous, version.id, weight, None if old.shadow == version.id else old.shadow)
        self._point(name, pointer, version)

    def _require_same_head(self, name: str, version: Version) -> None:
        """Raises ServeError where clients of the name ask what this version does not answer."""
        current = self.versions.get(self.names[name].current or "") if name in self.names else None
        if current and current.head != version.head:
            raise ServeError(
                f"{name} has a {current.head} head and {version.bundle.path} a {version.head} head, so it would be asked what it "
                "does not answer; give it a name of its own"
            )

    def _require_beside(self, name: str, version: Version) -> None:
        if version.id == self.pointer(name).current:
            raise ServeError(f"{version.id} is what {name} leads to already")

    def promote(self, name: str, weight: int) -> Version:
        """Give the version that is tried out so many percent of the requests; with 100 the name leads to it."""
        pointer = self.pointer(name)
        version = self.versions.get(pointer.canary or pointer.shadow or "")
        if version is None:
            raise ServeError(f"no version of {name} is tried out; `tuner deploy {name} DIR --weight {weight}` brings one in")
        if not version.ready:
            raise ServeError(f"{version.id} cannot be asked: {version.why_not}")
        if weight >= 100:
            self.point(name, version)
        else:
            self.try_out(name, version, weight=weight)
        return version

    async def rollback(self, name: str) -> Version:
        """Lead the name to what it led to before; first, where something is tried out, that is ended and the name stays."""
        pointer = self.pointer(name)
        if pointer.canary or pointer.shadow:
            self._point(name, Pointer(pointer.current, pointer.previous))
            return self.versions[str(pointer.current)]
        if not pointer.previous:
            raise ServeError(f"{name} has led nowhere else before, so there is nothing to go back to")
        version = self.versions.get(pointer.previous[0])
        if version is None or not version.ready:
            # It was let go, or has not come up: from where it lies it is brought up again, which takes as long as a start.
            placed = self.state.versions()[pointer.previous[0]]
            version = await asyncio.to_thread(self._version, name, Path(placed.path), placed.id)
            async with self._placing:
                if self.pointer(name) != pointer:
                    raise ServeError(f"{name} was moved meanwhile, to {self.pointer(name).current}; it stays there")
                await self._bring_up(version)
        self._point(name, Pointer(version.id, pointer.previous[1:]), version)
        return version

    def remove(self, name: str) -> None:
        """End a name. Requests under way are answered."""
        self.pointer(name)
        self.state.forget(name)
        del self.names[name]

    def pointer(self, name: str) -> Pointer:
        """Where a name leads; raises ServeError where there is no such name."""
        if name not in self.names:
            raise ServeError(f"there is no name {name!r} here{nearest(name, self.names)}")
        return self.names[name]

    def described(self) -> list[dict[str, Any]]:
        """Names and versions for the operator."""
        return [
            {
                "name": name,
                "current": pointer.current,
                "previous": pointer.previous,
                "canary": pointer.canary,
                "weight": pointer.weight,
                "shadow": pointer.shadow,
                "versions": [
                    {
                        "id": version.id,
                        "status": version.status,
                        "reason": version.why_not,
                        "path": str(version.bundle.path.resolve()),
                        "kind": version.bundle.manifest.kind,
                        "head": version.head,
                        "engine": version.kind,
                        "restarts": version.engine.restarts if version.engine else 0,
                        "active": version.active,
                        "manifest_sha256": version.manifest,
                    }
                    for version in self.versions.values()
                    if version.name == name
                ],
            }
            for name, pointer in self.names.items()
        ]

    def _current(self) -> list[Version]:
        return [self.versions[pointer.current] for pointer in self.names.values() if pointer.current in self.versions]

    def _point(self, name: str, pointer: Pointer, version: Version | None = None) -> None:
        self.state.point(name, pointer, (_placed(version),) if version else ())
        if version:
            self.versions[version.id] = version
        self.names[name] = pointer

    def _version(self, name: str, path: Path, expected: str | None = None) -> Version:
        """Open and check a bundle. Raises ServeError or BundleError for what cannot be served."""
        if not NAME.fullmatch(name):
            raise ServeError(f"{name!r} cannot be a name: letters, digits, . _ and -, 64 at most, a letter or digit first")
        bundle = as_served(open_bundle(path), self.say)
        verify(bundle)  # its answers are proven, and so is all else in it, such as the names of labels
        if bundle.manifest.kind == "adapter":
            verify(bundle.base())
        kind, why = engines.choose(bundle, self._wanted_engine)
        if why:
            self.say(f"{path}: served by {kind}; {why}")
        if not bundle.manifest.probe:
            raise ServeError(f"{path}: has no probe to be proven with; run its recipe to the end")
        digest = digest_of(bundle)
        version = Version(f"{name}@{digest[:8]}", name, bundle, digest, sha256(bundle.path / MANIFEST), kind)
        # A model is the same under all its names; of adapters each has its own.
        version.served = version.id if bundle.manifest.kind == "adapter" else model_id(bundle)
        if expected and version.id != expected:
            raise ServeError(f"{path}: is {version.id} now, and {expected} was deployed")
        return version

    def _place(self, version: Version) -> bool:
        """Give a version an engine; says whether it is one that runs already."""
        adapter = version.bundle.manifest.kind == "adapter"
        model = version.bundle.base() if adapter else version.bundle
        for engine in self.engines:
            # The same weights from another run are the same engine.
            if engine.kind != version.kind or not engine.name.endswith(model_id(model).rpartition("@")[2]) or engine.failure:
                continue
            if adapter and not engine.started:
                engine.adapters[version.served] = self._kept(version)
            if not engine.started or not adapter or engine.takes(version.bundle):
                version.engine = engine
                version.served = version.served if adapter else engine.name
                return engine.started
        adapters = {version.served: self._kept(version)} if adapter else {}
        version.engine = Engine(version.kind, model_id(model), model, adapters, self.care, self.say)
        self.engines.append(version.engine)
        return False

    def _kept(self, version: Version) -> Bundle:
        """The adapter under a path that is named after its content: engines know adapters by their paths, and would give an older
        one's answers for a newer one in its place."""
        if self.state.path is None:
            return version.bundle
        place = self.state.path.parent / "adapters" / version.digest[:16]
        if not (place / MANIFEST).is_file():
            part = place.with_name(f".{place.name}.{os.getpid()}.part")
            shutil.rmtree(part, ignore_errors=True)
            with disk_errors(place):
                shutil.copytree(version.bundle.path, part)
                shutil.rmtree(place, ignore_errors=True)
                part.rename(place)
        return Bundle(place, version.bundle.manifest)

    def _drop_adapters(self) -> None:
        """Of the copies of adapters, those that no version is of any more."""
        kept = {version.digest[:16] for version in self.versions.values()}
        for place in self.state.path.parent.glob("adapters/*") if self.state.path else ():
            if place.name not in kept:
                shutil.rmtree(place, ignore_errors=True)

    async def _bring_up(self, version: Version) -> None:
        """Give a version an engine, and have it proven there. Raises ServeError; nothing of it is left then."""
        before = list(self.engines)
        if version.bundle.manifest.kind == "adapter":
            await asyncio.to_thread(self._kept, version)
        runs = self._place(version)
        engine = version.engine
        assert engine is not None
        try:
            if runs and version.served not in engine.served:
                await engine.load(version.served, self._kept(version))
            elif runs:
                await engine.prove(version.served, version.bundle)
            elif not engine.started:
                require_room([engine])
                self._share_cores()
                await self._start(engine)
            if why := version.why_not:
                raise EngineError(f"{version.id}: {why}")
        except BaseException:
            version.engine = None
            if engine not in before and engine in self.engines:
                self.engines.remove(engine)
                await self._end(engine)
            raise

    async def _start(self, engine: Engine) -> None:
        """Start an engine and watch over it; of one that does not come up, its versions say why."""
        async with self._starting:
            try:
                await engine.start()
            except (TunerError, OSError) as error:
                engine.failure = str(error)
                await engine.stop()
            except BaseException:
                await engine.stop()
                raise
        for version in self.versions.values():
            if version.engine is engine:
                version.failure = engine.failure or engine.refused.get(version.served)
                if not version.failure and version.served == engine.name and version.bundle.manifest != engine.model.manifest:
                    try:  # the same weights, and a probe of its own
                        await engine.prove(version.served, version.bundle)
                    except EngineError as error:
                        version.failure = str(error)
        if not engine.failure:
            self._watching[engine] = asyncio.create_task(engine.watch())

    async def _end(self, engine: Engine) -> None:
        if task := self._watching.pop(engine, None):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await engine.stop()

    async def _sweep(self) -> None:
        """Let versions go that no name leads to, once their last answer is given, and engines without any."""
        async with self._placing:
            wanted = {version_id for pointer in self.names.values() for version_id in pointer.wanted}
            gone = [each for each in self.versions.values() if each.id not in wanted and not each.active]
            for version in gone:
                del self.versions[version.id]  # before anything is waited for: from here on no name can be led to it
            for version in gone:
                if version.engine and version.served in version.engine.adapters:
                    await version.engine.unload(version.served)
            used = {id(version.engine) for version in self.versions.values()}
            for engine in [each for each in self.engines if id(each) not in used]:
                self.engines.remove(engine)
                self.say(f"{engine.name}: no name leads to it any more; its engine ends")
                await self._end(engine)


def as_served(bundle: Bundle, say: Callable[[str], None]) -> Bundle:
    """The bundle, or, of an adapter that no engine takes while it runs, the model that its run merged it into."""
    why = engines.unservable(bundle)
    if bundle.manifest.kind != "adapter" or not why:
        return bundle
    for path in sorted(bundle.path.resolve().parent.glob(f"[!.]*/{MANIFEST}")):
        with suppress(BundleError):
            merged = open_bundle(path.parent)
            made_of = [each["fingerprint"] for each in merged.manifest.parents[-1:]]
            if merged.manifest.stage == "merge" and made_of == [bundle.manifest.fingerprint]:
                say(f"{bundle.path}: {why.split(';')[0]}, so it is served merged, as {merged.name}")
                return merged
    return bundle


def digest_of(bundle: Bundle) -> str:
    """Hex digest of what a bundle answers by: its files, and of an adapter its base's."""
    base = bundle.base().manifest.files if bundle.manifest.kind == "adapter" else None
    return hashlib.sha256(fingerprint(bundle.manifest.files, base, bundle.manifest.probe).encode()).hexdigest()


def model_id(model: Bundle) -> str:
    """What an engine calls a model; clients never see it."""
    return f"{default_name(model)}@{hashlib.sha256(fingerprint(model.manifest.files).encode()).hexdigest()[:8]}"


def default_name(bundle: Bundle) -> str:
    """The run's and the stage's name: `runs/demo/merge` is served as `demo-merge`."""
    return f"{bundle.path.resolve().parent.name}-{bundle.name}"


def _placed(version: Version) -> Placed:
    return Placed(version.id, version.name, str(version.bundle.path.resolve()), version.digest)

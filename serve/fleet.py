"""Names, and the versions that they lead to: `support` leads to `support@3f2a91c0`, and moving it is one assignment between two
requests.
"""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.engine import Care, Engine
from serve.errors import EngineError, ServeError
from serve.host import Host
from serve.memory import require_room
from serve.state import Placed, Pointer, State
from serve.version import Version, open_version
from tuner.errors import TunerError, nearest

SWEEP_S = 1.0
# Deployments that are remembered beside the latest.
MOST_ATTEMPTS = 49


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
        self.state, self.say, self._wanted_engine = state, say, engine
        self.names: dict[str, Pointer] = {}
        self.versions: dict[str, Version] = {}
        self.attempts: list[Attempt] = []
        self._host = Host(care, say, state.path.parent / ".adapters" if state.path else None)
        self._placing = asyncio.Lock()
        self._under_way: set[asyncio.Task[Version]] = set()
        self._draw = random.Random()

    @property
    def engines(self) -> list[Engine]:
        """Those that answer for them."""
        return self._host.engines

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
        opened = {name: self._version(name, path) for name, path in bundles.items()}
        for name, version in opened.items():
            if name in known and declared.get(name) == version.digest:
                pointer = self._reopened(name, known[name], placed, {version.id: version})
                if pointer.current != version.id:
                    self.say(f"{name}: leads to {pointer.current} since it was moved; it was started with {version.id}")
            else:
                pointer = Pointer(version.id)
            if version.id in pointer.wanted:
                self.versions[version.id] = version
            self.names[name] = pointer
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
            self._host.place(version)
        require_room(self.engines)
        # What is refused leaves no names behind.
        for name, version in opened.items():
            self.state.point(name, self.names[name], (version.placed,), declared=version.digest)
        self._host.share_cores()
        self._host.drop_adapters(self.versions)

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

    async def start(self) -> None:
        """Start every engine. Raises EngineError where none of the names can be answered."""
        async with self._placing:
            waiting = [asyncio.create_task(self._host.start(engine, self.versions)) for engine in self.engines]
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
            self._host.look()
            await self._sweep()
        raise EngineError("; ".join(str(engine.failure) for engine in self.engines))

    async def stop(self) -> None:
        """End the orders that are under way, and every engine."""
        self.give_up()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._host.stop()

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
                    await self._host.bring_up(version, self.versions)
                if shadow or weight < 100:
                    self.try_out(name, version, weight=weight, shadow=shadow)
                else:
                    self.point(name, version)
        except OSError as error:
            attempt.status, attempt.reason = "failed", f"{error.strerror or error}"
            raise ServeError(f"{str(path)[:200]}: {attempt.reason}") from None
        except BaseException as error:
            ended = isinstance(error, asyncio.CancelledError)
            attempt.status, attempt.reason = "failed", "the endpoint shuts down" if ended else str(error) or type(error).__name__
            self.say(f"{name}: {path} is not deployed: {attempt.reason}")
            raise
        attempt.status = "done"
        self.say(f"{name}: {version.id} {'is tried out' if shadow or weight < 100 else 'answers from now on'}")
        return version

    async def order(self, work: Coroutine[Any, Any, Version]) -> Version:
        """Do it in a task of its own, which whoever asked may leave, and which ends with the endpoint. Raises ServeError then."""
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise ServeError("the endpoint shuts down; where the name leads has not changed") from None
            raise

    def give_up(self) -> None:
        """End the orders that are under way; what they have brought up is ended, too."""
        for task in self._under_way:
            if not task.cancelling():  # a second time would cut short how it ends what it began
                task.cancel()

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

    def _version(self, name: str, path: Path, expected: str | None = None) -> Version:
        return open_version(name, path, self.say, engine=self._wanted_engine, expected=expected)

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
            raise ServeError(f"no version of {name} is tried out; `tuner deploy {name} DIR --weight 10` brings one in")
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
                await self._host.bring_up(version, self.versions)
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
        self.state.point(name, pointer, (version.placed,) if version else ())
        if version:
            self.versions[version.id] = version
        self.names[name] = pointer

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
                self.say(f"{engine.name}: no name leads to it any more; its engine ends")
                await self._host.end(engine)

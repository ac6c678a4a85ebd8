"""The engines of this machine: which of them answers for which version, and how one comes and goes."""

import asyncio
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from serve.engine import Care, Engine
from serve.errors import EngineError
from serve.memory import require_room
from serve.version import Version, model_id
from tuner.bundle import MANIFEST, Bundle
from tuner.errors import TunerError, disk_errors

# A copy of an adapter, or a part of one, by its name.
COPY = re.compile(r"[0-9a-f]{16}|\.[0-9a-f]{16}\.\d+\.part")
# Engines that start at the same time share the cores.
STARTS_AT_ONCE = 2


class Host:
    """All of them. `folder` is for copies of adapters; without one they are loaded from where they lie."""

    def __init__(self, care: Care, say: Callable[[str], None], folder: Path | None) -> None:
        self.care, self.say, self._folder = care, say, folder
        self.engines: list[Engine] = []
        self._watching: dict[Engine, asyncio.Task[None]] = {}
        self._starting = asyncio.Semaphore(STARTS_AT_ONCE)

    def share_cores(self) -> None:
        """Engines are seldom all busy, so together they may have twice the threads that there are cores."""
        cores, count = len(os.sched_getaffinity(0)), len(self.engines)
        for engine in [each for each in self.engines if count > 1 and not each.started]:
            engine.threads = min(cores, max(1, 2 * cores // count))
        if count > 2:
            self.say(f"{count} engines on {cores} cores: {self.engines[-1].threads} threads for each")

    def place(self, version: Version) -> bool:
        """Give a version an engine; says whether it is one that runs already."""
        adapter = version.bundle.manifest.kind == "adapter"
        model = version.bundle.base() if adapter else version.bundle
        for engine in self.engines:
            # The same weights from another run are the same engine.
            if engine.kind != version.kind or not engine.name.endswith(model_id(model).rpartition(":")[2]) or engine.failure:
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
        if self._folder is None:
            return version.bundle
        place = self._folder / version.digest[:16]
        if not (place / MANIFEST).is_file():
            part = place.with_name(f".{place.name}.{os.getpid()}.part")
            shutil.rmtree(part, ignore_errors=True)
            with disk_errors(place):
                shutil.copytree(version.bundle.path, part)
                shutil.rmtree(place, ignore_errors=True)
                part.rename(place)
        return Bundle(place, version.bundle.manifest)

    def drop_adapters(self, versions: dict[str, Version]) -> None:
        """Of the copies of adapters, those that no version is of any more. What else lies there is nobody's here."""
        kept = {version.digest[:16] for version in versions.values()}
        for place in self._folder.glob("*") if self._folder else ():
            if COPY.fullmatch(place.name) and place.name not in kept:
                shutil.rmtree(place, ignore_errors=True)

    async def bring_up(self, version: Version, versions: dict[str, Version]) -> None:
        """Give a version an engine, and have it proven there. Raises ServeError; nothing of it is left then."""
        before = list(self.engines)
        if version.bundle.manifest.kind == "adapter":
            await asyncio.to_thread(self._kept, version)
        runs = self.place(version)
        engine = version.engine
        assert engine is not None
        try:
            if runs and version.served not in engine.served:
                await engine.load(version.served, self._kept(version))
            elif runs:
                await engine.prove(version.served, version.bundle)
            elif not engine.started:
                require_room([engine])
                self.share_cores()
                await self.start(engine, versions)
            if why := version.why_not:
                raise EngineError(f"{version.id}: {why}")
        except BaseException:
            version.engine = None
            if engine not in before and engine in self.engines:
                await self.end(engine)
            raise

    async def start(self, engine: Engine, versions: dict[str, Version]) -> None:
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
        for version in versions.values():
            if version.engine is engine:
                version.failure = engine.failure or engine.refused.get(version.served)
                if not version.failure and version.served == engine.name and version.bundle.manifest != engine.model.manifest:
                    try:  # the same weights, and a probe of its own
                        await engine.prove(version.served, version.bundle)
                    except EngineError as error:
                        version.failure = str(error)
        if not engine.failure:
            self._watching[engine] = asyncio.create_task(engine.watch())

    async def end(self, engine: Engine) -> None:
        """Let it go. It is one of the engines until it has ended, so that it is waited for wherever this is cut short."""
        if task := self._watching.pop(engine, None):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await engine.stop()
        self.engines.remove(engine)

    def look(self) -> None:
        """Raises what a watcher of an engine ended with: a bug in there must not leave it unwatched."""
        for task in [each for each in self._watching.values() if each.done()]:
            task.result()

    async def stop(self) -> None:
        """End every engine."""
        for task in self._watching.values():
            task.cancel()
        await asyncio.gather(*self._watching.values(), return_exceptions=True)
        await asyncio.gather(*(engine.stop() for engine in self.engines))

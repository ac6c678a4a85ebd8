"""What happens at the same time: bundles are real, engines only pretend, so that each step can be held up where it hurts.

tests/e2e/test_deployments.py moves names with real engines.
"""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import serve.fleet
import serve.host
from serve.engine import Care
from serve.errors import EngineError, ServeError
from serve.fleet import Fleet
from serve.state import State
from serve.version import as_served
from tuner.bundle import Bundle, open_bundle
from tuner.errors import BundleError


class Pretended:
    """An engine that takes its time where it is told to."""

    slow: dict[str, asyncio.Event]
    failing: set[str]

    def __init__(self, kind: str, name: str, model: Bundle, adapters: dict[str, Bundle], care: Care, say: Any) -> None:
        self.kind, self.name, self.model, self.adapters = kind, name, model, adapters
        self.failure: str | None = None
        self.refused: dict[str, str] = {}
        self.started = self.ready = self.stopped = False
        self.threads, self.restarts = None, 0
        self.ending: asyncio.Event | None = None
        self.did: list[str] = []

    @property
    def served(self) -> dict[str, Bundle]:
        return {self.name: self.model, **self.adapters}

    async def _do(self, what: str) -> None:
        self.did.append(what)
        if what in self.slow:
            await self.slow[what].wait()
        if what in self.failing:
            raise EngineError(f"{what} went wrong")

    async def start(self) -> None:
        self.started = True
        await self._do("start")
        self.ready = True

    async def prove(self, name: str, bundle: Bundle) -> None:
        await self._do("prove")

    async def load(self, name: str, bundle: Bundle) -> None:
        await self._do("load")
        self.adapters[name] = bundle

    async def unload(self, name: str) -> None:
        await self._do("unload")
        self.adapters.pop(name)

    def takes(self, bundle: Bundle) -> bool:
        return self.ready and bool(self.adapters)

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        if self.ending:
            await self.ending.wait()
        self.ready, self.stopped = False, True


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr(serve.host, "Engine", Pretended)
    monkeypatch.setattr(serve.fleet, "SWEEP_S", 0.01)
    Pretended.slow, Pretended.failing = {}, set()
    state = State(tmp_path / "state" / "state.sqlite")
    yield Fleet(state, Care(), lambda text: None, engine="transformers")
    state.close()


def during(fleet: Fleet, work: Callable[[], Any]) -> None:
    """What is done while the fleet runs, and swept."""

    async def main() -> None:
        await fleet.start()
        watching = asyncio.create_task(fleet.watch())
        try:
            await work()
        finally:
            watching.cancel()
            await fleet.stop()

    asyncio.run(main())


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


def test_a_base_and_its_adapters_share_an_engine_and_each_deployment_of_an_adapter_joins_it(
    fleet: Fleet, bundles: dict[str, Path]
) -> None:
    fleet.declare({"live": bundles["a-tune"], "base": open_bundle(bundles["a-tune"]).base().path})
    assert len(fleet.engines) == 1

    async def work() -> None:
        new = await fleet.deploy("live", bundles["b-tune"])
        assert fleet.find("live") is new
        assert fleet.engines[0].did == ["start", "load"]  # type: ignore[attr-defined]
        # What engines load lies under its content, so that another run in the same folder changes nothing of it.
        assert fleet.engines[0].adapters[new.served].path.parent == fleet.state.path.parent / ".adapters"  # type: ignore[union-attr]

    during(fleet, work)


def test_a_rollback_while_a_version_is_let_go_leads_to_one_that_answers(fleet: Fleet, bundles: dict[str, Path]) -> None:
    fleet.declare({"live": bundles["a-tune"]})

    async def work() -> None:
        first, second = fleet.find("live"), await fleet.deploy("live", bundles["b-tune"])
        fleet.point("live", second)
        pointer = fleet.names["live"]
        pointer.previous, Pretended.slow["unload"] = [], asyncio.Event()
        await until(lambda: "unload" in fleet.engines[0].did)  # type: ignore[attr-defined]
        pointer.previous = [first.id]  # type: ignore[union-attr]
        rolling = asyncio.create_task(fleet.rollback("live"))
        await asyncio.sleep(0.05)
        assert not rolling.done()
        assert fleet.find("live") is second
        Pretended.slow["unload"].set()
        back = await rolling
        assert (back.id, back.ready, fleet.find("live")) == (first.id, True, back)  # type: ignore[union-attr]

    during(fleet, work)


def test_a_rollback_that_takes_its_time_does_not_undo_what_was_deployed_meanwhile(fleet: Fleet, bundles: dict[str, Path]) -> None:
    fleet.declare({"whole": bundles["a-merge"]})

    async def work() -> None:
        first = fleet.find("whole")
        second = await fleet.deploy("whole", bundles["b-merge"])
        first.engine.failure = "died"  # type: ignore[union-attr]
        Pretended.slow["start"] = asyncio.Event()
        held = fleet._placing
        await held.acquire()
        rolling = asyncio.create_task(fleet.rollback("whole"))
        await asyncio.sleep(0.05)
        fleet.point("whole", second)
        fleet.names["whole"].previous = []
        held.release()
        with pytest.raises(ServeError, match=f"moved meanwhile, to {second.id}; it stays there"):
            await rolling
        assert fleet.find("whole") is second

    during(fleet, work)


def test_two_deployments_at_once_come_one_after_the_other(fleet: Fleet, bundles: dict[str, Path]) -> None:
    fleet.declare({"whole": bundles["a-merge"]})

    async def work() -> None:
        done = await asyncio.gather(*(fleet.deploy(name, bundles["b-merge"]) for name in ("one", "two", "whole")))
        assert len(fleet.engines) == 2  # the same weights under three names are one engine
        assert {version.engine for version in done} == {fleet.engines[1]}
        assert fleet.engines[1].did == ["start", "prove", "prove"]  # type: ignore[attr-defined]
        for name in ("one", "two"):
            fleet.remove(name)
        await fleet.rollback("whole")
        await fleet.deploy("whole", bundles["a-merge"])
        fleet.names["whole"].previous = []
        await until(lambda: done[0].engine.stopped)  # type: ignore[union-attr]
        assert len(fleet.engines) == 1

    during(fleet, work)


def test_a_deployment_ends_with_the_endpoint(fleet: Fleet, bundles: dict[str, Path]) -> None:
    fleet.declare({"whole": bundles["a-merge"]})

    async def work() -> None:
        Pretended.slow["start"] = asyncio.Event()
        deploying = asyncio.create_task(fleet.order(fleet.deploy("whole", bundles["b-merge"])))
        await until(lambda: len(fleet.engines) == 2 and fleet.engines[1].started)
        first, new = fleet.engines
        new.ending = asyncio.Event()  # type: ignore[attr-defined]
        fleet.give_up()
        stopping = asyncio.create_task(fleet.stop())
        await asyncio.sleep(0.05)
        assert not stopping.done()
        assert not new.stopped, "an engine that takes its time to end is waited for"  # type: ignore[attr-defined]
        new.ending.set()  # type: ignore[attr-defined]
        await stopping
        with pytest.raises(ServeError, match="the endpoint shuts down"):
            await deploying
        assert (new.stopped, first.stopped) == (True, True)  # type: ignore[attr-defined]
        assert fleet.attempts[-1].reason == "the endpoint shuts down"

    during(fleet, work)


def test_a_deployment_that_fails_leaves_nothing_behind(fleet: Fleet, bundles: dict[str, Path], tmp_path: Path) -> None:
    fleet.declare({"whole": bundles["a-merge"]})

    async def work() -> None:
        Pretended.failing = {"start"}
        with pytest.raises(EngineError, match="start went wrong"):
            await fleet.deploy("whole", bundles["b-merge"])
        assert [engine.name for engine in fleet.engines] == [fleet.find("whole").served]  # type: ignore[union-attr]
        assert fleet.attempts[-1].status == "failed"
        other = tmp_path / "other"
        shutil.copytree(bundles["b-merge"], other)
        told = json.loads((other / "bundle.json").read_text())
        (other / "bundle.json").write_text(json.dumps({**told, "head": "embedding"}))
        with pytest.raises(ServeError, match="it would be asked what it does not answer"):
            await fleet.deploy("whole", other)

    during(fleet, work)


def test_adapters_that_no_name_can_go_back_to_are_not_kept(fleet: Fleet, bundles: dict[str, Path]) -> None:
    assert fleet.state.path is not None
    kept = fleet.state.path.parent / ".adapters"
    (kept / "somebodys").mkdir(parents=True)
    fleet.declare({"live": bundles["a-tune"]})

    async def work() -> None:
        await fleet.deploy("live", bundles["b-tune"])
        assert len(list(kept.iterdir())) == 3
        fleet.remove("live")
        await fleet.deploy("other", bundles["b-tune"])

    during(fleet, work)
    again = Fleet(fleet.state, Care(), lambda text: None, engine="transformers")
    again.declare({"other": bundles["b-tune"]})
    assert len(list(kept.iterdir())) == 2
    assert (kept / "somebodys").is_dir()


def test_an_adapter_that_no_engine_takes_while_it_runs_is_served_as_its_run_merged_it(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "a"
    shutil.copytree(bundles["a-tune"].parent, run, symlinks=True)
    told = json.loads((run / "tune" / "bundle.json").read_text())
    told["serving"] |= {"live_adapter": False, "not_live": "vLLM takes no adapters of this family; or so"}
    (run / "tune" / "bundle.json").write_text(json.dumps(told))
    said: list[str] = []
    assert as_served(open_bundle(run / "tune"), said.append).path.resolve() == (run / "merge").resolve()
    assert said == [f"{run / 'tune'}: vLLM takes no adapters of this family, so it is served merged, as merge"]
    shutil.rmtree((run / "merge").resolve())
    alone = open_bundle(run / "tune")
    assert as_served(alone, said.append) is alone
    state = State(None)
    with pytest.raises(ServeError, match=r"add `- merge: \{\}` to the recipe and serve that"):
        Fleet(state, Care(), said.append).declare({"live": run / "tune"})


def test_an_engine_is_given_up_only_once_it_fails_several_short_questions_in_a_row(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import serve.engine
    from serve.engine import FAILURES, Engine

    engine = Engine(
        "transformers", "m", open_bundle(bundles["a-merge"]), {}, Care(pulse_s=0.0, hung_after_s=0.2), lambda text: None
    )
    engine._ready, answers = True, []
    monkeypatch.setattr(engine, "_alive", lambda: True)

    async def say_something(*asked: object) -> None:
        answer = answers.pop(0)
        if isinstance(answer, float):
            await asyncio.sleep(answer)
        elif answer != "right":
            raise EngineError(str(answer))

    monkeypatch.setattr(serve.engine, "say_something", say_something)

    async def looked(*what: object) -> list[str | None]:
        answers[:] = what
        return [await engine._ailment() for _ in what]

    async def main() -> None:
        assert await looked("wrong", "right", *["wrong"] * (FAILURES - 1)) == [None] * (FAILURES + 1)
        assert await looked("wrong") == ["fails at the shortest question (wrong)"]
        assert await looked("right", 0.01) == [None, None]
        assert await looked(5.0) == ["says nothing any more"]
        # Clients have heard of it meanwhile.
        engine._failed, engine.heard = FAILURES, 1e18
        engine.care = Care(pulse_s=-1e19, hung_after_s=0.2)
        assert await looked("wrong", 5.0) == [None, None]

    asyncio.run(main())


def test_what_is_refused_leaves_no_names_behind(bundles: dict[str, Path], tmp_path: Path) -> None:
    state = State(tmp_path / "state.sqlite")
    with pytest.raises(BundleError, match="nothing"):
        Fleet(state, Care(), print).declare({"good": bundles["a-merge"], "bad": tmp_path / "nothing"})
    assert state.pointers() == {}
    Fleet(state, Care(), print).declare({"good": bundles["a-merge"]})
    assert list(state.pointers()) == ["good"]
    state.close()

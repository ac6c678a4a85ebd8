"""What a running endpoint meets: engines that die, hang or are asked by nobody any more, and its own end in the middle of it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.e2e.test_deployments import Endpoint, Load


@pytest.fixture
def running(bundles: dict[str, Path], tmp_path: Path) -> Iterator[Endpoint]:
    tree = {"models": {"live": str(bundles["a-merge"])}, "pulse_s": 0.5, "hung_after_s": 3.0, "drain_timeout_s": 20.0}
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump(tree))
    endpoint = Endpoint(tmp_path / "state", tmp_path / "deploy.yaml")
    yield endpoint
    if endpoint.process.poll() is None:
        endpoint.end()


def engine(endpoint: Endpoint) -> psutil.Process:
    return next(child for child in endpoint.children() if "serve.embedded" in child.cmdline())


def until_ready(endpoint: Endpoint, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while httpx.get(f"{endpoint.url}/ready").status_code != 200:
        assert time.monotonic() < end, endpoint.said
        time.sleep(0.1)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow, id="killed"), pytest.param(signal.SIGSTOP, id="hung")]
)
def test_an_engine_that_is_gone_or_hangs_is_replaced_and_proven_again(running: Endpoint, number: int) -> None:
    with Load(running, "live", threads=2) as load:
        time.sleep(0.5)
        answered = len(load.answers)
        os.kill(engine(running).pid, number)
        running.wait_for("starting it again")
        assert httpx.get(f"{running.url}/ready").status_code == 503
        running.wait_for("proven on", count=2)
        until_ready(running)
        before = len(load.answers)
        time.sleep(1.0)
    assert answered > 0
    assert len(load.answers) > before
    assert load.failures
    assert all("503" in failure for failure in load.failures), set(load.failures)
    assert ("says nothing any more" if number == signal.SIGSTOP else "the engine died") in running.said
    assert 'tuner_engine_restarts{engine="a-merge:' in httpx.get(f"{running.url}/metrics").text


@pytest.mark.slow
def test_requests_for_which_an_engine_has_no_memory_are_503_and_others_are_answered(running: Endpoint) -> None:
    right = running.ask("live").json()["choices"][0]["message"]["content"]
    engine(running).rlimit(psutil.RLIMIT_AS, (1, 1))  # from now on the kernel gives it nothing
    with Load(running, "live", threads=24) as load:
        time.sleep(3.0)
    assert load.failures
    assert all("503" in failure for failure in load.failures), set(load.failures)
    until_ready(running)  # with what it has given back, or started again
    reply = running.ask("live")
    assert reply.json()["choices"][0]["message"]["content"] == right
    assert {text for _, text in load.answers} <= {right}
    assert "Traceback" not in running.said


def test_a_client_that_has_left_is_noticed_at_once(running: Endpoint) -> None:
    """That the engine then stops generating is shown on its generator, tests/grid/test_embedded.py: it is over too soon to see here."""

    def runs() -> float:
        lines = httpx.get(f"{running.url}/metrics").text.splitlines()
        return next(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("tuner_engine_requests") and "running" in line
        )

    body = {
        "model": "live",
        "messages": [{"role": "user", "content": "list"}],
        "max_tokens": 180,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body) as reply:
        for _ in zip(range(3), reply.iter_raw(), strict=False):
            pass
    end = time.monotonic() + 1.0
    while runs() or '"status": 499' not in (running.state / "requests.jsonl").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_sigterm_lets_requests_finish_and_leaves_no_process(running: Endpoint) -> None:
    left = [*running.children()]
    told: list[Any] = []

    def ask() -> None:
        told.append(running.ask("live", max_tokens=150, ignore_eos=True))

    request = threading.Thread(target=ask)
    request.start()
    time.sleep(0.2)
    assert running.end(signal.SIGTERM) == 0, running.said
    request.join()
    assert told[0].json()["usage"]["completion_tokens"] == 150
    _, alive = psutil.wait_procs(left, timeout=5)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.slow
def test_an_endpoint_that_is_killed_under_load_comes_back_as_it_was(
    bundles: dict[str, Path], running: Endpoint, tmp_path: Path
) -> None:  # fmt: skip
    running.order("/admin/deployments", name="live", bundle=str(bundles["b-merge"]))
    engines = running.children()
    with Load(running, "live") as load:
        time.sleep(0.5)
        running.end(signal.SIGKILL)
    _, alive = psutil.wait_procs(engines, timeout=20)
    assert alive == []
    second = Endpoint(tmp_path / "state", tmp_path / "deploy.yaml")
    try:
        version, text = load.answers[-1]
        reply = second.ask("live")
        assert (reply.headers["x-tuner-version"], reply.json()["choices"][0]["message"]["content"]) == (version, text)
        assert second.order("/admin/rollback", name="live")["version"] != version
    finally:
        second.end()

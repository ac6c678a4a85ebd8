"""The whole way with the real model, real data and the real vLLM, in few steps; then what happens when the engine dies."""

import contextlib
import hashlib
import json
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import command, tuner

ROOT = Path(__file__).parents[2]
QUICK = [
    "stages.0.tune.steps=6", "stages.0.tune.learning_rate=0.001", "stages.0.tune.gate.heldout_loss_drop=0.0", "evaluate.rows=4",
    "evaluate.max_new_tokens=12", "data.heldout_rows=8", "data.train_rows=64", "probe.rows=3", "probe.answer_tokens=8",
    "stages.2.quantize.gate.heldout_loss_rise=0.5",
]  # fmt: skip
QUESTION = {"role": "user", "content": "List all virtual machines."}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, tuned for six steps."""
    assert (ROOT / "recipes/data/azure-cli/heldout.jsonl").is_file(), "`make data` was not run"
    folder = tmp_path_factory.mktemp("runs") / "quick"
    done = tuner(
        "run", ROOT / "recipes/demo.yaml", "--out", folder, *(part for each in QUICK for part in ("--set", each)), timeout=900
    )
    assert done.returncode == 0, done.stderr
    return folder


class Server:
    """`tuner serve` as a process, and what it says."""

    def __init__(self, *arguments: Any, state: Path | None = None) -> None:
        self.state = state or Path(tempfile.mkdtemp(prefix="tuner-state-"))
        line = command("serve", *arguments, "--state", self.state)
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.said = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:  # type: ignore[union-attr]
            self.said += line

    def wait_for(self, pattern: str, count: int = 1, timeout_s: float = 300) -> str:
        end = time.monotonic() + timeout_s
        while len(found := re.findall(pattern, self.said)) < count:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.1)
        return str(found[-1])

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=90)
        self._reader.join()
        return code


@pytest.fixture(scope="module")
def server(out: Path) -> Iterator[Server]:
    running = Server(out / "quantize", out / "tune", "--port", "0", "--max-tokens", "256")
    yield running
    if running.process.poll() is None:
        running.end()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    from openai import OpenAI

    url = server.wait_for(r"serving .* at (http://\S+)")
    return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def manifest(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / name / "bundle.json").read_text())


def test_each_hand_over_keeps_what_was_trained(out: Path) -> None:
    base, tuned, merged, quantized = (manifest(out, name)["metrics"] for name in ("base", "tune", "merge", "quantize"))
    assert tuned["heldout_loss"] < base["heldout_loss"] - 0.3
    assert tuned["probe"]["difference_from_base"] > 0.3
    assert merged["probe"]["max_difference"] < 1e-3
    assert merged["heldout_loss"] == pytest.approx(tuned["heldout_loss"], abs=1e-4)
    assert quantized["heldout_loss"] == pytest.approx(tuned["heldout_loss"], abs=0.3)
    assert quantized["heldout_loss"] != tuned["heldout_loss"]


def test_a_bundle_opens_in_plain_transformers_and_peft(out: Path) -> None:
    from peft import PeftConfig
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(out / "merge").model_type == "llama"
    assert AutoTokenizer.from_pretrained(out / "quantize").eos_token == "<|im_end|>"
    assert PeftConfig.from_pretrained(out / "tune").r == 32


def test_the_endpoint_is_ready_only_once_every_bundle_has_answered_its_probe(server: Server, client: Any) -> None:
    assert len(re.findall(r"proven on 3 questions", server.said)) == 3, server.said  # quantized, base, adapter on its base
    assert {model.id for model in client.models.list()} == {"quick-quantize", "quick-base", "quick-tune"}


def test_the_official_client_gets_answers_plain_and_streamed(client: Any) -> None:
    common: dict[str, Any] = {"model": "quick-quantize", "messages": [QUESTION], "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**common).choices[0].message.content
    pieces = [
        event.choices[0].delta.content or "" for event in client.chat.completions.create(stream=True, **common) if event.choices
    ]
    assert whole
    assert "".join(pieces) == whole
    assert len(pieces) > 2
    assert client.completions.create(model="quick-tune", prompt="az vm", max_tokens=4, temperature=0).choices[0].text


def test_adapter_and_base_answer_differently(client: Any, out: Path) -> None:
    item = manifest(out, "tune")["probe"][0]

    def logprob(model: str) -> float:
        reply = client.completions.create(model=model, prompt=item["ids"], max_tokens=1, temperature=0, logprobs=1)
        return float(reply.choices[0].logprobs.token_logprobs[0])

    assert abs(logprob("quick-tune") - item["logprobs"][0]) < 0.01
    assert abs(logprob("quick-base") - item["logprobs"][0]) > 0.05


def test_unknown_models_and_paths_are_404_and_the_engine_is_not_reachable_from_outside(client: Any, server: Server) -> None:
    from openai import NotFoundError

    with pytest.raises(NotFoundError, match="there is no model 'gpt-4' here; there is: quick-quantize"):
        client.chat.completions.create(model="gpt-4", messages=[QUESTION])
    root = str(client.base_url).removesuffix("/v1/")
    for path in ("/pooling", "/v1/load_lora_adapter", "/invocations"):
        assert httpx.post(root + path, json={}).status_code == 404
    listening = {
        connection.laddr.ip
        for child in server.children()
        for connection in child.net_connections()
        if connection.status == "LISTEN"
    }
    assert listening <= {"127.0.0.1"}  # of vLLM's processes among themselves; requests come through a file
    sockets = {Path(line[line.index("--uds") + 1]) for child in server.children() if "--uds" in (line := child.cmdline())}
    assert len(sockets) == 2
    assert all(each.is_socket() and each.parent.stat().st_mode & 0o777 == 0o700 for each in sockets)


# The same of the other engine, which starts in seconds, is a fast test in test_endpoint_faults.py.
@pytest.mark.slow
def test_an_engine_killed_while_serving_is_503_at_once_and_comes_back_proven(client: Any, server: Server) -> None:
    from openai import APIStatusError

    proven = len(re.findall("proven on", server.said))
    engine = next(
        child
        for child in psutil.Process(server.process.pid).children()
        if any(part.startswith("quick-quantize:") for part in child.cmdline())
    )
    core = next(
        child
        for child in engine.children(recursive=True)
        if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline())
    )
    core.kill()
    killed = time.monotonic()
    while True:
        try:
            client.chat.completions.create(model="quick-quantize", messages=[QUESTION], max_tokens=1, timeout=5)
            assert time.monotonic() - killed < 2
        except APIStatusError as error:
            failed: Any = error
            break
    assert time.monotonic() - killed < 2
    assert (failed.status_code, failed.body["type"]) == (503, "service_unavailable")
    # The other engine goes on serving.
    assert client.completions.create(model="quick-tune", prompt="az", max_tokens=1).choices
    server.wait_for("proven on", count=proven + 1)
    server.wait_for(r"quick-quantize:\w+: ready", count=2)
    assert client.chat.completions.create(model="quick-quantize", messages=[QUESTION], max_tokens=1).choices


@pytest.mark.slow
def test_ctrl_c_lets_requests_finish_and_leaves_no_process_behind(client: Any, server: Server) -> None:
    children = server.children()
    assert len(children) >= 4
    answers: list[Any] = []

    def ask() -> None:
        reply = client.chat.completions.create(
            model="quick-quantize", messages=[QUESTION], max_tokens=100, temperature=0, extra_body={"ignore_eos": True}
        )
        answers.append(reply.usage.completion_tokens)

    request = threading.Thread(target=ask)
    request.start()
    time.sleep(0.5)
    assert server.end(signal.SIGINT) == 0, server.said
    request.join()
    assert answers == [100]
    _, alive = psutil.wait_procs(children, timeout=5)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.slow
def test_an_engine_that_answers_as_another_model_never_gets_ready(out: Path, tmp_path: Path) -> None:
    """What a server with the wrong weights looks like: healthy, and another model's probe does not fit it."""
    wrong = tmp_path / "wrong"
    shutil.copytree(out / "merge", wrong)
    values = manifest(out, "merge")
    values["probe"] = manifest(out, "base")["probe"]
    (wrong / "bundle.json").write_text(json.dumps(values))
    done = tuner("serve", wrong, "--port", "0", "--state", tmp_path / "state", timeout=300)
    assert done.returncode == 2, done.stderr
    assert "does not answer as" in done.stderr
    assert "serving" not in done.stderr


@pytest.mark.slow
def test_while_an_engine_starts_its_model_is_503_at_once(out: Path) -> None:
    from tests.conftest import free_port

    port = str(free_port())
    server = Server(out / "merge", "--port", port)
    try:
        server.wait_for(r"the engine \(vllm\) starts")
        asked = {"model": "quick-merge", "prompt": "az vm", "max_tokens": 2}
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=5)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        server.wait_for("serving")
        assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=60).status_code == 200
    finally:
        server.end()


@pytest.mark.slow
def test_an_engine_that_renders_a_conversation_otherwise_never_gets_ready(out: Path, tmp_path: Path) -> None:
    """The real engine, whose chat template is another one than that of training: the weights are right, and the answers are not."""
    wrong = tmp_path / "wrong"
    shutil.copytree(out / "merge", wrong)
    template = wrong / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant", "<|im_start|>Assistant"))
    values = manifest(out, "merge")
    values["files"]["chat_template.jinja"] = {
        "size_bytes": template.stat().st_size,
        "sha256": hashlib.sha256(template.read_bytes()).hexdigest(),
    }
    (wrong / "bundle.json").write_text(json.dumps(values))
    done = tuner("serve", wrong, "--port", "0", "--state", tmp_path / "state", timeout=300)
    assert done.returncode == 2, done.stderr
    assert "the engine renders a conversation to other tokens than training did: from token" in done.stderr
    assert "serving" not in done.stderr


@pytest.mark.slow
def test_an_engine_that_dies_at_start_is_one_sentence_with_its_own_words(out: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(out / "merge", broken)
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"intermediate_size": 1536', '"intermediate_size": 1537'))
    done = tuner("serve", broken, "--port", "0", "--name", "broken", "--engine", "transformers", "--state", tmp_path / "state")
    assert done.returncode == 2
    assert "config.json: its sha256 is not the one in bundle.json; the file was changed after it was made" in done.stderr
    sealed = json.loads((broken / "bundle.json").read_text())
    sealed["files"]["config.json"]["sha256"] = hashlib.sha256((broken / "config.json").read_bytes()).hexdigest()
    (broken / "bundle.json").write_text(json.dumps(sealed))
    done = tuner("serve", broken, "--port", "0", "--name", "broken", "--engine", "transformers", "--state", tmp_path / "state")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"tuner: \S+-broken:\w{8}: the engine ended while it was starting: ", last)
    assert "Error: " in last
    assert len(done.stderr) < 3000


def test_a_taken_port_is_said_before_an_engine_starts(out: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = tuner("serve", out / "merge", "--port", port, "--state", tmp_path)
    assert done.returncode == 2
    assert f"port {port} on 127.0.0.1 is taken" in done.stderr
    assert "engine starts" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 12], ids=["at once", "while its own processes start"])
def test_an_engine_does_not_outlive_an_endpoint_that_is_killed(out: Path, seconds: int) -> None:
    server = Server(out / "merge", "--port", "0")
    server.wait_for(r"the engine \(vllm\) starts")
    time.sleep(seconds)
    engines = server.children()
    assert engines
    server.end(signal.SIGKILL)
    _, alive = psutil.wait_procs(engines, timeout=30)
    assert alive == []


def test_an_engine_that_does_not_stay_up_is_given_up_and_said(out: Path, tmp_path: Path) -> None:
    """The real supervisor; the engine is a command that dies at once, where a real one would take 3 x 20 s to do so."""
    import asyncio

    from serve.engine import Care, Engine
    from serve.engines import Launch, vllm
    from tuner.bundle import open_bundle

    said: list[str] = []
    engine = Engine("vllm", "m", open_bundle(out / "merge"), {}, Care(max_failed_starts=2), said.append)
    dying = Launch(["sh", "-c", "echo 'ValueError: no such luck' >&2; exit 3"], {}, "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "launch", lambda *arguments, **options: dying)
        asyncio.run(engine.watch())
    assert engine.failure == said[-1]
    assert "gave up after it could not be started 2 times" in said[-1]
    assert "ValueError: no such luck" in said[-1]


def test_nothing_of_vllm_runs_after_all_this(out: Path, server: Server) -> None:
    """Of all processes, not of our children: an engine whose endpoint is dead belongs to init."""
    if server.process.poll() is None:
        server.wait_for("serving .* at")
        server.end()
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if "vllm" in line and str(out.parent) in line:
                left.append(line)
    assert left == []

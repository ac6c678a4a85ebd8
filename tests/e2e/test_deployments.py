"""Names that move while they are asked: the real endpoint, real engines (of transformers, since they start in seconds), small models."""

import datetime
import ipaddress
import json
import re
import shutil
import signal
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import tuner
from tests.e2e.test_serving import Server

RECIPES = Path(__file__).parents[2] / "recipes"
QUESTION = {"messages": [{"role": "user", "content": "list the virtual 3"}], "max_tokens": 6, "temperature": 0}


class Endpoint(Server):
    """`tuner serve` with its state in a folder that outlives it."""

    def __init__(self, state: Path, *arguments: Any, trusted: Any = True) -> None:
        super().__init__(*arguments, "--port", "0", state=state)
        self.url = self.wait_for(r"serving .* at (https?://\S+)").removesuffix("/v1")
        self._trusted = trusted

    def tuner(self, *arguments: Any) -> Any:
        return tuner(*arguments, "--state", self.state, timeout=120)

    def order(self, path: str, **body: Any) -> Any:
        """What `tuner deploy` and the like send, without the second that a command takes to start."""
        secret = json.loads((self.state / "operator.json").read_text())["secret"]
        headers = {"authorization": f"Bearer {secret}"}
        reply = (
            httpx.post(self.url + path, json=body, headers=headers, timeout=60, verify=self._trusted)
            if body
            else httpx.get(self.url + path, headers=headers, verify=self._trusted)
        )
        return reply.raise_for_status().json()

    def ask(self, name: str, client: httpx.Client | None = None, **more: Any) -> httpx.Response:
        client = client or httpx.Client(verify=self._trusted)
        return client.post(f"{self.url}/v1/chat/completions", json={"model": name, **QUESTION, **more}, timeout=30)


def test_prove_asks_the_endpoint_what_was_held_out(bundles: dict[str, Path]) -> None:
    recipe = bundles["a-merge"].parent.parent / "a.yaml"
    done = tuner("prove", recipe, "--out", bundles["a-merge"].parent)
    assert done.returncode == 0, done.stderr
    served = json.loads((bundles["a-merge"].parent / "served.json").read_text())
    merged = json.loads((bundles["a-merge"] / "bundle.json").read_text())["metrics"]
    told = served.get("metrics", served)
    assert told["heldout_loss"] == pytest.approx(merged["heldout_loss"], abs=1e-3)
    assert "served" in done.stdout


@pytest.fixture(scope="module")
def running(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("deployment")
    (folder / "deploy.yaml").write_text(
        yaml.safe_dump({"models": {"live": str(bundles["a-tune"]), "whole": str(bundles["a-merge"])}})
    )
    endpoint = Endpoint(folder / "state", folder / "deploy.yaml")
    yield endpoint
    if endpoint.process.poll() is None:
        endpoint.end()


class Load:
    """Threads that ask all the time; each answer is kept with the version that gave it."""

    def __init__(self, endpoint: Endpoint, name: str, threads: int = 4) -> None:
        self.answers: list[tuple[str, str]] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(endpoint, name)) for _ in range(threads)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, endpoint: Endpoint, name: str) -> None:
        with httpx.Client() as client:
            while not self._stop.is_set():
                try:
                    reply = endpoint.ask(name, client)
                    reply.raise_for_status()
                    told = reply.json()
                    assert told["model"] == reply.headers["x-tuner-version"]
                    self.answers.append((told["model"], told["choices"][0]["message"]["content"]))
                except (httpx.HTTPError, AssertionError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")


def versions(endpoint: Endpoint, name: str) -> dict[str, Any]:
    return next(each for each in endpoint.order("/admin/deployments")["names"] if each["name"] == name)


def test_what_the_preferred_engine_cannot_serve_is_served_by_the_other_and_said(running: Endpoint) -> None:
    assert "served by transformers; vllm: vLLM's attention on a CPU knows no heads of size 16" in running.said
    assert len(re.findall("proven on 3 questions", running.said)) == 3  # the merged one, the adapter, and its base
    assert {each["id"] for each in httpx.get(f"{running.url}/v1/models").json()["data"]} == {"live", "whole"}


@pytest.mark.parametrize(("name", "kind"), [("live", "tune"), pytest.param("whole", "merge", marks=pytest.mark.slow)])
def test_a_name_moves_under_load_and_no_request_fails_or_is_answered_by_the_wrong_version(
    running: Endpoint, bundles: dict[str, Path], name: str, kind: str
) -> None:
    first = versions(running, name)["current"]
    with Load(running, name) as load:
        time.sleep(0.5)
        done = running.tuner("deploy", name, bundles[f"b-{kind}"])
        assert done.returncode == 0, done.stderr
        second = versions(running, name)["current"]
        for _ in range(2):
            time.sleep(1.0)
            assert running.order("/admin/rollback", name=name)["version"] == first
            time.sleep(1.0)
            assert running.order("/admin/deployments", name=name, bundle=str(bundles[f"b-{kind}"]))["version"] == second
        time.sleep(0.5)
    assert load.failures == []
    told = {version: {text for by, text in load.answers if by == version} for version in (first, second)}
    assert {by for by, _ in load.answers} == {first, second}
    assert len(told[first]) == len(told[second]) == 1
    assert told[first] != told[second]
    assert load.answers[-1][0] == second
    running.order("/admin/rollback", name=name)


def test_a_version_is_tried_out_by_a_share_of_the_requests_and_in_the_shadow(running: Endpoint, bundles: dict[str, Path]) -> None:
    done = running.tuner("deploy", "live", bundles["b-tune"], "--weight", "40")
    assert "is tried out" in done.stdout, done.stderr
    by = [running.ask("live").headers["x-tuner-version"] for _ in range(60)]
    pointer = versions(running, "live")
    assert 8 <= by.count(pointer["canary"]) <= 40
    assert by.count(pointer["current"]) == 60 - by.count(pointer["canary"])
    running.order("/admin/promote", name="live", weight=0)
    assert {running.ask("live").headers["x-tuner-version"] for _ in range(5)} == {pointer["current"]}
    running.order("/admin/rollback", name="live")
    assert versions(running, "live")["canary"] is None
    # In the shadow it is asked and compared, and nobody hears of it.
    running.order("/admin/deployments", name="live", bundle=str(bundles["b-tune"]), shadow=True)
    assert {running.ask("live").headers["x-tuner-version"] for _ in range(5)} == {pointer["current"]}
    end = time.monotonic() + 10
    while time.monotonic() < end:
        metrics = httpx.get(f"{running.url}/metrics").text
        if found := re.search(r'tuner_shadow_answers_total\{name="live",result="different",version="live@\w+"\} (\d)', metrics):
            break
        time.sleep(0.1)
    assert found
    assert int(found[1]) >= 1
    assert "answers 100% of the requests" in running.tuner("promote", "live").stdout
    assert versions(running, "live")["current"] == pointer["canary"]
    assert f"live: {pointer['current']} answers" in running.tuner("rollback", "live").stdout


def test_what_is_not_right_is_never_asked_and_the_reason_is_told(
    running: Endpoint, bundles: dict[str, Path], tmp_path: Path
) -> None:
    before = versions(running, "whole")
    wrong = tmp_path / "wrong"
    shutil.copytree(bundles["b-merge"], wrong)
    weights = wrong / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    done = running.tuner("deploy", "whole", wrong)
    assert (done.returncode, "its sha256 is not the one in bundle.json" in done.stderr) == (2, True), done.stderr
    # Right hashes, and another model's probe: it comes up, is asked, and does not answer as it was trained to.
    shutil.rmtree(wrong)
    shutil.copytree(bundles["b-merge"], wrong)
    told = json.loads((wrong / "bundle.json").read_text())
    told["probe"] = json.loads((bundles["a-merge"] / "bundle.json").read_text())["probe"]
    (wrong / "bundle.json").write_text(json.dumps(told))
    with Load(running, "whole") as load:
        done = running.tuner("deploy", "whole", wrong)
    assert (done.returncode, "does not answer as" in done.stderr) == (2, True)
    assert load.failures == []
    assert {by for by, _ in load.answers} == {before["current"]}
    assert versions(running, "whole")["current"] == before["current"]
    shown = running.tuner("deployments")
    assert "does not answer as" in shown.stderr
    for arguments, said in (
        (("deploy", "../x", bundles["b-tune"]), "cannot be a name"),
        (("rollback", "nobody"), "there is no name 'nobody' here"),
        (("deploy", "live", tmp_path / "none"), "is not there"),
    ):
        done = running.tuner(*arguments)
        assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def test_a_server_can_be_verified_from_outside(running: Endpoint, bundles: dict[str, Path]) -> None:
    import asyncio

    from serve.errors import EngineError
    from serve.verify import _generated
    from tuner.bundle import open_bundle

    def verified(folder: Path, *arguments: str) -> Any:
        return tuner("verify", folder, f"{running.url}/v1", "--dtype", "float32", *arguments)

    right = verified(bundles["a-merge"], "--model", "whole")
    assert right.returncode == 0, right.stderr
    assert re.search(r"whole at http\S+ serves \S+: 100\.0% of 18 answers the same", right.stdout)
    wrong = verified(bundles["b-merge"], "--model", "whole")
    assert (wrong.returncode, "does not answer as" in wrong.stderr, wrong.stdout) == (1, True, "")
    unnamed = verified(bundles["a-merge"])
    assert (unnamed.returncode, "serves live, whole; name the one to ask with --model" in unnamed.stderr) == (2, True)
    nobody = tuner("verify", bundles["a-merge"], "http://127.0.0.1:9/v1")
    assert (nobody.returncode, "no such server answers there" in nobody.stderr) == (2, True)

    # A server that only generates is compared by what it generates.
    async def generated(name: str) -> Any:
        async with httpx.AsyncClient(base_url=running.url) as client:
            return await _generated(client, "whole", open_bundle(bundles[name]), "float32")

    proof = asyncio.run(generated("a-merge"))
    assert proof.answers > 3
    assert proof.mean_difference < 1e-3
    with pytest.raises(EngineError, match="does not answer as"):
        asyncio.run(generated("b-merge"))


def test_the_operators_routes_want_the_operators_key(running: Endpoint) -> None:
    for headers in ({}, {"authorization": "Bearer x"}):
        for method, path in (("GET", "/admin/deployments"), ("POST", "/admin/rollback")):
            assert httpx.request(method, running.url + path, headers=headers).status_code == 401
    assert (running.state / "operator.json").stat().st_mode & 0o777 == 0o600


def certificate(folder: Path) -> ssl.SSLContext:
    """Writes cert.pem, for loopback, and key.pem; what trusts it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tuner")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(1))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return ssl.create_default_context(cafile=str(folder / "cert.pem"))


@pytest.mark.slow
def test_where_names_lead_survives_a_crash_and_tls_is_from_files(bundles: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump({"models": {"live": str(bundles["a-tune"])}}))
    first = Endpoint(tmp_path / "state", tmp_path / "deploy.yaml")
    old = versions(first, "live")["current"]
    first.order("/admin/deployments", name="live", bundle=str(bundles["b-tune"]))
    new = versions(first, "live")["current"]
    first.end(signal.SIGKILL)
    trusted = certificate(tmp_path)
    tls = {"certificate": "cert.pem", "key": "key.pem"}
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump({"models": {"live": str(bundles["a-tune"])}, "tls": tls}))
    second = Endpoint(tmp_path / "state", tmp_path / "deploy.yaml", trusted=trusted)
    try:
        assert second.url.startswith("https://")
        for address in (second.url, second.url.replace("https", "http")):  # by one who trusts nobody, and in the open
            with pytest.raises(httpx.HTTPError):
                httpx.get(f"{address}/health")
        assert second.ask("live").headers["x-tuner-version"] == new != old
        assert f"leads to {new} since it was moved; it was started with {old}" in second.said
        other = tuner("serve", tmp_path / "deploy.yaml", "--state", tmp_path / "state", "--port", "0")
        assert (other.returncode, "another endpoint keeps its state there" in other.stderr) == (2, True)
        assert f"live: {old} answers" in second.tuner("rollback", "live").stdout
        assert second.ask("live").headers["x-tuner-version"] == old
    finally:
        assert second.end() == 0
    assert "Traceback" not in second.said


# Each recipe of recipes/deploy.yaml in few steps: what is shown is that all six are served beside each other, not how good they are.
FEW: dict[str, list[str]] = {
    "demo": [
        "stages.0.tune.steps=6", "stages.0.tune.gate.heldout_loss_drop=0.0", "evaluate.rows=4", "data.heldout_rows=8",
        "data.train_rows=64", "stages.2.quantize.gate.heldout_loss_rise=0.5",
    ],
    "smollm2-sources": [
        "stages.0.tune.steps=4", "stages.0.tune.gate.heldout_loss_drop=-9.0", "evaluate.rows=4",
        "data.heldout_rows=8", "data.train_rows=200",
    ],
    "minilm-classify": [
        "stages.0.tune.steps=4", "stages.0.tune.epochs=null", "stages.0.tune.gate.heldout_loss_drop=-9.0",
        "data.train_rows=64", "data.heldout_rows=16",
    ],
    "minilm-embed": [
        "stages.0.tune.steps=4", "stages.0.tune.epochs=null", "stages.0.tune.gate.heldout_loss_drop=-9.0",
        "data.train_rows=256", "data.heldout_rows=32",
    ],
    "mamba2-pretrain": ["stages.2.tune.steps=2", "stages.2.tune.gate.heldout_loss_drop=-9.0", "data.heldout_rows=8"],
    "mamba2-sft": [
        "stages.0.tune.steps=4", "stages.0.tune.epochs=null", "stages.0.tune.gate.heldout_loss_drop=-9.0",
        "data.train_rows=64", "data.heldout_rows=8",
    ],
}  # fmt: skip


@pytest.mark.slow
def test_the_deployment_that_is_shipped_serves_a_gpt_two_adapters_labels_vectors_and_a_mamba(tmp_path: Path) -> None:
    from openai import OpenAI

    for name, changes in FEW.items():
        more = [f"model={tmp_path}/runs/mamba2-pretrain/tune"] if name == "mamba2-sft" else []
        sets = [part for change in [*changes, *more] for part in ("--set", change)]
        done = tuner("run", RECIPES / f"{name}.yaml", "--out", tmp_path / "runs" / name, *sets, timeout=900)
        assert done.returncode == 0, done.stderr
    (tmp_path / "recipes").mkdir()
    shutil.copy(RECIPES / "deploy.yaml", tmp_path / "recipes")
    running = Endpoint(tmp_path / "state", tmp_path / "recipes" / "deploy.yaml")
    try:
        client = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        assert (
            len(
                [
                    child
                    for child in running.children()
                    if "api_server" in " ".join(child.cmdline()) and child.ppid() == running.process.pid
                ]
            )
            == 4
        )
        messages: Any = [{"role": "user", "content": "List all virtual machines."}]
        said = {
            name: client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=16)
            .choices[0]
            .message.content
            for name in ("smollm", "azure", "dictionary")
        }
        assert len(set(said.values())) == 3
        # Another adapter joins the engine of vLLM while it runs, and is proven there; from then on it answers for the name.
        before = running.said.count("the engine (vllm) starts")
        running.order("/admin/deployments", name="azure", bundle=str(tmp_path / "runs" / "smollm2-sources" / "tune"))
        assert running.said.count("the engine (vllm) starts") == before
        again = client.chat.completions.create(model="azure", messages=messages, temperature=0, max_tokens=16)
        assert again.choices[0].message.content == said["dictionary"]
        running.order("/admin/rollback", name="azure")
        again = client.chat.completions.create(model="azure", messages=messages, temperature=0, max_tokens=16)
        assert again.choices[0].message.content == said["azure"]
        assert client.completions.create(model="mamba", prompt="house", max_tokens=4).choices[0].text
        assert len(client.embeddings.create(model="definitions", input="a place to live").data[0].embedding) == 384
        label = httpx.post(f"{running.url}/v1/classify", json={"model": "reviews", "input": "a good film"}, timeout=60).json()
        assert label["data"][0]["label"] in ("negative", "positive")
    finally:
        assert running.end() == 0

"""The CPU images and Compose's file, as README has them: Docker builds on a bare Debian, and runs.

`make images` installs what it takes (Docker, its Compose, debootstrap). Where no engine runs, root starts one that is gone afterwards.
"""

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import chat_rows, free_port, tuner, write_rows
from tests.e2e.test_serving import QUESTION, QUICK

ROOT = Path(__file__).parents[2]


def docker(*arguments: Any, timeout: float = 1800, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["docker", *map(str, arguments)], capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


def missing() -> str:
    """What stands against this file's tests on this machine, or nothing."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        if not shutil.which("docker") or docker("compose", "version", check=False, timeout=10).returncode:
            return "no Docker with Compose 2, which `make images` installs"
        if os.geteuid() != 0 or not shutil.which("debootstrap"):
            return "a bare Debian is made by root with debootstrap, which `make images` installs"
        if not shutil.which("dockerd") and docker("info", check=False, timeout=10).returncode:
            return "no Docker engine runs, and there is no dockerd to start"
        return ""
    return "Docker does not answer"


pytestmark = pytest.mark.slow
USER = 1000
# An image that serves has at most this much in it, unpacked.
SERVE_BYTES = 2_500_000_000
# Panels that have nothing to show where no request failed and none is mirrored.
EMPTY = {"Errors", "Shadows"}
BASE, PROMETHEUS = "tuner-test/debian", "tuner-test/prometheus"


class Packages(http.server.SimpleHTTPRequestHandler):
    """Folders of packages on this machine, and nothing else of it, for a build's pip."""

    folders: tuple[str, ...] = ()

    def translate_path(self, path: str) -> str:
        place = super().translate_path(path)
        return place if any(Path(place).is_relative_to(each) for each in self.folders) else "/nowhere"

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The one that runs, or one of our own with all its files in a folder of ours."""
    if why := missing():
        pytest.skip(why)
    if docker("info", check=False).returncode == 0:
        yield
        return
    folder = tmp_path_factory.mktemp("engine")
    places = [f"--{name}={folder / name}" for name in ("data-root", "exec-root", "pidfile")]
    address = f"unix://{folder}/docker.sock"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["dockerd", *places, f"--host={address}"], stdout=log, stderr=subprocess.STDOUT)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DOCKER_HOST", address)
            end = time.monotonic() + 60
            while docker("info", check=False).returncode:
                assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-3000:]
                time.sleep(0.5)
            yield
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def base(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Debian without anything, that is told what apt and pip are told on this machine: mirrors, certificates, folders with packages."""
    folder = tmp_path_factory.mktemp("debian")
    line = ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:]
    for left in [*folder.glob("var/cache/apt/archives/*.deb"), *folder.glob("var/lib/apt/lists/*_*")]:
        left.unlink()
    shutil.copytree("/etc/apt/apt.conf.d", folder / "etc/apt/apt.conf.d", dirs_exist_ok=True)
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", folder / "etc/ssl/certs/ca-certificates.crt")
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = dict(re.findall(r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$", told, re.MULTILINE))
    host = docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}").stdout.strip()
    found = {name: found[name] for name in ("index-url", "extra-index-url", "find-links", "trusted-host") if name in found}
    places = [each.removeprefix("file://") for value in found.values() for each in value.split()]
    Packages.folders = tuple(each.removesuffix("/simple") for each in places if each.startswith("/") and Path(each).is_dir())
    with http.server.ThreadingHTTPServer((host, 0), partial(Packages, directory="/")) as packages:
        threading.Thread(target=packages.serve_forever, daemon=True).start()
        settings = "[global]\n"
        for name in ("index-url", "extra-index-url", "find-links", "trusted-host"):
            values = [each.removeprefix("file://") for each in found.get(name, "").split()]
            values = [f"http://{host}:{packages.server_port}{each}/" if each.startswith("/") else each for each in values]
            values += [host] if name == "trusted-host" else []
            settings += f"{name} = {' '.join(values)}\n" if values else ""
        (folder / "etc/pip.conf").write_text(settings)
        with subprocess.Popen(["tar", "-C", str(folder), "-c", "."], stdout=subprocess.PIPE) as packed:
            subprocess.run(["docker", "import", "-", BASE], stdin=packed.stdout, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder)
        yield BASE
        packages.shutdown()
    docker("image", "rm", "--force", BASE, PROMETHEUS, "tuner-test:train-cpu", "tuner-test:serve-cpu", check=False)


class Compose:
    """Its file, on our base and under names of our own, for folders that a user mounts."""

    def __init__(self, folder: Path) -> None:
        services: dict[str, Any] = {
            name: {"image": f"tuner-test:{stage}", "build": {"args": {"BASE": BASE}}}
            for name, stage in (("data", "train-cpu"), ("train", "train-cpu"), ("serve", "serve-cpu"))
        }
        self._override = folder / "override.yaml"
        self._override.write_text(yaml.safe_dump({"services": services}))

    def __call__(self, *arguments: Any, check: bool = True, timeout: float = 1800, **settings: Any) -> str:
        ours = ["--project-name", "tuner-test", "--env-file", "/dev/null", "--profile", "*"]
        line = ["docker", "compose", *ours, "-f", ROOT / "docker/compose.yaml", "-f", self._override, *arguments]
        told = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("TUNER_", "COMPOSE_"))},
            "PROMETHEUS_IMAGE": PROMETHEUS,
            **{f"TUNER_{key.upper()}": str(value) for key, value in settings.items()},
        }
        done = subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=timeout, env=told)
        assert not check or done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def compose(base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """With images built by it."""
    made = Compose(tmp_path_factory.mktemp("compose"))
    made("config", "--quiet")
    made("down", "--volumes", "--remove-orphans")  # of a run that was cut off
    made("build", "train", "serve")
    yield made
    made("down", "--volumes", "--remove-orphans")


class Image:
    """What is in one of them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.config = json.loads(docker("image", "inspect", name).stdout)[0]["Config"]
        container = docker("create", name).stdout.strip()
        packed = folder / "image.tar"
        docker("export", "--output", packed, container)
        docker("rm", container)
        with tarfile.open(packed) as files:
            members = files.getmembers()
            self.files = [each.name for each in members]
            # A file takes whole blocks of the disk.
            self.bytes = sum(-(-each.size // 4096) * 4096 for each in members if each.isreg())
            self.bill = json.load(files.extractfile("opt/tuner/sbom.cdx.json"))  # type: ignore[arg-type]
            status = files.extractfile("var/lib/dpkg/status").read().decode()  # type: ignore[union-attr]
            self.debian = set(re.findall(r"^Package: (\S+)$", status, re.MULTILINE))
        packed.unlink()


def of(stage: str) -> Any:
    @pytest.fixture(scope="module")
    def fixture(compose: Compose, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Image:
        image = Image(f"tuner-test:{stage}", tmp_path_factory.mktemp("image"))
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            sys.stdout.write(f"\n{stage}: {image.bytes / 1e9:.2f} GB unpacked\n")
        return image

    return fixture


train, serve = of("train-cpu"), of("serve-cpu")


def contained(
    stage: str, mounts: Mapping[str, Path], *arguments: Any, options: tuple[str, ...] = (), who: int = USER, shm: str = "1g", files: int = 16384,
) -> list[str]:  # fmt: skip
    """The line that runs an image without Compose, locked down as Compose has it."""
    return [
        "docker", "run", "--rm", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges:true", "--tmpfs=/tmp:mode=1777",
        f"--user={who}:{who}", f"--shm-size={shm}", f"--ulimit=nofile={files}:{files}", *options,
        *(f"--volume={folder}:{place}" for place, folder in mounts.items()), f"tuner-test:{stage}", *map(str, arguments),
    ]  # fmt: skip


def ended(line: list[str], timeout: float = 900) -> tuple[int, str]:
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    return done.returncode, done.stdout


def owned(folder: Path, user: int) -> None:
    """By this user, who can get there."""
    subprocess.run(["chown", "-R", f"{user}:{user}", str(folder)], check=True)
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)


def until(what: Callable[[], Any], otherwise: Callable[[], str], timeout_s: float = 300) -> Any:
    """What it gives once it gives something; `otherwise` says what happened instead."""
    end = time.monotonic() + timeout_s
    while not (got := what()):
        assert time.monotonic() < end, otherwise()
        time.sleep(0.5)
    return got


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a user mounts, and owns: recipes with their rows, and room for runs and a cache."""
    folder = tmp_path_factory.mktemp("mounted")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for name in ("runs", "cache"):
        (folder / name).mkdir()
    owned(folder, USER)
    return {f"/{name}": folder / name for name in ("recipes", "runs", "cache")}


@pytest.fixture(scope="module")
def settings(folders: dict[str, Path]) -> dict[str, Any]:
    return {**{name.strip("/"): folder for name, folder in folders.items()}, "bundle": "runs/quick/quantize"}


@pytest.fixture(scope="module")
def trained(compose: Compose, folders: dict[str, Path]) -> str:
    """The demo in few steps, without a network; what it said."""
    sets = [part for each in QUICK for part in ("--set", each)]
    line = contained("train-cpu", folders, "recipes/demo.yaml", "--out", "runs/quick", *sets, options=("--network=none",))
    code, said = ended(line)
    assert code == 0, said
    return said


def test_a_recipe_is_run_on_mounted_folders_by_a_user_without_rights_and_without_a_network(
    trained: str, folders: dict[str, Path]
) -> None:
    made = folders["/runs"] / "quick" / "quantize" / "bundle.json"
    assert made.stat().st_uid == USER
    assert json.loads(made.read_text())["metrics"]["heldout_loss"] > 0
    assert "runs/quick/quantize" in trained


def test_rows_are_made_and_a_recipe_is_run_by_compose_in_volumes_of_its_own(compose: Compose, tmp_path: Path) -> None:
    """README's first two commands, by another user than Compose's in a folder of his own."""
    folder = tmp_path / "recipes"
    shutil.copytree(ROOT / "recipes", folder, ignore=shutil.ignore_patterns("azure-cli"))
    owned(folder, 1234)
    mine: dict[str, Any] = {"user": "1234:1234", "recipes": folder}
    compose("run", "--rm", "data", **mine)
    assert (folder / "data" / "azure-cli" / "train.jsonl").stat().st_uid == 1234
    sets = [part for each in QUICK for part in ("--set", each)]
    assert "runs/demo/quantize" in compose("run", "--rm", "train", "recipes/demo.yaml", *sets, **mine)
    assert (
        compose("run", "--rm", "train", "python", "-c", "print(open('/runs/demo/quantize/bundle.json').read(1))", **mine)[0] == "{"
    )


def test_rows_and_a_model_of_ones_own_are_tuned_without_a_network_by_whoever_owns_the_folders(
    compose: Compose, tiny_model: Path, tmp_path: Path
) -> None:
    """README's commands: `new --data /data/... --out /runs/my.yaml`, then the recipe it wrote."""
    write_rows(tmp_path / "rows.jsonl", chat_rows(48))
    shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("runs", "cache"):
        (tmp_path / name).mkdir()
    owned(tmp_path, 1234)
    mounts = {"/data": tmp_path, "/runs": tmp_path / "runs", "/cache": tmp_path / "cache"}
    wanted = ("new", "--data", "/data/rows.jsonl", "--base", "/data/model", "--out", "/runs/my.yaml")
    for arguments in (wanted, ("check", "/runs/my.yaml"), ("/runs/my.yaml",)):
        code, said = ended(contained("train-cpu", mounts, *arguments, options=("--network=none",), who=1234))
        assert code == 0, said
    assert (tmp_path / "runs" / "my" / "tune" / "bundle.json").stat().st_uid == 1234


@pytest.fixture(scope="module")
def prometheus(base: str) -> str:
    """Debian's, laid out as Prometheus' own image is: its configuration is checked, and it asks and answers for real."""
    text = f"""FROM {base}
RUN apt-get update && apt-get install -y --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/*
RUN install -d -o nobody /prometheus
USER nobody
ENTRYPOINT ["prometheus"]
"""
    done = subprocess.run(["docker", "build", "--tag", PROMETHEUS, "-"], input=text, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return PROMETHEUS


def test_promtool_takes_prometheus_configuration(prometheus: str) -> None:
    mounted = f"--volume={ROOT}/docker/prometheus:/etc/prometheus:ro"
    checked = ["check", "config", "--syntax-only", "/etc/prometheus/prometheus.yml"]
    docker("run", "--rm", mounted, "--entrypoint=promtool", prometheus, *checked)


def test_what_compose_serves_answers_openais_client_is_watched_and_drains(
    compose: Compose, trained: str, prometheus: str, settings: dict[str, Any]
) -> None:
    """README's third command; every panel of the dashboard gets an answer from a Prometheus that watches."""
    from openai import OpenAI

    port, watch = free_port(), free_port()
    told = {**settings, "port": port, "prometheus_port": watch}
    try:
        compose("up", "--detach", "serve", "prometheus", **told)

        def logs() -> str:
            return compose("logs", "serve", **told)

        key = until(lambda: re.search(r"shown once: (tnr-\S+)", logs()), logs)[1]
        container = compose("ps", "--quiet", "serve", **told).strip()
        state = partial(docker, "inspect", container, "--format")
        until(lambda: state("{{.State.Health.Status}}").stdout.strip() == "healthy", logs)
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        (model,) = client.models.list().data
        asked: dict[str, Any] = {"model": model.id, "messages": [QUESTION], "temperature": 0}
        assert client.chat.completions.create(**asked, max_tokens=8).choices[0].message.content
        assert list(client.chat.completions.create(**asked, max_tokens=8, stream=True))

        def answer(query: str) -> list[Any]:
            got = httpx.get(f"http://127.0.0.1:{watch}/api/v1/query", params={"query": query}).json()
            assert got["status"] == "success", got
            found: list[Any] = got["data"]["result"]
            return found

        until(lambda: answer("count_over_time(tuner_requests_total[1m]) > 2"), lambda: compose("logs", "prometheus", **told))
        panels = json.loads((ROOT / "docker/grafana/dashboards/tuner.json").read_text())["panels"]
        empty = set()
        for panel in panels:
            for target in panel["targets"]:
                query = target["expr"].replace("$__rate_interval", "1m").replace("$name", ".*")
                empty |= set() if answer(query) else {panel["title"]}
        assert empty <= EMPTY

        second = compose("exec", "-T", "serve", "tuner", "keys", "create", "--models", model.id, **told)
        client.with_options(api_key=re.search(r"tnr-\S+", second)[0]).models.list()  # type: ignore[index]
        users = docker("top", container, "-eo", "uid,pid,args").stdout.splitlines()[1:]
        assert len(users) > 1 and {line.split()[0] for line in users} == {str(USER)}
        # Compose sends SIGTERM to the first process, which hands it on; what is under way is answered.
        answers: list[Any] = []
        request = threading.Thread(
            target=lambda: answers.append(client.chat.completions.create(**asked, max_tokens=150, extra_body={"ignore_eos": True}))
        )
        request.start()
        time.sleep(1.0)
        assert request.is_alive(), "nothing is under way that could be drained"
        compose("stop", "serve", **told)
        request.join()
        assert answers[0].usage.completion_tokens == 150
        assert state("{{.State.ExitCode}}").stdout.strip() == "0"
        assert "Traceback" not in logs()
    finally:
        compose("rm", "--stop", "--force", "serve", "prometheus", check=False, **told)


def test_what_kubernetes_is_told_to_start_answers_by_a_key_of_which_it_has_the_hash(
    trained: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """As docker/k8s/base/endpoint.yaml has it: /runs is read-only, keys are a file of hashes."""
    manifest = yaml.safe_load((ROOT / "docker/k8s/base/endpoint.yaml").read_text())
    arguments = [
        each.replace("/runs/demo/", "/runs/quick/") for each in manifest["spec"]["template"]["spec"]["containers"][0]["args"]
    ]
    for name in ("state", "keys"):
        (tmp_path / name).mkdir()
    key = tuner("keys", "create", "--models", "*", "--file", tmp_path / "keys" / "keys.jsonl").stdout.strip()
    # Kubernetes gives what is mounted to the pod's group.
    owned(tmp_path, USER)
    port = free_port()
    read_only = (f"--volume={folders['/runs']}:/runs:ro", f"--volume={tmp_path / 'keys'}:/keys:ro")
    mounts = {"/cache": folders["/cache"], "/state": tmp_path / "state"}
    options = (*read_only, "--detach", f"--publish=127.0.0.1:{port}:8000")
    line = contained("serve-cpu", mounts, *arguments, options=options)
    line.remove("--rm")
    container = subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    try:

        def said() -> str:
            done = docker("logs", container)
            return done.stdout + done.stderr

        until(lambda: "serving quick-quantize at" in said(), said)
        url = f"http://127.0.0.1:{port}/v1/models"
        got = httpx.get(url, headers={"authorization": f"Bearer {key}"}).json()["data"]
        assert [each["id"] for each in got] == ["quick-quantize"]
        assert httpx.get(url).status_code == 401
        assert "shown once" not in said()
        docker("stop", "--time", "60", container)
        assert docker("inspect", container, "--format", "{{.State.ExitCode}}").stdout.strip() == "0"
    finally:
        docker("rm", "--force", container, check=False)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            {"who": 1234},
            "belongs to user 1000:1000 and 1234:1234 may not write there; give it `--user 1000:1000` (Compose: TUNER_USER)",
        ),
        ({"files": 1024}, "it may open 1024 files and 4096 are needed; give it `--ulimit nofile=16384`"),
        ({"options": ("--env=TUNER_DEVICE=cuda",)}, "no GPU is seen in here; give it `--gpus all` (Compose: train-gpu, serve-gpu)"),
        ({"shm": "64m"}, "/dev/shm holds 64 MB and 256 MB are needed; give it `--shm-size 1g`"),
    ],
)
def test_what_a_container_was_not_given_is_said_with_the_option_that_gives_it(
    trained: str, folders: dict[str, Path], how: dict[str, Any], said: str
) -> None:
    code, output = ended(contained("serve-cpu", folders, "runs/quick/quantize", **how), timeout=60)
    assert code == 2
    assert said in output
    assert "Traceback" not in output


def test_a_result_of_another_user_and_a_folder_that_may_not_be_written_are_told_before_anything_runs(
    trained: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("data"))
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    owned(tmp_path, USER)
    os.chown(tmp_path / "runs" / "demo", 1234, 1234)
    mounts = {"/recipes": tmp_path / "recipes", "/runs": tmp_path / "runs"}
    for mode, said in (
        (0o755, "/runs/demo belongs to user 1234:1234 and 1000:1000 may not write there"),
        (0o555, "/runs does not let 1000:1000 write, whose it is; `chmod u+w` it outside"),
    ):
        code, output = ended(contained("train-cpu", mounts, "recipes/demo.yaml"), timeout=60)
        assert code == 2 and said in output, (mode, output)
        os.chown(tmp_path / "runs" / "demo", USER, USER)
        (tmp_path / "runs").chmod(0o555)


def test_folders_of_root_are_said_to_be_his_and_work_for_him(compose: Compose, tmp_path: Path) -> None:
    """A folder that was not there when it was mounted is made by root, and a whole clone may be his."""
    (tmp_path / "recipes").mkdir()
    made = ("python", "-c", "open('/recipes/made', 'w').close()")
    told: dict[str, Any] = {"recipes": tmp_path / "recipes"}
    for file, beginning in (
        (None, "/recipes belongs to root, as a folder does that was not there when it was mounted; "),
        ("there", "/recipes belongs to root; "),
    ):
        if file:
            (tmp_path / "recipes" / file).touch()
        said = compose("run", "--rm", "train", *made, check=False, **told)
        assert f"{beginning}`chown -R 1000:1000` it outside, or give `--user 0:0` (Compose: TUNER_USER=0:0)" in said
        assert not (tmp_path / "recipes" / "made").exists()
    compose("run", "--rm", "train", *made, user="0:0", **told)
    assert (tmp_path / "recipes" / "made").is_file()


COMPILERS = {"gcc", "cc", "cc1", "cc1plus", "g++", "c++", "clang", "ld", "as", "make", "nvcc"}


def test_an_image_is_small_and_has_no_compiler_and_a_bill_of_materials(serve: Image, train: Image) -> None:
    assert serve.bytes <= SERVE_BYTES
    for image in (serve, train):
        places = [Path(each) for each in image.files]
        names = {
            re.sub(r"^x86_64-linux-gnu-|-\d+$", "", file.name)
            for file in places
            if file.parent.name in ("bin", "sbin") or file.name.startswith("cc1")
        }
        assert names & COMPILERS == set(), image.name
        assert image.config["User"] == f"{USER}:{USER}"
    assert serve.config["StopSignal"] == "SIGTERM"
    assert serve.config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    listed = {each["name"].lower().replace("_", "-"): each["version"] for each in serve.bill["components"]}
    lines = (ROOT / "requirements" / "cpu-serve.lock").read_text().splitlines()
    for name, version in (line.split("==") for line in lines if not line.startswith("#")):
        assert listed[name.lower().replace("_", "-")] == version
    assert {"tini", "python3", "tuner"} <= set(listed)
    assert {each["name"] for each in serve.bill["components"] if each["purl"].startswith("pkg:deb/")} == serve.debian


def test_a_cuda_image_that_sees_no_gpu_says_so_and_trains_on_the_cpu(compose: Compose) -> None:
    options = ("--env=TUNER_DEVICE=cuda", "--tmpfs=/recipes:mode=1777")
    code, said = ended(contained("train-cpu", {}, "python", "-c", "print('done')", options=options), timeout=60)
    assert code == 0, said
    assert "no GPU is seen in here; give it `--gpus all` (Compose: train-gpu, serve-gpu); what follows is done by the CPU" in said
    assert "done" in said.splitlines()

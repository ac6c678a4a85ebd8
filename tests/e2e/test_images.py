"""The CPU images, built from the Dockerfile on a Debian base and run: buildah builds, and namespaces of the kernel contain.

`make images` installs what it takes (buildah, debootstrap, promtool); only root can do all this.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.conftest import chat_rows, free_port, tuner, write_rows
from tests.e2e.test_serving import QUESTION, QUICK

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not (shutil.which("buildah") and shutil.which("debootstrap")),
        reason="images are built by root with buildah and debootstrap, which `make images` installs",
    ),
]
USER = 1000
# An image that serves has at most this much in it, unpacked.
SERVE_BYTES = 2_500_000_000
# In a namespace of its own: the image's files read-only, what is mounted, and a user without rights.
CONTAIN = """
set -e
mount --make-rprivate /
mount --bind "$IMAGE" "$IMAGE"
mount -o remount,bind,ro "$IMAGE"
mount -t proc proc "$IMAGE/proc"
mount --bind /sys "$IMAGE/sys"
mount -o remount,bind,ro "$IMAGE/sys"
mount --rbind /dev "$IMAGE/dev"
mount -t tmpfs -o "size=$SHM" tmpfs "$IMAGE/dev/shm"
mount -t tmpfs -o noexec,nosuid,nodev tmpfs "$IMAGE/tmp"
for pair in $MOUNTS; do mount --bind "${pair%%:*}" "$IMAGE${pair#*:}"; done
for place in $READ_ONLY; do mount -o remount,bind,ro "$IMAGE$place"; done
if [ -n "$OFFLINE" ]; then ip link set lo up; else mount --bind /etc/resolv.conf "$IMAGE/etc/resolv.conf"; fi
if [ -n "$FILES" ]; then ulimit -n "$FILES"; fi
exec chroot "$IMAGE" setpriv --reuid="$WHO" --regid="$WHO" --clear-groups --no-new-privs --bounding-set=-all env -i "$@"
"""


def buildah(*arguments: Any, timeout: float = 1800) -> str:
    environment = {**os.environ, "STORAGE_DRIVER": os.environ.get("STORAGE_DRIVER", "vfs")}
    done = subprocess.run(["buildah", *map(str, arguments)], capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout.strip()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Debian without anything."""
    folder = tmp_path_factory.mktemp("debian")
    line = [
        "debootstrap",
        "--variant=minbase",
        "--include=ca-certificates",
        "bookworm",
        str(folder),
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:]
    for left in [*folder.glob("var/cache/apt/archives/*.deb"), *folder.glob("var/lib/apt/lists/*_*")]:
        left.unlink()
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, folder, "/")
    buildah("commit", "--quiet", container, "localhost/debian:base")
    buildah("rm", container)
    shutil.rmtree(folder)
    return "localhost/debian:base"


def as_this_machine(folder: Path) -> list[str]:
    """What apt and pip are told on this machine, they are told in a build, too: mirrors, certificates, folders with packages."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = dict(re.findall(r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$", told, re.MULTILINE))
    wanted = {key: found[key] for key in ("index-url", "extra-index-url", "find-links", "cert", "trusted-host") if key in found}
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in wanted.items()))
    local = [place.removeprefix("file://") for value in wanted.values() for place in value.split()]
    places = {place.removesuffix("/simple") for place in local if place.startswith("/") and Path(place).is_dir()}
    mounts = [
        f"{folder / 'pip.conf'}:/etc/pip.conf:ro",
        "/etc/apt/apt.conf.d:/etc/apt/apt.conf.d:ro",
        "/etc/ssl/certs:/etc/ssl/certs:ro",
    ]
    return [part for each in [*mounts, *(f"{place}:{place}:ro" for place in sorted(places))] for part in ("--volume", each)]


class Image:
    """One that was built, and a copy of its files to run."""

    def __init__(self, target: str, base: str, folder: Path) -> None:
        name = f"localhost/tuner:{target}"
        buildah(
            "bud", "--isolation", "chroot", "--network", "host", "--format", "docker", "--build-arg", f"BASE={base}",
            "--target", target, "--tag", name, "--file", ROOT / "docker" / "Dockerfile", *as_this_machine(folder), ROOT,
        )  # fmt: skip
        self.target = target
        self._container = buildah("from", name)
        self.path = Path(buildah("mount", self._container))
        told = json.loads(buildah("inspect", name))["Docker"]["config"]
        self.config = told
        self.bytes = sum(file.lstat().st_blocks * 512 for file in self.path.rglob("*"))

    def remove(self) -> None:
        buildah("rm", self._container)


def built(target: str) -> Any:
    @pytest.fixture(scope="module")
    def fixture(base: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Image]:
        image = Image(target, base, tmp_path_factory.mktemp("build"))
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            sys.stdout.write(f"\n{target}: {image.bytes / 1e9:.2f} GB unpacked\n")
        yield image
        image.remove()

    return fixture


train, serve = built("train-cpu"), built("serve-cpu")


class Container:
    """A run of an image."""

    def __init__(
        self, image: Image, mounts: dict[str, Path], *arguments: Any, offline: bool = False, shm: str = "1g", files: int | None = None,
        who: int = USER, read_only: str = "",
    ) -> None:  # fmt: skip
        inside = image.config["Env"]
        settings = {
            "IMAGE": str(image.path), "MOUNTS": " ".join(f"{folder}:{place}" for place, folder in mounts.items()), "SHM": shm,
            "FILES": str(files or ""), "WHO": str(who), "OFFLINE": "yes" if offline else "", "READ_ONLY": read_only,
        }  # fmt: skip
        spaces = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", *(["--net"] if offline else [])]
        line = [*spaces, "sh", "-c", CONTAIN, "sh", *inside, *image.config["Entrypoint"], *map(str, arguments)]
        self.process = subprocess.Popen(
            line, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:  # type: ignore[union-attr]
            self.said += line

    def wait_for(self, pattern: str, timeout_s: float = 300) -> str:
        end = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.said)):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.1)
        return found[1] if found.groups() else found[0]

    def wait(self, timeout_s: float = 600) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        return code

    def first(self) -> psutil.Process:
        """The process that is number one inside."""
        (child,) = psutil.Process(self.process.pid).children()
        return child


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a user mounts, and owns: recipes with their rows, and room for runs and a cache."""
    folder = tmp_path_factory.mktemp("mounted")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for name in ("runs", "cache"):
        (folder / name).mkdir()
    subprocess.run(["chown", "-R", f"{USER}:{USER}", str(folder)], check=True)
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    return {f"/{name}": folder / name for name in ("recipes", "runs", "cache")}


@pytest.fixture(scope="module")
def trained(train: Image, folders: dict[str, Path]) -> Container:
    """The demo in few steps, without a network."""
    sets = [part for each in QUICK for part in ("--set", each)]
    container = Container(train, folders, "recipes/demo.yaml", "--out", "runs/quick", *sets, offline=True)
    assert container.wait(900) == 0, container.said
    return container


def test_a_recipe_is_run_on_mounted_folders_by_a_user_without_rights_and_without_a_network(
    trained: Container, folders: dict[str, Path]
) -> None:
    made = folders["/runs"] / "quick" / "quantize" / "bundle.json"
    assert made.stat().st_uid == USER
    assert json.loads(made.read_text())["metrics"]["heldout_loss"] > 0
    assert "runs/quick/quantize" in trained.said


def test_rows_and_a_model_of_ones_own_are_tuned_without_a_network_by_whoever_owns_the_folders(
    train: Image, tiny_model: Path, tmp_path: Path
) -> None:
    """README's commands: `new --data /data/... --out /runs/my.yaml`, then the recipe it wrote."""
    write_rows(tmp_path / "rows.jsonl", chat_rows(48))
    shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("runs", "cache"):
        (tmp_path / name).mkdir()
    subprocess.run(["chown", "-R", "1234:1234", str(tmp_path)], check=True)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    mounts = {"/data": tmp_path, "/runs": tmp_path / "runs", "/cache": tmp_path / "cache"}
    wanted = ("new", "--data", "/data/rows.jsonl", "--base", "/data/model", "--out", "/runs/my.yaml")
    for arguments in (wanted, ("check", "/runs/my.yaml"), ("/runs/my.yaml",)):
        container = Container(train, mounts, *arguments, offline=True, who=1234)
        assert container.wait(300) == 0, container.said
    assert (tmp_path / "runs" / "my" / "tune" / "bundle.json").stat().st_uid == 1234


def test_rows_are_made_by_another_user_in_folders_of_his_own(train: Image, tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    shutil.copytree(ROOT / "recipes", folder, ignore=shutil.ignore_patterns("*-*"))
    subprocess.run(["chown", "-R", "1234:1234", str(folder)], check=True)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    told = as_this_machine(tmp_path)[1::2]
    (tmp_path / "pip.conf").chmod(0o644)
    (train.path / "etc/pip.conf").touch()
    mounts = {place: Path(outside) for outside, place, _ in (each.split(":") for each in told if "apt.conf" not in each)}
    for place in mounts:
        (train.path / place[1:]).mkdir(parents=True, exist_ok=True) if mounts[place].is_dir() else None
    container = Container(train, {**mounts, "/recipes": folder}, "python", "/recipes/data/azure_cli.py", who=1234)
    assert container.wait(300) == 0, container.said
    assert (folder / "data" / "azure-cli" / "train.jsonl").stat().st_uid == 1234


def test_what_is_served_answers_openais_client_and_drains(trained: Container, serve: Image, folders: dict[str, Path]) -> None:
    from openai import OpenAI

    port = free_port()
    container = Container(serve, folders, "runs/quick/quantize", "--port", port, "--name", "quick", offline=False)
    try:
        key = container.wait_for(r"shown once: (tnr-\S+)")
        container.wait_for("serving quick at")
        url = f"http://127.0.0.1:{port}"
        client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        asked: dict[str, Any] = {"model": "quick", "messages": [QUESTION], "temperature": 0}
        assert client.chat.completions.create(**asked, max_tokens=8).choices[0].message.content
        assert httpx.get(f"{url}/v1/models").status_code == 401
        seer = (folders["/runs"] / "serve" / "metrics.key").read_text()
        assert "tuner_requests_total" in httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {seer}"}).text
        healthy = subprocess.run(
            ["nsenter", "--target", str(container.first().pid), "--mount", "--pid", "chroot", str(serve.path), "env", "-i", *serve.config["Env"],
             *serve.config["Healthcheck"]["Test"][1:]], capture_output=True, text=True,
        )  # fmt: skip
        assert healthy.returncode == 0, healthy.stderr
        # The first process hands SIGTERM on; what is under way is answered, and nothing stays.
        inside = [container.first(), *container.first().children(recursive=True)]
        assert all(each.uids().real == USER for each in inside)
        answers: list[Any] = []
        request = threading.Thread(
            target=lambda: answers.append(client.chat.completions.create(**asked, max_tokens=150, extra_body={"ignore_eos": True}))
        )
        request.start()
        time.sleep(1.0)
        container.first().send_signal(signal.SIGTERM)
        assert container.wait(60) == 0, container.said
        request.join()
        assert answers[0].usage.completion_tokens == 150
        _, alive = psutil.wait_procs(inside, timeout=5)
        assert alive == []
        assert "Traceback" not in container.said
    finally:
        with contextlib.suppress(ProcessLookupError):
            container.process.kill()


def test_what_kubernetes_is_told_to_start_answers_by_a_key_of_which_it_has_the_hash(
    trained: Container, serve: Image, folders: dict[str, Path], tmp_path: Path
) -> None:
    """As docker/k8s/base/endpoint.yaml has it: /runs is read-only, keys are a file of hashes."""
    told = yaml.safe_load((ROOT / "docker/k8s/base/endpoint.yaml").read_text())["spec"]["template"]["spec"]["containers"][0]
    mounts = {"/runs": folders["/runs"], "/cache": folders["/cache"]}
    for name in ("state", "keys"):
        (serve.path / name).mkdir()
        mounts[f"/{name}"] = tmp_path / name
        (tmp_path / name).mkdir()
    key = tuner("keys", "create", "--models", "*", "--file", tmp_path / "keys" / "keys.jsonl").stdout.strip()
    # Kubernetes gives what is mounted to the pod's group.
    subprocess.run(["chown", "-R", f"{USER}:{USER}", str(tmp_path / "state"), str(tmp_path / "keys")], check=True)
    port = free_port()
    arguments = [each.replace("/runs/demo/", "/runs/quick/") for each in told["args"]]
    container = Container(
        serve, mounts, *arguments, "--port", port, read_only="/runs /keys"
    )  # fmt: skip
    try:
        container.wait_for("serving quick-quantize at")
        url = f"http://127.0.0.1:{port}/v1/models"
        assert [each["id"] for each in httpx.get(url, headers={"authorization": f"Bearer {key}"}).json()["data"]] == [
            "quick-quantize"
        ]
        assert httpx.get(url).status_code == 401
        assert "shown once" not in container.said
        container.first().send_signal(signal.SIGTERM)
        assert container.wait(60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            container.process.kill()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            {"who": 1234},
            "belongs to user 1000:1000 and 1234:1234 may not write there; give it `--user 1000:1000` (Compose: TUNER_USER)",
        ),
        ({"files": 1024}, "it may open 1024 files and 4096 are needed; give it `--ulimit nofile=65536`"),
        ({"shm": "64m"}, "/dev/shm holds 64 MB and 256 MB are needed; give it `--shm-size 1g`"),
    ],
)
def test_what_a_container_was_not_given_is_said_with_the_option_that_gives_it(
    serve: Image, folders: dict[str, Path], how: dict[str, Any], said: str
) -> None:
    container = Container(serve, folders, "runs/quick/quantize", **how)
    assert container.wait(60) == 2
    assert said in container.said
    assert "Traceback" not in container.said


COMPILERS = {"gcc", "cc", "cc1", "cc1plus", "g++", "c++", "clang", "ld", "as", "make", "nvcc"}


def test_an_image_is_small_and_has_no_compiler_and_a_bill_of_materials(serve: Image, train: Image) -> None:
    assert serve.bytes <= SERVE_BYTES
    for image in (serve, train):
        names = {
            re.sub(r"^x86_64-linux-gnu-|-\d+$", "", file.name)
            for file in image.path.rglob("*")
            if file.parent.name in ("bin", "sbin") or file.name.startswith("cc1")
        }
        assert names & COMPILERS == set(), image.target
    assert serve.config["User"] == f"{USER}:{USER}"
    assert serve.config["StopSignal"] == "SIGTERM"
    assert serve.config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    bill = json.loads((serve.path / "opt/tuner/sbom.cdx.json").read_text())
    listed = {each["name"].lower().replace("_", "-"): each["version"] for each in bill["components"]}
    lines = (ROOT / "requirements" / "cpu-serve.lock").read_text().splitlines()
    for name, version in (line.split("==") for line in lines if not line.startswith("#")):
        assert listed[name.lower().replace("_", "-")] == version
    assert {"tini", "python3", "tuner"} <= set(listed)
    line = ["dpkg-query", "--admindir", f"{serve.path}/var/lib/dpkg", "--show", "--showformat", "${Package}\\n"]
    installed = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
    assert {each["name"] for each in bill["components"] if each["purl"].startswith("pkg:deb/")} == set(installed)


def test_promtool_takes_prometheus_configuration(folders: dict[str, Path]) -> None:
    promtool = shutil.which("promtool", path=f"{os.environ['PATH']}:{ROOT}/.cache/usr/bin")
    if not promtool:
        pytest.skip("no promtool; `make images` fetches it")
    done = subprocess.run(
        [promtool, "check", "config", "--syntax-only", str(ROOT / "docker/prometheus/prometheus.yml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

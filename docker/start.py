"""What a container begins with: looks whether it was given what it needs, says what is missing, and becomes `tuner`.

docker run ... tuner:train-cpu recipes/demo.yaml           # tuner run recipes/demo.yaml
docker run ... tuner:serve-cpu runs/demo/quantize          # tuner serve runs/demo/quantize --host 0.0.0.0
docker run ... tuner:train-cpu check recipes/demo.yaml     # any other command as it is
docker run ... tuner:train-cpu python recipes/data/azure_cli.py
"""

import json
import os
import resource
import shutil
import ssl
import sys
import urllib.request
from pathlib import Path

# Where commands write, beside what the state of an endpoint is kept in.
WRITES = {
    "run": ["/runs", "/cache", "/tmp"], "prove": ["/runs", "/cache", "/tmp"], "python": ["/recipes", "/tmp"],
    "serve": ["/cache", "/tmp"], "new": ["/cache", "/tmp"],
}  # fmt: skip
# In the state's folder; Prometheus reads it from there.
METRICS_KEY = "metrics.key"
# Where the health check finds the state.
TOLD = Path("/tmp/tuner-state")
# Each request under way is two connections; engines have some of their own. Four times as many are advised.
FILES = 4096
# vLLM's processes speak through it and want 160 MiB for each engine; Docker gives 64 MB.
SHARED_BYTES = 256 * 2**20
# What a container with a GPU has, the second on Windows.
GPUS = ("nvidia[0-9]*", "dxg")


def main() -> int:
    """Check, then exec; returns only where something is missing, or was all that was asked."""
    arguments = sys.argv[1:] or ["--help"]
    if arguments == ["ready"]:
        return ready()
    if "/" in arguments[0] or arguments[0].endswith((".yaml", ".yml")):
        arguments.insert(0, "run" if os.environ.get("TUNER_IMAGE") == "train" else "serve")
    command, rest = arguments[0], arguments[1:]
    if command in WRITES and "--help" not in rest:
        state = Path(_option(rest, "--state") or os.environ.get("TUNER_STATE") or "/runs/serve")
        serves = command == "serve"
        places = [str(state), *WRITES[command]] if serves else [*_outs(command, rest), *WRITES[command]]
        if why := lacking(places, serves=serves) or (prepare(rest, state) if serves else None):
            print(f"this container cannot work: {why}", file=sys.stderr)
            return 2
        if serves:
            rest += [] if _option(rest, "--state") else ["--state", str(state)]
            rest += [] if _option(rest, "--host") else ["--host", "0.0.0.0"]
    tuner = Path(sys.executable).parent / "tuner"
    program = [sys.executable] if command == "python" else [str(tuner if tuner.exists() else shutil.which("tuner")), command]
    os.execv(program[0], [*program, *rest])
    return 0


def _outs(command: str, arguments: list[str]) -> list[str]:
    """Where a recipe's results go, of which another user's may be there."""
    recipes = [each for each in arguments if each.endswith((".yaml", ".yml"))]
    out = _option(arguments, "--out") or (f"/runs/{Path(recipes[0]).stem}" if recipes else None)
    return [out] if out and command in ("run", "prove") else []


def _option(arguments: list[str], name: str) -> str | None:
    """The value of an option, in both forms that it can be written in."""
    for at, each in enumerate(arguments):
        if each == name:
            return arguments[at + 1] if at + 1 < len(arguments) else ""
        if each.startswith(f"{name}="):
            return each.partition("=")[2]
    return None


def lacking(places: list[str], *, serves: bool) -> str | None:
    """What must be given to the container, in one sentence, or None."""
    for asked in map(Path, places):
        wanted = Path("/") / asked
        place = next(each for each in (wanted, *wanted.parents) if each.exists())
        if place == Path("/"):
            return f"nothing is mounted at {wanted}, where files are to be kept; give it a folder or volume: `-v FOLDER:{wanted}`"
        if not os.access(place, os.W_OK):
            told = place.stat()
            who, owner = f"{os.getuid()}:{os.getgid()}", f"{told.st_uid}:{told.st_gid}"
            if os.statvfs(place).f_flag & os.ST_RDONLY:
                return f"{place} is mounted read-only, and would be written to; give it a folder or volume: `-v FOLDER:{place}`"
            if told.st_uid == os.getuid():
                return f"{place} does not let {who} write, whose it is; `chmod u+w` it outside"
            if told.st_uid == 0:
                empty = os.access(place, os.R_OK | os.X_OK) and not any(place.iterdir())
                made = ", as a folder does that was not there when it was mounted" if empty else ""
                return f"{place} belongs to root{made}; `chown -R {who}` it outside, or give `--user 0:0` (Compose: TUNER_USER=0:0)"
            return (
                f"{place} belongs to user {owner} and {who} may not write there; give it `--user {owner}` (Compose: TUNER_USER), "
                f"or a folder or volume that {who} may write to: `-v FOLDER:{place}`"
            )
    if os.environ.get("TUNER_DEVICE") == "cuda" and not any(found for each in GPUS for found in Path("/dev").glob(each)):
        why = "no GPU is seen in here; give it `--gpus all` (Compose: train-gpu, serve-gpu)"
        if serves:
            return f"{why}, or take the image that serves on a CPU"
        print(f"{why}; what follows is done by the CPU", file=sys.stderr)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if serves and most != resource.RLIM_INFINITY and most < FILES:
        return f"it may open {most} files and {FILES} are needed; give it `--ulimit nofile={FILES * 4}`"
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    shared = os.statvfs("/dev/shm")
    if serves and shared.f_frsize * shared.f_blocks < SHARED_BYTES:
        size = shared.f_frsize * shared.f_blocks // 2**20
        return f"/dev/shm holds {size} MB and {SHARED_BYTES // 2**20} MB are needed; give it `--shm-size 1g`"
    return None


def prepare(arguments: list[str], state: Path) -> str | None:
    """Keys for an endpoint that others reach: where it has none the first is made and shown, and one for Prometheus beside it.

    Returns why it cannot be served, or None.
    """
    from serve.errors import ServeError
    from serve.keys import create
    from serve.state import State
    from tuner.bundle import MANIFEST

    targets = [Path(each) for each in arguments if not each.startswith("-") and "/" in each and Path(each) != state]
    for target in targets:
        if target.suffix not in (".yaml", ".yml", ".jsonl") and not (target / MANIFEST).is_file():
            return f"{target}: there is no bundle; a recipe makes one, such as `docker compose run --rm train recipes/demo.yaml`"
    TOLD.write_text(str(state))
    if _option(arguments, "--keys"):
        return None
    try:
        opened = State(state / "state.sqlite")
        if not (state / METRICS_KEY).exists():
            part = state / f".{METRICS_KEY}.part"
            part.write_text(create(opened, models=["/metrics"], label="prometheus"))
            part.chmod(0o644)  # by Prometheus' own user
            part.rename(state / METRICS_KEY)
        if all(key.models == ("/metrics",) for key in opened.keys().values()):
            print(f"the key to ask with, shown once: {create(opened, models=['*'], label='first')}")
            print("(`tuner keys` makes and revokes others, such as with limits)", flush=True)
        opened.close()
    except (ServeError, OSError) as error:
        return str(error)
    return None


def ready() -> int:
    """Whether every model here can be asked."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE  # its own certificate, on loopback
    # A proxy of the environment is not for what runs in here.
    asking = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusting))
    try:
        url = json.loads((Path(TOLD.read_text()) / "operator.json").read_text())["url"]
        with asking.open(f"{url}/ready", timeout=4):
            return 0
    except (OSError, ValueError) as error:  # also where it answers 503
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

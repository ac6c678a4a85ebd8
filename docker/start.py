"""What a container begins with: looks whether it was given what it needs, says what is missing, and becomes `tuner`.

docker run ... tuner:train-cpu recipes/demo.yaml           # tuner run recipes/demo.yaml
docker run ... tuner:serve-cpu runs/demo/quantize          # tuner serve runs/demo/quantize --host 0.0.0.0
docker run ... tuner:train-cpu check recipes/demo.yaml     # any other command as it is
docker run ... tuner:train-cpu python recipes/data/azure_cli.py
"""

import json
import os
import resource
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

TUNER = Path(sys.executable).parent / "tuner"
STATE = Path(os.environ.get("TUNER_STATE") or "/runs/serve")
# Where commands write.
WRITES = {
    "run": ["/runs", "/cache", "/tmp"], "prove": ["/runs", "/cache", "/tmp"], "serve": ["/runs", "/cache", "/tmp"],
    "python": ["/recipes", "/tmp"],
}  # fmt: skip
# Prometheus reads it from there.
METRICS_KEY = STATE / "metrics.key"
# Each request under way is two connections; engines have some of their own.
FILES = 4096
# vLLM's processes speak through it and want 160 MiB for each engine; Docker gives 64 MB.
SHARED_BYTES = 256 * 2**20


def main() -> int:
    """Check, then exec; returns only where something is missing, or was all that was asked."""
    arguments = sys.argv[1:] or ["--help"]
    if arguments == ["ready"]:
        return ready()
    if "/" in arguments[0] or arguments[0].endswith((".yaml", ".yml")):
        arguments.insert(0, "run" if os.environ.get("TUNER_IMAGE") == "train" else "serve")
    command = arguments[0]
    if command in WRITES and (why := lacking(WRITES[command], serves=command == "serve")):
        print(f"this container cannot work: {why}", file=sys.stderr)
        return 2
    if command == "serve":
        make_keys()
        arguments += [] if "--host" in arguments else ["--host", "0.0.0.0"]
    program = [sys.executable] if command == "python" else [str(TUNER), command]
    os.execv(program[0], [*program, *arguments[1:]])
    return 0


def lacking(places: list[str], *, serves: bool) -> str | None:
    """What must be given to the container, in one sentence, or None."""
    for place in map(Path, places):
        if not os.access(place, os.W_OK):
            told = place.stat()
            who = f"{os.getuid()}:{os.getgid()}"
            if place == Path("/tmp"):
                return "nothing can be written to /tmp; give it `--tmpfs /tmp`"
            owner = f"{told.st_uid}:{told.st_gid}"
            return (
                f"{place} belongs to user {owner} and {who} may not write there; give it `--user {owner}` (Compose: TUNER_USER), "
                f"or a folder or volume that {who} may write to: `-v FOLDER:{place}`"
            )
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if serves and most != resource.RLIM_INFINITY and most < FILES:
        return f"it may open {most} files and {FILES} are needed; give it `--ulimit nofile={FILES * 16}`"
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    shared = os.statvfs("/dev/shm")
    if serves and shared.f_frsize * shared.f_blocks < SHARED_BYTES:
        size = shared.f_frsize * shared.f_blocks // 2**20
        return f"/dev/shm holds {size} MB and {SHARED_BYTES // 2**20} MB are needed; give it `--shm-size 1g`"
    return None


def make_keys() -> None:
    """An endpoint that others reach wants keys: the first is made and shown here, with one for Prometheus beside it."""
    if os.environ.get("TUNER_KEYS") or METRICS_KEY.exists():
        return

    def key(*scope: str) -> str:
        line = [str(TUNER), "keys", "create", *scope, "--state", str(STATE)]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    first, seer = key("--models", "*", "--label", "first"), key("--metrics", "--label", "prometheus")
    METRICS_KEY.write_text(seer)
    print(f"the key to ask with, shown once: {first}\n(`tuner keys` makes and revokes others, such as with limits)", flush=True)


def ready() -> int:
    """Whether every model here can be asked."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE  # its own certificate, on loopback
    try:
        url = json.loads((STATE / "operator.json").read_text())["url"]
        with urllib.request.urlopen(f"{url}/ready", timeout=4, context=trusting):
            return 0
    except (OSError, ValueError) as error:  # also where it answers 503
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

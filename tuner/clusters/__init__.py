"""Engines that run a recipe on several machines. One file each, named after `tuner launch --on`; a file defines

ENDING          of the file that is written
text(task)      what stands in it
SUBMIT          the command that hands such a file in, without the file
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

# Where node 0 is found by the others.
PORT = 29500
# From SIGTERM until a job is killed: a little more than its own processes are given (tuner/processes.py).
GRACE_S = 120


@dataclass(frozen=True)
class Task:
    """A recipe that is to run on several machines."""

    recipe: Path
    overrides: list[str]
    """As `--set` takes them."""
    out: Path
    nodes: int
    processes: int
    """On each node."""
    gpus: bool
    """One for each process."""
    cpus: int
    """Cores for each process."""
    image: str
    """Of the container, where the engine runs containers."""

    @property
    def name(self) -> str:
        """A name as DNS allows it, which Kubernetes wants."""
        kept = "".join(each if each.isalnum() and each.isascii() else "-" for each in self.recipe.stem.lower()).strip("-")
        return f"tuner-{kept}"[:50].rstrip("-")

    def arguments(self) -> list[str]:
        """What `tuner` is given on every node; `launch.node` and `launch.address` come behind."""
        shared = (f"launch.nodes={self.nodes}", f"launch.processes={self.processes}")
        told = [*self.overrides, *(each for each in shared if each not in self.overrides)]
        return ["run", str(self.recipe), "--out", str(self.out), *(part for each in told for part in ("--set", each))]

    def command(self) -> str:
        """What made the file, for its first line."""
        changed = "".join(f" --set {shlex.quote(each)}" for each in self.overrides)
        asked = f" --cpus {self.cpus}{' --gpus' if self.gpus else ''}"
        return f"tuner launch {shlex.quote(str(self.recipe))}{changed} --out {shlex.quote(str(self.out))}{asked}".replace("\n", " ")

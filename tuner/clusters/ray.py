"""A job for Ray: a driver, this file, asks for as many nodes as the recipe wants and runs `tuner` on each."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tuner.clusters import Task
from tuner.progress import say

ENDING = "ray.sh"
SUBMIT = ("sh",)


def text(task: Task) -> str:
    """The command that hands the job in, to the cluster that RAY_ADDRESS names."""
    words = shlex.join([*map(str, (task.nodes, task.processes, task.cpus, int(task.gpus))), *task.arguments()])
    there = f"cd {shlex.quote(str(Path.cwd()))} && exec python -m tuner.clusters.ray {words}"
    return f"""#!/bin/sh
# {task.command()} --on ray
# RAY_ADDRESS is the address of the cluster's dashboard, such as http://head:8265. `tuner` is installed on all nodes, and the
# recipe, its data, its model and {task.out} are at the same paths. A job that was ended goes on at its last checkpoint when it is
# handed in again.
exec ray job submit --submission-id "{task.name}-$(date +%s)" -- sh -c {shlex.quote(there)}
"""


def drive(nodes: int, processes: int, cpus: int, gpus: int, arguments: list[str]) -> int:
    """Run `tuner` with these arguments on as many nodes, each on a machine of its own; the first exit code that is not 0."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init(log_to_driver=True)
    needs = {"CPU": float(cpus * processes)} | ({"GPU": float(processes)} if gpus else {})
    group = placement_group([needs] * nodes, strategy="STRICT_SPREAD")
    if not group.wait(timeout_seconds=600):
        say(f"no {nodes} nodes with {needs} each were free within 10 minutes")
        return 2
    place: Any = lambda node: PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=node)  # noqa: E731
    whole = {"num_cpus": cpus * processes, "num_gpus": processes if gpus else 0, "max_retries": 0}
    address = ray.get(ray.remote(**whole)(_free_address).options(scheduling_strategy=place(0)).remote())
    run = ray.remote(**whole)(_run)
    waiting = [
        run.options(scheduling_strategy=place(node)).remote(
            [*arguments, "--set", f"launch.node={node}", "--set", f"launch.address={address}"]
        )
        for node in range(nodes)
    ]
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1)
        if code := ray.get(done[0]):
            for other in waiting:
                ray.cancel(other, force=True)
            return int(code)
    return 0


def _free_address() -> str:
    """This node's address as the others reach it, and a port that is free."""
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def _run(arguments: list[str]) -> int:
    # Ray hides the GPUs of whoever asked for none, and the recipe's own threads are for its processes to count.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-P", "-c", "from tuner.cli import main; main()", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    count, each, cores, has_gpus = map(int, sys.argv[1:5])
    sys.exit(drive(count, each, cores, has_gpus, sys.argv[5:]))

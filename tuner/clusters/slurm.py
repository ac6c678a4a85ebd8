"""A batch script for Slurm: one task on each node, which starts its own processes."""

import shlex
from pathlib import Path

from tuner.clusters import GRACE_S, Task

ENDING = "slurm.sh"
SUBMIT = ("sbatch",)


def text(task: Task) -> str:
    """The script. Options of sbatch on the command line, such as a partition or a time limit, come before those in it."""
    # What differs between nodes is known when the step has started.
    words = f'{shlex.join(task.arguments())} --set launch.node="$SLURM_NODEID" --set launch.address="$head:$port"'
    gpus = f"#SBATCH --gpus-per-node={task.processes}\n" if task.gpus else ""
    return f"""#!/bin/bash
# {task.command()} --on slurm
# The recipe, its data, its model and {task.out} are at the same paths on all nodes; so is `tuner`: activate its environment.
# A job that was ended goes on at its last checkpoint when it is handed in again.
#SBATCH --job-name={task.name}
#SBATCH --nodes={task.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={task.cpus * task.processes}
{gpus}#SBATCH --chdir={shlex.quote(str(Path.cwd()))}
#SBATCH --signal=TERM@{GRACE_S}
#SBATCH --requeue
set -e
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
export head port
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c {shlex.quote(f"exec tuner {words}")}
"""

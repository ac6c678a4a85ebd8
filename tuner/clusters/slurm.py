"""A batch script for Slurm: one task on each node, which starts its own processes."""

import shlex

from tuner.clusters import PORT, Task

ENDING = "slurm.sh"
SUBMIT = ("sbatch",)


def text(task: Task) -> str:
    """The script. Options of sbatch on the command line, such as a partition or a time limit, come before those in it."""
    # What differs between nodes is known when the step has started.
    words = f'{shlex.join(task.arguments())} --set launch.node="$SLURM_NODEID" --set launch.address="$head":{PORT}'
    gpus = f"#SBATCH --gpus-per-node={task.processes}\n" if task.gpus else ""
    return f"""#!/bin/bash
# {task.command()} --on slurm
# The recipe, its data, its model and {task.out} are at the same paths on all nodes; so is `tuner`: activate its environment.
# A job that was ended goes on at its last checkpoint when it is handed in again.
#SBATCH --job-name={task.name}
#SBATCH --nodes={task.nodes}
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --signal=TERM@120
#SBATCH --requeue
set -e
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export head
srun --kill-on-bad-exit=1 bash -c {shlex.quote(f"exec tuner {words}")}
"""

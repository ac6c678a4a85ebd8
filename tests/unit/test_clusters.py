"""What `tuner launch` writes is what the engines take: Kubernetes' schemas, and a shell that plays Slurm's commands."""

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import command, tuner
from tuner.clusters import Task, slurm


def written(recipe: Path, engine: str, to: Path, *more: str) -> str:
    done = subprocess.run(
        command("launch", recipe.name, "--on", engine, "--to", to, "--out", "my out", *more),
        cwd=recipe.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(to)
    return to.read_text()


def two_nodes(tree: dict[str, Any]) -> None:
    tree["launch"] = {"nodes": 2, "processes": 4, "strategy": "fsdp"}


@pytest.fixture
def recipe(recipe_file: Callable[..., Path]) -> Path:
    return recipe_file(two_nodes)


@pytest.mark.parametrize("gpus", [[], ["--gpus"]])
@pytest.mark.parametrize("version", ["1.30", "1.34"])
def test_the_manifest_keeps_to_kubernetes_schemas(recipe: Path, tmp_path: Path, gpus: list[str], version: str) -> None:
    import kubernetes_validate

    text = written(recipe, "kubernetes", tmp_path / "job.yaml", *gpus)
    service, job = yaml.safe_load_all(text)
    for each in (service, job):
        kubernetes_validate.validate(each, version, strict=True)
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["completionMode"]) == (2, 2, "Indexed")
    pod = job["spec"]["template"]["spec"]
    # A pod of an indexed Job is found as NAME-INDEX.SUBDOMAIN, if a Service of the subdomain's name selects the Job's pods.
    assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    arguments = pod["containers"][0]["args"]
    assert arguments[:4] == ["run", recipe.name, "--out", "/runs/my out"]
    assert f"launch.address={job['metadata']['name']}-0.{pod['subdomain']}:29500" in arguments
    assert "launch.node=$(NODE)" in arguments and "launch.nodes=2" in arguments and "launch.processes=4" in arguments
    assert ("nvidia.com/gpu" in text) == bool(gpus)
    assert pod["containers"][0]["image"] == ("tuner:train-cuda" if gpus else "tuner:train-cpu")


def test_the_script_says_to_slurm_what_it_needs_and_to_each_node_who_it_is(recipe: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    text = written(recipe, "slurm", script, "--gpus", "--cpus", "6", "--set", "seed=3")
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=24\n#SBATCH --gpus-per-node=4\n" in text
    assert f"#SBATCH --chdir={recipe.parent}\n" in text
    # Slurm's own commands, played: the step's command runs once for each node.
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    (commands / "srun").write_text(
        '#!/bin/sh\n[ "$1" = --cpus-per-task=24 ] && shift 2\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n'
    )
    (commands / "tuner").write_text('#!/bin/sh\nfor each; do printf "%s|" "$each"; done; echo\n')
    for each in commands.iterdir():
        each.chmod(0o755)
    path = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "40117",
        "SLURM_CPUS_PER_TASK": "24",
    }
    done = subprocess.run(["bash", script], capture_output=True, text=True, env={**os.environ, **path}, check=True)
    for node, line in enumerate(done.stdout.splitlines()):
        told = line.split("|")[:-1]
        assert told[:4] == ["run", recipe.name, "--out", "my out"]
        assert told[-4:] == ["--set", f"launch.node={node}", "--set", "launch.address=n1:20117"]
        assert "seed=3" in told
    assert node == 1
    # The first comment is one line, whatever a setting holds.
    broken = written(recipe, "slurm", script, "--set", 'data.made_by="two\n lines"').splitlines()
    assert [line[:2] for line in broken[1:4]] == ["# ", "# ", "# "] and broken[4].startswith("#SBATCH")


def test_a_folder_with_a_space_in_its_name_is_one_word_to_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my data").mkdir()
    monkeypatch.chdir(tmp_path / "my data")
    text = slurm.text(Task(Path("r.yaml"), [], Path("out"), 1, 1, gpus=False, cpus=2, image=""))
    (line,) = [line for line in text.splitlines() if "--chdir=" in line]
    assert shlex.split(line)[1:] == [f"--chdir={tmp_path}/my data"]


def test_an_engine_that_does_not_take_the_job_is_a_sentence(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    (tmp_path / "bin/sbatch").chmod(0o755)
    done = tuner(
        "launch", recipe, "--on", "slurm", "--to", tmp_path / "a.sh", "--submit", PATH=f"{tmp_path}/bin:{os.environ['PATH']}"
    )
    assert done.returncode == 2 and (tmp_path / "a.sh").exists()
    assert "invalid partition" in done.stderr and f"`sbatch {tmp_path}/a.sh` ended with 1, and says above why" in done.stderr


def test_the_job_for_ray_is_one_command(recipe: Path, tmp_path: Path) -> None:
    text = written(recipe, "ray", tmp_path / "job.sh")
    assert subprocess.run(["sh", "-n", tmp_path / "job.sh"], check=False).returncode == 0
    words = shlex.split(text.splitlines()[-1])
    assert words[:4] == ["exec", "ray", "job", "submit"]
    assert words[-3:-1] == ["sh", "-c"]
    there = shlex.split(words[-1])
    assert there[:3] == ["cd", str(recipe.parent), "&&"]
    assert there[there.index("-m") + 1 :][:6] == ["tuner.clusters.ray", "2", "4", "8", "0", "run"]


def test_what_cannot_be_launched_is_said(recipe: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (["--on", "slurmm"], 'there is no "slurmm" in tuner/clusters/; did you mean "slurm"?'),
        (
            ["--on", "kubernetes", "--to", tmp_path / "a.yaml"],
            "in the container there are /data, /runs, /cache; name it as it is seen from /data",
        ),
        (["--on", "slurm", "--to", tmp_path / "no/where.sh"], "no/where.sh: cannot be written: No such file"),
        (["--on", "slurm", "--to", tmp_path / "a.sh", "--submit"], "sbatch is not there; where it is: sbatch "),
    ):
        done = tuner("launch", recipe, *arguments, PATH=str(Path(os.environ["PATH"].split(":")[0])))
        assert done.returncode == 2 and said in done.stderr, done.stderr
    (tmp_path / "inside").mkdir()
    above = command("launch", f"../{recipe.name}", "--on", "kubernetes", "--out", "runs")
    done = subprocess.run(above, cwd=tmp_path / "inside", capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "../recipe.yaml: it leads out of /data, where the container starts" in done.stderr
    done = tuner("check", recipe)
    assert "note:    several nodes need launch.address" in done.stdout and " in each of 4 processes: " in done.stdout
    done = tuner("check", recipe, "--set", "stages.0.tune.batch_size=500")
    assert "note:    a step of 500 rows is more than there are: it learns from all 48" in done.stdout
    assert "training on 6 rows of" in done.stdout  # 48 among 8
    done = tuner("run", recipe, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert (
        "launch: several nodes need the address of node 0, such as 10.0.0.1:29500; on a cluster `tuner launch` finds it"
        in done.stderr
    )

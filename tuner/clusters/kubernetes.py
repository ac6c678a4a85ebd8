"""A manifest for Kubernetes: an indexed Job, whose pods find each other through a headless Service."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tuner.clusters import GRACE_S, PORT, Task
from tuner.errors import RecipeError

ENDING = "kubernetes.yaml"
SUBMIT = ("kubectl", "apply", "-f")
# As in docker/compose.yaml and docker/k8s: what the images expect.
MOUNTS = {"data": "/data", "runs": "/runs", "cache": "/cache"}
# Not the endpoint's (docker/k8s): what selects its pods would find these, too.
LABELS = {"app.kubernetes.io/name": "tuner-training"}
INDEX = "batch.kubernetes.io/job-completion-index"


def text(task: Task) -> str:
    """The manifest. Claims `tuner-data`, `tuner-runs` and `tuner-cache` are to be there, readable on all nodes.

    Raises RecipeError for a path that is none in the container.
    """
    for path in (task.recipe, task.out):
        if path.is_absolute() and not any(path.is_relative_to(mount) for mount in MOUNTS.values()):
            mounts = ", ".join(MOUNTS.values())
            raise RecipeError(f"{path}: in the container there are {mounts}; name it as it is seen from {MOUNTS['data']}")
        if ".." in path.parts:
            raise RecipeError(f"{path}: it leads out of {MOUNTS['data']}, where the container starts")
    out = task.out if task.out.is_absolute() else Path(MOUNTS["runs"]) / task.out.name
    task = replace(task, out=out)
    told = (
        f"# {task.command()} --on kubernetes\n"
        "# The recipe, its data and its model lie in the claim tuner-data, which is /data; results come to tuner-runs, and\n"
        "# tuner-cache keeps what is made of data. With several nodes the claims allow ReadWriteMany.\n"
        "# A Job that was ended goes on at its last checkpoint once made again:\n"
        f"# kubectl delete job {task.name}, and this once more.\n"
    )
    return told + yaml.safe_dump_all([_service(task), _job(task)], sort_keys=False, width=120)


def _service(task: Task) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": task.name},
        "spec": {
            "clusterIP": "None",
            "selector": {"batch.kubernetes.io/job-name": task.name},
            # Node 0 is looked for before it is ready.
            "publishNotReadyAddresses": True,
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def _job(task: Task) -> dict[str, Any]:
    resources: dict[str, Any] = {"requests": {"cpu": str(task.cpus * task.processes), "memory": f"{8 * task.processes}Gi"}}
    if task.gpus:
        resources["limits"] = {"nvidia.com/gpu": str(task.processes)}
    container = {
        "name": "train",
        "image": task.image,
        "args": [
            *task.arguments(),
            *("--set", "launch.node=$(NODE)", "--set", f"launch.address={task.name}-0.{task.name}:{PORT}"),
        ],
        "workingDir": MOUNTS["data"],
        "env": [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX}']"}}}],
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            *({"name": name, "mountPath": path} for name, path in MOUNTS.items()),
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "subdomain": task.name,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # After SIGTERM a step is ended and a checkpoint written.
        "terminationGracePeriodSeconds": GRACE_S,
        "containers": [container],
        "volumes": [
            *({"name": name, "persistentVolumeClaim": {"claimName": f"tuner-{name}"}} for name in MOUNTS),
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": task.name, "labels": LABELS},
        "spec": {
            "completionMode": "Indexed",
            "completions": task.nodes,
            "parallelism": task.nodes,
            # One that fails ends the others: they cannot train without it.
            "backoffLimit": 0,
            "template": {"metadata": {"labels": LABELS}, "spec": pod},
        },
    }

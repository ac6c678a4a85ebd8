"""Starts the processes that share a recipe's training, on this machine or on several, and tells them what to train.

`tuner run` of a recipe with `launch` starts itself once for each process, by torch's elastic agent. The first of them is the run:
it makes every bundle. The others wait until it comes to a stage that trains, open the same model and the same rows, and share its
steps (tuner/parallel.py); nothing else is done twice.
"""

import json
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.bundle import Bundle, open_bundle
from tuner.errors import BundleError, RecipeError
from tuner.progress import say, silent
from tuner.stages import Job

if TYPE_CHECKING:
    from tuner.plan import Plan
    from tuner.recipe import Launch

# The first process may measure a model, or tokenize, while the others wait for it.
PATIENCE = timedelta(hours=24)
# What torch's agent gives each process; whoever starts others, such as an engine, must not hand it on.
GIVEN = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def number() -> int:
    """How many processes a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started() -> bool:
    """This process is one of several."""
    return number() > 1


def first() -> bool:
    """This process is the run itself."""
    return int(os.environ.get("RANK", "0")) == 0


def start(launch: "Launch", arguments: list[str]) -> int:
    """Run `tuner` with these arguments in as many processes as the recipe says, and return the exit code.

    Where one of them dies the others are ended.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if torch.cuda.is_available() and launch.processes > torch.cuda.device_count():
        raise RecipeError(f"launch.processes is {launch.processes}, and there are {torch.cuda.device_count()} GPUs; one each")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.processes)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(launch.address))
    several, address = launch.nodes > 1, launch.address or "127.0.0.1:0"
    config = LaunchConfig(
        min_nodes=launch.nodes,
        max_nodes=launch.nodes,
        nproc_per_node=launch.processes,
        run_id=address if several else str(uuid.uuid4()),
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=address,
        rdzv_configs={"rank": launch.node, "timeout": int(PATIENCE.total_seconds())} if several else {},
        max_restarts=0,
        monitor_interval=0.2,
        # Ctrl-C reaches all of them from the terminal, and each ends its step.
        signals_to_handle="SIGTERM",
    )
    signal.signal(signal.SIGINT, lambda *_: None)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    where = f" on each of {launch.nodes} machines, of which this is number {launch.node}" if several else ""
    say(f"launch: {launch.processes} processes{where}")
    try:
        elastic_launch(config, sys.executable)("-c", "from tuner.cli import main; main()", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            say(f"process {rank} was ended by {name}, and so were the others; the same command continues at the last checkpoint")
            return 1
        return int(failure.exitcode)
    except SignalException:
        return 130  # and the processes, which were sent it, too, have said where they stopped
    return 0


def lost(error: BaseException) -> bool:
    """The error says that another process is gone, while this one was waiting for it."""
    said = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "remote process exited")
    return started() and any(words in str(error) for words in said)


def _interface(address: str | None) -> str:
    """The network interface that leads to the address; loopback without one."""
    import psutil

    host, _, port = (address or "127.0.0.1:1").rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect((host, int(port)))  # sends nothing
            own = sender.getsockname()[0]
    except OSError as error:
        raise RecipeError(f"launch.address: nothing leads to {host}: {error.strerror or error}") from None
    names = [name for name, found in psutil.net_if_addrs().items() if any(each.address == own for each in found)]
    return names[0] if names else "lo"


def _store() -> Any:
    """What the agents of all machines have in common, and all processes can reach."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(days=365))


_told = count()


def call(job: Job) -> None:
    """The first process asks the others to train this stage with it."""
    if started():
        assert job.parent is not None
        order = {
            "stage": job.index,
            "parent": str(job.parent.path.resolve()),
            "work": str(job.work.resolve()),
            "key": job.fingerprint,
        }
        _store().set(f"tuner/{next(_told)}", json.dumps(order))


@contextmanager
def leading() -> Iterator[None]:
    """A block in which this process, if several were started, is the first of them; after it the others are done.

    Where it ends by an error, so does this process, and whoever started it ends the others.
    """
    yield
    if started() and first():
        import torch

        _store().set(f"tuner/{next(_told)}", json.dumps({}))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in GIVEN:
            os.environ.pop(name, None)


def follow(plan: "Plan") -> None:
    """Share the training of whatever stages the first process comes to. Raises RecipeError where its files are not here."""
    store = _store()
    for number in count():
        order = json.loads(store.get(f"tuner/{number}"))
        if not order:
            return
        step = plan.steps[order["stage"]]
        with silent():
            step.stage.train(
                Job(plan.recipe, step.index, step.options, _here(order["parent"]), Path(), Path(order["work"]), order["key"])
            )


def _here(path: str) -> Bundle:
    try:
        return open_bundle(Path(path))
    except BundleError as error:
        raise RecipeError(f"{error}; machines that train together need the run's directory (--out) in common") from None

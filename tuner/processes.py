"""Starts the processes that share a recipe's training, on this machine or on several, and tells them what to train.

`tuner run` of a recipe with `launch` starts itself once for each process, by torch's elastic agent. The first of them is the run:
it makes every bundle. The others wait until it comes to a stage that trains, open the same model and the same rows, and share its
steps (tuner/parallel.py).
"""

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
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
# Until the address of node 0 is known: a scheduler starts machines one after the other.
NAME_TIMEOUT_S = 600
# From SIGTERM until what has not ended its step by then is killed; clusters are told a little more (tuner/clusters).
SHUTDOWN_TIMEOUT_S = 110
# prctl(2), PR_SET_PDEATHSIG.
DEATH_SIGNAL = 1


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

    Where one of them dies the others are ended. Ctrl-C and SIGTERM let each end its step. Raises RecipeError where there are fewer
    GPUs than processes, or nothing leads to the address.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if torch.cuda.is_available() and launch.processes > torch.cuda.device_count():
        raise RecipeError(f"launch.processes is {launch.processes}, and there are {torch.cuda.device_count()} GPUs; one each")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // launch.processes)))
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
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    where = f" on each of {launch.nodes} machines, of which this is number {launch.node}" if several else ""
    say(f"launch: {launch.processes} processes{where}")
    try:
        elastic_launch(config, sys.executable)("-P", "-c", "from tuner.cli import main; main()", *arguments)
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


def cores() -> int:
    """Those that this process may use, which a scheduler may have made fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lost(error: BaseException) -> bool:
    """The error says that another process is gone, while this one was waiting for it."""
    said = (
        "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "remote process exited",
        "Failed to recv", "Connection was likely closed", "Connection refused",
    )  # fmt: skip
    return started() and any(words in str(error) for words in said)


def _interface(address: str | None) -> str:
    """The network interface that leads to the address; loopback without one. Raises RecipeError where none does."""
    import psutil

    host, _, port = (address or "127.0.0.1:1").rpartition(":")
    until, waiting = time.monotonic() + (NAME_TIMEOUT_S if address else 0), False
    while True:
        try:
            own = _own_address(host, int(port))
            # A machine's own name is often one of loopback's addresses, where no other machine finds it.
            if own.startswith("127.") and not (host.startswith("127.") or host == "localhost"):
                own = _own_address("192.0.2.1", 1)  # no one's (RFC 5737): the way out
            break
        except OSError as error:
            if isinstance(error, socket.gaierror) and time.monotonic() < until:
                if not waiting:
                    say(f"launch: nobody knows {host} yet (launch.address); asking for {NAME_TIMEOUT_S // 60} minutes")
                waiting = True
                time.sleep(2)
                continue
            raise RecipeError(f"launch.address: nothing leads to {host}: {error.strerror or error}") from None
    names = [name for name, found in psutil.net_if_addrs().items() if any(each.address == own for each in found)]
    return names[0] if names else "lo"


def _own_address(host: str, port: int) -> str:
    """Of this machine, on the way to another. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect((host, port))  # sends nothing
        return str(sender.getsockname()[0])


def _store() -> Any:
    """What the agents of all machines have in common, and all processes can reach."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=PATIENCE)


_told = count()


def join() -> None:
    """What a process does that was started as one of several: it ends with whoever started it, and has a GPU of its own."""
    import torch

    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def call(job: Job) -> None:
    """The first process asks the others to train this stage with it."""
    if started():
        assert job.parent is not None
        paths = {"parent": str(job.parent.path.resolve()), "work": str(job.work.resolve())}
        _store().set(f"tuner/{next(_told)}", json.dumps({"stage": job.index, "key": job.fingerprint, **paths}))


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
        # Whoever starts others from here, such as an engine, does not hand on that they would be one of several.
        given = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
        for name in [each for each in os.environ if each in given or each.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))]:
            del os.environ[name]


@contextmanager
def sharing() -> Iterator[None]:
    """A block in which the processes compute at the same time; outside it the first one has all the cores to itself."""
    import torch

    if not started():
        yield
        return
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    yield
    torch.set_num_threads(cores())


def follow(plan: "Plan") -> None:
    """Share the training of whatever stages the first process comes to.

    Raises RecipeError where its files are not here, or this process reads another recipe or other rows than the first.
    """
    from tuner.run import stage_fingerprint

    store = _store()
    for turn in count():
        while not store.check([f"tuner/{turn}"]):
            time.sleep(0.1)  # and not in the store's own wait, in which no signal is heard
        order = json.loads(store.get(f"tuner/{turn}"))
        if not order:
            return
        step, parent = plan.steps[order["stage"]], _here(order["parent"])
        if stage_fingerprint(plan, step, parent) != order["key"]:
            where = f"process {os.environ['RANK']} on {socket.gethostname()}"
            raise RecipeError(f"{where} reads another recipe or other rows for stage {step.name} than the first process does")
        with silent():
            step.stage.train(Job(plan.recipe, step.index, step.options, parent, Path(), Path(order["work"]), order["key"]))


def _here(path: str) -> Bundle:
    try:
        return open_bundle(Path(path))
    except BundleError as error:
        raise RecipeError(f"{error}; machines that train together need the run's directory (--out) in common") from None

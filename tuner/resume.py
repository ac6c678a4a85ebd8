"""The state of training on the disk: whole or not there, and everything that the next step depends on."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tuner.bundle import fsync, write_json
from tuner.errors import disk_errors
from tuner.parallel import part_of, whole

BEST = "best.safetensors"


def save(work: Path, trained: dict[str, nn.Parameter], optimizer: Any, state: dict[str, Any], *, writes: bool = True) -> None:
    """Write a checkpoint into `work`, replacing the last one only once this one is whole. Raises DiskFull.

    Of weights that are split among processes every process has to call this, and one `writes`.
    """
    target = work / f"step-{state['step']:08d}"
    partial = work / "partial"
    values, tensors, numbers = _values(trained, writes=writes), {}, {}
    seen: set[int] = set()
    for name, value in _flat(optimizer.state_dict()["state"]):
        if isinstance(value, torch.Tensor):
            found = _kept(value, writes=writes)
            if found is not None:  # bitsandbytes shares some among parameters, and a file holds each once
                tensors[name] = found.clone() if found.data_ptr() in seen else found
                seen.add(found.data_ptr())
        else:
            numbers[name] = value
    if not writes:
        return
    with disk_errors(work):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(values, partial / "trained.safetensors")
        generators = {"random.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators |= {f"random.cuda{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
        save_file({**tensors, **generators}, partial / "optimizer.safetensors")
        write_json(partial / "state.json", {**state, "optimizer": numbers})
        for file in partial.iterdir():
            fsync(file)
        partial.rename(target)
    for old in work.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def counters(work: Path) -> dict[str, Any] | None:
    """What the newest checkpoint in `work` counts, if there is one."""
    found = sorted(work.glob("step-*"))
    state: dict[str, Any] | None = json.loads((found[-1] / "state.json").read_text()) if found else None
    return state


def load(work: Path, trained: dict[str, nn.Parameter], optimizer: Any) -> dict[str, Any] | None:
    """Load the newest checkpoint in `work`, if there is one, and return its counters."""
    found = sorted(work.glob("step-*"))
    state = counters(work)
    if state is None:
        return None
    _set(trained, load_file(found[-1] / "trained.safetensors"))
    tensors = load_file(found[-1] / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("random.cpu"))
    for name in sorted(name for name in tensors if name.startswith("random.cuda")):
        state_of, index = tensors.pop(name), int(name.removeprefix("random.cuda"))
        if index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state_of, index)
    entries: dict[int, Any] = {}
    parameters = list(trained.values())
    for name, value in {**tensors, **state.pop("optimizer")}.items():
        index, *way, key = name.split(".")
        entry = entries.setdefault(int(index), {})
        for part in way:
            entry = entry.setdefault(part, {})
        like = parameters[int(index)]
        same = isinstance(value, torch.Tensor) and value.shape == like.shape
        entry[key] = part_of(value, like) if same else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
    return state


def save_best(work: Path, trained: dict[str, nn.Parameter], *, writes: bool = True) -> None:
    """Keep the weights as they are now, beside the checkpoints; all processes call this, and one `writes`. Raises DiskFull."""
    values = _values(trained, writes=writes)
    if not writes:
        return
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        save_file(values, work / f"{BEST}.part")
        fsync(work / f"{BEST}.part")
        (work / f"{BEST}.part").replace(work / BEST)


def load_best(work: Path, trained: dict[str, nn.Parameter]) -> None:
    """The weights that were kept as the best."""
    _set(trained, load_file(work / BEST))


def _flat(tree: dict[Any, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """`0.exp_avg` and so on; bitsandbytes nests some of its state once more."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name}{key}.")
        else:
            yield f"{name}{key}", value


def _values(trained: dict[str, nn.Parameter], *, writes: bool) -> dict[str, torch.Tensor]:
    found = {name: _kept(parameter, writes=writes) for name, parameter in trained.items()}
    return {name: value for name, value in found.items() if value is not None}


def _kept(tensor: torch.Tensor, *, writes: bool) -> torch.Tensor | None:
    """All of the tensor for whoever writes it. What had to be gathered is in the processor's memory, one at a time."""
    value = whole(tensor)
    if not writes:
        return None
    return (value.detach() if value is tensor else value.detach().cpu()).contiguous()


def _set(trained: dict[str, nn.Parameter], saved: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(part_of(saved[name], parameter))

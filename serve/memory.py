"""Whether the engines that are to start fit into the memory of this machine, asked before the first of them does."""

import json
from pathlib import Path
from typing import Any

import psutil

from serve import engines
from serve.errors import ServeError
from tuner.bundle import Bundle

# Left to the endpoint itself, the page cache and whoever else is there.
SPARE_BYTES = 500_000_000


def require_room(starting: list[Any]) -> None:
    """Raises ServeError, with what each needs, where these engines together need more than is free."""
    needs = {engine: engines.load(engine.kind).memory_bytes(engine.model, engine.adapters) for engine in starting}
    free = available_bytes() - SPARE_BYTES
    if sum(needs.values()) > free:
        each = ", ".join(f"{engine.name} {need / 1e9:.1f} GB" for engine, need in needs.items())
        raise ServeError(
            f"{sum(needs.values()) / 1e9:.1f} GB of memory would be needed ({each}), and {max(free, 0) / 1e9:.1f} GB are free; "
            "serve fewer at once, or set VLLM_CPU_KVCACHE_SPACE to a smaller number of GiB"
        )


def available_bytes() -> int:
    """What a new process can have: the machine's, or less where a container has a limit."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        kept = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return min(free, limit - used + int(kept.get("inactive_file", 0)))


def weights_bytes(bundle: Bundle, bytes_per_weight: float | None = None) -> int:
    """The bundle's weights as they are stored, or with so many bytes for each."""
    stored = sum(facts["size_bytes"] for name, facts in bundle.manifest.files.items() if name.endswith(".safetensors"))
    if bytes_per_weight is None or bundle.manifest.kind == "quantized":
        return int(stored)
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    kept = sizes.get(_stored_as(bundle), 4)
    return int(stored * bytes_per_weight / kept)


def _stored_as(bundle: Bundle) -> str:
    try:
        config = json.loads((bundle.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "float32"
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")

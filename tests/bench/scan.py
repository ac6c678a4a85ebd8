"""`python -m tests.bench.scan`: forward and backward of Mamba-1 with each scan that there is, beside a GPT-2 of that size.

4 x 512 tokens, hidden 256, 8 layers, float32; medians of three rounds, all of them in each round. Then one row of more and more
tokens: a scan that is linear takes the same time for each. `pip install --no-deps mambapy` adds that one.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.models.mamba import modeling_mamba

from tests.bench.__main__ import hardware
from tuner import scan

ROUNDS = 3
VOCABULARY = 4096


def mamba(**config: Any) -> Any:
    """A new Mamba of the size that is compared."""
    torch.manual_seed(0)
    made = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=8, use_cache=False, **config)
    return transformers.MambaForCausalLM(made).train()


def gpt2() -> Any:
    """A new GPT-2 of that size."""
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=256, n_layer=8, n_head=4, n_positions=512, use_cache=False)
    return transformers.GPT2LMHeadModel(config).train()


def seconds(model: Any, rows: int, length: int) -> tuple[float, float]:
    """(CPU seconds of all threads, seconds on the clock) of one forward and backward pass."""
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    cpu, clock = time.process_time(), time.monotonic()
    model(input_ids=ids, labels=ids).loss.backward()
    return time.process_time() - cpu, time.monotonic() - clock


def unbinding(u_BDT: Any, delta_BDT: Any, A_DN: Any, B_BTN: Any, C_BTN: Any, starts_BT: Any) -> Any:
    """The plain loop over time. Taking tensors apart once keeps its backward pass linear, which transformers' own is not."""
    decay = torch.exp(delta_BDT[..., None] * A_DN[:, None]).unbind(2)
    given = (delta_BDT[..., None] * B_BTN[:, None] * u_BDT[..., None]).unbind(2)
    state, out = torch.zeros_like(given[0]), []
    for keep, new, read in zip(decay, given, C_BTN.unbind(1), strict=True):
        state = keep * state + new
        out.append((state @ read[..., None])[..., 0])
    return torch.stack(out, -1)


def main() -> None:
    """Print both tables."""
    theirs = modeling_mamba.mamba_selective_scan, modeling_mamba.causal_conv1d_fn
    model = mamba()
    scan.use(model)
    ours, compiled = (modeling_mamba.mamba_selective_scan, modeling_mamba.causal_conv1d_fn), scan.selective_scan

    def way(model: Any, functions: Any = ours, selective_scan: Any = compiled) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            modeling_mamba.mamba_selective_scan, modeling_mamba.causal_conv1d_fn = functions
            scan.selective_scan = selective_scan
            return seconds(model, 4, 512)

        return run

    ways = {
        "Mamba, compiled scan (tuner/scan.py)": way(model),
        "Mamba, a loop over unbound tensors": way(model, selective_scan=unbinding),
    }
    if transformers.utils.import_utils.is_mambapy_available():
        ways["Mamba, mambapy"] = way(mamba(use_mambapy=True), theirs)
    else:
        print("mambapy is not installed and not compared", file=sys.stderr)
    ways["GPT-2"] = way(gpt2())
    for each in ways.values():
        each()  # what is compiled or allocated once
    found = [{name: run() for name, run in ways.items()} for _ in range(ROUNDS)]
    print(f"{hardware()}, {torch.get_num_threads()} threads; forward and backward of 4 x 512 tokens, hidden 256, 8 layers\n")
    print("| | CPU seconds | seconds |\n|---|---|---|")
    for name in ways:
        cpu, clock = (statistics.median(each[name][at] for each in found) for at in (0, 1))
        print(f"| {name} | {cpu:.2f} | {clock:.2f} |")
    print("\n| tokens in one row | CPU seconds | microseconds a token |\n|---|---|---|")
    modeling_mamba.mamba_selective_scan, modeling_mamba.causal_conv1d_fn = ours
    scan.selective_scan = compiled
    lengths = [512, 1024, 2048, 4096]
    found_by_length = [{length: seconds(model, 1, length)[0] for length in lengths} for _ in range(ROUNDS)]
    for length in lengths:
        cpu = statistics.median(each[length] for each in found_by_length)
        print(f"| {length} | {cpu:.2f} | {1e6 * cpu / length:.0f} |")


if __name__ == "__main__":
    main()

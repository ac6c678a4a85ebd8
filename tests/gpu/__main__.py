"""`python -m tests.gpu` checks and measures training on one GPU, beside TRL in the same process; prints a table in Markdown.

Checked: a recipe run on the GPU and on the CPU ends at the same held-out loss, with float32, bfloat16 and 4-bit weights, and with Mamba-2.
Measured: LoRA and QLoRA of a Llama of 1.2 billion random weights, and LoRA of a Mamba-2 of 1.3, on rows of 2,048 tokens; Mamba-2 with
fused kernels where mamba_ssm and causal_conv1d are installed, else without. `--toy` does the same at a size for a CPU.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from tuner import budget, fused, kinds, scan
from tuner.bundle import Bundle
from tuner.checkpoint import device, open_base
from tuner.data.example import Example, Packed
from tuner.families import family_of
from tuner.fit import Schedule, fit
from tuner.footprint import Footprint
from tuner.source import base_bundle, find

# Losses of ten steps of the small case, on the GPU and on the CPU (nats): sums in another order, in float32 and in the 8 bits of bfloat16.
SAME = {"fp32": 2.0e-3, "bf16": 2.0e-2, "nf4": 5.0e-2}
# Mamba-2's kernels multiply float32 in TF32, whose 10 bits are nearer to bfloat16's.
SAME_FUSED = 2.0e-2


@dataclass(frozen=True)
class Size:
    """What is measured: the shape of a model, rows a step, tokens a row, tokens of a packed document, steps."""

    config: dict[str, Any]
    rows: int
    length: int
    document: int
    steps: int
    matrix: int


LARGE = Size(
    {
        "model_type": "llama",
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    rows=4, length=2048, document=256, steps=10, matrix=8192,
)  # fmt: skip
# state-spaces/mamba2-1.3b (Dao and Gu 2024, arXiv:2405.21060).
LARGE_MAMBA = Size(
    {
        "model_type": "mamba2", "hidden_size": 2048, "num_hidden_layers": 48, "state_size": 128, "head_dim": 64, "num_heads": 64,
        "expand": 2, "n_groups": 1, "chunk_size": 256, "vocab_size": 50_288, "tie_word_embeddings": True,
    },
    rows=4, length=2048, document=256, steps=10, matrix=8192,
)  # fmt: skip
TUNE = {"task": {"kind": "sft", "max_tokens": 64}, "steps": 10, "learning_rate": 1.0e-2}
TOY = Size(
    {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256, "tie_word_embeddings": True,
    },
    rows=2, length=64, document=16, steps=2, matrix=256,
)  # fmt: skip
TOY_MAMBA = Size(
    {
        "model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "head_dim": 16, "num_heads": 8,
        "expand": 2, "n_groups": 1, "chunk_size": 32, "vocab_size": 512, "tie_word_embeddings": True,
    },
    rows=2, length=64, document=16, steps=2, matrix=256,
)  # fmt: skip


def matrix_rate(size: int) -> float:
    """Operations a second of a bfloat16 product of square matrices, the median of ten."""
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device()) for _ in range(2))
    took = []
    for _ in range(13):
        wait()
        start = time.perf_counter()
        _ = left @ right
        wait()
        took.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(took[3:])[5]


def wait() -> None:
    """Until what the GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def checkpoint(size: Size, folder: Path) -> Bundle:
    """A model of this shape with random weights, and a tokenizer that nothing here reads."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = folder / size.config["model_type"]
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**size.config), dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder / "model")
    return base_bundle(find(str(folder / "model")), folder)


def ids(size: Size, seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(2, size.config["vocab_size"]) for _ in range(length)]


def ours(
    size: Size,
    base: Bundle,
    folder: Path,
    storage: str,
    *,
    packed: bool = False,
    again: bool = False,
    compiled: bool = False,
    profiled: bool = False,
) -> tuple[float, float, float]:
    """(tokens/s, peak bytes, bytes told from shapes before) of our loop."""
    lora, task = kinds.load("methods", "lora"), kinds.load("tasks", "pretrain")
    family, architecture = family_of(size.config["model_type"])
    model, fresh = open_base(base, "causal", {}, storage)
    for line in scan.paths(model, architecture.kernels):
        print(line, file=sys.stderr)
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options = lora.Options(rank=16, storage=storage)
    model = lora.prepare(model, options, family, architecture, fresh)
    count = size.rows * size.steps
    if packed:
        number = size.length // size.document
        documents = [[ids(size, 1000 * row + at, size.document) for at in range(number)] for row in range(count)]
        rows: list[Any] = [Packed([Example(each, each) for each in row]) for row in documents]
    else:
        rows = [Example(each, each) for each in (ids(size, seed, size.length) for seed in range(count))]
    objective = task.objective(model, _Pad, task.Options())
    told: dict[str, Any] = {
        "batch_size": size.rows, "micro_batch_size": size.rows, "learning_rate": 1e-4, "warmup_fraction": 0.0, "decay": "constant",
        "weight_decay": 0.0, "max_grad_norm": 1.0, "checkpoint_every_steps": 10_000, "seed": 0,
    }  # fmt: skip

    def run(steps: int, place: str) -> Any:
        fresh_peak()
        work = Path(tempfile.mkdtemp(prefix=place, dir=folder))
        with fused.compiled(model) if compiled else nullcontext():
            return fit(objective, rows, Schedule(steps=steps, **told), layers=lora.layers(model), work=work)

    run(2, "warm")
    if profiled:
        with torch.profiler.profile() as profile:
            run(2, "profiled")
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=70), file=sys.stderr)
    sizes = Footprint(AutoConfig.from_pretrained(base.path), "causal", options, gradient_checkpointing=again)
    told_bytes = sizes.weights + budget.learning(
        sizes, task.Options(), budget.batch_of(task.Options(), rows[: size.rows]), more=False
    )
    return run(size.steps, "run")["tokens_per_s"], peak(), told_bytes


class _Pad:
    pad_token_id = 1


def trl(size: Size, base: Bundle, folder: Path, storage: str, *, again: bool = False) -> tuple[float, float, None]:
    """(tokens/s, peak bytes, nothing) of TRL's trainer with the same model, rows and adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    options: dict[str, Any] = {}
    if storage == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16, device_map={"": device()}, **options)
    data = Dataset.from_list([{"input_ids": ids(size, seed, size.length)} for seed in range(size.rows * (size.steps + 2))])
    clock: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()
            if len(clock) == 2:
                fresh_peak()
            clock.append(time.perf_counter())

    config = SFTConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=size.rows, max_steps=size.steps + 2, learning_rate=1e-4,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), max_length=size.length, gradient_checkpointing=again,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tokenizer.pad_token = tokenizer.eos_token
    adapter = LoraConfig(
        r=16, lora_alpha=32, target_modules=sorted(family_of(size.config["model_type"])[1].linears), task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=adapter, callbacks=[Clock()]
    )
    with redirect_stdout(sys.stderr):
        trainer.train()
    wait()
    clock.append(time.perf_counter())
    return size.rows * size.length * size.steps / (clock[-1] - clock[2]), peak(), None


def fresh_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    """Bytes of the GPU that were held at a time; nothing is known of a CPU here, where both share one process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else float("nan")


def work_of_a_token(size: Size) -> float:
    """Operations of LoRA's forward and backward pass through frozen weights: two products each, output layer included."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**size.config))
    return 4.0 * sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


def same_losses(folder: Path, cases: list[tuple[str, Size, float]]) -> int:
    """Print the held-out loss of a recipe that `tuner run` ran on this device and on the CPU, for (storage, model, how far apart they may
    be); how many are farther apart."""
    draw = random.Random(0)
    sums = [(draw.randrange(100), draw.randrange(100)) for _ in range(600)]
    lines = [json.dumps({"prompt": f"{a} + {b} = ", "completion": str(a + b)}) for a, b in sums]
    (folder / "train.jsonl").write_text("\n".join(lines[:500]))
    (folder / "heldout.jsonl").write_text("\n".join(lines[500:]))
    failed = 0
    print("| weights | held-out loss here | on the CPU | apart, allowed |\n|---|---|---|---|")
    for storage, size, allowed in cases:
        losses, title = [], f"{size.config['model_type']}, {storage}"
        for place, hidden in (("here", None), ("cpu", "")):
            out = folder / f"{size.config['model_type']}-{storage}-{place}"
            recipe = {
                "data": {"train": "train.jsonl", "heldout": "heldout.jsonl", "on_bad_row": "skip"},
                "stages": [
                    {"tokenizer": {"vocab_size": 300}},
                    {
                        "init": {
                            "config": {key: value for key, value in size.config.items() if key != "vocab_size"},
                        }
                    },
                    {"tune": TUNE | {"method": {"kind": "lora", "storage": storage}}},
                ],
                "evaluate": {"rows": 1},
            }
            (folder / "recipe.yaml").write_text(json.dumps(recipe))
            environment = {**os.environ, **({} if hidden is None else {"CUDA_VISIBLE_DEVICES": hidden})}
            command = [
                sys.executable,
                "-c",
                "from tuner.cli import main; main()",
                "run",
                str(folder / "recipe.yaml"),
                "--out",
                str(out),
            ]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{title} on {place}: {done.stderr[-3000:]}")
            losses.append(json.loads((out / "tune/bundle.json").read_text())["metrics"]["heldout_loss"])
        here, there = losses
        failed += abs(here - there) > allowed
        print(f"| {title} | {here:.5f} | {there:.5f} | {abs(here - there):.5f}, {allowed} |", flush=True)
    return failed


def adapts(size: Size, base: Bundle, folder: Path) -> bool:
    """Whether a step for which the card has too little memory is taken in parts, and ends at the same loss; says what was seen."""
    lora, task = kinds.load("methods", "lora"), kinds.load("tasks", "pretrain")
    rows = [Example(each, each) for each in (ids(size, seed, size.length) for seed in range(2 * size.rows))]
    schedule = Schedule(
        steps=2, batch_size=size.rows, micro_batch_size=size.rows, learning_rate=1e-4, warmup_fraction=0.0, decay="constant",
        weight_decay=0.0, max_grad_norm=1.0, checkpoint_every_steps=10_000, seed=0,
    )  # fmt: skip
    found, share = [], 1.0
    for place in ("whole", "parts"):
        torch.manual_seed(0)
        model, fresh = open_base(base, "causal", {}, "bf16")
        model = lora.prepare(model, lora.Options(rank=16), *family_of("llama"), fresh)
        objective = task.objective(model, _Pad, task.Options())
        torch.cuda.empty_cache()
        fresh_peak()
        torch.cuda.set_per_process_memory_fraction(share)
        found.append(fit(objective, rows, schedule, layers=lora.layers(model), work=folder / place))
        share = 0.75 * peak() / torch.cuda.get_device_properties(0).total_memory
        del model, objective
        gc.collect()
    torch.cuda.set_per_process_memory_fraction(1.0)
    whole, parts = found
    apart = abs(whole["train_loss_last"] - parts["train_loss_last"])
    print(
        f"\nwith three quarters of the memory that {whole['micro_batch_size']} rows take, {parts['micro_batch_size']} were taken at a "
        f"time, and the loss was {apart:.4f} apart"
    )
    return parts["micro_batch_size"] < whole["micro_batch_size"] and apart < SAME["bf16"]


def main(arguments: list[str]) -> int:
    """Check, measure, print; 1 where the GPU does not learn what the CPU does."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--profile", action="store_true", help="where two steps of ours spend their time, on standard error")
    told = parser.parse_args(arguments)
    size = TOY if told.toy else LARGE
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    import peft
    import transformers

    print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}\n")
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if told.only in ("", "losses"):
            failed += same_losses(folder, [(storage, TOY, allowed) for storage, allowed in SAME.items()])
        if told.only in ("", "memory") and torch.cuda.is_available():
            failed += not adapts(size, checkpoint(size, folder), folder)
        if told.only in ("", "speed"):
            speed(size, llamas(size, checkpoint(size, folder), folder, profiled=told.profile))
        if told.only in ("", "mamba"):
            failed += same_losses(folder, [("fp32", TOY_MAMBA, SAME_FUSED if has_kernels() else SAME["fp32"])])
            states = TOY_MAMBA if told.toy else LARGE_MAMBA
            speed(states, mambas(states, checkpoint(states, folder), folder, profiled=told.profile))
    return int(failed > 0)


# A row's title, and what measures it: (tokens/s, peak bytes, bytes told from shapes before).
Job = tuple[str, Callable[[], tuple[float, float, float | None]]]


def llamas(size: Size, base: Bundle, folder: Path, *, profiled: bool) -> list[Job]:
    """LoRA and QLoRA beside TRL; compiled; packed."""
    own, peer = partial(ours, size, base, folder), partial(trl, size, base, folder)
    jobs: list[Job] = []
    for storage, kind in (("bf16", "LoRA"), ("nf4", "QLoRA")):
        jobs += [
            (f"{kind}, Tuner", partial(own, storage, profiled=profiled)),
            (f"{kind}, TRL", partial(peer, storage)),
            (f"{kind}, Tuner, gradient checkpointing", partial(own, storage, again=True)),
            (f"{kind}, TRL, gradient checkpointing", partial(peer, storage, again=True)),
        ]
    for storage, kind in (("bf16", "LoRA"), ("nf4", "QLoRA")):
        jobs.append((f"{kind}, Tuner, compile", partial(own, storage, compiled=True, profiled=profiled)))
    return [*jobs, (f"LoRA, Tuner, packed documents of {size.document}", partial(own, "bf16", packed=True))]


def has_kernels() -> bool:
    """Whether Mamba-2's packages are there."""
    return all(scan.installed(name) for name in family_of("mamba2")[1].kernels)


def mambas(size: Size, base: Bundle, folder: Path, *, profiled: bool) -> list[Job]:
    """TRL first: once ours has opened a model, transformers' module scans with ours in this process."""
    own, peer = partial(ours, size, base, folder, "bf16"), partial(trl, size, base, folder, "bf16")
    title = f"Mamba-2, {'fused kernels' if has_kernels() else 'no fused kernels'}"
    return [
        (f"{title}, TRL", peer),
        (f"{title}, TRL, gradient checkpointing", partial(peer, again=True)),
        (f"{title}, Tuner", partial(own, profiled=profiled)),
        (f"{title}, Tuner, gradient checkpointing", partial(own, again=True)),
    ]


def speed(size: Size, jobs: list[Job]) -> None:
    """Print the table of tokens/s and memory."""
    rate = matrix_rate(size.matrix)
    print(f"\nbfloat16 products of {size.matrix} x {size.matrix}: {rate / 1e12:.0f} TFLOP/s")
    print(f"{size.rows} rows of {size.length} tokens a step, {size.steps} steps after 2 that do not count\n")
    print("| job | tokens/s | of the products' rate | peak memory, GB | told from shapes |\n|---|---|---|---|---|")
    for title, job in jobs:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            tokens, held, shapes = job()
        except torch.OutOfMemoryError:
            print(f"| {title} | out of memory | | | |", flush=True)
            continue
        foretold = "" if shapes is None else f"{shapes / 1e9:.2f}"
        share = tokens * work_of_a_token(size) / rate
        print(f"| {title} | {tokens:,.0f} | {share:.1%} | {held / 1e9:.2f} | {foretold} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

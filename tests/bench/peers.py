"""`python -m tests.bench.peers`: training beside TRL on the same rows, in turns, as a Markdown table.

Both learn from the same tokens in as many optimizer steps, each in a process of its own. Non-pad tokens of the rows for each second of
the training loop are counted by one function for both, held-out loss is measured by one evaluator, and memory is what the kernel says of the
process while it trains. `python -m tests.bench.peers sft --runs 3 --steps 40` takes the jobs whose names contain that.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.__main__ import DATA, LLAMA, hardware
from tuner.bundle import Bundle, open_bundle
from tuner.source import base_bundle, find

BATCH, RANK, RATE = 4, 16, 1.0e-3


@dataclass(frozen=True)
class Job:
    """What is learned: words a chat, how weights are kept, tokens of a packed row."""

    words: tuple[int, int]
    """Least and most definitions in a chat."""
    storage: str = "bf16"
    packed: int | None = None
    steps: int = 25


JOBS = {
    "sft": Job((2, 4), steps=25),
    "sft-packed": Job((2, 4), packed=512, steps=6),
    "sft-qlora": Job((2, 4), storage="nf4", steps=20),
    "sft-long": Job((40, 80), steps=2),
}


def chats(job: Job, name: str, count: int) -> list[dict[str, Any]]:
    """Conversations in which words of WordNet are asked and defined."""
    lines = [json.loads(line) for line in (DATA / f"wordnet/definitions/{name}.jsonl").read_text().splitlines()]
    draw = random.Random(0)
    found, at = [], 0
    for _ in range(count):
        some = [lines[(at + number) % len(lines)] for number in range(draw.randint(*job.words))]
        at += len(some)
        turns = [(("user", f'What does "{each["prompt"]}" mean?'), ("assistant", each["completion"])) for each in some]
        found.append({"messages": [{"role": role, "content": text} for turn in turns for role, text in turn]})
    return found


def encoded(job: Job, base: Bundle, name: str, count: int) -> list[Any]:
    """The chats as our task encodes them, for both."""
    from tuner import kinds
    from tuner.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(base.path)
    return [kinds.load("tasks", "sft").encode(chat, tokenizer) for chat in chats(job, name, count)]


def rows_of(job: Job, base: Bundle) -> list[Any]:
    """Enough examples for all steps."""
    count = job.steps * BATCH
    if job.packed is None:
        return encoded(job, base, "train", count)
    examples = encoded(job, base, "train", count * 8)
    kept, tokens = [], 0
    for example in examples:
        tokens += len(example.ids)
        if tokens > 0.97 * count * job.packed:
            break
        kept.append(example)
    return kept


def ours(job: Job, base: Bundle, folder: Path) -> dict[str, Any]:
    """Train by our loop; tokens, seconds and peak bytes."""
    import torch

    from tuner import kinds
    from tuner.checkpoint import load_tokenizer, open_base
    from tuner.data.packing import PackedRows
    from tuner.families import family_of
    from tuner.fit import Schedule, fit

    examples = rows_of(job, base)
    task, method = kinds.load("tasks", "sft"), kinds.load("methods", "lora")
    torch.manual_seed(0)
    model, fresh = open_base(base, "causal", {}, job.storage)
    model = method.prepare(model, method.Options(rank=RANK, storage=job.storage), *family_of("llama"), fresh)
    objective = task.objective(model, load_tokenizer(base.path), task.Options())
    rows: Any = PackedRows(examples, job.packed) if job.packed else examples
    schedule = Schedule(
        steps=job.steps, batch_size=BATCH, micro_batch_size=BATCH, learning_rate=RATE, warmup_fraction=0.0, decay="constant",
        weight_decay=0.0, max_grad_norm=1.0, checkpoint_every_steps=10_000, seed=0,
    )  # fmt: skip
    measured = fit(objective, rows, schedule, layers=method.layers(model), work=folder / "work")
    method.save(model, folder / "adapter")
    return {
        "seconds": measured["seconds"],
        "tokens": sum(len(each.ids) for each in examples),
        "peak": measured["peak_memory_bytes"],
    }


def trl(job: Job, base: Bundle, folder: Path) -> dict[str, Any]:
    """Train by TRL's trainer; tokens, seconds and peak bytes."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from tuner.memory import peak

    examples = rows_of(job, base)
    options: dict[str, Any] = {}
    if job.storage == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16, **options)
    data = Dataset.from_list([{"input_ids": each.ids, "labels": each.labels} for each in examples])
    clock: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

    config = SFTConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=BATCH, max_steps=job.steps, learning_rate=RATE, use_cpu=True,
        bf16=False, max_length=job.packed or 4096, packing=job.packed is not None, gradient_checkpointing=False, logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True, lr_scheduler_type="constant", max_grad_norm=1.0, seed=0,
    )  # fmt: skip
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(base.path),
        peft_config=adapter, callbacks=[Clock()],
    )  # fmt: skip
    with peak() as most:
        trainer.train()
        held = most()
    trainer.model.save_pretrained(folder / "adapter")
    return {"seconds": clock[1] - clock[0], "tokens": sum(len(each.ids) for each in examples), "peak": held}


def heldout(job: Job, base: Bundle, adapter: Path) -> float:
    """The held-out loss (nats a token) of an adapter on the base in float32, by our evaluator."""
    from peft import PeftModel

    from tuner import kinds
    from tuner.checkpoint import load_model, load_tokenizer
    from tuner.objective import heldout_loss

    model = PeftModel.from_pretrained(load_model(base), adapter).eval()
    task = kinds.load("tasks", "sft")
    objective = task.objective(model, load_tokenizer(base.path), task.Options())
    return float(heldout_loss(objective, encoded(job, base, "heldout", 48 if job.words[1] < 10 else 4))["heldout_loss"])


SIDES = {"Tuner": ours, "TRL": trl}


def one(side: str, name: str, steps: int | None, base: str, folder: str) -> None:
    """A process of its own: one side trains one job once, and its result is printed."""
    job = _job(name, steps)
    found = SIDES[side](job, open_bundle(Path(base)), Path(folder))
    print(json.dumps(found))


def _job(name: str, steps: int | None) -> Job:
    from dataclasses import replace

    return JOBS[name] if steps is None else replace(JOBS[name], steps=steps)


def main(arguments: list[str]) -> None:
    """Run the jobs, the sides in turns."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers")
    parser.add_argument("wanted", nargs="?", default="")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int)
    told = parser.parse_args(arguments)
    print(
        f"{hardware()}; SmolLM2-135M, bfloat16, rank {RANK} on all linears, {BATCH} rows a step; median of {told.runs} runs in turns\n"
    )
    print(
        "| job | tokens/s, Tuner | TRL | ratio | peak memory, Tuner | TRL | held-out loss, Tuner | TRL |\n|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = base_bundle(find(LLAMA), folder / "base")
        for name in JOBS:
            if told.wanted not in name:
                continue
            job = _job(name, told.steps)
            speed: dict[str, list[float]] = {side: [] for side in SIDES}
            held: dict[str, list[float]] = {side: [] for side in SIDES}
            loss: dict[str, float] = {}
            for run in range(told.runs):
                for side in SIDES:
                    out = folder / f"{name}-{side}-{run}"
                    out.mkdir()
                    given = f"from tests.bench.peers import one; one({side!r}, {name!r}, {told.steps!r}, {str(base.path)!r}, {str(out)!r})"
                    done = subprocess.run(
                        [sys.executable, "-c", given], env=environment(), capture_output=True, text=True, check=False
                    )
                    if done.returncode:
                        raise SystemExit(f"{name}, {side}: {done.stderr[-3000:]}")
                    found = json.loads(done.stdout.splitlines()[-1])
                    speed[side].append(found["tokens"] / found["seconds"])
                    held[side].append(found["peak"])
                    if not run:
                        loss[side] = heldout(job, base, out / "adapter")
            own, peer = (statistics.median(speed[side]) for side in SIDES)
            memory = [f"{statistics.median(held[side]) / 1e9:.2f} GB" for side in SIDES]
            losses = " | ".join(f"{loss[side]:.4f}" for side in SIDES)
            print(f"| {name} | {own:.0f} | {peer:.0f} | {own / peer:.2f} | {' | '.join(memory)} | {losses} |", flush=True)


def environment() -> dict[str, str]:
    """Threads that wait do not spin, for both; what else ours sets it sets itself in `tuner.cli`, so it is set for both here."""
    return {**os.environ, "OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1", "TQDM_DISABLE": "1"}


if __name__ == "__main__":
    main(sys.argv[1:])

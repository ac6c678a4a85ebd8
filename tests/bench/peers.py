"""`python -m tests.bench.peers`: training beside TRL and transformers' Trainer on the same rows, in turns, as a Markdown table.

Both sides learn from the same tokens in as many optimizer steps, each in a process of its own. Non-pad tokens of the rows for each second
of the training loop are counted by one function for both, what was learned is measured by one evaluator, and memory is what the kernel says
of the process while it trains. What `tuner` sets for itself of threads and memory is set for the peer, too; once it runs as it comes.
Of jobs that are not as many times as fast as asked, or hold more than half of the memory, the profile of our side is printed below.
`python -m tests.bench.peers chat --runs 1` takes the jobs whose names contain that.
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
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.bench.__main__ import BERT, DATA, LLAMA, NEW, hardware
from tests.bench.profile import profiled
from tuner.bundle import Bundle, open_bundle
from tuner.memory import COMPILED, SPIN, large_apart
from tuner.source import base_bundle, find

RANK, SEED = 16, 0
# What `tuner` sets for itself: threads that wait sleep soon, large tensors lie in large pages, few compiled products are kept.
SET = {**COMPILED, **SPIN, "OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1"}


@dataclass(frozen=True)
class Chats:
    """SmolLM2 learns definitions by an adapter on all linears."""

    definitions: tuple[int, int]
    """Least and most in a chat."""
    steps: int
    storage: str = "bf16"
    packed: int | None = None
    """Tokens of a row with several chats."""
    batch: int = 4
    rate: float = 1.0e-3
    model: str = LLAMA
    peer: str = "TRL"

    def rows(self, base: Bundle, name: str, count: int) -> list[Any]:
        """So many chats in which words of WordNet are asked and defined, as our task encodes them, for both sides."""
        from tuner import kinds
        from tuner.checkpoint import load_tokenizer

        lines = [json.loads(line) for line in (DATA / f"wordnet/definitions/{name}.jsonl").read_text().splitlines()]
        draw, at, found = random.Random(SEED), 0, []
        task, tokenizer = kinds.load("tasks", "sft"), load_tokenizer(base.path)
        for _ in range(count):
            some = [lines[(at + number) % len(lines)] for number in range(draw.randint(*self.definitions))]
            at += len(some)
            turns = [(("user", f'What does "{each["prompt"]}" mean?'), ("assistant", each["completion"])) for each in some]
            messages = [{"role": role, "content": text} for turn in turns for role, text in turn]
            found.append(task.encode({"messages": messages}, tokenizer))
        return found

    def trained(self, base: Bundle) -> list[Any]:
        """Rows for all steps."""
        count = self.steps * self.batch
        if self.packed is None:
            return self.rows(base, "train", count)
        kept, room = [], 0.94 * count * self.packed
        for row in self.rows(base, "train", count * 8):
            room -= len(row.ids)
            if room < 0:
                break
            kept.append(row)
        return kept

    def ours(self, base: Bundle, folder: Path) -> dict[str, float]:
        """Train by our loop; tokens/s and peak bytes."""
        from tuner import kinds
        from tuner.checkpoint import load_tokenizer, open_base
        from tuner.data.packing import PackedRows
        from tuner.families import family_of

        rows, task, method = self.trained(base), kinds.load("tasks", "sft"), kinds.load("methods", "lora")
        model, fresh = open_base(base, "causal", {}, self.storage)
        model = method.prepare(model, method.Options(rank=RANK, storage=self.storage), *family_of("llama"), fresh)
        objective = task.objective(model, load_tokenizer(base.path), task.Options())
        measured = fitted(
            self, objective, PackedRows(Listed(rows), self.packed) if self.packed else rows, method.layers(model), folder
        )
        if measured["tokens"] != tokens(rows):
            raise SystemExit(f"meant were {tokens(rows)} tokens, and {measured['tokens']} were trained on; change the steps")
        method.save(model, folder / "model")
        return {"tokens_per_s": tokens(rows) / measured["seconds"], "peak": measured["peak_memory_bytes"]}

    def theirs(self, base: Bundle, folder: Path) -> dict[str, float]:
        """Train by TRL's SFTTrainer."""
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
        from trl import SFTConfig, SFTTrainer

        rows, options = self.trained(base), {}
        if self.storage == "nf4":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
            )
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16, **options)
        config = SFTConfig(
            **arguments_of(self, folder), bf16=False, gradient_checkpointing=False,
            max_length=self.packed or 4096, packing=self.packed is not None,
        )  # fmt: skip
        adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list([{"input_ids": each.ids, "labels": each.labels} for each in rows]),
            processing_class=AutoTokenizer.from_pretrained(base.path), peft_config=adapter,
        )  # fmt: skip
        if (count := len(trainer.train_dataset)) != self.steps * self.batch:
            raise SystemExit(f"TRL made {count} rows of what is meant for {self.steps} steps of {self.batch}; change the steps")
        return timed(trainer, tokens(rows), folder)

    def learned(self, base: Bundle, folder: Path) -> str:
        """Held-out loss (nats a token) of the adapter on the base in float32."""
        from peft import PeftModel

        from tuner import kinds
        from tuner.checkpoint import load_model, load_tokenizer
        from tuner.objective import heldout_loss

        model, task = PeftModel.from_pretrained(load_model(base), folder / "model").eval(), kinds.load("tasks", "sft")
        objective = task.objective(model, load_tokenizer(base.path), task.Options())
        rows = self.rows(base, "heldout", 400 // sum(self.definitions))
        return f"loss {heldout_loss(objective, rows)['heldout_loss']:.4f}"


@dataclass(frozen=True)
class Reviews:
    """all-MiniLM learns, every weight of it, which film reviews are positive; texts as long as they are, up to 256 tokens."""

    steps: int
    batch: int = 32
    rate: float = 1.0e-4
    precision: str = "fp32"
    model: str = BERT
    peer: str = "transformers' Trainer"

    def task(self) -> tuple[Any, Any]:
        """The task and its options."""
        from tuner import kinds

        task = kinds.load("tasks", "classify")
        return task, task.Options(labels=["negative", "positive"])

    def rows(self, base: Bundle, name: str, count: int) -> list[tuple[Any, Any]]:
        """So many (row, example), encoded by our task for both sides."""
        from tuner.checkpoint import load_tokenizer
        from tuner.data.rows import BadRows, OnBadRow, Row

        task, options = self.task()
        lines = (DATA / f"movie-reviews/{name}.jsonl").read_text().splitlines()[: 2 * count]
        rows = (Row(str(at), json.loads(line)) for at, line in enumerate(lines))
        bad = BadRows(OnBadRow(too_long="truncate", control="skip"))
        return list(task.examples(rows, load_tokenizer(base.path), options, bad))[:count]

    def opened(self, base: Bundle) -> Any:
        """The model with a new head; the same numbers for both sides."""
        import torch

        from tuner.checkpoint import open_base

        task, options = self.task()
        torch.manual_seed(SEED)
        return open_base(base, "sequence", {**task.head_config(options), "pad_token_id": 0}, "fp32", new_head=True)[0]

    def ours(self, base: Bundle, folder: Path) -> dict[str, float]:
        """Train by our loop; tokens/s and peak bytes."""
        from tuner import kinds
        from tuner.checkpoint import load_tokenizer

        rows = [example for _, example in self.rows(base, "train", self.steps * self.batch)]
        (task, options), method = self.task(), kinds.load("methods", "full")
        model = self.opened(base).requires_grad_(True)
        layers = {name: own for name, own in method.layers(model).items() if ".pooler" not in name}
        measured = fitted(self, task.objective(model, load_tokenizer(base.path), options), rows, layers, folder)
        model.save_pretrained(folder / "model")
        return {"tokens_per_s": tokens(rows) / measured["seconds"], "peak": measured["peak_memory_bytes"]}

    def theirs(self, base: Bundle, folder: Path) -> dict[str, float]:
        """Train by transformers' Trainer."""
        from datasets import Dataset
        from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

        rows = [example for _, example in self.rows(base, "train", self.steps * self.batch)]
        data = Dataset.from_list([{"input_ids": each.ids, "labels": int(each.target[0])} for each in rows])
        model = self.opened(base)
        model.set_attn_implementation("sdpa")  # as it comes: tuner's own is of what opens a model
        trainer = Trainer(
            model=model, args=TrainingArguments(**arguments_of(self, folder)), train_dataset=data,
            data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(base.path)),
        )  # fmt: skip
        return timed(trainer, tokens(rows), folder)

    def learned(self, base: Bundle, folder: Path) -> str:
        """Accuracy on held-out reviews."""
        from transformers import AutoModelForSequenceClassification

        task, options = self.task()
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
        return f"accuracy {task.scores(model, None, self.rows(base, 'heldout', 500), options, None)['accuracy']:.3f}"


@dataclass(frozen=True)
class Preferences:
    """SmolLM2 learns to prefer a word's own definition to another's, by DPO with an adapter on all linears."""

    steps: int
    batch: int = 4
    rate: float = 1.0e-4
    model: str = LLAMA
    peer: str = "TRL"

    def task(self) -> tuple[Any, Any]:
        """The task and its options."""
        from tuner import kinds

        task = kinds.load("tasks", "preference")
        return task, task.Options()

    def texts(self, name: str, count: int) -> list[dict[str, str]]:
        """So many questions with a better and a worse answer."""
        lines = [json.loads(line) for line in (DATA / f"wordnet/definitions/{name}.jsonl").read_text().splitlines()[: count + 1]]
        return [
            {"prompt": f"{row['prompt']} means ", "chosen": row["completion"], "rejected": other["completion"]}
            for row, other in pairwise(lines)
        ]

    def rows(self, base: Bundle, name: str, count: int) -> list[tuple[Any, Any]]:
        """The same, encoded by our task."""
        from tuner.checkpoint import load_tokenizer
        from tuner.data.rows import BadRows, Row

        task, options = self.task()
        rows = (Row(str(at), record) for at, record in enumerate(self.texts(name, count)))
        return list(task.examples(rows, load_tokenizer(base.path), options, BadRows()))

    def tokens(self, base: Bundle) -> int:
        """Of both answers with their questions."""
        rows = self.rows(base, "train", self.steps * self.batch)
        return sum(len(example.chosen.ids) + len(example.rejected.ids) for _, example in rows)

    def ours(self, base: Bundle, folder: Path) -> dict[str, float]:
        """Train by our loop; the clock runs while the answers' likelihoods before training are computed, too."""
        from tuner import kinds
        from tuner.checkpoint import load_tokenizer, open_base
        from tuner.families import family_of

        (task, options), method = self.task(), kinds.load("methods", "lora")
        model, fresh = open_base(base, "causal", {}, "bf16")
        model = method.prepare(model, method.Options(rank=RANK), *family_of("llama"), fresh)
        rows = [example for _, example in self.rows(base, "train", self.steps * self.batch)]
        start = time.perf_counter()
        measured = fitted(self, task.objective(model, load_tokenizer(base.path), options), rows, method.layers(model), folder)
        took = time.perf_counter() - start
        method.save(model, folder / "model")
        return {"tokens_per_s": self.tokens(base) / took, "peak": measured["peak_memory_bytes"]}

    def theirs(self, base: Bundle, folder: Path) -> dict[str, float]:
        """Train by TRL's DPOTrainer, whose reference is the model with its adapter off, too."""
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
        adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = DPOTrainer(
            model=model, args=DPOConfig(**arguments_of(self, folder), bf16=False, gradient_checkpointing=False, beta=0.1),
            train_dataset=Dataset.from_list(self.texts("train", self.steps * self.batch)),
            processing_class=AutoTokenizer.from_pretrained(base.path), peft_config=adapter,
        )  # fmt: skip
        return timed(trainer, self.tokens(base), folder)

    def learned(self, base: Bundle, folder: Path) -> str:
        """How much more likely the better answers have become than the worse ones (nats), and how often they are, held out."""
        from peft import PeftModel

        from tuner.checkpoint import load_model, load_tokenizer
        from tuner.recipe import Evaluate

        model, (task, options) = PeftModel.from_pretrained(load_model(base), folder / "model").eval(), self.task()
        tokenizer, rows = load_tokenizer(base.path), self.rows(base, "heldout", 100)
        examples = task.objective(model, tokenizer, options).prepared([example for _, example in rows])
        given = [(row, example) for (row, _), example in zip(rows, examples, strict=True)]
        found = task.scores(model, tokenizer, given, options, Evaluate())
        return f"margin {found['margin']:.3f}, preferred {found['preferred']:.2f}"


@dataclass(frozen=True)
class Neighbours:
    """all-MiniLM learns, every weight of it, which word a definition is of; the others of the batch are wrong ones."""

    steps: int
    batch: int = 64
    rate: float = 2.0e-5
    precision: str = "fp32"
    model: str = BERT
    peer: str = "sentence-transformers"

    def task(self) -> tuple[Any, Any]:
        """The task and its options."""
        from tuner import kinds

        task = kinds.load("tasks", "embed")
        return task, task.Options(max_tokens=64)

    def rows(self, base: Bundle, name: str, count: int) -> list[tuple[Any, Any]]:
        """So many (row, example)."""
        from tuner.checkpoint import load_tokenizer
        from tuner.data.rows import BadRows, OnBadRow, Row

        task, options = self.task()
        lines = (DATA / f"wordnet/{name}.jsonl").read_text().splitlines()[:count]
        rows = (Row(str(at), json.loads(line)) for at, line in enumerate(lines))
        return list(task.examples(rows, load_tokenizer(base.path), options, BadRows(OnBadRow(too_long="truncate"))))

    def tokens(self, base: Bundle) -> int:
        """Of definitions and words."""
        return sum(len(text) for _, example in self.rows(base, "train", self.steps * self.batch) for text in example.texts)

    def ours(self, base: Bundle, folder: Path) -> dict[str, float]:
        """Train by our loop."""
        from tuner import kinds
        from tuner.checkpoint import load_tokenizer, open_base

        (task, options), method = self.task(), kinds.load("methods", "full")
        model = open_base(base, "embedding", {}, "fp32")[0].requires_grad_(True)
        rows = [example for _, example in self.rows(base, "train", self.steps * self.batch)]
        layers = {name: own for name, own in method.layers(model).items() if "pooler" not in name}
        measured = fitted(self, task.objective(model, load_tokenizer(base.path), options), rows, layers, folder)
        model.save_pretrained(folder / "model")
        return {"tokens_per_s": self.tokens(base) / measured["seconds"], "peak": measured["peak_memory_bytes"]}

    def theirs(self, base: Bundle, folder: Path) -> dict[str, float]:
        """Train by sentence-transformers' trainer with the loss that ours is (in-batch negatives, scale 20)."""
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from sentence_transformers.losses import MultipleNegativesRankingLoss

        model = SentenceTransformer(str(base.path), device="cpu")
        model.max_seq_length = 64
        rows = [row.record for row, _ in self.rows(base, "train", self.steps * self.batch)]
        data = Dataset.from_list([{"anchor": each["anchor"], "positive": each["positive"]} for each in rows])
        trainer = SentenceTransformerTrainer(
            model=model, args=SentenceTransformerTrainingArguments(**arguments_of(self, folder)), train_dataset=data,
            loss=MultipleNegativesRankingLoss(model),
        )  # fmt: skip
        return timed(trainer, self.tokens(base), folder, of=lambda trained: trained[0].auto_model)

    def learned(self, base: Bundle, folder: Path) -> str:
        """How many of 500 held-out definitions find their word first."""
        from transformers import AutoModel

        from tuner.checkpoint import load_tokenizer
        from tuner.recipe import Evaluate

        task, options = self.task()
        model = AutoModel.from_pretrained(folder / "model").eval()
        found = task.scores(model, load_tokenizer(base.path), self.rows(base, "heldout", 500), options, Evaluate())
        return ", ".join(f"{name} {value:.3f}" for name, value in found.items() if name != "rows")


@dataclass(frozen=True)
class States:
    """A small Mamba learns the next token of texts, every weight of it, 512 tokens a row."""

    kind: str
    steps: int
    batch: int = 4
    rate: float = 1.0e-3
    model: str = LLAMA
    peer: str = "transformers' Trainer"

    def rows(self, base: Bundle, name: str, count: int) -> list[Any]:
        """Speeches in SmolLM2's tokens, of which the first 4,096 are told apart."""
        from tuner.checkpoint import load_tokenizer
        from tuner.data.example import Example

        texts = [json.loads(line)["text"] for line in (DATA / f"speeches/{name}.jsonl").read_text().splitlines()[:400]]
        ids = [token % 4096 for each in load_tokenizer(base.path)(texts)["input_ids"] for token in each]
        rows = [ids[at : at + 512] for at in range(0, len(ids) - 512, 512)][:count]
        return [Example(each, each) for each in rows]

    def opened(self) -> Any:
        """The same random weights for both sides."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(SEED)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**NEW[self.kind], vocab_size=4096), dtype=torch.float32)

    def ours(self, base: Bundle, folder: Path) -> dict[str, float]:
        """Train by our loop."""
        from tuner import kinds, scan
        from tuner.checkpoint import load_tokenizer

        model, task, method = self.opened().requires_grad_(True), kinds.load("tasks", "pretrain"), kinds.load("methods", "full")
        scan.use(model)
        rows = self.rows(base, "train", self.steps * self.batch)
        objective = task.objective(model, load_tokenizer(base.path), task.Options(max_tokens=512))
        measured = fitted(self, objective, rows, method.layers(model), folder)
        model.save_pretrained(folder / "model")
        return {"tokens_per_s": tokens(rows) / measured["seconds"], "peak": measured["peak_memory_bytes"]}

    def theirs(self, base: Bundle, folder: Path) -> dict[str, float]:
        """Train by transformers' Trainer."""
        from datasets import Dataset
        from transformers import Trainer, TrainingArguments

        rows = self.rows(base, "train", self.steps * self.batch)
        data = Dataset.from_list([{"input_ids": each.ids, "labels": each.labels} for each in rows])
        trainer = Trainer(model=self.opened(), args=TrainingArguments(**arguments_of(self, folder)), train_dataset=data)
        return timed(trainer, tokens(rows), folder)

    def learned(self, base: Bundle, folder: Path) -> str:
        """Held-out loss (nats a token)."""
        from transformers import AutoModelForCausalLM

        from tuner import kinds, scan
        from tuner.checkpoint import load_tokenizer
        from tuner.objective import heldout_loss

        model, task = AutoModelForCausalLM.from_pretrained(folder / "model").eval(), kinds.load("tasks", "pretrain")
        scan.use(model)
        objective = task.objective(model, load_tokenizer(base.path), task.Options(max_tokens=512))
        return f"loss {heldout_loss(objective, self.rows(base, 'heldout', 8))['heldout_loss']:.4f}"


Job = Chats | Reviews | Preferences | Neighbours | States
# How many times as fast as the peer each is to be.
GOALS = {
    "chats, LoRA": 3.0,
    "chats, LoRA, packed to 512": 3.0,
    "chats, QLoRA nf4": 2.0,
    "long chats, LoRA": 2.0,
    "reviews, BERT": 2.0,
    "preferences, DPO": 2.0,
    "definitions and words, embedding": 1.5,
    "speeches, Mamba-2": 2.0,
}
JOBS: dict[str, Job] = {
    "chats, LoRA": Chats((2, 4), steps=16),
    "chats, LoRA, packed to 512": Chats((2, 4), steps=6, packed=512),
    "chats, QLoRA nf4": Chats((2, 4), steps=12, storage="nf4"),
    "long chats, LoRA": Chats((40, 60), steps=2),
    "reviews, BERT": Reviews(steps=6),
    "reviews, BERT, mixed precision": Reviews(steps=6, precision="bf16"),
    "preferences, DPO": Preferences(steps=8),
    "definitions and words, embedding": Neighbours(steps=12),
    "definitions and words, embedding, mixed precision": Neighbours(steps=12, precision="bf16"),
    "speeches, Mamba-2": States("mamba2", steps=4),
    "speeches, Mamba-1": States("mamba", steps=2),
}


class Listed(list[Any]):
    """Rows in memory with their lengths, as the packer wants them."""

    @property
    def lengths(self) -> list[int]:
        return [len(row.ids) for row in self]


def tokens(rows: list[Any]) -> int:
    """Non-pad tokens of the rows."""
    return sum(len(row.ids) for row in rows)


def fitted(job: Any, objective: Any, rows: Any, layers: Any, folder: Path) -> dict[str, Any]:
    """What our loop measured."""
    from tuner.fit import Schedule, fit

    schedule = Schedule(
        steps=job.steps, batch_size=job.batch, micro_batch_size=job.batch, learning_rate=job.rate, warmup_fraction=0.0,
        decay="constant", weight_decay=0.0, max_grad_norm=1.0, checkpoint_every_steps=10_000, seed=SEED,
        precision=getattr(job, "precision", "fp32"),
    )  # fmt: skip
    return fit(objective, rows, schedule, layers=layers, work=folder / "work")


def arguments_of(job: Any, folder: Path) -> dict[str, Any]:
    """The same schedule in the words of transformers' trainers."""
    return {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": job.batch, "max_steps": job.steps, "learning_rate": job.rate,
        "use_cpu": True, "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "seed": SEED,
        **({"bf16": True} if getattr(job, "precision", "fp32") == "bf16" else {}),
    }  # fmt: skip


def timed(trainer: Any, count: int, folder: Path, of: Callable[[Any], Any] = lambda trained: trained) -> dict[str, float]:
    """Run a trainer of transformers' kind on so many tokens; the clock runs from the first step to the last."""
    from transformers import TrainerCallback

    from tuner.memory import peak

    clock: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

    trainer.add_callback(Clock())
    with peak() as most:
        trainer.train()
        held = most()
    of(trainer.model).save_pretrained(folder / "model")
    return {"tokens_per_s": count / (clock[1] - clock[0]), "peak": float(held or 0)}


def one(name: str, side: str, base: str, folder: str, alike: bool) -> None:
    """A process of its own: one side trains one job once and prints what it measured."""
    if alike:
        large_apart()
    print(json.dumps(getattr(JOBS[name], side)(open_bundle(Path(base)), Path(folder))))


def run(name: str, side: str, base: Bundle, out: Path, *, alike: bool = True) -> dict[str, float]:
    """What one side measured, with what `tuner` sets for itself, or as it comes."""
    out.mkdir(parents=True)
    code = f"from tests.bench.peers import one; one({name!r}, {side!r}, {str(base.path)!r}, {str(out)!r}, {alike})"
    environment = {
        **{key: value for key, value in os.environ.items() if key not in SET},
        "TQDM_DISABLE": "1",
        **(SET if alike else {}),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {side}: {done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: list[str]) -> None:
    """Run the jobs, the sides in turns."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers")
    parser.add_argument("wanted", nargs="?", default="")
    parser.add_argument("--runs", type=int, default=3)
    told = parser.parse_args(arguments)
    import transformers
    import trl

    print(f"{hardware()}; TRL {trl.__version__}, transformers {transformers.__version__}; median of {told.runs} runs in turns\n")
    print(
        "| job | steps of rows | Tuner, tokens/s | peer | tokens/s | ratio (each run) | memory, GB: Tuner, peer | "
        "the peer as it comes (one run): tokens/s, GB | Tuner | peer |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    median: Callable[[list[float]], float] = statistics.median
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        missed = []
        for name, job in JOBS.items():
            if told.wanted not in name:
                continue
            base = base_bundle(find(job.model), folder / "base")
            outs = [[folder / name / f"{side}-{number}" for side in ("ours", "theirs")] for number in range(told.runs)]
            runs = [[run(name, side, base, out) for side, out in zip(("ours", "theirs"), pair, strict=True)] for pair in outs]
            plain = run(name, "theirs", base, folder / name / "plain", alike=False)
            speeds = [[found["tokens_per_s"] for found in side] for side in zip(*runs, strict=True)]
            held = [median([found["peak"] for found in side]) / 1e9 for side in zip(*runs, strict=True)]
            ratios = sorted(own / other for own, other in zip(*speeds, strict=True))
            learned = " | ".join(job.learned(base, out) for out in outs[0])
            asked = f", {GOALS[name]:g} asked" if name in GOALS else ""
            print(
                f"| {name} | {job.steps} of {job.batch} | {median(speeds[0]):.0f} | {job.peer} | {median(speeds[1]):.0f} | "
                f"**{median(ratios):.2f}** ({', '.join(f'{each:.2f}' for each in ratios)}{asked}) | {held[0]:.2f}, {held[1]:.2f}: {100 * held[0] / held[1]:.0f}% | "
                f"{plain['tokens_per_s']:.0f}, {plain['peak'] / 1e9:.2f} | {learned} |",
                flush=True,
            )
            if median(ratios) < GOALS.get(name, 0) or held[0] > held[1] / 2:
                missed.append((name, base))
        for name, base in missed:
            print("\n" + profiled(name, base, folder / name / "profile"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

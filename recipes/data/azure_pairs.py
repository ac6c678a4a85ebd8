"""Make preference pairs by sampling a model that was tuned on recipes/data/azure-cli.

Run it as ``python recipes/data/azure_pairs.py runs/demo/merge``. Each request is answered several times by chance. An answer passes
where its command words are the reference's. The chosen answer is one that passes, the rejected one fails; where none passes the
reference is chosen, and where none fails the request gives no pair. How often each happened is printed. Writes train.jsonl and
heldout.jsonl to recipes/data/azure-pairs/, or to --out.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from package import write_rows

HERE = Path(__file__).parent
OUTPUT_DIR = HERE / "azure-pairs"
COMMAND_WORDS = re.compile(r"^az(?: [a-z][a-z0-9-]*)*")
LONGEST_ANSWER = 48
BATCH_ROWS = 16


def main() -> int:
    """Write both files and print the yield; returns the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory with a merged checkpoint, such as runs/demo/merge")
    parser.add_argument("--requests", type=int, default=400, help="how many of the training rows are answered")
    parser.add_argument("--heldout-requests", type=int, default=80, help="how many of the held-out rows are")
    parser.add_argument("--samples", type=int, default=4, help="answers to each request")
    parser.add_argument("--out", type=Path, default=OUTPUT_DIR, help="the directory to write to")
    wanted = parser.parse_args()
    if not (wanted.model / "config.json").is_file():
        print(f"azure_pairs.py: {wanted.model} is no checkpoint; `make demo` makes runs/demo/merge", file=sys.stderr)
        return 2
    if not (HERE / "azure-cli" / "train.jsonl").is_file():
        print("azure_pairs.py: there are no requests yet; `python recipes/data/azure_cli.py` writes them", file=sys.stderr)
        return 2
    train, heldout = (
        pairs(wanted.model, HERE / "azure-cli" / f"{name}.jsonl", count, wanted.samples)
        for name, count in (("train", wanted.requests), ("heldout", wanted.heldout_requests))
    )
    write_rows(wanted.out, train, heldout)
    return 0


def pairs(model: Path, path: Path, count: int, samples: int) -> list[str]:
    """JSON lines made from `count` rows of the file, drawn with a fixed seed."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(row[-1]["content"]) <= 100]
    random.Random(0).shuffle(rows)
    rows = rows[:count]
    found, lines = Counter[str](), []
    for messages, answers in zip(rows, sampled(model, [row[:-1] for row in rows], samples), strict=True):
        reference = messages[-1]["content"]
        good = [answer for answer in answers if words(answer) == words(reference)]
        bad = [answer for answer in answers if words(answer) != words(reference) and answer]
        found["answers"] += len(answers)
        found["passed"] += len(good)
        if not bad:
            found["requests without a failure"] += 1
            continue
        found["pairs with a sampled answer" if good else "pairs with the reference"] += 1
        lines.append(json.dumps({"messages": messages[:-1], "chosen": (good or [reference])[0], "rejected": bad[0]}))
    print(f"{path.name}: {len(rows)} requests, " + ", ".join(f"{number} {name}" for name, number in found.items()), flush=True)
    return lines


def words(command: str) -> str:
    """The command without its flags and values."""
    match = COMMAND_WORDS.match(command.strip())
    return match.group(0) if match else ""


def sampled(folder: Path, conversations: list[list[dict[str, str]]], samples: int) -> Iterator[list[str]]:
    """Answers to each conversation, drawn from the model's own distribution."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    for at in range(0, len(conversations), BATCH_ROWS):
        part = conversations[at : at + BATCH_ROWS]
        batch = tokenizer.apply_chat_template(part, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(
                **batch, do_sample=True, temperature=1.0, top_k=0, num_return_sequences=samples, max_new_tokens=LONGEST_ANSWER
            )
        texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index in range(len(part)):
            yield [text.strip() for text in texts[index * samples : (index + 1) * samples]]
        print(f"\r{at + len(part)} of {len(conversations)} requests answered", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

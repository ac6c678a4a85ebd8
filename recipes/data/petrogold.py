"""Turn the Petrogold treebank, Portuguese theses on the geology of oil, into passages of plain text.

Run it as ``python recipes/data/petrogold.py``. It downloads the package dante-corpora (23 MB, MIT) and writes ``train.jsonl`` and
``heldout.jsonl`` to ``recipes/data/petrogold/``. Of 19 theses 2 are held out.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from package import download, write_rows
from porttinari import PACKAGE, SHA256

OUTPUT_DIR = Path(__file__).parent / "petrogold"
HELDOUT_EVERY = 9
SENTENCE = re.compile(r"^# text = (?P<text>.+)\n# sent_id = (?P<thesis>.+)-\d+$", re.MULTILINE)
PASSAGE_CHARACTERS = 800


def main() -> int:
    """Write both files and print how many rows went where; returns the process's exit code."""
    try:
        archive = download(PACKAGE, SHA256)
    except ValueError as error:
        print(f"petrogold.py: {error}", file=sys.stderr)
        return 2
    theses: dict[str, list[str]] = defaultdict(list)
    for found in SENTENCE.finditer(archive.read("dante/data/petrogold/annotated.conllu").decode("utf-8")):
        theses[found["thesis"]].append(found["text"])
    train: list[str] = []
    heldout: list[str] = []
    for number, name in enumerate(sorted(theses)):
        rows = [json.dumps({"text": each}, ensure_ascii=False) for each in passages(theses[name])]
        (heldout if number % HELDOUT_EVERY == HELDOUT_EVERY - 1 else train).extend(rows)
    write_rows(OUTPUT_DIR, train, heldout)
    print(f"petrogold: {len(train)} passages to train on, {len(heldout)} held out, of {len(theses)} theses")
    return 0


def passages(sentences: list[str]) -> list[str]:
    """Sentences that follow each other, together up to a length."""
    found = [""]
    for sentence in sentences:
        if found[-1] and len(found[-1]) + len(sentence) >= PASSAGE_CHARACTERS:
            found.append("")
        found[-1] = f"{found[-1]} {sentence}".lstrip()
    return found


if __name__ == "__main__":
    sys.exit(main())

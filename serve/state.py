"""What must outlive a crash of the endpoint, in one SQLite file: where names point, and who may ask.

Every change is one transaction; a reader in another process (`tuner keys`) sees the old or the new, never half of it.
"""

import json
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from serve.errors import ServeError

SCHEMA = """
CREATE TABLE IF NOT EXISTS names (name TEXT PRIMARY KEY, pointer TEXT NOT NULL, declared TEXT);
CREATE TABLE IF NOT EXISTS versions (id TEXT PRIMARY KEY, name TEXT NOT NULL, path TEXT NOT NULL, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, sha256 TEXT NOT NULL, label TEXT NOT NULL, models TEXT NOT NULL, rpm INTEGER, tpm INTEGER,
    admin INTEGER NOT NULL, created REAL NOT NULL, expires REAL, revoked REAL
);
"""
FORMAT = 1
# What a client writes into `model`, and a part of a key's scope: no path, no header and no log line can be made of it.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Another process that writes is waited for this long.
BUSY_S = 10.0


@dataclass
class Pointer:
    """Where a name leads: versions by their ids, `support@3f2a91c0`."""

    current: str | None = None
    previous: list[str] = field(default_factory=list)
    """What it led to before, the latest first."""
    canary: str | None = None
    weight: int = 0
    """Percent of the requests that the canary answers."""
    shadow: str | None = None
    """Is asked what the current one is asked; its answers are compared and never returned."""

    @property
    def wanted(self) -> set[str]:
        """The versions that must be able to answer: the last one, too, for a rollback at once."""
        return {each for each in (self.current, self.canary, self.shadow, *self.previous[:1]) if each}


@dataclass(frozen=True)
class Placed:
    """A version as it is written down."""

    id: str
    name: str
    path: str
    digest: str


@dataclass(frozen=True)
class Key:
    """Who asks, and what they may. The secret is not in here: of it a hash is kept."""

    id: str
    sha256: str
    label: str = ""
    models: tuple[str, ...] = ()
    """The names it may ask; `*` stands for all."""
    rpm: int | None = None
    """Requests a minute."""
    tpm: int | None = None
    """Tokens a minute, read and written."""
    admin: bool = False
    created: float = 0.0
    expires: float | None = None
    revoked: float | None = None

    def may_ask(self, name: str) -> bool:
        """This model is in its scope."""
        return "*" in self.models or name in self.models


class State:
    """The file, or with no path one in memory. Raises ServeError where it cannot be opened, or is of another kind."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
            if path:
                path.touch(mode=0o600)  # what SQLite makes beside it gets the same
            self._base = sqlite3.connect(path or ":memory:", timeout=BUSY_S, check_same_thread=False, isolation_level=None)
            (version,) = self._base.execute("PRAGMA user_version").fetchone()
            if version not in (0, FORMAT):
                raise ServeError(f"{path}: written by another version of this program (format {version}, expected {FORMAT})")
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = FULL")
            self._base.executescript(SCHEMA)
            self._base.execute(f"PRAGMA user_version = {FORMAT}")
            if path:
                path.chmod(0o600)
        except (sqlite3.Error, OSError) as error:
            raise ServeError(f"{path}: the endpoint's state cannot be kept there ({error})") from None

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    def pointers(self) -> dict[str, Pointer]:
        """Where each name leads."""
        rows = self._base.execute("SELECT name, pointer FROM names").fetchall()
        return {name: Pointer(**json.loads(value)) for name, value in rows}

    def declared(self) -> dict[str, str]:
        """The digest of the bundle that a name was started with, where it was on the command line or in a deployment."""
        return dict(self._base.execute("SELECT name, declared FROM names WHERE declared IS NOT NULL").fetchall())

    def versions(self) -> dict[str, Placed]:
        """Every version that a name leads to or has led to."""
        return {row[0]: Placed(*row) for row in self._base.execute("SELECT id, name, path, digest FROM versions").fetchall()}

    def point(self, name: str, pointer: Pointer, versions: tuple[Placed, ...] = (), *, declared: str | None = None) -> None:
        """Write down where a name leads from now on, with the versions that are new to it."""
        with self._transaction():
            for each in versions:
                self._base.execute(
                    "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?)", (each.id, each.name, each.path, each.digest)
                )
            self._base.execute(
                "INSERT INTO names VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET pointer = excluded.pointer, "
                "declared = coalesce(excluded.declared, declared)",
                (name, json.dumps(asdict(pointer)), declared),
            )

    def forget(self, name: str) -> None:
        """Let a name and its versions go."""
        with self._transaction():
            self._base.execute("DELETE FROM names WHERE name = ?", (name,))
            self._base.execute("DELETE FROM versions WHERE name = ?", (name,))

    def keys(self) -> dict[str, Key]:
        """By their ids."""
        columns = "id, sha256, label, models, rpm, tpm, admin, created, expires, revoked"
        found = {}
        for row in self._base.execute(f"SELECT {columns} FROM keys ORDER BY created").fetchall():
            values: dict[str, Any] = dict(zip(columns.split(", "), row, strict=True))
            found[row[0]] = Key(**{**values, "models": tuple(json.loads(values["models"])), "admin": bool(values["admin"])})
        return found

    def add_key(self, key: Key) -> None:
        """Write down a new key."""
        values = (key.id, key.sha256, key.label, json.dumps(key.models), key.rpm, key.tpm, key.admin, key.created, key.expires)
        with self._transaction():
            self._base.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)", values)

    def revoke_key(self, key_id: str, now: float) -> None:
        """End a key; raises ServeError where there is none of this id."""
        with self._transaction():
            done = self._base.execute("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (now, key_id))
        if not done.rowcount:
            raise ServeError(f"there is no valid key {key_id!r}; `tuner keys list` shows those there are")

    def changes(self) -> int:
        """Differs once another process has written."""
        return int(self._base.execute("PRAGMA data_version").fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._lock:
                self._base.execute("BEGIN IMMEDIATE")
                try:
                    yield
                except BaseException:
                    self._base.execute("ROLLBACK")
                    raise
                self._base.execute("COMMIT")
        except sqlite3.Error as error:
            raise ServeError(f"{self.path}: the endpoint's state cannot be written ({error})") from None

"""Who may ask what, how often: keys are shown once, kept as hashes, and compared in constant time."""

import hashlib
import hmac
import re
import secrets
import time
from collections import deque
from dataclasses import dataclass, field

from serve.errors import ServeError
from serve.state import Key, State

PREFIX = "tnr"
WINDOW_S = 60.0
# How often it is looked whether another process has changed them.
LOOK_S = 0.1
# Compared with where an id is unknown, so that the answer takes as long as for a wrong secret.
NOBODY = Key("", hashlib.sha256(secrets.token_bytes(32)).hexdigest())


def create(
    state: State, *, models: list[str], label: str = "", rpm: int | None = None, tpm: int | None = None, expires: str | None = None,
    admin: bool = False,
) -> str:  # fmt: skip
    """A new key, which is shown here and never again. `expires` is a time from now, such as 30d. Raises ServeError."""
    if not models and not admin:
        raise ServeError("a key without models may ask nothing; name them with --models, or all with --models '*'")
    key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    now = time.time()
    state.add_key(
        Key(
            key_id,
            hashlib.sha256(secret.encode()).hexdigest(),
            label,
            tuple(models),
            rpm,
            tpm,
            admin,
            now,
            now + seconds(expires) if expires else None,
        )
    )
    return f"{PREFIX}-{key_id}-{secret}"


def seconds(text: str) -> float:
    """30d, 12h, 45m or 90s in seconds; raises ServeError for anything else."""
    found = re.fullmatch(r"(\d{1,6})([dhms])", text)
    if not found or not int(found[1]):
        raise ServeError(f"expires is {text!r}, expected a time such as 30d, 12h, 45m or 90s")
    return float(int(found[1]) * {"d": 86_400, "h": 3_600, "m": 60, "s": 1}[found[2]])


@dataclass
class _Used:
    """What a key has used in the last minute."""

    requests: deque[float] = field(default_factory=deque)
    tokens: deque[tuple[float, int]] = field(default_factory=deque)
    sum_tokens: int = 0


class Keyring:
    """The keys of a state, reread once another process has changed them; and what each has used."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._seen, self._looked = -1, 0.0
        self._keys: dict[str, Key] = {}
        self._used: dict[str, _Used] = {}

    @property
    def some(self) -> bool:
        """A key has been made, so that nobody without one is answered; also once all are revoked."""
        self._refresh()
        return bool(self._keys)

    def find(self, written: str | None) -> Key | None:
        """The valid key that a client has sent, or None."""
        self._refresh()
        _, _, rest = (written or "").partition("-")
        key_id, _, secret = rest.partition("-")
        key = self._keys.get(key_id, NOBODY)
        right = hmac.compare_digest(hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest(), key.sha256)
        if not right or key is NOBODY or key.revoked or (key.expires and key.expires <= time.time()):
            return None
        return key

    def take(self, key: Key) -> float:
        """Count a request; returns 0, or after how many seconds the key may ask again."""
        now = time.monotonic()
        used = self._used.setdefault(key.id, _Used())
        while used.requests and used.requests[0] <= now - WINDOW_S:
            used.requests.popleft()
        while used.tokens and used.tokens[0][0] <= now - WINDOW_S:
            used.sum_tokens -= used.tokens.popleft()[1]
        if key.rpm is not None and len(used.requests) >= key.rpm:
            return used.requests[0] + WINDOW_S - now if used.requests else WINDOW_S
        if key.tpm is not None and used.sum_tokens >= key.tpm:
            return used.tokens[0][0] + WINDOW_S - now if used.tokens else WINDOW_S
        if key.rpm is not None:
            used.requests.append(now)
        return 0.0

    def spend(self, key: Key, tokens: int) -> None:
        """Count the tokens of an answer."""
        if key.tpm is not None and tokens:
            used = self._used.setdefault(key.id, _Used())
            used.tokens.append((time.monotonic(), tokens))
            used.sum_tokens += tokens

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        if (changes := self._state.changes()) != self._seen:
            self._seen, self._keys = changes, self._state.keys()

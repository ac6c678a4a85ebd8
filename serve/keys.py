"""Who may ask what, how often: keys are shown once, kept as hashes, and compared in constant time."""

import hashlib
import hmac
import json
import re
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from serve.errors import ServeError
from serve.state import NAME, Key, State

PREFIX = "tnr"
_KEY = TypeAdapter(Key)
WINDOW_S = 60.0
# How often it is looked whether another process has changed them.
LOOK_S = 0.1
# Compared with where an id is unknown, so that the answer takes as long as for a wrong secret.
NOBODY = Key("", hashlib.sha256(secrets.token_bytes(32)).hexdigest())


def create(
    state: State | Path, *, models: list[str], label: str = "", rpm: int | None = None, tpm: int | None = None,
    expires: str | None = None, admin: bool = False,
) -> str:  # fmt: skip
    """A new key, which is shown here and never again; `state` keeps it, or a file that endpoints elsewhere read.

    `expires` is a time from now, such as 30d. Raises ServeError.
    """
    if not models and not admin:
        raise ServeError("a key without models may ask nothing; name them with --models, or all with --models '*'")
    if odd := [each for each in models if each not in ("*", "/metrics") and not NAME.fullmatch(each)]:
        raise ServeError(f"{odd[0]!r} is no name of a model; '*' by itself stands for all")
    key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    now = time.time()
    ends = now + seconds(expires) if expires else None
    key = Key(key_id, hashlib.sha256(secret.encode()).hexdigest(), label, tuple(models), rpm, tpm, admin, now, ends)
    if isinstance(state, State):
        state.add_key(key)
    else:
        try:
            state.touch(mode=0o600)
            with state.open("a+b") as file:
                torn = file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n"
                file.write(b"\n" * bool(torn) + json.dumps(asdict(key)).encode() + b"\n")
        except OSError as error:
            raise ServeError(f"{state}: no key can be written there ({error.strerror})") from None
    return f"{PREFIX}-{key_id}-{secret}"


def read_keys(file: Path) -> dict[str, Key]:
    """The keys in a file, as `create` writes them, by their ids. Raises ServeError with the line that is none."""
    found = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"{file}: the keys cannot be read ({getattr(error, 'strerror', None) or error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            key = _KEY.validate_json(line, strict=True, extra="forbid")
            if not re.fullmatch("[0-9a-f]{64}", key.sha256):
                raise ServeError(f"{file}:{number}: sha256 is no hash in 64 digits")
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            what = f"{'.'.join(map(str, first['loc']))} {first['msg'].lower()}".strip()
            raise ServeError(f"{file}:{number}: is no key as `tuner keys create --file` writes it ({what})") from None
        found[key.id] = key
    return found


def seconds(text: str) -> float:
    """30d, 12h, 45m or 90s in seconds; raises ServeError for anything else."""
    found = re.fullmatch(r"(\d{1,6})([dhms])", text)
    if not found or not int(found[1]):
        raise ServeError(f"expires is {text!r}, expected a time such as 30d, 12h, 45m or 90s, of 1 to 999999")
    return float(int(found[1]) * {"d": 86_400, "h": 3_600, "m": 60, "s": 1}[found[2]])


@dataclass
class _Used:
    """What a key has used in the last minute."""

    requests: deque[float] = field(default_factory=deque)
    tokens: deque[tuple[float, int]] = field(default_factory=deque)
    sum_tokens: int = 0


class Keyring:
    """The keys of a state and of a file, reread once either has changed; and what each has used.

    Raises ServeError for a file that cannot be read; one that becomes so later is said, and those that it held stay.
    """

    def __init__(self, state: State, file: Path | None = None, say: Callable[[str], None] = print) -> None:
        self._state, self._file, self._say = state, file, say
        self._seen, self._looked = -1, 0.0
        self._stamp = _stamp(file)
        self._kept: dict[str, Key] = {}
        self._filed = read_keys(file) if file else {}
        self._keys = self._filed
        self._used: dict[str, _Used] = {}

    @property
    def some(self) -> bool:
        """A key has been made, or a file of them named, so that nobody without one is answered; also once all are revoked."""
        self._refresh()
        return bool(self._keys or self._file)

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
        if self._file and (stamp := _stamp(self._file)) != self._stamp:
            self._stamp = stamp
            try:
                self._filed = read_keys(self._file)
            except ServeError as error:
                self._say(f"{error}; those that it held before are still good")
            self._keys = {**self._kept, **self._filed}
        if (changes := self._state.changes()) != self._seen:
            self._seen, self._kept = changes, self._state.keys()
            self._keys = {**self._kept, **self._filed}


def _stamp(file: Path | None) -> tuple[int, ...]:
    """Differs once the file has changed."""
    try:
        told = file.stat() if file else None
    except OSError:
        return ()
    return (told.st_mtime_ns, told.st_size, told.st_ino) if told else ()

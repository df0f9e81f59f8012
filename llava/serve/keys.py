"""API keys: shown once, kept as SHA-256 in a file that only its owner reads; `m2f2 keys create`, `list` and `revoke`.

A plain hash is right here. A slow or salted one protects passwords, which can be guessed; a key is 256 random bits, so
that guessing is hopeless at any speed, and the check of every request has to be quick.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from llava.core.config import build, setting, to_dict
from llava.core.registry import nearest
from llava.core.runtime import atomic_path
from llava.core.terminal import aligned

log = logging.getLogger(__name__)
PREFIX = "m2f2_"
KEY_BYTES = 32
MAX_DAYS, MAX_PER_MINUTE = 36_500, 1_000_000
NAME = re.compile(r"[\w.@-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class KeyFile:
    """Where the keys are."""

    file: str = setting("keys.json", "file of hashed keys")


@dataclass(frozen=True, kw_only=True)
class NewKey(KeyFile):
    """A key that is to be made."""

    name: str = setting(help="whose key it is: letters, digits, . _ @ -", positional=True)
    days: float | None = setting(None, "days until it expires; none = never")
    requests_per_minute: int | None = setting(None, "its own rate limit; none = that of the server")

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be kept."""
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} is not usable; give 1 to 64 letters, digits and . _ @ -")
        for field, most in (("days", MAX_DAYS), ("requests_per_minute", MAX_PER_MINUTE)):
            value = getattr(self, field)
            if value is not None and not 0 < value <= most:
                raise ValueError(f"{field}: {value} is not usable; allowed: more than 0, at most {most}.")


@dataclass(frozen=True, kw_only=True)
class OldKey(KeyFile):
    """A key that is to be withdrawn."""

    name: str = setting(help="whose key is withdrawn", positional=True)


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """What is kept of a key: times as ISO 8601 in UTC, sha256 in hexadecimal, the key's last four characters."""

    name: str
    sha256: str
    last_four: str
    created: str
    expires: str | None = None
    requests_per_minute: int | None = None

    def is_valid(self, now: datetime) -> bool:
        """Say whether the key has not expired."""
        return self.expires is None or now < datetime.fromisoformat(self.expires)


class KeyRing:
    """The keys that a server knows; a file that changes is read again at the next request."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._keys: Sequence[ApiKey] = read_keys(self._path)
        self._state = _state(self._path)

    def find(self, presented: str, now: datetime | None = None) -> ApiKey | None:
        """Give the valid key that was presented, None when there is none; takes the same time for every wrong key."""
        self._read_again()
        digest, found = _digest(presented), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found if found is not None and found.is_valid(now or datetime.now(UTC)) else None

    def is_of(self, presented: str, name: str) -> bool:
        """Say whether the valid key that was presented has this name."""
        key = self.find(presented)
        return key is not None and key.name == name

    def has(self, name: str) -> bool:
        """Say whether a key of this name is valid now."""
        self._read_again()
        return any(key.name == name and key.is_valid(datetime.now(UTC)) for key in self._keys)

    def _read_again(self) -> None:
        """Follow the file; while it is missing or damaged no key is valid."""
        state = _state(self._path)
        if state == self._state:
            return
        self._state = state
        try:
            self._keys = read_keys(self._path)
        except (ValueError, OSError) as error:
            self._keys = ()
            log.error("No key is valid until this is mended: %s", error)


def create_key(settings: NewKey) -> str:
    """Make a key, keep its hash, and give the text that shows it, once. Raises ValueError when the name is taken."""
    path = Path(settings.file)
    keys = read_keys(path) if path.exists() else []
    if any(key.name == settings.name for key in keys):
        raise ValueError(f"name: {settings.name!r} has a key already; revoke it first, or choose another name.")
    secret = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    now = datetime.now(UTC)
    key = ApiKey(
        name=settings.name,
        sha256=_digest(secret),
        last_four=secret[-4:],
        created=now.isoformat(timespec="seconds"),
        expires=None if settings.days is None else (now + timedelta(days=settings.days)).isoformat(timespec="seconds"),
        requests_per_minute=settings.requests_per_minute,
    )
    _write_keys(path, [*keys, key])
    return f"{secret}\nThis key of {key.name} is shown only now; {path} holds its hash."


def list_keys(settings: KeyFile) -> str:
    """Give a table of the keys: name, last characters, created, expires, requests per minute."""
    keys = read_keys(Path(settings.file))
    rows = [("name", "ends in", "created", "expires", "per minute")]
    rows += [(k.name, k.last_four, k.created, k.expires or "never", str(k.requests_per_minute or "-")) for k in keys]
    return "\n".join(aligned(rows))


def revoke_key(settings: OldKey) -> str:
    """Take a key out of the file. Raises ValueError when there is none of that name."""
    path = Path(settings.file)
    keys = read_keys(path)
    kept = [key for key in keys if key.name != settings.name]
    if len(kept) == len(keys):
        raise ValueError(f"No key has the name {settings.name!r}. {nearest(settings.name, [k.name for k in keys])}")
    _write_keys(path, kept)
    return f"The key of {settings.name} is no longer valid."


def read_keys(path: Path) -> list[ApiKey]:
    """Read the keys of a file. Raises FileNotFoundError, or ValueError when it holds something else."""
    if not path.is_file():
        raise FileNotFoundError(f"Key file {str(path)!r} does not exist; make it with `m2f2 keys create NAME`.")
    try:
        return [build(ApiKey, entry) for entry in json.loads(path.read_text(encoding="utf-8"))["keys"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"Key file {str(path)!r} is damaged ({error}); restore it or make a new one.") from error


def _write_keys(path: Path, keys: Sequence[ApiKey]) -> None:
    with atomic_path(path) as staged:
        staged.touch(mode=0o600)
        staged.write_text(json.dumps({"keys": [to_dict(key) for key in keys]}, indent=2) + "\n", encoding="utf-8")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _state(path: Path) -> tuple[int, int, int] | None:
    """Give what changes when a file is replaced; None while it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size

"""API keys: who has which, what it allows, until when. What is kept of a key is its SHA-256."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "SCOPES",
    "ApiKey",
    "Scope",
    "digest_of",
    "key_line",
    "new_key",
    "read_keys",
    "read_keys_file",
    "recognised",
    "require_unlike",
]

Scope = Literal["generate", "jobs", "adapters", "train", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

# SHA-256 is fast: a key that could be guessed would be found from its digest.
LEAST_CHARACTERS = 16

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_REMARK = re.compile(r"(^|\s)#.*")
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


class ApiKey(BaseModel):
    """One key. ``admin`` allows everything; without ``expires`` it is good for ever."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: bytes = Field(repr=False)
    scopes: frozenset[Scope]
    expires: datetime | None = None

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and datetime.now(UTC) >= self.expires


def read_keys(text: str) -> tuple[ApiKey, ...]:
    """The keys of ``name key scopes [expires]``, one a line or separated by semicolons; ``# …`` is a remark.

    A ValueError says which entry is wrong and never what stands there: it may be a key.
    """
    lines = (_REMARK.sub("", line) for line in text.splitlines())
    entries = [entry for line in lines for entry in line.split(";") if entry.strip()]
    keys = tuple(_read(entry.split(), f"entry {number}") for number, entry in enumerate(entries, 1))
    if not keys:
        # Whoever sets this means to ask for keys.
        raise ValueError("there are no keys in it")
    require_unlike(keys)
    return keys


def read_keys_file(path: str) -> tuple[ApiKey, ...]:
    """The keys of a file."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read ({type(error).__name__})") from None
    return read_keys(text)


def require_unlike(keys: Iterable[ApiKey]) -> None:
    """Raise ValueError when two keys have one name, or two names one key."""
    keys = tuple(keys)
    if len({key.name for key in keys}) < len(keys):
        raise ValueError("two keys have the same name")
    if len({key.digest for key in keys}) < len(keys):
        raise ValueError("two names have the same key")


def recognised(keys: Sequence[ApiKey], presented: bytes) -> ApiKey | None:
    """The key that was presented. All are compared, so that the time it takes tells nothing."""
    digest = digest_of(presented)
    match: ApiKey | None = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            match = key
    return match


def digest_of(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


def new_key() -> str:
    """A key that nobody can guess; the beginning tells scanners for secrets what it is."""
    return f"jbk_{secrets.token_urlsafe(32)}"


def key_line(name: str, key: str, scopes: Sequence[str], expires: str | None = None) -> str:
    """The line that lets a key in, with its digest in place of the key; ValueError as :func:`read_keys`."""
    words = [
        name,
        f"sha256:{digest_of(key.encode()).hex()}",
        ",".join(scopes),
        *([expires] if expires else []),
    ]
    _read(words, "the key")
    return " ".join(words)


def _read(words: Sequence[str], where: str) -> ApiKey:
    if len(words) not in {3, 4}:
        raise ValueError(
            f"{where}: write a name, the key or sha256:DIGEST, its scopes and, if at all, a date"
        )
    name, key, listed, *expires = words
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: a name has letters, digits, dots, dashes and underscores, up to 64")
    scopes = frozenset(listed.split(","))
    if not scopes <= set(SCOPES):
        raise ValueError(f"{where}: the third word lists scopes, of {', '.join(SCOPES)}")
    return ApiKey(
        name=name,
        digest=_digest(key, where),
        scopes=scopes,
        expires=_moment(expires[0], where) if expires else None,
    )


def _digest(key: str, where: str) -> bytes:
    if match := _DIGEST.fullmatch(key):
        return bytes.fromhex(match[1])
    if key.startswith("sha256:"):
        raise ValueError(f"{where}: sha256: is followed by the 64 hexadecimal digits of the key's digest")
    if len(key) < LEAST_CHARACTERS:
        raise ValueError(f"{where}: a key has at least {LEAST_CHARACTERS} characters; `jubako key` makes one")
    return digest_of(key.encode())


def _moment(text: str, where: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{where}: the fourth word is a date, as 2027-01-31 or 2027-01-31T12:00Z") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

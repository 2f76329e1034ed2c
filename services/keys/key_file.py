"""The file of API keys: make, read, write and look up keys."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.common.artifacts import make_folder
from stages.common.errors import InputError
from stages.common.locks import hold_lock

TOKEN_PREFIX = "perennial-"  # secret scanners, and our own guard, recognise a leaked key by it
TOKEN_BYTES = 32
RELOAD_EVERY_NS = 1_000_000_000

logger = logging.getLogger("services.keys")


@dataclass(frozen=True, slots=True)
class Key:
    """A stored key: its name, the hash of its token and its limits; a limit of None uses the server's."""

    name: str
    sha256: str
    created_at: str
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None


def hash_token(token: str) -> str:
    """Return the SHA-256 of a token as 64 hex digits.

    A plain hash is enough: salts and slow hashes (scrypt) protect passwords, which can be guessed from lists.
    A token is 256 random bits.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def make_key(
    name: str,
    created_at: str,
    *,
    requests_per_minute: int | None = None,
    tokens_per_day: int | None = None,
) -> tuple[Key, str]:
    """Return a new key and its token; the token is stored nowhere.

    Raises:
        InputError: the name has characters that are unsafe in a log line, or a limit is not positive.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise InputError(
            f"{name!r} is not a valid name for a key",
            "use up to 64 letters, digits, dots, dashes and underscores",
        )
    for limit, value in (("requests-per-minute", requests_per_minute), ("tokens-per-day", tokens_per_day)):
        if value is not None and value < 1:
            raise InputError(f"--{limit} is {value}", "give 1 or more, or omit it to use the server's limit")
    token = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    return Key(name, hash_token(token), created_at, requests_per_minute, tokens_per_day), token


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read the stored keys; a missing file has none.

    Raises:
        InputError: the file is not in the format of `write_keys`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    try:
        return tuple(Key(**entry) for entry in json.loads(text)["keys"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is not a valid key file: {error!r}", "restore it, or delete it and add the keys again"
        ) from None


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Write the keys atomically, readable by the owner only (mode 0600)."""
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp's mode is 0600
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"keys": [asdict(key) for key in keys]}, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())  # a key that was shown must survive a power failure
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def edit_keys(path: Path) -> Iterator[list[Key]]:
    """Yield the stored keys for the caller to change, then write them, under the file's lock."""
    with hold_lock(path.with_name(f"{path.name}.lock")):
        keys = list(read_keys(path))
        yield keys
        write_keys(path, keys)


class KeyFile:
    """Look up keys in their file, which is read again when it changes; checked at most once a second.

    A broken file is logged, and the keys read before stay valid.
    """

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._path = path
        self._clock_ns = clock_ns
        self._by_hash: dict[str, Key] = {}
        self._stamp: tuple[int, int, int] | None = None
        self._checked_at_ns: int | None = None
        self._required = False
        self._refresh()

    @property
    def required(self) -> bool:
        """Whether requests need a key: from the first key on, until the process ends."""
        self._refresh()
        return self._required

    def find(self, token: str) -> Key | None:
        """Return the key of a token, or None."""
        self._refresh()
        digest = hash_token(token)
        # Looked up by hash, not by token: the timing of the lookup reveals nothing about stored tokens.
        key = self._by_hash.get(digest)
        return key if key is not None and hmac.compare_digest(key.sha256, digest) else None

    def _refresh(self) -> None:
        now_ns = self._clock_ns()
        if self._checked_at_ns is not None and now_ns - self._checked_at_ns < RELOAD_EVERY_NS:
            return
        self._checked_at_ns = now_ns
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        try:
            keys = read_keys(self._path)
        except (InputError, OSError) as error:
            # With no earlier keys to fall back on, fail closed: the operator meant to restrict access.
            self._required = True
            logger.error("the key file is ignored and the previous keys stay valid: %s", error)
        else:
            self._by_hash = {key.sha256: key for key in keys}
            self._required = self._required or bool(keys)
        self._stamp = stamp


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return a value that changes whenever the file is replaced; None without a file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino

"""API keys of the server: kept only as a digest, looked up by their public part, compared in constant time."""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
import time
from datetime import datetime, timezone
from hashlib import sha256

from spryng_instrument.errors import QueryError, StoreError
from spryng_instrument.store.base import ApiKey, Store

log = logging.getLogger("spryng_instrument")

SCOPES = ("ingest", "read")
"""ingest: may send messages. read: may ask for usage, messages and conversations."""
FRESH_S = 5.0
"""How long a server goes by the keys that it has read: a revoked one is refused after that time at the latest."""
READ_S = 2.0
"""How long the ledger may take to say its keys."""
AGAIN_S = 1.0
"""After which time keys that could not be read, and were never before, are asked for again."""
_SOON = 0.4
"""The part of FRESH_S after which keys are read anew beside the requests: done, or given up, before it is over."""
_PREFIX = "spryng"
_NONE = ApiKey("", "", sha256(b"").hexdigest(), (), datetime.min.replace(tzinfo=timezone.utc))


def create(store: Store, name: str, scopes: tuple[str, ...]) -> tuple[ApiKey, str]:
    """Make a key. Returns it, and its secret text: nothing can show that again.

    Raises:
        QueryError: no name, or an unknown scope.
    """
    if not name.strip() or len(name) > 255 or not name.isprintable():
        raise QueryError(f"name={name!r} must have 1 to 255 printable characters: say whose key it is")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise QueryError(f"scopes={scopes!r} must be one or both of: {', '.join(SCOPES)}")
    id = secrets.token_hex(4)
    text = f"{_PREFIX}_{id}_{secrets.token_urlsafe(32)}"
    key = ApiKey(id, name, _digest(text), tuple(dict.fromkeys(scopes)), datetime.now(timezone.utc))
    store.keep_api_key(key)
    return key, text


def revoke(store: Store, id: str) -> ApiKey:
    """Refuse a key from now on. Revoked again, it stays as it is.

    Raises:
        QueryError: there is no such key.
    """
    for key in store.api_keys():
        if key.id == id:
            if key.revoked is None:
                key = ApiKey(key.id, key.name, key.digest, key.scopes, key.created, datetime.now(timezone.utc))
                store.keep_api_key(key)
            return key
    raise QueryError(f"there is no key {id!r}; `spryng keys list` names them")


class KeyRing:
    """The keys of a store, as a running server knows them. Its methods may read the store: call them in a thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: dict[str, ApiKey] | None = None
        self._read_at = 0.0
        self._problem: StoreError | None = None
        """Why they could not be read the last time."""
        self._reading = threading.Lock()

    @property
    def fresh(self) -> bool:
        """Whether no request has to wait for them to be read."""
        return self._keys is not None and self._age_s < FRESH_S

    @property
    def _age_s(self) -> float:
        return time.monotonic() - self._read_at

    def refresh(self) -> None:
        """Read the keys, if they are not fresh. While the store is down, those that are known hold.

        Raises:
            StoreError: they were never read.
        """
        with self._reading:
            if not self.fresh and (self._problem is None or self._age_s >= min(AGAIN_S, FRESH_S)):
                self._read()
        if self._keys is None and self._problem is not None:
            raise self._problem.with_traceback(None)

    def refresh_soon(self) -> None:
        """Read the keys in a thread beside, if that is due and not under way: nobody waits for it."""
        if self._age_s < FRESH_S * _SOON or not self._reading.acquire(blocking=False):
            return
        try:
            threading.Thread(target=self._read_beside, name="spryng-keys", daemon=True).start()
        except RuntimeError:  # no thread can be started now; the next request tries
            self._reading.release()

    def _read_beside(self) -> None:
        try:
            self._read()
        finally:
            self._reading.release()

    def _read(self) -> None:
        began = time.monotonic()
        try:
            self._keys = {key.id: key for key in self._store.api_keys(timeout_s=READ_S)}
        except StoreError as exc:
            self._problem, self._read_at = exc, time.monotonic()  # of when it failed: nobody tries again at once
            if self._keys is not None:
                log.warning("the keys cannot be read now; those known before hold")
        else:
            self._problem, self._read_at = None, began

    @property
    def empty(self) -> bool:
        """Whether no key was ever made. A revoked one counts: what was locked must not open by itself."""
        return not self._keys

    def known(self, id: str) -> ApiKey | None:
        """The key of that id, if it was not revoked."""
        key = (self._keys or {}).get(id)
        return key if key is not None and key.revoked is None else None

    def find(self, authorization: str | None) -> ApiKey | None:
        """The key of an Authorization header, bare or as Bearer. None: there is none, or it was revoked."""
        text = (authorization or "").strip()
        scheme, _, rest = text.partition(" ")
        if scheme.lower() == "bearer":
            text = rest.strip()
        parts = text.split("_", 2)
        found = (self._keys or {}).get(parts[1]) if len(parts) == 3 else None
        key = found or _NONE
        right = hmac.compare_digest(_digest(text), key.digest)  # of an unknown id, too: it takes as long
        return key if found is not None and right and key.revoked is None else None


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

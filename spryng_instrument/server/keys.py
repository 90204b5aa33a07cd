"""API keys of the server: kept only as a digest, looked up by their public part, compared in constant time."""

from __future__ import annotations

import hmac
import logging
import secrets
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

    @property
    def fresh(self) -> bool:
        """Whether the store need not be asked."""
        return self._keys is not None and time.monotonic() - self._read_at < FRESH_S

    def refresh(self) -> None:
        """Read the keys, if they were not just read. While the store is down, those that are known hold.

        Raises:
            StoreError: they were never read.
        """
        if self.fresh:
            return
        try:
            self._keys = {key.id: key for key in self._store.api_keys()}
        except StoreError:
            if self._keys is None:
                raise
            log.warning("the keys cannot be read now; those known before hold")
        self._read_at = time.monotonic()

    @property
    def empty(self) -> bool:
        """Whether no key was ever made. A revoked one counts: what was locked must not open by itself."""
        return not self._keys

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

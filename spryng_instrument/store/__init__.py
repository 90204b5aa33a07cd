"""Where messages are kept. `base` says what a store can do; each module beside it is one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spryng_instrument.store.base import Store


def open_store(url: str, *, create: bool = True) -> Store:
    """The store of a destination URL that `settings` has checked.

    Args:
        create: whether a ledger that is not there is made by the first use, or is an error.
    """
    from spryng_instrument.settings import sqlite_path
    from spryng_instrument.store.sqlite import SqliteStore

    return SqliteStore(sqlite_path(url), create=create)

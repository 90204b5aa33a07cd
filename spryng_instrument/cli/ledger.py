"""How the commands find a ledger and read it, with what dead processes left for it in the journal.

Invariant: what waits in a journal folder is delivered only to the ledger that the folder belongs to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from spryng_instrument.errors import SettingsError, StoreError
from spryng_instrument.journal import SUFFIX
from spryng_instrument.pump import deliver_orphans
from spryng_instrument.settings import Settings, env_name, resolve
from spryng_instrument.store import open_store
from spryng_instrument.store.base import Store


def settings_of(destination: str | None, journal: str | None, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of a command: its options, then SPRYNG_ variables, then defaults.

    SPRYNG_JOURNAL belongs to SPRYNG_DESTINATION: for another --destination, the journal is the one beside it.

    Raises:
        SettingsError: one of them cannot be used.
    """
    given = dict(os.environ if environ is None else environ)
    arguments = {"destination": destination, "journal": journal}
    settings = resolve(arguments, given)
    if destination is not None and journal is None and given.pop(env_name("journal"), ""):
        usual = resolve({}, given)
        if usual.destination != settings.destination:
            return resolve(arguments, given)
    return settings


def deliver_waiting(settings: Settings) -> str | None:
    """Deliver what dead processes left in the journal. Returns why that was not possible; None: nothing is left."""
    folder = Path(settings.journal)
    try:
        if any(path.stat().st_size for path in folder.glob(f"*{SUFFIX}")):
            deliver_orphans(folder, open_store(settings.destination))
    except (StoreError, SettingsError, OSError) as exc:
        return str(exc)
    return None


def open_ledger(settings: Settings) -> Store:
    """The ledger, to be read: one that is not there is an error at the first question."""
    return open_store(settings.destination, create=False)

"""How a ledger is found and read, with what dead processes left for it in the journal.

Invariant: what waits in a journal folder is delivered only to the ledger that the folder belongs to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spryng_instrument.errors import SettingsError, StoreError
from spryng_instrument.journal import SUFFIX, aside_lines, count_lines
from spryng_instrument.pump import Begun, deliver_orphans
from spryng_instrument.settings import Settings, env_name, resolve
from spryng_instrument.store import open_destination, open_store
from spryng_instrument.store.base import Store


def settings_of(destination: str | None, journal: str | None, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of whoever reads: what it was given, then SPRYNG_ variables, then defaults.

    SPRYNG_JOURNAL belongs to SPRYNG_DESTINATION: for another destination, the journal is the one beside it.

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
            destination = open_destination(settings.destination, settings.api_key)
            try:
                deliver_orphans(folder, destination)
            finally:
                destination.close()
    except (StoreError, SettingsError, OSError) as exc:
        return str(exc)
    return None


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of the messages that waited in a journal."""

    delivered: int
    left: int
    """Still in the journal."""
    set_aside: int
    """Now in the folder of those that cannot be delivered."""
    reason: str | None
    """Why some are left."""


def push(settings: Settings, timeout_s: float) -> Pushed:
    """Deliver what dead processes left, until nothing waits or the time is over. Running processes deliver their own.

    Raises:
        SettingsError: there can be no such destination.
    """
    folder = Path(settings.journal)
    destination = open_destination(settings.destination, settings.api_key)
    aside = sum(aside_lines(folder).values())
    delivered: list[int] = []
    begun: dict[Path, Begun] = {}
    deadline = time.monotonic() + timeout_s
    wait_s = 0.1
    try:
        while True:
            reason, asked_s = None, 0.0
            try:
                left_s = max(deadline - time.monotonic(), 0.01)
                deliver_orphans(folder, destination, timeout_s=left_s, said=delivered.append, begun=begun)
            except StoreError as exc:
                reason, asked_s = str(exc), exc.retry_after_s or 0.0
            except OSError as exc:
                reason = str(exc)
            left = count_lines(folder)
            wait_s = max(wait_s * 2, asked_s)
            if not left or time.monotonic() + wait_s > deadline:
                break
            time.sleep(wait_s)
    finally:
        destination.close()
    if left and reason is None:
        reason = "a running process holds them, and delivers them itself; its log says why if it does not"
    return Pushed(sum(delivered), left, sum(aside_lines(folder).values()) - aside, reason)


def open_ledger(settings: Settings) -> Store:
    """The ledger, to be read: one that is not there is an error at the first question."""
    return open_store(settings.destination, create=False)

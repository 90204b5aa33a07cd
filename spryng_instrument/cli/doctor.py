"""`spryng doctor`: whether calls are recorded, delivered and complete, and what to do where they are not.

Invariant: only what is proven is called lost. A number that is missing in the ledger is a loss if no journal holds it.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
import warnings
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import msgspec

from spryng_instrument import __version__
from spryng_instrument.cli.tables import many, printable
from spryng_instrument.deferred import Deferred
from spryng_instrument.errors import SettingsError, StoreError
from spryng_instrument.journal import SUFFIX, aside_lines, count_lines
from spryng_instrument.ledger import deliver_waiting, open_ledger
from spryng_instrument.message import decode
from spryng_instrument.pricelist import DEFAULT_FILE
from spryng_instrument.prices import price_source, rate
from spryng_instrument.settings import Settings, sqlite_path, without_secrets
from spryng_instrument.store import open_destination
from spryng_instrument.store.base import Health, Store
from spryng_instrument.store.transport import BatchPoster

STUCK_AFTER_S = 60.0
"""A running process delivers within seconds: what waits longer than this is stuck."""
LISTED = 10
"""Lines of code, models and writers that are listed for people; JSON has all."""
PACKAGES = ("openai", "httpx2", "httpx", "wrapt", "msgspec", "genai-prices")


@dataclass(slots=True)
class Examination:
    """What was found."""

    settings: Settings
    versions: dict[str, str | None]
    """None: not installed."""
    seams: dict[str, bool]
    """The places of the SDK through which calls go, and whether the installed one has them."""
    ledger: str = "ok"
    """ok, missing (nothing was recorded yet), unusable, or write-only: what it has cannot be asked from here."""
    delivered: int = 0
    """Messages in the ledger, of every machine that shares it. 0 if it is write-only."""
    waiting: int = 0
    """Messages in the journal."""
    deferred: int = 0
    """Calls whose usage comes with a later read of what they began: background responses, runs, batches."""
    uncounted: list[str] = field(default_factory=list)
    """Operations of the installed SDK that carry usage and are not known to this version."""
    lost: dict[str, int] = field(default_factory=dict)
    """Numbers that a process has given and that are nowhere, by process."""
    set_aside: dict[str, int] = field(default_factory=dict)
    """Lines that could not be delivered, by file."""
    unattributed: list[tuple[str, int]] = field(default_factory=list)
    """(line of code, messages) without a key."""
    unpriced: list[tuple[str, int]] = field(default_factory=list)
    """(model, messages) with usage and no cost."""
    problems: list[str] = field(default_factory=list)
    """What is wrong, and what to do: exit code 3."""
    warnings: list[str] = field(default_factory=list)
    """What should be known."""

    @property
    def recorded(self) -> int:
        """All messages that are known of."""
        return self.delivered + self.waiting + sum(self.lost.values())

    def as_json(self) -> dict[str, Any]:
        """Everything, in plain values."""
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "warnings": self.warnings,
            "versions": self.versions,
            "seams": self.seams,
            "prices": price_source().version,
            "destination": without_secrets(self.settings.destination),
            "ledger": self.ledger,
            "journal": self.settings.journal,
            "recorded": self.recorded,
            "delivered": self.delivered,
            "waiting": self.waiting,
            "deferred": self.deferred,
            "uncounted": self.uncounted,
            "lost": self.lost,
            "set_aside": self.set_aside,
            "unattributed": [{"call_site": site, "messages": count} for site, count in self.unattributed],
            "unpriced": [{"model": model, "messages": count} for model, count in self.unpriced],
        }

    def print(self) -> None:
        """For people: the facts, what should be known, and what is wrong."""
        found = {True: "found", False: "MISSING"}
        _facts("versions", [f"{name} {number or 'not installed'}" for name, number in self.versions.items()])
        _facts("instruments", [f"{name}: {found[there]}" for name, there in self.seams.items()])
        _facts("prices", [price_source().version or "none"])
        _facts("ledger", [f"{without_secrets(self.settings.destination)} ({self.ledger})"])
        _facts("journal", [self.settings.journal])
        lost = sum(self.lost.values())
        recorded = (
            f"{self.recorded:,} recorded = {self.delivered:,} delivered + {self.waiting:,} waiting + {lost:,} lost"
        )
        _facts(
            "messages",
            [
                f"{self.waiting:,} waiting" if self.ledger == "write-only" else recorded,
                f"{sum(self.set_aside.values()):,} set aside",
                f"{self.deferred:,} begun in the background, and not read since",
            ],
        )
        _facts("no key", _listed(self.unattributed))
        _facts("no price", _listed(self.unpriced))
        for kind, lines in (("WARNING", self.warnings), ("PROBLEM", self.problems)):
            for line in lines:
                click.echo(printable(f"{kind}: {line}"))
        click.echo("Something is wrong." if self.problems else "All is well.")


def examine(settings: Settings) -> Examination:
    """Look at everything. Delivers, first of all, what dead processes left."""
    examination = Examination(settings, _versions(), _seams())
    for name, there in examination.seams.items():
        if not there:
            examination.problems.append(
                f"this openai has no {name}: calls through it are not recorded. Upgrade spryng-instrument, or install "
                "an openai that it knows"
            )
    examination.uncounted = _uncounted(examination.versions["openai"])
    if examination.uncounted:
        examination.warnings.append(
            "this openai can do what is not counted: " + ", ".join(examination.uncounted) + ". A newer version may: "
            "pip install -U spryng-instrument"
        )
    left = deliver_waiting(settings)
    _examine_journal(examination, left)
    if "http" in urlsplit(settings.destination).scheme:
        _examine_endpoint(examination)
    else:
        _examine_ledger(examination)
    return examination


def _examine_journal(examination: Examination, left: str | None) -> None:
    folder = Path(examination.settings.journal)
    problems = examination.problems
    if problem := _not_writable(folder):
        problems.append(
            f"the journal {folder} cannot be written: {problem}. instrument() fails there: make it writable, or set "
            "SPRYNG_JOURNAL to a folder on a local disk"
        )
    try:
        examination.waiting = count_lines(folder)
        examination.set_aside = aside_lines(folder)
        examination.deferred = Deferred(folder).count
    except OSError as exc:
        problems.append(f"{exc.filename} cannot be read: {exc.strerror}. Run this as the user that recorded")
        return
    if left is not None:
        problems.append(f"messages that wait in {folder} could not be delivered: {left}")
    elif age_s := _oldest_s(folder):
        problems.append(
            f"messages wait in {folder} for {age_s:,.0f} s, held by a running process that does not deliver them. "
            "Its log says why; when it ends, `spryng doctor` delivers them"
        )
    problems += [
        f"{many(count, 'line')} set aside in {path}: not in the ledger. Look at what is there; when that is settled, "
        "delete that file"
        for path, count in examination.set_aside.items()
    ]


def _examine_endpoint(examination: Examination) -> None:
    """A destination that takes messages and answers no questions: whether it would take one now."""
    settings = examination.settings
    examination.ledger = "write-only"
    try:
        destination = open_destination(settings.destination, settings.api_key)
        try:
            if isinstance(destination, BatchPoster):
                destination.check()
        finally:
            destination.close()
    except (StoreError, SettingsError) as exc:
        examination.ledger = "unusable"
        examination.problems.append(str(exc))


def _examine_ledger(examination: Examination) -> None:
    local = urlsplit(examination.settings.destination).scheme == "sqlite"
    try:
        store = open_ledger(examination.settings)
    except SettingsError as exc:  # its driver is not installed
        examination.ledger = "unusable"
        examination.problems.append(str(exc))
        return
    if local and not (path := sqlite_path(examination.settings.destination)).exists():
        examination.ledger = "missing"
        if problem := _not_writable(path.parent):
            examination.problems.append(
                f"the ledger {path} cannot be made: {problem}. Set SPRYNG_DESTINATION to another"
            )
        else:
            examination.warnings.append(f"nothing was recorded at {path} yet. To see how it works: spryng demo")
        return
    try:
        rated = rate(store)
        health = store.health()
        missing = _lost(store, health, Path(examination.settings.journal))
        store.set_costs([])  # takes the lock that a delivery needs, and changes nothing
    except StoreError as exc:
        examination.ledger = "unusable"
        examination.problems.append(str(exc))
        return
    examination.delivered = health.messages
    examination.unattributed = list(health.unattributed)
    examination.unpriced = list(health.unpriced)
    if local:
        examination.lost = missing
    elif missing:
        more = f" and {len(missing) - LISTED:,} more" if len(missing) > LISTED else ""
        examination.warnings.append(
            f"{many(sum(missing.values()), 'message')}, numbered by {', '.join(list(missing)[:LISTED])}{more}, neither "
            "in the ledger nor in this machine's journal. They may wait in another machine's: `spryng push` there. "
            "What none has is lost"
        )
    most = sorted(examination.lost.items(), key=lambda each: -each[1])
    for writer, count in most[:LISTED]:
        examination.problems.append(
            f"{many(count, 'message')} of process {writer} {'is' if count == 1 else 'are'} lost: numbered by it, and "
            "neither ledger nor journal has it. Its journal was deleted, or its disk was full; its log says when"
        )
    if len(most) > LISTED:
        rest = [count for _, count in most[LISTED:]]
        examination.problems.append(
            f"{many(sum(rest), 'message')} of {len(rest):,} more processes are lost as well: `lost` in --json has all"
        )
    if unattributed := sum(count for _, count in health.unattributed):
        examination.warnings.append(
            f"{many(unattributed, 'message')} without a key. Put `with usage_context(key=...)` around the calls "
            "listed, or set SPRYNG_DEFAULT_KEY"
        )
    if rated.reason:
        examination.warnings.append(f"costs are unknown: {rated.reason}")
    elif unpriced := sum(count for _, count in health.unpriced):
        examination.warnings.append(
            f"{many(unpriced, 'message')} without a cost: {price_source().version} has no price for the models listed, "
            f"or not for their tier. A newer one may: pip install -U genai-prices; or write your own in {DEFAULT_FILE}"
        )


def _lost(store: Store, health: Health, journal: Path) -> dict[str, int]:
    """Numbers that are nowhere, by writer. What is on its way from the journal to the ledger is looked for again."""
    if not health.gaps:
        return {}
    waiting = _waiting_numbers(journal)
    given = {writer: last for writer, last, _ in health.gaps}
    lost = _counts(store.missing(given), waiting)
    if lost:
        time.sleep(0.5)
        for writer, numbers in _waiting_numbers(journal).items():
            waiting[writer] |= numbers
        lost = _counts(store.missing({writer: given[writer] for writer in lost}), waiting)
    return lost


def _counts(missing: Mapping[str, list[range]], waiting: Mapping[str | None, set[int]]) -> dict[str, int]:
    counts = {writer: _count(numbers, waiting[writer]) for writer, numbers in missing.items()}
    return {writer: count for writer, count in counts.items() if count}


def _count(missing: list[range], waiting: set[int]) -> int:
    """How many numbers are missing and do not wait. They may be more than any memory holds."""
    starts = [numbers.start for numbers in missing]
    found = sum(number in missing[bisect_right(starts, number) - 1] for number in waiting) if missing else 0
    return sum(map(len, missing)) - found


def _waiting_numbers(journal: Path) -> defaultdict[str | None, set[int]]:
    """The numbers of the messages in the journal, those set aside included: they are in trouble, but not lost."""
    numbers: defaultdict[str | None, set[int]] = defaultdict(set)
    for path in journal.glob(f"**/*{SUFFIX}"):
        try:
            lines = path.read_bytes().splitlines()
        except OSError:
            continue  # delivered and deleted meanwhile, or not ours to read
        for line in lines:
            try:
                message = decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
            if message.sequence is not None:
                numbers[message.writer].add(message.sequence)
    return numbers


def _oldest_s(folder: Path) -> float | None:
    """Seconds that the oldest message has waited for, if that is too long. None: it is not."""
    ages = [0.0]
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            found = path.stat()
        except OSError:
            continue
        if found.st_size:
            ages.append(time.time() - found.st_mtime)
    return max(ages) if max(ages) > STUCK_AFTER_S else None


def _not_writable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, or where it would be made. None: it can."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".spryng-doctor-"):
            return None
    except OSError as exc:
        return f"{folder}: {os.strerror(exc.errno) if exc.errno else exc}"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"spryng-instrument": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if found["httpx2"] or found["httpx"]:  # one of the two is what openai needs
        found = {name: number for name, number in found.items() if number or not name.startswith("httpx")}
    return found


def _seams() -> dict[str, bool]:
    from spryng_instrument import patch

    try:
        return dict(patch.seams())
    except ImportError as exc:
        return {f"openai ({exc})": False}


def _uncounted(openai: str | None) -> list[str]:
    """What the installed SDK can do, and this version does not count."""
    from spryng_instrument import surface

    if openai is not None and surface.is_walked(openai):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the SDK's own modules, as they are loaded
        try:
            return [operation.name for operation in surface.uncounted()]
        except ImportError:
            return []


def _facts(title: str, lines: list[str]) -> None:
    for line in lines:
        click.echo(printable(f"{title:<12}{line}"))
        title = ""


def _listed(found: list[tuple[str, int]]) -> list[str]:
    lines = [f"{count:>6,}  {name}" for name, count in found[:LISTED]]
    return [*lines, f"and {len(found) - LISTED:,} more: --json has all"] if len(found) > LISTED else lines

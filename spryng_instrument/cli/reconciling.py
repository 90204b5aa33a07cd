"""`spryng reconcile`: the ledger beside what OpenAI itself has counted and charged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from spryng_instrument.cli.group import commands, form_of, form_options, ledger_of, ledger_options
from spryng_instrument.cli.tables import Column, decimals_for, note, print_csv, print_json, print_table
from spryng_instrument.deferred import Deferred
from spryng_instrument.differences import COST, MEANINGS, Line
from spryng_instrument.ledger import settings_of
from spryng_instrument.organization import admin_client, fetch, host_of
from spryng_instrument.periods import period
from spryng_instrument.prices import rate
from spryng_instrument.reconcile import GROUPINGS, Reconciliation, reconcile, span

NAMES = {"requests": "requests", "input_tokens": "input", "cached_tokens": "cached", "output_tokens": "output"}
NAMES |= {COST: "cost USD"}
"""What a measure is called in the table."""


@commands.command("reconcile")
@click.option("--month", metavar="YYYY-MM", help="In UTC, as OpenAI counts. [this month]")
@click.option("--by", type=click.Choice(GROUPINGS), default="day", show_default=True, help="What a row is.")
@click.option("--project", "projects", multiple=True, metavar="PROJ", help="OpenAI's figures of this project; again.")
@form_options
@ledger_options
@click.pass_context
def reconcile_command(
    ctx: click.Context,
    /,
    month: str | None,
    by: str,
    projects: tuple[str, ...],
    form: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare a month with what OpenAI itself has counted and charged, and say why where they differ.

    Requests and tokens by day in UTC and model (snapshots count under their model's name), costs by day. It asks
    OPENAI_BASE_URL, or api.openai.com, with OPENAI_ADMIN_KEY, and compares the messages that went to the same API.

    Exit code 3 if a difference has no cause that could be told.
    """
    form = form_of(form, as_json)
    now = datetime.now(timezone.utc)
    month = month or f"{now:%Y-%m}"
    since, until = period(None, None, month, "UTC")
    assert since is not None
    assert until is not None
    asked = span(since, until, now)
    client = admin_client(os.environ)
    store = ledger_of(given)
    rated = rate(store)
    organization = fetch(client, *asked, projects)
    settings = settings_of(given["destination"], given["journal"])
    unread = [message for _, message in Deferred(Path(settings.journal)).overdue(0) if message is not None]
    found = reconcile(store, organization, host_of(client), since, until, projects=projects, unread=unread, now=now)
    if form == "json":
        print_json(found.as_json(by))
    elif form == "csv":
        _print_csv(found, by)
    elif found.lines:
        _print(found, by)
    if rated.reason:
        note(f"Costs are unknown: {rated.reason}")
    _say(found)
    ctx.exit(0 if found.is_explained else 3)


def _print(found: Reconciliation, by: str) -> None:
    groups = [Column(name) for name in by.split("-")]
    columns = [*groups, Column("measure"), Column("ours", number=True), Column("OpenAI", number=True)]
    columns += [Column("difference", number=True), Column("cause", fold=True)]
    total = found.total()
    decimals = decimals_for(max((line.theirs for line in total if line.measure == COST), default=None))
    rows = [
        [*_group(line, by), *_cells(line, decimals)]
        for _, lines in groupby(found.grouped(by), lambda line: (line.day, line.model))
        for line in _worth_showing(list(lines))
    ]
    rows += [["total", *[""] * (len(groups) - 1), *_cells(line, decimals)] for line in total]
    print_table(columns, rows)


def _worth_showing(lines: list[Line]) -> list[Line]:
    """The lines that differ, or one for all if none does."""
    return [line for line in lines if line.difference] or lines[:1]


def _group(line: Line, by: str) -> list[str]:
    day = "" if line.day is None else line.day.isoformat()
    return {"day": [day], "model": [line.model or ""], "day-model": [day, line.model or "(all)"]}[by]


def _cells(line: Line, decimals: int) -> list[str]:
    numbers = (line.ours, line.theirs, line.difference)
    return [
        NAMES[line.measure],
        *(_number(number, line.measure, decimals) for number in numbers),
        _cause(line, decimals),
    ]


def _number(number: Decimal, measure: str, decimals: int) -> str:
    return f"{number:,.{decimals if measure == COST else 0}f}"


def _cause(line: Line, decimals: int) -> str:
    causes = {**line.causes, **({"unexplained": line.unexplained} if line.unexplained else {})}
    if len(causes) < 2:
        return next(iter(causes), "equal")
    return ", ".join(f"{cause} {_number(amount, line.measure, decimals)}" for cause, amount in causes.items())


def _print_csv(found: Reconciliation, by: str) -> None:
    groups = by.split("-")
    names = [*groups, "measure", "ours", "openai", "difference", "unexplained", "causes"]
    records = (line.as_json() for line in found.grouped(by))
    print_csv(names, ([*(record[name] for name in names[:-1]), json.dumps(record["causes"])] for record in records))


def _say(found: Reconciliation) -> None:
    """What was found, in words."""
    if found.open_days:
        days = ", ".join(day.isoformat() for day in found.open_days)
        note(f"{days} is not over at {found.host}: compared up to what it has counted until now.")
    for cause, amounts in found.by_cause().items():
        meaning = "; or ".join(MEANINGS[part] for part in cause.split(" or ") if part in MEANINGS)
        note(f"{cause}: {', '.join(_amounts(amounts))}" + (f" ({meaning})" if meaning else ""))
    if not found.lines:
        note(f"Neither the ledger nor {found.host} has anything of {found.month}.")
    elif not any(line.difference for line in found.lines):
        note(f"{found.month} agrees with {found.host} in every number.")
    elif found.is_explained:
        note("Every difference has a cause.")
    else:
        note("Some of it has no cause that could be told: `spryng doctor` says whether messages are lost.")


def _amounts(amounts: list[tuple[str, Decimal, Decimal]]) -> Iterator[str]:
    """ "+3 requests", "+12 and -12 input tokens", "+0.000712 USD"."""
    for measure, more, less in amounts:
        signed = " and ".join(f"{amount:+,.{6 if measure == COST else 0}f}" for amount in (more, less) if amount)
        noun = {"requests": "request" if signed in ("+1", "-1") else "requests", COST: "USD"}
        yield f"{signed} {noun.get(measure, measure.replace('_', ' '))}"

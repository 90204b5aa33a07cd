"""The commands of `spryng` that ask and check: their options, and what they print. The server has its own, `serving`.

What they compute is in reports, doctor and demo.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

import click

from spryng_instrument.cli.group import (
    again,
    commands,
    filter_of,
    form_of,
    form_options,
    ledger_of,
    ledger_options,
    say_empty,
    when_options,
    who_options,
)
from spryng_instrument.cli.names import zones
from spryng_instrument.cli.printing import message_line, print_messages, print_usage, say_gaps
from spryng_instrument.cli.tables import many, note, print_csv, print_json
from spryng_instrument.errors import SchemaTooNewError, StoreError, StoreNotOursError
from spryng_instrument.exporting import COLUMNS, cells_of
from spryng_instrument.ledger import push, settings_of
from spryng_instrument.periods import zone_of
from spryng_instrument.prices import price_of, rate
from spryng_instrument.reports import (
    CONVERSATIONS,
    WINDOWS,
    decimal_text,
    message_record,
    usage_report,
    whole_report,
)
from spryng_instrument.settings import without_secrets
from spryng_instrument.store.base import GROUPS, Filter, Page, Store, StoredMessage


@commands.command()
@click.option("--by", type=click.Choice(GROUPS), default="key", show_default=True, help="What a row is.")
@click.option("--window", type=click.Choice(WINDOWS), help="The groups of each day or month.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    help=f"Rows at most: those that cost the most. [all; {CONVERSATIONS:,} by conversation, but for CSV]",
)
@who_options
@when_options
@form_options
@ledger_options
def usage(
    by: str, window: str | None, limit: int | None, zone: str, form: str | None, as_json: bool, **given: Any
) -> None:
    """Usage and cost by customer, tag, conversation, model, day or month.

    Messages are those to bill: answered, or streams that were begun. Input contains what was cached. The total counts
    each message once; by tag, the rows may add up to more. Cost is the list price of the tokens in US dollars; "at
    least" says that some have no known price.

    A terminal with room gets one more column: the messages of each day, up to that of the newest, drawn against the
    row's own highest day; by day or month, a bar of its share.

    CSV has no row for the total; its cost_usd is empty where none is known.
    """
    form = form_of(form, as_json)
    where = filter_of(given, zone)
    store = ledger_of(given)
    most = CONVERSATIONS if limit is None and by == "conversation" else limit
    report = usage_report(store, by, where, zone, window, limit=most)
    if form == "json":
        print_json(report.as_json())
    elif form == "csv":
        parts = whole_report(report, store) if limit is None else iter([report])
        print_csv(report.columns, ([*row[:-1], decimal_text(row[-1])] for part in parts for row in part.as_table()))
        report = replace(report, more=report.more and limit is not None)
    elif report.rows:
        print_usage(report, store)
    if not report.rows:
        say_empty(store, where)
    say_gaps(report)


@commands.command()
@who_options
@when_options
@click.option("--limit", type=click.IntRange(1, 100_000), default=20, show_default=True, help="Messages a page.")
@click.option("--after", metavar="CURSOR", help="The page after that one; the page before it names the command.")
@form_options
@ledger_options
@click.pass_context
def messages(
    ctx: click.Context, /, zone: str, form: str | None, as_json: bool, limit: int, after: str | None, **given: Any
) -> None:
    """Messages, newest first. JSON is one object a line, with every field."""
    form = form_of(form, as_json)
    where = filter_of(given, zone)
    store = ledger_of(given)
    rate(store)
    page = store.messages(where, after=after, limit=limit)
    tz = zone_of(zone)
    if form == "json":
        for row in page.rows:
            print_json(message_record(row, tz), indent=None)
    elif form == "csv":
        print_csv(COLUMNS, (cells_of(row, tz) for row in page.rows))
    elif page.rows:
        print_messages(page.rows, zone)
    if not page.rows and after is None:
        say_empty(store, where)
    if page.next:
        note(f"Older ones: {again(ctx, after=page.next)}")


@commands.command()
@who_options
@click.option("-n", "--lines", type=click.IntRange(0, 100_000), default=10, show_default=True, help="Last ones first.")
@click.option("--interval", type=click.FloatRange(0.05, 3600), default=0.5, show_default=True, help="In seconds.")
@click.option(
    "--tz",
    "zone",
    default="UTC",
    show_default=True,
    metavar="ZONE",
    shell_complete=zones,
    help="The times' zone.",
)
@click.option("--json", "as_json", is_flag=True, help="One object a line, with every field.")
@ledger_options
def tail(lines: int, interval: float, zone: str, as_json: bool, **given: Any) -> None:
    """Follow new messages, of every process, until Ctrl-C: each once, in the order in which they reach the ledger."""
    where = filter_of(given, zone)
    tz = zone_of(zone)
    store = ledger_of(given)
    with suppress(KeyboardInterrupt):
        for row in _follow(store, where, lines, interval):
            if row.cost_usd is None:
                row = StoredMessage(row.message, price_of(row.message), None)
            if as_json:
                print_json(message_record(row, tz), indent=None)
            else:
                click.echo(message_line(row, tz))


def _follow(store: Store, where: Filter, lines: int, interval: float) -> Iterator[StoredMessage]:
    page = store.arrivals(None, where, limit=lines)
    said = False
    while True:
        yield from page.rows
        sys.stdout.flush()
        if not page.rows:
            time.sleep(interval)
        try:
            page = store.arrivals(page.next, where)
            said = False
        except (StoreNotOursError, SchemaTooNewError):
            raise
        except StoreError as exc:  # deleted, to be made anew by the next message; or locked for a while
            if not said:
                note(f"Waiting: {exc}")
            page, said = Page([], page.next), True


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="The same as one JSON object.")
@ledger_options
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, destination: str | None, journal: str | None) -> None:
    """Check that calls are recorded, delivered and complete.

    Exit code 3 if usage is lost or in danger: a seam of the SDK is missing, the ledger cannot be read or written, the
    journal cannot be written, messages are stuck in it or were set aside, or numbers are missing in the ledger.

    Calls without a key and models without a price are warnings, and so is a ledger that nothing has been recorded in:
    they are listed, and the exit code stays 0.
    """
    from spryng_instrument.cli.doctor import examine

    examination = examine(settings_of(destination, journal))
    if as_json:
        print_json(examination.as_json())
    else:
        examination.print()
    ctx.exit(3 if examination.problems else 0)


@commands.command("push")
@click.option(
    "--timeout", type=click.FloatRange(0, 86_400), default=30.0, show_default=True, help="Seconds to try for."
)
@ledger_options
@click.pass_context
def push_command(ctx: click.Context, timeout: float, destination: str | None, journal: str | None) -> None:
    """Deliver now what dead processes left in the journal, to any kind of destination.

    Exit code 1 if something is left, or had to be set aside because the destination can never take it.
    """
    settings = settings_of(destination, journal)
    pushed = push(settings, timeout)
    click.echo(f"{many(pushed.delivered, 'message')} delivered to {without_secrets(settings.destination)}")
    if pushed.left:
        note(f"{many(pushed.left, 'message')} left in {settings.journal}: {pushed.reason}")
    if pushed.set_aside:
        note(f"{many(pushed.set_aside, 'line')} set aside: `spryng doctor` says where, the lines above why")
    ctx.exit(1 if pushed.left or pushed.set_aside else 0)


@commands.command()
@click.option("--live", is_flag=True, help="Call the real OpenAI API with OPENAI_API_KEY: costs a few cents.")
@click.option("--calls", type=click.IntRange(8, 10_000), help="How many. [200; with --live 16]")
@click.option("--destination", metavar="URL", help="The ledger. [sqlite:///.spryng/demo/usage.db]")
@click.pass_context
def demo(ctx: click.Context, live: bool, calls: int | None, destination: str | None) -> None:
    """Make calls for eight customers with the real OpenAI SDK, and show what they used.

    Without --live they go to a practice server on this machine: no OpenAI key is needed, and nothing is paid.
    """
    from spryng_instrument.cli.demo import run

    ctx.exit(run(live=live, calls=calls, destination=destination))


@commands.command(add_help_option=False)
def run() -> NoReturn:
    """Run a command with its OpenAI calls recorded, no change to its code: spryng run -- python app.py"""
    raise AssertionError("cli.main() takes it before click does")

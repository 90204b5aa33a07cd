"""The commands of bills: bill, bills, void, adjust, rate, events."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime, timezone
from decimal import Decimal, InvalidOperation
from typing import Any

import click
import msgspec

from spryng_instrument.billing.behind import behind
from spryng_instrument.billing.bills import Bill, Desk, Drafts, invoice, last_invoices, sums
from spryng_instrument.billing.corrections import adjust, reprice, void
from spryng_instrument.billing.events import METERS, Skipped, lago, stripe
from spryng_instrument.billing.plans import DEFAULT_FILE, Plans, load, month_of
from spryng_instrument.billing.texts import (
    BEHIND,
    COLUMNS,
    amount_text,
    behind_cells,
    page,
    period_text,
    plain,
    rate_text,
    rows,
    shown,
    total_text,
)
from spryng_instrument.cli.group import (
    again,
    commands,
    filter_of,
    ledger_of,
    ledger_options,
    options,
    when_options,
    who_options,
)
from spryng_instrument.cli.names import in_ledger
from spryng_instrument.cli.tables import Column, many, note, print_csv, print_json, print_table, printable
from spryng_instrument.errors import BillError
from spryng_instrument.prices import rate
from spryng_instrument.reports import decimal_text, label
from spryng_instrument.store.base import Store

plans_option = click.option("--plans", "plans_file", metavar="FILE", help=f"[SPRYNG_PLANS; {DEFAULT_FILE}]")


def plans_of(file: str | None) -> Plans:
    """The plans of a command: its option, then SPRYNG_PLANS, then the default file."""
    return load(file or os.environ.get("SPRYNG_PLANS") or DEFAULT_FILE)


@commands.command()
@click.option("--month", metavar="YYYY-MM", help="In which the billing period begins. [the present one]")
@click.option("--key", shell_complete=in_ledger("key"), help="Only this customer.")
@click.option("--number", help="A closed bill, by its number, instead of --month.")
@click.option("--close", "closing", is_flag=True, help="Freeze: give each bill its number. It never changes then.")
@click.option("--without-gaps", is_flag=True, help="Close also what has unknown costs, which go onto a later bill.")
@click.option("--messages", "listing", is_flag=True, help="CSV of every message behind every line.")
@click.option("--format", "form", type=click.Choice(["table", "csv", "json", "html"]), help="Default: table.")
@plans_option
@ledger_options
@click.pass_context
def bill(
    ctx: click.Context,
    /,
    month: str | None,
    key: str | None,
    number: str | None,
    closing: bool,
    without_gaps: bool,
    listing: bool,
    form: str | None,
    plans_file: str | None,
    **given: Any,
) -> None:
    """What each customer owes for a month, by its rate plan: a draft, until it is closed.

    A bill that depends on an unknown cost says "at least" and which models that is about. What comes late for a closed
    period, and what was corrected, is on the customer's next bill. Exit code 3 if a bill could not be closed.
    """
    if number is not None and (month is not None or key is not None or closing):
        raise click.UsageError("--number names a closed bill; it takes neither --month, --key nor --close")
    if without_gaps and not closing:
        raise click.UsageError("--without-gaps is about closing; give --close, too")
    if listing and form not in (None, "csv"):
        raise click.UsageError(f"--messages is CSV; it takes no --format {form}")
    store = ledger_of(given)
    failures: list[str] = []
    if number is not None:
        drafts = Drafts([invoice(store, number)])
    else:
        plans = plans_of(plans_file)
        account = plans.account(key)
        month = month or month_of(datetime.now(timezone.utc), account.anchor_day, account.zone)
        rated = rate(store)
        if rated.reason:
            note(f"Messages without a cost were not priced: {rated.reason}")
        desk = Desk(store, plans, key)
        drafts = desk.drafts(month)
        if closing:
            for index, draft in enumerate(drafts.bills):
                try:
                    drafts.bills[index] = desk.close(month, draft.key, without_gaps=without_gaps)
                except BillError as exc:
                    failures.append(str(exc))
            for customer, count in desk.never_billed(drafts.bills).items():
                note(f"{customer}: {many(count, 'message')} of earlier months that were not closed: close these, too.")
    if listing:
        _print_messages(store, drafts.bills)
    elif form == "csv":
        print_csv(COLUMNS, (row for each in drafts.bills for row in rows(each)))
    elif form == "json":
        print_json([msgspec.to_builtins(each) for each in drafts.bills])
    elif form == "html":
        click.echo(page(drafts.bills))
    else:
        for each in drafts.bills:
            _print_bill(each)
        for currency, total in sums(drafts.bills).items():
            click.echo(f"{many(len(drafts.bills), 'bill')}, {currency} {amount_text(total, currency)}")
    _say_what_is_missing(drafts)
    for failure in failures:
        note(f"Not closed: {failure}")
    ctx.exit(3 if failures else 0)


def _print_bill(bill: Bill) -> None:
    what = "draft" if bill.number is None else f"invoice {bill.number}"
    click.echo(printable(f"{bill.name}  {what}  {period_text(bill)}  plan {bill.plan}"))
    columns = [
        Column("line", fold=True),
        Column("quantity", True),
        Column("included", True, 3),
        Column("rate", False, 2),
        Column(bill.currency, True),
    ]
    lines = [
        [
            line.text if line.month == bill.month else f"{line.text} (of {line.month})",
            "" if line.quantity is None else plain(line.quantity),
            plain(line.included) if line.included else "",
            rate_text(line),
            amount_text(line.amount, bill.currency),
        ]
        for line in shown(bill)
    ]
    total = total_text(bill).replace(f"{bill.currency} ", "")
    print_table(columns, lines, ["total", "", "", "", total])
    for text in (*bill.gaps, *bill.notes):
        note(text)
    click.echo()


def _say_what_is_missing(drafts: Drafts) -> None:
    for key, count in drafts.unplanned:
        if key is None:
            note(
                f"{many(count, 'message')} without a key: on nobody's bill. `spryng doctor` names their lines of code."
            )
        else:
            note(f"{key}: {many(count, 'message')}, and no plan: not billed. Give it one in the file of plans.")
    for key, currency, amount in drafts.left_over:
        text = f"{currency} {amount_text(amount, currency)} beyond its closed bills"
        note(f"{key}: {text}, and no plan any more: on no bill until it has one.")
    if not (drafts.bills or drafts.unplanned or drafts.left_over):
        note("Nobody has anything to be billed in that month.")


def _print_messages(store: Store, bills: list[Bill]) -> None:
    found = [(each, behind(store, each)) for each in bills]  # before anything is printed: one may not be listable

    def lines() -> Iterator[list[Any]]:
        for each, messages in found:
            expected = {counted.month: counted.messages for counted in each.counted[:1]}
            for one in messages:
                expected[one.month] = expected.get(one.month, 0) - one.count
                yield behind_cells(each, one)
            if expected[each.month]:
                note(
                    f"{each.key}, {each.month}: the bill counts {expected[each.month]:+,} messages beside these. Were "
                    "messages deleted, or is the database restored from a dump?"
                )

    print_csv(BEHIND, lines())


@commands.command()
@click.option("--key", shell_complete=in_ledger("key"), help="Only this customer's.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Bills a page.")
@click.option("--after", metavar="CURSOR", help="The page after that one; the page before it names the command.")
@click.option("--json", "as_json", is_flag=True, help="One object a line, whole.")
@ledger_options
@click.pass_context
def bills(ctx: click.Context, /, key: str | None, limit: int, after: str | None, as_json: bool, **given: Any) -> None:
    """The bills that were closed, the last one first."""
    found = last_invoices(ledger_of(given), key, after=after, limit=limit)
    if as_json:
        for each in found.rows:
            print_json(msgspec.to_builtins(each), indent=None)
    elif found.rows:
        columns = [
            Column("number"),
            Column("key", fold=True),
            Column("month"),
            Column("period", leave_out=2),
            Column("closed (UTC)", leave_out=1),
            Column("total", True),
        ]
        cells = [
            [
                each.number or "",
                each.key,
                each.month,
                period_text(each),
                f"{each.drawn:%Y-%m-%d %H:%M}",
                total_text(each),
            ]
            for each in found.rows
        ]
        print_table(columns, cells)
    elif after is None:
        note("No bill was closed. To see drafts: spryng bill --month 2026-11")
    if found.next:
        note(f"Older ones: {again(ctx, after=found.next)}")


@commands.command("void")
@click.argument("message_id")
@click.option("--reason", required=True, help="What an auditor will read.")
@ledger_options
def void_command(message_id: str, reason: str, **given: Any) -> None:
    """Declare that a message is not to be billed. It stays in the ledger; reports say that it is void.

    If its bill is closed, it is taken off the next one.
    """
    record = void(ledger_of(given), message_id, reason)
    note(f"Message {record.subject} of {label('key', record.key)} is void: {reason}")


@commands.command("adjust")
@click.option("--key", required=True, shell_complete=in_ledger("key"), help="The customer.")
@click.option("--amount", required=True, help="In the currency of its plan; negative: a credit. --amount=-5.00")
@click.option("--reason", required=True, help="What the line on the bill says.")
@click.option("--month", metavar="YYYY-MM", help="The billing period that it is of. [the present one]")
@plans_option
@ledger_options
def adjust_command(key: str, amount: str, reason: str, month: str | None, plans_file: str | None, **given: Any) -> None:
    """Add an amount to a customer's bill, or take it off. If that bill is closed, it goes onto the next one."""
    try:
        value = Decimal(amount)
    except InvalidOperation:
        raise click.UsageError(f"--amount {amount!r} is no number; write it as 12.50 or -5.00") from None
    record = adjust(ledger_of(given), plans_of(plans_file), key, value, reason, month)
    note(f"{record.body['currency']} {record.body['amount']} for {key}, of {record.subject}: {reason}")


@commands.command("events")
@click.option("--to", "system", type=click.Choice(["stripe", "lago"]), required=True, help="Whose format.")
@click.option("--meter", type=click.Choice(METERS), default="messages", show_default=True, help="What is counted.")
@click.option("--name", required=True, help="Stripe's event_name, or the code of Lago's billable metric.")
@options(who_options, when_options)
@plans_option
@ledger_options
@click.pass_context
def events_command(
    ctx: click.Context, /, system: str, meter: str, name: str, zone: str, plans_file: str | None, **given: Any
) -> None:
    """Messages as events for another billing system, as JSON Lines: one of Stripe a line, or a batch of Lago.

    Which customer is whose, the file of plans says: stripe = "cus_..." or lago = "..." under [keys.NAME]. Sent twice,
    an event is counted once, by its id, which is the message's. Exit code 3 if a customer has no id there.
    """
    skipped = Skipped()
    where = filter_of(given, zone)
    store, plans = ledger_of(given), plans_of(plans_file)
    make = stripe if system == "stripe" else lago
    for event in make(store, plans, where, meter, name, skipped):
        print_json(event, indent=None)
    for key, count in skipped.unmapped.items():
        note(f"{label('key', key)}: {many(count, 'message')} left out: no {system} id is given for it in the plans.")
    if skipped.too_old:
        note(f"{many(skipped.too_old, 'message')} left out: Stripe takes none that are older than 35 days.")
    ctx.exit(3 if skipped.unmapped or skipped.too_old else 0)


@commands.command("rate")
@options(when_options, click.option("--key", shell_complete=in_ledger("key"), help="Only this customer."))
@click.option("--apply", is_flag=True, help="Set the new costs. Those that they replace are kept.")
@ledger_options
def rate_command(zone: str, apply: bool, key: str | None, **given: Any) -> None:
    """Price messages anew by the prices of now, after these changed: show the difference, then apply it.

    Closed bills stay as they are: what a bill by cost differs by is on the customer's next one.
    """
    where = filter_of({**given, "key": key, "no_key": False, "tags": (), "model": None, "conversation": None}, zone)
    store = ledger_of(given)
    rate(store)
    changed = reprice(store, where, apply=apply)
    if not changed:
        note("No message would cost anything else.")
        return
    columns = [
        Column("model", fold=True),
        *(Column(name, True) for name in ("messages", "USD", "new USD", "difference")),
    ]
    cells = [
        [
            label("model", row.model),
            f"{row.messages:,}",
            *(decimal_text(each) or "" for each in (row.before_usd, row.after_usd, row.after_usd - row.before_usd)),
        ]
        for row in changed
    ]
    print_table(columns, cells)
    note("Applied." if apply else "Nothing was changed. To set these costs: add --apply")

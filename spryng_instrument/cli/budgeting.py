"""The commands of budgets: how much of each is used, and whether one is used up."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import click

from spryng_instrument.alerts import Alerts
from spryng_instrument.budgets import Budgets, BudgetState, amount_text, budget_states, read_budgets
from spryng_instrument.cli.group import commands, ledger_of, ledger_options, options
from spryng_instrument.cli.tables import Column, many, note, print_json, print_table
from spryng_instrument.errors import SettingsError
from spryng_instrument.prices import rate
from spryng_instrument.reports import decimal_text
from spryng_instrument.settings import resolve
from spryng_instrument.store.base import Store

budget_options = options(
    click.option("--budgets", "path", metavar="FILE", help="The budgets, as TOML. [SPRYNG_BUDGETS]"),
    click.option("--json", "as_json", is_flag=True, help="As a JSON list, an object for each line of the table."),
    ledger_options,
)


@commands.group(invoke_without_command=True)
@budget_options
@click.pass_context
def budgets(ctx: click.Context, /, path: str | None, as_json: bool, **given: Any) -> None:
    """How much is used of each budget, in the period that is running.

    A line for each limit, and where each customer has the budget for itself, for each customer with usage. Percent are
    rounded down: at 100 the limit is reached.
    """
    ctx.obj = given | {"path": path}
    if ctx.invoked_subcommand is None:
        found, store, now = _opened(path, given)
        _print(budget_states(store, found.budgets, now), as_json)


@budgets.command()
@budget_options
@click.pass_context
def check(ctx: click.Context, /, path: str | None, as_json: bool, **given: Any) -> None:
    """Print the budgets that are used up, and tell of what nobody has been told of; for cron.

    Exit code 3 if one is used up. Alerts are logged, and posted to the webhook of the file.
    """
    given = {name: value or ctx.obj[name] for name, value in given.items()}
    found, store, now = _opened(path or ctx.obj["path"], given)
    states = budget_states(store, found.budgets, now)
    alerts = Alerts(store, found)
    alerts.look(states, now)
    alerts.post()
    alerts.close()
    reached = [state for state in states if state.percent >= 100]
    if as_json or reached:
        _print(reached, as_json)
    note(f"{len(reached)} of {many(len(states), 'limit')} reached")
    ctx.exit(3 if reached else 0)


def _opened(path: str | None, given: dict[str, Any]) -> tuple[Budgets, Store, datetime]:
    path = resolve({"budgets": path}).budgets
    if path is None:
        raise SettingsError("which budgets? Give --budgets FILE, or set SPRYNG_BUDGETS")
    found = read_budgets(path)
    store = ledger_of(given)
    rate(store)
    return found, store, datetime.now(timezone.utc)


def _print(states: Sequence[BudgetState], as_json: bool) -> None:
    if as_json:
        print_json([_record(state) for state in states])
    elif states:
        print_table(
            [
                Column("budget", fold=True), Column("key", fold=True), Column("tag", leave_out=4),
                Column("used", True), Column("limit", True), Column("%", True), Column("state"),
                Column("since (UTC)", leave_out=3), Column("begins anew (UTC)", leave_out=2),
            ],
            [_line(state) for state in states],
        )  # fmt: skip
    else:
        note("Nothing is used of any budget.")


def _line(state: BudgetState) -> list[str]:
    return [
        state.name,
        state.key or "(all)",
        state.tag or "-",
        ("at least " if state.at_least else "") + amount_text(state.used, state.unit),
        amount_text(state.limit, state.unit),
        f"{state.percent:,}",
        _state(state),
        f"{state.start:%Y-%m-%d %H:%M}",
        f"{state.stop:%Y-%m-%d %H:%M}",
    ]


def _state(state: BudgetState) -> str:
    if state.percent < 100:
        return "ok"
    return "refusing" if state.hard else "reached"


def _record(state: BudgetState) -> dict[str, Any]:
    """A state as JSON has it: money as decimal strings."""

    def number(amount: Any) -> Any:
        return decimal_text(amount) if state.unit == "cost_usd" else amount

    return {
        "budget": state.name, "key": state.key, "tag": state.tag, "unit": state.unit, "used": number(state.used),
        "at_least": state.at_least, "limit": number(state.limit), "percent": state.percent, "hard": state.hard,
        "state": _state(state), "since": state.start.isoformat(), "until": state.stop.isoformat(),
    }  # fmt: skip

"""The command that writes messages to a file: export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from spryng_instrument.cli.group import commands, filter_of, ledger_of, ledger_options, when_options, who_options
from spryng_instrument.cli.tables import note
from spryng_instrument.exporting import FORMATS, Exported, Writer, export, rows_of, whole_file, writer_of
from spryng_instrument.periods import zone_of
from spryng_instrument.store.base import Filter, Store
from spryng_instrument.tables import decimals_for, many, money, void_text


@commands.command("export")
@click.option("-o", "--output", type=click.Path(), metavar="FILE", help="Where to. [stdout]")
@click.option("--format", "form", type=click.Choice(FORMATS), help="Default: by the ending of FILE; csv for stdout.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@who_options
@when_options
@ledger_options
@click.pass_context
def export_command(
    ctx: click.Context, /, output: str | None, form: str | None, force: bool, zone: str, **given: Any
) -> None:
    """Write every message, with its usage and cost, as CSV, JSON Lines or Parquet.

    In the order in which the ledger got them, each once. FILE is there once all of it is, and never a part. In the end
    the sums of what was written are compared with the ledger's own: exit code 3 if they differ.

    Parquet needs the extra [parquet], and has times in UTC.
    """
    where, tz = filter_of(given, zone), zone_of(zone)
    form = form or _form_of(output)
    store = ledger_of(given)
    if output is None:
        if form == "parquet":
            raise click.UsageError("Parquet cannot go to stdout; name a file with --output.")
        out = sys.stdout.buffer
        exported = _export(store, where, writer_of(form, out, tz))
    else:
        try:
            with whole_file(output, overwrite=force) as file:
                exported = _export(store, where, writer_of(form, file, tz))
        except FileExistsError as exc:
            raise click.UsageError(f"{exc.filename} is there already; --force replaces it.") from exc
        except OSError as exc:
            raise click.ClickException(f"{output}: {exc.strerror or exc}. Nothing was written there.") from exc
    code = _say(exported, output)
    if voided := store.voided(where).messages:
        note(void_text(voided))
    ctx.exit(code)


def _form_of(output: str | None) -> str:
    if output is None:
        return "csv"
    ending = Path(output).suffix.lower().lstrip(".")
    form = "jsonl" if ending == "ndjson" else ending
    if form not in FORMATS:
        raise click.UsageError(
            f"{output} has no ending that says what it is; give --format, one of: {', '.join(FORMATS)}."
        )
    return form


def _export(store: Store, where: Filter, writer: Writer) -> Exported:
    if not sys.stderr.isatty():
        return export(store, where, writer)
    with click.progressbar(length=rows_of(store.total(where)), label="Exporting", file=sys.stderr) as bar:
        return export(store, where, writer, bar.update)


def _say(exported: Exported, output: str | None) -> int:
    """Say what was written. Returns the exit code."""
    sums = exported.written
    cost = money(sums.cost_usd, sums.unpriced, decimals_for(sums.cost_usd))
    others = f", {sums.errors:,} failed and {sums.cancelled:,} cancelled" if sums.errors or sums.cancelled else ""
    where = f"{output}: " if output else ""
    note(
        f"{where}{many(sums.messages, 'message')} to bill{others}; {sums.input_tokens:,} tokens in, "
        f"{sums.output_tokens:,} out; {cost} USD."
    )
    if exported.is_exact:
        note("Compared: the ledger has exactly these.")
    elif exported.arrived > 0:
        note(f"{many(exported.arrived, 'message')} came while this was written, and are not in it.")
    else:
        note(f"The ledger has other sums: {exported.ledger}; written were {sums}. Was it priced anew? Export again.")
        return 3
    return 0

"""The commands of the server and of its ledger: serve, link, keys, copy."""

from __future__ import annotations

import sys
import time

import click

from spryng_instrument.cli.group import commands, needs_server
from spryng_instrument.cli.names import in_ledger, zones
from spryng_instrument.cli.printing import key_record, print_keys
from spryng_instrument.cli.tables import many, note, print_json, printable
from spryng_instrument.ledger import settings_of
from spryng_instrument.periods import zone_of
from spryng_instrument.settings import DEFAULT_DESTINATION
from spryng_instrument.store import open_store

LISTED = 10
"""Conflicts and differences that are listed."""


@commands.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8321, show_default=True)
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes.")
@click.option("--destination", metavar="URL", help=f"The ledger. [SPRYNG_DESTINATION; {DEFAULT_DESTINATION}]")
def serve(host: str, port: int, workers: int, destination: str | None) -> None:
    """Serve the Track Usage API: takes messages of many machines, and answers what was used.

    Without an API key it listens on this machine only. SIGTERM ends it, once what it accepted is recorded.
    """
    with needs_server():
        from spryng_instrument.server import serve as server
    settings = settings_of(destination, None)
    note(server.check(settings, host))
    note(server.describe(settings, host, port))
    server.serve(settings, host=host, port=port, workers=workers)


@commands.command()
@click.argument("source")
@click.argument("target")
@click.pass_context
def copy(ctx: click.Context, source: str, target: str) -> None:
    """Copy a ledger from the SOURCE URL to the TARGET URL, whatever engines they are, and compare them.

    Cut off, it is begun again with the same command: what is there is skipped. Applications may go on writing to the
    source; copy again once they write to the target. Exit code 3 if the ledgers differ in the end.
    """
    from spryng_instrument.copying import copy as copy_ledger

    given = open_store(settings_of(source, None).destination, create=False)
    taking = open_store(settings_of(target, None).destination)
    with click.progressbar(length=given.health().messages, label="Copying", file=sys.stderr) as bar:
        copied = copy_ledger(given, taking, bar.update)
    note(f"{many(copied.new, 'message')} copied, {copied.there:,} were there already.")
    for id in copied.conflicts[:LISTED]:
        note(f"Conflict: the target has another message {id}, and keeps it.")
    for line in copied.differences[:LISTED]:
        note(f"Difference: {line}")
    if copied.conflicts or copied.differences:
        note(f"{many(len(copied.conflicts), 'conflict')}, {many(len(copied.differences), 'difference')}.")
        ctx.exit(3)
    note("Compared: the target has all that the source has.")


@commands.command()
@click.argument("key", required=False, shell_complete=in_ledger("key"))
@click.option("--days", type=click.IntRange(1, 3650), default=30, show_default=True, help="How long it is good.")
@click.option("--costs", is_flag=True, help="Show what OpenAI charged, too.")
@click.option("--tz", "zone", default="UTC", show_default=True, shell_complete=zones, help="IANA zone of its days.")
@click.option(
    "--url", default="http://127.0.0.1:8321", show_default=True, help="The server, as the customer reaches it."
)
@click.option("--revoke-all", is_flag=True, help="End every link that was made, and every session.")
@click.option("--destination", metavar="URL", help="The server's ledger. [SPRYNG_DESTINATION]")
def link(
    key: str | None, days: int, costs: bool, zone: str, url: str, revoke_all: bool, destination: str | None
) -> None:
    """Make a link to the usage of the customer with that KEY, for whoever has it. It goes to stdout.

    It shows that customer's messages, conversations and tokens on the dashboard, and nothing else.
    """
    if revoke_all == (key is not None):
        raise click.UsageError("name one KEY, or say --revoke-all")
    with needs_server():
        from spryng_instrument.server.dashboard import routes, session
    store = open_store(settings_of(destination, None).destination, create=False)
    if key is None:
        session.renew(store)
        note("Every link and every session is ended; a running server knows within 5 seconds.")
        return
    zone_of(zone)
    made = session.Link(key, int(time.time()) + days * 86_400, costs, zone)
    note(f"Good for {many(days, 'day')}, for {printable(key)}:")
    click.echo(url.rstrip("/") + routes.address_of_link(session.Secret(store), made))


@commands.group()
def keys() -> None:
    """API keys of the server: who may send messages, and who may read."""


key_options = click.option("--destination", metavar="URL", help="The server's ledger. [SPRYNG_DESTINATION]")


@keys.command()
@click.argument("name")
@click.option("--scope", "scopes", type=click.Choice(["ingest", "read"]), multiple=True, help="[ingest]; again: both.")
@key_options
def create(name: str, scopes: tuple[str, ...], destination: str | None) -> None:
    """Make a key, for an application or a person of that NAME. It is shown once, on stdout."""
    with needs_server():
        from spryng_instrument.server import keys as ring
    key, text = ring.create(open_store(settings_of(destination, None).destination), name, scopes or ("ingest",))
    note(f"Key {key.id} of {name}, to {' and '.join(key.scopes)}. It is not kept here, and cannot be shown again:")
    click.echo(text)


@keys.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
@key_options
def list_keys(as_json: bool, destination: str | None) -> None:
    """Every key there is, the oldest first; not what it is, of which only a digest is kept."""
    found = open_store(settings_of(destination, None).destination, create=False).api_keys()
    if as_json:
        for key in found:
            print_json(key_record(key), indent=None)
    elif found:
        print_keys(found)
    else:
        note("No key was made. Make one: spryng keys create NAME")


@keys.command()
@click.argument("id")
@key_options
def revoke(id: str, destination: str | None) -> None:
    """Refuse the key with that ID from now on; a running server does within 5 seconds."""
    with needs_server():
        from spryng_instrument.server import keys as ring
    key = ring.revoke(open_store(settings_of(destination, None).destination, create=False), id)
    note(f"Key {key.id} of {key.name} is revoked.")

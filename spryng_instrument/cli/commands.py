"""The commands of `spryng`: their options, and what they print. What they compute is in reports, doctor and demo."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from typing import Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from spryng_instrument import __version__
from spryng_instrument.cli.ledger import deliver_waiting, open_ledger, push, settings_of
from spryng_instrument.cli.printing import (
    key_record,
    message_line,
    print_keys,
    print_messages,
    print_messages_csv,
    print_usage,
    say_gaps,
)
from spryng_instrument.cli.tables import many, note, print_csv, print_json
from spryng_instrument.errors import (
    MissingExtraError,
    QueryError,
    SchemaTooNewError,
    SettingsError,
    SpryngError,
    StoreError,
    StoreNotOursError,
)
from spryng_instrument.prices import price_of, rate
from spryng_instrument.reports import WINDOWS, decimal_text, message_record, period, usage_report
from spryng_instrument.settings import DEFAULT_DESTINATION, without_secrets
from spryng_instrument.store import open_store
from spryng_instrument.store.base import GROUPS, Filter, Page, Store, StoredMessage, zone_of

LISTED = 10
"""Conflicts and differences that are listed."""
F = TypeVar("F", bound=Callable[..., Any])


class Failure(click.ClickException):
    """An error of ours: one line on stderr, no traceback."""

    def __init__(self, error: SpryngError) -> None:
        super().__init__(str(error))
        self.error = error

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """2 for what can be typed better, 1 for what failed."""
        return 2 if isinstance(self.error, (QueryError, SettingsError)) else 1


class Commands(click.Group):
    """The group of all commands: turns what goes wrong into exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a reader that went away is noticed, and not at the interpreter's exit
            return result
        except BrokenPipeError:
            with suppress(OSError, ValueError):  # `| head` has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except KeyboardInterrupt:
            ctx.exit(130)
        except SpryngError as exc:
            raise Failure(exc) from exc


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order of --help."""
    return lambda function: reduce(lambda inner, decorate: decorate(inner), reversed(decorators), function)


ledger_options = options(
    click.option("--destination", metavar="URL", help=f"The ledger. [SPRYNG_DESTINATION; {DEFAULT_DESTINATION}]"),
    click.option("--journal", metavar="DIR", help="Its journal folder. [SPRYNG_JOURNAL; beside the ledger]"),
)
who_options = options(
    click.option("--key", help="Only this customer."),
    click.option("--no-key", is_flag=True, help="Only messages without a key."),
    click.option("--tag", "tags", multiple=True, help="Only messages with this tag; again: with all of them."),
    click.option("--model", help="Only this model, as it answered."),
    click.option("--conversation", help="Only this conversation."),
)
when_options = options(
    click.option("--since", metavar="WHEN", help="From then: 2026-11-01, 2026-11-01T14:00, today, yesterday, 24h, 7d."),
    click.option("--until", metavar="WHEN", help="Until then. A date includes that whole day, a time is exclusive."),
    click.option("--month", metavar="YYYY-MM", help="One month, instead of --since and --until."),
    click.option("--tz", "zone", default="UTC", show_default=True, metavar="ZONE", help="Whose days: Europe/Berlin."),
)
form_options = options(
    click.option("--format", "form", type=click.Choice(["table", "csv", "json"]), help="Default: table."),
    click.option("--json", "as_json", is_flag=True, help="The same as --format json."),
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="spryng")
def commands() -> None:
    """What each of your customers used of the OpenAI API.

    Data goes to stdout, notes to stderr. Exit codes: 0 done, 1 failed, 2 used wrongly, 3 a check found something wrong.
    """


@commands.command()
@click.option("--by", type=click.Choice(GROUPS), default="key", show_default=True, help="What a row is.")
@click.option("--window", type=click.Choice(WINDOWS), help="The groups of each day or month.")
@who_options
@when_options
@form_options
@ledger_options
def usage(by: str, window: str | None, zone: str, form: str | None, as_json: bool, **given: Any) -> None:
    """Usage and cost by customer, tag, conversation, model, day or month.

    Messages are those to bill: answered, or streams that were begun. Input contains what was cached. The total counts
    each message once; by tag, the rows may add up to more. Cost is the list price of the tokens in US dollars; "at
    least" says that some have no known price.

    CSV has no row for the total; its cost_usd is empty where none is known.
    """
    form = _form(form, as_json)
    where = _filter(given, zone)
    store = _ledger(given)
    report = usage_report(store, by, where, zone, window)
    if form == "json":
        print_json(report.as_json())
    elif form == "csv":
        print_csv(report.columns, ([*row[:-1], decimal_text(row[-1])] for row in report.as_table()))
    elif report.rows:
        print_usage(report)
    if not report.rows:
        _say_empty(store, where)
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
    form = _form(form, as_json)
    where = _filter(given, zone)
    store = _ledger(given)
    rate(store)
    page = store.messages(where, after=after, limit=limit)
    tz = zone_of(zone)
    if form == "json":
        for row in page.rows:
            print_json(message_record(row, tz), indent=None)
    elif form == "csv":
        print_messages_csv([message_record(row, tz) for row in page.rows])
    elif page.rows:
        print_messages(page.rows, zone)
    if not page.rows and after is None:
        _say_empty(store, where)
    if page.next:
        note(f"Older ones: {_again(ctx, after=page.next)}")


@commands.command()
@who_options
@click.option("-n", "--lines", type=click.IntRange(0, 100_000), default=10, show_default=True, help="Last ones first.")
@click.option("--interval", type=click.FloatRange(0.05, 3600), default=0.5, show_default=True, help="In seconds.")
@click.option("--tz", "zone", default="UTC", show_default=True, metavar="ZONE", help="The times' zone.")
@click.option("--json", "as_json", is_flag=True, help="One object a line, with every field.")
@ledger_options
def tail(lines: int, interval: float, zone: str, as_json: bool, **given: Any) -> None:
    """Follow new messages, of every process, until Ctrl-C: each once, in the order in which they reach the ledger."""
    where = _filter(given, zone)
    tz = zone_of(zone)
    store = _ledger(given)
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


@commands.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8321, show_default=True)
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes.")
@click.option("--destination", metavar="URL", help=f"The ledger. [SPRYNG_DESTINATION; {DEFAULT_DESTINATION}]")
def serve(host: str, port: int, workers: int, destination: str | None) -> None:
    """Serve the Track Usage API: takes messages of many machines, and answers what was used.

    Without an API key it listens on this machine only. SIGTERM ends it, once what it accepted is recorded.
    """
    with _needs_server():
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
    with _needs_server():
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
    with _needs_server():
        from spryng_instrument.server import keys as ring
    key = ring.revoke(open_store(settings_of(destination, None).destination, create=False), id)
    note(f"Key {key.id} of {key.name} is revoked.")


@contextmanager
def _needs_server() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.split(".")[0] not in ("starlette", "uvicorn", "httptools", "prometheus_client"):
            raise  # it is there, but broken: show its own error
        raise MissingExtraError("server", "the server") from exc


@commands.command(add_help_option=False)
def run() -> NoReturn:
    """Run a command with its OpenAI calls recorded, no change to its code: spryng run -- python app.py"""
    raise AssertionError("cli.main() takes it before click does")


def _filter(given: dict[str, Any], zone: str) -> Filter:
    if given["no_key"] and given["key"] is not None:
        raise click.UsageError("--key and --no-key exclude each other.")
    since, until = period(given.get("since"), given.get("until"), given.get("month"), zone)
    return Filter(given["key"], given["no_key"], given["tags"], given["model"], given["conversation"], since, until)


def _ledger(given: dict[str, Any]) -> Store:
    settings = settings_of(given["destination"], given["journal"])
    store = open_ledger(settings)
    left = deliver_waiting(settings)
    if left is not None:
        note(f"Messages that wait in {settings.journal} are not in these figures: {left}")
    return store


def _form(form: str | None, as_json: bool) -> str:
    if as_json and form not in (None, "json"):
        raise click.UsageError(f"--json and --format {form} exclude each other.")
    return "json" if as_json else form or "table"


def _say_empty(store: Store, where: Filter) -> None:
    if where != Filter() and store.messages(limit=1).rows:
        note("No message matches. The newest of all: spryng messages")
    else:
        note("The ledger is empty. To see how it looks with messages: spryng demo")


def _again(ctx: click.Context, **changed: str) -> str:
    """This command line with other values for some of its options."""
    words = [*ctx.command_path.split()]
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name in changed or ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        if isinstance(parameter, click.Option) and parameter.is_flag:
            words.append(parameter.opts[0])
        else:
            for one in value if parameter.multiple else [value]:
                words += [parameter.opts[0], str(one)]
    for name, value in changed.items():
        words += [f"--{name}", value]
    return shlex.join(words)

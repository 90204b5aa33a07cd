"""What the commands share: the group that they belong to, their options, and what is made of these."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from spryng_instrument import __version__
from spryng_instrument.cli.names import in_ledger, moments, zones
from spryng_instrument.cli.tables import note
from spryng_instrument.errors import MissingExtraError, PlanError, QueryError, SettingsError, SpryngError
from spryng_instrument.ledger import deliver_waiting, open_ledger, settings_of
from spryng_instrument.periods import period
from spryng_instrument.settings import DEFAULT_DESTINATION
from spryng_instrument.store.base import Filter, Store

F = TypeVar("F", bound=Callable[..., Any])


class Failure(click.ClickException):
    """An error of ours: one line on stderr, no traceback."""

    def __init__(self, error: SpryngError) -> None:
        super().__init__(str(error))
        self.error = error

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """2 for what can be typed better, 1 for what failed."""
        return 2 if isinstance(self.error, (PlanError, QueryError, SettingsError)) else 1


class Commands(click.Group):
    """The group of all commands: turns what goes wrong into exit codes, and shows whole sentences in its help."""

    group_class = type

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=1_000)) for name in names])

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
    click.option("--key", shell_complete=in_ledger("key"), help="Only this customer."),
    click.option("--no-key", is_flag=True, help="Only messages without a key."),
    click.option(
        "--tag",
        "tags",
        multiple=True,
        shell_complete=in_ledger("tag"),
        help="Only messages with this tag; again: with all of them.",
    ),
    click.option("--model", shell_complete=in_ledger("model"), help="Only this model, as it answered."),
    click.option("--conversation", shell_complete=in_ledger("conversation"), help="Only this conversation."),
)
when_options = options(
    click.option(
        "--since",
        metavar="WHEN",
        shell_complete=moments,
        help="From then: 2026-11-01, 2026-11-01T14:00, today, yesterday, 24h, 7d.",
    ),
    click.option(
        "--until",
        metavar="WHEN",
        shell_complete=moments,
        help="Until then. A date includes that whole day, a time is exclusive.",
    ),
    click.option("--month", metavar="YYYY-MM", help="One month, instead of --since and --until."),
    click.option(
        "--tz",
        "zone",
        default="UTC",
        show_default=True,
        metavar="ZONE",
        shell_complete=zones,
        help="Whose days: Europe/Berlin.",
    ),
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


def filter_of(given: dict[str, Any], zone: str) -> Filter:
    """The messages that who_options and when_options choose."""
    if given["no_key"] and given["key"] is not None:
        raise click.UsageError("--key and --no-key exclude each other.")
    since, until = period(given.get("since"), given.get("until"), given.get("month"), zone)
    return Filter(given["key"], given["no_key"], given["tags"], given["model"], given["conversation"], since, until)


def ledger_of(given: dict[str, Any]) -> Store:
    """The ledger that ledger_options choose, with what waits for it in the journal delivered."""
    settings = settings_of(given["destination"], given["journal"])
    store = open_ledger(settings)
    left = deliver_waiting(settings)
    if left is not None:
        note(f"Messages that wait in {settings.journal} are not in these figures: {left}")
    return store


def form_of(form: str | None, as_json: bool) -> str:
    """ "table", "csv" or "json": what form_options choose."""
    if as_json and form not in (None, "json"):
        raise click.UsageError(f"--json and --format {form} exclude each other.")
    return "json" if as_json else form or "table"


def say_empty(store: Store, where: Filter) -> None:
    """Say why there is nothing to show."""
    if where != Filter() and store.messages(limit=1).rows:
        note("No message matches. The newest of all: spryng messages")
    else:
        note("The ledger is empty. To see how it looks with messages: spryng demo")


def again(ctx: click.Context, **changed: str) -> str:
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


@contextmanager
def needs_server() -> Iterator[None]:
    """What is imported here belongs to the extra of the server."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.split(".")[0] not in ("starlette", "uvicorn", "httptools", "prometheus_client"):
            raise  # it is there, but broken: show its own error
        raise MissingExtraError("server", "the server") from exc

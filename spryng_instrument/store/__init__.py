"""Where messages are kept. `base` says what a store can do; each module beside it is one engine, or one way out."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from spryng_instrument.errors import MissingExtraError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spryng_instrument.store.base import Destination, Store


def open_destination(url: str, api_key: str | None = None) -> Destination:
    """What a destination URL that `settings` has checked delivers to. Nothing is connected yet.

    Raises:
        MissingExtraError: the driver that it needs is not installed.
    """
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        from spryng_instrument.store.http import HttpDestination

        return HttpDestination(url, api_key)
    if scheme.startswith("cloudevents+"):
        from spryng_instrument.store.cloudevents import CloudEventsDestination

        return CloudEventsDestination(url.removeprefix("cloudevents+"), api_key)
    if scheme.startswith("otlp+"):
        from spryng_instrument.store.otlp import OtlpDestination

        with needs("otlp", "opentelemetry", url):
            return OtlpDestination(url.removeprefix("otlp+"), api_key)
    return open_store(url)


def open_store(url: str, *, create: bool = True) -> Store:
    """The ledger of a destination URL that `settings` has checked.

    Args:
        create: whether a ledger that is not there is made by the first use, or is an error.

    Raises:
        SettingsError: messages can only be delivered there, not read.
        MissingExtraError: the driver that it needs is not installed.
    """
    scheme = urlsplit(url).scheme
    if scheme == "sqlite":
        from spryng_instrument.settings import sqlite_path
        from spryng_instrument.store.sqlite import SqliteStore

        return SqliteStore(sqlite_path(url), create=create)
    if scheme == "postgresql":
        with needs("postgres", "psycopg", url):
            from spryng_instrument.store.postgres import PostgresStore

            return PostgresStore(url, create=create)
    if scheme == "clickhouse":
        with needs("clickhouse", "clickhouse_connect", url):
            from spryng_instrument.store.clickhouse import ClickHouseStore

            return ClickHouseStore(url, create=create)
    raise SettingsError(
        f"{scheme}:// takes messages, but cannot be read from here; ask the ledger behind it, or open that one with "
        "--destination"
    )


@contextmanager
def needs(extra: str, package: str, url: str) -> Iterator[None]:
    """What is imported here belongs to an extra."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.split(".")[0] not in (package, f"{package}_pool"):
            raise  # it is there, but broken: show its own error
        raise MissingExtraError(extra, f"{urlsplit(url).scheme}://") from exc

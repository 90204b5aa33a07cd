"""Every setting in one table: its argument, its environment variable, its type, its default, its meaning.

An argument given to instrument() wins over the environment variable, which wins over the default. What cannot be
used is said here, at start-up, with the value and what to do. This module knows nothing of the SDK or of any store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from spryng_instrument.errors import SettingsError

DEFAULT_DESTINATION = "sqlite:///.spryng/usage.db"
DESTINATIONS = {
    "sqlite": "sqlite:///relative/path.db or sqlite:////absolute/path.db",
    "https": "https://usage.example.com (a Track Usage API; http:// within a network that is trusted)",
    "postgresql": "postgresql://user:password@host/database",
    "clickhouse": "clickhouse://user:password@host:8123/database",
    "cloudevents+https": "cloudevents+https://openmeter.example.com/api/v1/events",
    "otlp+https": "otlp+https://collector.example.com:4318",
}
"""What messages can be delivered to, by the scheme of its URL, with an example."""
_ALIASES = {"postgres": "postgresql"}
_PLAIN_HTTP = ("http", "cloudevents+http", "otlp+http")
BUDGET_POLICIES = ("raise", "warn")
MISSING_KEY_POLICIES = ("warn", "ignore", "raise")


@dataclass(frozen=True, slots=True)
class Settings:
    """What instrument() was told, checked and complete."""

    destination: str = DEFAULT_DESTINATION
    """URL of where messages go: one of DESTINATIONS."""

    journal: str = ""
    """Folder where messages wait until they are delivered. Default: beside a SQLite ledger, its name and ".journal";
    for another destination in ".spryng", named after it."""

    api_key: str | None = field(default=None, repr=False)
    """Key of the Track Usage API or other service that an http destination is."""

    default_key: str | None = None
    """Customer of the calls made outside any usage_context. None: they are recorded without a key."""

    on_missing_key: str = "warn"
    """What a call without a key does: "warn" once per line of code, "ignore", or "raise" before it is sent."""

    capture_query: bool = False
    """Record the last user message of each call as its query. Off: no content is ever recorded."""

    include_usage_hosts: tuple[str, ...] = ()
    """Hosts besides api.openai.com whose streams are asked for their usage: "gateway.example.com", "127.0.0.1:8000"."""

    beat_s: float = 0.5
    """Seconds between a message and its delivery, at most; many messages share one transaction."""

    exit_timeout_s: float = 2.0
    """Seconds that the exit of the interpreter may wait for delivery. What is left stays in the journal."""

    memory_limit: int = 10_000
    """Messages held in memory while the journal's disk takes none; beyond it they are dropped and counted."""

    threads: bool = False
    """Have threads and thread pools carry the usage_context of whoever starts them."""

    budgets: str | None = None
    """TOML file of budgets. None: there are none, and no call is ever looked up."""

    on_budget: str | Callable[[Any], object] = "raise"
    """What a call does that a hard budget has no room for: "raise" before it is sent, "warn" once a period, or a
    function that gets a BudgetReached; the call goes through if it returns."""


class Setting(NamedTuple):
    """How one field of Settings is read from an argument and from the environment."""

    check: Callable[[str, Any], Any]
    from_text: Callable[[str, str], Any]


def env_name(name: str) -> str:
    """The environment variable of a setting."""
    return f"SPRYNG_{name.upper()}"


def resolve(arguments: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from *arguments* (None: not given), then SPRYNG_ variables, then defaults.

    Raises:
        SettingsError: an unknown name, or a value that cannot be used; the message names where it came from.
    """
    environ = os.environ if environ is None else environ
    if unknown := sorted(set(arguments) - set(TABLE)):
        raise SettingsError(f"instrument() has no setting {unknown[0]!r}. It has: {', '.join(TABLE)}.")
    values: dict[str, Any] = {}
    for name, setting in TABLE.items():
        variable = env_name(name)
        if arguments.get(name) is not None:
            values[name] = setting.check(f"{name}={arguments[name]!r}", arguments[name])
        elif environ.get(variable):
            where = f"{variable}={environ[variable]!r}"
            values[name] = setting.check(where, setting.from_text(where, environ[variable]))
    destination = values.get("destination") or _destination(DEFAULT_DESTINATION, DEFAULT_DESTINATION)
    values["destination"] = destination
    values.setdefault("journal", _journal_of(destination))
    return Settings(**values)


def differences(first: Settings, other: Settings) -> list[str]:
    """How *other* differs from *first*, a line each: "journal: '/a' (kept), not '/b'"."""
    return [
        f"{each.name}: {_shown(each.name, first)} (kept), not {_shown(each.name, other)}"
        for each in fields(Settings)
        if getattr(first, each.name) != getattr(other, each.name)
    ]


def without_secrets(url: str) -> str:
    """A destination URL as it may be shown: without a password, and without parameters that might be one."""
    parts = urlsplit(url)
    if not parts.netloc:
        return url.partition("?")[0]
    user, at, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}{at}{host}", query=""))


def _shown(name: str, settings: Settings) -> str:
    value = getattr(settings, name)
    if name == "api_key":
        return "(hidden)" if value else repr(value)
    return repr(without_secrets(value) if name == "destination" else value)


def sqlite_path(url: str) -> Path:
    """The file of a sqlite:/// URL, absolute."""
    return Path(os.path.abspath(unquote(urlsplit(url).path[1:])))


def _journal_of(destination: str) -> str:
    """Named after its destination: two of them must not share what waits for them. A new password makes no new one."""
    parts = urlsplit(destination)
    if parts.scheme == "sqlite":
        return f"{sqlite_path(destination)}.journal"
    from hashlib import sha256

    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return os.path.abspath(f".spryng/{parts.hostname}-{sha256(place.encode()).hexdigest()[:8]}.journal")


def _destination(where: str, value: Any) -> str:
    url = _text(where, value)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as exc:
        raise SettingsError(f"{_hidden(where, url)}: {exc}") from None
    parts = parts._replace(scheme=_ALIASES.get(parts.scheme, parts.scheme))
    if parts.scheme == "sqlite":
        return _sqlite(where, url, parts)
    where = _hidden(where, url)
    if parts.scheme not in DESTINATIONS and parts.scheme not in _PLAIN_HTTP:
        raise SettingsError(
            f"{where}: unknown destination scheme {parts.scheme or url!r}. Messages are delivered to "
            f"{'; '.join(DESTINATIONS.values())}."
        )
    if not parts.hostname and parts.scheme != "postgresql":  # libpq has its own default, and sockets in ?host=
        raise SettingsError(
            f"{where}: name the host, as in {DESTINATIONS.get(parts.scheme) or DESTINATIONS[parts.scheme + 's']}"
        )
    if parts.fragment:
        raise SettingsError(f"{where}: remove {'#' + parts.fragment!r}")
    if "http" in parts.scheme and parts.username:
        raise SettingsError(f"{where}: put no key into the URL, it would be logged; give api_key or SPRYNG_API_KEY")
    return urlunsplit(parts)


def _hidden(where: str, url: str) -> str:
    """The same, without the password of a URL."""
    userinfo, at, _ = url.rpartition("@")
    password = userinfo.partition("://")[2].partition(":")[2]
    return where.replace(f":{password}@", ":***@") if at and password else where


def _sqlite(where: str, url: str, parts: SplitResult) -> str:
    if parts.netloc:
        raise SettingsError(f"{where}: a SQLite URL has three slashes or four: sqlite:///{parts.netloc}{parts.path}")
    if parts.query or parts.fragment:
        raise SettingsError(f"{where}: a SQLite URL takes no parameters; remove {url[len(url.split('?')[0]) :]!r}")
    if parts.path in ("", "/") or ":memory:" in parts.path or parts.path.endswith("/"):
        raise SettingsError(f"{where}: name a file, as in {DEFAULT_DESTINATION}; a ledger in memory would be lost")
    # An application may change its folder later: the ledger stays where it was when instrument() ran.
    return f"sqlite:///{sqlite_path(url)}"


def _path(where: str, value: Any) -> str:
    return os.path.abspath(os.fspath(value) if isinstance(value, os.PathLike) else _text(where, value))


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SettingsError(f"{where}: must be a string that is not empty, not {type(value).__name__}")
    return value


def _policy(where: str, value: Any) -> str:
    if value not in MISSING_KEY_POLICIES:
        raise SettingsError(f"{where}: must be one of {', '.join(map(repr, MISSING_KEY_POLICIES))}")
    return str(value)


def _budget_policy(where: str, value: Any) -> Any:
    # A coroutine function would be called and never awaited: 0x80 is inspect.CO_COROUTINE.
    is_async = getattr(getattr(value, "__code__", None), "co_flags", 0) & 0x80
    if is_async or (value not in BUDGET_POLICIES and not callable(value)):
        raise SettingsError(f"{where}: must be one of {', '.join(map(repr, BUDGET_POLICIES))}, or a plain function")
    return value


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise SettingsError(f"{where}: must be True or False")
    return value


def _hosts(where: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise SettingsError(f"{where}: must be a sequence of host names, as in ('gateway.example.com',)")
    hosts = tuple(value)
    for host in hosts:
        if not isinstance(host, str) or not host or "/" in host:
            raise SettingsError(f"{where}: {host!r} is no host name; leave out the scheme and the path")
    return tuple(sorted({host.lower() for host in hosts}))


def _seconds(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 3600:
        raise SettingsError(f"{where}: must be seconds between 0 and 3600")
    return float(value)


def _count(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SettingsError(f"{where}: must be a whole number, 0 or more")
    return value


def _same(where: str, text: str) -> str:
    return text


def _flag_text(where: str, text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise SettingsError(f"{where}: must be 1 or 0")


def _list_text(where: str, text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _number_text(where: str, text: str) -> float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise SettingsError(f"{where}: must be a number") from None


TABLE: dict[str, Setting] = {
    "destination": Setting(_destination, _same),
    "journal": Setting(_path, _same),
    "api_key": Setting(_text, _same),
    "default_key": Setting(_text, _same),
    "on_missing_key": Setting(_policy, _same),
    "capture_query": Setting(_flag, _flag_text),
    "include_usage_hosts": Setting(_hosts, _list_text),
    "beat_s": Setting(_seconds, _number_text),
    "exit_timeout_s": Setting(_seconds, _number_text),
    "memory_limit": Setting(_count, _number_text),
    "threads": Setting(_flag, _flag_text),
    "budgets": Setting(_path, _same),
    "on_budget": Setting(_budget_policy, _same),
}

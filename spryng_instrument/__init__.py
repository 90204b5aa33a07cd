"""Exact usage metering for the OpenAI Python SDK: what each of your customers used.

    spryng_instrument.instrument()                       # once, at start-up

    with spryng_instrument.usage_context(key="company123", conversation_id="c-42", tags=["support"]):
        client.chat.completions.create(...)              # nothing else changes

Importing this loads neither openai nor anything else that is slow to load; instrument() does.
"""

from __future__ import annotations

from spryng_instrument.context import tracked, usage_context

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable
    from typing import Any, Literal

    from spryng_instrument import errors
    from spryng_instrument.recorder import Stats, flush, stats, track_usage
    from spryng_instrument.spending import BudgetReached

__version__ = "0.1.0"
__all__ = [
    "BudgetReached",
    "Stats",
    "errors",
    "flush",
    "instrument",
    "stats",
    "track_usage",
    "tracked",
    "uninstrument",
    "usage_context",
]


def instrument(
    *,
    destination: str | None = None,
    journal: str | os.PathLike[str] | None = None,
    api_key: str | None = None,
    default_key: str | None = None,
    on_missing_key: Literal["warn", "ignore", "raise"] | None = None,
    capture_query: bool | None = None,
    include_usage_hosts: Iterable[str] | None = None,
    beat_s: float | None = None,
    exit_timeout_s: float | None = None,
    memory_limit: int | None = None,
    threads: bool | None = None,
    budgets: str | os.PathLike[str] | None = None,
    on_budget: Literal["raise", "warn"] | Callable[[BudgetReached], object] | None = None,
) -> None:
    """Record every OpenAI call of this process from now on, of clients made before and after.

    Every argument is also an environment variable, SPRYNG_ and its name in capitals; the argument wins. A second call
    changes nothing; with other arguments it says in the log which ones differ.

    Args:
        destination: URL of where messages go. Default: sqlite:///.spryng/usage.db; postgresql://, clickhouse://, https://
            of a Track Usage API, cloudevents+https:// and otlp+https:// are the others.
        journal: folder where messages wait for delivery. Default: beside a SQLite ledger, its name and ".journal".
        api_key: key of the service that an http destination is.
        default_key: customer of the calls made outside any usage_context. Default: none, recorded as (no key).
        on_missing_key: what such a call does: "warn" once per line of code (default), "ignore", or "raise"
            MissingKeyError before it is sent.
        capture_query: record the last user message of each call as its query. Default: False, no content is recorded.
        include_usage_hosts: hosts besides api.openai.com whose streams are asked for their usage.
        beat_s: seconds between a message and its delivery. Default: 0.5.
        exit_timeout_s: seconds that the interpreter's exit may wait for delivery. Default: 2; the rest stays in the
            journal for the next process.
        memory_limit: messages held in memory while the journal's disk takes none. Default: 10,000.
        threads: have every Thread and ThreadPoolExecutor carry the usage_context of whoever starts it. Default: False;
            integrations.executors says when that is right, and has carry() for a single executor.
        budgets: TOML file of how much each customer may use. Default: none.
        on_budget: what a call does that a budget with hard = true has no room for: "raise" BudgetExceeded before it is
            sent (default), "warn" once a period, or a function of a BudgetReached, which may return to let the call
            through, or raise what the caller is to get.

    Raises:
        SettingsError: one of them cannot be used; the message has the value and what to do.
    """
    from spryng_instrument import patch

    arguments: dict[str, Any] = {name: value for name, value in locals().items() if name != "patch"}
    patch.instrument(**arguments)


def uninstrument() -> None:
    """Put the SDK back as it was, and deliver what can be. Harmless where instrument() was not called."""
    from spryng_instrument import patch

    patch.uninstrument()


def __getattr__(name: str) -> Any:
    if name in ("Stats", "flush", "stats", "track_usage"):
        from spryng_instrument import recorder

        return getattr(recorder, name)
    if name == "BudgetReached":
        from spryng_instrument import spending

        return spending.BudgetReached
    if name == "errors":
        from importlib import import_module

        return import_module("spryng_instrument.errors")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

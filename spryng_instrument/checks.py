"""Turns what a programmer gave as key, tags, query or properties into what can be recorded.

Nothing here raises into the caller's code: a value that cannot be used is said in the log, once per line of code, and
left out. This module is imported with the package, so it loads nothing that is slow to load.
"""

from __future__ import annotations

from sys import _getframe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType
    from typing import Any, Final

    Scalar = str | int | float | bool | None

MAX_KEY: Final = 255
"""Characters of a key, a conversation id or a tag; a longer one is shortened, with a digest so that none are mixed."""

_OURS = (__name__, "spryng_instrument.context")


def clean_name(what: str, value: object) -> str | None:
    """A key, conversation id or tag as it is recorded; None if there is none. Says in the log what is wrong with it."""
    if value is None:
        return None
    if not isinstance(value, str):
        if isinstance(value, bool) or not (isinstance(value, int) or type(value).__name__ == "UUID"):
            say(f"{what}={value!r}: a {what} must be a string, not {type(value).__name__}; recorded without it")
            return None
        say(f"{what}={value!r}: a {what} must be a string, not {type(value).__name__}; recorded as {str(value)!r}")
        value = str(value)
    if type(value) is not str:
        value = exact_text(value)
    if len(value) > MAX_KEY:
        from hashlib import sha256

        digest = sha256(value.encode("utf-8", "backslashreplace")).hexdigest()[:32]
        short = f"{value[: MAX_KEY - 33]}#{digest}"
        say(
            f"{what}={value[:40]!r}...: {len(value)} characters are too long, {MAX_KEY} are allowed; recorded as its "
            f"first {MAX_KEY - 33} and a digest, {short!r}"
        )
        return short
    if not value or value.isspace():
        say(f"{what}={value!r}: a {what} must not be empty; recorded without it")
        return None
    return value


def clean_tags(tags: object) -> tuple[str, ...]:
    """Tags as they are recorded: in order, without repeats. One string counts as one tag."""
    if not tags:
        return ()
    if isinstance(tags, str):
        tags = (tags,)
    try:
        cleaned = [clean_name("tag", tag) for tag in tags]  # type: ignore[attr-defined]
    except TypeError:
        say(f"tags={tags!r}: tags must be a sequence of strings, not {type(tags).__name__}; recorded without them")
        return ()
    return tuple(dict.fromkeys(tag for tag in cleaned if tag))


def clean_query(query: object) -> str | None:
    """A query as it is recorded."""
    if query is None or isinstance(query, str):
        return query if query is None else exact_text(query)
    say(f"query={query!r}: a query must be a string, not {type(query).__name__}; recorded as its text")
    return str(query)


def clean_properties(properties: object) -> dict[str, Scalar] | None:
    """Properties as they are recorded; a value that is no JSON scalar is recorded as its text."""
    if not properties:
        return None
    try:
        items = list(dict(properties).items())  # type: ignore[call-overload]
    except (TypeError, ValueError):
        say(f"properties={properties!r}: properties must map names to values; recorded without them")
        return None
    return {exact_text(name): _scalar(value) for name, value in items}


def _scalar(value: object) -> Scalar:
    """A value that JSON has, and every reader of it too; the text of any other."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int.__index__(value)
    if isinstance(value, float) and abs(value) < float("inf"):
        return float.__float__(value)
    return exact_text(value)


def exact_text(value: object) -> str:
    """*value*, or the text of it, as a str and no subclass: templates, NumPy and enums have some, and few encoders."""
    text = value if isinstance(value, str) else str(value)
    return text if type(text) is str else str.__str__(text)


_said: set[tuple[CodeType | None, int, str]] = set()


def say(problem: str, at: Callable[..., Any] | None = None) -> None:
    """Log *problem* with the caller's line, once per line of code and kind of problem."""
    frame: FrameType | None = _getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _OURS:
        frame = frame.f_back
    code = getattr(at, "__code__", None) or (frame.f_code if frame else None)
    line = code.co_firstlineno if at is not None and code else frame.f_lineno if frame else 0
    mark = (code, line, problem.split(":", 1)[0].split("=", 1)[0])
    if mark in _said or len(_said) > 1_000:
        return
    _said.add(mark)
    from logging import getLogger

    where = f" ({code.co_filename}:{line})" if code else ""
    getLogger("spryng_instrument").error("%s%s", problem, where)

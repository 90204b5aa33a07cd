"""Whose usage it is, from one service into the next, in the `baggage` header of W3C Baggage.

The members are spryng.key, spryng.conversation_id and spryng.tags. Reading a header believes its sender: only behind a
gateway that you trust, since a client could name another customer. Writing one tells the receiver who your customer is:
inject() therefore writes only for hosts that you name, and never for a provider of models by itself.

Source: https://www.w3.org/TR/baggage/ (limits: 3.3.2; encoding: 3.3.1)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, MutableMapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from spryng_instrument.context import current_scope, usage_context

log = logging.getLogger("spryng_instrument")

MAX_MEMBERS = 64
MAX_BYTES = 8192
NAMES = {"spryng.key": "key", "spryng.conversation_id": "conversation_id", "spryng.tags": "tags"}

_VALUE = re.compile(r"[!#-+\--:<-\[\]-~]*")  # baggage-octet: printable ASCII without space, quote, comma, semicolon, \
_SAFE = "!#$&'()*+-./:<=>?@[]^_`{|}~"  # of those, what stays as it is


def from_baggage(header: str | None) -> usage_context | None:
    """The context that a baggage header names. None: it names none.

    Malformed members are skipped, and so is what is beyond the limits of the specification.
    """
    values = read_members(header)
    return usage_context(**values) if values else None


def read_members(header: str | None) -> dict[str, Any]:
    """The arguments of usage_context that a baggage header holds. The last of several members of a name counts."""
    values: dict[str, Any] = {}
    for name, member in _members(header or ""):
        if name not in NAMES:
            continue
        text = member.partition("=")[2].partition(";")[0].strip(" \t")
        if not _VALUE.fullmatch(text):
            continue
        try:
            value = unquote(text, errors="strict")
            # Each tag is encoded once more, so that a comma within one divides nothing.
            tags = tuple(unquote(tag, errors="strict") for tag in value.split(",") if tag.strip())
        except UnicodeDecodeError:
            continue
        if value.strip():
            values[NAMES[name]] = tags if name == "spryng.tags" else value
    return values


def to_baggage(existing: str | None = None) -> str:
    """The baggage header for a request that is made now: the current scope, and every other member of *existing*.

    Members of ours in *existing* are replaced, or left out where the scope has no such value. One that would break the
    limits of the specification is left out, and said in the log.
    """
    members = [member for name, member in _members(existing or "", limited=False) if name not in NAMES]
    scope = current_scope()
    if scope is not None:
        tags = ",".join(quote(tag, safe=_SAFE + " ", errors="backslashreplace") for tag in scope.tags)
        for name, value in zip(NAMES, (scope.key, scope.conversation_id, tags), strict=True):
            if not value:
                continue
            member = f"{name}={quote(value, safe=_SAFE, errors='backslashreplace')}"
            if len(members) < MAX_MEMBERS and len(",".join([*members, member]).encode()) <= MAX_BYTES:
                members.append(member)
            else:
                log.error("the baggage header is full: a request goes on without its %s", name)
    return ",".join(members)


def inject(headers: MutableMapping[str, str], url: str, *, hosts: Collection[str]) -> None:
    """Set the baggage header of a request, if it goes to one of *hosts*.

    Args:
        headers: of the request; a baggage header in it is kept and added to.
        url: where the request goes.
        hosts: those that may know your customers, "search.internal" or, for one port of it, "search.internal:8080".
            No other gets the header: not api.openai.com, nor any other provider of models.
    """
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2].lower()
    if not {place, parts.hostname} & {host.lower() for host in hosts}:
        return
    name = next((name for name in headers if name.lower() == "baggage"), "baggage")
    value = to_baggage(headers.get(name))
    if value:
        headers[name] = value
    else:
        headers.pop(name, None)


def _members(header: str, *, limited: bool = True) -> list[tuple[str, str]]:
    """Name and text of each member, of which *limited* takes no more than every receiver must."""
    if limited and len(header) > MAX_BYTES:
        header = header[: MAX_BYTES + 1].rpartition(",")[0]
    members = [member.strip(" \t") for member in header.split(",")]
    named = [(member.partition("=")[0].strip(" \t"), member) for member in members if member]
    return named[:MAX_MEMBERS] if limited else named

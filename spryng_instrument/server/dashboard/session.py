"""Who looks at a page: somebody who signed in with an API key, or a customer with a signed link.

Both are a signed text that names who it is for and until when; no API key is kept in a browser. The secret that signs
is a document of the ledger, so that every worker and server of it knows it, and a restart ends nothing.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from spryng_instrument.server.bodies import Refused
from spryng_instrument.store.base import Record, Store

COOKIE = "spryng_session"
SESSION_S = 12 * 60 * 60
"""How long somebody stays signed in."""
FRESH_S = 5.0
"""How long a server goes by the secret that it has read."""
TRIES = 10
"""Sign-ins that may fail, from an address, within TRIES_S."""
TRIES_S = 300
ADDRESSES = 10_000
"""Addresses that are remembered for it."""
_KIND = "secret"


@dataclass(frozen=True, slots=True)
class Link:
    """What a signed link shows: one customer's usage."""

    key: str
    until: int
    """When it ends, in seconds since 1970."""
    costs: bool = False
    """Whether it shows what OpenAI charged."""
    zone: str = "UTC"


class Secret:
    """The secret of a ledger, as a running server knows it. Its methods may read the store: call them in a thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._text = ""
        self._read_at = -FRESH_S

    def text(self) -> str:
        """The secret; made, if the ledger has none yet."""
        if not self._text or time.monotonic() - self._read_at >= FRESH_S:
            self._text = _newest(self._store) or renew(self._store)
            self._read_at = time.monotonic()
        return self._text

    def sign(self, purpose: str, value: Any) -> str:
        """*value* as a text that `open` takes back, for that purpose only."""
        body = base64.urlsafe_b64encode(msgspec.json.encode(value)).decode().rstrip("=")
        return f"{body}.{self._mac(purpose, body)}"

    def open(self, purpose: str, text: str | None) -> Any:
        """What was signed for that purpose. None: it was not, or not with the secret of now."""
        body, _, mac = (text or "").partition(".")
        if not hmac.compare_digest(mac.encode(), self._mac(purpose, body).encode()):
            return None
        try:
            return msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        except (binascii.Error, msgspec.DecodeError, ValueError):
            return None

    def token(self, session: str) -> str:
        """What a form of that session carries, which another site cannot know."""
        return self._mac("form", session)

    def link(self, text: str | None) -> Link | None:
        """The link of a text, while it is good."""
        try:
            link = msgspec.convert(self.open("link", text), Link)
        except msgspec.ValidationError:
            return None
        return link if link.until > time.time() else None

    def _mac(self, purpose: str, body: str) -> str:
        text = f"{purpose}.{body}".encode("utf-8", "surrogateescape")
        return hmac.new(self.text().encode(), text, "sha256").hexdigest()


def _newest(store: Store) -> str | None:
    found = store.records(_KIND)
    return str(found[-1].body["text"]) if found else None


def renew(store: Store) -> str:
    """Make another secret: it ends every session and every signed link. Of several at a time, the last one holds."""
    number = len(store.records(_KIND)) + 1
    made = {"text": secrets.token_urlsafe(32)}
    store.append([Record(f"{_KIND}:{number}", _KIND, datetime.now(timezone.utc), made)])
    return _newest(store) or made["text"]


class Tries:
    """Counts the sign-ins that failed, by address, in bounded memory."""

    def __init__(self) -> None:
        self._failed: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def check(self, address: str) -> None:
        """Let an address try.

        Raises:
            Refused: it has failed too often.
        """
        count, began = self._failed.get(address, (0, 0.0))
        left = began + TRIES_S - time.monotonic()
        if count >= TRIES and left > 0:
            text = f"was wrong {count} times; try again in {left / 60 + 1:.0f} min"
            raise Refused(429, "key", text, {"Retry-After": f"{left:.0f}"})

    def failed(self, address: str) -> None:
        """Remember that it did."""
        now = time.monotonic()
        count, began = self._failed.pop(address, (0, now))
        self._failed[address] = (count + 1, began) if now - began < TRIES_S else (1, now)
        while len(self._failed) > ADDRESSES:
            self._failed.popitem(last=False)


def address_of(request: Request) -> str:
    """Where a request comes from; of IPv6, the network, which is what one person has."""
    text = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    return text if address.version == 4 else str(ipaddress.ip_network((text, 64), strict=False))


def keep(response: Response, request: Request, text: str | None) -> None:
    """Have the browser keep a session, or forget it."""
    response.set_cookie(
        COOKIE, text or "", max_age=SESSION_S if text else 0, path="/", httponly=True, samesite="lax",
        secure=request.url.scheme == "https",
    )  # fmt: skip


def check_origin(request: Request) -> None:
    """Let a form through that was sent from a page of this server.

    Raises:
        Refused: another site sent it.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    host = request.headers.get("host", "")
    if site not in (None, "same-origin") or (site is None and origin is not None and origin.partition("//")[2] != host):
        raise Refused(403, "Origin", f"{origin or site!r} is another site; open the dashboard itself")

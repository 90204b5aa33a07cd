"""The dashboard's addresses: who may have a page, what a form does, and what an error looks like.

Invariant: a page goes to somebody who signed in, or came by a signed link and then sees its customer only; while no key
was ever made, it goes to this machine, as the API does. What changes something is a POST from a page of ours.
"""

from __future__ import annotations

import functools
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from spryng_instrument.errors import ApiError, PlanError, QueryError, StoreError
from spryng_instrument.periods import zone_of
from spryng_instrument.server.answers import Asking
from spryng_instrument.server.bodies import Refused, read_form
from spryng_instrument.server.dashboard import bills, layout, messages, usage
from spryng_instrument.server.dashboard.layout import Asked
from spryng_instrument.server.dashboard.question import ROOT, SHARED
from spryng_instrument.server.dashboard.session import (
    COOKIE,
    SESSION_S,
    Link,
    Secret,
    Tries,
    address_of,
    check_origin,
    keep,
)
from spryng_instrument.store.base import Store

if TYPE_CHECKING:
    from spryng_instrument.server.app import Server

log = logging.getLogger("spryng_instrument")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send forms with the Origin "null"
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "private, no-store",
}
DAYS = (7, 30, 90, 365)
"""How long a signed link may be good."""
_TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain",
}
_LOCAL = "local"
"""The session of this machine, while no key was made."""
T = TypeVar("T")
_Page = Callable[[Asked], Response]
_Handler = Callable[["Server", Request], Awaitable[Response]]


class Dashboard:
    """What the pages of a server share."""

    def __init__(self, store: Store) -> None:
        self.secret = Secret(store)
        self.tries = Tries()


async def _session(server: Server, request: Request) -> str:
    """The session of whoever may read all.

    Raises:
        Refused: nobody signed in.
    """
    if await server.is_open():
        server.check_host(request)
        return _LOCAL
    text = request.cookies.get(COOKIE)
    session = await server.read(lambda: server.dashboard.secret.open("session", text))
    if text and isinstance(session, dict) and session.get("until", 0) > time.time():
        key = server.keys.known(str(session.get("key")))
        if key is not None and "read" in key.scopes:
            return text
    raise Refused(401, "session", "is none, or has ended; sign in")


async def _asked(server: Server, request: Request) -> Asked:
    session = await _session(server, request)
    token = await server.read(lambda: server.dashboard.secret.token(session))
    answers = Asking(server.answers)
    return Asked(server.store, answers, request.query_params, request.url.path, None, token, session != _LOCAL)


async def _asked_by_link(server: Server, request: Request) -> Asked:
    text = request.query_params.get("token")
    link = await server.read(lambda: server.dashboard.secret.link(text))
    if link is None:
        raise Refused(403, "token", "is no link of this server, or has ended; ask for another one")
    return Asked(server.store, Asking(server.answers), request.query_params, request.url.path, link)


def _guarded(handler: _Handler) -> _Handler:
    """A handler whose errors are pages."""

    @functools.wraps(handler)
    async def guarded(server: Server, request: Request) -> Response:
        try:
            server.check_room()
            response = await handler(server, request)
        except Refused as exc:
            response = _refusal(request, exc)
        except (QueryError, ApiError, PlanError) as exc:
            response = problem(400, str(exc))
        except StoreError as exc:
            server.complain(exc)
            response = problem(503, "The ledger does not answer now. Try again in a moment.")
            response.headers["Retry-After"] = "2"
        except Exception:
            log.exception("a bug of the dashboard")
            response = problem(500, "The dashboard has a bug; the server's log has more.")
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return guarded


def _refusal(request: Request, exc: Refused) -> Response:
    if exc.status == 401 and request.method in ("GET", "HEAD"):
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"{ROOT}/sign-in?{urlencode({'next': path})}", 303)
    response = problem(exc.status, f"{exc.field} {exc.message}")
    response.headers.update(exc.headers or {})
    return response


def problem(status: int, text: str) -> Response:
    """An error as a page."""
    titles = {400: "That cannot be asked", 401: "Not signed in", 403: "Not allowed", 404: "Not found"}
    response = layout.html(
        "error.html", status, title=titles.get(status, "Something went wrong"), text=text, code=status
    )
    response.headers.update(HEADERS)
    return response


def unknown(path: str) -> Response | None:
    """The page that says that there is none, for a path of the dashboard."""
    return problem(404, f"{path!r} is no page of the dashboard.") if path.startswith(ROOT) else None


def _shown(page: _Page, asked: Callable[[Server, Request], Awaitable[Asked]]) -> _Handler:
    """A page as a handler."""

    @functools.wraps(page)
    async def handler(server: Server, request: Request) -> Response:
        asking = await asked(server, request)
        if (clean := _without_blanks(request)) is not None:
            return RedirectResponse(clean, 303)
        return await _read(server, request, asking, page)

    return _guarded(handler)


async def _read(server: Server, request: Request, asking: Asked, page: Callable[[Asked], T]) -> T:
    """What a page says."""
    return await server.find(lambda: page(asking), asking.answers, request)


def _without_blanks(request: Request) -> str | None:
    """The address without the fields of a form that were left empty, if there are some."""
    given = request.query_params.multi_items()
    kept = [(name, value) for name, value in given if value.strip()]
    if len(kept) == len(given):
        return None
    if {"since", "until", "month"} & {name for name, _ in kept}:
        kept = [(name, value) for name, value in kept if name != "preset"]
    return f"{quote(request.url.path)}?{urlencode(kept)}" if kept else quote(request.url.path)


def _file(
    file: Callable[[Asked], tuple[Iterator[str], str]], asked: Callable[[Server, Request], Awaitable[Asked]]
) -> _Handler:
    """A file to be kept, by its name."""

    async def sent(server: Server, request: Request) -> Response:
        asking = await asked(server, request)
        parts, name = await _read(server, request, asking, file)
        response = await server.csv(parts)
        response.headers["content-disposition"] = f'attachment; filename="{name}"'
        return response

    return _guarded(sent)


async def static(server: Server, request: Request) -> Response:
    """A file of ours."""
    name = request.path_params["name"]
    try:
        body, version = layout.static(name)
    except KeyError:
        return problem(404, f"{name!r} is no file of the dashboard.")
    response = Response(body, media_type=_TYPES[name.rpartition(".")[2]])
    lasting = request.query_params.get("v") == version
    response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if lasting else "no-cache"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


async def home(server: Server, request: Request) -> Response:
    """GET /: the dashboard is what people look for."""
    return RedirectResponse(ROOT, 303)


def _next(text: str | None) -> str:
    """A page of ours to go on to; anything else is the overview."""
    return text if text and re.fullmatch(rf"{ROOT}(/[\w./-]*)?(\?[\w.~%+&=*/:-]*)?", text, re.ASCII) else ROOT


@_guarded
async def sign_in_page(server: Server, request: Request) -> Response:
    """GET /dashboard/sign-in."""
    if await server.is_open():
        return RedirectResponse(ROOT, 303)
    return layout.html("sign_in.html", title="Sign in", problem=None, next=_next(request.query_params.get("next")))


@_guarded
async def sign_in(server: Server, request: Request) -> Response:
    """POST /dashboard/sign-in: an API key of scope read begins a session."""
    check_origin(request)
    if await server.is_open():
        return RedirectResponse(ROOT, 303)
    address = address_of(request)
    server.dashboard.tries.check(address)
    form = await read_form(request)
    key = server.keys.find(form.get("key"))
    target = _next(form.get("next"))
    if key is None or "read" not in key.scopes:
        server.dashboard.tries.failed(address)
        text = "This key is unknown or was revoked." if key is None else "This key may not read: its scope is ingest."
        return layout.html("sign_in.html", 403, title="Sign in", problem=text, next=target)
    session = {"key": key.id, "until": int(time.time()) + SESSION_S, "nonce": secrets.token_hex(8)}
    response = RedirectResponse(target, 303)
    keep(response, request, await server.read(lambda: server.dashboard.secret.sign("session", session)))
    return response


async def _form(server: Server, request: Request) -> tuple[Asked, dict[str, str]]:
    """A form of somebody who signed in, sent from a page of ours.

    Raises:
        Refused: it is not.
    """
    check_origin(request)
    asking = await _asked(server, request)
    form = await read_form(request)
    if not secrets.compare_digest(form.get("form_token", "").encode(), asking.form_token.encode()):
        raise Refused(403, "form_token", "is not that of your session; load the page again")
    return asking, form


@_guarded
async def sign_out(server: Server, request: Request) -> Response:
    """POST /dashboard/sign-out."""
    await _form(server, request)
    response = RedirectResponse(f"{ROOT}/sign-in", 303)
    keep(response, request, None)
    return response


@_guarded
async def make_link(server: Server, request: Request) -> Response:
    """POST /dashboard/link: a signed link to one customer's usage."""
    asking, form = await _form(server, request)
    days, zone = form.get("days", ""), form.get("zone") or "UTC"
    if days not in map(str, DAYS):
        raise QueryError(f"days={days!r} must be one of: {', '.join(map(str, DAYS))}")
    if not form.get("key"):
        raise QueryError("key is missing; name the customer")
    zone_of(zone)
    link = Link(form["key"], int(time.time()) + int(days) * 86_400, form.get("costs") == "yes", zone)
    address = await server.read(lambda: address_of_link(server.dashboard.secret, link))
    url = f"{request.url.scheme}://{request.headers.get('host', '')}{address}"
    return await server.read(
        lambda: asking.html("link", "Signed link", None, template="link", link=link, days=days, url=url)
    )


def address_of_link(secret: Secret, link: Link) -> str:
    """Where a link leads, without the server's own address."""
    return f"{SHARED}?{urlencode({'token': secret.sign('link', link)})}"


_ALL: dict[str, _Page] = {
    "": usage.overview,
    "/key": usage.key,
    "/keys": usage.groups("key"),
    "/tags": usage.groups("tag"),
    "/models": usage.groups("model"),
    "/conversations": messages.conversations,
    "/conversation": messages.conversation,
    "/messages": messages.messages,
    "/message": messages.message,
    "/bills": bills.bills,
    "/bill": bills.bill,
    "/bill.html": bills.bill_print,
    "/bill.csv": bills.bill_file,
    "/bills.csv": bills.bills_file,
    "/budgets": bills.budgets,
    "/health": usage.health,
}
_OF_A_CUSTOMER = ("", "/tags", "/models", "/conversations", "/conversation", "/messages", "/message")

ROUTES: tuple[tuple[str, str, _Handler], ...] = (
    ("GET", "/", home),
    *(("GET", ROOT + path, _shown(page, _asked)) for path, page in _ALL.items()),
    *(("GET", SHARED + path, _shown(_ALL[path], _asked_by_link)) for path in _OF_A_CUSTOMER),
    ("GET", f"{ROOT}/usage.csv", _file(usage.usage_file, _asked)),
    ("GET", f"{ROOT}/messages.csv", _file(messages.message_file, _asked)),
    ("GET", f"{ROOT}/bill-messages.csv", _file(bills.bill_messages, _asked)),
    ("GET", f"{SHARED}/usage.csv", _file(usage.usage_file, _asked_by_link)),
    ("GET", f"{SHARED}/messages.csv", _file(messages.message_file, _asked_by_link)),
    ("GET", f"{ROOT}/sign-in", sign_in_page),
    ("POST", f"{ROOT}/sign-in", sign_in),
    ("POST", f"{ROOT}/sign-out", sign_out),
    ("POST", f"{ROOT}/link", make_link),
    ("GET", f"{ROOT}/static/{{name}}", static),
)

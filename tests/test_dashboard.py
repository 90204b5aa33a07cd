"""The dashboard by HTTP, as a browser without JavaScript has it: who may see what, and if its figures are right."""

from __future__ import annotations

import csv
import html
import io
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from urllib.parse import parse_qs, quote, urlencode, urljoin, urlsplit

import pytest
from starlette.datastructures import QueryParams

from spryng_instrument.billing.bills import Desk
from spryng_instrument.billing.corrections import void
from spryng_instrument.billing.plans import load
from spryng_instrument.errors import QueryError
from spryng_instrument.reports import usage_report
from spryng_instrument.server import answers, keys
from spryng_instrument.server.answers import Answers
from spryng_instrument.server.dashboard import charts, question, routes
from spryng_instrument.server.dashboard.session import Link, Secret, renew
from spryng_instrument.store import open_store
from spryng_instrument.store.base import Filter, Store

from .ledgers import BUDGETS, NAMES, ODD, PLANS, fill
from .messages import NOON, message
from .servers import Postgres
from .serving import Answer, Serving, serving, spryng

PAGES = ["", "/keys", "/tags", "/models", "/conversations", "/messages", "/health"]
UNTIL = datetime(2026, 11, 20, 20, tzinfo=timezone.utc)
PERIOD = "since=2026-10-25&until=2026-11-21"


def sqlite(path: Path) -> Iterator[str]:
    yield f"sqlite:///{path / 'usage.db'}"


def postgresql(path: Path) -> Iterator[str]:
    with Postgres() as server, server.ledger() as url:
        yield url


@pytest.fixture(scope="module", params=[sqlite, postgresql], ids=["sqlite", "postgresql"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Store]]:
    """A server without keys, of a ledger of some customers; it is left as it is."""
    with contextmanager(request.param)(tmp_path_factory.mktemp("dashboard")) as url:
        store = open_store(url)
        fill(store, keys=14, until=UNTIL)
        with serving(url) as server:
            yield server, store
            assert "Traceback" not in server.text()
        store.close()


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[tuple[Serving, Store, str]]:
    """A server with a key that may read; the limits of time are short."""
    url = f"sqlite:///{tmp_path / 'usage.db'}"
    store = open_store(url)
    fill(store, keys=3, days=3)
    _, text = keys.create(store, "finance", ("read",))
    with serving(url, LIMITS="keys.FRESH_S=0.05 dashboard.session.FRESH_S=0.05") as server:
        yield server, store, text
        assert "Traceback" not in server.text()


def links_of(answer: Answer) -> list[str]:
    """Where a page leads, each once."""
    return list(
        dict.fromkeys(html.unescape(each) for each in re.findall(r'<a\b[^>]*href="([^"]*)"', answer.body.decode()))
    )


def text_of(answer: Answer) -> str:
    """A page's text, a line a tag."""
    return html.unescape(re.sub(r"<[^>]*>", "\n", answer.body.decode()))


def post(server: Serving, path: str, fields: dict[str, str], **headers: str) -> Answer:
    return server.send(
        "POST", path, urlencode(fields), {"Content-Type": "application/x-www-form-urlencoded", **headers}
    )


def sign_in(server: Serving, key: str, **fields: str) -> str:
    """The cookie of a session."""
    answer = post(server, "/dashboard/sign-in", {"key": key, **fields})
    assert answer.status == 303, text_of(answer)
    return answer.headers["set-cookie"].partition(";")[0]


def token_of(answer: Answer) -> str:
    match = re.search(r'name="form_token" value="([^"]+)"', answer.body.decode())
    assert match
    return match[1]


# What is on the pages.


def test_every_link_of_every_page_leads_somewhere(served: tuple[Serving, Store]) -> None:
    """From the overview on, whatever a page links to is there, and is not an error; hostile names included."""
    server, _ = served
    seen: set[str] = set()
    waiting = [f"/dashboard?{PERIOD}", *(f"/dashboard/key?{urlencode({'key': name})}&{PERIOD}" for name in ODD)]
    kinds: dict[str, int] = {}
    while waiting:
        path = waiting.pop(0)
        kind = urlsplit(path).path
        if path in seen or kinds.get(kind, 0) >= 12:
            continue
        seen.add(path)
        kinds[kind] = kinds.get(kind, 0) + 1
        answer = server.get(path)
        assert answer.status == 200, (path, text_of(answer))
        if answer.headers["content-type"].startswith("text/html"):
            waiting += [urljoin(path, each) for each in links_of(answer) if not each.startswith("#")]
    assert kinds.keys() >= {f"/dashboard{page}" for page in [*PAGES, "/key", "/conversation", "/message", "/usage.csv"]}


def test_nothing_of_a_message_is_markup(served: tuple[Serving, Store]) -> None:
    """A customer's name is text on every page, whatever is in it, and no page has a script of its own."""
    server, _ = served
    shown = 0
    for page in [f"{each}?{PERIOD}" for each in PAGES] + [
        f"/key?{urlencode({'key': ODD[0]})}",
        f"/keys?q=%3Cscript&{PERIOD}",
    ]:
        body = server.get(f"/dashboard{page}").body.decode()
        assert not re.search(r"<script(?! src=\"/dashboard/static/htmx-)", body), page
        assert not re.search(r"\sstyle=|\son\w+=|<style|javascript:", body), page
        shown += "&lt;script&gt;alert(1)&lt;/script&gt;" in body
    assert shown >= 4


def test_totals_are_those_of_the_reports(served: tuple[Serving, Store]) -> None:
    """For random filters and zones: page, CSV, API and report have the same total, to the last digit that is shown."""
    server, store = served
    dice = random.Random(5)
    for _ in range(12):
        filters: list[tuple[str, str]] = []
        where = Filter()
        if dice.random() < 0.5:
            key = dice.choice([None, "acme", ODD[0], ODD[1], "cedar-bank"])
            filters.append(("no_key", "true") if key is None else ("key", key))
            where = Filter(key, key is None)
        tags = tuple(dice.sample(["support", "urgent", "batch"], dice.randint(0, 1)))
        filters += [("tag", tag) for tag in tags]
        zone = dice.choice(["UTC", "Asia/Kolkata", "Pacific/Chatham", "America/Sao_Paulo", "Europe/Berlin"])
        first = dice.randint(1, 25)
        filters += [("zone", zone), ("since", f"2026-10-{first:02}"), ("until", "2026-11-09")]
        query = urlencode(filters)
        api = server.get(f"/usage?by=model&{query}").json()["total"]
        since, until = (
            datetime.fromisoformat(server.get(f"/usage?{query}").json()[name]) for name in ("since", "until")
        )
        report = usage_report(store, "model", Filter(where.key, where.no_key, tags, since=since, until=until), zone)
        assert api["messages"] == report.total.messages
        stats = stats_of(server.get(f"/dashboard?{query}"))
        assert stats["Messages"] == f"{api['messages']:,}"
        assert stats["Conversations"] == f"{api['conversations']:,}"
        assert stats["Input tokens"] == f"{api['input_tokens']:,}"
        if api["cost_usd"] is not None:
            shown = Decimal(stats["Cost USD"].replace(",", ""))
            assert shown == round(Decimal(api["cost_usd"]), -int(shown.as_tuple().exponent))
        else:
            assert stats["Cost USD"] == "-"
        rows = csv_of(server.get(f"/dashboard/usage.csv?by=model&{query}"))
        assert sum(int(row["messages"]) for row in rows) == api["messages"]
        assert sum(Decimal(row["cost_usd"] or 0) for row in rows) == Decimal(api["cost_usd"] or 0)
        found = csv_of(server.get(f"/dashboard/messages.csv?{query}"))
        assert sum(row["status"] in ("ok", "incomplete") for row in found) == api["messages"]
        assert sum(Decimal(row["cost_usd"] or 0) for row in found) == Decimal(api["cost_usd"] or 0)


def stats_of(answer: Answer) -> dict[str, str]:
    pairs = re.findall(r"<dt>([^<]+)</dt><dd>(?:<a [^>]*>)?([^<]*)", answer.body.decode())
    return {name: html.unescape(figure) for name, figure in pairs}


def csv_of(answer: Answer) -> list[dict[str, str]]:
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"].startswith("attachment; filename=")
    return list(csv.DictReader(io.StringIO(answer.body.decode(), newline="")))


def test_behind_every_bar_are_its_messages(served: tuple[Serving, Store]) -> None:
    """A part of a bar leads to as many messages as it says, in a zone with half hours, and cut at the period's ends."""
    server, _ = served
    page = "/dashboard?show=messages&zone=Asia/Kolkata&since=2026-11-05T14:00&until=2026-11-08T09:30&tag=support"
    found = re.findall(r'<a href="([^"]+)" aria-label="([^"]+): ([\d,]+)"><title>', server.get(page).body.decode())
    assert len(found) > 5
    total = 0
    for href, _, count in found:
        query = urlsplit(html.unescape(href)).query
        listed = csv_of(server.get(f"/dashboard/messages.csv?{query}"))
        assert sum(row["status"] == "ok" for row in listed) == int(count)
        total += int(count)
    assert stats_of(server.get(page))["Messages"] == f"{total:,}"


def test_rows_lead_to_their_messages(served: tuple[Serving, Store]) -> None:
    """By key, tag and model, a row's figures lead to the messages that it counts."""
    server, _ = served
    for page in ("keys", "tags", "models"):
        body = server.get(f"/dashboard/{page}?{PERIOD}").body.decode()
        lines = body.partition("<tbody>")[2].partition("</tbody>")[0].split("<tr>")[1:]
        cells = [re.findall(r'<td class="n"><a href="([^"]+)"[^>]*>([^<]+)</a>', line) for line in lines]
        rows = [each[1] for each in cells if each]  # the cost, the messages, ...
        assert len(rows) > 2
        for href, count in rows[:6]:
            listed = csv_of(server.get(html.unescape(href).replace("/messages?", "/messages.csv?")))
            assert sum(row["status"] == "ok" for row in listed) == int(count.replace(",", ""))


def test_a_conversation_adds_up(served: tuple[Serving, Store]) -> None:
    """Its messages are in order, and the last one's running cost is that of all."""
    server, store = served
    where = Filter("bluepeak-logistics", conversation_id="c-13-1")
    total = usage_report(store, "model", where).total
    body = server.get("/dashboard/conversation?key=bluepeak-logistics&conversation=c-13-1").body.decode()
    times = re.findall(r'<th scope="row"><a [^>]*>([^<]+)</a>', body)
    assert times == sorted(times)
    assert len(times) == total.messages + total.errors
    last = re.findall(r'<td class="n">([^<]+)</td>', body)[-1]
    assert last.replace("at least ", "") == f"{total.cost_usd:,.6f}"


def test_long_conversations_run_back_from_their_end(tmp_path: Path) -> None:
    """Of more messages than a page has, the last are shown, and what was before is in their running cost."""
    store = open_store(f"sqlite:///{tmp_path / 'usage.db'}")
    store.record(
        [message(id=f"m{n}", key="acme", conversation_id="c", timestamp=NOON + timedelta(seconds=n)) for n in range(30)]
    )
    with serving(f"sqlite:///{tmp_path / 'usage.db'}", LIMITS="dashboard.messages.CONVERSATION=10") as server:
        text = text_of(server.get("/dashboard/conversation?key=acme&conversation=c"))
    assert "20 earlier messages not shown" in text
    assert "2026-03-01 12:00:29" in text
    assert "2026-03-01 12:00:19" not in text


def test_keys_are_found_on_the_server(served: tuple[Serving, Store]) -> None:
    """Search, order and pages of keys are in the address, and the total stays that of all."""
    server, _ = served
    text = text_of(server.get(f"/dashboard/keys?q=CEDAR&{PERIOD}"))
    assert "cedar-bank" in text
    assert "acme" not in text
    assert "1 key, of 15 in all" in text
    by_name = re.findall(
        r'<th scope="row"[^>]*>(?:<a [^>]*>)?([^<]+)<', server.get(f"/dashboard/keys?sort=name&{PERIOD}").body.decode()
    )
    assert [html.unescape(name) for name in by_name[1:]] == sorted(html.unescape(name) for name in by_name[1:])
    assert by_name[0] == "(no key)"


def test_pages_of_messages(served: tuple[Serving, Store]) -> None:
    """ "Older" leads on until every message was shown once."""
    server, store = served
    path, shown = f"/dashboard/messages?key=acme&{PERIOD}", []
    while path:
        answer = server.get(path)
        shown += re.findall(r'<th scope="row"><a href="/dashboard/message\?[^"]*id=([\w-]+)', answer.body.decode())
        older = re.search(r'<a href="([^"]+)">Older</a>', answer.body.decode())
        path = html.unescape(older[1]) if older else ""
    total = usage_report(store, "key", Filter("acme", since=datetime(2026, 10, 25, tzinfo=timezone.utc))).total
    assert len(shown) == len(set(shown)) == total.messages + total.errors > 50


def test_void_messages(locked: tuple[Serving, Store, str]) -> None:
    """A message that was declared void says so, with the reason; the overview says that there are some."""
    server, store, key = locked
    cookie = sign_in(server, key)
    found = next(each.message.id for each in store.messages(limit=100).rows if each.message.status == "ok")
    void(store, found, "a test <call>")
    assert "a test <call>" in text_of(server.get(f"/dashboard/message?id={found}", Cookie=cookie))
    assert "1 message of these is void" in " ".join(text_of(server.get("/dashboard", Cookie=cookie)).split())


def test_warnings(served: tuple[Serving, Store]) -> None:
    """Calls without a key and models without a price are said, with where they are; costs are "at least"."""
    server, _ = served
    answer = server.get(f"/dashboard?{PERIOD}")
    text = " ".join(text_of(answer).split())
    assert re.search(r"\d+ calls in this period have no key", text)
    assert re.search(r"messages have no known price \(house-model\)", text)
    assert "at least" in text
    assert "no_key=true" in " ".join(links_of(answer))
    health = text_of(server.get("/dashboard/health"))
    assert "/srv/app/views.py:40" in health
    assert "house-model" in health


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("zone=Mars", "Mars"), ("since=soon", "soon"), ("preset=7y", "7y"), ("preset=7d&month=2026-11", "preset='7d'"),
        ("kye=acme", "kye"), ("key=a&no_key=true", "no_key"), ("show=debts", "debts"), ("month=2026-13", "2026-13"),
        ("since=2026-11-09&until=2026-11-01", "2026-11-09"), ("key=a&key=b", "2 times"), ("token=x", "token"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(served: tuple[Serving, Store], query: str, named: str) -> None:
    """A page that says what is wrong with which value, not another answer than was asked for."""
    answer = served[0].get(f"/dashboard?{query}")
    assert answer.status == 400
    assert named in text_of(answer)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard/nope", "/dashboard/", "/dashboard/message?id=x",
        "/dashboard/static/nope", "/dashboard/static/../app.py",
    ],
)  # fmt: skip
def test_not_found(served: tuple[Serving, Store], path: str) -> None:
    """A page of the dashboard, too."""
    answer = served[0].get(path)
    assert answer.status == 404
    assert b"<h1>Not found</h1>" in answer.body


@pytest.mark.parametrize(
    "page",
    [
        "keys?page=0", "keys?sort=luck", "messages?after=x", "conversations?after=x", "key", "conversation?key=acme",
        "usage.csv?by=luck", "keys?q=a&q=b", "message?id=%00",
    ],
)  # fmt: skip
def test_parameters_of_pages(served: tuple[Serving, Store], page: str) -> None:
    """Those are checked, too."""
    assert served[0].get(f"/dashboard/{page}").status == 400


def test_a_page_beyond_the_last(served: tuple[Serving, Store]) -> None:
    """Is the last: there may have been more when its address was kept."""
    keys = re.compile(r'<th scope="row"><a href="/dashboard/key\?[^"]*">[^<]+</a>')
    [first, beyond] = [served[0].get(f"/dashboard/keys?{PERIOD}{page}").body.decode() for page in ("", "&page=99")]
    assert keys.findall(first) == keys.findall(beyond) != []
    assert "15 keys" in beyond


def test_blank_fields_are_no_filters(served: tuple[Serving, Store]) -> None:
    """A form that was sent half empty is the address without what is empty; dates win over the preset beside them."""
    answer = served[0].get("/dashboard/keys?key=&tag=&model=gpt&preset=30d&since=2026-11-01&until=")
    assert answer.status == 303
    assert answer.headers["location"] == "/dashboard/keys?model=gpt&since=2026-11-01"


def test_nothing_recorded_yet(tmp_path: Path) -> None:
    """An empty ledger says what to paste; every page of it can be looked at."""
    with serving(f"sqlite:///{tmp_path / 'usage.db'}") as server:
        text = text_of(server.get("/dashboard"))
        for line in ("spryng_instrument.instrument()", "usage_context(key=", "chat.completions.create", "spryng demo"):
            assert line in text
        for page in PAGES:
            assert server.get(f"/dashboard{page}").status == 200
        assert len(server.get("/dashboard/messages.csv").body.splitlines()) == 1
        assert server.get("/").headers["location"] == "/dashboard"


def test_headers(served: tuple[Serving, Store]) -> None:
    """A page runs no script but ours, is in no frame, and is kept by nobody; static files are kept for ever."""
    answer = served[0].get("/dashboard")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert answer.headers["cache-control"] == "private, no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    files = re.findall(r'(?:src|href)="(/dashboard/static/[^"]+)"', answer.body.decode())
    assert len(files) == 3
    for file in files:
        assert "immutable" in served[0].get(file).headers["cache-control"]
        assert served[0].get(file.partition("?")[0]).headers["cache-control"] == "no-cache"


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_a_file_that_nobody_reads(tmp_path: Path) -> None:
    """Whoever asks for a large file and does not take it is hung up on; who takes it has all of it."""
    store = open_store(f"sqlite:///{tmp_path / 'usage.db'}")
    for _ in range(12):
        store.record([message(query="x" * 8_000) for _ in range(500)])
    with serving(f"sqlite:///{tmp_path / 'usage.db'}", LIMITS="serve.ANSWER_S=2.0") as server:
        rows = csv_of(server.get("/dashboard/messages.csv?preset=all"))
        assert len(rows) == 6_000
        idle = open_files(server.pid)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(b"GET /dashboard/messages.csv?preset=all HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until = time.monotonic() + 60
            for hung_up in (False, True):  # what is not sent by then never is
                while (open_files(server.pid) <= idle) != hung_up and time.monotonic() < until:
                    time.sleep(0.05)
            received = 0
            with suppress(ConnectionError):
                while part := sock.recv(1 << 20):
                    received += len(part)
        assert 0 < received < 48_000_000
        assert server.get("/healthz").status == 200
        assert "Traceback" not in server.text()


def test_the_host_of_an_open_server(served: tuple[Serving, Store]) -> None:
    """Without a key, pages are for this machine only, as the API is: not for a name that was made to resolve to it."""
    for path in ("/dashboard", "/dashboard/messages.csv", "/dashboard/health"):
        assert served[0].get(path, Host="evil.example").status == 403


# Who may see them.


def test_signing_in_and_out(locked: tuple[Serving, Store, str]) -> None:
    """A key of scope read begins a session that a script cannot read; it leads on to the page that was asked for."""
    server, _, key = locked
    asked = server.get("/dashboard/keys?sort=name&q=a%20b")
    assert asked.status == 303
    where = parse_qs(urlsplit(asked.headers["location"]).query)["next"]
    assert where == ["/dashboard/keys?sort=name&q=a%20b"]
    answer = post(server, "/dashboard/sign-in", {"key": f" {key} ", "next": where[0]})
    assert answer.headers["location"] == where[0]
    cookie, *attributes = answer.headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=lax", "Path=/"} <= set(attributes)
    assert key not in cookie
    page = server.get("/dashboard", Cookie=cookie)
    assert page.status == 200
    assert server.get("/dashboard/messages.csv", Cookie=cookie).status == 200
    assert server.get("/usage", Cookie=cookie).status == 401  # the API is for keys
    out = post(server, "/dashboard/sign-out", {"form_token": token_of(page)}, Cookie=cookie)
    assert out.status == 303
    assert "Max-Age=0" in out.headers["set-cookie"]


def test_secure_behind_https(locked: tuple[Serving, Store, str]) -> None:
    """Where a proxy on this machine says that the browser came by https, the cookie goes by https only."""
    server, _, key = locked
    answer = post(server, "/dashboard/sign-in", {"key": key}, X_Forwarded_Proto="https")
    assert "Secure" in answer.headers["set-cookie"]
    assert "Secure" not in post(server, "/dashboard/sign-in", {"key": key}).headers["set-cookie"]


def test_nobody_else(locked: tuple[Serving, Store, str]) -> None:
    """Without a session, of another ledger, changed by a letter, or for another purpose: there is nothing to see."""
    server, store, key = locked
    good = sign_in(server, key)
    secret = Secret(store)
    id = key.split("_")[1]
    bad = [
        "", "spryng_session=x", "spryng_session=.", good[:-1] + ("0" if good[-1] != "0" else "1"),
        good.replace("=", "=A"),
        "spryng_session=" + secret.sign("link", {"key": id, "until": 10**10}),
        "spryng_session=" + secret.sign("session", {"key": id, "until": 1}),
        "spryng_session=" + secret.sign("session", {"key": "00000000", "until": 10**10}),
        "spryng_session=" + secret.sign("session", [id]),
    ]  # fmt: skip
    for path in [
        f"/dashboard{page}" for page in [*PAGES, "/key?key=acme", "/usage.csv", "/messages.csv", "/message?id=m"]
    ]:
        assert server.get(path, Cookie=good).status in (200, 404)
        for cookie in bad:
            answer = server.get(path, Cookie=cookie)
            assert answer.status == 303, (path, cookie)
            assert answer.headers["location"].startswith("/dashboard/sign-in?")
            assert b"acme" not in answer.body


def test_sessions_end(locked: tuple[Serving, Store, str]) -> None:
    """A revoked key ends its sessions; so does another secret; a restart of the server does not."""
    server, store, key = locked
    _, other = keys.create(store, "other", ("read", "ingest"))
    cookies = [sign_in(server, each) for each in (key, key, other)]
    server.kill()
    server.start()
    assert [server.get("/dashboard", Cookie=cookie).status for cookie in cookies] == [200, 200, 200]
    keys.revoke(store, key.split("_")[1])
    until(lambda: [server.get("/dashboard", Cookie=cookie).status for cookie in cookies] == [303, 303, 200])
    renew(store)
    until(lambda: server.get("/dashboard", Cookie=cookies[2]).status == 303)


def until(holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
    raise AssertionError("it never does")


def test_keys_that_may_not_read(locked: tuple[Serving, Store, str]) -> None:
    """A key of scope ingest, or an unknown one, is told what it is."""
    server, store, key = locked
    _, ingest = keys.create(store, "app", ("ingest",))
    until(lambda: b"its scope is ingest" in post(server, "/dashboard/sign-in", {"key": ingest}).body)
    answer = post(server, "/dashboard/sign-in", {"key": key + "x"})
    assert answer.status == 403
    assert b"unknown or was revoked" in answer.body
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "target",
    ["//evil.example", "https://evil.example", "/\\evil.example", "/dashboard\\..", "/dashboard@evil", "/usage", "",
     "/dashboard\r\nX: y", "/dashboardevil", "javascript:alert(1)", "/dashboard?x=1\n"],
)  # fmt: skip
def test_no_way_out(locked: tuple[Serving, Store, str], target: str) -> None:
    """Signing in leads to a page of ours, whatever was asked for."""
    server, _, key = locked
    assert post(server, "/dashboard/sign-in", {"key": key, "next": target}).headers["location"] == "/dashboard"
    assert (
        f'value="{html.escape(target)}"' not in server.get(f"/dashboard/sign-in?next={quote(target)}").body.decode()
        or not target
    )


def test_forms_from_elsewhere(locked: tuple[Serving, Store, str]) -> None:
    """What changes something needs the token of the session, and a page of ours to come from."""
    server, _, key = locked
    cookie, other = sign_in(server, key), sign_in(server, key)
    token = token_of(server.get("/dashboard", Cookie=cookie))
    mine = f"127.0.0.1:{server.port}"
    good: list[dict[str, str]] = [
        {},
        {"Origin": f"http://{mine}"},
        {"Sec-Fetch-Site": "same-origin", "Origin": f"http://{mine}"},
    ]
    bad = [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
           {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "cross-site", "Origin": f"http://{mine}"}]  # fmt: skip
    link = {"key": "acme", "days": "7", "form_token": token}
    for headers in good:
        assert post(server, "/dashboard/link", link, Cookie=cookie, **headers).status == 200
    for headers in bad:
        assert post(server, "/dashboard/link", link, Cookie=cookie, **headers).status == 403
        assert post(server, "/dashboard/sign-out", {"form_token": token}, Cookie=cookie, **headers).status == 403
        assert post(server, "/dashboard/sign-in", {"key": key}, **headers).status == 403
    for wrong in ("", "x", token_of(server.get("/dashboard", Cookie=other))):
        answer = post(server, "/dashboard/link", {**link, "form_token": wrong}, Cookie=cookie)
        assert answer.status == 403, wrong
    assert post(server, "/dashboard/link", link).status == 401
    assert server.get("/dashboard/link", Cookie=cookie).status == 405
    assert (
        server.send("POST", "/dashboard/link", b"{}", {"Content-Type": "application/json", "Cookie": cookie}).status
        == 415
    )
    assert post(server, "/dashboard/sign-in", {"key": "x" * 70_000}).status == 413


def test_guessing_is_slow(tmp_path: Path) -> None:
    """Ten wrong keys from an address, and it has to wait: with a right one, too. Others may go on."""
    url = f"sqlite:///{tmp_path / 'usage.db'}"
    _, key = keys.create(open_store(url), "finance", ("read",))
    with serving(url) as server:
        for _ in range(10):
            assert post(server, "/dashboard/sign-in", {"key": "spryng_x_y"}).status == 403
        answer = post(server, "/dashboard/sign-in", {"key": key})
        assert answer.status == 429
        assert int(answer.headers["retry-after"]) > 200
        assert post(server, "/dashboard/sign-in", {"key": key}, X_Forwarded_For="203.0.113.9").status == 303


# Links for customers.


def test_a_link_shows_one_customer_only(locked: tuple[Serving, Store, str]) -> None:
    """Whatever else is in the address: of other customers, and of what is ours, there is nothing behind a link."""
    server, store, key = locked
    cookie = sign_in(server, key)
    token = token_of(server.get("/dashboard", Cookie=cookie))
    made = post(server, "/dashboard/link", {"key": "acme", "days": "7", "form_token": token}, Cookie=cookie)
    match = re.search(r'value="(http://[^"]+/dashboard/shared\?token=[^"]+)"', made.body.decode())
    assert match
    token = parse_qs(urlsplit(html.unescape(match[1])).query)["token"][0]
    mine = [row.message for row in store.messages(Filter("acme"), limit=1000).rows]
    others = [row.message for row in store.messages(Filter("cedar-bank"), limit=1000).rows]
    total = usage_report(store, "key", Filter("acme")).total
    for extra in ("", "&key=cedar-bank", "&no_key=true", "&key=", "&key=cedar-bank&no_key=true"):
        answer = server.get(f"/dashboard/shared?preset=all&token={token}{extra}")
        answer = server.get(answer.headers["location"]) if answer.status == 303 else answer
        assert stats_of(answer)["Messages"] == f"{total.messages:,}"
        assert "Cost USD" not in stats_of(answer)
        if not extra.startswith("&key=&") and extra != "&key=":
            rows = csv_of(server.get(f"/dashboard/shared/messages.csv?preset=all&token={token}{extra}"))
            assert {row["key"] for row in rows} == {"acme"}
    seen: set[str] = set()
    waiting = [f"/dashboard/shared?preset=all&token={token}"]
    while waiting and len(seen) < 60:
        path = waiting.pop(0)
        if path in seen:
            continue
        seen.add(path)
        answer = server.get(path)
        assert answer.status == 200, path
        for hidden in (b"cedar-bank", b"bluepeak", b"(no key)", b"views.py", b"cost", b"Cost"):
            assert hidden not in answer.body, (path, hidden)
        links = [urljoin(path, each) for each in links_of(answer) if not each.startswith("#")]
        assert all(each.startswith("/dashboard/shared") or each == "/dashboard" for each in links)
        waiting += [each for each in links if each.startswith("/dashboard/shared")]
    void(store, mine[0].id, "asked for three times")
    answer = server.get(f"/dashboard/shared/message?id={mine[0].id}&token={token}")
    assert answer.status == 200
    assert "Void since" in text_of(answer)
    assert "asked for" not in text_of(answer)
    assert server.get(f"/dashboard/shared/message?id={others[0].id}&token={token}").status == 404
    for path in ("/keys", "/health", "/key?key=acme"):
        joined = f"{path}{'&' if '?' in path else '?'}token={token}"
        assert server.get(f"/dashboard/shared{joined}").status == 404
        assert server.get(f"/dashboard{joined}").status == 303
    assert server.get(f"/dashboard?token={token}").status == 303
    assert server.get("/dashboard", Cookie=f"spryng_session={token}").status == 303
    renew(store)
    until(lambda: server.get(f"/dashboard/shared?token={token}").status == 403)


def test_links_from_the_command_line(locked: tuple[Serving, Store, str], tmp_path: Path) -> None:
    """`spryng link` makes a link that holds on any server of the ledger, with costs if asked for; and ends them all."""
    server, _, _ = locked
    ledger = ["--destination", f"sqlite:///{tmp_path / 'usage.db'}"]
    done = spryng("link", "cedar-bank", "--costs", "--tz", "Asia/Kolkata", "--url", server.url, *ledger, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = done.stdout.strip().removeprefix(server.url)
    answer = server.get(path)
    assert "Cost USD" in stats_of(answer)
    assert "Asia/Kolkata" in text_of(answer)
    assert spryng("link", "--revoke-all", *ledger, cwd=tmp_path).returncode == 0
    until(lambda: server.get(path).status == 403)
    assert spryng("link", *ledger, cwd=tmp_path).returncode == 2
    assert spryng("link", "a", "--tz", "Mars", *ledger, cwd=tmp_path).returncode != 0


def test_links_end(tmp_path: Path) -> None:
    """A link is good until its time, as it was signed, and for nothing else."""
    store = open_store(f"sqlite:///{tmp_path / 'usage.db'}")
    store.record([])
    secret = Secret(store)
    now = int(datetime.now(timezone.utc).timestamp())
    good = secret.sign("link", Link("acme", now + 60))
    assert secret.link(good) == Link("acme", now + 60)
    assert Secret(store).link(good) == Link("acme", now + 60)  # of another server
    for bad in (None, "", ".", good[:-1], "x" + good, good + "0", secret.sign("session", Link("acme", now + 60)),
                secret.sign("link", Link("acme", now - 1)), secret.sign("link", ["acme"]), "é.é"):  # fmt: skip
        assert secret.link(bad) is None


# Bills and budgets.


@pytest.fixture
def billed(tmp_path: Path) -> Iterator[tuple[Serving, Store, Path]]:
    """A server with plans and budgets, and messages of last month and this."""
    url = f"sqlite:///{tmp_path / 'usage.db'}"
    store = open_store(url)
    fill(store, keys=3, days=62)
    (tmp_path / "plans.toml").write_text(PLANS)
    (tmp_path / "budgets.toml").write_text(BUDGETS)
    environ = {"SPRYNG_PLANS": str(tmp_path / "plans.toml"), "SPRYNG_BUDGETS": str(tmp_path / "budgets.toml")}
    with serving(url, **environ) as server:
        yield server, store, tmp_path
        assert "Traceback" not in server.text()


def test_bills_are_those_of_the_command_line(billed: tuple[Serving, Store, Path]) -> None:
    """From draft to closed: page, CSV and print have the lines and the total of `spryng bill`, and so it stays."""
    server, store, folder = billed
    last = (datetime.now(timezone.utc).replace(day=1) - timedelta(days=1)).strftime("%Y-%m")
    options = ["--plans", "plans.toml", "--destination", f"sqlite:///{folder / 'usage.db'}"]

    def of_command(*more: str) -> list[dict[str, str]]:
        done = spryng("bill", *more, "--format", "csv", *options, cwd=folder)
        assert done.returncode == 0, done.stderr
        return list(csv.DictReader(io.StringIO(done.stdout)))

    assert csv_of(server.get(f"/dashboard/bills.csv?of={last}")) == of_command("--month", last)
    page = server.get(f"/dashboard/bills?of={last}")
    assert "draft" in text_of(page)
    draft = next(each for each in links_of(page) if each.startswith("/dashboard/bill?") and "cedar-bank" in each)
    assert f"Draft bill of {last}" in text_of(server.get(draft))
    lines = csv_of(server.get(draft.replace("/bill?", "/bill.csv?")))
    of_command("--month", last, "--key", "cedar-bank", "--close", "--without-gaps")
    text = text_of(server.get("/dashboard/bill?number=000001"))
    assert "Invoice 000001" in text
    assert f"{sum(Decimal(each['amount']) for each in lines):,.2f}" in text
    closed = csv_of(server.get("/dashboard/bill.csv?number=000001"))
    assert [each["amount"] for each in closed] == [each["amount"] for each in lines]
    behind = csv_of(server.get("/dashboard/bill-messages.csv?number=000001"))
    assert sum(int(row["count"]) for row in behind if row["status"] == "ok") == int(closed[0]["quantity"])
    assert b"<h1>Invoice 000001</h1>" in server.get("/dashboard/bill.html?number=000001").body
    store.record([message(key="cedar-bank", timestamp=datetime.now(timezone.utc).replace(day=1) - timedelta(days=2))])
    assert csv_of(server.get("/dashboard/bill.csv?number=000001")) == closed
    assert "000001" in text_of(server.get("/dashboard/bills"))
    for missing in ("number=000009", f"key=nobody&of={last}"):
        assert server.get(f"/dashboard/bill?{missing}").status == 404
    for wrong in ("", f"of={last}", "key=acme&of=soon"):
        assert server.get(f"/dashboard/bill?{wrong}").status == 400


def test_pages_of_bills(billed: tuple[Serving, Store, Path]) -> None:
    """However many bills there are, a page shows some of them; its links lead to every other one, once."""
    server, store, folder = billed
    more = "".join(f"[keys.k{n}]\nname = 'k{n}'\n" for n in range(70))
    (folder / "plans.toml").write_text(PLANS.replace("2026", "2020") + more)
    desk = Desk(store, load(folder / "plans.toml"))
    for n in range(60):
        desk.close("2020-01", f"k{n}")
    for table, more, count in ((0, "Next", 71), (1, "Older", 60)):
        following, seen = ["/dashboard/bills?of=2020-01"], list[str]()
        while following:
            page = server.get(html.unescape(following[0])).body.decode()
            part = page.split("Closed bills, the last one first", 1)[table]
            found = re.findall(r'<th scope="row"><a href="([^"]*)"', part)
            assert 0 < len(found) <= 50
            seen += found
            following = re.findall(rf'<a href="([^"]*)">{more}</a>', part)
        assert len(seen) == len(set(seen)) == count


def test_billing_period(billed: tuple[Serving, Store, Path]) -> None:
    """As a preset it is the customer's own, of its anchor day and zone; where there are no plans, it is not offered."""
    server, store, _ = billed
    answer = server.get("/dashboard/key?key=acme&preset=billing&zone=Europe/Berlin")
    assert re.search(r"15 \w{3} \d{4} – 14 \w{3} \d{4}", text_of(answer))
    assert "Billing period" in text_of(answer)
    with serving(f"sqlite:///{store.path}", SPRYNG_PLANS="/nowhere/plans.toml") as other:
        assert "Billing period" not in text_of(other.get("/dashboard"))
        assert other.get("/dashboard?preset=billing").status == 400
        assert "No plans yet" in text_of(other.get("/dashboard/bills"))
        assert "No budgets yet" in text_of(other.get("/dashboard/budgets"))


def test_budgets(billed: tuple[Serving, Store, Path]) -> None:
    """How much is used, the fullest first, as `spryng budgets` says it; each leads to its messages."""
    server, store, folder = billed
    now = datetime.now(timezone.utc)
    store.record([message(key=key, timestamp=now) for key in NAMES[:3]])  # also as a month begins
    options = ["--budgets", "budgets.toml", "--destination", f"sqlite:///{folder / 'usage.db'}"]
    done = spryng("budgets", *options, cwd=folder)
    answer = server.get("/dashboard/budgets")
    text = " ".join(text_of(answer).split())
    used = re.findall(r"(?:each|all) .*? ([\d,]+%)", text)
    assert len(used) == len(done.stdout.splitlines()) - 1 == 4
    href = next(each for each in links_of(answer) if "key=acme" in each)
    assert server.get(href).status == 200


# What pages are made of.


def test_presets() -> None:
    """A preset is the days that it says, of the zone; with the names of the API it asks for the same."""
    now = datetime(2026, 3, 1, 20, tzinfo=timezone.utc)  # in Kolkata, it is the 2nd

    def of(preset: str, zone: str = "Asia/Kolkata") -> tuple[str | None, str | None]:
        where = question.read("/", QueryParams([("preset", preset), ("zone", zone)]), now=now).where
        return tuple(each and each.isoformat() for each in (where.since, where.until))

    assert of("7d") == ("2026-02-23T18:30:00+00:00", "2026-03-02T18:30:00+00:00")
    assert of("month") == ("2026-02-28T18:30:00+00:00", "2026-03-31T18:30:00+00:00")
    assert of("last-month", "UTC") == ("2026-02-01T00:00:00+00:00", "2026-03-01T00:00:00+00:00")
    assert of("all") == (None, None)
    assert (
        question.read("/", QueryParams(""), now=now).where
        == question.read("/", QueryParams("preset=30d"), now=now).where
    )


def test_addresses_ask_for_what_they_say() -> None:
    """The address of a part of a period is read again as that part, whatever the zone and its clocks do."""
    dice = random.Random(1)
    for zone in ("UTC", "Asia/Kolkata", "Pacific/Chatham", "America/Sao_Paulo", "Europe/Berlin"):
        for _ in range(100):
            first = datetime(2018, 1, 1, tzinfo=timezone.utc) + timedelta(minutes=dice.randint(0, 5_000_000))
            stop = first + timedelta(minutes=dice.randint(1, 100_000))
            asked = question.read("/", QueryParams([("zone", zone), ("tag", "a&b"), ("key", ODD[1])]))
            part = asked.within(max(first, asked.where.since or first), stop)
            if first < (asked.where.since or first) or stop > (asked.where.until or stop):
                asked = question.read(
                    "/", QueryParams([("zone", zone), ("tag", "a&b"), ("key", ODD[1]), ("preset", "all")])
                )
                part = asked.within(first, stop)
            again = question.read("/", QueryParams(urlsplit(asked.address("messages", part)).query))
            assert (again.where.since, again.where.until) == (first, stop)
            assert (again.where.tags, again.where.key, again.zone) == (("a&b",), ODD[1], zone)


def test_bars_are_as_high_as_their_values() -> None:
    """The parts of a bar stand upon each other, and none is wider or higher than there is room."""
    columns = [
        [charts.Part(series, float(value), "", "") for series, value in enumerate(values)]
        for values in ([1, 2], [], [4, 0, 3])
    ]
    bars, top = charts.bars(columns)
    assert top == 8.0
    assert [len(bar.segments) for bar in bars] == [2, 0, 2]
    for bar, values in zip(bars, ([1, 2], [], [4, 3]), strict=True):
        assert [part.height for part in bar.segments] == [value / top * charts.HEIGHT for value in values]
        assert min([part.y for part in bar.segments], default=0) >= 0
        assert bar.x + bar.width <= 100
    for value in (0, 1, 3, 5, 11, 41, 99, 1_234, 99_999):
        _, top = charts.bars([[charts.Part(0, float(value), "", "")]], whole=True)
        assert value <= top <= max(2 * value, 4)
        assert top % 4 == 0
    many = charts.ranked({f"m{number}": float(number) for number in range(20)})
    assert sorted(set(many.values())) == list(range(charts.SERIES + 1))
    assert many["m19"] == 0
    assert [mark.text for mark in charts.labels([str(day) for day in range(30)])][-1] == "29"


def test_slow_answers_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """What took long is found once for all who ask in a while; what was quick is found again, and errors always."""
    clock = [100.0]
    monkeypatch.setattr(answers.time, "monotonic", lambda: clock[0])
    held, found = Answers(), []

    def slow() -> int:
        clock[0] += 2.0
        found.append("slow")
        return len(found)

    assert [held.get("q", slow, lambda _: 1)[0] for _ in range(3)] == [1, 1, 1]
    clock[0] += 2.0 * answers.TIMES + 0.1
    assert held.get("q", slow, lambda _: 1)[0] == 2
    assert [held.get("quick", lambda: found.append("quick") or len(found), lambda _: 1)[0] for _ in range(2)] == [3, 4]
    assert [held.get("large", slow, lambda _: answers.HELD_ROWS + 1)[0] for _ in range(2)] == [5, 6]

    def wrong() -> int:
        clock[0] += 2.0
        raise QueryError("no")

    for _ in range(2):
        with pytest.raises(QueryError):
            held.get("wrong", wrong, lambda _: 1)
    for number in range(answers.HELD * 2):
        held.get(number, slow, lambda _: 1)
    assert len(held._held) <= answers.HELD
    assert not held._finding


def test_next_is_ours() -> None:
    """What a page of ours links to is gone on to after signing in."""
    for path in ("/dashboard", "/dashboard/keys?q=a+b&sort=name", f"/dashboard/key?{urlencode({'key': ODD[1]})}"):
        assert routes._next(path) == path

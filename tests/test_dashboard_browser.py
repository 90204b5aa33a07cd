"""The dashboard in a real Chromium: with and without JavaScript, light and dark, wide and narrow, by mouse and keys."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from spryng_instrument.reports import usage_report
from spryng_instrument.server import keys
from spryng_instrument.store import open_store
from spryng_instrument.store.base import Filter

from .ledgers import BUDGETS, NAMES, ODD, PLANS, fill
from .serving import Serving, serving

LEDGERS = {"empty": 0, "normal": 6, "hundred": 120}
"""How many customers each has."""
PATHS = [
    "",
    "/keys",
    "/tags",
    "/models",
    "/conversations",
    "/messages",
    "/bills",
    "/budgets",
    "/health",
    "/key?no_key=true",
    "/key?key=acme",
]
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
MESSAGE = re.compile(r"^Message [\w-]+$")
FULL = os.environ.get("SPRYNG_TEST_FULL") == "1"
SHOTS = os.environ.get("SPRYNG_TEST_SHOTS")
"""A folder for pictures of the pages, to be looked at."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "Chromium is missing: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Serving]]:
    """A server of each of LEDGERS, once it is asked for."""
    folder, started, contexts = tmp_path_factory.mktemp("browser"), dict[str, Serving](), list[Any]()
    (folder / "plans.toml").write_text(PLANS)
    (folder / "budgets.toml").write_text(BUDGETS)

    def server_of(name: str) -> Serving:
        if name not in started:
            url = f"sqlite:///{folder / name}.db"
            if LEDGERS[name]:
                fill(open_store(url), keys=LEDGERS[name], days=40 if name == "normal" else 12)
            environ = {"SPRYNG_PLANS": str(folder / "plans.toml"), "SPRYNG_BUDGETS": str(folder / "budgets.toml")}
            contexts.append(serving(url, **(environ if name != "empty" else {})))
            started[name] = contexts[-1].__enter__()
        return started[name]

    yield server_of
    for server in started.values():
        assert "Traceback" not in server.text()
    for context in contexts:
        context.__exit__(None, None, None)


expect.set_options(timeout=15_000)
_LEFT = re.compile(r"csv|icon\.svg")
"""What a browser lets go of when another page is opened: a file that it saves; the icon, which it fetches last."""


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """A page of a browser of its own. Whatever it says on its console fails the test."""
    contexts: list[BrowserContext] = []
    said: list[str] = []

    def open_page(**options: Any) -> Page:
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda each: said.append(f"{each.type}: {each.text}"))
        page.on("pageerror", lambda each: said.append(f"error: {each}"))
        page.on("requestfailed", lambda each: _LEFT.search(each.url) or said.append(f"failed: {each.url}"))
        page.set_default_timeout(15_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def no_sideways_scroll(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
@pytest.mark.parametrize("ledger", list(LEDGERS))
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages(
    servers: Callable[[str], Serving], opened: Callable[..., Page], scheme: str, width: int, ledger: str, script: bool
) -> None:
    """No page says anything on the console, breaks a rule of axe, or is wider than the window."""
    server = servers(ledger)
    page = opened(color_scheme=scheme, viewport={"width": width, "height": 900}, java_script_enabled=script)
    for path in PATHS:
        page.goto(f"{server.url}/dashboard{path}")
        assert page.title().endswith(" · Spryng")
        expect(page.locator("h1")).to_have_count(1)
        assert no_sideways_scroll(page), path
        if SHOTS:
            name = f"{ledger}{path.partition('?')[0].replace('/', '-')}-{scheme}-{width}{'' if script else '-noscript'}"
            page.screenshot(path=Path(SHOTS, f"{name}.png"), full_page=True)
        if script and (FULL or (scheme, width) in (("light", 1280), ("dark", 390))):
            assert_accessible(page, path)


def assert_accessible(page: Page, path: str) -> None:
    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": RULES}})
    assert found.violations_count == 0, f"{path}\n{found.generate_report()}"


def test_other_pages(servers: Callable[[str], Serving], opened: Callable[..., Page], tmp_path: Path) -> None:
    """Nor do a message, a conversation, an open filter, an open table, a link for a customer, sign-in, and errors."""
    url = f"sqlite:///{tmp_path / 'usage.db'}"
    store = open_store(url)
    fill(store, keys=3, days=5)
    _, key = keys.create(store, "finance", ("read",))
    with serving(url) as server:
        for scheme, width in (("light", 1280), ("dark", 390)):
            page = opened(color_scheme=scheme, viewport={"width": width, "height": 900})

            def check(page: Page = page) -> None:
                assert no_sideways_scroll(page), page.url
                assert_accessible(page, page.url)

            page.goto(f"{server.url}/dashboard/keys")
            expect(page.locator("h1")).to_have_text("Sign in")
            check()
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Sign in").click()
            expect(page.locator("h1")).to_have_text("Keys")
            page.get_by_role("link", name="Overview").click()
            page.get_by_text("As a table").click()
            page.get_by_text("Filter", exact=True).click()
            check()
            page.goto(f"{server.url}/dashboard/conversation?key=bluepeak-logistics&conversation=c-1-1")
            check()
            page.locator("tbody th a").first.click()
            expect(page.locator("h1")).to_have_text(MESSAGE)
            check()
            page.goto(f"{server.url}/dashboard/key?key=acme")
            page.get_by_role("button", name="Make a link").click()
            link = page.get_by_label("The link").input_value()
            check()
            page.goto(link)
            check()
            page.get_by_role("link", name="Messages", exact=True).first.click()
            expect(page.locator("h1")).to_have_text("Messages")
            assert "/dashboard/shared/messages" in page.url
            check()
            page.goto(f"{server.url}/dashboard")
            page.get_by_role("button", name="Sign out").click()
            expect(page.locator("h1")).to_have_text("Sign in")


@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
def test_finding_the_way(
    servers: Callable[[str], Serving], opened: Callable[..., Page], script: bool, tmp_path: Path
) -> None:
    """Filters, drill-down from a bar to a message, Back, and a CSV with the screen's total: with and without script."""
    server = servers("normal")
    page = opened(java_script_enabled=script)
    page.goto(f"{server.url}/dashboard")
    before = page.url
    page.get_by_role("link", name="90 days").click()
    expect(page.get_by_role("link", name="90 days")).to_have_attribute("aria-current", "true")
    assert "preset=90d" in page.url
    page.get_by_text("Filter", exact=True).click()
    page.get_by_label("Key", exact=True).fill("acme")
    page.get_by_label("Time zone").fill("Asia/Kolkata")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator(".chip")).to_contain_text("acme")
    assert {"key=acme", "zone=Asia%2FKolkata", "preset=90d"} <= set(page.url.partition("?")[2].split("&"))
    filtered = page.url
    bar = page.locator("svg.bars a").last
    said = str(bar.get_attribute("aria-label"))
    bar.click()
    expect(page.locator("h1")).to_have_text("Messages")
    assert f"since={said[:10]}" in page.url
    page.locator("tbody th a").first.click()
    expect(page.locator("h1")).to_have_text(MESSAGE)
    for heading in ("Messages", "Overview"):
        page.go_back()
        expect(page.locator("h1")).to_have_text(heading)
    assert page.url == filtered
    figure = page.locator(".stats dd").nth(1).inner_text().split("\n")[0]
    page.goto(f"{server.url}/dashboard/keys?{filtered.partition('?')[2]}")
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    download.value.save_as(tmp_path / "usage.csv")
    with open(tmp_path / "usage.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert f"{sum(int(row['messages']) for row in rows):,}" == figure
    assert page.locator("tfoot td").nth(2).inner_text() == figure
    page.goto(before)
    page.get_by_role("link", name="Conversations", exact=True).first.click()
    expect(page.locator("h1")).to_have_text("Conversations")


def test_an_error_in_the_address_is_shown(servers: Callable[[str], Serving], chromium: Browser) -> None:
    """A zone that there is none is said where the page would be, with script, too; and Back leads to the page."""
    server = servers("normal")
    page = chromium.new_page()
    page.goto(f"{server.url}/dashboard")
    page.get_by_text("Filter", exact=True).click()
    page.get_by_label("Time zone").fill("Mars")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("main")).to_contain_text("Mars")
    page.go_back()
    expect(page.locator("h1")).to_have_text("Overview")
    page.close()


def test_searching_as_one_types(servers: Callable[[str], Serving], opened: Callable[..., Page]) -> None:
    """Keys are found while their name is typed, on the server; the address says it, and the field keeps the focus."""
    server = servers("hundred")
    page = opened()
    page.goto(f"{server.url}/dashboard/keys")
    field = page.get_by_label("Find a key")
    field.press_sequentially("customer-01", delay=30)
    expect(page.locator("#found tbody tr")).to_have_count(10)
    expect(field).to_be_focused()
    assert "q=customer-01" in page.url
    field.fill(ODD[0])
    expect(page.locator("#found tbody tr")).to_have_count(1)
    expect(page.locator("#found tbody th")).to_have_text(ODD[0])
    page.get_by_role("link", name=ODD[0]).click()
    expect(page.locator("h1")).to_have_text(ODD[0])
    page.go_back()
    expect(page.locator("#found tbody tr")).to_have_count(1)


def test_searching_where_pages_take_long(servers: Callable[[str], Serving], opened: Callable[..., Page]) -> None:
    """What was typed last is found, however long the pages for what was typed before take."""
    page = opened()
    page.goto(f"{servers('hundred').url}/dashboard/keys")
    page.evaluate(
        """() => {
            const soon = window.fetch;
            window.fetch = (...all) => new Promise(done => setTimeout(done, 700)).then(() => soon(...all));
        }"""
    )
    page.get_by_label("Find a key").press_sequentially("customer-01", delay=300)
    expect(page.locator("#found tbody tr")).to_have_count(10)
    assert "q=customer-01" in page.url


def test_by_keyboard(servers: Callable[[str], Serving], opened: Callable[..., Page]) -> None:
    """The first stop skips to the page; a bar can be reached, is seen to be, and opened."""
    server = servers("normal")
    page = opened()
    page.goto(f"{server.url}/dashboard")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the page")).to_be_focused()
    page.keyboard.press("Enter")
    stops = []
    for _ in range(40):
        page.keyboard.press("Tab")
        stops.append(
            page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.textContent")
        )
        if re.match(r"\d{4}-\d\d-\d\d, ", stops[-1]):
            break
    else:
        raise AssertionError(stops)
    assert page.evaluate("getComputedStyle(document.activeElement.querySelector('rect')).strokeWidth") == "2px"
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Messages")


def test_figures_are_the_ledgers(servers: Callable[[str], Serving], opened: Callable[..., Page]) -> None:
    """What a person reads is what the report says, for each customer."""
    server = servers("normal")
    page = opened()
    store = open_store(server.command[server.command.index("--destination") + 1])
    rows = {row.group: row for row in usage_report(store, "key", Filter()).rows}
    page.goto(f"{server.url}/dashboard/keys?preset=all")
    for name in NAMES:
        cells = page.get_by_role("row", name=name).locator("td").all_inner_texts()
        row = rows[name]
        assert cells[1:4] == [f"{row.messages:,}", f"{row.conversations:,}", f"{row.input_tokens:,}"]
        assert cells[0] == f"at least {row.cost_usd:,.6f}"


def test_nothing_of_a_name_runs(servers: Callable[[str], Serving], opened: Callable[..., Page]) -> None:
    """A customer called <script> is a name; the browser runs nothing of it."""
    server = servers("hundred")
    page = opened()
    page.on("dialog", lambda _: pytest.fail("it ran"))
    for path in ("/keys", "/messages", "/key?key=%3Cscript%3Ealert%281%29%3C%2Fscript%3E"):
        page.goto(f"{server.url}/dashboard{path}")
        assert page.locator("script").count() == 1

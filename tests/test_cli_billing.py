"""The commands of bills, as finance types them: figures on stdout, what is missing on stderr, exit codes as said."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from spryng_instrument import copying
from spryng_instrument.cli.commands import commands
from spryng_instrument.message import Message, Usage
from spryng_instrument.prices import price_source
from spryng_instrument.store.base import COUNTED, Cost, Filter
from spryng_instrument.store.sqlite import SqliteStore

from .messages import message
from .serving import ROOT, serving

PLANS = """
plan = "pro"
issuer = "Example Ltd"
[[plans.pro]]
effective = 2020-01-01
minimum = 3
rates = [
  { meter = "conversations", price = 1.00 },
  { meter = "messages", price = 0.10, included = 2 },
]
[keys.acme]
name = "Acme <Inc>"
stripe = "cus_1"
lago = "sub_1"
[keys.bluepeak]
plan = "by cost"
[[plans."by cost"]]
effective = 2020-01-01
rates = [{ meter = "cost", markup = 0.5 }]
"""
JANUARY = datetime(2026, 1, 10, tzinfo=timezone.utc)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SqliteStore:
    """A ledger and plans in a folder of its own: four messages of acme, one of bluepeak, one of nobody."""
    for name in [name for name in os.environ if name.startswith("SPRYNG_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    store = SqliteStore(tmp_path / ".spryng" / "usage.db")
    messages = [used("acme", n, conversation_id="c-1") for n in range(4)]
    messages += [used("bluepeak", usage=None), used(None), used("other", days=31)]
    store.record(messages)
    Path(".spryng/plans.toml").write_text(PLANS)
    return store


def used(key: str | None, hours: int = 0, days: int = 0, **fields: Any) -> Message:
    fields.setdefault("usage", Usage(input_tokens=7, output_tokens=3))
    time = JANUARY + timedelta(hours=hours, days=days)
    return message(key=key, timestamp=time, response_model="our-own", **fields)


def spryng(*args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(commands, args, catch_exceptions=False, prog_name="spryng")
    assert result.exit_code == code, result.output
    return result


def test_a_plan_that_is_taken_away(store: SqliteStore) -> None:
    """What closed bills would be by now is said with its amount, and then not that nobody owes anything."""
    plans = Path(".spryng/plans.toml")
    plans.write_text(PLANS.replace("minimum = 3\n", ""))
    spryng("bill", "--month", "2026-01", "--key", "acme", "--close")
    void = next(row.message.id for row in store.messages(Filter("acme")).rows)
    spryng("void", void, "--reason", "a test call")
    plans.write_text(PLANS.replace('plan = "pro"\n', "", 1))

    said = spryng("bill", "--month", "2026-02", "--key", "acme").stderr

    assert "acme: USD -0.10 beyond its closed bills, and no plan any more: on no bill until it has one." in said
    assert "Nobody has anything" not in said


def test_a_bill_for_people() -> None:
    """Lines, quantities, rates and amounts; whoever is left out is named."""
    shown = spryng("bill", "--month", "2026-01")
    assert shown.stdout.splitlines()[:6] == [
        "Acme <Inc>  draft  2026-01-01 to 2026-01-31 (UTC)  plan pro",
        "line                    quantity  included  rate   USD",
        "conversations                  1            1.00  1.00",
        "messages                       4         2  0.10  0.20",
        "up to the minimum of 3                            1.80",
        "total                                             3.00",
    ]
    assert shown.stdout.endswith("2 bills, USD 3.00\n")
    assert "1 message without a key: on nobody's bill" in shown.stderr
    assert "other" not in shown.output  # whose only message is of February


def test_csv_json_and_page_have_the_same_total() -> None:
    """Whatever it is printed as, it is the same bill."""
    table = spryng("bill", "--month", "2026-01", "--key", "acme").stdout
    assert "total                                             3.00" in table
    rows = list(csv.DictReader(io.StringIO(spryng("bill", "--month", "2026-01", "--format", "csv").stdout)))
    assert sum(Decimal(row["amount"]) for row in rows if row["key"] == "acme") == 3
    [first, _] = json.loads(spryng("bill", "--month", "2026-01", "--format", "json").stdout)
    assert first["total"] == "3.00"
    page = spryng("bill", "--month", "2026-01", "--format", "html").stdout
    assert "Acme &lt;Inc&gt;" in page
    assert '<td class="n">USD 3.00</td>' in page
    assert "http" not in page


def test_closing(store: SqliteStore) -> None:
    """Closed, a bill has a number and never changes; closed again, it is the same; it is found by its number."""
    spryng("bill", "--month", "2026-01", "--close")
    again = spryng("bill", "--month", "2026-01", "--close").stdout
    assert "Acme <Inc>  invoice 000001" in again
    store.record([used("acme", conversation_id="c-2")])
    assert spryng("bill", "--month", "2026-01").stdout == again
    assert again.startswith(spryng("bill", "--number", "000001").stdout.rpartition("\n1 bill")[0])
    listed = spryng("bills").stdout.splitlines()
    assert [re.split(r"  +", line)[0] for line in listed] == ["number", "000002", "000001"]
    first = spryng("bills", "--limit", "1")
    assert "000002" in first.stdout
    assert "000001" not in first.stdout
    [command] = re.findall("Older ones: spryng (.*)", first.stderr)
    older = spryng(*command.split())
    assert "000001" in older.stdout
    assert "Older ones" not in older.stderr
    assert len(spryng("bills", "--json", "--key", "acme").stdout.splitlines()) == 1
    assert re.search(r"^conversations \(of 2026-01\) +1 +1\.00$", spryng("bill", "--month", "2026-02").stdout, re.M)


def test_hostile_names(store: SqliteStore) -> None:
    """A name can neither rewrite the terminal, nor leave its place in a page or its cell in a table."""
    name = '\x1b]0;x\x07<script>alert(1)</script>\n=1+1,"\u202e' + "w" * 3_000
    store.record([used(name, usage=None)])
    month = ("bill", "--month", "2026-01", "--key", name)
    for args in ((), ("--close",)):
        shown = spryng(*month, *args)
        assert "\x1b" not in shown.output
        assert "\u202e" not in shown.output
    assert "\x1b" not in spryng("bills").output
    page = spryng(*month, "--format", "html").stdout
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    rows = list(csv.DictReader(io.StringIO(spryng(*month, "--format", "csv").stdout, newline="")))
    assert {row["key"] for row in rows} == {name}
    assert json.loads(spryng(*month, "--format", "json").stdout)[0]["key"] == name


def test_over_http(store: SqliteStore) -> None:
    """GET /bills has the closed bills as the command line has them."""
    spryng("bill", "--month", "2026-01", "--close")
    with serving(f"sqlite:///{store.path}") as server:
        listed = [json.loads(line) for line in spryng("bills", "--json").stdout.splitlines()]
        assert server.get("/bills").json() == {"bills": listed, "next": None}
        assert server.get("/bills?key=acme").json() == {"bills": listed[1:], "next": None}
        page = server.get("/bills?limit=1").json()
        assert page["bills"] == listed[:1]
        assert server.get(f"/bills?limit=1&after={page['next']}").json() == {"bills": listed[1:], "next": None}
        assert "after" in server.get("/bills?after=x").error
        assert "number" in server.get("/bills?number=1").error


def test_what_cannot_be_closed(store: SqliteStore) -> None:
    """One that depends on an unknown cost is not closed, and says which model that is; the others are."""
    store.record([used("bluepeak")])
    shown = spryng("bill", "--month", "2026-01", "--close", code=3)
    assert "Not closed: the bill of 'bluepeak' for 2026-01 is not complete. The cost of 1 messages of" in shown.stderr
    assert re.search(r"^total +at least 0\.00$", shown.stdout, re.M)
    assert "invoice 000001" in shown.stdout
    assert "invoice 000002" in spryng("bill", "--month", "2026-01", "--close", "--without-gaps").stdout
    open_month = f"{datetime.now(timezone.utc):%Y-%m}"
    assert "is not over" in spryng("bill", "--month", open_month, "--key", "acme", "--close", code=3).stderr


def test_months_that_were_not_closed() -> None:
    """Who closes a month is told of what earlier ones have that is on no bill, until these are closed."""
    march = ("bill", "--month", "2026-03", "--close")
    assert "acme: 4 messages of earlier months that were not closed" in spryng(*march).stderr
    spryng("bill", "--month", "2026-01", "--close")
    assert "acme" not in spryng(*march).stderr


def test_the_messages_behind_it(store: SqliteStore) -> None:
    """Every message of the bill, and none that came since."""
    spryng("bill", "--month", "2026-01", "--close")
    store.record([used("acme", conversation_id="c-2")])
    rows = list(csv.DictReader(io.StringIO(spryng("bill", "--number", "000001", "--messages").stdout)))
    assert [(row["bill"], row["line_of"], row["count"], row["conversation_id"]) for row in rows] == [
        ("000001", "2026-01", "1", "c-1")
    ] * 4
    late = list(csv.DictReader(io.StringIO(spryng("bill", "--month", "2026-02", "--key", "acme", "--messages").stdout)))
    assert [(row["bill"], row["line_of"], row["count"]) for row in late] == [("", "2026-01", "1")]


def test_the_messages_behind_it_in_a_copy(store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bill is there, and so are they once the copy is whole. Until then it is not guessed which messages it
    counted, neither in the terminal nor on the dashboard."""
    closed = spryng("bill", "--month", "2026-01", "--close").stdout
    store.record([used("acme", conversation_id="c-2")])
    copy = f"sqlite:///{tmp_path}/copy.db"
    with monkeypatch.context() as patched:
        patched.setattr(copying, "carry_over", lambda source, target: [])  # it is cut off before
        spryng("copy", f"sqlite:///{store.path}", copy)
    assert spryng("bill", "--month", "2026-01", "--destination", copy).stdout == closed
    behind = ("bill", "--number", "000001", "--messages", "--destination")
    shown = spryng(*behind, copy, code=1)
    assert shown.stdout == ""
    assert "bill 000001 was closed in another ledger, which this one is a copy of" in shown.stderr
    with serving(copy) as server:
        answer = server.get("/dashboard/bill-messages.csv?number=000001")
        assert answer.status == 400
        assert b"bill 000001 was closed in another ledger" in answer.body
    for _ in range(2):
        spryng("copy", f"sqlite:///{store.path}", copy)
        assert spryng(*behind, copy).stdout == spryng(*behind, f"sqlite:///{store.path}").stdout
        assert len(SqliteStore(tmp_path / "copy.db").records(COUNTED)) == 2


def test_corrections(store: SqliteStore) -> None:
    """They are appended, each with its reason; reports say what was used and what of it is void."""
    [row] = store.messages(limit=1).rows
    first = store.messages().rows[-1].message.id
    assert "is void: a test" in spryng("void", first, "--reason", "a test").stderr
    assert "is void since" in spryng("void", first, "--reason", "again", code=1).stderr
    usage = spryng("usage", "--by", "key")
    assert re.search(r"^acme +4 ", usage.stdout, re.M)
    assert "1 message of these is void: used, and not billed." in usage.stderr
    assert json.loads(spryng("usage", "--json").stdout)["voided"]["messages"] == 1
    spryng("adjust", "--key", "acme", "--amount=-0.50", "--reason", "goodwill", "--month", "2026-01")
    shown = spryng("bill", "--month", "2026-01", "--key", "acme")
    assert re.search(r"^messages +3 +2 +0\.10 +0\.10$", shown.stdout, re.M)
    assert re.search(r"^goodwill +-0\.50$", shown.stdout, re.M)
    assert "Of its messages, 1 are void and not billed." in shown.stderr
    assert (
        "--amount 'much' is no number"
        in spryng("adjust", "--key", "acme", "--amount", "much", "--reason", "r", code=2).stderr
    )
    assert row.message.id != first


def test_rating_anew(store: SqliteStore) -> None:
    """Where nothing would change, that is said; and where nothing can be priced, why not."""
    store.set_costs([Cost(row.message.id, Decimal("0.5"), "old") for row in store.messages().rows])
    if price_source().version is None:
        assert "nothing can be priced: genai-prices" in spryng("rate", "--month", "2026-01", code=1).stderr
    else:
        assert "No message would cost anything else." in spryng("rate", "--month", "2026-01").stderr


def test_rating_anew_is_killed(store: SqliteStore) -> None:
    """Whatever costs are new by then, documents say so, and of nothing else; done again, they say the whole change."""
    sent = [used("busy", usage=Usage(input_tokens=1_000_000, output_tokens=0)) for _ in range(8_000)]
    store.record(sent)
    store.set_costs([Cost(each.id, Decimal(2), "old") for each in sent])
    Path(".spryng/prices.toml").write_text('[[prices]]\nmodel = "our-own"\ninput = 3')
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-m", "spryng_instrument", "rate", "--apply"], env=environ) as process:
        while store.total(Filter("busy")).cost_usd == 2 * 8_000 and process.poll() is None:
            time.sleep(0.005)
        process.kill()

    def said() -> int:
        models = [model for record in store.records("repricing") for model in record.body["models"]]
        assert all(Decimal(model["after_usd"]) - Decimal(model["before_usd"]) == model["messages"] for model in models)
        return sum(model["messages"] for model in models)

    cost = store.total(Filter("busy")).cost_usd
    assert cost is not None
    assert said() == cost - 2 * 8_000 > 0
    spryng("rate", "--apply")
    assert said() == 8_000
    assert store.total(Filter("busy")).cost_usd == 3 * 8_000


def test_events() -> None:
    """An event a message, with its id; whom no id is known for is said."""
    shown = spryng("events", "--to", "lago", "--meter", "tokens", "--name", "tokens", "--month", "2026-01", code=3)
    [batch] = [json.loads(line) for line in shown.stdout.splitlines()]
    assert len(batch["events"]) == 4
    event = batch["events"][0]
    assert (event["code"], event["external_subscription_id"], event["properties"]["value"]) == ("tokens", "sub_1", "10")
    assert "(no key): 1 message left out: no lago id" in shown.stderr
    shown = spryng("events", "--to", "stripe", "--name", "messages", "--key", "acme", code=3)
    assert shown.stdout == ""
    assert "4 messages left out: Stripe takes none that are older than 35 days." in shown.stderr


def test_stripe_events(store: SqliteStore) -> None:
    """Whole numbers as text, the message's id as identifier; void and failed messages make none."""
    now = datetime.now(timezone.utc)
    new = [
        message(key="acme", timestamp=now, usage=Usage(input_tokens=9, cached_tokens=4)),
        message(key="acme", timestamp=now, status="error", usage=Usage(input_tokens=9)),
        message(key="acme", timestamp=now, usage=Usage(input_tokens=9)),
    ]
    store.record(new)
    spryng("void", new[2].id, "--reason", "a test")
    shown = spryng("events", "--to", "stripe", "--meter", "uncached", "--name", "in", "--since", "1h", "--key", "acme")
    [event] = [json.loads(line) for line in shown.stdout.splitlines()]
    assert event == {
        "event_name": "in",
        "identifier": new[0].id,
        "timestamp": int(now.timestamp()),
        "payload": {"stripe_customer_id": "cus_1", "value": "5"},
    }


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["bill", "--number", "1", "--close"], 2, "--number names a closed bill"),
        (["bill", "--number", "1", "--key", "acme"], 2, "--number names a closed bill"),
        (["bill", "--month", "2026-01", "--without-gaps"], 2, "--without-gaps is about closing"),
        (["bill", "--month", "2026-01", "--messages", "--format", "json"], 2, "it takes no --format json"),
        (["bill", "--month", "2026-13"], 2, "month='2026-13' is no month"),
        (["bill", "--number", "7"], 1, "no closed bill '7'"),
        (["bill", "--month", "2026-01", "--plans", "none.toml"], 2, "there are no plans at none.toml"),
        (["bill", "--month", "2026-01", "--key", "nobody"], 0, "Nobody has anything to be billed"),
        (["bills"], 0, "No bill was closed"),
        (["void", "nothing", "--reason", "r"], 1, "there is no message 'nothing'"),
    ],
)
def test_bad_input(args: list[str], code: int, said: str) -> None:
    """It is said in a line, with an exit code that tells what could be typed better from what failed."""
    assert said in spryng(*args, code=code).stderr

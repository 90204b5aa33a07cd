"""The command line: what it prints where, and its exit codes. Real processes where that matters."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import select
import shlex
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from spryng_instrument import prices
from spryng_instrument.cli.commands import commands
from spryng_instrument.deferred import Deferred
from spryng_instrument.journal import Journal
from spryng_instrument.message import Message, Usage, encode, new_id
from spryng_instrument.prices import Source
from spryng_instrument.store.sqlite import SqliteStore

from .scripted import ScriptedServer, TrackUsageServer

NOON = datetime(2026, 11, 21, 12, tzinfo=timezone.utc)
ESCAPE = "\x1b["


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test in a folder of its own, without settings of whoever runs it, and with prices that it knows."""
    for name in [name for name in os.environ if name.startswith("SPRYNG_") or name in ("NO_COLOR", "FORCE_COLOR")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prices, "price_source", lambda: Source("test 1"))
    monkeypatch.setattr(prices, "price_of", lambda message: None if message.model == "new" else Decimal("0.5"))
    return tmp_path


def a(minutes: float = 0, **more: Any) -> Message:
    """A message some minutes after noon."""
    about: dict[str, Any] = {
        "key": "acme",
        "response_model": "gpt",
        "usage": Usage(input_tokens=1000, output_tokens=200),
    }
    return Message(
        id=new_id(), timestamp=NOON + timedelta(minutes=minutes), operation="chat.completions", **about | more
    )


def record(*messages: Message, path: str = ".spryng/usage.db") -> SqliteStore:
    store = SqliteStore(path)
    store.record(messages)
    return store


def spryng(*args: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(commands, args, catch_exceptions=False, prog_name="spryng")


def process(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """The command in a real one."""
    command = [sys.executable, "-m", "spryng_instrument", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


def terminal(columns: int, *args: str, **environ: str) -> str:
    """What the command shows on a terminal that is *columns* wide."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-m", "spryng_instrument", *args]
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**inherited, **environ}) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux's way of saying that the other end is closed
                break
            if not part:
                break
            shown += part
        assert child.wait(120) == 0
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")


# --- usage ------------------------------------------------------------------------------------------------------------


def test_usage_is_the_default_table() -> None:
    """Data goes to stdout: a row a customer, right-aligned numbers with separators, and a total."""
    record(a(), a(1, conversation_id="c"), a(2, key="zoe", status="error"), a(3, key=None))

    result = spryng("usage")

    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "key       messages  conversations  errors  input  cached  output  cost USD",
        "(no key)         1              0       0  1,000       0     200    0.5000",
        "acme             2              1       0  2,000       0     400    1.0000",
        "zoe              0              0       1  1,000       0     200    0.5000",
        "total            3              1       1  4,000       0     800    2.0000",
    ]
    assert "`spryng doctor` names their lines of code" in result.stderr


def test_usage_says_at_least() -> None:
    """Where a price is unknown the total says "at least", and a note names the models."""
    record(a(), a(1, response_model="new"), a(2, response_model="new", key="zoe"), a(3, usage=None))

    result = spryng("usage")

    assert [line.split("  ")[-1].strip() for line in result.stdout.splitlines()[1:]] == [
        "at least 0.500000",
        "unknown",
        "at least 0.500000",
    ]
    assert "The cost of 2 messages is unknown: no price for new." in result.stderr
    assert "1 message came without usage" in result.stderr


def test_usage_by_tag_explains_its_total() -> None:
    """By tag, a message may be in several rows: the total does not add them up, and says so."""
    record(a(tags=("x", "y")), a(1))

    result = spryng("usage", "--by", "tag")

    assert [line.split()[:2] for line in result.stdout.splitlines()[1:]] == [
        ["(no", "tag)"],
        ["x", "1"],
        ["y", "1"],
        ["total", "2"],
    ]
    assert "the total counts it once" in result.stderr


@pytest.mark.parametrize(
    ("args", "keys"),
    [
        (["--key", "acme"], ["acme"]),
        (["--no-key"], ["(no key)"]),
        (["--tag", "x"], ["acme", "zoe"]),
        (["--tag", "x", "--tag", "y"], ["zoe"]),
        (["--model", "new"], ["zoe"]),
        (["--conversation", "c-1"], ["acme"]),
        (["--since", "2026-11-22"], ["zoe"]),
        (["--until", "2026-11-21"], ["(no key)", "acme"]),
        (["--month", "2026-10"], []),
        (["--since", "2026-11-22T01:00", "--tz", "Asia/Kolkata"], ["zoe"]),
    ],
)
def test_filters(args: list[str], keys: list[str]) -> None:
    """Every filter does what it says."""
    record(
        a(tags=("x",), conversation_id="c-1"),
        a(1, key=None),
        a(60 * 24, key="zoe", tags=("x", "y"), response_model="new"),
    )

    rows = list(csv.DictReader(io.StringIO(spryng("usage", "--format", "csv", *args).stdout)))

    assert [row["key"] for row in rows] == keys


def test_csv_and_json() -> None:
    """Programs get stable names and plain numbers; JSON has null where people read (no key)."""
    record(a(), a(1, key=None, response_model="new"))

    as_csv = spryng("usage", "--format", "csv").stdout
    as_json = json.loads(spryng("usage", "--json").stdout)

    assert as_csv == (
        "key,messages,conversations,errors,cancelled,unreported,unpriced,"
        "input_tokens,cached_tokens,output_tokens,reasoning_tokens,cost_usd\n"
        "(no key),1,0,0,0,0,1,1000,0,200,0,\n"
        "acme,1,0,0,0,0,0,1000,0,200,0,0.5\n"
    )
    assert list(as_json) == [
        "by", "zone", "since", "until", "rows", "more", "total", "voided", "cost_is_at_least", "unpriced_models"
    ]  # fmt: skip
    assert [row["key"] for row in as_json["rows"]] == [None, "acme"]
    assert as_json["total"]["cost_usd"] == "0.5"
    assert as_json["total"]["input_tokens"] == 2000
    assert (as_json["cost_is_at_least"], as_json["unpriced_models"]) == (True, ["new"])


def test_by_conversation_says_whose() -> None:
    """The same conversation id of two customers is two conversations."""
    record(a(conversation_id="c"), a(1, key="zoe", conversation_id="c"), a(2))

    rows = list(csv.DictReader(io.StringIO(spryng("usage", "--by", "conversation", "--format", "csv").stdout)))

    assert [(row["key"], row["conversation"]) for row in rows] == [
        ("acme", "(no conversation)"),
        ("acme", "c"),
        ("zoe", "c"),
    ]


def test_many_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    """People and JSON get those that cost the most, and are told that there are more; CSV without a limit has all."""
    record(*(a(number % 7, conversation_id=f"c{number}", key=f"k{number % 3}") for number in range(1005)))
    record(a(conversation_id="c3", key="k0"))

    few = json.loads(spryng("usage", "--by", "conversation", "--limit", "1", "--json").stdout)
    usual = spryng("usage", "--by", "conversation", "--json")
    all_of_them = spryng("usage", "--by", "conversation", "--format", "csv")
    some = spryng("usage", "--by", "conversation", "--format", "csv", "--limit", "2")

    assert [(row["conversation"], row["messages"], few["more"]) for row in few["rows"]] == [("c3", 2, True)]
    assert len(json.loads(usual.stdout)["rows"]) == 1000
    assert few["total"] == json.loads(usual.stdout)["total"]
    assert few["total"]["messages"] == 1006
    assert "There are more than these 1,000 rows, which cost the most; the total is of all." in usual.stderr
    rows = list(csv.DictReader(io.StringIO(all_of_them.stdout)))
    assert (len(rows), sum(int(row["messages"]) for row in rows), all_of_them.stderr) == (1005, 1006, "")
    monkeypatch.setattr("spryng_instrument.reports.AT_A_TIME", 100)  # beyond it, one customer's at a time
    assert spryng("usage", "--by", "conversation", "--format", "csv").stdout == all_of_them.stdout
    assert (len(some.stdout.splitlines()), "There are more than these 2 rows" in some.stderr) == (3, True)
    assert json.loads(spryng("usage", "--limit", "3", "--json").stdout)["more"] is False


def test_days_are_those_of_the_zone() -> None:
    """A message at noon UTC is the next day's in Chatham."""
    record(a())

    assert "2026-11-22" in spryng("usage", "--by", "day", "--tz", "Pacific/Chatham").stdout
    assert "day (UTC)" in spryng("usage", "--by", "day").stdout


def test_empty_names_the_next_command() -> None:
    """Nothing to show is no failure: a note says what to do next, and stdout stays for data."""
    record()

    for command in (["usage"], ["messages"], ["usage", "--key", "nobody"]):
        result = spryng(*command)
        assert (result.exit_code, result.stdout) == (0, "")
        assert "spryng demo" in result.stderr
    record(a())
    result = spryng("messages", "--key", "nobody")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No message matches" in result.stderr
    assert json.loads(spryng("usage", "--key", "nobody", "--json").stdout)["rows"] == []


# --- what cannot be ---------------------------------------------------------------------------------------------------


def corrupt(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + os.urandom(5000))


def text(path: Path) -> None:
    path.write_text("key,messages\n" * 100)


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE invoices (id)")
    db.close()


def newer(path: Path) -> None:
    SqliteStore(path).record([a()])
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


def missing(path: Path) -> None:
    pass


def good(path: Path) -> None:
    SqliteStore(path).record([a()])


BAD = [
    (missing, ["usage", "--by", "weather"], 2, "'weather' is not one of 'key', 'tag', 'conversation', 'model', 'day'"),
    (missing, ["usage", "--since", "2026-02-30"], 2, "since='2026-02-30' cannot be: day .*; give a date"),
    (missing, ["usage", "--month", "2026-13"], 2, "month='2026-13' is no month: .*; write it as 2026-11"),
    (missing, ["usage", "--tz", "Mars/Olympus"], 2, "zone 'Mars/Olympus' is unknown; give an IANA name"),
    (missing, ["usage", "--since", "today", "--until", "yesterday"], 2, "since='today' is not before until="),
    (missing, ["usage", "--destination", "mysql://db/x"], 2, "unknown destination scheme 'mysql'"),
    (missing, ["usage", "--destination", "sqlite://x.db"], 2, "three slashes or four"),
    (missing, ["usage", "--key", "a", "--no-key"], 2, "--key and --no-key exclude each other"),
    (missing, ["usage", "--json", "--format", "csv"], 2, "--json and --format csv exclude each other"),
    (missing, ["messages", "--limit", "0"], 2, "0 is not in the range"),
    (missing, ["frobnicate"], 2, "No such command 'frobnicate'"),
    (missing, ["usage"], 1, r"there is no ledger at .*usage\.db.*spryng demo"),
    (corrupt, ["usage"], 1, "is no ledger of spryng_instrument, or is corrupt"),
    (text, ["messages"], 1, "is no ledger of spryng_instrument, or is corrupt: file is not a database"),
    (foreign, ["usage"], 1, "is a SQLite file of something else"),
    (newer, ["tail", "-n", "1"], 1, "has schema 99, written by a newer spryng_instrument.*pip install -U"),
    (good, ["messages", "--after", "x"], 2, "after='x' is no mark of a page"),
    (good, ["messages", "--after", "9" * 30 + "_x"], 2, "is no mark of a page"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "args", "code", "said"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_bad_input(here: Path, make: Any, args: list[str], code: int, said: str) -> None:
    """What cannot be is said in one message on stderr, with its value and what to do; never as a traceback."""
    (here / ".spryng").mkdir()
    make(here / ".spryng" / "usage.db")

    result = spryng(*args)

    assert result.exit_code == code
    assert re.search(said, " ".join(result.stderr.split()))
    assert result.stdout == ""


@pytest.mark.parametrize("case", [BAD[0], BAD[1], BAD[5], BAD[11], BAD[13]], ids=lambda case: " ".join(case[1][:3]))
def test_bad_input_of_a_process(here: Path, case: tuple[Any, list[str], int, str]) -> None:
    """The same as a shell sees it."""
    make, args, code, said = case
    (here / ".spryng").mkdir()
    make(here / ".spryng" / "usage.db")

    done = process(*args)

    assert done.returncode == code
    assert re.search(said, " ".join(done.stderr.split()))
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """SPRYNG_DESTINATION names the ledger; a --destination wins, with the journal that belongs to it."""
    record(a(key="env"), path="env.db")
    record(a(key="option"), path="other/option.db")
    monkeypatch.setenv("SPRYNG_DESTINATION", "sqlite:///env.db")
    monkeypatch.setenv("SPRYNG_JOURNAL", "env-journal")
    leave(Path("env-journal"), a(1, key="of-env"))

    assert "option" in spryng("usage", "--destination", "sqlite:///other/option.db").stdout
    assert "of-env" not in spryng("usage", "--destination", "sqlite:///other/option.db").stdout
    assert "of-env" in spryng("usage").stdout


def leave(folder: Path, *messages: Message) -> None:
    """What a process leaves that was killed before it delivered."""
    journal = Journal(folder, memory_limit=0, wake=lambda: None)
    for message in messages:
        journal.append(encode(message) + b"\n")
    journal.seal()
    journal.close()


def test_orphans_are_delivered_first() -> None:
    """What a dead process left in the journal is in the figures, and even makes the ledger."""
    leave(Path(".spryng/usage.db.journal"), a(), a(1))

    result = spryng("usage", "--json")

    assert json.loads(result.stdout)["total"]["messages"] == 2
    assert result.stderr == ""
    assert not list(Path(".spryng/usage.db.journal").glob("*.jsonl"))


def test_what_cannot_be_delivered_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that leave out messages that wait say so."""
    record(a())
    spryng("usage")  # so that nothing waits for its price
    leave(Path(".spryng/usage.db.journal"), a(1))
    with sqlite3.connect(".spryng/usage.db", isolation_level=None) as db:
        db.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr("spryng_instrument.pump.Pump._left", lambda *_: 0.01)
        result = spryng("messages", "--json")
        db.execute("ROLLBACK")
    db.close()

    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    assert "are not in these figures" in result.stderr


# --- messages and tail ------------------------------------------------------------------------------------------------


def test_messages_page_by_page() -> None:
    """Newest first; the note on stderr is the command of the next page, filters and all, until there is none."""
    sent = [a(minute, key="acme ltd") for minute in range(7)]
    record(*sent, a(9, key="other"))

    seen = []
    command = ["messages", "--key", "acme ltd", "--limit", "3", "--json"]
    for _ in range(3):
        result = spryng(*command)
        seen += [json.loads(line)["id"] for line in result.stdout.splitlines()]
        if "Older ones: spryng " in result.stderr:
            command = shlex.split(result.stderr.split("Older ones: spryng ")[1])

    assert seen == [message.id for message in reversed(sent)]
    assert result.stderr == ""


def test_messages_for_people_and_programs() -> None:
    """The table has what matters; CSV and JSON have every field."""
    record(
        a(tags=("x", "y"), properties={"plan": "pro"}),
        a(1, status="error", error="RateLimitError", http_status=429, usage=None),
    )

    table = spryng("messages", "--tz", "Europe/Berlin").stdout.splitlines()
    rows = list(csv.DictReader(io.StringIO(spryng("messages", "--format", "csv").stdout)))

    assert table[0].startswith("time (Europe/Berlin)")
    assert "2026-11-21 13:01:00" in table[1]
    assert "error 429" in table[1]
    assert [json.loads(row["tags"]) for row in rows] == [[], ["x", "y"]]
    assert json.loads(rows[1]["properties"]) == {"plan": "pro"}
    assert (rows[0]["input_tokens"], rows[1]["input_tokens"], rows[1]["cost_usd"]) == ("", "1000", "0.5")


def test_control_characters_are_shown() -> None:
    """A customer's key cannot rewrite the terminal of whoever reads the report."""
    record(a(key="evil\x1b[2J\nkey", conversation_id="\r"))

    for command in ("usage", "messages"):
        assert "\x1b" not in spryng(command).stdout
        assert "evil\\x1b[2J\\nkey" in spryng(command).stdout


class Tail:
    """A `spryng tail` that runs."""

    def __init__(self, *args: str) -> None:
        command = [sys.executable, "-m", "spryng_instrument", "tail", "--interval", "0.05", *args]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C ends it, also where the tests run in the background of a shell, which ignores that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout

    def lines(self, wanted: int, timeout_s: float = 60.0) -> list[str]:
        """The next lines; fewer if they do not come in time."""
        found: list[str] = []
        deadline = time.monotonic() + timeout_s
        while len(found) < wanted and select.select([self.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
            line = os.read(self.stdout.fileno(), 1 << 20).decode()
            if not line:
                break
            found += line.splitlines()
        return found

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture
def tails() -> Iterator[list[Tail]]:
    started: list[Tail] = []
    yield started
    for tail in started:
        tail.process.kill()
        tail.process.communicate()


def test_tail_misses_nothing_and_repeats_nothing(tails: list[Tail]) -> None:
    """Each message once, of every process, however late it arrives and whatever its time; Ctrl-C ends it cleanly."""
    store = record(a(), a(1), a(2))
    tails.append(tail := Tail("--json", "-n", "2"))
    first = [json.loads(line)["timestamp"] for line in tail.lines(2)]

    sent = [
        [a(60 - 7 * number, writer=f"w{writer}", sequence=number + 1) for number in range(40)] for writer in range(3)
    ]

    def deliver(messages: list[Message]) -> None:
        for message in messages:
            store.record([message])

    threads = [threading.Thread(target=deliver, args=[messages]) for messages in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    late = a(-60 * 24 * 30)
    store.record([late])
    seen = [json.loads(line)["id"] for line in tail.lines(121)]

    assert first == ["2026-11-21T12:01:00+00:00", "2026-11-21T12:02:00+00:00"]
    assert sorted(seen) == sorted([late.id, *(message.id for messages in sent for message in messages)])
    assert seen[-1] == late.id
    assert tail.end() == (0, "")


def test_tail_follows_a_ledger_made_anew(tails: list[Tail], here: Path) -> None:
    """A ledger that is deleted and made again is followed on."""
    record(a(), a(1, key="first"))
    tails.append(tail := Tail("-n", "1"))
    first = tail.lines(1)
    for path in (here / ".spryng").glob("usage.db*"):
        path.unlink(missing_ok=True)  # another may have closed the ledger, and so removed what belongs to it
    time.sleep(1.0)
    record(a(key="second"))
    second = tail.lines(1)

    assert ("first" in first[0], "second" in second[0]) == (True, True)
    code, said = tail.end()
    assert code == 0
    assert said.count("Waiting: ") == 1


def test_tail_ends_with_its_reader(tails: list[Tail]) -> None:
    """`spryng tail | head -1` ends when head does, and says nothing."""
    store = record(a())
    tails.append(tail := Tail("-n", "1"))
    assert len(tail.lines(1)) == 1
    tail.stdout.close()
    for minute in range(100):
        store.record([a(minute)])
        if tail.process.poll() is not None:
            break
        time.sleep(0.05)

    assert tail.process.wait(60) == 0
    assert tail.process.stderr is not None
    assert tail.process.stderr.read() == ""


# --- terminals and pipes ----------------------------------------------------------------------------------------------


def test_no_colour_in_a_pipe() -> None:
    """Only a terminal gets colour, and only one that wants it."""
    record(a())

    assert ESCAPE not in process("usage", env={**os.environ, "FORCE_COLOR": "1"}).stdout
    assert ESCAPE in terminal(80, "usage")
    assert ESCAPE not in terminal(80, "usage", NO_COLOR="1")
    assert ESCAPE not in terminal(80, "usage", TERM="dumb")


def test_a_narrow_terminal_cuts_nothing_off() -> None:
    """Columns are left out whole and named; keys and numbers stay whole. A pipe gets everything."""
    key = "a-customer-with-quite-a-long-name-gmbh"
    record(a(key=key, usage=Usage(input_tokens=123_456_789_012, output_tokens=7)))

    wide, middle, narrow = (terminal(columns, "usage", NO_COLOR="1") for columns in (200, 90, 40))
    piped = process("usage", env={**os.environ, "COLUMNS": "40"}).stdout

    assert "conversations" in wide
    assert "123,456,789,012" in middle
    assert "left out on this narrow terminal: conversations" in middle
    assert key in "".join(line.split("  ")[0] for line in narrow.splitlines())
    assert max(map(len, narrow.splitlines()[:3])) <= 40
    assert "conversations" in piped
    assert "123,456,789,012" in piped


def test_important_columns_stay() -> None:
    """A long key is folded before counts are left out; counts go strictly by their importance."""
    record(a(key="a-customer-with-quite-a-long-name-gmbh-und-co-kg", usage=Usage(input_tokens=123_456_789)))

    shown = terminal(60, "usage", NO_COLOR="1").splitlines()

    assert shown[0].split() == ["key", "messages", "output", "cost", "USD"]
    assert [line for line in shown if line.startswith("left out")] == [
        "left out on this narrow terminal: conversations, errors, input, cached"
    ]


@pytest.mark.parametrize("by", ["key", "conversation"])
def test_a_trend_where_there_is_room(by: str) -> None:
    """On a wide terminal a row shows its days; a narrow one says nothing of it, and a pipe has the plain table."""
    record(
        *(a(60 * 24 * day, tags=("x",), conversation_id="c") for day in (0, 2, 2, 2, 2)),
        a(60 * 24, key="zoe", tags=("y",), conversation_id="d", response_model="other"),
    )

    wide = terminal(160, "usage", "--by", by, NO_COLOR="1").splitlines()
    narrow = terminal(80, "usage", "--by", by, NO_COLOR="1")

    assert wide[0].endswith("  3 days to 11-23")
    assert [line[len(wide[0]) - 15 :] for line in wide[1:4]] == ["▂ █", " █", "▂▂█"]
    assert "days to" not in narrow
    assert "█" not in narrow + process("usage", "--by", by).stdout
    assert "days to" not in terminal(160, "usage", "--by", by, PYTHONIOENCODING="ascii")


def test_a_trend_needs_two_days() -> None:
    """One day is no trend."""
    record(a(), a(1))

    assert "days to" not in terminal(160, "usage", NO_COLOR="1")


def test_bars_by_day() -> None:
    """By day or month a bar shows the share: of the costs, or of the messages where a cost is unknown."""
    prices.rate(record(a(), a(60 * 24), a(60 * 24 + 1)))
    by_cost = terminal(160, "usage", "--by", "day", NO_COLOR="1").splitlines()
    record(a(60 * 24 * 2, response_model="new"))
    by_messages = terminal(160, "usage", "--by", "day", NO_COLOR="1").splitlines()

    assert by_cost[0].endswith("  by cost")
    assert [line.count("█") for line in by_cost[1:4]] == [20, 40, 0]
    assert by_messages[0].endswith("  by messages")
    assert "by cost" not in process("usage", "--by", "day").stdout


def test_head_is_no_error() -> None:
    """A reader that goes away early leaves no traceback and no failure."""
    record(*(a(minute) for minute in range(3000)))
    command = f"{sys.executable} -m spryng_instrument messages --limit 3000 --json; echo code $? >&2"

    done = subprocess.run(
        ["bash", "-c", f"({command}) | head -1"], capture_output=True, text=True, timeout=120, check=True
    )

    assert done.stdout.count("\n") == 1
    assert done.stderr == "code 0\n"


def test_help_and_version() -> None:
    """Every command explains itself, and the module is the command."""
    assert "spryng, version" in process("--version").stdout
    for command in ("usage", "messages", "tail", "doctor", "demo"):
        assert spryng(command, "--help").exit_code == 0
    assert "..." not in spryng("--help").stdout.split("Commands:")[1]
    assert "Exit code 3" in spryng("doctor", "--help").stdout


def test_without_the_extra(here: Path) -> None:
    """Without click, one line says what to install."""
    (here / "click.py").write_text("raise ModuleNotFoundError('No module named click', name='click')")
    done = process("usage", env={**os.environ, "PYTHONPATH": f"{here}:{os.environ['PYTHONPATH']}"})

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "spryng needs click: pip install 'spryng-instrument[cli]'\n"


# --- push, and destinations that cannot be read -----------------------------------------------------------------------


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackUsageServer]:
    """A Track Usage API, which is the destination."""
    api = TrackUsageServer()
    server = ScriptedServer(api)
    monkeypatch.setenv("SPRYNG_DESTINATION", server.url)
    monkeypatch.setenv("SPRYNG_JOURNAL", "journal")
    yield api
    server.close()


def test_push_delivers_to_a_server(api: TrackUsageServer) -> None:
    """What dead processes left is delivered by hand; with nothing left there is nothing to do."""
    leave(Path("journal"), a(), a(1))
    leave(Path("journal"), a(2))

    result = spryng("push")

    assert (result.exit_code, result.stderr) == (0, "")
    assert re.fullmatch(r"3 messages delivered to http://127.0.0.1:\d+\n", result.stdout)
    assert len(api.kept) == 3
    assert spryng("push").stdout.startswith("0 messages delivered")


def test_push_delivers_to_a_ledger() -> None:
    """Any kind of destination will do."""
    leave(Path(".spryng/usage.db.journal"), a())
    assert spryng("push").stdout == f"1 message delivered to sqlite:///{Path('.spryng/usage.db').absolute()}\n"
    assert len(SqliteStore(".spryng/usage.db").messages().rows) == 1


def test_push_tries_again(api: TrackUsageServer) -> None:
    """Within its time it goes on until everything is delivered."""
    leave(Path("journal"), a())
    api.script = ["500", "lost", "ok"]
    assert spryng("push").exit_code == 0
    assert len(api.kept) == 1


def test_push_says_what_is_left(api: TrackUsageServer) -> None:
    """Exit code 1, how many were left, and why."""
    leave(Path("journal"), a(), a(1))
    api.script = ["401"] * 50

    result = spryng("push", "--timeout", "3")

    assert (result.exit_code, result.stdout[:20]) == (1, "0 messages delivered")
    assert "2 messages left in" in result.stderr
    assert "it wants an API key. Set api_key or SPRYNG_API_KEY" in result.stderr


def test_push_leaves_a_running_process_its_own(api: TrackUsageServer) -> None:
    """What a running process holds is its own to deliver."""
    journal = Journal(Path("journal"), memory_limit=0, wake=lambda: None)
    journal.append(encode(a()) + b"\n")
    try:
        result = spryng("push", "--timeout", "0")
    finally:
        journal.close()
    assert result.exit_code == 1
    assert "1 message left in" in result.stderr
    assert "a running process holds them" in result.stderr


def test_push_says_what_was_set_aside(api: TrackUsageServer) -> None:
    """A message that the server can never take is no success."""
    leave(Path("journal"), bad := a(), a(1))
    api.refuses = {bad.id}

    result = spryng("push")

    assert (result.exit_code, result.stdout[:19]) == (1, "1 message delivered")
    assert "1 line set aside" in result.stderr


@pytest.mark.parametrize("command", ["usage", "messages", "tail"])
def test_a_destination_that_cannot_be_read(api: TrackUsageServer, command: str) -> None:
    """One line says so, with exit code 2; nothing is delivered for it."""
    leave(Path("journal"), a())
    result = spryng(command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: http:// takes messages, but cannot be read from here")
    assert not api.kept


def test_doctor_of_a_server(api: TrackUsageServer) -> None:
    """It delivers what waits, and says whether the server would take a message; what it has is not asked."""
    leave(Path("journal"), a(writer="w", sequence=7))

    code, found = examined()

    assert (code, found["ledger"], found["waiting"], found["problems"]) == (0, "write-only", 0, [])
    assert len(api.kept) == 1
    assert "0 waiting" in spryng("doctor").stdout
    assert "recorded =" not in spryng("doctor").stdout

    api.script = ["403"]
    code, found = examined()
    assert (code, found["ledger"]) == (3, "unusable")
    assert "may not send messages" in found["problems"][0]


def test_doctor_of_a_server_without_batches(api: TrackUsageServer) -> None:
    """One that takes single messages only is well, too; one that takes none is not."""
    api.batches = False
    api.script = ["400"]
    assert examined()[0] == 0
    api.script = ["404"]
    assert "Correct the destination's URL" in examined()[1]["problems"][0]


def test_doctor_of_a_shared_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is not there may wait on another machine: it is a warning, no proven loss.

    The ledger is SQLite's here; that many machines share it is what the URL says.
    """
    store = record(a(writer="w", sequence=1), a(1, writer="w", sequence=5))
    monkeypatch.setattr("spryng_instrument.cli.doctor.open_ledger", lambda settings: store)

    code, found = examined("--destination", "postgresql://db.example.com/usage")

    assert (code, found["ledger"], found["delivered"], found["lost"]) == (0, "ok", 2, {})
    assert found["warnings"] == [
        "3 messages, numbered by w, neither in the ledger nor in this machine's journal. They may wait in another "
        "machine's: `spryng push` there. What none has is lost"
    ]


# --- doctor -----------------------------------------------------------------------------------------------------------


def examined(*args: str) -> tuple[int, dict[str, Any]]:
    result = spryng("doctor", "--json", *args)
    return result.exit_code, json.loads(result.stdout)


def test_doctor_is_content() -> None:
    """A ledger with everything in it is well."""
    record(*(a(number, writer="w", sequence=number + 1) for number in range(3)))

    code, found = examined()

    assert (code, found["ok"], found["problems"], found["warnings"]) == (0, True, [], [])
    assert (found["recorded"], found["delivered"], found["waiting"], found["lost"]) == (3, 3, 0, {})
    assert found["seams"] == {"SyncAPIClient.request": True, "AsyncAPIClient.request": True}
    assert found["versions"]["openai"]
    assert "All is well." in spryng("doctor").stdout


def test_doctor_before_the_first_message() -> None:
    """Nothing recorded yet is worth a word, and no failure."""
    code, found = examined()

    assert (code, found["ledger"]) == (0, "missing")
    assert "spryng demo" in found["warnings"][0]


def test_doctor_proves_losses() -> None:
    """A missing number is a loss, unless the journal holds it; a number that waits elsewhere is none."""
    record(a(writer="w", sequence=1), a(1, writer="w", sequence=5), a(1, writer="x", sequence=2))
    journal = Journal(Path(".spryng/usage.db.journal"), memory_limit=0, wake=lambda: None)
    journal.append(encode(a(2, writer="w", sequence=3)) + b"\n")
    try:
        code, found = examined()
    finally:
        journal.close()

    assert (code, found["lost"], found["waiting"]) == (3, {"w": 2, "x": 1}, 1)
    assert found["recorded"] == 3 + 1 + 3
    assert any("2 messages of process w are lost" in problem for problem in found["problems"])


def test_doctor_of_many_short_lived_processes() -> None:
    """However many processes lost something, ten are told of, those that lost the most; JSON counts each."""
    record(*(a(writer=f"w{number:03}", sequence=number + 2) for number in range(30)))

    code, found = examined()

    assert (code, found["lost"]) == (3, {f"w{number:03}": number + 1 for number in range(30)})
    assert [problem.split(" are lost")[0] for problem in found["problems"]] == [
        *(f"{number + 1} messages of process w{number:03}" for number in reversed(range(20, 30))),
        "210 messages of 20 more processes",
    ]


def test_doctor_counts_losses_however_many() -> None:
    """A sender that numbers as it likes costs no more memory than it has messages; what waits in the journal is none of
    the losses, wherever its number lies."""
    record(a(writer="w", sequence=10**12), a(1, writer="w", sequence=4))
    journal = Journal(Path(".spryng/usage.db.journal"), memory_limit=0, wake=lambda: None)
    for number in (1, 4, 9, 10**12 - 1, 10**12, 10**13, None):
        journal.append(encode(a(2, writer="w", sequence=number)) + b"\n")
    try:
        code, found = examined()
    finally:
        journal.close()

    assert (code, found["lost"], found["waiting"]) == (3, {"w": 10**12 - 2 - 3}, 7)
    assert any("999,999,999,995 messages of process w are lost" in problem for problem in found["problems"])


def test_doctor_delivers_and_finds_what_was_set_aside() -> None:
    """Orphans are delivered; a corrupt line among them is named, with its file."""
    leave(Path(".spryng/usage.db.journal"), a(writer="w", sequence=1))
    segment = next(Path(".spryng/usage.db.journal").glob("*.jsonl"))
    segment.write_bytes(segment.read_bytes() + b'{"id": "torn\n')

    code, found = examined()

    assert (code, found["delivered"], found["waiting"], found["lost"]) == (3, 1, 0, {})
    assert list(found["set_aside"].values()) == [1]
    assert any("1 line set aside in" in problem for problem in found["problems"])


def test_doctor_finds_a_stuck_backlog() -> None:
    """Messages that a running process does not deliver are a problem when they have waited too long."""
    record(a())
    journal = Journal(Path(".spryng/usage.db.journal"), memory_limit=0, wake=lambda: None)
    journal.append(encode(a(1)) + b"\n")
    try:
        assert examined()[0] == 0
        os.utime(next(Path(".spryng/usage.db.journal").glob("*.jsonl")), (0, 0))
        code, found = examined()
    finally:
        journal.close()

    assert (code, found["waiting"]) == (3, 1)
    assert "held by a running process that does not deliver them" in found["problems"][0]


@pytest.mark.parametrize("make", [corrupt, text, foreign, newer])
def test_doctor_finds_an_unusable_ledger(here: Path, make: Any) -> None:
    """A ledger that is not ours, or too new, is a problem that says what to do."""
    (here / ".spryng").mkdir()
    make(here / ".spryng" / "usage.db")

    code, found = examined()

    assert (code, found["ledger"]) == (3, "unusable")
    assert len(found["problems"]) == 1


def test_doctor_finds_an_unwritable_journal(here: Path) -> None:
    """A journal folder that cannot be made is a problem, before any application meets it."""
    (here / "file").write_text("")
    record(a())

    code, found = examined("--journal", str(here / "file" / "journal"))

    assert code == 3
    assert "cannot be written" in found["problems"][0]
    assert "SPRYNG_JOURNAL" in found["problems"][0]


def test_doctor_names_what_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An SDK that can do more than this version knows is named, with what to do; it is no failure of the check."""
    monkeypatch.setattr("spryng_instrument.surface._is_known", lambda name: name != "POST /embeddings")
    assert examined()[1]["uncounted"] == []  # of an SDK that our tests have walked, that is known

    monkeypatch.setattr("spryng_instrument.surface.WALKED", (1, 2))
    code, found = examined()
    assert code == 0
    assert found["uncounted"] == ["POST /embeddings"]
    assert any("POST /embeddings" in warning and "pip install -U" in warning for warning in found["warnings"])


def test_doctor_shows_what_is_begun_and_not_read() -> None:
    """Calls whose usage comes with a later read are shown until somebody reads it."""
    message = Message(new_id(), NOON, "responses", key="acme", response_id="resp_1")
    Deferred(Path(".spryng/usage.db.journal")).keep("resp_1", message)
    assert examined()[1]["deferred"] == 1
    assert "1 begun in the background" in spryng("doctor").stdout


def test_doctor_finds_a_missing_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """An SDK without the method that calls go through is a problem."""
    monkeypatch.setattr("spryng_instrument.patch.seams", lambda: [("SyncAPIClient.request", False)])
    record(a())

    code, found = examined()

    assert code == 3
    assert "no SyncAPIClient.request" in found["problems"][0]


def test_doctor_warns_of_no_key_and_no_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls without a key are named by their line of code, models without a price by their name: warnings, exit 0."""
    monkeypatch.setattr("spryng_instrument.cli.doctor.price_source", lambda: Source("test 1"))
    record(a(key=None, call_site="app.py:12"), a(1, response_model="new"))

    code, found = examined()

    assert (code, found["problems"]) == (0, [])
    assert found["unattributed"] == [{"call_site": "app.py:12", "messages": 1}]
    assert found["unpriced"] == [{"model": "new", "messages": 1}]
    assert len(found["warnings"]) == 2
    assert "app.py:12" in spryng("doctor").stdout


def test_doctor_says_why_costs_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no prices at all, the reason is shown."""
    monkeypatch.setattr(prices, "price_source", lambda: Source(None, "genai-prices needs Python 3.11"))
    record(a())

    code, found = examined()

    assert (code, found["warnings"]) == (0, ["costs are unknown: genai-prices needs Python 3.11"])
    assert "unknown (genai-prices needs Python 3.11)" in spryng("usage").stderr


def test_doctor_of_a_process() -> None:
    """As a shell sees it: exit code 3, facts and problems on stdout."""
    record(a(writer="w", sequence=2))

    done = process("doctor")

    assert done.returncode == 3
    assert "PROBLEM: 1 message of process w is lost" in done.stdout
    assert done.stdout.endswith("Something is wrong.\n")

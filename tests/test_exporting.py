"""Exports: a file is whole or not there, and has every message of the ledger, to the last trillionth of a dollar."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spryng_instrument import exporting, prices
from spryng_instrument.cli.commands import commands
from spryng_instrument.exporting import COLUMNS, FORMATS, export, whole_file, writer_of
from spryng_instrument.message import Message, Usage, decode, encode, new_id
from spryng_instrument.prices import Source
from spryng_instrument.store.base import START, Filter, Page, Record, StoredMessage
from spryng_instrument.store.sqlite import SqliteStore

from .messages import anything, message

fresh = count()
ZONES = ("UTC", "Asia/Kolkata", "Pacific/Chatham", "America/Sao_Paulo")


def price(message: Message) -> Decimal | None:
    """A price that the tests know."""
    if message.usage is None or message.model in (None, "unpriced"):
        return None
    return Decimal(message.usage.input_tokens or 0) * Decimal("0.000000075001") + Decimal("0.003333333333")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test in a folder of its own, with prices that it knows."""
    for name in [name for name in os.environ if name.startswith("SPRYNG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prices, "price_source", lambda: Source("test 1"))
    monkeypatch.setattr(prices, "price_of", price)
    return tmp_path


def ledger(*messages: Message, path: str = ".spryng/usage.db") -> SqliteStore:
    store = SqliteStore(path)
    store.record(messages)
    return store


def spryng(*args: str) -> Result:
    return CliRunner().invoke(commands, ["export", *args], catch_exceptions=False, prog_name="spryng")


# --- reading back -----------------------------------------------------------------------------------------------------


def read_parquet(data: bytes) -> list[dict[str, Any]]:
    parquet = pytest.importorskip("pyarrow.parquet")
    return list(parquet.read_table(io.BytesIO(data)).to_pylist())


def read_jsonl(data: bytes) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in data.splitlines()]
    return [{**row, **(row.pop("usage") or {})} for row in rows]


def read_csv(data: bytes) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(data.decode(), newline=""), strict=True))


READERS = {"csv": read_csv, "jsonl": read_jsonl, "parquet": read_parquet}
_INTEGERS = (*(name for name in Usage.__struct_fields__ if name != "seconds"), "retries", "http_status", "sequence")
_REALS = ("seconds", "latency_ms", "time_to_first_token_ms")


def message_back(form: str, row: dict[str, Any]) -> StoredMessage:
    """What a row of a file says. CSV has nothing for "none", and nothing for an empty text: None is made of both."""
    values = dict(row)
    if form == "csv":
        values = {name: value or None for name, value in values.items()}
        values |= {name: int(values[name]) for name in _INTEGERS if values[name]}
        values |= {name: float(values[name]) for name in _REALS if values[name]}
        values["streamed"] = values["streamed"] == "True"
        values["tags"] = json.loads(values["tags"])
        values["operation"] = values["operation"] or ""
    if form != "jsonl":
        values |= {name: values[name] and json.loads(values[name]) for name in ("properties", "tool_usage")}
    if form != "parquet":
        values["timestamp"] = datetime.fromisoformat(values["timestamp"])
        values["cost_usd"] = None if values["cost_usd"] is None else Decimal(values["cost_usd"])
    cost, version = values.pop("cost_usd"), values.pop("price_version")
    counts = {name: values.pop(name, None) for name in Usage.__struct_fields__}
    usage = Usage(**counts) if any(count is not None for count in counts.values()) else None
    return StoredMessage(Message(**{**values, "tags": tuple(values["tags"]), "usage": usage}), cost, version)


def plain(row: StoredMessage, form: str) -> StoredMessage:
    """As *form* can tell it."""
    if form != "csv":
        return row
    texts = {
        name: getattr(row.message, name) or (None if name != "operation" else "")
        for name in row.message.__struct_fields__
        if isinstance(getattr(row.message, name), str)
    }
    return replace(row, message=msgspec.structs.replace(row.message, **texts))


def all_of(store: SqliteStore, where: Filter = Filter()) -> list[StoredMessage]:  # noqa: B008
    return store.arrivals(START, where, limit=10**6).rows


billed = st.builds(
    Message,
    id=st.builds(new_id),
    timestamp=st.integers(0, 40 * 86_400 * 10**6).map(
        lambda us: datetime(2026, 10, 20, tzinfo=timezone.utc) + timedelta(microseconds=us)
    ),
    operation=st.just("chat.completions"),
    status=st.sampled_from(["ok", "ok", "incomplete", "error", "cancelled"]),
    key=st.sampled_from([None, "acme", 'quo"te, comma', "line\nend", "return\r", "=1+1"]),
    conversation_id=st.sampled_from([None, "c-1"]),
    tags=st.lists(st.sampled_from(["support", "a;b"]), unique=True, max_size=2).map(tuple),
    response_model=st.sampled_from([None, "gpt", "unpriced"]),
    usage=st.none() | st.builds(Usage, input_tokens=st.none() | st.integers(0, 10**9), output_tokens=st.just(3)),
)
filters = st.sampled_from([[], ["--key", "acme"], ["--no-key"], ["--tag", "support"], ["--month", "2026-11"]])


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(anything.map(encode).map(decode) | billed, max_size=12, unique_by=lambda each: each.id),
    filters,
    st.sampled_from(ZONES),
    st.sampled_from([1, 3, 10_000]),
)
def test_what_is_written_is_the_ledger(
    form: str, messages: list[Message], chosen: list[str], zone: str, page: int
) -> None:
    """Any messages, any filter, any zone, pages of any length: what is read back is what the ledger has."""
    store = ledger(*messages, path=f"{next(fresh)}.db")
    file = f"{store.path.stem}.{form}"
    before, exporting.PAGE = exporting.PAGE, page
    try:
        result = spryng("-o", file, "--tz", zone, "--destination", f"sqlite:///{store.path}", *chosen)
    finally:
        exporting.PAGE = before

    assert (result.exit_code, result.stdout) == (0, "")
    assert "Compared: the ledger has exactly these." in result.stderr
    since, until = (datetime(2026, month, 1, tzinfo=ZoneInfo(zone)) for month in (11, 12))
    where = {
        "": Filter(), "--key": Filter("acme"), "--no-key": Filter(no_key=True), "--tag": Filter(tags=("support",)),
        "--month": Filter(since=since.astimezone(timezone.utc), until=until.astimezone(timezone.utc)),
    }[chosen[0] if chosen else ""]  # fmt: skip
    wanted = [plain(row, form) for row in all_of(store, where)]
    read = READERS[form](Path(file).read_bytes())
    assert [message_back(form, row) for row in read] == wanted
    total = store.total(where)
    costs = [row.cost_usd for row in wanted if row.cost_usd is not None]
    assert total.cost_usd == (sum(costs, Decimal(0)) if costs else None)
    if form == "csv":
        assert all(
            datetime.fromisoformat(row["timestamp"]).utcoffset()
            == datetime.fromisoformat(row["timestamp"]).astimezone(ZoneInfo(zone)).utcoffset()
            for row in read
        )


def test_no_ledger() -> None:
    """Where there is no ledger nothing is written, not even a header."""
    result = CliRunner().invoke(commands, ["export"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no ledger" in result.stderr


@pytest.mark.parametrize("form", FORMATS)
def test_an_empty_export_is_a_file(form: str) -> None:
    """No message matches: a file with its header, and no row."""
    ledger(message(key="acme"))

    assert spryng("--key", "nobody", "-o", f"none.{form}").exit_code == 0
    assert READERS[form](Path(f"none.{form}").read_bytes()) == []


def test_parquet_has_types() -> None:
    """Times, counts, costs and tags are what they are, not texts; a reader needs no schema from elsewhere."""
    parquet = pytest.importorskip("pyarrow.parquet")
    ledger(message(usage=Usage(input_tokens=1)))
    spryng("-o", "usage.parquet")

    schema = parquet.read_schema("usage.parquet")

    assert schema.names == list(COLUMNS)
    assert {name: str(schema.field(name).type) for name in ("timestamp", "cost_usd", "input_tokens", "seconds")} == {
        "timestamp": "timestamp[us, tz=UTC]",
        "cost_usd": "decimal128(38, 12)",
        "input_tokens": "int64",
        "seconds": "double",
    }
    assert str(schema.field("tags").type).startswith("list<")
    assert str(schema.field("properties").type) == "string"


def test_stdout_is_csv_as_of_messages() -> None:
    """Without a file it is the CSV of `spryng messages`, oldest arrival first; notes stay on stderr."""
    ledger(*(message(key=str(number)) for number in range(3)))

    lines = spryng().stdout.splitlines()
    others = CliRunner().invoke(commands, ["messages", "--format", "csv"]).stdout.splitlines()

    assert lines[0] == others[0] == ",".join(COLUMNS)
    assert sorted(lines[1:]) == sorted(others[1:])
    assert [row["key"] for row in read_csv("\n".join(lines).encode())] == ["0", "1", "2"]
    assert read_jsonl(spryng("--format", "jsonl").stdout.encode())[0]["key"] == "0"


def test_what_is_void_is_said() -> None:
    """A message that is void is in the file, as it is in the ledger; how many there are is said."""
    void = message(key="acme")
    store = ledger(void, message(key="acme"), message(key="zoe"))
    now = datetime.now(timezone.utc)
    store.append([Record(f"void:{void.id}", "void", now, {"reason": "a test"}, "acme", void.id)])

    assert "2 messages to bill" in spryng("--key", "acme").stderr
    assert "1 message of these is void: used, and not billed." in spryng("--key", "acme").stderr
    assert "void" not in spryng("--key", "zoe").stderr


# --- whole or not there -----------------------------------------------------------------------------------------------


def test_a_file_that_is_there_stays(here: Path) -> None:
    """It is replaced only when told to, and then at once."""
    ledger(message())
    (here / "usage.csv").write_text("mine")

    refused = spryng("-o", "usage.csv")
    assert refused.exit_code == 2
    assert "usage.csv is there already; --force replaces it." in refused.stderr
    assert (here / "usage.csv").read_text() == "mine"
    assert spryng("-o", "usage.csv", "--force").exit_code == 0
    assert len(read_csv((here / "usage.csv").read_bytes())) == 1


class Failing:
    """A ledger that stops to answer after its first page."""

    def __init__(self, store: SqliteStore, failure: BaseException) -> None:
        self._store, self._failure, self._asked = store, failure, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def arrivals(self, *args: Any, **kwargs: Any) -> Page:
        self._asked += 1
        if self._asked > 1:
            raise self._failure
        return self._store.arrivals(*args, **kwargs)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
def test_cut_off(here: Path, failure: BaseException, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that fails leaves neither a part under its name nor anything beside it; what was there stays."""
    monkeypatch.setattr(exporting, "PAGE", 1)
    store = Failing(ledger(message()), failure)
    folder = here / "out"
    folder.mkdir()
    if there:
        (folder / "usage.csv").write_text("mine")

    with pytest.raises(type(failure)), whole_file(folder / "usage.csv", overwrite=True) as file:
        export(store, Filter(), writer_of("csv", file))

    assert [path.name for path in folder.iterdir()] == (["usage.csv"] if there else [])
    assert not there or (folder / "usage.csv").read_text() == "mine"


def test_killed(here: Path) -> None:
    """Killed while it writes, there is no file of that name; the next export is not in its way."""
    store = SqliteStore(".spryng/usage.db")
    for _ in range(4):
        store.record([message() for _ in range(5_000)])
    command = [sys.executable, "-m", "spryng_instrument", "export", "-o", "usage.jsonl"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as child:
        while not list(here.glob(".usage.jsonl.*.part")) and child.poll() is None:
            time.sleep(0.001)
        with suppress(ProcessLookupError):
            child.send_signal(signal.SIGKILL)
    if child.returncode == -signal.SIGKILL:
        assert not (here / "usage.jsonl").exists()

    assert spryng("-o", "usage.jsonl", "--force").exit_code == 0
    assert len(read_jsonl((here / "usage.jsonl").read_bytes())) == 20_000


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["-o", "usage.xls"], 2, "usage.xls has no ending that says what it is; give --format, one of: csv, jsonl"),
        (["-o", "nowhere/usage.csv"], 1, "nowhere/usage.csv: No such file or directory. Nothing was written there."),
        (["-o", ".", "--format", "csv", "--force"], 1, "not a file that could be replaced"),
        (["-o", "/dev/null", "--format", "csv", "--force"], 1, "not a file that could be replaced"),
        (["--format", "parquet"], 2, "Parquet cannot go to stdout; name a file with --output."),
    ],
)
def test_where_it_cannot_go(args: list[str], code: int, said: str) -> None:
    """What cannot be is said, with what to do; a device is never replaced by a file."""
    ledger(message())

    result = spryng(*args)

    assert result.exit_code == code
    assert said in " ".join(result.stderr.split())


def test_a_link_is_followed(here: Path) -> None:
    """What a link points to is replaced, not the link."""
    ledger(message())
    (here / "real.csv").write_text("old")
    (here / "usage.csv").symlink_to("real.csv")

    assert spryng("-o", "usage.csv", "--force").exit_code == 0
    assert (here / "usage.csv").is_symlink()
    assert len(read_csv((here / "real.csv").read_bytes())) == 1


def test_without_pyarrow(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pip line is shown, and no file is made."""
    ledger(message())
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    result = spryng("-o", "usage.parquet")

    assert result.exit_code == 2
    assert "Parquet needs the extra [parquet]: pip install 'spryng-instrument[parquet]'" in result.stderr
    assert not list(here.glob("*usage.parquet*"))


# --- a ledger that goes on --------------------------------------------------------------------------------------------


class Meanwhile:
    """A ledger that gets messages while it is read: some after each page, and some after each total.

    Args:
        marks: whether it can tell what was there at a moment.
    """

    def __init__(
        self, store: SqliteStore, after_page: Sequence[Message], after_total: Sequence[Message], *, marks: bool = False
    ) -> None:
        self._store, self._after_page, self._after_total = store, list(after_page), list(after_total)
        self._marks = marks

    def mark(self) -> str | None:
        return self._store.mark() if self._marks else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def arrivals(self, *args: Any, **kwargs: Any) -> Page:
        page = self._store.arrivals(*args, **kwargs)
        if self._after_page:
            self._store.record([self._after_page.pop()])
        return page

    def total(self, *args: Any) -> Any:
        if self._after_total:
            self._store.record([self._after_total.pop()])
        return self._store.total(*args)


def costly(hours: int) -> Message:
    """A message that has a price, hours from the others."""
    usage = Usage(input_tokens=7)
    return message(timestamp=message().timestamp + timedelta(hours=hours), response_model="gpt", usage=usage)


@pytest.mark.parametrize("marks", [True, False])
def test_what_arrives_meanwhile(here: Path, marks: bool) -> None:
    """It is not in the file, where the ledger can tell; else it is there with its price, however late it is. The sums
    of the file are the ledger's."""
    store = ledger(costly(0))
    growing = Meanwhile(store, [costly(-99), costly(1)], [costly(-5)], marks=marks)

    with whole_file("usage.jsonl") as file:
        exported = export(growing, Filter(), writer_of("jsonl", file))

    assert exported.is_exact
    rows = read_jsonl(Path("usage.jsonl").read_bytes())
    assert len(rows) == (1 if marks else 4)
    assert all(row["cost_usd"] for row in rows)


def test_all_of_a_busy_ledger(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that was there is in the file, which ends, though messages come faster than they are written."""
    monkeypatch.setattr(exporting, "PAGE", 2)
    there = [costly(number) for number in range(5)]
    growing = Meanwhile(ledger(*there), [costly(-number) for number in range(1, 30)], [], marks=True)

    with whole_file("usage.jsonl") as file:
        exported = export(growing, Filter(), writer_of("jsonl", file))

    assert exported.is_exact
    assert [row["id"] for row in read_jsonl(Path("usage.jsonl").read_bytes())] == [each.id for each in there]


def test_what_never_ends_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where messages come faster than sums can be compared, it says how many are not in the file."""
    store = ledger(costly(0))
    growing = Meanwhile(store, [], [costly(number) for number in range(10)])
    monkeypatch.setattr("spryng_instrument.cli.exporting.ledger_of", lambda given: growing)

    result = spryng("-o", "usage.csv")

    assert result.exit_code == 0
    assert "1 message came while this was written" in result.stderr
    assert len(read_csv(Path("usage.csv").read_bytes())) == 3


def test_sums_that_differ_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the ledger's own sums are others, the exit code is 3."""
    store = ledger(costly(0))
    total = store.total()
    monkeypatch.setattr(SqliteStore, "total", lambda *_: replace(total, input_tokens=8, unpriced=0))

    result = spryng("-o", "usage.csv")

    assert result.exit_code == 3
    assert "The ledger has other sums" in result.stderr

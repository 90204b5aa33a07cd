"""How long questions take on a large ledger: by rollups, by a scan of the messages, and beside a bare indexed query.

    python -m tests.benchmarks.queries sqlite:////tmp/large.db 10000000
    python -m tests.benchmarks.queries postgresql 10000000  # or clickhouse: started for it

The ledger is filled first, if it is empty, by the engine itself: 30 days, 200 customers, 3 models, 5 sets of tags;
seven in ten messages are in conversations of six. The bare query counts one customer's messages of one day by index.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

from spryng_instrument.store import open_store
from spryng_instrument.store.base import GROUPS, Filter
from spryng_instrument.store.clickhouse import ClickHouseStore
from spryng_instrument.store.postgres import PostgresStore
from spryng_instrument.store.rows import micros
from spryng_instrument.store.sql import BUCKET_US, SqlStore
from spryng_instrument.store.sqlite import _ROLL_UP, SqliteStore, _transaction
from tests.clickhouse_server import clickhouse
from tests.servers import Postgres

START = datetime(2026, 10, 1, tzinfo=timezone.utc)
DAYS = 30
CHUNK = 500_000
COLUMNS = (
    "id, timestamp_us, streamed, tags, key, conversation_id, operation, status, request_model, response_model, host, "
    "latency_ms, writer, sequence, input_tokens, output_tokens, total_tokens, cached_tokens, reasoning_tokens, "
    "cost_pusd, price_version"
)


def values(tags: Callable[[str], str], text: Callable[[str], str], id: str, step_us: int) -> str:
    """The COLUMNS of message number i, in SQL; an engine's own words for an array of tags, a text and an id."""
    return f"""{id}, {micros(START)} + i * {step_us}, {{false}}, {tags("(i / 6) % 5")},
        {text("'customer-'")} || ((i / 6) % 200), CASE WHEN (i / 6) % 10 < 7 THEN 'conversation-' || (i / 6) END,
        'chat.completions', CASE WHEN i % 50 = 0 THEN 'error' ELSE 'ok' END, 'gpt-4o-mini',
        'model-' || ((i / 6) % 3), 'api.openai.com', 800.5, 'writer', i + 1,
        100 + i % 1000, i % 300, 100 + i % 1000 + i % 300, i % 64, 0, (100 + i % 1000) * 150000, 'benchmark 1'"""


def fill_sqlite(store: SqliteStore, count: int, step_us: int) -> None:
    tags = 'CASE {} WHEN 0 THEN \'["support","chat"]\' WHEN 1 THEN \'["search"]\' WHEN 2 THEN \'["chat"]\' '
    tags += "WHEN 3 THEN '[]' ELSE '[\"batch\",\"night\"]' END"
    id = "printf('%08x-%04x-7000-8000-%012x', i >> 16, i & 65535, i)"
    selected = values(tags.format, str, id, step_us).format(false=0)
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        with store._connect() as db, _transaction(db):
            db.execute(
                f"WITH RECURSIVE n(i) AS (SELECT {start} UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {stop}) "
                f"INSERT INTO messages ({COLUMNS}) SELECT {selected} FROM n"
            )
            facts, _ = store._message_facts(Filter())
            db.execute(_ROLL_UP.format(f"{facts} AND m.arrival > ?"), [start])


def fill_postgres(store: PostgresStore, count: int, step_us: int) -> None:
    tags = "CASE {} WHEN 0 THEN '{{support,chat}}'::text[] WHEN 1 THEN '{{search}}' WHEN 2 THEN '{{chat}}' "
    tags += "WHEN 3 THEN '{{}}' ELSE '{{batch,night}}' END"
    id = "lpad(to_hex(i >> 16), 8, '0') || '-' || lpad(to_hex(i & 65535), 4, '0') || "
    id += "'-7000-8000-' || lpad(i::text, 12, '0')"
    selected = values(tags.format, str, id, step_us).replace("{false}", "false")
    stop_us = micros(START) + count * step_us
    for start in range(0, count, CHUNK):
        with store._connections.transaction(time.monotonic() + 600) as db:
            stop = min(start + CHUNK, count) - 1
            db.run(
                f"INSERT INTO messages ({COLUMNS}) SELECT {selected} FROM generate_series({start}::bigint, {stop}) i"
            )
    with store._connections.transaction(time.monotonic() + 600) as db:
        db.run(f"INSERT INTO dirty SELECT generate_series({micros(START)}, {stop_us}, {BUCKET_US})")
    seconds, _ = timed(lambda: all(iter(store.roll_up, 0)))
    print(f"rolled up in {seconds:.0f} s")
    with store._connections.transaction(time.monotonic() + 600) as db:
        db.run("ANALYZE")


def fill_clickhouse(store: ClickHouseStore, count: int, step_us: int) -> None:
    tags = (
        "multiIf({0} = 0, ['support', 'chat'], {0} = 1, ['search'], {0} = 2, ['chat'], {0} = 3, [], ['batch', 'night'])"
    )
    id = "concat('0199', lower(hex(toUInt16(intDiv(i, 65536)))), '-', lower(hex(toUInt16(i % 65536))), '-7000-8000-', "
    id += "leftPad(toString(i), 12, '0'))"
    selected = values(tags.format, str, id, step_us).replace("{false}", "false")
    selected = selected.replace("(i / 6)", "intDiv(i, 6)").replace(
        "|| (intDiv(i, 6) % 200)", "|| toString(intDiv(i, 6) % 200)"
    )
    selected = selected.replace("|| intDiv(i, 6) END", "|| toString(intDiv(i, 6)) END")
    selected = selected.replace("|| (intDiv(i, 6) % 3)", "|| toString(intDiv(i, 6) % 3)")
    for start in range(0, count, CHUNK):
        numbers = f"(SELECT toInt64(number) AS i FROM numbers({start}, {min(CHUNK, count - start)}))"
        with store._asking(600) as (client, _):
            client.command(f"INSERT INTO messages ({COLUMNS}) SELECT {selected} FROM {numbers}")


FILL: dict[str, Callable[[Any, int, int], None]] = {
    "SqliteStore": fill_sqlite,
    "PostgresStore": fill_postgres,
    "ClickHouseStore": fill_clickhouse,
}


@contextmanager
def scanning(store: SqlStore) -> Iterator[None]:
    """Without rollups."""
    store._facts = lambda ask, where: store._message_facts(where)
    try:
        yield
    finally:
        del store._facts


def timed(question: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    answer = question()
    return time.perf_counter() - started, answer


@contextmanager
def opened(what: str) -> Iterator[str]:
    """A URL, or that of an engine which is started for the occasion."""
    if what == "postgresql":
        with Postgres() as server, server.ledger() as url:
            yield url
    elif what == "clickhouse":
        with clickhouse().database() as url:
            yield url
    else:
        yield what


def main(url: str, count: int) -> None:
    store = open_store(url)
    assert isinstance(store, SqlStore)
    if not store.messages(limit=1).rows:
        seconds, _ = timed(lambda: FILL[type(store).__name__](store, count, DAYS * 86_400_000_000 // count))
        print(f"filled with {count:,} messages in {seconds:.0f} s")
    day = Filter(key="customer-7", since=START + timedelta(days=14), until=START + timedelta(days=15))

    def bare() -> Any:
        with store._reading() as ask:
            conditions, given = store._conditions(day)
            return ask(f"SELECT count(*) FROM {store.source} WHERE {conditions}", given)

    base = min(timed(bare)[0] for _ in range(5))
    print(f"{type(store).__name__}: one customer's day, counted by index: {base * 1e3:.1f} ms")
    week = Filter(since=START + timedelta(days=21))
    questions: dict[str, Callable[[], Any]] = {
        f"usage by {by}": lambda by=by: store.usage(by) for by in GROUPS if by != "month"
    }
    questions["total"] = store.total
    questions["last 9 days by key"] = lambda: store.usage("key", week)
    questions["one customer by day"] = lambda: store.usage("day", Filter(key="customer-7"))
    questions["one customer by model"] = lambda: store.usage("model", Filter(key="customer-7"))
    questions["a page of conversations"] = lambda: store.conversations(Filter(key="customer-7"), limit=50)
    rolled = type(store)._facts is not SqlStore._facts
    for name, question in questions.items():
        seconds, answer = timed(question)
        line = f"{name:<26} {seconds:8.2f} s  {seconds / base:8.0f} x"
        if rolled:
            with scanning(store):
                scan, same = timed(question)
            assert answer == same, name
            line += f"   scan {scan:8.2f} s  {scan / base:8.0f} x"
        print(line, flush=True)


if __name__ == "__main__":
    with opened(sys.argv[1]) as url:
        main(url, int(sys.argv[2]))

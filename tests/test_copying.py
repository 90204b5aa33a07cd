"""A ledger that was copied is the same ledger, however often the copy was cut off."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spryng_instrument.cli.commands import commands
from spryng_instrument.copying import BATCH, copy
from spryng_instrument.errors import StoreError
from spryng_instrument.message import Message, Usage
from spryng_instrument.store.base import START, ApiKey, Cost, Receipt, Record
from spryng_instrument.store.sqlite import SqliteStore

from .messages import NOON, message


@pytest.fixture
def source(tmp_path: Path) -> SqliteStore:
    """Messages of two months and a half batch more than one, some with costs, and a key."""
    store = SqliteStore(tmp_path / "source.db")
    messages = [
        message(key=f"k{number % 7}", tags=("a",), usage=Usage(input_tokens=number), writer="w", sequence=number + 1,
                timestamp=NOON.replace(month=3 + number % 2))
        for number in range(BATCH + BATCH // 2)
    ]  # fmt: skip
    store.record(messages)
    store.set_costs([Cost(each.id, Decimal("0.25"), "v1") for each in messages[::2]])
    store.set_costs([Cost(each.id, None, "v1") for each in messages[1::4]])
    store.keep_api_key(ApiKey("1", "app", "d", ("ingest",), NOON))
    void = Record("void:1", "void", NOON, {"reason": "r"}, "k1", messages[0].id)
    store.append([void, Record("n", "note", NOON, {})])
    return store


def everything(store: SqliteStore) -> list[Any]:
    return [
        store.arrivals(START, limit=10**6).rows,
        store.api_keys(),
        store.records(),
        store.health(),
        store.usage_and_total("key"),
    ]


def test_copied_whole(source: SqliteStore, tmp_path: Path) -> None:
    """Messages, their order, costs, price versions, documents, keys and gaps are the same; again, nothing is new."""
    target = SqliteStore(tmp_path / "target.db")
    seen: list[int] = []
    copied = copy(source, target, seen.append)
    assert (copied.new, copied.there, copied.conflicts, copied.differences) == (1500, 0, [], [])
    assert sum(seen) == 1500
    assert everything(target) == everything(source)
    again = copy(source, target)
    assert (again.new, again.there, again.differences) == (0, 1500, [])


class Failing(SqliteStore):
    """A ledger that fails at its second batch."""

    batches = 0

    def record(self, messages: Sequence[Message], *, timeout_s: float = 5.0) -> Receipt:
        self.batches += 1
        if self.batches == 2:
            raise StoreError("gone")
        return super().record(messages, timeout_s=timeout_s)


def test_cut_off_and_begun_again(source: SqliteStore, tmp_path: Path) -> None:
    """A copy that fails in the middle goes on where it was."""
    with pytest.raises(StoreError):
        copy(source, Failing(tmp_path / "target.db"))
    target = SqliteStore(tmp_path / "target.db")
    copied = copy(source, target)
    assert (copied.new, copied.there) == (500, 1000)
    assert everything(target) == everything(source)


def test_merged_with_others(source: SqliteStore, tmp_path: Path) -> None:
    """A target that has messages of its own keeps them, and each of the source's is looked for by its id."""
    target = SqliteStore(tmp_path / "target.db")
    target.record([message(key="own")])
    copied = copy(source, target)
    assert (copied.new, copied.differences) == (1500, [])
    assert target.health().messages == 1501


def test_differences_are_named(source: SqliteStore, tmp_path: Path) -> None:
    """Another message under the same id is kept, and said; so is a cost that differs."""
    target = SqliteStore(tmp_path / "target.db")
    [first, second] = [row.message for row in source.arrivals(START, limit=2).rows]
    target.record([message(id=first.id, key="another"), second])
    copied = copy(source, target)
    assert copied.conflicts == [first.id]
    assert any("in all" in line for line in copied.differences)


def test_command(source: SqliteStore, tmp_path: Path) -> None:
    """`spryng copy` says what it did; it exits with 3 where the ledgers differ, and with 1 where there is no source."""
    urls = [f"sqlite:///{source.path}", f"sqlite:///{tmp_path}/target.db"]
    result = CliRunner().invoke(commands, ["copy", *urls])
    assert result.exit_code == 0, result.output
    assert "1,500 messages copied, 0 were there already." in result.stderr
    assert "Compared: the target has all that the source has." in result.stderr
    other = SqliteStore(tmp_path / "other.db")
    [first] = [row.message for row in source.arrivals(START, limit=1).rows]
    other.record([message(id=first.id)])
    result = CliRunner().invoke(commands, ["copy", urls[0], f"sqlite:///{tmp_path}/other.db"])
    assert result.exit_code == 3
    assert f"Conflict: the target has another message {first.id}" in result.stderr
    result = CliRunner().invoke(commands, ["copy", f"sqlite:///{tmp_path}/none.db", urls[1]])
    assert (result.exit_code, "there is no ledger" in result.stderr) == (1, True)

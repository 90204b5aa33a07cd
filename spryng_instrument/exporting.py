"""Writes messages to a file: CSV, JSON Lines or Parquet, each message once, in the order in which the ledger got them.

Invariant: a file under its name is a whole one. It is written beside it, synced and only then renamed; and what was
written is summed up and compared with the ledger's own sums, to the last trillionth of a dollar.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timezone, tzinfo
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec

from spryng_instrument.errors import MissingExtraError
from spryng_instrument.message import BILLABLE, Message, Usage
from spryng_instrument.prices import rate
from spryng_instrument.reports import decimal_text, message_record
from spryng_instrument.store.base import START, Filter, Store, StoredMessage, UsageRow
from spryng_instrument.store.rows import pusd, usd
from spryng_instrument.tables import write_csv

FORMATS = ("csv", "jsonl", "parquet")
PAGE = 10_000
"""Messages in memory at a time."""
ROW_GROUP = 100_000
"""Rows that Parquet keeps together; until there are so many, they wait in memory, packed."""
TRIES = 3
"""How often what arrived meanwhile is fetched before sums are compared."""
PLAIN = tuple(name for name in (*Message.__struct_fields__, "cost_usd", "price_version") if name != "usage")
COUNTS = Usage.__struct_fields__
COLUMNS = (*PLAIN, *COUNTS)
"""Of CSV and Parquet: a message's fields, its cost, and a column for each count of its usage."""
_JSON = ("properties", "tool_usage")
_TIMESTAMP, _TAGS, _COST = (COLUMNS.index(name) for name in ("timestamp", "tags", "cost_usd"))
_JSONS = tuple(COLUMNS.index(name) for name in _JSON)
_NO_COUNTS = (None,) * len(COUNTS)
_fields_of = attrgetter(*PLAIN[:-2])
_counts_of = attrgetter(*COUNTS)
_TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")


class Writer(Protocol):
    """Writes messages in one format."""

    def write(self, rows: Sequence[StoredMessage]) -> None:
        """Write these after those before."""
        ...

    def close(self) -> None:
        """Write what is left. The file stays open."""
        ...


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and what the ledger had in the end."""

    written: UsageRow
    """Summed up from what was written. Conversations are not counted."""
    ledger: UsageRow
    """The ledger's own sums for the same filter."""

    @property
    def is_exact(self) -> bool:
        """Whether all of the ledger was written, and nothing else."""
        return self.written == self.ledger

    @property
    def arrived(self) -> int:
        """Messages that the ledger got after the last that was written."""
        return rows_of(self.ledger) - rows_of(self.written)


def rows_of(usage: UsageRow) -> int:
    """Every message of a row, those that are not to bill too."""
    return usage.messages + usage.errors + usage.cancelled


def writer_of(form: str, file: BinaryIO, zone: tzinfo = timezone.utc) -> Writer:
    """What writes *form*, one of FORMATS, into a file. Times are those of *zone*, but for Parquet: they are UTC there.

    Raises:
        MissingExtraError: Parquet needs pyarrow.
    """
    if form == "parquet":
        return _Parquet(file)
    return _Csv(file, zone) if form == "csv" else _JsonLines(file, zone)


def export(
    store: Store, where: Filter, writer: Writer, progress: Callable[[int], object] = lambda count: None
) -> Exported:
    """Write every message of *where* that is there by now, and compare.

    What is recorded meanwhile is left out. Where the engine cannot tell, as ClickHouse, it may be in the file, too.

    Args:
        progress: told how many more messages were written.

    Raises:
        StoreError: the ledger cannot be read.
    """
    sums = _Sums()
    can_price = rate(store).reason is None
    where = replace(where, mark=store.mark())
    after = START
    for _ in range(TRIES):
        while (page := store.arrivals(after, where, limit=PAGE)).rows:
            if can_price and any(row.price_version is None and row.message.usage for row in page.rows):
                can_price = rate(store).reason is None  # they came after the others were priced
                page = store.arrivals(after, where, limit=PAGE)
            writer.write(page.rows)
            sums.add(page.rows)
            progress(len(page.rows))
            after = str(page.next)
            if len(page.rows) < PAGE:  # or it ran after those that come meanwhile
                break
        exported = Exported(sums.row(), replace(store.total(where), conversations=0))
        if exported.is_exact:
            break
    writer.close()
    return exported


@contextmanager
def whole_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file to be written, which takes its name only once all of it is on the disk. Cut off, it leaves nothing there.

    Args:
        overwrite: whether a file of this name may be there already.

    Raises:
        OSError: it cannot be written, or is there.
    """
    target = Path(os.path.realpath(path))
    _check(target, overwrite)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check(target, overwrite)
        os.replace(part, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _check(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_file():
        raise OSError(errno.EINVAL, "not a file that could be replaced by another", str(target))
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "there already", str(target))


def cells_of(row: StoredMessage, zone: tzinfo = timezone.utc) -> list[Any]:
    """The values of COLUMNS as CSV has them: plain digits, and JSON for tags and properties."""
    cells = _values(row)
    cells[_TIMESTAMP] = row.message.timestamp.astimezone(zone).isoformat()
    cells[_COST] = decimal_text(row.cost_usd)
    for index in (_TAGS, *_JSONS):
        cells[index] = _json(cells[index])
    return cells


def _values(row: StoredMessage) -> list[Any]:
    usage = row.message.usage
    counts = _NO_COUNTS if usage is None else _counts_of(usage)
    return [*_fields_of(row.message), row.cost_usd, row.price_version, *counts]


def _json(value: Any) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


class _Csv:
    def __init__(self, file: BinaryIO, zone: tzinfo) -> None:
        self._file, self._zone = file, zone
        self._head: Sequence[Sequence[str]] = [COLUMNS]  # comes with the first messages, not before they can be read

    def write(self, rows: Sequence[StoredMessage]) -> None:
        text = io.StringIO(newline="")
        write_csv(text, [*self._head, *(cells_of(row, self._zone) for row in rows)])
        self._file.write(text.getvalue().encode("utf-8", "backslashreplace"))
        self._head = ()

    def close(self) -> None:
        self.write(())
        self._file.flush()


class _JsonLines:
    def __init__(self, file: BinaryIO, zone: tzinfo) -> None:
        self._file, self._zone = file, zone

    def write(self, rows: Sequence[StoredMessage]) -> None:
        self._file.write(msgspec.json.Encoder().encode_lines([message_record(row, self._zone) for row in rows]))

    def close(self) -> None:
        self._file.flush()


class _Parquet:
    def __init__(self, file: BinaryIO) -> None:
        try:
            self._arrow: Any = import_module("pyarrow")
            parquet = import_module("pyarrow.parquet")
        except ModuleNotFoundError as exc:
            if exc.name is None or exc.name.split(".")[0] != "pyarrow":
                raise  # it is there, but broken: show its own error
            raise MissingExtraError("parquet", "Parquet") from exc
        arrow = self._arrow
        count, text, real = arrow.int64(), arrow.string(), arrow.float64()
        types = {
            "timestamp": arrow.timestamp("us", tz="UTC"),
            "tags": arrow.list_(text),
            "streamed": arrow.bool_(),
            "cost_usd": arrow.decimal128(38, 12),
            **dict.fromkeys(("latency_ms", "time_to_first_token_ms", "seconds"), real),
            **dict.fromkeys(("retries", "http_status", "sequence"), count),
        }
        self._schema = arrow.schema([(name, types.get(name, count if name in COUNTS else text)) for name in COLUMNS])
        self._writer = parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._waiting: list[Any] = []

    def write(self, rows: Sequence[StoredMessage]) -> None:
        columns: list[Sequence[Any]] = list(zip(*map(_values, rows), strict=True))
        for index in _JSONS:
            columns[index] = [_json(value) for value in columns[index]]
        arrays = [
            self._arrow.array(values, type=field.type) for values, field in zip(columns, self._schema, strict=True)
        ]
        self._waiting.append(self._arrow.RecordBatch.from_arrays(arrays, schema=self._schema))
        if sum(batch.num_rows for batch in self._waiting) >= ROW_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        self._writer.write_table(self._arrow.Table.from_batches(self._waiting, self._schema), row_group_size=ROW_GROUP)
        self._waiting = []

    def close(self) -> None:
        self._write_group()
        self._writer.close()


class _Sums:
    """Adds up messages as a store does."""

    def __init__(self) -> None:
        self._counts: dict[str, Any] = dict.fromkeys(
            ("messages", "errors", "cancelled", "unreported", "unpriced", *_TOKENS), 0
        )
        self._pusd = 0
        self._has_cost = False

    def add(self, rows: Sequence[StoredMessage]) -> None:
        counts = self._counts
        for row in rows:
            status, usage = row.message.status, row.message.usage
            counts["messages"] += status in BILLABLE
            counts["errors"] += status == "error"
            counts["cancelled"] += status == "cancelled"
            counts["unreported"] += status in BILLABLE and usage is None
            counts["unpriced"] += usage is not None and row.cost_usd is None
            for name in _TOKENS:
                counts[name] += getattr(usage, name, None) or 0
            if row.cost_usd is not None:
                self._has_cost = True
                self._pusd += pusd(row.cost_usd) or 0

    def row(self) -> UsageRow:
        cost = usd(self._pusd) if self._has_cost else None
        return UsageRow(None, cost_usd=cost, **self._counts)

"""A pytest plugin: the fixture `usage_messages`, with what the code under test used.

    def test_the_summary_is_billed(usage_messages):
        summarise("acme", text)
        assert usage_messages.one().key == "acme"
        usage_messages.assert_all_attributed()

Installed with the package; nothing is loaded or changed for tests that do not ask for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from spryng_instrument.message import Message, Usage


class UsageMessages(Sequence["Message"]):
    """The messages that were recorded so far, oldest first; looked up anew each time it is asked."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        return self._read()[index]

    def __len__(self) -> int:
        return len(self._read())

    def __iter__(self) -> Iterator[Message]:
        return iter(self._read())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._read()!r})"

    def one(self) -> Message:
        """The only message; an AssertionError that shows all, if there are none or several."""
        found = self._read()
        assert len(found) == 1, f"one message was expected, {len(found)} were recorded:\n{_listed(found)}"
        return found[0]

    def of(self, key: str | None) -> list[Message]:
        """The messages of one customer; None: those without a key."""
        return [message for message in self._read() if message.key == key]

    @property
    def keys(self) -> set[str | None]:
        """Whose they are; None is among them if one has no key."""
        return {message.key for message in self._read()}

    def tokens(self, key: str | None = None) -> Usage:
        """All counts added up, of one customer or of all. A count that no message reported stays None."""
        from spryng_instrument.message import Usage

        usages = [message.usage for message in self._read() if key is None or message.key == key]
        sums: dict[str, Any] = {}
        for name in Usage.__struct_fields__:
            counts = [getattr(usage, name) for usage in usages if usage is not None]
            sums[name] = sum(given) if (given := [count for count in counts if count is not None]) else None
        return Usage(**sums)

    def assert_all_attributed(self) -> None:
        """Every call was made for a customer; else an AssertionError that names the lines of those that were not."""
        sites = sorted({message.call_site or message.operation for message in self.of(None)})
        assert not sites, "calls without a customer's key, at:\n" + "\n".join(f"  {site}" for site in sites)

    def _read(self) -> list[Message]:
        import spryng_instrument
        from spryng_instrument.store.sqlite import SqliteStore

        assert spryng_instrument.flush(), f"not all could be delivered: {spryng_instrument.stats()}"
        if not self._path.exists():
            return []
        page = SqliteStore(self._path, create=False).arrivals("0", limit=1_000_000)
        return sorted((row.message for row in page.rows), key=lambda message: message.timestamp)


def _listed(messages: list[Message]) -> str:
    return "\n".join(f"  {message}" for message in messages) or "  (none)"


@pytest.fixture
def usage_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UsageMessages]:
    """What the code under test uses of the OpenAI SDK. instrument() is called for it, with a ledger of its own.

    Streams of servers on this machine are asked for their usage too. If the application had called instrument(),
    its own settings are back after the test, and none of the test's messages is in its ledger.
    """
    from dataclasses import asdict

    import spryng_instrument
    from spryng_instrument import recorder

    before = recorder.active.settings if recorder.active is not None else None
    spryng_instrument.uninstrument()
    monkeypatch.delenv("SPRYNG_DEFAULT_KEY", raising=False)  # or every call would seem to be attributed
    path = tmp_path / "spryng" / "usage.db"
    spryng_instrument.instrument(
        destination=f"sqlite:///{path}",
        journal=tmp_path / "spryng" / "journal",
        on_missing_key="ignore",
        include_usage_hosts=["127.0.0.1", "localhost", *(before.include_usage_hosts if before else ())],
        threads=before is not None and before.threads,
    )
    try:
        yield UsageMessages(path)
    finally:
        spryng_instrument.uninstrument()
        if before is not None:
            spryng_instrument.instrument(**asdict(before))

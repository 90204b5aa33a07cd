"""What the tests share: a ledger of their own, the practice server, and the promise that the SDK is left as it was."""

from __future__ import annotations

import gc
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import openai
import openai._base_client as base
import pytest

import spryng_instrument
from spryng_instrument import checks, context, patch, recorder
from spryng_instrument.message import Message
from spryng_instrument.store.sqlite import SqliteStore
from spryng_instrument.testing import PracticeServer

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile(
    "ours", hypothesis.settings(), deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("ours")

recorder.strict = True  # a bug of ours fails the test it happens in

for module in pkgutil.walk_packages(spryng_instrument.__path__, "spryng_instrument."):
    # Now, not in the middle of a test: what is first imported then keeps for ever what that test has patched.
    if not module.name.endswith("__main__"):
        with suppress(ModuleNotFoundError):  # an extra that this environment has not
            importlib.import_module(module.name)

PRISTINE = [(seam, dict(vars(seam))) for seam in (base.SyncAPIClient, base.AsyncAPIClient)]


def pytest_collection_finish() -> None:
    """All that is loaded stays: no collection between tests looks at it again."""
    gc.collect()
    gc.freeze()


class Ledger:
    """A ledger in a folder of its own, and what is in it once all is delivered."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "usage.db"
        self.url = f"sqlite:///{self.path}"
        self.journal = folder / "usage.db.journal"

    @property
    def store(self) -> SqliteStore:
        return SqliteStore(self.path, create=False)

    def messages(self) -> list[Message]:
        """Every message, oldest first."""
        assert spryng_instrument.flush(60), spryng_instrument.stats()
        if not self.path.exists():
            return []
        return [row.message for row in self.store.messages(limit=1_000_000).rows][::-1]

    def message(self) -> Message:
        """The one message."""
        [message] = self.messages()
        return message


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


@pytest.fixture
def instrument(ledger: Ledger) -> Callable[..., Ledger]:
    """instrument() with the test's own ledger, asking the practice server for the usage of streams."""

    def begin(**settings: Any) -> Ledger:
        spryng_instrument.instrument(
            **{"destination": ledger.url, "include_usage_hosts": ["127.0.0.1"], "on_missing_key": "ignore", **settings}
        )
        return ledger

    return begin


@pytest.fixture(autouse=True)
def _pristine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However a test ends, nothing is instrumented after it, and the SDK's classes are what they were."""
    for name in ("DESTINATION", "JOURNAL", "DEFAULT_KEY", "ON_MISSING_KEY", "BUDGETS", "ON_BUDGET", "WEBHOOK_SECRET"):
        monkeypatch.delenv(f"SPRYNG_{name}", raising=False)
    checks._said.clear()
    patch._refusing.clear()
    yield
    spryng_instrument.uninstrument()
    for seam, attributes in PRISTINE:
        assert dict(vars(seam)) == attributes
    assert context.current_scope() is None


@pytest.fixture(autouse=True)
def _collected(request: pytest.FixtureRequest) -> Iterator[None]:
    """Collect garbage between tests, not within them.

    A stream that a test drops keeps its connection until it is collected. If that happens while httpcore holds its
    pool's lock, on the same thread, the SDK waits for itself for ever.
    """
    gc.disable()
    yield
    gc.enable()
    gc.collect(2 if hash(request.node.nodeid) % 16 == 0 else 1)


@pytest.fixture(scope="session")
def practice() -> Iterator[PracticeServer]:
    with PracticeServer() as server:
        yield server


@pytest.fixture
def client(practice: PracticeServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=practice.base_url, api_key="practice", max_retries=0) as client:
        yield client

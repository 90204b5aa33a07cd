"""The ratchet: nothing that the installed SDK can do, and that carries usage, is overlooked."""

from __future__ import annotations

import pytest

from spryng_instrument import surface
from spryng_instrument.endpoints import ENDPOINTS, NOT_COUNTED, endpoint_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_every_operation_that_carries_usage_is_known() -> None:
    """Each is counted, or left out with a reason."""
    assert surface.uncounted() == []


def test_it_sees_operations() -> None:
    """The walk finds what is there in every SDK, so that it cannot pass by finding nothing."""
    found = {operation.name for operation in surface.operations()}
    assert {"POST /chat/completions", "POST /completions", "POST /embeddings"} <= found


def test_it_notices_a_new_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that carries usage, and that no row knows, is named with the method that makes it."""
    monkeypatch.setattr(surface, "endpoint_of", lambda method, path: "moderat" in path or None)
    [embeddings] = [each for each in surface.uncounted() if each.name == "POST /embeddings"]
    assert embeddings.method.endswith("Embeddings.create")


@pytest.mark.parametrize(
    ("version", "walked"), [("1.3.0", True), ("2.99.9", True), ("3.57.4", True), ("3.58.0", False), ("4.0.0b1", False)]
)
def test_older_ones_are_walked(monkeypatch: pytest.MonkeyPatch, version: str, walked: bool) -> None:
    """Only an SDK that is newer than those of these tests may have what is unknown."""
    monkeypatch.setattr(surface, "WALKED", (3, 57))
    assert surface.is_walked(version) is walked


def test_nothing_is_counted_and_left_out() -> None:
    """No operation is in both lists, and none of those left out is counted by another's row."""
    assert not ENDPOINTS.keys() & NOT_COUNTED.keys()
    for name in NOT_COUNTED:
        method, _, path = name.partition(" ")
        assert endpoint_of(method, path.replace("{}", "x")) is None

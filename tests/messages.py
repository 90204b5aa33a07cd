"""Messages for the tests of stores and of the API: one at hand, and anything that a message can be."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import strategies as st

from spryng_instrument.message import Message, Usage, new_id

needs_prices = pytest.mark.skipif(sys.version_info < (3, 11), reason="genai-prices needs Python 3.11")
"""Of a test that reads public prices. Where they could be there and are not, it fails."""
NOON = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
ZONES = ("UTC", "Asia/Kolkata", "Pacific/Chatham", "America/Sao_Paulo", "Europe/Berlin", "America/New_York")
# Clocks change: Sao Paulo skips midnight (2018-11-04) and repeats 23:00 (2018-02-17); Chatham, New York and Berlin.
CHANGES = [
    datetime(2018, 11, 4, 3, tzinfo=timezone.utc),
    datetime(2018, 2, 18, 2, tzinfo=timezone.utc),
    datetime(2026, 4, 4, 14, tzinfo=timezone.utc),
    datetime(2026, 9, 26, 14, tzinfo=timezone.utc),
    datetime(2026, 3, 8, 7, tzinfo=timezone.utc),
    datetime(2026, 11, 1, 6, tzinfo=timezone.utc),
    datetime(2026, 10, 25, 1, tzinfo=timezone.utc),
    datetime(2026, 12, 31, 23, 59, 59, 999_999, tzinfo=timezone.utc),
]

text = st.text(st.characters(codec=None), max_size=12)  # lone surrogates and NUL, too
counts = st.one_of(st.none(), st.just(0), st.integers(0, 10**12))
usages = st.builds(Usage, **dict.fromkeys(Usage.__struct_fields__, counts))
scalars = st.one_of(text, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False))
moments = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(timezone.utc))  # noqa: DTZ001
numbers = st.one_of(st.none(), st.floats(0, 1e12))
anything = st.builds(
    Message,
    id=st.uuids().map(str),
    timestamp=moments,
    operation=text,
    status=st.sampled_from(["ok", "error", "incomplete", "cancelled"]),
    tags=st.lists(text, max_size=4).map(tuple),
    properties=st.one_of(st.none(), st.dictionaries(text, scalars, max_size=3)),
    streamed=st.booleans(),
    retries=counts,
    http_status=counts,
    latency_ms=numbers,
    time_to_first_token_ms=numbers,
    usage=st.one_of(st.none(), usages),
    sequence=counts,
    **dict.fromkeys(
        [
            "key",
            "conversation_id",
            "query",
            "request_model",
            "response_model",
            "response_id",
            "request_id",
            "service_tier",
            "host",
            "error",
            "call_site",
            "writer",
        ],
        st.one_of(st.none(), text),
    ),
)
"""Any message at all."""


def message(**fields: Any) -> Message:
    """A message at noon that says nothing but what is given."""
    return Message(**{"id": new_id(), "timestamp": NOON, "operation": "custom", **fields})

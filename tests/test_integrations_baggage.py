"""W3C Baggage: a customer travels from one service into the next, and to nobody that was not named."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from spryng_instrument import usage_context
from spryng_instrument.context import current_scope
from spryng_instrument.integrations.baggage import MAX_BYTES, MAX_MEMBERS, from_baggage, inject, to_baggage

names = st.text(min_size=1, max_size=60).filter(lambda text: bool(text.strip()))


def seen(header: str | None) -> Any:
    """Key, conversation and tags that a header names."""
    context = from_baggage(header)
    if context is None:
        return None
    with context:
        scope = current_scope()
        assert scope is not None
        return scope.key, scope.conversation_id, scope.tags


@given(names, st.none() | names, st.lists(names, max_size=5, unique=True))
def test_what_is_sent_is_what_arrives(key: str, conversation_id: str | None, tags: list[str]) -> None:
    """Whatever a key, a conversation and tags hold, the next service reads the same, and headers stay ASCII."""
    with usage_context(key, conversation_id=conversation_id, tags=tags):
        header = to_baggage()
    assume(len(header) <= MAX_BYTES)
    assert re.fullmatch(r"[!-~]*", header)
    assert seen(header) == (key, conversation_id, tuple(tags))


@given(st.text(max_size=400))
def test_no_header_raises(header: str) -> None:
    """Whatever a header holds, reading and adding to it raise nothing."""
    seen(header)
    seen(f"spryng.key={header}")
    with usage_context("acme"):
        assert seen(to_baggage(header)) == ("acme", None, ())


def test_the_example_of_another_implementation() -> None:
    """What OpenTelemetry's baggage sends for a plain value is read, and so are spaces, properties and other members."""
    header = "userId=alice , spryng.key = Acme%20%26%20S%C3%B6hne;ttl=3,isProduction=false,spryng.tags=a%2Cb"
    assert seen(header) == ("Acme & Söhne", None, ("a", "b"))


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        ",,;=,",
        "spryng.key",
        "spryng.key=",
        "spryng.key=%20",
        'spryng.key="acme"',
        "spryng.key=a b",
        "spryng.key=a\\b",
        "spryng.key=%ff",
        "spryng.key=söhne",
        "Spryng.Key=acme",
        "other=acme",
    ],
    ids=repr,
)
def test_malformed_members_are_skipped(header: str | None) -> None:
    """A member that the specification does not allow, or that is not ours, names nobody; its neighbours still do."""
    assert seen(header) is None
    assert seen(f"{header or ''},spryng.conversation_id=c1") == (None, "c1", ())


def test_no_more_is_read_than_the_specification_allows() -> None:
    """64 members and 8192 bytes are read; a member that is cut there is none."""
    filler = [f"m{number}=1" for number in range(MAX_MEMBERS - 1)]
    assert seen(",".join([*filler, "spryng.key=acme"])) == ("acme", None, ())
    assert seen(",".join([*filler, "m=1", "spryng.key=acme"])) is None
    ours = "spryng.key=acme"
    long = "m=" + "x" * (MAX_BYTES - len(ours) - 3)
    assert seen(f"{long},{ours}") == ("acme", None, ())
    assert seen(f"{long}x,{ours}") is None
    assert seen(f"{ours},{long}{long}") == ("acme", None, ())


def test_others_members_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    """Members of others stay as they were; ours are the current scope's, never those of an earlier sender."""
    existing = "userId=alice;ttl=3 ,  spryng.key=eve, spryng.tags=x,isProduction=false"
    assert to_baggage(existing) == "userId=alice;ttl=3,isProduction=false"
    with usage_context("acme", tags=["a,b", "c"]):
        header = to_baggage(existing)
    assert header == "userId=alice;ttl=3,isProduction=false,spryng.key=acme,spryng.tags=a%252Cb%2Cc"
    assert seen(header) == ("acme", None, ("a,b", "c"))

    full = ",".join(f"m{number}=1" for number in range(MAX_MEMBERS - 1))
    with usage_context("acme", conversation_id="c1"):
        assert to_baggage(full) == f"{full},spryng.key=acme"
    [record] = caplog.records
    assert "full: a request goes on without its spryng.conversation_id" in record.message


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://search.internal/find", True),
        ("https://SEARCH.internal:8443/find", True),
        ("https://user:search.internal@other.internal/", False),
        ("http://ledger.internal:9000/", True),
        ("http://ledger.internal/", False),
        ("https://api.openai.com/v1/responses", False),
        ("https://acme.openai.azure.com/openai", False),
        ("https://api.anthropic.com/v1/messages", False),
        ("https://search.internal.evil.example/", False),
        ("/relative", False),
    ],
)
def test_only_named_hosts_learn_the_customer(url: str, sent: bool) -> None:
    """inject() writes for the hosts that were named, and leaves the headers of every other request alone."""
    headers = {"Baggage": "userId=alice"}
    with usage_context("acme"):
        inject(headers, url, hosts={"search.internal", "ledger.internal:9000"})
    assert headers == {"Baggage": "userId=alice,spryng.key=acme" if sent else "userId=alice"}


def test_no_scope_no_header() -> None:
    """Outside any context no header is added, and one that holds nothing but ours is taken out."""
    headers: dict[str, str] = {}
    inject(headers, "http://a/", hosts=["a"])
    assert headers == {}
    headers = {"baggage": f"spryng.key={quote('eve')}"}
    inject(headers, "http://a/", hosts=["a"])
    assert headers == {}

"""Whose usage it is: contexts nest, reach every kind of function, and leak to nobody."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spryng_instrument import tracked, usage_context
from spryng_instrument.checks import MAX_KEY, clean_name
from spryng_instrument.context import current_scope


def key() -> str | None:
    scope = current_scope()
    return scope.key if scope else None


def test_inner_key_wins_and_tags_add_up() -> None:
    """The inner key, conversation and query win, tags and properties add up, and all is as before afterwards."""
    with usage_context("acme", conversation_id="c1", tags=["a"], query="q", properties={"x": 1}):
        with usage_context(tags=["b", "a"], properties={"y": 2}), usage_context("inner", conversation_id="c2"):
            scope = current_scope()
            assert scope is not None
            assert (scope.key, scope.conversation_id, scope.tags, scope.query) == ("inner", "c2", ("a", "b"), "q")
            assert scope.properties == {"x": 1, "y": 2}
        assert key() == "acme"
    assert current_scope() is None


async def test_async_with_and_tasks() -> None:
    """`async with` works, and a task belongs to the context it was made in, however long after."""
    async with usage_context("acme"):
        late = asyncio.create_task(asyncio.sleep(0.01, result=None))
        child = asyncio.create_task(_later())
    assert key() is None
    await late
    assert await child == "acme"


async def _later() -> str | None:
    await asyncio.sleep(0.005)
    return key()


def test_one_context_object_serves_threads_and_recursion() -> None:
    """The same object may be entered again, within itself and by many threads at once."""
    shared = usage_context("acme")
    seen: list[str | None] = []

    def work() -> None:
        for _ in range(50):
            with shared, shared:
                seen.append(key())
            seen.append(key())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen.count("acme") == seen.count(None) == 200


def test_left_in_another_context_never_raises() -> None:
    """A context that is left in another Context than it was entered in changes nothing there."""
    scope = usage_context("acme")
    contextvars.copy_context().run(scope.__enter__)
    with usage_context("other"):
        scope.__exit__(None, None, None)
        assert key() == "other"


async def test_a_task_outlives_the_context_it_was_made_in() -> None:
    """A task keeps its customer when its parent has left the context, also after a context of its own."""
    seen: list[str | None] = []

    async def child() -> None:
        await asyncio.sleep(0.01)
        seen.append(key())
        with usage_context(conversation_id="c"):
            seen.append(key())
        seen.append(key())

    with usage_context("acme"):
        task = asyncio.create_task(child())
    await task
    assert seen == ["acme"] * 3


async def test_a_tracked_generator_whose_own_is_closed_first() -> None:
    """Closing a tracked async generator never raises, even if the one within was closed by somebody else before."""

    async def steps() -> AsyncIterator[int]:
        yield 1
        yield 2

    inner = steps()
    outer = tracked("acme")(lambda: inner)()
    assert await outer.__anext__() == 1
    await inner.aclose()
    await outer.aclose()
    assert key() is None


@given(st.permutations([0, 1, 2]))
def test_left_in_any_order(order: list[int]) -> None:
    """Contexts that are left out of order leave nothing behind, and never bring back one that was left."""
    scopes = [usage_context(name) for name in "abc"]
    for scope in scopes:
        scope.__enter__()
    still = {0, 1, 2}
    for position in order:
        scopes[position].__exit__()
        still.discard(position)
        assert key() == ("abc"[max(still)] if still else None)


def test_tracked_follows_every_kind_of_function() -> None:
    """@tracked sets its context in functions, coroutines, generators and async generators, and keeps their kind."""

    @tracked("acme")
    def plain() -> str | None:
        return key()

    @tracked("acme")
    async def coroutine() -> str | None:
        await asyncio.sleep(0)
        return key()

    @tracked("acme")
    def generator() -> Iterator[str | None]:
        yield key()
        yield key()

    @tracked("acme")
    async def async_generator() -> AsyncIterator[str | None]:
        yield key()
        await asyncio.sleep(0)
        yield key()

    async def collect() -> list[str | None]:
        return [item async for item in async_generator()]

    assert plain() == "acme"
    assert asyncio.run(coroutine()) == "acme"
    assert list(generator()) == ["acme", "acme"]
    assert asyncio.run(collect()) == ["acme", "acme"]
    assert inspect.iscoroutinefunction(coroutine)
    assert inspect.isgeneratorfunction(generator)
    assert inspect.isasyncgenfunction(async_generator)
    assert plain.__name__ == "plain"
    assert key() is None


def test_tracked_generator_never_leaks(caplog: pytest.LogCaptureFixture) -> None:
    """Between two steps, after it is dropped, and while it is closed, the consumer's context is its own."""
    closed_in: list[str | None] = []

    @tracked("acme")
    def generator() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed_in.append(key())

    with usage_context("consumer"):
        steps = generator()
        next(steps)
        assert key() == "consumer"
        steps.close()
        assert key() == "consumer"
    assert closed_in == ["acme"]
    assert not caplog.records


def test_tracked_generator_passes_send_throw_and_return() -> None:
    """A tracked generator is a generator: send, throw and its return value go through."""

    @tracked("acme")
    def generator() -> Any:
        got = yield "first"
        try:
            yield got
        except KeyError:
            yield "thrown"
        return "done"

    def outer() -> Any:
        return (yield from generator())

    steps = outer()
    assert next(steps) == "first"
    assert steps.send("sent") == "sent"
    assert steps.throw(KeyError("x")) == "thrown"
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert stop.value.value == "done"


def test_tracked_follows_what_a_plain_function_returns() -> None:
    """A plain function that returns a coroutine or generator (another decorator's work) is followed into it."""

    def passing(func: Any) -> Any:
        @functools.wraps(func)
        def wrapper(*args: Any) -> Any:
            return func(*args)

        return wrapper

    @tracked("acme")
    @passing
    async def coroutine() -> str | None:
        return key()

    @tracked("acme")
    @passing
    def generator() -> Iterator[str | None]:
        yield key()

    assert asyncio.run(coroutine()) == "acme"
    assert list(generator()) == ["acme"]


def test_tracked_values_from_arguments() -> None:
    """Each value may be computed from the function's arguments, by name or else by position."""

    class Ticket:
        customer, thread = "acme", "c-7"

    @tracked(
        key=lambda t: t.customer,
        conversation_id=lambda ticket: ticket.thread,
        tags=lambda *, urgent: ["urgent"] if urgent else [],
    )
    def classify(ticket: Ticket, other: int = 0, *, urgent: bool = False) -> Any:
        scope = current_scope()
        assert scope is not None
        return scope.key, scope.conversation_id, scope.tags

    assert classify(Ticket(), urgent=True) == ("acme", "c-7", ("urgent",))
    assert classify(ticket=Ticket()) == ("acme", "c-7", ())
    with pytest.raises(TypeError, match="missing 1 required"):
        classify()  # type: ignore[call-arg]


def test_tracked_on_a_method() -> None:
    """On a method, a callable sees self."""

    class Desk:
        customer = "acme"

        @tracked(key=lambda self: self.customer)
        def answer(self) -> str | None:
            return key()

    assert Desk().answer() == "acme"


def test_tracked_misuse_is_said_when_decorating() -> None:
    """A callable that wants what the function has not, and forgotten parentheses, are errors at once."""
    with pytest.raises(TypeError, match=r"wants 'tenant', but .*only: ticket"):
        tracked(key=lambda ticket, tenant: tenant)(lambda ticket: None)
    with pytest.raises(TypeError, match="with parentheses"):
        tracked("acme")("no function")  # type: ignore[type-var]


def test_a_failing_callable_keeps_the_call(caplog: pytest.LogCaptureFixture) -> None:
    """A value that cannot be computed is said once, and the function runs without it."""

    @tracked(key=lambda ticket: ticket.customer)
    def classify(ticket: object) -> str | None:
        return key()

    assert classify(None) is None
    assert classify(None) is None
    [record] = caplog.records
    assert "@tracked(key=...)" in record.message
    assert "'NoneType' object has no attribute 'customer'" in record.message


def test_with_inside_a_generator_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """`with usage_context` in a generator is said once per line, with the line and what does it right."""

    def leaking() -> Iterator[int]:
        with usage_context("acme"):
            yield 1

    async def async_leaking() -> AsyncIterator[int]:
        async with usage_context("acme"):
            yield 1

    async def consume() -> None:
        async for _ in async_leaking():
            pass

    list(leaking())
    list(leaking())
    asyncio.run(consume())
    first, second = caplog.records
    assert "decorate leaking() with @spryng_instrument.tracked(...)" in first.message
    assert f"{__file__}:{leaking.__code__.co_firstlineno + 1}" in first.message
    assert "async_leaking()" in second.message
    assert first.levelno == logging.ERROR


def test_context_managers_may_hold_a_context(caplog: pytest.LogCaptureFixture) -> None:
    """A context manager that is written as a generator means to hold it open: nothing is said."""

    @contextlib.contextmanager
    def request() -> Iterator[None]:
        with usage_context("acme"):
            yield

    @contextlib.asynccontextmanager
    async def arequest() -> AsyncIterator[None]:
        with usage_context("acme"):
            yield

    async def main() -> None:
        async with arequest():
            assert key() == "acme"

    with request():
        assert key() == "acme"
    asyncio.run(main())
    assert not caplog.records


@pytest.mark.parametrize(
    ("value", "kept", "said"),
    [
        ("", None, "key='': a key must not be empty"),
        ("  ", None, "must not be empty"),
        (7, "7", "key=7: a key must be a string, not int; recorded as '7'"),
        (uuid.UUID(int=5), str(uuid.UUID(int=5)), "must be a string, not UUID"),
        (True, None, "key=True: a key must be a string, not bool"),
        ({"a": 1}, None, "must be a string, not dict; recorded without it"),
        ("x" * 300, None, "300 characters are too long, 255 are allowed"),
    ],
    ids=repr,
)
def test_bad_keys_are_said_and_never_raised(
    value: Any, kept: str | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A key that cannot be used is said with its value and what became of it; the request goes on."""
    with usage_context(key=value):
        if len(str(value)) > MAX_KEY:
            assert len(key() or "") == MAX_KEY
        else:
            assert key() == kept
    [record] = caplog.records
    assert said in record.message
    assert __file__ in record.message


@given(st.text(min_size=MAX_KEY + 1, max_size=400), st.text(min_size=MAX_KEY + 1, max_size=400))
def test_long_keys_are_never_mixed(one: str, other: str) -> None:
    """Two customers with different over-long keys stay two; the same one stays the same."""
    assert clean_name("key", one) == clean_name("key", one)
    assert (clean_name("key", one) == clean_name("key", other)) == (one == other)


class Customer(str, Enum):
    ACME = "acme"


class Share(float):
    pass


class Seat(int):
    def __str__(self) -> str:
        return "a seat"


def test_only_plain_values_are_kept() -> None:
    """Members of enums and whatever else is text or a number is kept as its value: every encoder takes that."""
    odd: dict[str, Any] = {Customer.ACME: Customer.ACME, "share": Share(0.5), "seat": Seat(7), "none": None, "on": True}
    with usage_context(Customer.ACME, tags=[Customer.ACME], query=Customer.ACME, properties=odd):
        scope = current_scope()
    assert scope is not None
    values = [scope.key, *scope.tags, scope.query, *(scope.properties or {}).values(), *(scope.properties or {})]
    assert values == ["acme", "acme", "acme", "acme", 0.5, 7, None, True, "acme", "share", "seat", "none", "on"]
    assert {type(value) for value in values} == {str, float, int, bool, type(None)}


def test_bad_tags_and_properties(caplog: pytest.LogCaptureFixture) -> None:
    """One string is one tag; what is no sequence, or no mapping, is said and left out."""
    odd = {"n": 1, "o": object, "big": 2**70, "nan": float("nan")}
    with usage_context("acme", tags="support", properties=odd):  # type: ignore[arg-type]
        scope = current_scope()
        assert scope is not None
        assert scope.tags == ("support",)
        assert scope.properties == {"n": 1, "o": str(object), "big": str(2**70), "nan": "nan"}
    assert not caplog.records
    with usage_context("acme", tags=7, properties=7):  # type: ignore[arg-type]
        scope = current_scope()
        assert scope is not None
        assert (scope.tags, scope.properties) == ((), None)
    assert ["tags=7" in caplog.text, "properties=7" in caplog.text] == [True, True]

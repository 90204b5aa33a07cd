"""Pools and threads: work belongs to whoever submitted it, and no worker to its first customer."""

from __future__ import annotations

import asyncio
import gc
import inspect
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spryng_instrument
from spryng_instrument import usage_context
from spryng_instrument.context import Scope, current_scope
from spryng_instrument.integrations.executors import carry, install_threads, uninstall_threads

ORIGINALS = (vars(threading.Thread)["start"], vars(ThreadPoolExecutor)["submit"])
CUSTOMERS = st.lists(st.sampled_from(["acme", "bluepeak", "cedar", None]), min_size=1, max_size=12)


def key(*_: object) -> str | None:
    scope = current_scope()
    return scope.key if scope else None


@pytest.fixture
def threads() -> Iterator[None]:
    install_threads()
    yield
    uninstall_threads()
    assert (vars(threading.Thread)["start"], vars(ThreadPoolExecutor)["submit"]) == ORIGINALS


def submitted(pool: Executor, customers: list[str | None]) -> list[str | None]:
    """The customer that each piece of work saw, of which each was submitted by its own."""
    futures: list[Future[str | None]] = []
    for customer in customers:
        with usage_context(customer):
            futures.append(pool.submit(key))
    return [future.result() for future in futures]


@given(CUSTOMERS, st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_work_is_its_submitters(customers: list[str | None], workers: int) -> None:
    """Whoever came first, and started the workers, each piece of work is its own submitter's, and of nobody without."""
    with carry(ThreadPoolExecutor(workers)) as pool:
        assert submitted(pool, customers) == customers
        assert pool.submit(key).result() is None


@given(CUSTOMERS, st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_a_worker_is_nobodys(customers: list[str | None], workers: int) -> None:
    """The same for every pool of the process: a worker that starts within a request does not keep its customer."""
    install_threads()
    try:
        with ThreadPoolExecutor(workers) as pool, carry(ThreadPoolExecutor(workers)) as both:
            assert submitted(pool, customers) == customers
            assert submitted(both, customers) == customers
            for _ in range(workers):
                assert pool.submit(key).result() is None
                assert both.submit(key).result() is None
    finally:
        uninstall_threads()
    assert (vars(threading.Thread)["start"], vars(ThreadPoolExecutor)["submit"]) == ORIGINALS


def test_calls_from_a_pool_are_recorded(instrument: Callable[..., Any], client: openai.OpenAI) -> None:
    """What is asked from a pool is recorded with its customer and conversation, by submit and by map."""
    ledger = instrument()

    def ask(text: str) -> Any:
        return client.embeddings.create(model="text-embedding-3-small", input=text)

    with carry(ThreadPoolExecutor(2)) as pool:
        with usage_context("acme", conversation_id="c1"):
            first = pool.submit(ask, "one")
        with usage_context("bluepeak"):
            rest = pool.map(ask, ["two", "three"])
        first.result()
        list(rest)
    assert sorted((m.key, m.conversation_id) for m in ledger.messages()) == [
        ("acme", "c1"),
        ("bluepeak", None),
        ("bluepeak", None),
    ]


async def test_as_the_executor_of_a_loop() -> None:
    """A carried pool is a loop's default executor, or that of one call, and the loop shuts it down."""
    loop = asyncio.get_running_loop()
    pool = carry(ThreadPoolExecutor(2))
    loop.set_default_executor(pool)
    with usage_context("acme"):
        by_default = loop.run_in_executor(None, key)
        by_name = loop.run_in_executor(pool, key)
    assert await by_default == await by_name == "acme"
    assert await loop.run_in_executor(None, key) is None
    await loop.shutdown_default_executor()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(key)


def test_a_submitter_who_has_left() -> None:
    """Work that runs after its submitter's context has been left keeps its customer, around inner contexts too."""
    go = threading.Event()

    def late() -> list[str | None]:
        go.wait(60)
        before = key()
        with usage_context(conversation_id="c1"):
            inner = key()
        return [before, inner, key()]

    with carry(ThreadPoolExecutor(1)) as pool:
        with usage_context("acme"):
            future = pool.submit(late)
        go.set()
        assert future.result() == ["acme"] * 3


def test_nothing_keeps_the_scope() -> None:
    """Once the work is done, neither pool nor worker holds the scope, nor what it refers to."""
    before = len(scopes())
    with carry(ThreadPoolExecutor(1)) as pool:
        with usage_context("acme", properties={"plan": "pro"}):
            assert pool.submit(key).result() == "acme"
            assert list(pool.map(key, "ab")) == ["acme", "acme"]
        assert pool.submit(key).result() is None  # the worker is done with what came before
        assert len(scopes()) == before


def scopes() -> list[Scope]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Scope]


def test_exceptions_and_arguments_pass() -> None:
    """Arguments, results and exceptions of submitted functions are as without us."""
    failure = ValueError("mine")

    def fail() -> None:
        raise failure

    with carry(ThreadPoolExecutor(1)) as pool, usage_context("acme"):
        assert pool.submit(lambda *args, **kwargs: (args, kwargs), 1, scope=2, func=3, fn=4).result() == (
            (1,),
            {"scope": 2, "func": 3, "fn": 4},
        )
        assert pool.submit(fail).exception() is failure
        assert isinstance(pool, ThreadPoolExecutor)
        assert list(pool.map(pow, [2, 3], [3, 2], timeout=5)) == [8, 9]
        with pytest.raises(TypeError):
            pool.submit()


def test_processes_are_refused() -> None:
    """An executor of processes is refused with what to do instead, and so is what is no executor."""
    with (
        ProcessPoolExecutor(1) as pool,
        pytest.raises(TypeError, match=r"cannot follow into a ProcessPoolExecutor.*as an argument"),
    ):
        carry(pool)
    with pytest.raises(TypeError, match="wants a concurrent"):
        carry(ThreadPool)  # type: ignore[type-var]


def test_an_unknown_executor_of_processes_says_so() -> None:
    """Where an executor that we do not know pickles its work, the error says why that cannot be."""

    class Pickling(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            pickle.dumps(fn)

    carry(Pickling()).submit(key)  # nobody's work has nothing to carry
    with usage_context("acme"), pytest.raises(TypeError, match="cannot follow to other processes"):
        carry(Pickling()).submit(key)


def test_threads_carry(threads: None, instrument: Callable[..., Any], client: openai.OpenAI) -> None:
    """With install_threads(), a thread works for whoever started it, also once that one has left its context."""
    ledger = instrument()
    go = threading.Event()

    def ask() -> None:
        go.wait(60)
        client.embeddings.create(model="text-embedding-3-small", input="hello")

    started = []
    for customer in ("acme", "bluepeak", None):
        with usage_context(customer):
            started.append(threading.Thread(target=ask))
            started[-1].start()
    go.set()
    for thread in started:
        thread.join()
    assert {message.key for message in ledger.messages()} == {"acme", "bluepeak", None}


def test_every_kind_of_thread(threads: None) -> None:
    """Overridden run() and start(), a run of the instance's own, and timers work as they did, and carry."""
    saw: dict[str, str | None] = {}

    class Running(threading.Thread):
        def run(self) -> None:
            saw["run"] = key()

    class Starting(threading.Thread):
        def start(self) -> None:
            saw["start"] = key()
            super().start()

    own = threading.Thread()
    own.run = mine = lambda: saw.update(own=key())  # type: ignore[method-assign]
    plain: list[threading.Thread] = [Running(), Starting(target=lambda: saw.update(target=key())), own]
    with usage_context("acme"):
        for thread in [*plain, threading.Timer(0.01, lambda: saw.update(timer=key()))]:
            thread.start()
            thread.join()
            if thread is not own:
                assert "run" not in vars(thread)
    assert own.run is mine
    assert saw == dict.fromkeys(["run", "start", "target", "own", "timer"], "acme")


def test_a_thread_that_cannot_start(threads: None) -> None:
    """A second start raises what it did, and leaves the thread as it was."""
    thread = threading.Thread(target=key)
    with usage_context("acme"):
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="threads can only be started once"):
            thread.start()
    assert "run" not in vars(thread)


def test_multiprocessings_thread_pool_is_nobodys(threads: None) -> None:
    """Workers of multiprocessing.pool.ThreadPool, made within a request, do not keep its customer."""
    with usage_context("acme"):
        pool = ThreadPool(2)
    try:
        assert pool.map(key, range(4)) == [None] * 4
    finally:
        pool.close()
        pool.join()


async def test_to_thread_still_works(threads: None) -> None:
    """asyncio.to_thread, which copies its Context itself, carries as before."""
    with usage_context("acme"):
        assert await asyncio.to_thread(key) == "acme"
    assert await asyncio.to_thread(key) is None


def test_signatures_are_kept(threads: None) -> None:
    """Installed, the functions look as they did, twice is once, and uninstalling leaves the very same."""
    install_threads()
    for ours, original in zip((threading.Thread.start, ThreadPoolExecutor.submit), ORIGINALS, strict=True):
        assert inspect.signature(ours) == inspect.signature(original)
        assert ours.__doc__ == original.__doc__
        assert ours.__name__ == original.__name__


def test_uninstalling_below_another() -> None:
    """What somebody else wrapped around ours stays, and ours below it carries no more."""
    install_threads()
    below = threading.Thread.start
    calls = []

    def start(thread: threading.Thread) -> None:
        calls.append(thread)
        below(thread)

    try:
        threading.Thread.start = start  # type: ignore[method-assign]
        uninstall_threads()
        assert vars(threading.Thread)["start"] is start
        saw: list[str | None] = []
        with usage_context("acme"):
            thread = threading.Thread(target=lambda: saw.append(key()))
            thread.start()
        thread.join()
        assert (calls, saw) == ([thread], [None])
    finally:
        threading.Thread.start = ORIGINALS[0]


def test_the_setting(instrument: Callable[..., Any], client: openai.OpenAI) -> None:
    """instrument(threads=True) carries the context into pools and threads, and uninstrument() undoes that."""
    ledger = instrument(threads=True)

    def ask() -> None:
        client.embeddings.create(model="text-embedding-3-small", input="hi")

    with ThreadPoolExecutor(1) as pool, usage_context("acme"):
        pool.submit(ask).result()
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert [message.key for message in ledger.messages()] == ["acme", "acme"]
    spryng_instrument.uninstrument()
    assert (vars(threading.Thread)["start"], vars(ThreadPoolExecutor)["submit"]) == ORIGINALS

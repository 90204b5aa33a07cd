"""Celery: a task is its sender's, in a worker, in retries and chains, and run eagerly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from celery import Celery, chain, group, signals
from celery.contrib.testing.worker import start_worker

from spryng_instrument import usage_context
from spryng_instrument.context import current_scope
from spryng_instrument.integrations import celery

asking: Any = None


def made(**settings: Any) -> Celery:
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(task_default_queue=f"q{threading.get_ident()}", worker_hijack_root_logger=False, **settings)
    app.conf.broker_transport_options = {"polling_interval": 0.01}
    return app


app = made()
eager = made(task_always_eager=True)
seen: list[Any] = []


def scope_seen() -> Any:
    scope = current_scope()
    return scope and (scope.key, scope.conversation_id, scope.tags, scope.query, scope.properties)


def key() -> str | None:
    scope = current_scope()
    return scope.key if scope else None


@app.task
def ask(text: str) -> Any:
    asking(text)
    return scope_seen()


@app.task
def fail() -> None:
    raise ValueError("mine")


@app.task(bind=True, max_retries=3, default_retry_delay=0)
def retrying(self: Any) -> Any:
    seen.append(key())
    if self.request.retries < 2:
        with usage_context("inner"):
            raise self.retry()
    return key()


@app.task
def chained(before: list[Any] | None = None) -> list[Any]:
    return [*(before or []), key()]


@app.task
def sending() -> Any:
    with usage_context(conversation_id="c2"):
        return ask.delay("nested").id


@eager.task
def eager_inner() -> Any:
    with usage_context("inner"):
        return key()


@eager.task
def eager_outer() -> Any:
    return [key(), eager_inner.delay().result, key()]


@eager.task(bind=True, max_retries=2, default_retry_delay=0)
def eager_retrying(self: Any) -> Any:
    if self.request.retries < 2:
        raise self.retry()
    return key()


@app.task
def worker_runs_eagerly() -> Any:
    with usage_context(tags=["in"]):
        return [key(), chained.apply().result, key()]


@pytest.fixture(autouse=True)
def _installed(client: openai.OpenAI) -> Iterator[None]:
    global asking
    asking = lambda text: client.embeddings.create(model="text-embedding-3-small", input=text)  # noqa: E731
    seen.clear()
    celery.install()
    yield
    celery.uninstall()
    asking = None


@pytest.fixture(scope="module", params=["solo", "threads"])
def _worker(request: pytest.FixtureRequest) -> Iterator[None]:
    with start_worker(app, pool=request.param, concurrency=2, perform_ping_check=False, shutdown_timeout=30):
        yield


@pytest.mark.usefixtures("_worker")
class TestWorker:
    def test_a_task_is_its_senders(self, instrument: Callable[..., Any]) -> None:
        """Key, conversation, tags, query and properties arrive in the worker, and a task without has none of them."""
        ledger = instrument()
        with usage_context("acme", conversation_id="c1", tags=["a", "b"], query="q", properties={"n": 1, "x": None}):
            first = ask.delay("hello")
        assert first.get(timeout=60, interval=0.01) == ["acme", "c1", ["a", "b"], "q", {"n": 1, "x": None}]
        assert ask.delay("hello").get(timeout=60, interval=0.01) is None
        found = [(m.key, m.conversation_id, m.tags, m.query, m.properties) for m in ledger.messages()]
        assert found == [("acme", "c1", ("a", "b"), "q", {"n": 1, "x": None}), (None, None, (), None, None)]

    def test_many_senders_are_never_mixed(self) -> None:
        """50 tasks of 50 customers, on the workers' threads, are each their sender's."""
        customers = [f"customer-{number}" for number in range(50)]
        results = []
        for name in customers:
            with usage_context(name):
                results.append(chained.delay())
        assert [result.get(timeout=60, interval=0.01) for result in results] == [[name] for name in customers]

    def test_retries_belong_to_the_first_attempt(self) -> None:
        """A retry keeps its sender's customer, even if asked for within another context."""
        with usage_context("acme"):
            result = retrying.delay()
        assert result.get(timeout=60, interval=0.01) == "acme"
        assert seen == ["acme"] * 3

    def test_chains_and_groups(self) -> None:
        """Every step of a chain and every task of a group is the sender's, though workers send the later ones."""
        with usage_context("acme"):
            steps = chain(chained.s(), chained.s(), chained.s()).delay()
            several = group(chained.s() for _ in range(3)).delay()
            linked = chained.apply_async(link=chained.s())
        assert steps.get(timeout=60, interval=0.01) == ["acme"] * 3
        assert several.get(timeout=60, interval=0.01) == [["acme"]] * 3
        assert linked.get(timeout=60, interval=0.01) == ["acme"]
        assert linked.children[0].get(timeout=60, interval=0.01) == ["acme", "acme"]

    def test_a_task_that_sends_tasks(self) -> None:
        """What a task sends is its customer's, with what it adds itself."""
        with usage_context("acme", conversation_id="c1"):
            sent = sending.delay().get(timeout=60, interval=0.01)
        assert app.AsyncResult(sent).get(timeout=60, interval=0.01)[:2] == ["acme", "c2"]

    def test_an_eager_task_within_a_worker(self) -> None:
        """A task that a task runs eagerly is of the same customer, and leaves the outer scope as it was."""
        with usage_context("acme"):
            assert worker_runs_eagerly.delay().get(timeout=60, interval=0.01) == ["acme", ["acme"], "acme"]

    def test_a_failing_task_leaves_nothing(self) -> None:
        """After tasks that failed, the workers' next tasks have no customer of theirs."""
        with usage_context("acme"):
            for result in [fail.delay() for _ in range(4)]:
                with pytest.raises(ValueError, match="mine"):
                    result.get(timeout=60, interval=0.01)
        assert [chained.delay().get(timeout=60, interval=0.01) for _ in range(4)] == [[None]] * 4
        assert not celery._running

    @pytest.mark.parametrize("header", ["acme", 7, [], {}, {"key": 7.5, "tags": 3, "unknown": 1}], ids=repr)
    def test_odd_headers_break_nothing(self, header: Any) -> None:
        """A header that is not ours, or of another version, costs the customer, never the task."""
        assert chained.apply_async(headers={"spryng": header}).get(timeout=60, interval=0.01) == [None]


def test_eager_tasks() -> None:
    """Eager tasks run in their caller's context, nested ones and retries too, and leave it as it was."""
    with usage_context("acme", tags=["a"]):
        before = current_scope()
        assert eager_outer.delay().result == ["acme", "inner", "acme"]
        assert eager_retrying.delay().result == "acme"
        assert current_scope() is before
    assert eager_outer.delay().result == [None, "inner", None]


def test_install_twice_and_uninstall() -> None:
    """Installed twice is installed once, and uninstalled nothing of ours is left in Celery's signals."""
    celery.install()
    with usage_context("acme"):
        assert eager_inner.delay().result == "inner"
    celery.uninstall()
    for signal in (signals.before_task_publish, signals.task_prerun, signals.task_postrun):
        assert not [receiver for receiver in signal._live_receivers(None) if receiver.__module__ == celery.__name__]
    headers: dict[str, Any] = {}
    with usage_context("acme"):
        signals.before_task_publish.send(sender="x", headers=headers)
    assert headers == {}


PREFORK = """
from celery import Celery
from spryng_instrument.context import current_scope
from spryng_instrument.integrations import celery

celery.install()
app = Celery("prefork", broker="filesystem://", backend="file://{folder}", set_as_current=False)
app.conf.broker_transport_options = {{
    "data_folder_in": "{folder}", "data_folder_out": "{folder}", "control_folder": "{folder}", "polling_interval": 0.05
}}

@app.task(name="whose", bind=True)
def whose(self):
    scope = current_scope()
    return [scope and scope.key, scope and scope.tags, self.request.hostname.partition("@")[0]]
"""


def test_a_prefork_worker(tmp_path: Path) -> None:
    """In a worker with processes of its own, each task is its sender's, and the next is nobody's."""
    module = tmp_path / "prefork_shop.py"
    module.write_text(PREFORK.format(folder=tmp_path))
    shop: dict[str, Any] = {"__name__": "prefork_shop"}
    exec(module.read_text(), shop)
    command = [sys.executable, "-m", "celery", "-A", "prefork_shop", "worker", "-P", "prefork", "-c", "2", "-n", "w@h"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])}
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    worker = subprocess.Popen([*command, "--without-mingle", "--without-gossip"], cwd=tmp_path, env=environ, **quiet)
    try:
        results = []
        for customer in ("acme", "bluepeak", None, "acme", None, None):
            with usage_context(customer, tags=["a"] if customer else ()):
                results.append((customer, shop["whose"].delay()))
        for customer, result in results:
            assert result.get(timeout=150, interval=0.05) == [customer, ["a"] if customer else None, "w"]
    finally:
        worker.terminate()
        worker.wait(120)

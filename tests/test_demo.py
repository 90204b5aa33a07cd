"""The demo: a newcomer's first command, run as one would."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spryng_instrument.cli import demo
from spryng_instrument.journal import Journal
from spryng_instrument.message import Message, Usage, encode, new_id
from spryng_instrument.store.sqlite import SqliteStore
from spryng_instrument.testing import Exchange
from tests.test_reports import NOW

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, in which nothing is set."""
    for name in [name for name in os.environ if name.startswith(("SPRYNG_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spryng(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spryng_instrument", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def message(**more: object) -> Message:
    return Message(id=new_id(), timestamp=NOW, operation="chat.completions", **more)  # type: ignore[arg-type]


def test_the_first_command(here: Path) -> None:
    """200 real calls for eight customers end in a table and in the proof that none is missing, within 30 s of work."""
    before = os.times()

    done = spryng("demo")

    after = os.times()  # not by the clock: other tests are at work beside it
    assert after.children_user + after.children_system - before.children_user - before.children_system < 30
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["key", *demo.CUSTOMERS, "total"]
    messages, errors = (int(lines[-1].split()[column]) for column in (1, 3))
    assert messages + errors == 200
    assert errors > 0
    proof = f"200 calls, 200 recorded: {messages} messages and {errors} errors, every token as the server counted it"
    assert proof in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert sorted(path.name for path in here.iterdir()) == [".spryng"]

    follow_ups = re.findall(r"^Next: spryng (.*)$", done.stderr, re.M)
    shown = [spryng(*shlex.split(command)) for command in follow_ups]
    assert [run.returncode for run in shown] == [0, 0, 0]
    assert "text-embedding-3-small" in shown[0].stdout
    assert shown[0].stdout.splitlines()[-1].split()[1:] == lines[-1].split()[1:]
    assert "200 recorded = 200 delivered + 0 waiting + 0 lost" in shown[2].stdout
    assert "In a browser, at http://127.0.0.1:8321: spryng serve --destination sqlite:///" in done.stderr

    again = spryng("demo", "--calls", "9")
    assert again.returncode == 0, again.stderr
    assert "9 calls, 9 recorded" in again.stderr


def test_a_demo_never_meets_real_messages(here: Path) -> None:
    """A ledger and a journal beside the demo's stay as they are, and another ledger must be new."""
    real = SqliteStore(here / ".spryng/usage.db")
    real.record([message(key="real")])
    journal = Journal(here / ".spryng/journal", memory_limit=0, wake=lambda: None)
    journal.append(encode(message(key="real")) + b"\n")
    journal.seal()
    journal.close()

    beside = spryng("demo", "--calls", "8", "--destination", "sqlite:///.spryng/trial run.db")
    onto = spryng("demo", "--calls", "8", "--destination", "sqlite:///.spryng/usage.db")

    assert beside.returncode == 0, beside.stderr
    assert "Next: spryng messages --destination 'sqlite:///.spryng/trial run.db'" in beside.stderr
    assert "real" not in beside.stdout
    assert (onto.returncode, onto.stdout) == (2, "")
    assert "is there already" in onto.stderr
    assert len(list((here / ".spryng/journal").glob("*.jsonl"))) == 1
    assert [row.group for row in real.usage("key")] == ["real"]


def test_live_needs_a_key() -> None:
    """--live without OPENAI_API_KEY is said at once."""
    done = spryng("demo", "--live")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "Error: --live calls the OpenAI API and needs OPENAI_API_KEY; without --live no key is needed\n"
    )


def test_plan() -> None:
    """Every kind of call and every customer is there, the same each time; live calls are few, cheap and short."""
    plans = demo.plan(200, live=False, responses=True)

    assert plans == demo.plan(200, live=False, responses=True)
    assert len(plans) == 200
    assert {plan.key for plan in plans} == set(demo.CUSTOMERS)
    assert {plan.path for plan in plans} == {"chat.completions", "completions", "embeddings", "responses"}
    assert {plan.path for plan in demo.plan(200, live=False, responses=False)}.isdisjoint({"responses"})
    live = demo.plan(demo.LIVE_CALLS, live=True, responses=True)
    assert {plan.request["model"] for plan in live} == {"gpt-4.1-nano", "text-embedding-3-small", "no-such-model"}
    assert not any("extra_headers" in plan.request for plan in live)


def test_compare(tmp_path: Path) -> None:
    """A message too few, and a token too many, are found."""
    served = Exchange(
        "POST", "/v1/chat/completions", "chat.completions", {}, {}, 200, False,
        {"prompt_tokens": 3, "completion_tokens": 5}, "chatcmpl-1", "req_1", True,
    )  # fmt: skip
    failed = replace(served, status=500, usage=None, response_id=None)
    store = SqliteStore(tmp_path / "usage.db")
    store.record(
        [message(response_id="chatcmpl-1", usage=Usage(input_tokens=3, output_tokens=5)), message(status="error")]
    )

    assert demo.compare(store, 2, [served, failed, failed]) is None
    assert demo.compare(store, 2, None) is None
    assert demo.compare(store, 3, [served]) == "3 calls, 2 messages"
    assert demo.compare(store, 1, [served]) == "1 calls, 2 messages"
    more = replace(served, usage={"prompt_tokens": 3, "completion_tokens": 6})
    assert "differs" in (demo.compare(store, 2, [more]) or "")

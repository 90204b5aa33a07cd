"""The pytest plugin that comes with the package, in a real run of pytest."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from spryng_instrument.testing import PracticeServer
from tests.test_readme import BLOCKS, ROOT

APP = """
import openai, spryng_instrument
client = openai.OpenAI(base_url="{url}", api_key="practice")
def ask(**options):
    messages = [{{"role": "user", "content": "hi"}}]
    return client.chat.completions.create(model="gpt-4o-mini", messages=messages, **options)
def classify(ticket):
    with spryng_instrument.usage_context(ticket["customer"]):
        return ask()
"""


def pytest_run(folder: Path, practice: PracticeServer, tests: str) -> subprocess.CompletedProcess[str]:
    (folder / "app.py").write_text(APP.format(url=practice.base_url))
    (folder / "test_app.py").write_text("import app, pytest\nfrom app import classify\n" + tests)
    known = any(each.value == "spryng_instrument.pytest_plugin" for each in entry_points(group="pytest11"))
    plugin = [] if known else ["-p", "spryng_instrument.pytest_plugin"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, "test_app.py"],
        cwd=folder, capture_output=True, text=True, timeout=120, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_it_captures_what_was_used(tmp_path, practice):
    """Messages, keys and tokens of calls and streams, in a ledger of each test's own."""
    done = pytest_run(tmp_path, practice, """
def test_one(usage_messages):
    classify({"customer": "acme"})
    assert usage_messages.one().key == "acme"
    usage_messages.assert_all_attributed()

def test_several(usage_messages):
    assert len(usage_messages) == 0 and not usage_messages.keys
    reply = classify({"customer": "acme"})
    for chunk in app.ask(stream=True):
        assert chunk.choices
    assert usage_messages.keys == {"acme", None}
    assert [message.streamed for message in usage_messages] == [False, True]
    assert usage_messages.tokens("acme").total_tokens == reply.usage.total_tokens
    assert usage_messages.tokens().total_tokens == 2 * reply.usage.total_tokens
    assert usage_messages.of(None)[0].usage == usage_messages[0].usage

def test_bare():
    import spryng_instrument
    assert spryng_instrument.stats().recorded == 0
""")  # fmt: skip
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def test_its_failures_say_what_was_recorded(tmp_path, practice):
    """An assertion that fails shows the messages, or the lines of code without a customer."""
    done = pytest_run(tmp_path, practice, """
def test_none(usage_messages):
    usage_messages.one()

def test_unattributed(usage_messages):
    app.ask()
    usage_messages.assert_all_attributed()
""")  # fmt: skip
    assert "2 failed" in done.stdout
    assert "one message was expected, 0 were recorded" in done.stdout
    assert re.search(r"calls without a customer's key, at:\nE +.*app\.py:6", done.stdout), done.stdout


def test_an_instrumented_application_is_so_again(tmp_path, practice):
    """An application that called instrument() has its own settings after the test, and nothing more in its ledger."""
    done = pytest_run(tmp_path, practice, """
import spryng_instrument
spryng_instrument.instrument(destination="sqlite:///app.db", default_key="house")

def test_one(usage_messages):
    app.ask()
    assert usage_messages.one().key is None

def test_two():
    app.ask()
    assert spryng_instrument.flush() and spryng_instrument.stats().recorded == 1
""")  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_readme(tmp_path, practice):
    """README's example is a test that passes."""
    [example] = [text for kind, text in BLOCKS if kind == "python" and "usage_messages" in text]
    done = pytest_run(tmp_path, practice, example)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_it_costs_nothing_where_it_is_not_used():
    """The plugin loads nothing that is slow to load."""
    code = """
import sys, pytest
before = set(sys.modules)
import spryng_instrument.pytest_plugin
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert loaded <= {"spryng_instrument", "contextvars", "_contextvars"}, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["usage_messages"])
def test_it_is_installed(name):
    """pytest finds the plugin by itself."""
    found = [each for each in entry_points(group="pytest11") if each.value == "spryng_instrument.pytest_plugin"]
    assert hasattr(found[0].load(), name)

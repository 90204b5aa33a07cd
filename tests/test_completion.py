"""Completion: what the shells offer, as they ask for it. An answer is quick, or none."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spryng_instrument.cli import names
from spryng_instrument.cli.commands import commands
from spryng_instrument.store.sqlite import SqliteStore

from .messages import NOON, message

PROGRAM = """
from spryng_instrument.cli import main, names
names.PATIENCE_S = 60.0
main()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test in a folder of its own, where `spryng` is this one, and as patient as a busy machine needs."""
    monkeypatch.setattr(names, "PATIENCE_S", 60.0)
    for name in [name for name in os.environ if name.startswith("SPRYNG_")]:
        monkeypatch.delenv(name)
    command = tmp_path / "bin" / "spryng"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\n{PROGRAM}")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ledger(here: Path) -> SqliteStore:
    store = SqliteStore(here / ".spryng" / "usage.db")
    store.record(
        [
            message(key="acme", tags=("support",), response_model="gpt-a", conversation_id="c-1"),
            message(key="acme-labs", tags=("search",), conversation_id="c-2"),
            message(key="with space", timestamp=NOON - timedelta(days=1)),
            message(key="a*"),
            message(key="東京", timestamp=NOON - timedelta(days=20)),
            message(),
        ]
    )
    return store


def offered(*words: str) -> list[str]:
    """What is offered for the last of the words."""
    environ = {"_SPRYNG_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    result = CliRunner().invoke(commands, env=environ, prog_name="spryng", catch_exceptions=False)
    assert result.stderr == ""
    return [line.partition(",")[2] for line in result.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["exp"], ["export"]),
        (["usage", "--by", ""], ["key", "tag", "conversation", "model", "day", "month"]),
        (["usage", "--tz", "europe/berl"], ["Europe/Berlin"]),
        (["usage", "--since", "y"], ["yesterday"]),
        (["usage", "--key", "ac"], ["acme", "acme-labs"]),
        (["usage", "--key", "東"], ["東京"]),
        (["messages", "--tag", ""], ["search", "support"]),
        (["tail", "--model", ""], ["gpt-a"]),
        (["export", "--conversation", ""], ["c-1", "c-2"]),
        (["export", "--key", "acme", "--conversation", ""], ["c-1"]),
        (["completion", "z"], ["zsh"]),
        (["usage", "--destination", "sqlite:///none.db", "--key", ""], []),
        (["usage", "--destination", "nonsense://", "--key", ""], []),
    ],
    ids=" ".join,
)
def test_what_is_offered(ledger: SqliteStore, words: list[str], found: list[str]) -> None:
    """Commands, choices, zones, and what the ledger has; nothing, and no error, where it cannot be known."""
    assert offered("spryng", *words) == found


def test_names_that_a_shell_would_take_apart_are_left_out(ledger: SqliteStore) -> None:
    """A name with a space or a wildcard is not offered: pasted as it stands, it would be something else."""
    assert offered("spryng", "usage", "--key", "") == ["acme", "acme-labs"]
    assert offered("spryng", "usage", "--key", "with") == []


def test_not_too_many(here: Path) -> None:
    """A screenful at most."""
    SqliteStore(here / ".spryng" / "usage.db").record([message(key=f"k{number:03}") for number in range(99)])

    assert offered("spryng", "usage", "--key", "") == [f"k{number:03}" for number in range(names.MOST)]


def test_a_ledger_that_does_not_answer(ledger: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is offered after a second, and nothing goes on behind."""
    monkeypatch.setattr(names, "PATIENCE_S", 0.05)
    monkeypatch.setattr(SqliteStore, "usage", lambda *_, **__: time.sleep(60))

    assert offered("spryng", "usage", "--key", "") == []
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def shell(program: str, script: str) -> list[str]:
    done = subprocess.run([program, *_PLAIN[program], script], capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


_PLAIN: dict[str, list[Any]] = {"bash": ["--norc", "-c"], "fish": ["--no-config", "-c"]}
BASH = """eval "$(spryng completion bash)"; COMP_WORDS=(spryng usage --key ac); COMP_CWORD=3
    _spryng_completion spryng; echo "${COMPREPLY[@]}"
"""
FISH = 'spryng completion fish | source; complete -C "spryng usage --key ac"'


@pytest.mark.parametrize(("program", "script"), [("bash", BASH), ("fish", FISH)])
def test_a_real_shell(ledger: SqliteStore, program: str, script: str) -> None:
    """With the script that is printed, a shell completes a customer's key."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    assert shell(program, script) == ["acme", "acme-labs"]


@pytest.mark.parametrize("program", ["bash", "zsh", "fish"])
def test_every_script(program: str) -> None:
    """Each shell has one; the help says where it goes."""
    result = CliRunner().invoke(commands, ["completion", program])

    assert result.exit_code == 0
    assert f"_SPRYNG_COMPLETE={program}_complete" in result.stdout
    assert f"spryng completion {program}" in CliRunner().invoke(commands, ["completion", "--help"]).stdout

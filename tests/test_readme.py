"""README is true: every command and every block of code in it runs here, as it stands."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from spryng_instrument.cli.commands import commands
from spryng_instrument.message import Usage
from spryng_instrument.prices import price_of
from spryng_instrument.settings import TABLE, Settings, env_name
from spryng_instrument.testing import PracticeServer
from tests.messages import message
from tests.shapes import SDK

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
SET_UP = ["pip install -e '.[all]' && spryng demo", "pip install 'nox[uv]' && nox"]
SHOWS = {
    "spryng usage --by key": r"^acme +3 +1 +0 ",
    "spryng usage --by model --since 7d": r"^gpt-4o-mini-2024-07-18 +2 ",
    "spryng usage --by day --tz Europe/Berlin --key acme --json": r'"messages": 3,',
    "spryng usage --by tag --format csv": r"^classification,1,",
    "spryng messages --limit 5": r"acme",
    "spryng export --since 7d --tz Europe/Berlin --format jsonl": r'"key":"acme"',
    "spryng export --output usage.csv": r"^$",
    "spryng push": r"^0 messages delivered to sqlite:///",
    "spryng doctor": r"4 recorded = 4 delivered",
    "spryng reconcile --by model": r"^gpt-4o-mini +requests +[24] +[24] +0  equal$",
    "spryng link acme --days 90": r"^http://127\.0\.0\.1:8321/dashboard/shared\?token=[\w.-]+$",
    "spryng run -- python app.py": r"Stats\(recorded=3",
    "spryng bill": r"^up to the minimum of 20\.00 +\d+\.\d\d$",
    "spryng bill --month 2026-10 --close": r"^Acme Inc\.  invoice 000001  2026-10-15 to 2026-11-14 \(Europe/Berlin\)",
    "spryng bill --number 000001 --format html": r"<h1>Invoice 000001</h1>",
    "spryng bills": r"^000001  acme  2026-10 .* EUR 20\.00$",
    "spryng rate --month 2026-10": r"^$",
    "spryng budgets --budgets budgets.toml": r"^acme +acme +- +3 messages +1,000 messages +0 +ok ",
    "spryng budgets check --budgets budgets.toml": r"^$",
}
"""What each command prints, after README's own Python has run once."""
SERVER = ["spryng keys create web --scope ingest", "spryng keys list", "spryng serve --port 8321"]
"""Commands of the server, which has a ledger of its own."""
LINES = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line not in SET_UP]
[CURL] = [line for line in LINES if line.startswith("curl ")]
COMMANDS = [line for line in LINES if line not in (*SERVER, CURL)]


TOML = {".spryng/plans.toml": "plan = ", "budgets.toml": "zone = ", ".spryng/prices.toml": "[[prices]]"}
"""Where a reader puts the TOML that begins so."""


@pytest.fixture(scope="module")
def server() -> Iterator[PracticeServer]:
    with PracticeServer() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, server: PracticeServer) -> Path:
    """Where a reader types the commands: README's Python blocks are its application, and have run once."""
    folder = tmp_path_factory.mktemp("readme")
    code = "\n".join(text for kind, text in BLOCKS if kind == "python")
    (folder / "app.py").write_text(code)
    (folder / ".spryng").mkdir()
    for name, first in TOML.items():
        [text] = [text for kind, text in BLOCKS if kind == "toml" and text.startswith(first)]
        (folder / name).write_text(text)
    done = run(["python", "app.py"], folder, server)
    assert done.returncode == 0, done.stderr
    assert "recorded=3, delivered=3, waiting=0" in done.stdout
    return folder


def run(command: list[str], folder: Path, server: PracticeServer) -> subprocess.CompletedProcess[str]:
    programs = {"spryng": [sys.executable, "-m", "spryng_instrument"], "python": [sys.executable]}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SPRYNG_")}
    environ |= {"OPENAI_API_KEY": "practice", "OPENAI_ADMIN_KEY": "sk-admin-practice"}
    environ |= {"OPENAI_BASE_URL": server.base_url, "PYTHONPATH": str(ROOT)}
    environ["SPRYNG_WEBHOOK_SECRET"] = f"whsec_{'c2Vj' * 8}"
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    return subprocess.run(
        programs[command[0]] + command[1:], cwd=folder, env=environ, capture_output=True, text=True, timeout=150
    )


def test_the_server(tmp_path: Path, server: PracticeServer) -> None:
    """A key, the server, and a message sent to it: as README says, in its order."""
    assert [line for line in LINES if line in SERVER] == SERVER
    create, listed, serve = (command.split() for command in SERVER)
    made = run(create, tmp_path, server)
    assert re.fullmatch(r"spryng_[0-9a-f]{8}_[\w-]{43}\n", made.stdout), made.stderr
    assert re.search(r"^\w{8} +web +ingest ", run(listed, tmp_path, server).stdout, re.M)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "KEY": made.stdout.strip()}
    command = [sys.executable, "-m", "spryng_instrument", *serve[1:]]
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stderr is not None
            assert "Track Usage API at http://127.0.0.1:8321" in "".join(serving.stderr.readline() for _ in range(2))
            done = subprocess.run(
                f"{CURL} -sS --retry 20 --retry-connrefused --retry-delay 1", shell=True, env=environ, text=True,
                capture_output=True, timeout=150,
            )  # fmt: skip
            assert re.fullmatch(r'\{"id":"[\w-]+","status":"recorded"\}', done.stdout), done.stderr
        finally:
            serving.terminate()
    assert "acme,1,1," in run(["spryng", "usage", "--format", "csv"], tmp_path, server).stdout


def test_what_runs_the_server() -> None:
    """The compose file and the unit of systemd can be read, and what they start is a command that there is."""
    [compose] = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"]
    assert set(compose["services"]["usage"]["depends_on"]) <= set(compose["services"])
    unit = configparser.RawConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    [text] = [text for kind, text in BLOCKS if kind == "ini"]
    unit.read_string(text)
    starts = [compose["services"]["usage"]["command"].split("&&")[1].strip(' "'), unit["Service"]["ExecStart"]]
    for start in starts:
        program, name, *options = start.removeprefix("exec ").split()
        assert Path(program).name == "spryng"
        assert name == "serve"
        commands.commands["serve"].make_context("serve", options)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command: str, folder: Path, server: PracticeServer) -> None:
    """Each command does what it says, on the ledger that README's own code has filled."""
    done = run(command.split(), folder, server)
    assert done.returncode == 0, done.stderr
    assert re.search(SHOWS[command], done.stdout, re.M), done.stdout


def test_the_demo_prints_what_readme_shows(tmp_path: Path, server: PracticeServer) -> None:
    """README's table is the demo's: the same customers, messages and tokens."""
    [shown] = [text for kind, text in BLOCKS if kind == "text"]
    done = run(["spryng", "demo"], tmp_path, server)
    assert done.returncode == 0, done.stderr
    counts = re.compile(r"^(\S+ .*?)(?: +\S+)?$", re.M)  # all but the cost: prices change
    if not SDK["responses API"]:
        counts = re.compile(r"^(\S+)", re.M)  # an SDK that has no responses makes other calls for the same customers
    assert counts.findall(done.stdout) == counts.findall(shown)


def test_the_set_up_commands() -> None:
    """nox runs the first in an environment of its own (session `fresh`); .ci/run is the second."""
    assert all(command in README for command in SET_UP)
    assert SET_UP[1] in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "def fresh(" in (ROOT / "noxfile.py").read_text()


def test_every_setting_is_in_the_table() -> None:
    """README's table has each setting, its variable and its default."""
    for name in TABLE:
        [row] = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
        default = Settings.__dataclass_fields__[name].default
        assert f"`{env_name(name)}`" in row
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert f"| {default:g} |" in row
        elif name == "destination":
            assert f"`{default}`" in row


def test_prices_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's price of a fine-tuned model, and that of a gateway, are what they cost."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("SPRYNG_PRICES", raising=False)
    usage = Usage(input_tokens=3_000_000, cached_tokens=1_000_000, output_tokens=1_000_000)
    tuned = message(timestamp=datetime.now(timezone.utc), response_model="ft:gpt-4o-mini:acme", usage=usage)
    assert price_of(tuned) == Decimal("1.95")
    assert price_of(message(response_model="any", host="gateway.example.com", usage=usage)) == 14


def test_every_other_block_is_known() -> None:
    """No block of a kind that nothing runs."""
    assert {kind for kind, _ in BLOCKS} == {"sh", "python", "text", "yaml", "ini", "toml"}

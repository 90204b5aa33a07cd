"""`spryng run`: other people's programs, unchanged, as real processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spryng_instrument.cli.autorun import FOLDER, environment
from spryng_instrument.ledger import deliver_waiting
from spryng_instrument.settings import resolve
from spryng_instrument.store.sqlite import SqliteStore
from spryng_instrument.testing import PracticeServer

ROOT = Path(__file__).parents[1]
CALL = """
import os, openai
def call(model="gpt-4o-mini"):
    with openai.OpenAI(base_url=os.environ["PRACTICE"], api_key="practice", max_retries=0) as client:
        return client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello"}])
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module that calls OpenAI, and a practice server to call."""
    for name in [name for name in os.environ if name.startswith("SPRYNG_")]:
        monkeypatch.delenv(name)
    (tmp_path / "calling.py").write_text(CALL)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    with PracticeServer() as server:
        monkeypatch.setenv("PRACTICE", server.base_url)
        yield tmp_path


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spryng_instrument", "run", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run(*options, "--", sys.executable, "-c", code)


def recorded(here: Path) -> list[str | None]:
    """The keys of all messages, as a command would see them: uvicorn ends its workers by a signal, before any exit."""
    assert deliver_waiting(resolve({})) is None
    return [row.message.key for row in SqliteStore(here / ".spryng/usage.db").messages(limit=10_000).rows]


def test_records_and_keeps_the_exit_code(here: Path) -> None:
    """The command's output, arguments and exit code are its own; its calls are recorded."""
    code = "import calling, sys; print(len(calling.call().choices), sys.argv[1:]); sys.exit(7)"

    done = run("--default-key=acme", sys.executable, "-c", code, "--destination", "--", "x")

    assert (done.returncode, done.stdout, done.stderr) == (7, "1 ['--destination', '--', 'x']\n", "")
    assert recorded(here) == ["acme"]


def test_a_program_without_openai_stays_as_it_is(here: Path) -> None:
    """Where openai is not imported nothing of ours is, and nothing is made; sys.path is the usual one."""
    code = (
        "import sys; print([name for name in sys.modules if name.startswith(('spryng', 'openai', 'wrapt', 'msgspec'))],"
        " [folder for folder in sys.path if 'autoload' in folder])"
    )

    done = python(code)

    assert (done.returncode, done.stdout, done.stderr) == (0, "[] []\n", "")
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["calling.py"]


def test_signals_reach_the_command() -> None:
    """It replaces itself with the command: a signal ends that, and is seen by whoever waits."""
    assert python("import os, signal; os.kill(os.getpid(), signal.SIGTERM)").returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 2, "a command is missing, as in: spryng run -- python app.py"),
        (["--"], 2, "a command is missing"),
        (["--", "no-such-command"], 127, "spryng run: no-such-command: command not found"),
        (["--", "./calling.py"], 126, "./calling.py: Permission denied; to run a Python file: spryng run -- python"),
        (["--frob", "x", "--", "true"], 2, "unrecognized arguments: --frob x"),
        (["--on-missing-key", "explode", "--", "true"], 2, "invalid choice: 'explode'"),
        (["--destination", "mysql://db", "--", "true"], 2, "unknown destination scheme 'mysql'"),
        (["--include-usage-hosts", "https://x/", "--", "true"], 2, "is no host name"),
    ],
)
def test_bad_input(args: list[str], code: int, said: str) -> None:
    """What cannot be is said before anything runs."""
    done = run(*args)

    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_help_needs_no_extra(here: Path) -> None:
    """`spryng run` works where click is not installed."""
    (here / "click.py").write_text("raise ModuleNotFoundError('No module named click', name='click')")

    assert "spryng run [options] -- command" in run("--help").stdout
    assert python("print('ran')").stdout == "ran\n"


def test_never_breaks_the_command(here: Path) -> None:
    """What keeps us from recording is said once on stderr, and the application runs."""
    (here / "file").write_text("")
    code = "import calling; calling.call(); calling.call(); print('answered')"

    unwritable = python(code, "--journal", "file/journal")
    without = python("import sys; sys.modules['spryng_instrument'] = None; " + code)

    assert (unwritable.returncode, unwritable.stdout) == (0, "answered\n")
    assert unwritable.stderr.count("are not recorded: journal=") == 1
    assert (without.returncode, without.stdout) == (0, "answered\n")
    assert without.stderr.count("install spryng-instrument where") == 1


def test_an_openai_that_fails_to_import_fails_as_before(here: Path) -> None:
    """An openai that is missing or broken gives the error it gives without us, each time."""
    (here / "broken").mkdir()
    (here / "broken" / "openai.py").write_text("raise RuntimeError('half installed')")
    code = (
        "import sys; sys.path.insert(0, 'broken')\n"
        "for _ in range(2):\n    try: import openai\n    except RuntimeError as exc: print(exc)\n"
        "sys.path[:] = []\n"
        "try: import openai\nexcept ModuleNotFoundError as exc: print(exc)"
    )

    assert python(code).stdout == "half installed\nhalf installed\nNo module named 'openai'\n"


def test_chains_to_the_sitecustomize_that_it_hides(here: Path) -> None:
    """Another sitecustomize runs as if ours were not there."""
    (here / "sitecustomize.py").write_text("import builtins; builtins.theirs = __file__")

    code = "import calling, sitecustomize; calling.call(); print(theirs, sitecustomize.__file__)"
    done = python(code, "--on-missing-key", "ignore")

    file = str(here / "sitecustomize.py")
    assert (done.stdout, done.stderr) == (f"{file} {file}\n", "")
    assert recorded(here) == [None]


def test_spawned_and_forked_workers(here: Path) -> None:
    """Workers that are spawned, forked or started as other programs are recorded too, all in one ledger."""
    (here / "app.py").write_text(
        "import multiprocessing, os, subprocess, sys, warnings\n"
        "def work(key):\n"
        "    os.chdir('/')\n"
        "    import calling, spryng_instrument\n"
        "    with spryng_instrument.usage_context(key): calling.call()\n"
        "if __name__ == '__main__':\n"
        "    for how in ('spawn', 'fork'):\n"
        "        worker = multiprocessing.get_context(how).Process(target=work, args=[how])\n"
        "        worker.start(); worker.join()\n"
        "    subprocess.run([sys.executable, '-c', 'import app; app.work(\"program\")'], check=True)\n"
        "    work('parent')\n"
    )

    done = run("--", sys.executable, "app.py")

    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(map(str, recorded(here))) == ["fork", "parent", "program", "spawn"]


def test_environment(here: Path) -> None:
    """Options become SPRYNG_ variables with absolute places; PYTHONPATH keeps what it had."""
    made = environment(
        {"destination": "sqlite:///u.db", "default_key": "k", "journal": None}, {"PYTHONPATH": f"a:{FOLDER}:"}
    )
    inherited = environment({}, {"SPRYNG_DESTINATION": "sqlite:///e.db", "SPRYNG_JOURNAL": "j", "PATH": "/bin"})

    assert made == {
        "PYTHONPATH": f"{FOLDER}:a:",
        "SPRYNG_DEFAULT_KEY": "k",
        "SPRYNG_DESTINATION": f"sqlite:///{here / 'u.db'}",
        "SPRYNG_JOURNAL": str(here / "u.db.journal"),
    }
    assert inherited == {
        "PATH": "/bin",
        "PYTHONPATH": FOLDER,
        "SPRYNG_DESTINATION": f"sqlite:///{here / 'e.db'}",
        "SPRYNG_JOURNAL": str(here / "j"),
    }


SERVED = """
import os
def answer():
    import calling, spryng_instrument
    with spryng_instrument.usage_context(f"worker-{os.getpid()}"): calling.call()
    return str(os.getpid()).encode()
async def asgi(scope, receive, send):
    import asyncio
    if scope["type"] == "http":
        body = await asyncio.to_thread(answer)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})
def wsgi(environ, start_response):
    start_response("200 OK", [])
    return [answer()]
"""
SERVERS = {
    "uvicorn": "served:asgi --workers 2 --port {port} --lifespan off --log-level warning",
    "gunicorn": "served:wsgi --workers 2 --bind 127.0.0.1:{port} --log-level warning --timeout 120",
}


@pytest.mark.parametrize("server", SERVERS)
def test_servers_with_workers(here: Path, server: str) -> None:
    """Every request that a worker answered is in the ledger once, under the worker that answered it."""
    if importlib.util.find_spec(server) is None:
        pytest.skip(f"{server} is not installed")
    (here / "served.py").write_text(SERVED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = SERVERS[server].format(port=port).split()
    command = [sys.executable, "-m", "spryng_instrument", "run", "--", sys.executable, "-m", server, *arguments]
    with subprocess.Popen(command) as started:
        try:
            answered = ask(port)
        finally:
            started.send_signal(signal.SIGTERM)
            started.wait(120)

    assert len(set(answered)) == 2
    assert sorted(map(str, recorded(here))) == sorted(f"worker-{pid}" for pid in answered)


def ask(port: int) -> list[str]:
    """Ask, several at a time, until both workers have answered."""
    answered: list[str] = []
    deadline = time.monotonic() + 90
    with ThreadPoolExecutor(6) as pool:
        while len(set(answered)) < 2 and time.monotonic() < deadline:
            answered += filter(None, pool.map(ask_once, [port] * 6))
    return answered


def ask_once(port: int) -> str | None:
    """Which worker answered. None: the server is not there yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=90) as reply:
            answer: bytes = reply.read()
            return answer.decode()
    except urllib.error.URLError:
        time.sleep(0.1)
        return None

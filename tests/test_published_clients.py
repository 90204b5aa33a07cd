"""The client packages that are published for the Track Usage API work with this server as they are.

Each is downloaded into an environment of its own, because it wants older libraries than everything else here.
`pytest -m "not downloads"` leaves these tests out.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spryng_instrument.message import Message, Usage
from spryng_instrument.store.sqlite import SqliteStore

from .serving import Serving, serving, spryng

pytestmark = [pytest.mark.downloads, pytest.mark.timeout(600)]

CLIENTS = {"spryngtime-analytics-sdk": "1.1.6", "spryngtime-analytics-sdk-python-sdk": "1.0.1"}
PYTHONS = ("3.12", "3.11", "3.10")
"""What they install on: cryptography 41 and the like have no wheels for newer ones."""

COMPLETION = {
    "id": "chatcmpl-123", "object": "chat.completion", "created": 1700000000, "model": "gpt-4o-mini-2024-07-18",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
}  # fmt: skip
EXAMPLE = {
    "id": "id_example", "object": "object_example", "created": 1, "model": "model_example",
    "choices": [{"index": 1, "message": {"role": "role_example", "content": "content_example"},
                 "finish_reason": "finish_reason_example"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 1},
}  # fmt: skip
"""As their README has it: a total that is not the sum, of an object that there is not."""

PROGRAM = """
import asyncio, json, sys
from spryngtime_analytics_sdk import ApiException, SpryngtimeAnalyticsSdk

host, api_key, calls = json.load(sys.stdin)
client = SpryngtimeAnalyticsSdk(host=host, api_key=api_key)
said = []
for call in calls:
    for track in (client.usage_tracking.track_usage, client.usage_tracking.atrack_usage):
        try:
            answer = track(**call)
            said.append(asyncio.run(answer) if asyncio.iscoroutine(answer) else answer)
        except ApiException as exc:
            said.append(exc.status)
print(json.dumps(said))
"""


def python_of(folder: Path, package: str) -> str:
    """An interpreter that has the package, made once a session."""
    home = folder / package
    python = home / "bin" / "python"
    if (home / "done").exists():
        return str(python)
    wanted = f"{package}=={CLIENTS[package]}"
    if uv := shutil.which("uv"):
        found = next(
            path for version in PYTHONS
            if (path := subprocess.run([uv, "python", "find", version], capture_output=True, text=True).stdout.strip())
        )  # fmt: skip
        subprocess.run([uv, "venv", "-q", "--clear", "-p", found, str(home)], check=True)
        subprocess.run([uv, "pip", "install", "-q", "-p", str(python), wanted], check=True)
    else:
        running = f"python{sys.version_info.major}.{sys.version_info.minor}"
        names = [running, *(f"python{version}" for version in PYTHONS)]
        found = next(path for name in names if name[6:] in PYTHONS and (path := shutil.which(name)))
        subprocess.run([found, "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", wanted], check=True)
    (home / "done").touch()
    return str(python)


@pytest.fixture(scope="module")
def environments(request: pytest.FixtureRequest) -> Path:
    cache = request.config.cache
    assert cache is not None
    return Path(cache.mkdir("published-clients"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serving]:
    destination = f"sqlite:///{tmp_path / 'usage.db'}"
    with serving(destination, start=False) as server:
        server.key = spryng("keys", "create", "app", "--destination", destination, cwd=tmp_path).stdout.strip()
        server.start()
        yield server


def called(python: str, server: Serving, *calls: dict[str, Any], key: str | None = None) -> list[Any]:
    """What the client gave back for each call, made plain and async."""
    done = subprocess.run(
        [python, "-c", PROGRAM], input=json.dumps([server.url, key or server.key, calls]), capture_output=True,
        text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: list[Any] = json.loads(done.stdout)
    return answer


def recorded(folder: Path) -> list[Message]:
    return [row.message for row in SqliteStore(folder / "usage.db", create=False).messages(limit=1000).rows][::-1]


@pytest.mark.parametrize("package", list(CLIENTS))
def test_a_completion_and_a_usage(environments: Path, server: Serving, tmp_path: Path, package: str) -> None:
    """As its README shows it, plain and async: a completion and a usage are recorded with the right tokens."""
    whose = "user" if package == "spryngtime-analytics-sdk" else "key"
    more: dict[str, Any] = {}
    if whose == "user":
        more = {
            "query": "what is 2+2",
            "conversation_id": "test123",
            "latency": 250,
            "custom_properties": {"plan": "p"},
        }
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    said = called(
        python_of(environments, package),
        server,
        {whose: "company123", "open_ai_response": COMPLETION, **more},
        {whose: "company456", "usage": usage},
    )
    assert said == [None] * 4
    messages = recorded(tmp_path)
    assert [message.key for message in messages] == ["company123"] * 2 + ["company456"] * 2
    for message in messages[:2]:
        assert message.usage == Usage(9, 3, 12)
        assert (message.operation, message.model) == ("chat.completions", "gpt-4o-mini-2024-07-18")
        assert message.response_id == "chatcmpl-123"
        assert (message.query, message.conversation_id) == (more.get("query"), more.get("conversation_id"))
        assert (message.latency_ms, message.properties) == (more.get("latency"), more.get("custom_properties"))
    for message in messages[2:]:
        assert (message.usage, message.operation) == (Usage(5, 2, 7), "custom")


@pytest.mark.parametrize("package", list(CLIENTS))
def test_a_wrong_key(environments: Path, server: Serving, tmp_path: Path, package: str) -> None:
    """The client raises its own ApiException with the server's status, and nothing is recorded."""
    whose = "user" if package == "spryngtime-analytics-sdk" else "key"
    said = called(python_of(environments, package), server, {whose: "a", "open_ai_response": COMPLETION}, key="wrong")
    assert said == [401, 401]
    assert recorded(tmp_path) == []


@pytest.mark.parametrize("package", list(CLIENTS))
def test_the_readmes_own_example(environments: Path, server: Serving, tmp_path: Path, package: str) -> None:
    """Though its total (1) is not the sum of its parts (1 + 1), it is recorded as it was given."""
    whose = "user" if package == "spryngtime-analytics-sdk" else "key"
    both = {whose: "string_example", "open_ai_response": EXAMPLE, "usage": EXAMPLE["usage"]}
    said = called(
        python_of(environments, package), server, both, {whose: "string_example", "open_ai_response": EXAMPLE}
    )
    assert said == [None] * 4
    assert [message.usage for message in recorded(tmp_path)] == [Usage(1, 1, 1)] * 4

"""Real traffic of all other endpoints: images, audio and moderations are messages; files, models and tuning are none.

Where ../shared/recorded is absent, nothing is here to replay: tests/test_endpoints.py has exchanges of our own making.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import pytest

from spryng_instrument import usage_context
from tests import shapes
from tests.shapes import ANY, MODES, client_of, running, seen, settle, truth
from tests.test_recorded import OPERATIONS, RECORDED, _body

PNG, MP3 = ("a.png", b"\x89PNG", "image/png"), ("a.mp3", b"ID3", "audio/mpeg")
CALLS = {
    "images.generations": ("images.generate", {}),
    "images.edits": ("images.edit", {"image": PNG, "prompt": "a cat"}),
    "images.variations": ("images.create_variation", {"image": PNG}),
    "audio.transcriptions": ("audio.transcriptions.create", {"file": MP3, "model": "gpt-4o-transcribe"}),
    "audio.translations": ("audio.translations.create", {"file": MP3, "model": "whisper-1"}),
    "moderations": ("moderations.create", {}),
}
# OpenAI retires operations, and the SDK says so; what they used is counted as long as they answer.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(not RECORDED.is_dir(), reason=f"{RECORDED} is absent"),
]


def _load() -> list[dict[str, Any]]:
    lines = [line for file in sorted(RECORDED.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]
    return [exchange for exchange in map(json.loads, lines) if exchange["endpoint"] not in OPERATIONS]


EXCHANGES = _load()


def _transport(exchange: dict[str, Any]) -> Any:
    response = exchange["response"]
    dropped = ("content-length", "content-encoding", "transfer-encoding")
    headers = [(name, value) for name, value in response["headers"].items() if name.lower() not in dropped]
    body = _body(response)

    def answer(request: Any) -> Any:
        assert (request.method, str(request.url)) == (exchange["request"]["method"], exchange["request"]["url"])
        return shapes.http.Response(response["status"], headers=headers, stream=shapes.Parts([body]))

    return shapes.http.MockTransport(answer)


async def _seen(client: Any, exchange: dict[str, Any], way: str) -> Any:
    """What the caller sees of the recorded call."""
    name, arguments = CALLS.get(exchange["endpoint"], ("", {}))
    request = exchange["request"]
    if not name:
        path = urlsplit(request["url"]).path.removeprefix("/v1")
        options = {"body": {}} if request["method"] == "POST" else {}
        return seen(await settle(getattr(client, request["method"].lower())(path, cast_to=ANY, **options)))
    if "json" in request["content_type"]:
        arguments = {**json.loads(_body(request)), **arguments}
    resource, _, method = name.rpartition(".")
    owner = client
    for part in resource.split("."):
        owner = getattr(owner, part)
    if way == "plain":
        return seen(await settle(getattr(owner, method)(**arguments)))
    raw = await settle(getattr(owner.with_raw_response, method)(**arguments))
    return raw.content, seen(await settle(raw.parse()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["plain", "raw"])
@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: f"{exchange['endpoint']}-{exchange['id']}")
def test_replay(exchange, way, mode, instrument):
    """A recorded exchange gives the caller what it would have given, and a message where a model was called."""

    async def call() -> Any:
        async with client_of(mode, transport=_transport(exchange)) as client:
            with usage_context("acme"):
                try:
                    return await _seen(client, exchange, way)
                except shapes.openai.OpenAIError as exc:
                    return seen(exc)

    bare = running(mode)(call())
    ledger = instrument()
    assert running(mode)(call()) == bare
    if exchange["endpoint"] not in CALLS:
        assert ledger.messages() == []
        return
    message = ledger.message()
    assert (message.operation, message.status, message.key) == (exchange["endpoint"], "ok", "acme")
    assert message.usage == truth(json.loads(_body(exchange["response"])).get("usage"))


def test_all_are_replayed():
    """Every recorded exchange but those of the four operations is among those that test_replay takes."""
    counts = Counter(exchange["endpoint"] for exchange in EXCHANGES)
    assert counts == {"images.edits": 7, "images.generations": 2, "images.variations": 1, "audio.transcriptions": 2,
                      "audio.translations": 1, "moderations": 1, "other": 13}  # fmt: skip

"""Every operation that carries usage: one message, with exactly what was reported; and which requests are none."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from spryng_instrument import usage_context
from spryng_instrument.endpoints import ENDPOINTS, NOT_COUNTED, endpoint_of
from spryng_instrument.message import Usage
from spryng_instrument.usage import read_reply
from tests import shapes
from tests.shapes import MODES, client_of, running, seen, settle, sse

# OpenAI retires operations, and the SDK says so; what they used is counted as long as they answer.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

BASE_URL = "https://api.openai.com/v1"
JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"
DETAILS = {"input_tokens_details": {"text_tokens": 6, "image_tokens": 4, "cached_tokens": 0}}
IMAGE_USAGE = {"input_tokens": 10, "output_tokens": 20, "total_tokens": 30, **DETAILS}
IMAGES = {"created": 1, "data": [{"b64_json": "aGk="}], "usage": IMAGE_USAGE}
PNG = ("a.png", b"\x89PNG", "image/png")
MP3 = ("a.mp3", b"ID3", "audio/mpeg")
SVG = {"input_tokens": 5, "model": "gpt-6", "output_tokens": 7, "reasoning_tokens": 2, "total_tokens": 12}


# name, call, reply (JSON, a list of events, or bytes), operation, usage, tool usage
ROWS = [
    (
        "images.generate",
        {"prompt": "a cat", "model": "gpt-image-1"},
        IMAGES,
        "images.generations",
        Usage(input_tokens=10, output_tokens=20, total_tokens=30, cached_tokens=0, input_image_tokens=4),
        None,
    ),
    (
        "images.generate",
        {"prompt": "a cat", "model": "gpt-image-3"},
        {**IMAGES, "svg_usage": SVG},
        "images.generations",
        Usage(input_tokens=10, output_tokens=20, total_tokens=30, cached_tokens=0, input_image_tokens=4),
        {"svg": SVG},
    ),
    (
        "images.generate",
        {"prompt": "a cat", "model": "gpt-image-3"},
        {"created": 1, "data": [], "svg_usage": SVG},
        "images.generations",
        Usage(input_tokens=5, output_tokens=7, total_tokens=12),
        {"svg": SVG},
    ),
    ("images.generate", {"prompt": "a cat", "model": "dall-e-3"}, {"created": 1, "data": []},
     "images.generations", None, None),
    ("images.edit", {"prompt": "a cat", "image": PNG, "model": "gpt-image-1"}, IMAGES, "images.edits",
     Usage(input_tokens=10, output_tokens=20, total_tokens=30, cached_tokens=0, input_image_tokens=4), None),
    ("images.create_variation", {"image": PNG, "model": "dall-e-2"}, {"created": 1, "data": []}, "images.variations",
     None, None),
    (
        "audio.transcriptions.create",
        {"file": MP3, "model": "gpt-4o-transcribe"},
        {"text": "hi", "usage": {"type": "tokens", "input_tokens": 14, "output_tokens": 4, "total_tokens": 18,
                                 "input_token_details": {"text_tokens": 0, "audio_tokens": 14}}},
        "audio.transcriptions",
        Usage(input_tokens=14, output_tokens=4, total_tokens=18, input_audio_tokens=14),
        None,
    ),
    (
        "audio.transcriptions.create",
        {"file": MP3, "model": "whisper-1"},
        {"text": "hi", "usage": {"type": "duration", "seconds": 3.5}},
        "audio.transcriptions",
        Usage(seconds=3.5),
        None,
    ),
    ("audio.transcriptions.create", {"file": MP3, "model": "whisper-1", "response_format": "text"}, b"hi there\n",
     "audio.transcriptions", None, None),
    ("audio.translations.create", {"file": MP3, "model": "whisper-1"}, {"text": "hi"},
     "audio.translations", None, None),
    ("audio.speech.create", {"input": "hi", "model": "tts-1", "voice": "alloy"}, b"\xff\xfb\x90\x00" * 100,
     "audio.speech", None, None),
    ("moderations.create", {"input": "hi", "model": "omni-moderation-latest"},
     {"id": "modr-1", "model": "omni-moderation-latest", "results": []}, "moderations", None, None),
    (
        "responses.create",
        {"input": "hi", "model": "gpt-5"},
        {
            "id": "resp_1", "object": "response", "status": "completed", "model": "gpt-5-2025-08-07", "output": [],
            "usage": {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7,
                      "output_tokens_details": {"reasoning_tokens": 2}},
            "tool_usage": {"web_search": {"num_requests": 2}, "image_gen": None},
        },
        "responses",
        Usage(input_tokens=3, output_tokens=4, total_tokens=7, reasoning_tokens=2),
        {"web_search": {"num_requests": 2}},
    ),
    (
        "responses.compact",
        {"input": "hi", "model": "gpt-5"},
        {"id": "resp_2", "object": "response.compaction", "created_at": 1, "output": [],
         "usage": {"input_tokens": 30, "output_tokens": 4, "total_tokens": 34}},
        "responses.compact",
        Usage(input_tokens=30, output_tokens=4, total_tokens=34),
        None,
    ),
    (
        "decisions.create",
        {"input": "hi", "model": "gpt-5", "questions": [{"type": "predicate", "question": "Is it a greeting?"}]},
        {"answers": [], "model": "gpt-5-2025-08-07",
         "usage": {"input_tokens": 8, "output_tokens": 1, "total_tokens": 9,
                   "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 6},
                   "output_tokens_details": {"reasoning_tokens": 0}}},
        "decisions",
        Usage(input_tokens=8, output_tokens=1, total_tokens=9, cached_tokens=2, cache_write_tokens=6,
              reasoning_tokens=0),
        None,
    ),
    ("videos.create", {"prompt": "a cat", "model": "sora-2"},
     {"id": "video_1", "object": "video", "status": "queued", "seconds": "4", "model": "sora-2"}, "videos", None, None),
]  # fmt: skip

STREAMS = [
    (
        "images.generate",
        {"prompt": "a cat", "model": "gpt-image-1", "stream": True},
        [{"type": "image_generation.partial_image", "b64_json": "aGk=", "partial_image_index": 0},
         {"type": "image_generation.completed", "b64_json": "aGk=", "usage": IMAGE_USAGE}],
        "images.generations",
        Usage(input_tokens=10, output_tokens=20, total_tokens=30, cached_tokens=0, input_image_tokens=4),
    ),
    (
        "images.edit",
        {"prompt": "a cat", "image": PNG, "model": "gpt-image-1", "stream": True},
        [{"type": "image_edit.completed", "b64_json": "aGk=", "usage": IMAGE_USAGE}],
        "images.edits",
        Usage(input_tokens=10, output_tokens=20, total_tokens=30, cached_tokens=0, input_image_tokens=4),
    ),
    (
        "audio.transcriptions.create",
        {"file": MP3, "model": "gpt-4o-transcribe", "stream": True},
        [{"type": "transcript.text.delta", "delta": "hi"},
         {"type": "transcript.text.done", "text": "hi",
          "usage": {"type": "tokens", "input_tokens": 14, "output_tokens": 4, "total_tokens": 18}}],
        "audio.transcriptions",
        Usage(input_tokens=14, output_tokens=4, total_tokens=18),
    ),
]  # fmt: skip


def method(client: Any, name: str) -> Any:
    for part in name.split("."):
        client = getattr(client, part)
    return client


def has(name: str, arguments: dict[str, Any]) -> bool:
    """Whether the installed SDK has a method, and knows its arguments."""
    import inspect

    client: Any = openai.OpenAI(api_key="x")
    for part in name.split("."):
        client = getattr(client, part, None)
    return client is not None and set(arguments) <= set(inspect.signature(client).parameters)


def served(answer: Any) -> Any:
    if isinstance(answer, list):
        return shapes.serving((200, EVENTS, [sse(*answer)]))[0]
    if isinstance(answer, bytes):
        return shapes.serving((200, "application/octet-stream", [answer]))[0]
    return shapes.serving((200, JSON, [shapes.json.dumps(answer).encode()]))[0]


async def outcome(mode: str, way: str, name: str, arguments: dict[str, Any], answer: Any) -> Any:
    """What a caller sees of a call."""
    async with client_of(mode, base_url=BASE_URL, transport=served(answer)) as client:
        with usage_context("acme"):
            call = method(client, name)
            if way == "plain":
                reply = await settle(call(**arguments))
            else:
                parent, _, last = name.rpartition(".")
                raw = await settle(getattr(method(client, parent).with_raw_response, last)(**arguments))
                reply = raw if isinstance(answer, bytes) else await settle(raw.parse())
        if arguments.get("stream"):
            return [seen(event) async for event in shapes.each(reply)]
        return reply.content if hasattr(reply, "content") else seen(reply)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["plain", "raw"])
@pytest.mark.parametrize(
    ("name", "arguments", "answer", "operation", "usage", "tools"),
    ROWS,
    ids=lambda value: value if type(value) is str else "",
)
def test_every_endpoint(name, arguments, answer, operation, usage, tools, way, mode, instrument):
    """An operation is one message, with exactly what its answer reports; the caller sees the same as without us."""
    if not has(name, arguments):
        pytest.skip(f"openai {openai.__version__} has no such {name}")
    bare = running(mode)(outcome(mode, way, name, arguments, answer))
    ledger = instrument()
    assert running(mode)(outcome(mode, way, name, arguments, answer)) == bare
    message = ledger.message()
    assert (message.operation, message.status, message.key) == (operation, "ok", "acme")
    assert (message.usage, message.tool_usage) == (usage, tools)
    assert message.request_model == arguments["model"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["plain", "raw"])
@pytest.mark.parametrize(("name", "arguments", "events", "operation", "usage"), STREAMS)
def test_every_stream(name, arguments, events, operation, usage, way, mode, instrument):
    """A stream of events is one message, told by its last; left before that, it is incomplete."""
    if not has(name, arguments):
        pytest.skip(f"openai {openai.__version__} has no such {name}")
    bare = running(mode)(outcome(mode, way, name, arguments, events))
    ledger = instrument()
    assert running(mode)(outcome(mode, way, name, arguments, events)) == bare
    running(mode)(outcome(mode, way, name, arguments, events[:-1]))
    cut, whole = sorted(ledger.messages(), key=lambda message: message.usage is not None)
    assert (whole.operation, whole.status, whole.usage, whole.streamed) == (operation, "ok", usage, True)
    assert (cut.operation, cut.status, cut.usage, cut.streamed) == (operation, "incomplete", None, True)


def test_whose_svg() -> None:
    """An answer with nothing but what a language model has written is that model's; beside an image, the image's is."""
    assert read_reply({"created": 1, "svg_usage": SVG}).model == "gpt-6"
    assert read_reply({"created": 1, "svg_usage": {**SVG, "model": None}}).model is None
    assert read_reply({**IMAGES, "svg_usage": SVG}).model is None


@pytest.mark.parametrize(
    ("method", "url", "operation", "reads"),
    [
        ("post", "/chat/completions", "chat.completions", False),
        ("post", "/responses?beta=true", "responses", False),
        ("POST", "https://host.example/some/proxy/openai/responses", "responses", False),
        ("post", "/deployments/my-gpt/chat/completions", "chat.completions", False),
        ("post", "https://x.openai.azure.com/openai/deployments/d/embeddings?api-version=1", "embeddings", False),
        ("post", "/responses/compact?beta=true", "responses.compact", False),
        ("get", "/responses/resp_1", "responses", True),
        ("post", "/responses/resp_1/cancel", "responses", True),
        ("post", "/threads/runs", "threads.runs", False),
        ("post", "/threads/t/runs", "threads.runs", False),
        ("get", "/threads/t/runs/r", "threads.runs", True),
        ("post", "/threads/t/runs/r/submit_tool_outputs", "threads.runs", True),
        ("get", "/batches/b", "batches", True),
        ("post", "/videos/edits", "videos.edits", False),
        ("post", "/images/edits", "images.edits", False),
        ("post", "/edits", "edits", False),
    ],
)
def test_paths(method, url, operation, reads):
    """A request is told by the end of its path, whatever a gateway has put before it."""
    endpoint = endpoint_of(method, url)
    assert endpoint is not None
    assert (endpoint.operation, endpoint.kind) == (operation, "read" if reads else "call")


@pytest.mark.parametrize(
    ("method", "url"),
    [
        ("get", "/chat/completions"),
        ("get", "/models"),
        ("post", "/responses/input_tokens"),
        ("get", "/responses/resp_1/input_items"),
        ("delete", "/responses/resp_1"),
        ("post", "/vector_stores/v/file_batches/b/cancel"),
        ("get", "/organization/usage/completions"),
        ("post", "/fine_tuning/jobs"),
        ("post", ""),
        ("get", "/"),
        ("post", "https://moderations"),
        *(tuple(name.replace("{}", "x").lower().split(" ", 1)) for name in NOT_COUNTED),
    ],
)
def test_no_messages(method, url):
    """What calls no model, or repeats a usage, is no message."""
    assert endpoint_of(method, url) is None


def test_no_row_hides_another():
    """Each row of the table is found by its own path."""
    for name, row in ENDPOINTS.items():
        method, _, path = name.partition(" ")
        assert endpoint_of(method.lower(), path.replace("{}", "x_1")) is row


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole", [True, False])
def test_speech_as_events(whole, mode, instrument):
    """Speech that is sent as events tells its usage at the end; the caller gets the very bytes."""
    if not has("audio.speech.create", {"stream_format": "sse"}):
        pytest.skip(f"openai {openai.__version__} has no stream_format")
    events = [
        {"type": "speech.audio.delta", "audio": "aGk="},
        {"type": "speech.audio.done", "usage": {"input_tokens": 4, "output_tokens": 90, "total_tokens": 94}},
    ]

    async def call() -> Any:
        asked = {"input": "hi", "model": "gpt-4o-mini-tts", "voice": "alloy", "stream_format": "sse"}
        async with client_of(mode, base_url=BASE_URL, transport=served(events)) as client:
            with usage_context("acme"):
                if whole:
                    return (await settle(client.audio.speech.create(**asked))).content
                async with shapes.within(client.audio.speech.with_streaming_response.create(**asked)) as raw:
                    return [part async for part in shapes.each(raw.iter_bytes())]

    bare = running(mode)(call())
    ledger = instrument()
    assert running(mode)(call()) == bare
    message = ledger.message()
    assert (message.operation, message.status, message.key) == ("audio.speech", "ok", "acme")
    assert message.usage == Usage(input_tokens=4, output_tokens=90, total_tokens=94)

"""What instrument() adds to a call, to a chunk and to an import, beside the least that any instrumentation adds.

    python -m tests.benchmarks            # all
    python -m tests.benchmarks call budgets chunk paths import memory server

Every figure is CPU time of the calling thread, the SDK's transport stubbed, everything in one process; variants take
turns call by call, so that what disturbs one disturbs all, and the median over rounds is shown. Trust the ratios.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import openai
import wrapt
from openai import _base_client as base

import spryng_instrument

from .server import bench_server  # noqa: F401

ROUNDS = 60
CALLS = 30
CHUNKS = 400

http = sys.modules.get("httpx2") or sys.modules["httpx"]
customer: ContextVar[str | None] = ContextVar("customer", default="acme")
records: deque[Any] = deque(maxlen=1000)

REPLY = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o-mini-2024-07-18",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    },
    "service_tier": "default",
}
ASK: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}


def chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {**REPLY, "object": "chat.completion.chunk", "choices": [choice], "usage": None}


def stream_body() -> bytes:
    chunks = [chunk({"role": "assistant", "content": ""})]
    chunks += [chunk({"content": "word "}) for _ in range(CHUNKS)]
    chunks += [chunk({}, "stop"), {**REPLY, "object": "chat.completion.chunk", "choices": []}]
    return b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in chunks) + b"data: [DONE]\n\n"


PLAIN, STREAM = json.dumps(REPLY).encode(), stream_body()


def answer(request: Any) -> Any:
    if b'"stream":true' in request.content.replace(b" ", b""):
        return http.Response(200, content=STREAM, headers={"content-type": "text/event-stream"})
    return http.Response(200, content=PLAIN, headers={"content-type": "application/json", "x-request-id": "req_1"})


async def aanswer(request: Any) -> Any:
    return answer(request)


class Record:
    """What the floor keeps of a call."""

    __slots__ = ("completion_tokens", "key", "prompt_tokens", "total_tokens")

    def __init__(self, key: str | None, usage: Any) -> None:
        self.key = key
        self.prompt_tokens = usage.prompt_tokens
        self.completion_tokens = usage.completion_tokens
        self.total_tokens = usage.total_tokens


def floor(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    reply = wrapped(*args, **kwargs)
    records.append(Record(customer.get(), reply.usage))
    return reply


async def afloor(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    reply = await wrapped(*args, **kwargs)
    records.append(Record(customer.get(), reply.usage))
    return reply


SEAMS = (base.SyncAPIClient, base.AsyncAPIClient)
BARE = tuple(vars(seam)["request"] for seam in SEAMS)
FLOOR = tuple(wrapt.FunctionWrapper(original, wrapper) for original, wrapper in zip(BARE, (floor, afloor), strict=True))


def use(requests: tuple[Any, Any]) -> None:
    for seam, request in zip(SEAMS, requests, strict=True):
        seam.request = request  # type: ignore[attr-defined]


@contextmanager
def instrumented(budgets: str = "") -> Any:
    """The wrapped `request`s of instrument(), as a variant beside the others.

    Args:
        budgets: the text of a file of budgets. "": none.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "budgets.toml").write_text(budgets)
        spryng_instrument.instrument(
            destination=f"sqlite:///{folder}/usage.db", budgets=f"{folder}/budgets.toml" if budgets else None
        )
        try:
            with spryng_instrument.usage_context(key="acme", conversation_id="c-42", tags=["support"]):
                yield tuple(vars(seam)["request"] for seam in SEAMS)
        finally:
            use(tuple(vars(seam)["request"] for seam in SEAMS))
            spryng_instrument.flush(60)
            spryng_instrument.uninstrument()


def rounds(measure: Any, variants: dict[str, Any], count: int, batch: int) -> dict[str, float]:
    """Microseconds of the first variant, and what each other adds to it: medians over rounds that hold all variants.

    A round takes the median of *batch* measurements of each variant, after a few to warm up: what disturbs one variant
    most likely disturbs its neighbours too, and falls out of the difference.
    """
    (bare, _), *others = variants.items()
    took: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.freeze()
    for _ in range(count):
        for name, requests in variants.items():
            use(requests)
            took[name].append(statistics.median([measure() for _ in range(batch + 5)][5:]))
    added = {
        name: statistics.median(mine - base for mine, base in zip(took[name], took[bare], strict=True))
        for name, _ in others
    }
    return {bare: statistics.median(took[bare]), **added}


def bench_call() -> None:
    client = openai.OpenAI(api_key="x", http_client=http.Client(transport=http.MockTransport(answer)))
    aclient = openai.AsyncOpenAI(api_key="x", http_client=http.AsyncClient(transport=http.MockTransport(aanswer)))
    create, acreate = client.chat.completions.create, aclient.chat.completions.create
    loop = asyncio.new_event_loop()

    def sync_call() -> float:
        started = time.thread_time_ns()
        create(**ASK)
        return (time.thread_time_ns() - started) / 1e3

    async def acall() -> float:
        started = time.thread_time_ns()
        await acreate(**ASK)
        return (time.thread_time_ns() - started) / 1e3

    with instrumented() as ours:
        variants = {"bare": BARE, "floor": FLOOR, "ours": ours}
        for kind, measure in (("sync", sync_call), ("async", lambda: loop.run_until_complete(acall()))):
            took = rounds(measure, variants, ROUNDS, CALLS)
            least, added = took["floor"], took["ours"]
            print(f"{kind:5} call: bare {took['bare']:.1f} us, floor +{least:.2f} us, ours +{added:.2f} us, "
                  f"{added / least:.2f} x the floor (goal: 4)")  # fmt: skip
    loop.close()


def bench_budgets() -> None:
    """What budgets add to a call: ten of them, of which four concern it, the ledger being read every two seconds."""
    hard = "period = 'month'\nmessages = 1000000000\ntokens = 1000000000000\nhard = true\n"
    whose = ["key = 'acme'", "key = '*'", "", "tag = 'support'", *(f"key = 'other{number}'" for number in range(6))]
    text = "".join(f"[[budget]]\nname = 'b{number}'\n{each}\n{hard}" for number, each in enumerate(whose))
    client = openai.OpenAI(api_key="x", http_client=http.Client(transport=http.MockTransport(answer)))
    create = client.chat.completions.create

    def call() -> float:
        started = time.thread_time_ns()
        create(**ASK)
        return (time.thread_time_ns() - started) / 1e3

    added = []
    for budgets in ("", text) * 4:
        with instrumented(budgets) as ours:
            added.append(rounds(call, {"bare": BARE, "ours": ours}, ROUNDS // 2, CALLS)["ours"])
    off, on = statistics.median(added[::2]), statistics.median(added[1::2])
    print(f"call: ours +{off:.2f} us, with ten budgets +{on:.2f} us: {on - off:.2f} us for four that concern it")


def bench_chunk() -> None:
    client = openai.OpenAI(api_key="x", http_client=http.Client(transport=http.MockTransport(answer)))
    aclient = openai.AsyncOpenAI(api_key="x", http_client=http.AsyncClient(transport=http.MockTransport(aanswer)))
    loop = asyncio.new_event_loop()

    # The SDK's own parsing of a chunk is 500 times what is measured: the chunks are parsed before, and handed to the
    # stream's iterator from a list. What is left is the way from there to the caller.
    from openai.types.chat import ChatCompletionChunk

    parsed = [ChatCompletionChunk.model_validate(json.loads(line[6:])) for line in STREAM.decode().split("\n\n")[:-2]]
    # Fresh from the parser a chunk is in the processor's cache: so few that they stay there.
    parsed[2:-2] = parsed[2:18] * (len(parsed[2:-2]) // 16)

    drain = swapped(lambda: client.chat.completions.create(**ASK, stream=True), parsed)

    async def feed() -> Any:
        for part in parsed:
            yield part

    async def adrain() -> float:
        stream = await aclient.chat.completions.create(**ASK, stream=True)
        swap(stream, feed())
        started = time.thread_time_ns()
        async for _ in stream:
            pass
        took = time.thread_time_ns() - started
        await stream.response.aclose()
        return took / 1e3 / len(parsed)

    with instrumented() as ours:
        for kind, measure, goal in (("sync", drain, 0.15), ("async", lambda: loop.run_until_complete(adrain()), 0.3)):
            took = rounds(measure, {"bare": BARE, "ours": ours}, ROUNDS, 4)
            print(f"{kind:5} chunk: bare {took['bare']:.3f} us, ours +{took['ours']:.3f} us (goal: {goal})")
    loop.close()


def bench_paths() -> None:
    """What a chunk costs on each way that it can take, the SDK's own work on it included in "bare"."""
    from openai.types.responses import ResponseTextDeltaEvent

    client = openai.OpenAI(api_key="x", http_client=http.Client(transport=http.MockTransport(answer)))
    completions = client.chat.completions
    delta = ResponseTextDeltaEvent.model_construct(type="response.output_text.delta", item_id="i", delta="word ")
    events = [{"type": "image_generation.partial_image", "b64_json": "aGk=", "partial_image_index": 0}] * CHUNKS

    def whole(read: Any) -> Any:
        def measure() -> float:
            started = time.thread_time_ns()
            read()
            return (time.thread_time_ns() - started) / 1e3 / CHUNKS

        return measure

    def raw(name: str, **options: Any) -> Any:
        def read() -> None:
            with completions.with_streaming_response.create(**ASK, stream=True) as response:
                for _ in getattr(response, name)(**options):
                    pass

        return read

    def helper() -> None:
        with completions.stream(**ASK) as stream:
            for _ in stream:
                pass

    ask = {"model": "gpt-4o-mini", "input": "hello", "stream": True}
    paths = {
        "stream, SDK included": whole(lambda: [None for _ in completions.create(**ASK, stream=True)]),
        ".stream() helper": whole(helper),
        "raw, iter_bytes": whole(raw("iter_bytes")),
        "raw, iter_lines": whole(raw("iter_lines")),
        "responses, deltas": swapped(lambda: client.responses.create(**ask), [delta] * CHUNKS),
        "every chunk looked at": swapped(lambda: client.images.generate(prompt="x", stream=True), events),
    }
    with instrumented() as ours:
        for name, measure in paths.items():
            took = rounds(measure, {"bare": BARE, "ours": ours}, ROUNDS // 6, 4)
            print(f"path {name:22}: bare {took['bare']:8.3f} us a chunk, ours +{took['ours']:.3f} us")


def swapped(make: Any, chunks: list[Any]) -> Any:
    """What measures a chunk's way from the stream's iterator to the caller, for a stream that *make* opens."""

    def measure() -> float:
        stream = make()
        swap(stream, iter(chunks))
        started = time.thread_time_ns()
        for _ in stream:
            pass
        took = time.thread_time_ns() - started
        stream.response.close()
        return took / 1e3 / len(chunks)

    return measure


def swap(stream: Any, chunks: Any) -> None:
    """Have a stream, observed or not, take its chunks from *chunks*."""
    observer = stream._iterator
    call = getattr(observer, "_call", None) or (
        getattr(observer, "gi_frame", None) and observer.gi_frame.f_locals.get("call")
    )
    if call is None:
        stream._iterator = chunks
    elif hasattr(chunks, "__anext__"):
        from spryng_instrument.streams import _AsyncWatch

        stream._iterator = _AsyncWatch(call, chunks)
    else:
        from spryng_instrument.streams import _watch

        stream._iterator = _watch(call, chunks)


def bench_import() -> None:
    def cpu_ms(code: str) -> float:
        samples = []
        for _ in range(15):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            samples.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return statistics.median(samples) * 1e3

    bare, ours = cpu_ms("pass"), cpu_ms("import spryng_instrument")
    print(f"import: bare Python {bare:.1f} ms, ours +{ours - bare:.1f} ms (goal: 30)")


def bench_memory() -> None:
    code = """
import gc, resource
from tests.benchmarks.__main__ import *
client = openai.OpenAI(api_key="x", http_client=http.Client(transport=http.MockTransport(answer)))
with instrumented() as ours:
    use(ours)
    for done in range(1, 100_001):
        client.chat.completions.create(**ASK)
        if done in (10_000, 100_000):
            spryng_instrument.flush(60)
            gc.collect()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(len(gc.get_objects()), peak, spryng_instrument.stats().delivered)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split("\n")
    for calls, line in zip((10_000, 100_000), out, strict=False):
        objects, peak, delivered = line.split()
        print(f"memory: {calls:,} calls, {delivered} delivered: {int(objects):,} objects, peak {int(peak) // 1024} MB")


if __name__ == "__main__":
    for name in sys.argv[1:] or ("call", "budgets", "chunk", "paths", "import", "memory", "server"):
        globals()[f"bench_{name}"]()

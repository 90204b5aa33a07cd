"""A practice OpenAI server: what the SDK would hear from OpenAI, on this machine, without a key and for nothing.

    with PracticeServer() as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="practice")
        client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "Hello"}])
        assert server.exchanges[0].usage["total_tokens"] > 0

Invariant: an answer and its usage follow from the server's seed and what was asked, whether it is plain or streamed, in
whatever order and from however many threads; only ids and times differ.
It must not know the rest of this package: it is the yardstick that the package is measured with.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, count, zip_longest
from operator import getitem
from socketserver import TCPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

__all__ = ["Exchange", "PracticeServer"]

Json = dict[str, Any]

MAX_BODY_BYTES = 32 * 1024 * 1024

# Source: recorded traffic, and https://platform.openai.com/docs/models for names that were not recorded.
_DATED = re.findall(
    r"\S+",
    """gpt-3.5-turbo-0125 gpt-3.5-turbo-instruct:20230824-v2 gpt-4-0613 gpt-4-turbo-2024-04-09 gpt-4o-2024-08-06
    gpt-4o-mini-2024-07-18 gpt-4.1-2025-04-14 gpt-4.1-mini-2025-04-14 gpt-4.1-nano-2025-04-14 gpt-5-2025-08-07
    gpt-5-mini-2025-08-07 gpt-5-nano-2025-08-07 gpt-5.4-2026-03-05 gpt-5.5-2026-04-23 o1-2024-12-17 o3-2025-04-16
    o3-mini-2025-01-31 o4-mini-2025-04-16""",
)
_SNAPSHOTS = {re.sub(r"[-:]\d{4}.*", "", name): name for name in _DATED}
_DIMENSIONS = {"text-embedding-ada-002": 1536, "text-embedding-3-small": 1536, "text-embedding-3-large": 3072}
_FAMILIES = re.compile(r"(ft:)?(gpt-|chatgpt-|o\d|text-|davinci|babbage|codex-|computer-use-)")
_REASONS = re.compile(r"(ft:)?(o\d|gpt-5(?!.*chat))")
_TOKEN = re.compile(r"\s*\S{1,5}|\s+")  # about 4 characters of prose; all tokens together are the text again
_ROUTE = re.compile(r"(?:/v1|(?P<azure>/openai)(?:/v1|/deployments/(?P<deployment>[^/]+))?)/(?P<rest>.+?)/?")
_FAULT = re.compile(r"[45]\d\d|disconnect|stream-disconnect|stream-error|")
_NOT_TEXT = {"image_url", "input_image", "input_audio", "input_file", "file"}
_WORDS = re.findall(
    r"\S+",
    """the meter counts every token once and the invoice names each customer who asked while the ledger keeps what was
    said short because answers on this server cost nothing but still add up to real usage for a careful reader""",
)
# The type, code and message of each error. Source: https://platform.openai.com/docs/guides/error-codes
_ERRORS: dict[int, tuple[str, str | None, str]] = {
    400: ("invalid_request_error", None, "The request could not be understood."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    403: ("request_forbidden", "unsupported_country_region_territory", "Country, region, or territory not supported"),
    404: ("invalid_request_error", "model_not_found", "The model does not exist or you do not have access to it."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests. Please try again later."),
    500: ("server_error", None, "The server had an error while processing your request. Sorry about that!"),
    503: ("server_error", None, "The engine is currently overloaded, please try again later."),
}


@dataclass(frozen=True, slots=True)
class Exchange:
    """One HTTP request and what it was answered: the truth to compare a meter's records with."""

    method: str
    path: str
    """As requested, with the query."""
    endpoint: str
    """chat.completions, completions, embeddings, responses, models or other."""
    request: Any
    """The parsed JSON body. None: there was none, or it was no JSON."""
    headers: dict[str, str]
    """The request's headers, names in lower case."""
    status: int
    """The HTTP status. 0: closed without an answer, as x-practice-error asked."""
    stream: bool
    """Whether the request asked for a stream."""
    usage: Json | None
    """As reported, or as a stream that was cut or not asked for it would have reported it. None: nothing to report."""
    response_id: str | None
    request_id: str
    usage_sent: bool
    """Whether the usage was handed to the network; a client that left early may not have read it."""


class PracticeServer:
    """Answers like api.openai.com and Azure OpenAI, on loopback, and remembers every exchange.

    A request's header x-practice-error (extra_headers in the SDK) makes it fail: a status from "400" to "599" is
    answered; "disconnect" closes without an answer; "stream-disconnect" closes after three chunks (a plain answer:
    half-way); "stream-error" sends an error event there (a plain answer: is 500). With "-once" appended, the first
    attempt of a call fails and the SDK's retry succeeds.

    The first tool is called when tool_choice requires it, or the last user message says "weather" or "tool".
    Model names of OpenAI's families are known (gpt-..., o3..., text-...); under Azure paths every deployment is.

    Args:
        port: 0 picks a free one, which is kept when the server is stopped and started again.
        seed: Another seed gives other answers.
        latency_s: Seconds before an answer begins.
        chunk_delay_s: Seconds between two chunks of a stream.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        seed: int = 0,
        latency_s: float = 0.0,
        chunk_delay_s: float = 0.0,
    ) -> None:
        self.host, self.port, self.seed, self.latency_s, self.chunk_delay_s = host, port, seed, latency_s, chunk_delay_s
        salt = secrets.token_hex(8)  # OpenAI repeats no id; two runs recorded in one ledger must not either
        self._identities = (f"{salt}/{number}" for number in count())
        self._lock = threading.Lock()
        self._listener: _Listener | None = None
        self._exchanges: dict[str, Exchange] = {}
        self._failed_once: set[tuple[str | None, str, bytes]] = set()

    @property
    def base_url(self) -> str:
        """The URL for openai.OpenAI(base_url=...), known once the server has started."""
        if not self.port:
            raise RuntimeError("The practice server has no port yet. Call start(), or use it in a with statement.")
        return f"http://{self.host}:{self.port}/v1"

    @property
    def exchanges(self) -> list[Exchange]:
        """Every exchange so far, in the order in which the answers began; a copy."""
        with self._lock:
            return list(self._exchanges.values())

    def start(self) -> PracticeServer:
        """Listen, and answer in background threads until stop(). Raises OSError when the port is taken."""
        with self._lock:
            if self._listener is None:
                self._listener = _Listener(self)
                self.port = self._listener.server_port
        return self

    def stop(self) -> None:
        """Close every connection, those with an answer under way included, and end all threads."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()

    def __enter__(self) -> PracticeServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _identity(self) -> str:
        with self._lock:
            return next(self._identities)

    def _keep(self, exchange: Exchange) -> None:
        with self._lock:
            self._exchanges[exchange.request_id] = exchange

    def _fault(self, path: str, headers: Mapping[str, str], raw: bytes) -> str:
        """What this attempt is to suffer, or nothing."""
        fault, retries = headers.get("x-practice-error", ""), headers.get("x-stainless-retry-count")
        if not fault.endswith("-once"):
            return fault
        first = retries == "0"
        if retries is None:  # older SDKs do not count: their retry is the next request with the same body
            call = (headers.get("idempotency-key"), path, raw)
            with self._lock:
                first = call not in self._failed_once
                (self._failed_once.add if first else self._failed_once.discard)(call)
        return fault.removesuffix("-once") if first else ""


class _Refusal(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str = "", param: str | None = None, code: str | None = None) -> None:
        kind, usual_code, usual_message = _ERRORS.get(status) or _ERRORS[500 if status >= 500 else 400]
        super().__init__(message or usual_message)
        self.status = status
        self.error = {"message": str(self), "type": kind, "param": param, "code": code if message else usual_code}


class _Answer(NamedTuple):
    """The body of a plain answer, and the events of the same answer streamed."""

    body: Json
    events: list[bytes]
    usage_at: int | None = None
    """Which event carries the usage. None: a stream that was not asked for it."""


class _Output(NamedTuple):
    """One choice: a text or the arguments of a call of *tool*, whole and token by token."""

    text: str
    tokens: list[str]
    tool: str | None
    reasoning: int
    cut: bool


class _Call:
    """A request to be answered, with ids of its own and chance that only its prompt decides."""

    def __init__(self, body: Json, route: re.Match[str], seed: int, identity: str) -> None:
        self.body, self.seed, self.created = body, seed, int(time.time())
        self.ids = (_unique(f"{identity}/{number}") for number in count())
        model = body.get("model") or unquote(route["deployment"] or "")
        if not isinstance(model, str) or not model:
            raise _Refusal(400, "you must provide a model parameter", "model", "missing_required_parameter")
        if not route["azure"] and not _FAMILIES.match(model):
            raise _Refusal(400, f"The requested model '{model}' does not exist.", "model", "model_not_found")
        if body.get("stream_options") and not body.get("stream"):
            raise _Refusal(400, "'stream_options' is only allowed when 'stream' is enabled.", "stream_options")
        self.model = _SNAPSHOTS.get(model, model)
        self.tier = "default" if body.get("service_tier") in (None, "auto") else body["service_tier"]
        self.usage_asked = bool((body.get("stream_options") or {}).get("include_usage"))

    def id(self, prefix: str, length: int) -> str:
        return prefix + next(self.ids)[:length]

    def prompt(self, name: str, *kinds: type) -> Any:
        value = self.body.get(name)
        if value is None:
            raise _Refusal(400, f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
        if not isinstance(value, kinds) or not value:
            raise _Refusal(400, f"Invalid value for '{name}': {json.dumps(value)[:80]}.", name, "invalid_value")
        return value

    def number(self, name: str, default: int, at_most: int = sys.maxsize) -> int:
        value = self.body.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= at_most):
            raise _Refusal(400, f"'{name}' is {value!r}, not an integer from 1 to {at_most}.", name, "invalid_value")
        return default if value is None else int(value)

    def write(self, prompt: Any, limit: int, index: int = 0, effort: str = "", form: Json | None = None) -> _Output:
        """Answer *prompt* in at most *limit* tokens, as tool_choice and response format demand."""
        rng = random.Random(f"{self.seed}/{index}/{json.dumps(prompt, sort_keys=True)}")
        schema: Json | None = None
        if tool := _tool(self.body, prompt):
            schema = tool.get("parameters") or {"type": "object"}
        elif form and form.get("type") == "json_object":
            schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
        elif form and form.get("type") == "json_schema":
            schema = form.get("json_schema", form)["schema"]
        first, length = rng.randrange(len(_WORDS)), rng.randint(12, 40)
        text = " ".join((_WORDS * 2)[first : first + length]).capitalize() + "."
        if schema is not None:
            text = json.dumps(_sample(schema, schema, rng), separators=(",", ":"))
        tokens = _TOKEN.findall(text)
        wanted = 64 * rng.randint(1, 6) if _REASONS.match(self.model) and effort not in ("none", "minimal") else 0
        reasoning = min(wanted, limit)
        kept = tokens[: limit - reasoning]
        name = tool["name"] if tool and kept else None
        return _Output("".join(kept), kept, name, reasoning, cut=wanted + len(tokens) > limit)


def _unique(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()


def _count(value: Any) -> int:
    """The tokens of every text in *value*."""
    if isinstance(value, str):
        return len(_TOKEN.findall(value))
    if isinstance(value, dict):
        return 85 if value.get("type") in _NOT_TEXT else sum(map(_count, value.values()))
    return sum(map(_count, value)) if isinstance(value, list) else int(value is not None)


def _count_prompt(items: list[Any], *also: Any) -> int:
    """The tokens of a conversation: as OpenAI's, with 3 around each message and 3 to begin the answer."""
    return 3 + sum(3 + _count(item) for item in items) + sum(map(_count, also))


def _totals(names: tuple[str, str], prompt: int, outputs: list[_Output]) -> Json:
    answered = sum(output.reasoning + len(output.tokens) for output in outputs)
    return {f"{names[0]}_tokens": prompt, f"{names[1]}_tokens": answered, "total_tokens": prompt + answered}


def _cached(prompt: int) -> int:
    return max(1024, prompt // 256 * 128) if prompt > 1024 else 0


def _tool(body: Json, prompt: Any) -> Json | None:
    """The function to call, in chat's form or that of responses. None: answer with a text."""
    offered: list[Json] = [tool.get("function", tool) for tool in body.get("tools") or () if tool["type"] == "function"]
    choice = body.get("tool_choice")
    if not offered or choice == "none":
        return None
    if isinstance(choice, dict):
        name = choice.get("function", choice).get("name")
        if named := [tool for tool in offered if tool["name"] == name]:
            return named[0]
    for item in reversed(prompt) if choice != "required" else ():
        if item.get("role") == "tool" or item.get("type") == "function_call_output":
            return None  # the tool has answered: calling it again would keep an agent busy for ever
        if item.get("role") == "user":
            return offered[0] if re.search("weather|tool", json.dumps(item.get("content")), re.IGNORECASE) else None
    return offered[0] if choice == "required" else None


def _sample(schema: Json, root: Json, rng: random.Random, depth: int = 0) -> Any:
    """A value that fits a simple JSON schema; a recursive one ends after a few levels."""
    if "$ref" in schema:
        schema = reduce(getitem, schema["$ref"].split("/")[1:], root)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return _sample(schema[key][0 if depth < 4 else -1], root, rng, depth + 1)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else rng.choice(schema["enum"])
    kind = schema.get("type", "object" if "properties" in schema else "string")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            return {name: _sample(part, root, rng, depth + 1) for name, part in schema.get("properties", {}).items()}
        case "array":
            size = schema.get("minItems", 1 if depth < 4 else 0)
            return [_sample(schema.get("items", {}), root, rng, depth + 1) for _ in range(size)]
        case "integer" | "number" as number:
            low = math.ceil(schema.get("minimum", min(1, schema.get("maximum", 1))))
            value = rng.randint(low, math.floor(schema.get("maximum", low + 99)))
            return value if number == "integer" else float(value)
        case "boolean" | "null" as simple:
            return rng.random() < 0.5 if simple == "boolean" else None
    return rng.choice(_WORDS)


def _sse(data: Json, event: str = "") -> bytes:
    return (f"event: {event}\n" * bool(event) + f"data: {json.dumps(data, separators=(',', ':'))}\n\n").encode()


def _chunked(call: _Call, head: Json, choices: list[list[Json]], body: Json) -> _Answer:
    """The plain answer, and a stream of its choices side by side with the usage last, if that was asked for."""
    unset = {"usage": None} if call.usage_asked else {}
    chunks = [{**head, "choices": [choice], **unset} for choice in chain(*zip_longest(*choices)) if choice]
    if call.usage_asked:
        chunks.append({**head, "choices": [], "usage": body["usage"]})
    return _Answer(body, [*map(_sse, chunks), b"data: [DONE]\n\n"], len(chunks) - 1 if call.usage_asked else None)


def _chat(call: _Call) -> _Answer:
    body, messages, n = call.body, call.prompt("messages", list), call.number("n", 1, 128)
    limit = call.number("max_completion_tokens", call.number("max_tokens", sys.maxsize))
    effort, form = body.get("reasoning_effort", ""), body.get("response_format")
    outputs = [call.write(messages, limit, index, effort, form) for index in range(n)]
    usage = _totals(("prompt", "completion"), _count_prompt(messages, body.get("tools"), form), outputs)
    usage["prompt_tokens_details"] = {"cached_tokens": _cached(usage["prompt_tokens"]), "audio_tokens": 0}
    usage["completion_tokens_details"] = {
        "reasoning_tokens": sum(output.reasoning for output in outputs),
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    }
    head = {"id": call.id("chatcmpl-", 29), "object": "chat.completion", "created": call.created, "model": call.model}
    tail = {"service_tier": call.tier, "system_fingerprint": "fp_0392822090"}
    choices, streams = [], []
    for index, output in enumerate(outputs):
        message: Json = {"role": "assistant", "content": output.text, "refusal": None, "annotations": []}
        first: Json = {"role": "assistant", "content": "", "refusal": None}
        deltas: list[Json] = [{"content": token} for token in output.tokens]
        if output.tool:
            opened = {"id": call.id("call_", 24), "type": "function"}
            named = {"name": output.tool, "arguments": ""}
            message |= {"content": None, "tool_calls": [{**opened, "function": {**named, "arguments": output.text}}]}
            first |= {"content": None, "tool_calls": [{"index": 0, **opened, "function": named}]}
            deltas = [{"tool_calls": [{"index": 0, "function": {"arguments": token}}]} for token in output.tokens]
        place: Json = {"index": index, "logprobs": None, "finish_reason": None}
        finish = {"finish_reason": "length" if output.cut else "tool_calls" if output.tool else "stop"}
        choices.append({**place, "message": message, **finish})
        streams.append([{**place, "delta": delta} for delta in (first, *deltas)] + [{**place, "delta": {}, **finish}])
    plain = {**head, "choices": choices, "usage": usage, **tail}
    return _chunked(call, {**head, "object": "chat.completion.chunk", **tail}, streams, plain)


def _batch(value: Any) -> list[Any]:
    """The inputs in *value*: a text, a list of texts, a list of tokens or a list of those."""
    return [value] if isinstance(value, str) or isinstance(value[0], int) else list(value)


def _completions(call: _Call) -> _Answer:
    prompts, limit = _batch(call.prompt("prompt", str, list)), call.number("max_tokens", 16)
    outputs = [call.write(prompt, limit, index) for prompt in prompts for index in range(call.number("n", 1, 128))]
    head = {"id": call.id("cmpl-", 29), "object": "text_completion", "created": call.created, "model": call.model}
    choices, streams = [], []
    for index, output in enumerate(outputs):
        blank: Json = {"text": "", "index": index, "logprobs": None, "finish_reason": None}
        last = {**blank, "finish_reason": "length" if output.cut else "stop"}
        choices.append({**last, "text": output.text})
        streams.append([*({**blank, "text": token} for token in output.tokens), last])
    usage = _totals(("prompt", "completion"), sum(map(_count, prompts)), outputs)
    return _chunked(call, head, streams, {**head, "choices": choices, "usage": usage})


def _embeddings(call: _Call) -> _Answer:
    inputs = _batch(call.prompt("input", str, list))
    size, data = call.number("dimensions", _DIMENSIONS.get(call.model, 1536), 3072), []
    for index, text in enumerate(inputs):
        rng = random.Random(f"{call.seed}/{json.dumps(text)}")
        direction = [rng.uniform(-1, 1) for _ in range(size)]
        length = math.hypot(*direction)
        vector: Any = [value / length for value in direction]
        if call.body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    usage = dict.fromkeys(("prompt_tokens", "total_tokens"), sum(map(_count, inputs)))
    return _Answer({"object": "list", "data": data, "model": call.model, "usage": usage}, [])


def _models() -> _Answer:
    names = [*_SNAPSHOTS, *_SNAPSHOTS.values(), *_DIMENSIONS]
    data = [{"id": name, "object": "model", "created": 1715367049, "owned_by": "openai"} for name in names]
    return _Answer({"object": "list", "data": data}, [])


_ECHOED: Json = dict.fromkeys(("instructions", "max_output_tokens", "previous_response_id", "user"))
_ECHOED |= {"metadata": {}, "parallel_tool_calls": True, "store": True, "temperature": 1.0, "tool_choice": "auto"}
_ECHOED |= {"tools": [], "text": {"format": {"type": "text"}}, "reasoning": {"effort": None, "summary": None}}
_ECHOED |= {"top_p": 1.0, "truncation": "disabled", "service_tier": "auto"}


def _responses(call: _Call) -> _Answer:
    body = {name: value for name, value in call.body.items() if value is not None}
    prompt, form = call.prompt("input", str, list), body.get("text", {}).get("format")
    items = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    effort, limit = body.get("reasoning", {}).get("effort", ""), call.number("max_output_tokens", sys.maxsize)
    output = call.write(items, limit, effort=effort, form=form)
    input_tokens = _count_prompt(items, body.get("instructions"), body.get("tools"), form)
    usage = _totals(("input", "output"), input_tokens, [output])
    usage["input_tokens_details"] = {"cached_tokens": _cached(input_tokens)}
    usage["output_tokens_details"] = {"reasoning_tokens": output.reasoning}
    status = "incomplete" if output.cut else "completed"
    written: list[Json] = []
    if output.reasoning:
        written.append({"id": call.id("rs_", 48), "type": "reasoning", "summary": []})
    if output.tool:
        item: Json = {"id": call.id("fc_", 48), "type": "function_call", "status": status, "name": output.tool}
        written.append({**item, "call_id": call.id("call_", 24), "arguments": output.text})
    elif output.tokens:
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": output.text}
        item = {"id": call.id("msg_", 48), "type": "message", "status": status, "role": "assistant"}
        written.append({**item, "content": [part]})
    start: Json = {"id": call.id("resp_", 48), "object": "response", "created_at": call.created}
    start |= {"status": "in_progress", "error": None, "incomplete_details": None, "model": call.model, "output": []}
    start |= {**{name: body.get(name, default) for name, default in _ECHOED.items()}, "usage": None}
    final = {**start, "status": status, "output": written, "service_tier": call.tier, "usage": usage}
    final["incomplete_details"] = {"reason": "max_output_tokens"} if output.cut else None
    numbered = enumerate(_response_events(start, final, output.tokens))
    events = [_sse({**event, "sequence_number": number}, event["type"]) for number, event in numbered]
    return _Answer(final, events, len(events) - 1)


def _response_events(start: Json, final: Json, tokens: list[str]) -> Iterator[Json]:
    yield {"type": "response.created", "response": start}
    yield {"type": "response.in_progress", "response": start}
    for index, item in enumerate(final["output"]):
        place, opened = {"item_id": item["id"], "output_index": index}, item
        inside: list[Json] = []
        if item["type"] == "function_call":
            kind, opened = "response.function_call_arguments", {**item, "status": "in_progress", "arguments": ""}
            inside += ({"type": f"{kind}.delta", "delta": token, **place} for token in tokens)
            inside += [{"type": f"{kind}.done", "arguments": item["arguments"], "name": item["name"], **place}]
        elif item["type"] == "message":
            kind, opened = "response.output_text", {**item, "status": "in_progress", "content": []}
            [part], place["content_index"] = item["content"], 0
            inside += [{"type": "response.content_part.added", "part": {**part, "text": ""}, **place}]
            inside += ({"type": f"{kind}.delta", "delta": token, "logprobs": [], **place} for token in tokens)
            inside += [{"type": f"{kind}.done", "text": part["text"], "logprobs": [], **place}]
            inside += [{"type": "response.content_part.done", "part": part, **place}]
        yield {"type": "response.output_item.added", "item": opened, "output_index": index}
        yield from inside
        yield {"type": "response.output_item.done", "item": item, "output_index": index}
    yield {"type": f"response.{final['status']}", "response": final}


_POSTS = {"chat/completions": _chat, "completions": _completions, "embeddings": _embeddings, "responses": _responses}


class _Listener(ThreadingHTTPServer):
    """The listening socket, and a thread for each connection until stop() ends them all."""

    allow_reuse_port = False  # two servers on one port would share the calls out at random
    request_queue_size = 128

    def __init__(self, practice: PracticeServer) -> None:
        self.practice, self.stopping = practice, threading.Event()
        self.connections: dict[threading.Thread, socket.socket] = {}
        super().__init__((practice.host, practice.port), _Handler)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), name="practice-server", daemon=True)
        self.thread.start()

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for the host's name, which may take seconds
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        arguments = (request, client_address)
        thread = threading.Thread(target=self.process_request_thread, args=arguments, name="practice-call", daemon=True)
        self.connections[thread] = request
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        super().process_request_thread(request, client_address)
        self.connections.pop(threading.current_thread(), None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # an OSError is a client that went away: nobody's mistake
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()
        for thread, connection in list(self.connections.items()):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(5)
        self.thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "practice", ""
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of a user's tests clean."""

    def _serve(self) -> None:
        practice, started = self.server.practice, time.perf_counter()
        identity, headers = practice._identity(), {name.lower(): value for name, value in self.headers.items()}
        route = _ROUTE.fullmatch(urlsplit(self.path).path)
        rest = route["rest"] if route else ""
        known = rest in _POSTS if self.command == "POST" else rest == "models" and self.command == "GET"
        request, fault, status = None, "", 200
        try:
            raw = self._read_body(headers)
            with suppress(ValueError, RecursionError):
                request = json.loads(raw)
            fault = practice._fault(self.path, headers, raw)
            answer = self._answer(route if known else None, request, headers, fault, identity)
        except _Refusal as refusal:
            status, answer = refusal.status, _Answer({"error": refusal.error}, [])
        if self.server.stopping.wait(practice.latency_s):
            raise ConnectionAbortedError
        if fault == "disconnect":
            status, answer = 0, _Answer({}, [])
        stream = isinstance(request, dict) and bool(request.get("stream"))
        usage, request_id = answer.body.get("usage"), "req_" + _unique(identity)[:32]
        usage_sent = usage is not None and not fault and not (stream and answer.events)
        endpoint = rest.replace("/", ".") if known else "other"
        about = (self.command, self.path, endpoint, request, headers)
        exchange = Exchange(*about, status, stream, usage, answer.body.get("id"), request_id, usage_sent)
        practice._keep(exchange)  # before the answer: whoever has read that finds this
        if fault == "disconnect":
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("x-request-id", request_id)
        self.send_header("openai-version", "2020-10-01")
        self.send_header("openai-processing-ms", str(round((time.perf_counter() - started) * 1000)))
        if fault and status != 200:
            self.send_header("retry-after-ms", "1")
        if stream and answer.events:
            self._stream(answer, fault, exchange)
        else:
            self._plain(json.dumps(answer.body).encode(), fault)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _plain(self, body: bytes, fault: str) -> None:
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "stream-disconnect":
            self.close_connection, body = True, body[: len(body) // 2]
        self.wfile.write(body)

    def _stream(self, answer: _Answer, fault: str, exchange: Exchange) -> None:
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        events = answer.events[: min(3, len(answer.events) - 2)] if fault else answer.events
        if fault == "stream-error" and exchange.endpoint == "responses":
            flat = {**_Refusal(500).error, "type": "error", "sequence_number": len(events)}
            events.append(_sse(flat, "error"))
        elif fault == "stream-error":
            events.append(_sse({"error": _Refusal(500).error}))
        for index, event in enumerate(events):
            if index and self.server.stopping.wait(self.server.practice.chunk_delay_s):
                raise ConnectionAbortedError
            if index == answer.usage_at:
                self.server.practice._keep(replace(exchange, usage_sent=True))
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
        if fault == "stream-disconnect":
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _read_body(self, headers: Mapping[str, str]) -> bytes:
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not length.isdecimal():
            self.close_connection = True  # where this request ends is not known
            raise _Refusal(411, "The practice server needs a Content-Length.")
        left = int(length)
        if left > MAX_BODY_BYTES:
            while left and (part := self.rfile.read(min(left, 1 << 20))):
                left -= len(part)  # an answer before the last byte could be lost in the client's broken pipe
            raise _Refusal(413, f"The request has {length} bytes; at most {MAX_BODY_BYTES} are allowed.")
        raw = self.rfile.read(left)
        if len(raw) < left:
            raise ConnectionAbortedError
        return raw

    def _answer(
        self, route: re.Match[str] | None, request: Any, headers: Mapping[str, str], fault: str, identity: str
    ) -> _Answer:
        if not _FAULT.fullmatch(fault):
            raise _Refusal(400, f"x-practice-error is {fault!r}, not a status or {_FAULT.pattern.strip('|')}.")
        if fault.isdecimal():
            raise _Refusal(int(fault))
        if not (headers.get("authorization", "").removeprefix("Bearer").strip() or headers.get("api-key")):
            raise _Refusal(401, "You didn't provide an API key: put it into the Authorization or api-key header.")
        if route is None:
            raise _Refusal(404, f"Unknown request URL: {self.command} {self.path}.", code="unknown_url")
        if self.command == "GET":
            return _models()
        if not isinstance(request, dict):
            raise _Refusal(400, "We could not parse the JSON body of your request.")
        if fault == "stream-error" and not request.get("stream"):
            raise _Refusal(500)
        try:
            return _POSTS[route["rest"]](_Call(request, route, self.server.practice.seed, identity))
        except _Refusal:
            raise
        except Exception as exc:  # the caller's mistake in most cases, and told in every case
            raise _Refusal(400, f"The practice server cannot read this request: {exc!r}.") from exc

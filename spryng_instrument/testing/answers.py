"""What the practice server answers: each endpoint's reply, whole and as the events of its stream.

Invariant: an answer and its usage follow from the seed and what was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import struct
import sys
import time
from collections.abc import Iterator
from functools import reduce
from itertools import chain, count, zip_longest
from operator import getitem
from typing import Any, NamedTuple
from urllib.parse import unquote

Json = dict[str, Any]

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


class Refusal(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str = "", param: str | None = None, code: str | None = None) -> None:
        kind, usual_code, usual_message = _ERRORS.get(status) or _ERRORS[500 if status >= 500 else 400]
        super().__init__(message or usual_message)
        self.status = status
        self.error = {"message": str(self), "type": kind, "param": param, "code": code if message else usual_code}


class Answer(NamedTuple):
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


class Call:
    """A request to be answered, with ids of its own and chance that only its prompt decides."""

    def __init__(self, body: Json, route: re.Match[str], seed: int, identity: str) -> None:
        self.body, self.seed, self.created = body, seed, int(time.time())
        self.ids = (unique(f"{identity}/{number}") for number in count())
        model = body.get("model") or unquote(route["deployment"] or "")
        if not isinstance(model, str) or not model:
            raise Refusal(400, "you must provide a model parameter", "model", "missing_required_parameter")
        if not route["azure"] and not _FAMILIES.match(model):
            raise Refusal(400, f"The requested model '{model}' does not exist.", "model", "model_not_found")
        if body.get("stream_options") and not body.get("stream"):
            raise Refusal(400, "'stream_options' is only allowed when 'stream' is enabled.", "stream_options")
        self.model = _SNAPSHOTS.get(model, model)
        self.tier = "default" if body.get("service_tier") in (None, "auto") else body["service_tier"]
        self.usage_asked = bool((body.get("stream_options") or {}).get("include_usage"))

    def id(self, prefix: str, length: int) -> str:
        return prefix + next(self.ids)[:length]

    def prompt(self, name: str, *kinds: type) -> Any:
        value = self.body.get(name)
        if value is None:
            raise Refusal(400, f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
        if not isinstance(value, kinds) or not value:
            raise Refusal(400, f"Invalid value for '{name}': {json.dumps(value)[:80]}.", name, "invalid_value")
        return value

    def number(self, name: str, default: int, at_most: int = sys.maxsize) -> int:
        value = self.body.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= at_most):
            raise Refusal(400, f"'{name}' is {value!r}, not an integer from 1 to {at_most}.", name, "invalid_value")
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


def unique(identity: str) -> str:
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


def sse(data: Json, event: str = "") -> bytes:
    return (f"event: {event}\n" * bool(event) + f"data: {json.dumps(data, separators=(',', ':'))}\n\n").encode()


def _chunked(call: Call, head: Json, choices: list[list[Json]], body: Json) -> Answer:
    """The plain answer, and a stream of its choices side by side with the usage last, if that was asked for."""
    unset = {"usage": None} if call.usage_asked else {}
    chunks = [{**head, "choices": [choice], **unset} for choice in chain(*zip_longest(*choices)) if choice]
    if call.usage_asked:
        chunks.append({**head, "choices": [], "usage": body["usage"]})
    return Answer(body, [*map(sse, chunks), b"data: [DONE]\n\n"], len(chunks) - 1 if call.usage_asked else None)


def _chat(call: Call) -> Answer:
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


def _completions(call: Call) -> Answer:
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


def _embeddings(call: Call) -> Answer:
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
    return Answer({"object": "list", "data": data, "model": call.model, "usage": usage}, [])


def models() -> Answer:
    names = [*_SNAPSHOTS, *_SNAPSHOTS.values(), *_DIMENSIONS]
    data = [{"id": name, "object": "model", "created": 1715367049, "owned_by": "openai"} for name in names]
    return Answer({"object": "list", "data": data}, [])


_ECHOED: Json = dict.fromkeys(("instructions", "max_output_tokens", "previous_response_id", "user"))
_ECHOED |= {"metadata": {}, "parallel_tool_calls": True, "store": True, "temperature": 1.0, "tool_choice": "auto"}
_ECHOED |= {"tools": [], "text": {"format": {"type": "text"}}, "reasoning": {"effort": None, "summary": None}}
_ECHOED |= {"top_p": 1.0, "truncation": "disabled", "service_tier": "auto"}


def _responses(call: Call) -> Answer:
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
    events = [sse({**event, "sequence_number": number}, event["type"]) for number, event in numbered]
    return Answer(final, events, len(events) - 1)


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


POSTS = {"chat/completions": _chat, "completions": _completions, "embeddings": _embeddings, "responses": _responses}

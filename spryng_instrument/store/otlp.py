"""The destination otlp+https://: an OpenTelemetry collector, by the semantic conventions for generative AI.

A message becomes a span of kind client: its trace id is the message's id, so that a span sent twice is the same span.
A batch becomes points of the histogram gen_ai.client.token.usage, of delta temporality. OTLP itself deduplicates
nothing: where a batch's answer was lost, it is sent again, and a backend then has those points twice. To be exact, sum
gen_ai.usage.input_tokens and output_tokens of spans, each `spryng.message.id` once; or bill from another destination.

Spans go first: points are sent only of messages whose spans were taken.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from itertools import pairwise
from typing import Any
from uuid import UUID

from spryng_instrument.message import Message, Usage
from spryng_instrument.store.base import Receipt
from spryng_instrument.store.rows import micros
from spryng_instrument.store.transport import Answer, BatchPoster, Fate

log = logging.getLogger("spryng_instrument")

METRIC = "gen_ai.client.token.usage"
BOUNDS = tuple(4.0**power for power in range(14))
"""The buckets that the conventions advise: 1, 4, 16 ... 67108864 tokens."""
_EDGES = (float("-inf"), *BOUNDS, float("inf"))
_OPERATIONS = {"chat.completions": "chat", "responses": "chat", "completions": "text_completion"}
"""Ours by the conventions' names; where they have none, ours stands."""


class OtlpDestination(BatchPoster):
    """A collector that takes OTLP over HTTP, in protobuf, traces and metrics both.

    Args:
        url: its base, "https://collector.example.com:4318".
        api_key: sent as a Bearer token.

    Raises:
        ModuleNotFoundError: the extra [otlp] is not installed.
    """

    content_type = "application/x-protobuf"

    def __init__(self, url: str, api_key: str | None) -> None:
        import opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 as metrics
        import opentelemetry.proto.collector.trace.v1.trace_service_pb2 as traces

        base = url.rstrip("/").removesuffix("/v1/traces")
        super().__init__(f"{base}/v1/traces", api_key)
        self._metrics_url = f"{base}/v1/metrics"
        self._traces, self._metrics = traces, metrics

    def record(self, messages: Sequence[Message], *, timeout_s: float = 5.0) -> Receipt:
        """Deliver spans, and then the points of those that were taken.

        Raises:
            StoreError: not now; deliver all of them again later.
        """
        receipt = super().record(messages, timeout_s=timeout_s)
        taken = [
            message
            for message, outcome in zip(messages, receipt.outcomes, strict=True)
            if outcome == "recorded" and message.usage is not None
        ]
        body = self._points_of(taken)
        if body:
            answer = self._post(self._metrics_url, body)
            if answer.ok:
                rejected, why = self._rejected(answer, self._metrics.ExportMetricsServiceResponse, self._metrics_url)
                problem = f"{rejected} point(s): {why}" if rejected else None
            else:
                problem = self._final(self._metrics_url, answer).reason
            if problem:
                log.error("%s rejects metrics of %d message(s), whose spans it has: %s", self._metrics_url, len(taken),
                          problem)  # fmt: skip
        return receipt

    def check(self, *, timeout_s: float = 5.0) -> None:
        """Send no spans, and no points.

        Raises:
            StoreError: it cannot be reached, or takes nothing from us.
        """
        super().check(timeout_s=timeout_s)
        answer = self._post(self._metrics_url, b"")
        if not answer.ok:
            self._final(self._metrics_url, answer)

    def _body(self, messages: Sequence[Message]) -> bytes:
        request = self._traces.ExportTraceServiceRequest()
        spans = _scope(request.resource_spans.add(), "scope_spans").spans
        for message in messages:
            _fill(spans.add(), message)
        return bytes(request.SerializeToString())

    def _read(self, answer: Answer, messages: Sequence[Message]) -> list[Fate]:
        rejected, why = self._rejected(answer, self._traces.ExportTraceServiceResponse, self.url)
        if not rejected:
            if why:
                log.warning("%s says: %s", self.url, why)
            return [Fate("recorded")] * len(messages)
        if rejected >= len(messages):
            return [Fate("refused", why or "rejected without a reason")] * len(messages)
        return self._halves(messages)  # to find those; the spans that were taken keep their ids

    def _rejected(self, answer: Answer, response: Any, url: str) -> tuple[int, str]:
        """How many it did not take, and what it says."""
        from google.protobuf import json_format, message

        found = response()
        try:
            if answer.kind == "application/json":
                json_format.Parse(answer.body or b"{}", found, ignore_unknown_fields=True)
            else:
                found.ParseFromString(answer.body)
        except (message.DecodeError, json_format.ParseError) as exc:
            raise self._not_understood(url, answer, f"no {response.DESCRIPTOR.name} ({exc})") from None
        partial = found.partial_success
        count = partial.rejected_spans if hasattr(partial, "rejected_spans") else partial.rejected_data_points
        return count, self._without_key(partial.error_message)[:300]

    def _points_of(self, messages: Sequence[Message]) -> bytes:
        """The body of what their tokens add up to; empty if there are none."""
        counts: defaultdict[tuple[tuple[str, Any], ...], list[int]] = defaultdict(list)
        for message in messages:
            usage = message.usage or Usage()
            for kind, tokens in (("input", usage.input_tokens), ("output", usage.output_tokens)):
                if tokens is not None:
                    counts[(*_common(message).items(), ("gen_ai.token.type", kind))].append(tokens)
        if not counts:
            return b""
        request = self._metrics.ExportMetricsServiceRequest()
        metric = _scope(request.resource_metrics.add(), "scope_metrics").metrics.add()
        metric.name, metric.unit, metric.description = METRIC, "{token}", "Number of input and output tokens used."
        metric.histogram.aggregation_temporality = 1  # delta
        start, end = min(_span_ns(each)[0] for each in messages), max(_span_ns(each)[1] for each in messages)
        for attributes, of_each in counts.items():
            point = metric.histogram.data_points.add(
                start_time_unix_nano=start, time_unix_nano=end, count=len(of_each), sum=sum(of_each),
                min=min(of_each), max=max(of_each), explicit_bounds=BOUNDS,
                bucket_counts=[sum(low < each <= high for each in of_each) for low, high in pairwise(_EDGES)],
            )  # fmt: skip
            _attach(point, dict(attributes))
        return bytes(request.SerializeToString())


def _common(message: Message) -> dict[str, Any]:
    """What a span and a point both say of a message."""
    host, _, port = (message.host or "").partition(":")
    azure = host.endswith(".openai.azure.com")
    return {
        "gen_ai.operation.name": _OPERATIONS.get(message.operation, message.operation),
        "gen_ai.provider.name": "azure.ai.openai" if azure else "openai",
        "gen_ai.request.model": message.request_model,
        "gen_ai.response.model": message.response_model,
        "server.address": host or None,
        "server.port": int(port) if port.isdigit() else None,
        "error.type": message.error,
        "spryng.key": message.key,
    }


def _of_span(message: Message) -> dict[str, Any]:
    usage = message.usage or Usage()
    return {
        **_common(message),
        "gen_ai.conversation.id": message.conversation_id,
        "gen_ai.response.id": message.response_id,
        "gen_ai.usage.input_tokens": usage.input_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.usage.cache_creation.input_tokens": usage.cache_write_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
        "openai.response.service_tier": message.service_tier,
        "http.response.status_code": message.http_status,
        "spryng.message.id": message.id,
        "spryng.status": message.status,
        "spryng.tags": list(message.tags) or None,
        "spryng.query": message.query,
        **{f"spryng.property.{name}": value for name, value in (message.properties or {}).items()},
    }


def _fill(span: Any, message: Message) -> None:
    attributes = _of_span(message)
    span.trace_id, span.span_id = _ids(message.id)
    span.name = " ".join(filter(None, (attributes["gen_ai.operation.name"], message.request_model or message.model)))
    span.kind = 3  # client
    span.start_time_unix_nano, span.end_time_unix_nano = _span_ns(message)
    if message.status in ("error", "cancelled"):
        span.status.code = 2  # error
        span.status.message = message.error or message.status
    _attach(span, attributes)


def _ids(message_id: str) -> tuple[bytes, bytes]:
    """A trace id and a span id, always the same for a message's id."""
    try:
        trace = UUID(message_id).bytes
    except ValueError:
        trace = sha256(message_id.encode()).digest()[:16]
    return trace, sha256(trace).digest()[:8]


def _span_ns(message: Message) -> tuple[int, int]:
    end: datetime = message.timestamp + timedelta(milliseconds=message.latency_ms or 0)
    return micros(message.timestamp) * 1000, micros(end) * 1000


def _scope(resource: Any, name: str) -> Any:
    _attach(resource.resource, {"service.name": "spryng_instrument"})
    scope = getattr(resource, name).add()
    scope.scope.name = "spryng_instrument"
    return scope


def _attach(where: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if value is None:
            continue
        into = where.attributes.add(key=name).value
        if isinstance(value, list):
            into.array_value.values.extend(type(into)(string_value=each) for each in value)
        elif isinstance(value, bool):
            into.bool_value = value
        elif isinstance(value, int) and abs(value) < 2**63:
            into.int_value = value
        elif isinstance(value, (int, float)):
            into.double_value = value
        else:
            into.string_value = value

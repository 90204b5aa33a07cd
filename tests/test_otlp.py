"""The destination otlp+https://: OTLP by the conventions for generative AI, as OpenTelemetry's own packages read it."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_DELTA
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, openai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.semconv.attributes import error_attributes, http_attributes, server_attributes

from spryng_instrument.errors import SettingsError, StoreError
from spryng_instrument.message import Message, Usage, new_id
from spryng_instrument.store import open_destination, open_store
from spryng_instrument.store.otlp import OtlpDestination

from .scripted import Reply, Request, ScriptedServer

NOW = datetime(2026, 11, 22, 12, tzinfo=timezone.utc)
NOW_NS = int(NOW.timestamp()) * 10**9
PROTOBUF = {"content-type": "application/x-protobuf"}


class Collector:
    """It decodes what comes with opentelemetry-proto. `script` has answers by path."""

    def __init__(self) -> None:
        self.spans: dict[bytes, Any] = {}
        self.points: list[Any] = []
        self.metrics: list[Any] = []
        self.resources: list[Any] = []
        self.bad: set[str] = set()
        self.script: dict[str, list[Reply]] = {"/v1/traces": [], "/v1/metrics": []}
        self.server = ScriptedServer(self.answer)
        self.destination = OtlpDestination(self.server.url, "secret")

    def answer(self, request: Request) -> Reply:
        assert request.headers["content-type"] == "application/x-protobuf"
        assert request.headers["authorization"] == "Bearer secret"
        script = self.script[request.path]
        reply = script.pop(0) if script else Reply(200, b"", PROTOBUF)
        if reply.status != 200:
            return reply
        if request.path == "/v1/metrics":
            for metrics in ExportMetricsServiceRequest.FromString(request.body).resource_metrics:
                self.resources.append(metrics.resource)
                self.metrics += metrics.scope_metrics[0].metrics
            self.points = [point for metric in self.metrics for point in metric.histogram.data_points]
            return reply
        rejected = 0
        for resource in ExportTraceServiceRequest.FromString(request.body).resource_spans:
            self.resources.append(resource.resource)
            for span in resource.scope_spans[0].spans:
                if attributes(span)["spryng.message.id"] in self.bad:
                    rejected += 1
                else:
                    self.spans[span.span_id] = span
        if rejected:
            response = ExportTraceServiceResponse()
            response.partial_success.rejected_spans = rejected
            response.partial_success.error_message = "too old"
            return Reply(200, response.SerializeToString(), PROTOBUF)
        return reply


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.destination.close()
    collector.server.close()


def message(**fields: Any) -> Message:
    fields = {
        "id": new_id(), "key": "acme", "operation": "chat.completions", "timestamp": NOW, "request_model": "gpt-4o",
        "response_model": "gpt-4o-2024", "host": "api.openai.com", "usage": Usage(input_tokens=9, output_tokens=3),
        **fields,
    }  # fmt: skip
    return Message(**fields)


def attributes(thing: Any) -> dict[str, Any]:
    found = {}
    for each in thing.attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return found


def test_a_message_is_a_span(collector: Collector) -> None:
    """It carries the message's own time, ids and counts, by the conventions' names."""
    sent = message(
        conversation_id="c-42", tags=("a", "b"), latency_ms=1500.0, response_id="chatcmpl-1", service_tier="default",
        usage=Usage(input_tokens=9, output_tokens=3, cached_tokens=0, reasoning_tokens=2),
        properties={"plan": "pro", "seats": 3, "share": 0.5, "trial": True}, host="127.0.0.1:8000",
    )  # fmt: skip
    assert collector.destination.record([sent]).outcomes == ("recorded",)

    [span] = collector.spans.values()
    assert span.name == "chat gpt-4o"
    assert span.kind == Span.SPAN_KIND_CLIENT
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (NOW_NS, NOW_NS + 1_500_000_000)
    assert span.trace_id.hex() == sent.id.replace("-", "")
    assert len(span.span_id) == 8
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert attributes(span) == {
        gen_ai_attributes.GEN_AI_OPERATION_NAME: gen_ai_attributes.GenAiOperationNameValues.CHAT.value,
        gen_ai_attributes.GEN_AI_PROVIDER_NAME: gen_ai_attributes.GenAiProviderNameValues.OPENAI.value,
        gen_ai_attributes.GEN_AI_REQUEST_MODEL: "gpt-4o",
        gen_ai_attributes.GEN_AI_RESPONSE_MODEL: "gpt-4o-2024",
        gen_ai_attributes.GEN_AI_RESPONSE_ID: "chatcmpl-1",
        gen_ai_attributes.GEN_AI_CONVERSATION_ID: "c-42",
        gen_ai_attributes.GEN_AI_USAGE_INPUT_TOKENS: 9,
        gen_ai_attributes.GEN_AI_USAGE_OUTPUT_TOKENS: 3,
        gen_ai_attributes.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: 0,
        gen_ai_attributes.GEN_AI_USAGE_REASONING_OUTPUT_TOKENS: 2,
        openai_attributes.OPENAI_RESPONSE_SERVICE_TIER: "default",
        server_attributes.SERVER_ADDRESS: "127.0.0.1",
        server_attributes.SERVER_PORT: 8000,
        "spryng.key": "acme",
        "spryng.message.id": sent.id,
        "spryng.status": "ok",
        "spryng.tags": ["a", "b"],
        "spryng.property.plan": "pro",
        "spryng.property.seats": 3,
        "spryng.property.share": 0.5,
        "spryng.property.trial": True,
    }
    assert all(attributes(each) == {"service.name": "spryng_instrument"} for each in collector.resources)


def test_a_failure_is_an_error(collector: Collector) -> None:
    """Its span has the error's type and status, and no tokens; nothing is added to the metric."""
    collector.destination.record([message(status="error", error="RateLimitError", http_status=429, usage=None)])
    [span] = collector.spans.values()
    assert span.status.code == Status.STATUS_CODE_ERROR
    found = attributes(span)
    assert found[error_attributes.ERROR_TYPE] == "RateLimitError"
    assert found[http_attributes.HTTP_RESPONSE_STATUS_CODE] == 429
    assert gen_ai_attributes.GEN_AI_USAGE_INPUT_TOKENS not in found
    assert collector.points == []


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("chat.completions", "CHAT"),
        ("responses", "CHAT"),
        ("completions", "TEXT_COMPLETION"),
        ("embeddings", "EMBEDDINGS"),
    ],
)
def test_operations_have_the_conventions_names(collector: Collector, operation: str, name: str) -> None:
    """What the conventions have a name for is called by it; other operations keep ours."""
    collector.destination.record([message(operation=operation)])
    [span] = collector.spans.values()
    known = gen_ai_attributes.GenAiOperationNameValues[name].value
    assert attributes(span)[gen_ai_attributes.GEN_AI_OPERATION_NAME] == known


def test_a_batch_is_a_histogram(collector: Collector) -> None:
    """Tokens of a batch by operation, model, host, customer and type: delta, in the advised buckets, exact in sum."""
    collector.destination.record(
        [
            message(usage=Usage(input_tokens=1, output_tokens=70)),
            message(usage=Usage(input_tokens=5)),
            message(key="other", usage=Usage(input_tokens=0, output_tokens=1)),
            message(usage=None),
        ]
    )
    [metric] = collector.metrics
    assert metric.name == gen_ai_metrics.GEN_AI_CLIENT_TOKEN_USAGE
    assert metric.unit == "{token}"
    assert metric.histogram.aggregation_temporality == AGGREGATION_TEMPORALITY_DELTA
    kind = gen_ai_attributes.GEN_AI_TOKEN_TYPE
    found = {(attributes(each)["spryng.key"], attributes(each)[kind]): each for each in collector.points}
    assert {key: (each.count, each.sum) for key, each in found.items()} == {
        ("acme", "input"): (2, 6), ("acme", "output"): (1, 70), ("other", "input"): (1, 0), ("other", "output"): (1, 1),
    }  # fmt: skip
    point = found["acme", "input"]
    assert (point.min, point.max) == (1, 5)
    assert list(point.explicit_bounds) == [4**power for power in range(14)]
    assert list(point.bucket_counts)[:4] == [1, 0, 1, 0]
    assert sum(point.bucket_counts) == point.count
    assert point.time_unix_nano >= point.start_time_unix_nano == NOW_NS
    assert {*attributes(point)} == {
        gen_ai_attributes.GEN_AI_OPERATION_NAME, gen_ai_attributes.GEN_AI_PROVIDER_NAME, kind,
        gen_ai_attributes.GEN_AI_REQUEST_MODEL, gen_ai_attributes.GEN_AI_RESPONSE_MODEL,
        server_attributes.SERVER_ADDRESS, "spryng.key",
    }  # fmt: skip


def test_sent_again_is_the_same_span(collector: Collector) -> None:
    """Answers lost or failed, of spans or points: in the end each message is one span, of the same ids."""
    batch = [message() for _ in range(5)] + [message(id="any id")]
    collector.script["/v1/traces"] = [Reply(200, lost=True), Reply(503)]
    collector.script["/v1/metrics"] = [Reply(500)]
    for _ in range(3):
        with pytest.raises(StoreError):
            collector.destination.record(batch)
    assert collector.destination.record(batch).outcomes == ("recorded",) * 6
    assert len(collector.spans) == 6
    assert sum(point.sum for point in collector.points) == 6 * 12  # no point was sent before the spans were taken


def test_rejected_spans_are_refused(collector: Collector) -> None:
    """A partial success is no success: rejected spans are found, refused, and add nothing to the metric."""
    batch = [message() for _ in range(7)]
    collector.bad = {batch[4].id}
    receipt = collector.destination.record(batch)
    assert receipt.outcomes == ("recorded",) * 4 + ("refused",) + ("recorded",) * 2
    assert receipt.reasons == {batch[4].id: "too old"}
    assert len(collector.spans) == 6
    assert sum(point.sum for point in collector.points) == 6 * 12


def _partial(count: int) -> Reply:
    response = ExportMetricsServiceResponse()
    response.partial_success.rejected_data_points = count
    response.partial_success.error_message = "no deltas here"
    return Reply(200, response.SerializeToString(), PROTOBUF)


@pytest.mark.parametrize(
    "reply",
    [
        _partial(2),
        Reply(200, b'{"partialSuccess": {"rejectedDataPoints": "2", "errorMessage": "no deltas here"}}',
              {"content-type": "application/json"}),
        Reply(400, b"no deltas here", {"content-type": "text/plain"}),
    ],
    ids=["protobuf", "json", "400"],
)  # fmt: skip
def test_rejected_points_are_reported(collector: Collector, reply: Reply, caplog: pytest.LogCaptureFixture) -> None:
    """Points that were rejected are an error in the log; their spans are there."""
    collector.script["/v1/metrics"] = [reply]
    assert collector.destination.record([message()]).outcomes == ("recorded",)
    assert [record.levelno for record in caplog.records if record.name == "spryng_instrument"] == [logging.ERROR]
    assert "no deltas here" in caplog.text


@pytest.mark.parametrize("path", ["/v1/traces", "/v1/metrics"])
@pytest.mark.parametrize(
    "reply",
    [
        *(Reply(status) for status in (401, 403, 404, 429, 500)),
        Reply(200, b"\xff\xff\xff", PROTOBUF),
        Reply(200, b"{", {"content-type": "application/json"}),
        Reply(200, b"<html>", {"content-type": "text/html"}),
    ],
    ids=lambda reply: f"{reply.status} {reply.body!r}",
)
def test_held(collector: Collector, path: str, reply: Reply) -> None:
    """Whatever may pass, and what is no answer of OTLP, holds the batch back."""
    collector.script[path] = [reply]
    with pytest.raises(StoreError) as failed:
        collector.destination.record([message()])
    assert path in str(failed.value)
    assert "secret" not in str(failed.value)


def test_write_only() -> None:
    """Such a destination can be delivered to and not be read."""
    destination = open_destination("otlp+https://collector.example.com:4318", None)
    assert isinstance(destination, OtlpDestination)
    assert destination.url == "https://collector.example.com:4318/v1/traces"
    with pytest.raises(SettingsError, match="cannot be read"):
        open_store("otlp+https://collector.example.com:4318")


def test_without_the_extra() -> None:
    """Where opentelemetry-proto is not installed, the error has the pip line."""
    code = (
        "import sys\n"
        "sys.modules['opentelemetry.proto'] = None\n"
        "from spryng_instrument.store import open_destination\n"
        "open_destination('otlp+https://collector.example.com:4318')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    assert "pip install 'spryng-instrument[otlp]'" in done.stderr.splitlines()[-1]

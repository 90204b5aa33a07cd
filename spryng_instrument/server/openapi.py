"""The OpenAPI document of the server, made from the types of the messages themselves."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from spryng_instrument import __version__
from spryng_instrument.api import FIELDS, MAX_MESSAGES, MAX_PROPERTIES, MAX_TAGS, MAX_TEXT, Result, Results, TrackUsage
from spryng_instrument.periods import MOMENTS
from spryng_instrument.reports import CONVERSATIONS, WINDOWS
from spryng_instrument.server.reading import MAX_IDS, MAX_PAGE, MAX_ROWS, PARAMETERS
from spryng_instrument.store.base import GROUPS
from spryng_instrument.usage import COUNTS, DETAILS, MOST

_COUNT = {"type": ["integer", "null"], "minimum": 0, "maximum": MOST}
_NAME = {"minLength": 1, "maxLength": MAX_TEXT, "pattern": r"\S"}
_ERRORS = {
    400: "A field or parameter that cannot be; the error names it.",
    401: "No API key, or one that is unknown or revoked.",
    403: "The key lacks the scope.",
    503: "The ledger does not answer now, or too many questions wait; try again after Retry-After.",
}
_BODY_ERRORS = {
    408: "The body did not arrive in time.",
    412: "From a process of a newer version, with a field that is not known here: update the server; send it again.",
    413: "Too many messages, or too large: send fewer at a time.",
    415: "Not JSON, or compressed by something else than gzip.",
}
_ABOUT: dict[str, dict[str, Any]] = {
    "by": {"description": "What a row is.", "schema": {"enum": list(GROUPS), "default": "key"}},
    "window": {"description": "The groups of each day or month.", "schema": {"enum": list(WINDOWS)}},
    "key": {"description": "Only this customer."},
    "no_key": {
        "description": "Only messages without a key.",
        "schema": {"enum": ["true", "false"], "default": "false"},
    },
    "tag": {
        "description": "Only messages with this tag; given again: with all of them.",
        "schema": {"type": "array", "items": {"type": "string"}},
    },
    "model": {"description": "Only this model, as it answered."},
    "conversation": {"description": "Only this conversation."},
    "since": {"description": f"From then: {MOMENTS}."},
    "until": {"description": f"Until then: {MOMENTS}. A date includes that day, a time is exclusive."},
    "month": {"description": "One month, 2026-11, instead of since and until."},
    "zone": {"description": "IANA zone of days, months, and dates without one.", "schema": {"default": "UTC"}},
    "format": {"schema": {"enum": ["json", "csv"], "default": "json"}},
    "id": {
        "description": f"`messageId` of a message; given again: of others, up to {MAX_IDS}.",
        "schema": {"type": "array", "maxItems": MAX_IDS, "items": {"type": "string"}},
    },
    "after": {"description": "`next` of the page before."},
    "limit": {"schema": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": 100}},
    "/usage limit": {
        "description": "Rows at most: those that cost the most; `more` says whether there are others. Where it is not "
        f"given: {CONVERSATIONS:,} by conversation, but for CSV; else all.",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_ROWS},
    },
}


@cache
def document() -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    _, schemas = msgspec.json.schema_components(
        [TrackUsage, Result, Results], ref_template="#/components/schemas/{name}"
    )
    _refine(schemas["TrackUsage"])
    schemas["Batch"] = {
        "type": "object",
        "required": ["messages"],
        "additionalProperties": False,
        "properties": {"messages": {"type": "array", "maxItems": MAX_MESSAGES, "items": _ref("TrackUsage")}},
    }
    schemas["Taken"] = {
        "type": "object",
        "required": ["id", "status"],
        "properties": {"id": {"type": "string"}, "status": {"enum": ["recorded", "duplicate"]}},
    }
    schemas["Error"] = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Track Usage API",
            "version": __version__,
            "description": "One request is one message of a customer, counted once.",
        },
        "security": [{"key": []}],
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "An API key, bare or after `Bearer `.",
                }
            },
        },
        "paths": {
            "/trackUsage": {
                "post": _sending(
                    "Record one message.", "TrackUsage", "Taken",
                    {409: "Another message has this id, and is kept.", 422: "The ledger cannot keep it."},
                )
            },
            "/trackUsage/batch": {"post": _sending("Record messages, each for itself.", "Batch", "Results", {})},
            "/usage": {"get": _asking("/usage", "Usage by customer, tag, conversation, model, day, month.", csv=True)},
            "/messages": {"get": _asking("/messages", "Messages, newest first.")},
            "/conversations": {"get": _asking("/conversations", "Conversations, the one that began last first.")},
            "/bills": {"get": _asking("/bills", "The bills that were closed, whole, the last one first.")},
            "/recorded": {"get": _asking("/recorded", "Which of some messages are in the ledger.")},
            "/metrics": {"get": _asking("", "Counts and times of the server, for Prometheus.", "text/plain")},
            "/healthz": {"get": _probe("Whether the process answers.")},
            "/readyz": {"get": _probe("Whether its ledger takes messages.")},
            "/openapi.json": {"get": _probe("This document.")},
        },
    }  # fmt: skip


def _refine(schema: dict[str, Any]) -> None:
    """Say of a message what its types alone do not."""
    properties = schema["properties"]
    assert set(properties) == set(FIELDS)
    for name in ("writer", "sequence"):  # what a process of ours says of itself: with it, less is checked
        del properties[name]
    schema["anyOf"] = [{"required": [name], "properties": {name: {"type": "string"}}} for name in ("key", "user")]
    schema["additionalProperties"] = False
    for name in ("key", "user", "conversationId", "model", "requestModel", "operation", "messageId"):
        properties[name] = {"type": ["string", "null"], **_NAME}
    properties["messageId"]["pattern"] = r"^[!-~]+$"
    properties["tags"] = {"type": ["array", "null"], "maxItems": MAX_TAGS, "items": {"type": "string", **_NAME}}
    for name in ("retries", "httpStatus"):
        properties[name] = dict(_COUNT)
    for name in ("latency", "timeToFirstToken"):
        properties[name] = {"type": ["number", "null"], "minimum": 0, "maximum": MOST}
    properties["usage"] = {
        "type": ["object", "null"],
        "minProperties": 1,
        "additionalProperties": False,
        "properties": {
            **{name: dict(_COUNT) for name in COUNTS},
            **{name: {"type": ["object", "null"], "additionalProperties": dict(_COUNT)} for name in DETAILS},
        },
    }
    properties["customProperties"]["maxProperties"] = MAX_PROPERTIES
    for name, about in properties.items():
        if name in ("messageId", "timestamp", "latency", "conversationId"):
            about["description"] = _FIELD_NOTES[name]


_FIELD_NOTES = {
    "messageId": "Unique to the message: sent again with the same, it is recorded once. Default: a new one.",
    "timestamp": "When it happened, with its zone; at most 5 minutes ahead of the server. Default: now.",
    "latency": "Milliseconds.",
    "conversationId": "Relates many messages to one conversation.",
}


def _sending(summary: str, body: str, answer: str, errors: dict[int, str]) -> dict[str, Any]:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}},
        "responses": _responses({"application/json": {"schema": _ref(answer)}}, {**_ERRORS, **_BODY_ERRORS, **errors}),
    }


def _asking(path: str, summary: str, kind: str = "application/json", *, csv: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {}}
    if csv:
        content["text/csv"] = {}
    parameters = [
        {"name": name, "in": "query", "schema": {"type": "string"}, **_ABOUT.get(f"{path} {name}", _ABOUT[name])}
        for name in PARAMETERS.get(path, ())
    ]
    return {"summary": summary, "parameters": parameters, "responses": _responses(content, _ERRORS)}


def _probe(summary: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "security": [],
        "responses": _responses({"application/json": {}}, {503: _ERRORS[503]}),
    }


def _responses(content: dict[str, Any], errors: dict[int, str]) -> dict[str, Any]:
    error = {"application/json": {"schema": _ref("Error")}}
    return {
        "200": {"description": "Done.", "content": content},
        **{str(status): {"description": text, "content": error} for status, text in sorted(errors.items())},
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}

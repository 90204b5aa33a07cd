"""A row per endpoint: which requests are messages, how their answers give usage, and which are left out, and why.

Paths are those below the base URL, "{}" for one segment. They are matched from their end, because gateways and Azure
put more in front.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from spryng_instrument.tallies import EventTally, ResponseTally, RunTally, SessionTally, Tally
from spryng_instrument.usage import fields_of


class Endpoint(NamedTuple):
    """How one operation of the API is read."""

    operation: str
    tally: type[Tally] = EventTally
    """Reads its streams."""
    wants_stream_options: bool = False
    """Whether its streams report usage only when asked by stream_options.include_usage."""
    defers: bool = False
    """Whether its answer may come before the work is done: usage is then told by a later read of the same id."""
    kind: Literal["call", "read", "session", "turns"] = "call"
    """What a request is: a call; a later read of what a call began, no message of its own; for agents, the creation of
    a session, or a read of its turns, which are the messages."""


_READS_RESPONSE = Endpoint("responses", ResponseTally, kind="read")
_READS_RUN = Endpoint("threads.runs", RunTally, kind="read")
_READS_BATCH = Endpoint("batches", kind="read")
_READS_TURNS = Endpoint("agents.turns", kind="turns")

ENDPOINTS: dict[str, Endpoint] = {
    "POST /chat/completions": Endpoint("chat.completions", Tally, wants_stream_options=True),
    "POST /completions": Endpoint("completions", Tally, wants_stream_options=True),
    "POST /edits": Endpoint("edits", Tally),
    "POST /embeddings": Endpoint("embeddings"),
    "POST /responses": Endpoint("responses", ResponseTally, defers=True),
    "GET /responses/{}": _READS_RESPONSE,
    "POST /responses/{}/cancel": _READS_RESPONSE,
    "POST /responses/compact": Endpoint("responses.compact", ResponseTally),
    "POST /decisions": Endpoint("decisions"),
    "POST /images/generations": Endpoint("images.generations"),
    "POST /images/edits": Endpoint("images.edits"),
    "POST /images/variations": Endpoint("images.variations"),
    "POST /audio/transcriptions": Endpoint("audio.transcriptions"),
    "POST /audio/translations": Endpoint("audio.translations"),
    "POST /audio/speech": Endpoint("audio.speech"),
    "POST /moderations": Endpoint("moderations"),
    "POST /videos": Endpoint("videos"),
    "POST /videos/edits": Endpoint("videos.edits"),
    "POST /videos/extensions": Endpoint("videos.extensions"),
    "POST /videos/{}/remix": Endpoint("videos.remix"),
    # A run is one message from its creation to its end, however many tool outputs are handed in meanwhile.
    "POST /threads/runs": Endpoint("threads.runs", RunTally, defers=True),
    "POST /threads/{}/runs": Endpoint("threads.runs", RunTally, defers=True),
    "POST /threads/{}/runs/{}/submit_tool_outputs": _READS_RUN,
    "POST /threads/{}/runs/{}/cancel": _READS_RUN,
    "GET /threads/{}/runs/{}": _READS_RUN,
    "GET /threads/{}/runs": _READS_RUN,
    # A batch is one message, with its totals. Its lines are in a file that anybody may read, anywhere, in parts or
    # twice: what it says could not be counted exactly once.
    "POST /batches": Endpoint("batches", defers=True),
    "POST /batches/{}/cancel": _READS_BATCH,
    "GET /batches/{}": _READS_BATCH,
    "GET /batches": _READS_BATCH,
    "POST /agents/sessions": Endpoint("agents.sessions", SessionTally, defers=True, kind="session"),
    "GET /agents/sessions/{}/events": _READS_TURNS,
    "GET /agents/sessions/{}/turns": _READS_TURNS,
    "GET /agents/sessions/{}/turns/{}": _READS_TURNS,
    "GET /agents/sessions/{}/subagents/{}/turns": _READS_TURNS,
    "GET /agents/sessions/{}/subagents/{}/turns/{}": _READS_TURNS,
}

NOT_COUNTED: dict[str, str] = {
    "GET /chat/completions": "repeats what stored completions have reported when they were made",
    "GET /chat/completions/{}": "repeats what a stored completion has reported when it was made",
    "POST /chat/completions/{}": "changes the metadata of a stored completion, and repeats its usage",
    "GET /threads/{}/runs/{}/steps": "parts of a run, which reports them in all",
    "GET /threads/{}/runs/{}/steps/{}": "a part of a run, which reports it in all",
    "POST /threads/{}/runs/{}": "changes the metadata of a run",
    "POST /evals/{}/runs": "evaluations run at OpenAI, and report a table per model",
    "GET /evals/{}/runs": "evaluations run at OpenAI, and report a table per model",
    "GET /evals/{}/runs/{}": "evaluations run at OpenAI, and report a table per model",
    "POST /evals/{}/runs/{}": "cancels one, in older SDKs",
    "POST /evals/{}/runs/{}/cancel": "evaluations run at OpenAI, and report a table per model",
    "GET /evals/{}/runs/{}/output_items": "samples of an evaluation",
    "GET /evals/{}/runs/{}/output_items/{}": "a sample of an evaluation",
    "POST /fine_tuning/alpha/graders/run": "alpha; reports a table per model that has no fixed shape",
    "GET /agents/sessions": "their usage is cumulative; their turns are the messages",
    "GET /agents/sessions/{}": "its usage is cumulative; its turns are the messages",
    "POST /agents/sessions/{}": "its usage is cumulative; its turns are the messages",
    "POST /conversations/{}/items": "stores items that responses have reported when they were made",
    "GET /conversations/{}/items": "repeats items that responses have reported when they were made",
    "GET /conversations/{}/items/{}": "repeats an item that a response has reported when it was made",
    "GET /responses/{}/input_items": "repeats items that responses have reported when they were made",
}
"""Operations whose answers have usage, and that are no messages: why."""

_OBJECTS = {
    "chat.completion": "chat.completions",
    "chat.completion.chunk": "chat.completions",
    "text_completion": "completions",
    "response": "responses",
    "list": "embeddings",
}

_Pattern = tuple[tuple[str, ...], Endpoint]
_by_length: dict[tuple[str, int], list[_Pattern]] = {}
for _name, _row in ENDPOINTS.items():
    _method, _, _template = _name.partition(" /")
    _segments = tuple(_template.split("/"))
    _by_length.setdefault((_method, len(_segments)), []).append((_segments, _row))
_LONGEST = max(length for _, length in _by_length)
_POSTS = {name.removeprefix("POST "): row for name, row in ENDPOINTS.items() if name.startswith("POST ")}


def endpoint_of(method: str, url: str) -> Endpoint | None:
    """The endpoint of a request, or None if it is no message.

    Args:
        url: as the SDK holds it: a path below the base URL, or a whole URL; Azure's deployment paths too.
    """
    if method == "post":
        found = _POSTS.get(url)
        if found is not None:
            return found
    method = method.upper()
    if method not in ("POST", "GET"):
        return None
    path = str(url).partition("?")[0].partition("#")[0]
    if "://" in path:
        path = path.partition("://")[2].partition("/")[2]
    segments = path.strip("/").split("/")
    for length in range(min(_LONGEST, len(segments)), 0, -1):
        end = segments[-length:]
        for pattern, row in _by_length.get((method, length), ()):
            if all(part in (segment, "{}") for part, segment in zip(pattern, end, strict=True)):
                return row
    return None


def operation_of(reply: object) -> str | None:
    """The operation that made a reply, by its `object` field."""
    return _OBJECTS.get(str(fields_of(reply).get("object")))

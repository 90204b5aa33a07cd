"""The destination cloudevents+https://: OpenMeter, or whatever else takes batches of CloudEvents 1.0.

An event's id is the message's, and its source is always the same: who deduplicates by both, as OpenMeter does, counts
each message once however often it is sent. The other end answers for a batch as a whole.

    id, time    the message's
    source      "spryng_instrument"
    type        "spryng.message"
    subject     the customer's key; "(no key)" if there is none
    data        the message's other fields by their names in `message.Message`, those of its usage beside them: a meter
                sums `$.input_tokens`. What was not reported is left out. `model` is the one that answered, else the one
                asked for. `messages` is 1 for a message to bill and 0 for one that failed or was cancelled: to count
                messages, sum `$.messages`; a meter that counts events would count failures too, unless it groups by
                `$.status`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from spryng_instrument.api import NO_KEY
from spryng_instrument.message import BILLABLE, Message
from spryng_instrument.store.transport import Answer, BatchPoster, Fate

SOURCE = "spryng_instrument"
TYPE = "spryng.message"


class CloudEventsDestination(BatchPoster):
    """A collector of CloudEvents.

    Args:
        url: where batches are posted, "https://openmeter.example.com/api/v1/events".
        api_key: its key.
    """

    content_type = "application/cloudevents-batch+json"
    gzips = False  # the HTTP binding says nothing of compression, and OpenMeter takes none

    def _body(self, messages: Sequence[Message]) -> bytes:
        return msgspec.json.encode([event_of(message) for message in messages])

    def _read(self, answer: Answer, messages: Sequence[Message]) -> list[Fate]:
        return [Fate("recorded")] * len(messages)


def event_of(message: Message) -> dict[str, Any]:
    """The event of one message."""
    data = msgspec.to_builtins(message)
    del data["id"], data["timestamp"]
    usage = data.pop("usage", {})
    facts = {"status": message.status, "model": message.model, "messages": int(message.status in BILLABLE)}
    return {
        "specversion": "1.0",
        "id": message.id,
        "source": SOURCE,
        "type": TYPE,
        "subject": message.key or NO_KEY,
        "time": message.timestamp,
        "datacontenttype": "application/json",
        "data": {name: value for name, value in {**data, **usage, **facts}.items() if value is not None},
    }

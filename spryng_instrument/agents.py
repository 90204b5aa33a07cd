"""Agents' sessions: each turn is one message, of whoever created the session, wherever and however often it is read.

A session's own usage is cumulative and may grow for days, so it is never counted. Who created it is kept in a file, as
for work that is done in the background, and every turn that is seen to end makes its message from that: always the same
one, so that who reads it again makes a duplicate and not a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spryng_instrument.message import BILLABLE, Status
from spryng_instrument.observe import Call, Read
from spryng_instrument.usage import Reading, fields_of

TURN_ENDS = ("agent.session.turn.completed", "agent.session.turn.failed", "agent.session.turn.cancelled")


class SessionCall(Call):
    """The call that creates a session. It is no message itself, but says whose the turns are."""

    def _waits(self, status: Status, reading: Reading) -> bool:
        return status in BILLABLE and reading.response_id is not None

    def see(self, chunk: object) -> bool:
        token = super().see(chunk)
        _settle_event(self, chunk)
        return token


class TurnsRead(Read):
    """A look at the events or the turns of a session."""

    def see(self, chunk: object) -> bool:
        _settle_event(self, chunk)
        return False

    def take(self, item: object) -> None:
        self._recorder.settle_turn(fields_of(item))


def _settle_event(call: Call, event: object) -> None:
    try:
        fields = fields_of(event)
        if fields.get("type") in TURN_ENDS:
            turn: Mapping[str, Any] = fields_of(fields.get("turn"))
            call._recorder.settle_turn({**turn, "usage": turn.get("usage") or fields.get("usage")})
    except Exception:
        call._recorder.bug("reading a turn")

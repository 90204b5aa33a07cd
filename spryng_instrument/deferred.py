"""Calls that were answered before their work was done: background responses, runs, batches.

Their usage comes with a later read of the same id, perhaps in another process. So the message is made when the call is,
whole but for its usage, and kept in a file of its own, named by the API's id, until such a read has completed it.

Exactly once: whoever completes it makes the same message from the same answer, with the same id. So two readers at
once, or one that was killed before the file was gone, make a duplicate that the ledger drops, never a second message.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from threading import get_ident
from typing import Any

import msgspec

from spryng_instrument.message import Message, Status, decode, encode
from spryng_instrument.usage import Reading, read_fields

FOLDER = "deferred"
"""The folder, within the journal's."""
KEPT_S = 7 * 24 * 3600.0
"""How long a message waits for its usage. Then it is recorded as it is: usage not reported."""

TURNED = ".turned"
"""Suffix of the file beside that of a session of which a turn is recorded."""

WAITING = ("queued", "in_progress", "requires_action", "cancelling", "validating", "finalizing")
"""What an answer says of work that is not done."""


class Deferred:
    """The messages of a journal folder that wait for their usage. Any process that shares it may complete them."""

    def __init__(self, journal: Path) -> None:
        self.folder = journal / FOLDER

    def keep(self, answer_id: str, message: Message) -> None:
        """Keep *message*, on the disk, until the answer of that id is read. Raises OSError if the disk takes none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(answer_id)
        hidden = path.with_suffix(f".{os.getpid()}-{get_ident()}.new")
        with open(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(encode(message))
            file.flush()
            os.fdatasync(file.fileno())  # no beat comes after it, as with the journal; and such calls are rare
        os.replace(hidden, path)

    def waiting(self, answer_id: str) -> Message | None:
        """The message that waits for the answer of that id."""
        return _read(self._path(answer_id))

    def completed(self, answer_id: str, reading: Reading) -> Message | None:
        """The message that waits for the answer of that id, completed by what the answer says. None: none does."""
        message = self.waiting(answer_id)
        return None if message is None else complete(message, reading)

    def turn(self, session_id: str, turn: Mapping[str, Any]) -> Message | None:
        """The message of a turn, of an agent's session that waits for its turns. None: it does not."""
        session = self.waiting(session_id)
        if session is None:
            return None
        turn_id, created_at = str(turn.get("id")), turn.get("created_at")
        digest = sha256(turn_id.encode("utf-8", "backslashreplace")).hexdigest()
        timestamp = session.timestamp
        if type(created_at) is int and 0 < created_at < 1 << 33:
            timestamp = datetime.fromtimestamp(created_at, timezone.utc)
        message = msgspec.structs.replace(
            session,
            id=f"{session.id[:14]}7{digest[:3]}-8{digest[3:6]}-{digest[6:18]}",
            timestamp=timestamp,
            operation="agents.turns",
            response_id=turn_id,
            latency_ms=None,
            time_to_first_token_ms=None,
        )
        return complete(message, read_fields(turn))

    def turned(self, session_id: str) -> None:
        """A turn of a session is recorded: the session waits on, but owes no message any more."""
        path = self._path(session_id)
        with suppress(OSError):
            os.utime(path)
            path.with_suffix(TURNED).touch()

    def forget(self, answer_id: str) -> None:
        """Its message is recorded."""
        self.drop(self._path(answer_id))

    def drop(self, path: Path) -> None:
        """Remove one of `overdue`."""
        path.unlink(missing_ok=True)
        path.with_suffix(TURNED).unlink(missing_ok=True)

    def overdue(self, age_s: float = KEPT_S) -> Iterator[tuple[Path, Message | None]]:
        """The files of those that nobody has read for so long, with the message that is owed, if one is."""
        for path in self._files():
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > age_s:
                    message = _read(path)
                    if message is not None:
                        yield path, None if path.with_suffix(TURNED).exists() else message

    @property
    def count(self) -> int:
        """How many wait."""
        return len(self._files())

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))

    def _path(self, answer_id: str) -> Path:
        return self.folder / f"{sha256(answer_id.encode('utf-8', 'backslashreplace')).hexdigest()[:40]}.json"


def complete(message: Message, reading: Reading) -> Message:
    """*message* with what its finished answer says: the same for everybody who reads the same answer."""
    status: Status = "ok"
    error = None
    usage = reading.usage
    used = usage is not None and any((usage.input_tokens, usage.output_tokens, usage.total_tokens))
    if used and message.operation == "batches" and reading.status in ("cancelled", "expired"):
        status = "incomplete"  # the requests that were done by then are billed
    elif reading.status == "cancelled":
        status = "cancelled"
    elif reading.failure is not None or reading.status == "expired":
        status, error = "error", reading.failure or "expired"
    return msgspec.structs.replace(
        message,
        status=status,
        error=error,
        usage=usage,
        tool_usage=reading.tool_usage,
        response_model=reading.model or message.response_model,
        service_tier=reading.service_tier or message.service_tier,
    )


def _read(path: Path) -> Message | None:
    try:
        return decode(path.read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None

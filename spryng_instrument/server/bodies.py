"""Reads a request's body: so many bytes at most, decompressed too, and within a time."""

from __future__ import annotations

import zlib
from urllib.parse import parse_qsl

import anyio
from starlette.requests import ClientDisconnect, Request

from spryng_instrument.api import MAX_BYTES

BODY_S = 20.0
"""Seconds for a body to arrive."""
MAX_FORM = 64 * 1024
"""Bytes of a form."""


class Refused(Exception):
    """A request that is answered with an error: its status, the field that is wrong, and what is wrong with it."""

    def __init__(self, status: int, field: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.field, self.message, self.headers = status, field, message, headers


async def read_body(request: Request) -> bytes:
    """The body of a request of JSON.

    Raises:
        Refused: it is too large, too slow, of another type, or damaged.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page can send others to any server, without being asked
        raise Refused(415, "Content-Type", f"{kind!r} is not taken; send application/json")
    encoding = ", ".join(request.headers.getlist("content-encoding")).strip().lower() or "identity"
    if encoding not in ("identity", "gzip"):
        raise Refused(415, "Content-Encoding", f"{encoding!r} is not taken; send gzip or none")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > MAX_BYTES:
        raise _too_large()
    try:
        with anyio.fail_after(BODY_S):
            return await (_plain(request) if encoding == "identity" else _unzipped(request))
    except TimeoutError:
        raise Refused(408, "body", f"did not arrive within {BODY_S:.0f} s", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise Refused(400, "body", "was cut off") from None


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form that a page has sent.

    Raises:
        Refused: it is none, too large or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Refused(415, "Content-Type", f"{kind!r} is not taken; send a form")
    try:
        with anyio.fail_after(BODY_S):
            body = await _plain(request, MAX_FORM)
        return dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=20))
    except TimeoutError:
        raise Refused(408, "body", f"did not arrive within {BODY_S:.0f} s", {"Connection": "close"}) from None
    except (ClientDisconnect, ValueError):
        raise Refused(400, "body", "is no form that can be read") from None


async def _plain(request: Request, most: int = MAX_BYTES) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _too_large(most)
        parts.append(part)
    return b"".join(parts)


async def _unzipped(request: Request) -> bytes:
    unzip = zlib.decompressobj(wbits=31)
    parts: list[bytes] = []
    size = zipped = 0
    try:
        async for part in request.stream():
            if unzip.eof and part:
                raise Refused(400, "body", "has something after its gzip data")
            text = unzip.decompress(part, MAX_BYTES + 1 - size)
            size += len(text)
            zipped += len(part)
            if max(size, zipped) > MAX_BYTES:
                raise _too_large()
            if unzip.unused_data:
                raise Refused(400, "body", "has something after its gzip data")
            parts.append(text)
    except zlib.error as exc:
        raise Refused(400, "body", f"is no gzip data: {exc}") from None
    if not unzip.eof:
        raise Refused(400, "body", "is gzip data that is cut off")
    return b"".join(parts)


def _too_large(most: int = MAX_BYTES) -> Refused:
    return Refused(413, "body", f"is larger than {most} bytes; send less at a time")

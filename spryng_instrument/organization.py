"""What OpenAI itself has counted and charged: its organization's usage and costs, by day in UTC.

They are read with the SDK's own client, by path: not every SDK that is supported has methods for them. Nothing of it is
a message, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Dict, NamedTuple  # noqa: UP035
from urllib.parse import urlencode, urlsplit

import msgspec

from spryng_instrument.errors import OrganizationError, SettingsError
from spryng_instrument.settings import without_secrets

if TYPE_CHECKING:
    import openai

BASE_URL = "https://api.openai.com/v1"
KEYS = "https://platform.openai.com/settings/organization/admin-keys"
DAYS_A_PAGE = 31
"""The most that the usage endpoints give."""


class Counts(NamedTuple):
    """What is counted of calls."""

    requests: int = 0
    input_tokens: int = 0
    """Cached ones included."""
    cached_tokens: int = 0
    output_tokens: int = 0


class _Endpoint(NamedTuple):
    group_by: tuple[str, ...] = ("model",)
    tells_tokens: bool = False
    """Whether it counts in the tokens that the API reports to who calls."""


USAGE: dict[str, _Endpoint] = {
    "completions": _Endpoint(("model", "batch"), True),
    "embeddings": _Endpoint(tells_tokens=True),
    "images": _Endpoint(),
    "audio_speeches": _Endpoint(),
    "audio_transcriptions": _Endpoint(),
    "moderations": _Endpoint(),
    "decisions": _Endpoint(("model", "batch"), True),
}
"""The endpoints below /organization/usage whose requests are messages. "completions" has responses, too."""


@dataclass(frozen=True, slots=True)
class ModelUsage:
    """What OpenAI has counted for one model on one day, in one of USAGE."""

    day: date
    model: str
    counts: Counts
    batch: bool = False
    """Whether these are the requests of batches."""
    tells_tokens: bool = True
    """Whether tokens are counted, too."""


@dataclass(frozen=True, slots=True)
class Charge:
    """A line item of OpenAI's costs of one day."""

    day: date
    line_item: str | None
    """ "gpt-4o-mini-2024-07-18, input", "web search tool calls"."""
    amount: Decimal
    currency: str = "usd"


@dataclass(frozen=True, slots=True)
class Organization:
    """OpenAI's figures of a stretch of days."""

    usage: Sequence[ModelUsage]
    charges: Sequence[Charge]


def admin_client(environ: Mapping[str, str]) -> openai.OpenAI:
    """The SDK's client, with OPENAI_ADMIN_KEY, for OPENAI_BASE_URL.

    Raises:
        SettingsError: there is no such key.
    """
    import openai

    key = environ.get("OPENAI_ADMIN_KEY")
    if not key:
        raise SettingsError(
            "OPENAI_ADMIN_KEY is not set: OpenAI tells an organization's usage and costs to admin keys only. An owner "
            f"of the organization makes one at {KEYS}"
        )
    return openai.OpenAI(api_key=key, base_url=environ.get("OPENAI_BASE_URL") or BASE_URL)


def host_of(client: openai.OpenAI) -> str:
    """The host that messages to the same API have, as in Message.host."""
    return urlsplit(str(client.base_url)).netloc.rpartition("@")[2].lower()


def fetch(client: openai.OpenAI, since: datetime, until: datetime, projects: Sequence[str] = ()) -> Organization:
    """OpenAI's usage and costs of the days from *since* to *until*, both midnight in UTC.

    Args:
        projects: only these, "proj_...". Empty: the whole organization.

    Raises:
        OrganizationError: they cannot be had.
    """
    query: dict[str, Any] = {"start_time": int(since.timestamp()), "end_time": int(until.timestamp())}
    query |= {"bucket_width": "1d", "limit": DAYS_A_PAGE, "project_ids[]": projects}
    usage, charges = [], []
    for name, endpoint in USAGE.items():
        for day, result in _results(client, f"/organization/usage/{name}", {**query, "group_by[]": endpoint.group_by}):
            counts = Counts(
                result.num_model_requests, result.input_tokens, result.input_cached_tokens or 0, result.output_tokens
            )
            model = result.model or "(unknown)"
            usage.append(ModelUsage(day, model, counts, bool(result.batch), endpoint.tells_tokens))
    for day, result in _results(client, "/organization/costs", {**query, "group_by[]": ["line_item"]}):
        if result.amount is not None and result.amount.value is not None:
            # A float has the digits that it is written with; sometimes it comes as a text.
            amount = Decimal(str(result.amount.value))
            charges.append(Charge(day, result.line_item, amount, (result.amount.currency or "usd").lower()))
    return Organization(usage, charges)


class _Amount(msgspec.Struct):
    value: float | str | None = None
    currency: str | None = None


class _Result(msgspec.Struct):
    num_model_requests: int = 0
    input_tokens: int = 0
    input_cached_tokens: int | None = None
    output_tokens: int = 0
    model: str | None = None
    batch: bool | None = None
    amount: _Amount | None = None
    line_item: str | None = None


class _Bucket(msgspec.Struct):
    start_time: int
    results: list[_Result]


class _Page(msgspec.Struct):
    data: list[_Bucket]
    has_more: bool = False
    next_page: str | None = None


def _results(client: openai.OpenAI, path: str, query: dict[str, Any]) -> Iterator[tuple[date, _Result]]:
    """(day, result) of every page."""
    seen: set[str | None] = set()
    cursor: str | None = None
    while True:
        page = _page(client, path, query if cursor is None else {**query, "page": cursor})
        for bucket in page.data:
            day = datetime.fromtimestamp(bucket.start_time, timezone.utc).date()
            yield from ((day, result) for result in bucket.results)
        seen.add(cursor)
        cursor = page.next_page
        if not page.has_more or cursor is None:
            return
        if cursor in seen:
            raise OrganizationError(f"{path} goes round in circles: it gives the page {cursor!r} again")


def _page(client: openai.OpenAI, path: str, query: dict[str, Any]) -> _Page:
    import openai

    where = f"{without_secrets(str(client.base_url)).rstrip('/')}{path}"
    try:
        # The oldest SDKs write lists in a query in their own way, take no object here, and on Python 3.10 no dict[...].
        answer = client.get(f"{path}?{urlencode(query, doseq=True)}", cast_to=Dict[str, object])  # noqa: UP006
        return msgspec.convert(answer, _Page)
    except (openai.AuthenticationError, openai.PermissionDeniedError) as exc:
        raise OrganizationError(
            f"{where} refuses OPENAI_ADMIN_KEY ({exc.status_code}): {_said(exc)}. It must be an admin key that may "
            f"read usage, and no key of a project; an owner of the organization makes one at {KEYS}"
        ) from exc
    except openai.NotFoundError as exc:
        raise OrganizationError(
            f"{where} is not there (404): usage and costs are told by api.openai.com, and not by every server that "
            "speaks its API. Unset OPENAI_BASE_URL, or set it to OpenAI's"
        ) from exc
    except openai.APIStatusError as exc:
        raise OrganizationError(f"{where} answers {exc.status_code}: {_said(exc)}") from exc
    except openai.APIConnectionError as exc:
        raise OrganizationError(f"{where} cannot be reached: {exc.__cause__ or exc}; try again later") from exc
    except (msgspec.ValidationError, ValueError) as exc:
        raise OrganizationError(f"{where} answers what is no page of usage: {exc}") from exc


def _said(error: openai.APIStatusError) -> str:
    """What the server gave as the reason."""
    body = getattr(error, "body", None)  # the oldest SDKs have it in the message only
    said = body.get("message") if isinstance(body, dict) else None
    return str(said or error.message).rstrip(".")

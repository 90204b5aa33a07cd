"""What every page shares: the request that it answers, the navigation around it, the templates, the files beside it.

A page runs in a thread of the server's readers. It knows who looks only by the question: a signed link has narrowed it.
What is on which page is not known here, but for the names that the navigation shows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.datastructures import QueryParams
from starlette.responses import HTMLResponse, Response

from spryng_instrument import __version__
from spryng_instrument.reports import UsageReport, usage_report
from spryng_instrument.server.answers import Asking
from spryng_instrument.server.dashboard import question as questions
from spryng_instrument.server.dashboard.question import ALL_TIME, PRESETS, Question
from spryng_instrument.server.dashboard.session import Link
from spryng_instrument.server.reading import priced
from spryng_instrument.store.base import Store

NAV = {
    "": "Overview",
    "keys": "Keys",
    "conversations": "Conversations",
    "messages": "Messages",
    "tags": "Tags",
    "models": "Models",
    "bills": "Bills",
    "budgets": "Budgets",
    "health": "Health",
}
SHARED_NAV = ("", "conversations", "messages", "models", "tags")
"""What a customer sees of it."""
_HERE = Path(__file__).parent
_ZONES = (
    "UTC", "Europe/London", "Europe/Berlin", "Europe/Helsinki", "Africa/Lagos", "Asia/Dubai", "Asia/Kolkata",
    "Asia/Singapore", "Asia/Tokyo", "Australia/Sydney", "Pacific/Auckland", "America/Sao_Paulo", "America/New_York",
    "America/Chicago", "America/Denver", "America/Los_Angeles",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a page, by somebody who may have it."""

    store: Store
    answers: Asking
    query: QueryParams
    path: str
    link: Link | None = None
    form_token: str = ""
    """What a form that changes something must carry."""
    signed_in: bool = False

    def question(self, *names: str, preset: str = questions.DEFAULT) -> Question:
        """What is asked for; *names* are parameters beside the filters."""
        return questions.read(self.path, self.query, names=names, preset=preset, link=self.link)

    def report(
        self, by: str, question: Question, window: str | None = None, limit: int | None = None
    ) -> tuple[UsageReport, datetime]:
        """A report, and of when it is."""
        asked = ("report", by, question.where, question.zone, window, limit)
        return self.answers.get(
            asked,
            lambda: usage_report(
                self.store, by, question.where, question.zone, window, priced(self.store), limit=limit
            ),
            lambda it: len(it.rows),
        )

    def html(self, page: str, title: str, question: Question | None, **more: Any) -> Response:
        """A page."""
        names = NAV if self.link is None else SHARED_NAV
        context: dict[str, Any] = {
            "title": title,
            "page": page,
            "asked": self,
            "question": question,
            "nav": [(NAV[each], _nav(each, question, self.link), each == page) for each in names],
            "here": f"{questions.ROOT if self.link is None else questions.SHARED}/{page}".rstrip("/"),
            "presets": [],
            "zones": _ZONES,
            "tables": [],
            **more,
        }
        if question:
            context["presets"] = [
                (text, question.address(page, ALL_TIME, preset=name), question.preset == name)
                for name, text in PRESETS.items()
                if name != "billing" or Path(questions.plans_file()).exists()
            ]
        return html(f"{context.pop('template', 'page')}.html", **context)


def _nav(page: str, question: Question | None, link: Link | None) -> str:
    """Where a page is; the period, the zone, tags and the model stay as they are."""
    if question is None:
        return f"{questions.ROOT}/{page}".rstrip("/")
    return question.address(page, key=None, no_key=None, conversation=None)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(
        static=lambda name: f"{questions.ROOT}/static/{name}?v={static(name)[1]}", version=__version__
    )
    return environment


def html(template: str, status: int = 200, /, **context: Any) -> Response:
    """A template as an answer."""
    return HTMLResponse(_environment().get_template(template).render(**context), status)


@cache
def static(name: str) -> tuple[bytes, str]:
    """A file of ours, and a name of what is in it.

    Raises:
        KeyError: there is none of that name.
    """
    if name not in {path.name for path in (_HERE / "static").iterdir()}:
        raise KeyError(name)
    body = (_HERE / "static" / name).read_bytes()
    return body, hashlib.sha256(body).hexdigest()[:12]

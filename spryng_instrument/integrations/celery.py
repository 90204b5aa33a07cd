"""Whose usage a task is: that of whoever sends it. For Celery, with every pool, retries, chains and eager tasks.

    from spryng_instrument.integrations import celery

    celery.install()  # in the module of the Celery app: where tasks are sent, and in the worker before it forks

A task that is sent within a usage_context carries it in one header of its message, "spryng", and runs within it.
Whoever may write to the broker may so name a customer, as it may run any task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from celery import signals

from spryng_instrument.context import current_scope, usage_context

HEADER = "spryng"
FIELDS = ("key", "conversation_id", "tags", "query", "properties")

_running: WeakKeyDictionary[Any, usage_context] = WeakKeyDictionary()
"""By the task's request, of which each run of a task has its own."""


def install() -> None:
    """Have every task that this process sends carry the usage_context, and every task that it runs enter its own."""
    signals.before_task_publish.connect(_before_publish)
    signals.task_prerun.connect(_prerun)
    signals.task_postrun.connect(_postrun)


def uninstall() -> None:
    """Undo install(). Harmless where it was not called."""
    signals.before_task_publish.disconnect(_before_publish)
    signals.task_prerun.disconnect(_prerun)
    signals.task_postrun.disconnect(_postrun)


def _before_publish(headers: dict[str, Any] | None = None, **_: Any) -> None:
    scope = current_scope()
    if scope is None or headers is None:
        return
    if headers.get("retries") and HEADER in headers:
        return  # a retry belongs to whom its first attempt did, wherever it is asked for
    values = {name: getattr(scope, name) for name in FIELDS if getattr(scope, name)}
    if values:
        headers[HEADER] = {**values, "tags": list(scope.tags)}


def _prerun(task: Any = None, **_: Any) -> None:
    request = task.request
    # Where the message's headers are depends on the version of Celery's protocol. An eager task has no message: it runs
    # where it was called, and its context is there already.
    carried = request.get(HEADER) or (request.headers or {}).get(HEADER)
    if not isinstance(carried, Mapping):
        return
    context = usage_context(**{name: carried[name] for name in FIELDS if name in carried})
    context.__enter__()
    _running[request] = context


def _postrun(task: Any = None, **_: Any) -> None:
    context = _running.pop(task.request, None)
    if context is not None:
        context.__exit__()

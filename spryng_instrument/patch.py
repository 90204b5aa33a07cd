"""The seams in the SDK: `request` on its two base clients, through which every HTTP call goes exactly once.

instrument() wraps them, uninstrument() puts back the very functions that were there. Resources, clients and their
methods stay untouched, so signatures, pickling and isinstance do too. Every released SDK since 1.0
sends plain calls, streams, raw responses, helpers, Azure and `client.post` through this method, retries within it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from spryng_instrument import recorder as recording
from spryng_instrument.agents import SessionCall, TurnsRead
from spryng_instrument.connections import see_anew
from spryng_instrument.context import Scope, current_scope
from spryng_instrument.endpoints import endpoint_of
from spryng_instrument.errors import MissingKeyError, Refusal
from spryng_instrument.integrations import executors
from spryng_instrument.observe import Call, Read
from spryng_instrument.recorder import Recorder
from spryng_instrument.seams import unwrap, wrap
from spryng_instrument.settings import Settings, differences, resolve
from spryng_instrument.sockets import patch_sockets

log = logging.getLogger("spryng_instrument")

SEAMS = ("SyncAPIClient", "AsyncAPIClient")
OPENAI_HOST = "api.openai.com"
RAW_HEADER = "x-stainless-raw-response"

_READS = {"read": Read, "turns": TurnsRead}
NO_SCOPE = Scope()
NO_BODY: dict[str, Any] = {}

_lock = threading.Lock()
_refusing: set[str] = set()
"""Hosts that rejected stream_options: they are not asked again."""
_hosts: dict[int, tuple[object, str]] = {}


def instrument(**arguments: Any) -> None:
    """Record every OpenAI call of this process from now on. See spryng_instrument.instrument."""
    with _lock:
        settings = resolve(arguments)
        if recording.active is not None:
            _say_differences(recording.active.settings, settings, arguments)
            return
        recorder = Recorder(settings)
        _patch()
        if settings.threads:
            executors.install_threads()
        recording.activate(recorder)
        recorder.start()


def uninstrument() -> None:
    """Put the SDK back as it was, and deliver what can be. Harmless where instrument() was not called."""
    with _lock:
        recorder = recording.active
        unwrap()
        see_anew()
        if recorder is not None and recorder.settings.threads:
            executors.uninstall_threads()
        recording.activate(None)
    if recorder is not None:
        recorder.stop()


def seams() -> list[tuple[str, bool]]:
    """The places of the installed SDK that are wrapped, and whether each is there."""
    import openai._base_client as base

    return [(f"{name}.request", callable(getattr(getattr(base, name, None), "request", None))) for name in SEAMS]


def _say_differences(first: Settings, other: Settings, arguments: Mapping[str, Any]) -> None:
    # Only what was given: instrument() again without arguments asks for nothing.
    lines = [line for line in differences(first, other) if arguments.get(line.split(":")[0]) is not None]
    if lines:
        log.warning("instrument() was called again with other settings, which change nothing: %s", "; ".join(lines))


def _patch() -> None:
    import openai._base_client as base

    for name, wrapper in zip(SEAMS, (_sync_request, _async_request), strict=True):
        owner = getattr(base, name, None)
        if owner is None or not wrap(owner, "request", wrapper):
            log.error("this openai has no %s.request: calls through it go on, but are not recorded", name)
    patch_sockets()


def _sync_request(wrapped: Any, client: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    recorder = recording.active
    if recorder is not None and recorder.budgets is not None:
        recorder.budgets.wait()
    call, args, kwargs = _begin(client, args, kwargs)
    if call is None:
        return wrapped(*args, **kwargs)
    while True:
        try:
            reply = wrapped(*args, **kwargs)
        except BaseException as exc:
            if not _refuses_stream_options(call, exc):
                call.failed(exc)
                raise
            args, kwargs = call.unasked
        else:
            if call.resent:
                _do_not_ask(call.host)
            call.replied(reply)
            return reply


async def _async_request(wrapped: Any, client: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    recorder = recording.active
    if recorder is not None and recorder.budgets is not None:
        await recorder.budgets.wait_async()
    call, args, kwargs = _begin(client, args, kwargs)
    if call is None:
        return await wrapped(*args, **kwargs)
    while True:
        try:
            reply = await wrapped(*args, **kwargs)
        except BaseException as exc:
            if not _refuses_stream_options(call, exc):
                call.failed(exc)
                raise
            args, kwargs = call.unasked
        else:
            if call.resent:
                _do_not_ask(call.host)
            call.replied(reply)
            return reply


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_Begun = tuple["Call | None", tuple[Any, ...], dict[str, Any]]


def _begin(client: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Begun:
    """The call that starts here, None if it is no message; and the arguments to send."""
    recorder = recording.active
    if recorder is None:
        return None, args, kwargs
    try:
        options: Any = args[1] if len(args) > 1 else kwargs.get("options")
        endpoint = None if options is None else endpoint_of(options.method, options.url)
        if endpoint is None:
            return None, args, kwargs
        read = _READS.get(endpoint.kind)
        if read is not None:
            return read(recorder, endpoint), args, kwargs
        scope = current_scope() or NO_SCOPE
        key = scope.key or recorder.key_outside()
        body = options.json_data
        if type(body) is not dict:
            body = NO_BODY
        kind = SessionCall if endpoint.kind == "session" else Call
        held = () if recorder.budgets is None else recorder.budgets.admit(key, scope.tags)
        call = kind(recorder, endpoint, scope, key, _host_of(client, options.url), body.get("model"))
        call.held = held
        if recorder.settings.capture_query and call.query is None:
            call.query = _query_of(body)
        # Where only the body says stream, the SDK hands out its text as it came: nothing in there could be hidden.
        if endpoint.wants_stream_options and kwargs.get("stream") and body.get("stream") is True:
            return call, *_ask_for_usage(call, recorder.settings, options, body, args, kwargs)
        if callable(options.post_parser):
            parsing = _copy_of(options)
            parsing.post_parser = call.parsing(options.post_parser)
            return call, *_with_options(parsing, args, kwargs)
        return call, args, kwargs
    except MissingKeyError:
        raise
    except Refusal as refusal:
        error = refusal.error
    except Exception:
        recorder.bug("starting a call")
        return None, args, kwargs
    raise error  # outside of `except`: it is to be seen as it was raised, with nothing of ours as its context


def _ask_for_usage(
    call: Call, settings: Settings, options: Any, body: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Arguments:
    """Have a stream report its usage, where that is safe and the caller has not chosen: in a copy of the request."""
    extra = options.extra_json if isinstance(getattr(options, "extra_json", None), Mapping) else {}
    call.choices = _choices_of({**body, **extra})
    chosen = extra.get("stream_options", body.get("stream_options"))
    if isinstance(chosen, Mapping) and "include_usage" in chosen:
        call.asked = chosen["include_usage"] is True
        return args, kwargs
    if (
        "stream_options" in extra
        or extra.get("stream", True) is not True
        or not (chosen is None or isinstance(chosen, dict))
        or "data_sources" in body
        or "data_sources" in extra
        or _is_raw(options)
        or not _may_ask(call.host, settings)
    ):
        return args, kwargs
    asking = _copy_of(options)
    asking.json_data = {**body, "stream_options": {**(chosen or {}), "include_usage": True}}
    call.asked = call.hides = True
    call.unasked = args, kwargs
    return _with_options(asking, args, kwargs)


def _choices_of(body: Mapping[str, Any]) -> int:
    """How many choices a stream has: n of each prompt."""
    n, prompts = body.get("n"), body.get("prompt")
    count = n if type(n) is int and n > 0 else 1
    if type(prompts) is list and prompts and type(prompts[0]) is not int:  # else it is one, as tokens
        count *= len(prompts)
    return count


def _copy_of(options: Any) -> Any:
    return options.model_copy() if hasattr(options, "model_copy") else options.copy()


def _with_options(options: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    if len(args) > 1:
        return (args[0], options, *args[2:]), kwargs
    return args, {**kwargs, "options": options}


def _is_raw(options: Any) -> bool:
    headers = options.headers
    return isinstance(headers, Mapping) and any(str(name).lower() == RAW_HEADER for name in headers)


def _may_ask(host: str | None, settings: Settings) -> bool:
    if host is None or host in _refusing:
        return False
    hosts = settings.include_usage_hosts
    return host == OPENAI_HOST or host in hosts or host.rsplit(":", 1)[0] in hosts


def _refuses_stream_options(call: Call, exc: BaseException) -> bool:
    """Whether a server may have rejected the call for what we added: then it is sent as the caller made it."""
    if not call.hides or getattr(exc, "status_code", None) not in (400, 422) or "stream_options" not in str(exc):
        return False
    call.asked = call.hides = False
    call.resent = True
    return True


def _do_not_ask(host: str | None) -> None:
    """What failed with our addition has passed without it. (Where it fails again, the caller's own is the reason.)"""
    if host is not None and host not in _refusing:
        _refusing.add(host)
        log.warning("%s rejects stream_options: the tokens of its streams are not reported", host)


def _host_of(client: Any, url: str) -> str | None:
    """Host, and port where one is given, that a request goes to."""
    if "://" in url:
        return urlsplit(url).netloc.rpartition("@")[2].lower()
    base = client.base_url  # not _base_url: the module-level client makes it anew of what is set there
    known = _hosts.get(id(base))
    if known is not None and known[0] is base:
        return known[1]
    host = urlsplit(str(base)).netloc.rpartition("@")[2].lower()
    if len(_hosts) > 256:
        _hosts.clear()
    _hosts[id(base)] = (base, host)
    return host


def _query_of(body: Mapping[str, Any]) -> str | None:
    """What the user asked last, as text. Nothing that could only be read once is read."""
    for name in ("messages", "input", "prompt"):
        asked = body.get(name)
        if isinstance(asked, str):
            return asked
        if isinstance(asked, list):
            for item in reversed(asked):
                if isinstance(item, str):
                    return item
                if isinstance(item, Mapping) and item.get("role") == "user":
                    return _text_of(item.get("content"))
    return None


def _text_of(content: object) -> str | None:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "\n".join(text for text in texts if isinstance(text, str)) or None
    return None

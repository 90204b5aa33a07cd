"""What a program can tell of the SDK is the same with and without instrument(), and after uninstrument()."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import importlib
import inspect
import json
import pickle
import sys
import traceback
import typing
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import openai
import openai._base_client as base
import pytest
import wrapt
from openai.resources.chat.completions import AsyncCompletions, Completions

import spryng_instrument
from spryng_instrument import sockets
from tests import shapes
from tests.shapes import CHAT, http, seen

KINDS = (openai.OpenAI, openai.AsyncOpenAI)
REPLY = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini-2024-07-18",
         "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
         "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}  # fmt: skip
ERROR = {"error": {"message": "no such model", "type": "invalid_request_error", "code": None, "param": None}}


def client(kind: Any = openai.OpenAI, status: int = 200) -> Any:
    body = json.dumps(REPLY if status == 200 else ERROR).encode()
    transport, _ = shapes.serving((status, "application/json", [body]))
    family = http.AsyncClient if issubclass(kind, openai.AsyncOpenAI) else http.Client
    return kind(api_key="practice", max_retries=0, http_client=family(transport=transport))


def result(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception as exc:
        return type(exc), str(exc)


class Loud(openai.OpenAI):
    """A client of the user's own, with methods of its own in the way."""

    def request(self, *args: Any, **kwargs: Any) -> Any:
        return super().request(*args, **kwargs)

    def post(self, *args: Any, **kwargs: Any) -> Any:
        return super().post(*args, **kwargs)


async def acall(kind: Any) -> Any:
    return await client(kind).chat.completions.create(**CHAT)


def failing() -> BaseException:
    try:
        client(status=404).chat.completions.create(**CHAT)
    except openai.NotFoundError as exc:
        return exc
    raise AssertionError("it did not fail")


def frames(exc: BaseException) -> list[tuple[str, str]]:
    """The functions of a traceback. One frame of ours is in it, and none of wrapt's."""
    found = [(frame.filename, frame.name) for frame in traceback.extract_tb(exc.__traceback__)]
    return [frame for frame in found if "spryng_instrument/patch.py" not in frame[0]]


def connections() -> Any:
    """What a program can tell of the classes of WebSocket connections, in an SDK that has some."""
    found = []
    for name in sockets.CONNECTIONS:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # not in this SDK, or the package websockets is absent
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == name and hasattr(kind, "parse_event"):
                methods = [getattr(kind, method) for method in ("__init__", "parse_event", "send", "close")]
                of_methods = [
                    (
                        str(inspect.signature(method)),
                        method.__qualname__,
                        method.__doc__,
                        [test(method) for test in TESTS],
                    )
                    for method in methods
                ]
                found.append((kind.__name__, str(inspect.signature(kind)), of_methods, dir(kind), dir(kind(None))))
                found.append((result(lambda kind=kind: kind()), sorted(dir(mock.create_autospec(kind)))))
    return found


def called_autospec() -> Any:
    spec = mock.create_autospec(client(), instance=True)
    spec.request(object, mock.sentinel.options)
    return result(lambda: spec.request()), [name for name in dir(spec) if "assert" not in name]


NAMES = ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__", "__defaults__", "__kwdefaults__")
TESTS = (inspect.isfunction, inspect.ismethod, inspect.isroutine, callable, inspect.iscoroutinefunction,
         asyncio.iscoroutinefunction)  # fmt: skip

PROBES: dict[str, Callable[[], Any]] = {
    "signature of create": lambda: str(inspect.signature(Completions.create)),
    "signature of request": lambda: [str(inspect.signature(kind.request)) for kind in KINDS],
    "signature of a bound request": lambda: str(inspect.signature(client().request)),
    "source of request": lambda: inspect.getsource(base.SyncAPIClient.request),
    "names of request": lambda: [getattr(base.SyncAPIClient.request, name) for name in NAMES],
    "kinds of request": lambda: [[test(value) for test in TESTS] for kind in KINDS
                                 for value in (kind.request, client(kind).request)],
    "hints of request": lambda: result(lambda: list(typing.get_type_hints(base.SyncAPIClient.request))),
    "owner of a bound request": lambda: (one := client()).request.__self__ is one,
    "equality": lambda: (openai.OpenAI.request == openai.OpenAI.request, (one := client()).request == one.request,
                         len({openai.OpenAI.request, openai.OpenAI.request})),
    "dir of a client": lambda: dir(client()),
    "members of the class": lambda: [name for name, _ in inspect.getmembers(openai.OpenAI)],
    "bases": lambda: [kind.__mro__ for kind in (openai.OpenAI, openai.AsyncOpenAI, openai.AzureOpenAI)],
    "reply": lambda: seen(client().chat.completions.create(**CHAT)),
    "async reply": lambda: seen(asyncio.run(acall(openai.AsyncOpenAI))),
    "type of a reply": lambda: type(client().chat.completions.create(**CHAT)),
    "pickled reply": lambda: pickle.dumps(client().chat.completions.create(**CHAT)),
    "copied reply": lambda: seen(copy.deepcopy(client().chat.completions.create(**CHAT))),
    "pickled create": lambda: [pickle.loads(pickle.dumps(method)) is method
                               for method in (Completions.create, AsyncCompletions.create)],
    "pickled request": lambda: pickle.loads(pickle.dumps(base.SyncAPIClient.request)).__qualname__,
    "copied request": lambda: copy.deepcopy(base.SyncAPIClient.request) == base.SyncAPIClient.request,
    "pickled client": lambda: result(lambda: pickle.dumps(client()))[0],
    "client with options": lambda: seen(client().with_options(timeout=3).chat.completions.create(**CHAT)),
    "client that was copied": lambda: seen(client().copy().chat.completions.create(**CHAT)),
    "partial": lambda: seen(functools.partial(client().chat.completions.create, model="gpt-4o")(messages=[])),
    "partial of request": lambda: functools.partial(client().request, 1).args,
    "autospec": called_autospec,
    "autospec of a method": lambda: str(inspect.signature(mock.create_autospec(Completions.create))),
    "weak method": lambda: weakref.WeakMethod(create := client().chat.completions.create)() == create,
    "subclass": lambda: seen(client(Loud).chat.completions.create(**CHAT)),
    "subclass's own": lambda: Loud.request.__qualname__,
    "exception": lambda: seen(failing()),
    "traceback": lambda: frames(failing()),
    "context of an exception": lambda: [type((exc := failing()).__cause__), type(exc.__context__)],
    "connections": connections,
    "missing arguments": lambda: result(lambda: client().chat.completions.create(model="x")),
    "wrong arguments of request": lambda: result(lambda: client().request())[0],
}  # fmt: skip


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # asyncio.iscoroutinefunction
def test_the_same_with_and_without(probe, instrument):
    """Whatever a program looks at, it sees what it would have seen."""
    bare = probe()
    instrument()
    assert probe() == bare
    spryng_instrument.uninstrument()
    assert probe() == bare


def attributes() -> dict[Any, dict[str, Any]]:
    """Every attribute of every class of the SDK that is loaded."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "openai"]
    # By type(): the SDK has stand-ins for packages that are absent, and looking at their class raises.
    kinds = {kind for module in modules for kind in vars(module).values() if issubclass(type(kind), type)}
    return {kind: dict(vars(kind)) for kind in kinds if kind.__module__.startswith("openai")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_attribute_is_as_before(instrument):
    """uninstrument() leaves every attribute of every class of the SDK the very object that it was."""
    for name in sockets.CONNECTIONS:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # not in this SDK, or the package websockets is absent
    before = attributes()
    instrument()
    changed = {
        (kind.__name__, name)
        for kind, values in before.items()
        for name, value in vars(kind).items()
        if values.get(name) is not value
    }
    assert {("SyncAPIClient", "request"), ("AsyncAPIClient", "request")} <= changed
    assert {name for _, name in changed} <= {"request", "__init__", "parse_event", "send", "close"}
    spryng_instrument.uninstrument()
    for kind, values in before.items():
        assert vars(kind).keys() == values.keys()
        assert all(vars(kind)[name] is value for name, value in values.items())


def test_a_hundred_times_is_one_layer(instrument):
    """instrument() and uninstrument() 100 times, or instrument() alone, leaves one layer, and one message a call."""
    bare = vars(base.SyncAPIClient)["request"]
    for _ in range(100):
        instrument(beat_s=60)
        spryng_instrument.uninstrument()
        assert vars(base.SyncAPIClient)["request"] is bare
    ledger = instrument()
    instrument()
    wrapper = vars(base.SyncAPIClient)["request"]
    assert isinstance(wrapper, wrapt.FunctionWrapper)
    assert wrapper.__wrapped__ is bare
    client().chat.completions.create(**CHAT)
    assert len(ledger.messages()) == 1


def test_a_subclass_counts_once(instrument):
    """A client whose own request() calls the SDK's is one message a call."""
    ledger = instrument()
    client(Loud).chat.completions.create(**CHAT)
    assert ledger.message().usage.total_tokens == 12


def test_others_may_wrap_too(instrument):
    """Whoever else wraps the seam, before or after us, is called, and stays when we leave; we never count twice."""
    calls: list[str] = []

    def other(name: str) -> Any:
        def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            calls.append(name)
            return wrapped(*args, **kwargs)

        return wrapper

    bare = vars(base.SyncAPIClient)["request"]
    base.SyncAPIClient.request = before = wrapt.FunctionWrapper(bare, other("before"))
    try:
        ledger = instrument()
        ours = vars(base.SyncAPIClient)["request"]
        base.SyncAPIClient.request = after = wrapt.FunctionWrapper(ours, other("after"))
        client().chat.completions.create(**CHAT)
        assert calls == ["after", "before"]
        assert len(ledger.messages()) == 1
        spryng_instrument.uninstrument()
        assert vars(base.SyncAPIClient)["request"] is after
        client().chat.completions.create(**CHAT)
        instrument()
        assert len(ledger.messages()) == 1
        client().chat.completions.create(**CHAT)
        assert len(ledger.messages()) == 2
        base.SyncAPIClient.request = ours
        spryng_instrument.uninstrument()
        assert vars(base.SyncAPIClient)["request"] is before
    finally:
        base.SyncAPIClient.request = bare


def test_nothing_is_kept_alive(instrument):
    """Clients, requests and replies die when they would without us."""

    def alive() -> list[bool]:
        one = client()
        reply = one.chat.completions.create(**CHAT)
        watched = [weakref.ref(one), weakref.ref(reply)]
        del one, reply
        gc.collect()
        return [ref() is not None for ref in watched]

    bare = alive()
    instrument()
    assert alive() == bare

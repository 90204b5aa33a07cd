"""Whose usage it is, in thread pools and threads, which do not inherit context variables from Python.

Invariant: only the scope is carried, by each piece of work, for as long as that runs. Neither a worker nor an executor
keeps one, so a pool that a request has started is not that request's customer's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

import wrapt

from spryng_instrument.context import Scope, run_in, scope_now

E = TypeVar("E", bound=Executor)

_PICKLING = ("concurrent.futures.process", "concurrent.futures.interpreter", "loky.")
"""Modules whose executors send functions elsewhere."""

_patched: dict[tuple[Any, str], tuple[Any, Any]] = {}
"""What install_threads() replaced, and by what."""
_lock = threading.Lock()


def carry(executor: E) -> E:
    """The executor, with each function that is submitted running in the usage_context of its submitter.

    It stays an instance of its class, so that a loop takes it: loop.set_default_executor(carry(ThreadPoolExecutor())).
    Only what is submitted to the returned object is carried.

    Raises:
        TypeError: the executor is none, or one of processes or interpreters, where a scope cannot follow. Enter
            usage_context within the function there.
    """
    if not isinstance(executor, Executor):
        raise TypeError(f"carry() wants a concurrent.futures.Executor, not {executor!r}")
    for kind in type(executor).__mro__:
        if kind.__module__.startswith(_PICKLING):
            raise TypeError(
                f"carry() wants an executor of threads: a scope cannot follow into a {type(executor).__name__}. "
                "Pass the key as an argument, and enter usage_context within the function"
            )
    carrying: E = _Carrying(executor)
    return carrying


def install_threads() -> None:
    """Have every threading.Thread and ThreadPoolExecutor of this process carry the usage_context of whoever starts it.

    For a ThreadPoolExecutor that is always right: each piece of work has one submitter. For a Thread it is right if it
    does the work of one request. It is wrong for a thread that is started within a request, on first use, and then
    works for all: a queue's consumer, a library's sender. Its calls, which were recorded without a key and said so in
    the log, are then silently the first customer's. Nothing here can tell the two apart, so this must be asked for.

    Workers of ThreadPoolExecutor and multiprocessing.pool.ThreadPool are told apart, and carry nothing themselves.
    """
    with _lock:
        if not _patched:
            _patch(ThreadPoolExecutor, "submit", _submit)
            _patch(threading.Thread, "start", _start)


def uninstall_threads() -> None:
    """Put Thread and ThreadPoolExecutor back as they were. Harmless where install_threads() was not called.

    Where somebody else has wrapped them since, ours stays below, and does nothing.
    """
    with _lock:
        while _patched:
            (owner, name), (original, ours) = _patched.popitem()
            if vars(owner)[name] is ours:
                setattr(owner, name, original)


def _patch(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = vars(owner)[name]

    def while_installed(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if (owner, name) not in _patched:
            return wrapped(*args, **kwargs)
        return wrapper(wrapped, instance, args, kwargs)

    ours = wrapt.FunctionWrapper(original, while_installed)
    _patched[owner, name] = original, ours
    setattr(owner, name, ours)


class _Work:
    """A function that runs in the scope of its submitter."""

    __slots__ = ("_func", "_scope")

    def __init__(self, scope: Scope, func: Callable[..., Any]) -> None:
        self._scope = scope
        self._func = func

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return run_in(self._scope, self._func, *args, **kwargs)

    def __reduce__(self) -> Any:
        raise TypeError(f"{self._func!r} was submitted within a usage_context, which cannot follow to other processes")


def _work(func: Callable[..., Any]) -> Callable[..., Any]:
    scope = scope_now()
    return func if scope is None or isinstance(func, _Work) else _Work(scope, func)


_Proxy: Any = wrapt.ObjectProxy  # generic for the type checker since wrapt 2, but not before


class _Carrying(_Proxy):  # type: ignore[misc]
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        # The pool may start a worker meanwhile, which must not be its first submitter's.
        return run_in(None, self.__wrapped__.submit, _work(fn), *args, **kwargs)

    def map(self, fn: Callable[..., Any], /, *iterables: Any, **kwargs: Any) -> Any:
        # Not within run_in: the iterables are the caller's, and read here.
        return self.__wrapped__.map(_work(fn), *iterables, **kwargs)

    def __enter__(self) -> Any:
        self.__wrapped__.__enter__()
        return self


def _submit(wrapped: Any, pool: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not args:
        return wrapped(**kwargs)
    return run_in(None, wrapped, _work(args[0]), *args[1:], **kwargs)


def _start(wrapped: Any, thread: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    scope = scope_now()
    if scope is None or type(thread).__module__.startswith("multiprocessing."):
        return wrapped(*args, **kwargs)
    run, own = thread.run, vars(thread)
    before = own.get("run")

    def put_back() -> None:
        if own.get("run") is in_scope:
            del own["run"]
            if before is not None:
                own["run"] = before

    def in_scope() -> None:
        put_back()
        run_in(scope, run)

    own["run"] = in_scope  # run() may be overridden, so the instance's is what starts
    try:
        return wrapped(*args, **kwargs)
    except BaseException:
        put_back()
        raise

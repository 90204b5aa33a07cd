"""Whose usage it is: one context variable that holds an immutable Scope, set by usage_context and tracked.

Nothing here raises into the caller's code: a value that cannot be used is said in the log, once per line of code, and
left out. A scope may be left in another Context than it was entered in (async generators, streamed responses).
This module is imported with the package, so it loads nothing that is slow to load.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial, wraps
from sys import _getframe
from types import AsyncGeneratorType, CoroutineType, GeneratorType

from spryng_instrument.checks import clean_name, clean_properties, clean_query, clean_tags, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping
    from types import FrameType
    from typing import Any, TypeVar

    F = TypeVar("F", bound=Callable[..., Any])
    Scalar = str | int | float | bool | None

_GENERATOR, _ASYNC_GENERATOR = 0x20, 0x200  # inspect.CO_*, whose module is slow to load
_DRIVERS = ("contextlib", "_pytest.", "pytest_asyncio.")
"""Who may hold a scope open between two steps of a generator: a context manager or fixture means to do that."""


class Scope:
    """What calls made now belong to. Never changed once made: other Contexts, of tasks that go on, may hold it too."""

    __slots__ = ("conversation_id", "key", "outer", "owner", "properties", "query", "tags")

    def __init__(
        self,
        owner: object = None,
        outer: Scope | None = None,
        key: str | None = None,
        conversation_id: str | None = None,
        tags: tuple[str, ...] = (),
        query: str | None = None,
        properties: dict[str, Scalar] | None = None,
    ) -> None:
        self.owner = owner
        self.outer = outer
        self.key = key
        self.conversation_id = conversation_id
        self.tags = tags
        self.query = query
        self.properties = properties


_scope: ContextVar[Scope | None] = ContextVar("spryng_scope", default=None)
current_scope = _scope.get


class usage_context:
    """Attribute every OpenAI call made inside to a customer.

    Contexts nest: the inner key, conversation and query win, tags and properties add up. Usable with `with` and
    `async with`, again and again, from several threads and tasks at once.

    Args:
        key: the customer; a string of up to 255 characters.
        conversation_id: relates many messages to one conversation of that customer.
        tags: labels to filter by.
        query: what the customer asked.
        properties: further facts to keep with each message; names to strings, numbers or booleans.
    """

    __slots__ = ("_conversation_id", "_key", "_properties", "_query", "_tags")

    def __init__(
        self,
        key: str | None = None,
        *,
        conversation_id: str | None = None,
        tags: Iterable[str] = (),
        query: str | None = None,
        properties: Mapping[str, Scalar] | None = None,
    ) -> None:
        self._key = clean_name("key", key)
        self._conversation_id = clean_name("conversation_id", conversation_id)
        self._tags = clean_tags(tags)
        self._query = clean_query(query)
        self._properties = clean_properties(properties)

    def __enter__(self) -> usage_context:
        frame = _getframe(1)
        if frame.f_code.co_flags & (_GENERATOR | _ASYNC_GENERATOR) and frame.f_globals is not globals():
            _notice_generator(frame)
        self._enter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._leave()

    async def __aenter__(self) -> usage_context:
        frame = _getframe(1)
        if frame.f_code.co_flags & _ASYNC_GENERATOR:
            _notice_generator(frame)
        self._enter()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._leave()

    def _enter(self) -> None:
        outer = _scope.get()
        if outer is None:
            scope = Scope(self, None, self._key, self._conversation_id, self._tags, self._query, self._properties)
        else:
            tags = outer.tags
            properties = {**(outer.properties or {}), **(self._properties or {})}
            scope = Scope(
                self,
                outer,
                self._key or outer.key,
                self._conversation_id or outer.conversation_id,
                tags + tuple(tag for tag in self._tags if tag not in tags),
                self._query if self._query is not None else outer.query,
                properties or None,
            )
        _scope.set(scope)

    def _leave(self) -> None:
        # Contexts may be left out of order (generators), or in another Context, where ours was never entered.
        scope = _scope.get()
        above: list[Scope] = []
        while scope is not None and scope.owner is not self:
            above.append(scope)
            scope = scope.outer
        if scope is None:
            return
        scope = scope.outer
        for inner in reversed(above):
            scope = Scope(
                inner.owner, scope, inner.key, inner.conversation_id, inner.tags, inner.query, inner.properties
            )
        _scope.set(scope)


class tracked:
    """Attribute every OpenAI call that a function makes, be it a function, coroutine, generator or async generator.

    Each value may be a callable of the function's arguments, taken by name or, where the names differ, by position:

        @tracked(key=lambda ticket: ticket.customer, tags=["classification"])
        def classify(ticket): ...

    In a generator the customer is set during each step only, so it never leaks to whoever runs between two steps.
    Called with a usage_context around it, the inner values win, as with nested contexts.
    """

    def __init__(
        self,
        key: str | Callable[..., str | None] | None = None,
        *,
        conversation_id: str | Callable[..., str | None] | None = None,
        tags: Iterable[str] | Callable[..., Iterable[str]] = (),
        query: str | Callable[..., str | None] | None = None,
        properties: Mapping[str, Scalar] | Callable[..., Mapping[str, Scalar]] | None = None,
    ) -> None:
        own: dict[str, Any] = {
            "key": key,
            "conversation_id": conversation_id,
            "tags": tags,
            "query": query,
            "properties": properties,
        }
        self._computed = {name: value for name, value in own.items() if callable(value)}
        self._fixed = {name: value for name, value in own.items() if not callable(value)}

    def __call__(self, func: F) -> F:
        if not callable(func):
            raise TypeError(f"use @tracked(...) with parentheses on a function; it was called with {func!r}")
        import inspect

        computed = {name: _binder(name, value, func) for name, value in self._computed.items()}
        fixed = usage_context(**self._fixed) if not computed else None

        def context(args: tuple[Any, ...], kwargs: dict[str, Any]) -> usage_context:
            if fixed is not None:
                return fixed
            return usage_context(**self._fixed, **{name: compute(args, kwargs) for name, compute in computed.items()})

        inner: Any = func
        while isinstance(inner, partial):
            inner = inner.func
        wrapper: Callable[..., Any]
        if inspect.isasyncgenfunction(inner):
            wrapper = _async_generator(func, context)
        elif inspect.iscoroutinefunction(inner):
            wrapper = _coroutine(func, context)
        elif inspect.isgeneratorfunction(inner):
            wrapper = _generator(func, context)
        else:
            wrapper = _function(func, context)
        return wraps(func)(wrapper)  # type: ignore[return-value]


def _function(func: Callable[..., Any], context: Callable[..., usage_context]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        scope = context(args, kwargs)
        with scope:
            result = func(*args, **kwargs)
        # A plain function may return what runs only later: a decorated coroutine function, a generator.
        carry = _CARRIERS.get(type(result))
        return result if carry is None else carry(scope, result)

    return wrapper


def _coroutine(func: Callable[..., Awaitable[Any]], context: Callable[..., usage_context]) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        with context(args, kwargs):
            return await func(*args, **kwargs)

    return wrapper


def _generator(func: Callable[..., Any], context: Callable[..., usage_context]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return (yield from _steps(context(args, kwargs), func(*args, **kwargs)))

    return wrapper


def _async_generator(func: Callable[..., Any], context: Callable[..., usage_context]) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        scope = context(args, kwargs)
        steps = func(*args, **kwargs)
        step: Callable[[], Any] = steps.__anext__
        while True:
            with scope:
                try:
                    item = await step()
                except StopAsyncIteration:
                    return
            try:
                step = partial(steps.asend, (yield item))
            except GeneratorExit:
                with scope:  # the user's own finally runs in its context, unless a loop that ends has closed it before
                    await steps.aclose()
                raise
            except BaseException as exc:
                step = partial(steps.athrow, exc)

    return wrapper


async def _awaited(scope: usage_context, coroutine: Awaitable[Any]) -> Any:
    with scope:
        return await coroutine


def _steps(scope: usage_context, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    step: Callable[[], Any] = partial(next, steps)
    while True:
        with scope:  # around the step only
            try:
                item = step()
            except StopIteration as stop:
                return stop.value
        try:
            step = partial(steps.send, (yield item))
        except BaseException as exc:  # GeneratorExit too: the user's own finally runs in its context
            step = partial(steps.throw, exc)


def async_steps(scope: usage_context, steps: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
    """The same generator, each of whose steps runs within *scope*."""
    driven: AsyncGenerator[Any, Any] = _async_generator(lambda: steps, lambda args, kwargs: scope)()
    return driven


_CARRIERS: Mapping[type, Callable[[usage_context, Any], Any]] = {
    CoroutineType: _awaited,
    GeneratorType: _steps,
    AsyncGeneratorType: async_steps,
}


def _binder(name: str, value: Callable[..., Any], func: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (args, kwargs) that calls *value* with those arguments of *func* that it takes."""
    import inspect

    signature = inspect.signature(func)
    names = list(signature.parameters)
    kinds = inspect.Parameter
    wanted: list[tuple[str, str]] = []
    for position, parameter in enumerate(inspect.signature(value).parameters.values()):
        if parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
            continue
        if parameter.name in names:
            wanted.append((parameter.name, parameter.name))
        elif parameter.default is kinds.empty:
            if position >= len(names):
                raise TypeError(
                    f"@tracked({name}=...): the callable wants {parameter.name!r}, "
                    f"but {getattr(func, '__qualname__', func)} has only: {', '.join(names) or 'no arguments'}"
                )
            wanted.append((parameter.name, names[position]))
    by_position = [
        p.kind is not kinds.KEYWORD_ONLY for p in inspect.signature(value).parameters.values() if p.name in dict(wanted)
    ]

    def compute(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return None  # the function itself will say what is wrong with its arguments
        try:
            bound.apply_defaults()
            positional = [bound.arguments[source] for (_, source), by in zip(wanted, by_position, strict=True) if by]
            named = {
                own: bound.arguments[source] for (own, source), by in zip(wanted, by_position, strict=True) if not by
            }
            return value(*positional, **named)
        except Exception as exc:
            say(
                f"@tracked({name}=...) on {getattr(func, '__qualname__', func)} raised {exc!r}; "
                f"the call goes on without its {name}",
                func,
            )
            return () if name == "tags" else None

    return compute


def _notice_generator(frame: FrameType) -> None:
    driver = frame.f_back
    if driver is not None and str(driver.f_globals.get("__name__", "")).startswith(_DRIVERS):
        return
    say(
        "`with usage_context(...)` inside a generator leaks its customer to whoever runs between two steps; "
        f"decorate {frame.f_code.co_name}() with @spryng_instrument.tracked(...), which sets it during each step only"
    )


def scope_now() -> Scope | None:
    """The current scope as a value: nobody can leave it, so it holds wherever and however late run_in() sets it."""
    scope = _scope.get()
    if scope is None:
        return None
    return Scope(None, None, scope.key, scope.conversation_id, scope.tags, scope.query, scope.properties)


def run_in(scope: Scope | None, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call *func* with *scope* in place of the current one, be that within this Context or a thread's empty one."""
    token = _scope.set(scope)
    try:
        return func(*args, **kwargs)
    finally:
        _scope.reset(token)

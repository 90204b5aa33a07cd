"""What the installed SDK can do: every operation whose answer can carry usage, found by walking its own code and types.

A new release of the SDK cannot slip by in silence: what is found here and is neither counted nor deliberately left out
fails a test of ours, and is named by `spryng doctor`.
"""

from __future__ import annotations

import ast
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from spryng_instrument.endpoints import NOT_COUNTED, endpoint_of
from spryng_instrument.sockets import CONNECTIONS

WALKED = (3, 57)
"""The newest openai that our tests have walked, to its minor version: nothing in it or in older ones is unknown."""

_METHODS = {"_post": "POST", "_get": "GET", "_get_api_list": "GET", "_put": "PUT", "_patch": "PATCH",
            "_delete": "DELETE"}  # fmt: skip
_USAGE = re.compile(r"(.*_)?usage(_per_model)?")


class Operation(NamedTuple):
    """A method of the SDK that makes a request, or reads events of a connection."""

    name: str
    """ "POST /responses", or "EVENTS" and the module of a connection."""
    method: str
    """ "resources/responses/responses.py: Responses.create"."""


def is_walked(version: str) -> bool:
    """Whether an openai has nothing that is unknown, as our tests have found: to walk it again would take seconds."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) <= WALKED


def uncounted() -> list[Operation]:
    """Operations of the installed SDK whose answers can carry usage, and that are neither counted nor left out."""
    return _carrying_usage(but=_is_known)


def _is_known(name: str) -> bool:
    method, _, path = name.partition(" ")
    if method == "EVENTS":
        return path in CONNECTIONS
    return name in NOT_COUNTED or endpoint_of(method, path.replace("{}", "x")) is not None


def operations() -> list[Operation]:
    """Every operation of the installed SDK whose answer can carry usage."""
    return _carrying_usage(but=lambda name: False)


def _carrying_usage(*, but: Callable[[str], bool]) -> list[Operation]:
    import openai

    root = Path(str(openai.__file__)).parent
    found: dict[str, Operation] = {}
    for file in sorted((root / "resources").rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        module_name = ".".join(("openai", *file.relative_to(root).with_suffix("").parts))
        for owner in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
            for method in [node for node in owner.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]:
                for name, types in _requests(method, module_name):
                    if name in found or but(name):
                        continue
                    if any(_carries_usage(value, set()) for value in _values(types, import_module(module_name))):
                        where = f"{file.relative_to(root)}: {owner.name}.{method.name}"
                        found[name] = Operation(name, where)
    return list(found.values())


def _requests(method: ast.FunctionDef | ast.AsyncFunctionDef, module_name: str) -> Iterator[tuple[str, list[ast.expr]]]:
    """The requests that a method makes, with the expressions that say what they answer."""
    if method.name == "parse_event" and method.returns is not None:
        yield f"EVENTS {module_name}", [method.returns]
    for call in [node for node in ast.walk(method) if isinstance(node, ast.Call)]:
        verb = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if verb in _METHODS and call.args:
            types = [word.value for word in call.keywords if word.arg in ("cast_to", "stream_cls", "model", "page")]
            yield f"{_METHODS[verb]} {_template(call.args[0])}", types


def _template(path: ast.expr) -> str:
    """A path with "{}" for what is filled in: of a string, an f-string, or path_template("...", ...)."""
    if isinstance(path, ast.Call) and path.args:
        path = path.args[0]
    if isinstance(path, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in path.values)
    else:
        text = str(path.value) if isinstance(path, ast.Constant) else "{}"
    return re.sub(r"\{[^}]*\}", "{}", text).partition("?")[0]


def _values(expressions: list[ast.expr], module: Any) -> Iterator[Any]:
    """What the names in the expressions stand for."""
    for expression in expressions:
        for node in ast.walk(expression):
            if isinstance(node, (ast.Name, ast.Attribute)):
                try:
                    yield eval(compile(ast.Expression(node), "", "eval"), vars(module))
                except (NameError, AttributeError):  # a name of the method's own
                    continue


def _carries_usage(kind: Any, seen: set[Any]) -> bool:
    """Whether a type has, anywhere within, a field that holds usage."""
    arguments = typing.get_args(kind)
    if arguments:
        return any(_carries_usage(argument, seen) for argument in arguments)
    if not inspect.isclass(kind) or kind in seen:
        return False
    seen.add(kind)
    fields = getattr(kind, "model_fields", None) or getattr(kind, "__fields__", None) or {}
    for name, field in fields.items():
        if _USAGE.fullmatch(name):
            return True
        if _carries_usage(getattr(field, "annotation", None) or getattr(field, "outer_type_", None), seen):
            return True
    return False

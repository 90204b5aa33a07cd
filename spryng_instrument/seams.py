"""How a method of the SDK is wrapped: so that whoever looks at it, copies or pickles it finds what was there before.

Another library may wrap the same method, before or after us. What it put below ours stays when we leave; where it has
put something above ours, ours stays too and lets every call through.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import wrapt

_Bound: Any = wrapt.BoundFunctionWrapper  # generic for the type checker since wrapt 2, but not before
_Wrapper: Any = wrapt.FunctionWrapper

_installed: dict[tuple[type, str], tuple[Any, Any]] = {}
"""What is below each seam of ours, and the seam."""


def wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> bool:
    """Wrap the method of that name, which *owner* itself must have. Returns whether it does."""
    if (owner, name) in _installed:
        return True  # left below another's
    original = vars(owner).get(name)
    if original is None:
        return False
    seam = _Seam(owner, name, original, wrapper)
    _installed[owner, name] = original, seam
    setattr(owner, name, seam)
    return True


def unwrap() -> None:
    """Put back every method that was wrapped, but those that somebody else has wrapped since."""
    for (owner, name), (original, seam) in list(_installed.items()):
        if vars(owner).get(name) is seam:
            setattr(owner, name, original)
            del _installed[owner, name]


class _BoundSeam(_Bound):  # type: ignore[misc]
    """The method as a class or an instance gives it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        seam, instance = self._self_parent, self._self_instance
        return getattr, (seam._self_seam_owner if instance is None else instance, seam._self_seam_name)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        instance = self._self_instance
        return self if instance is None else getattr(deepcopy(instance, memo), self._self_parent._self_seam_name)


class _Seam(_Wrapper):  # type: ignore[misc]
    __bound_function_wrapper__ = _BoundSeam

    def __init__(self, owner: type, name: str, original: Any, wrapper: Callable[..., Any]) -> None:
        super().__init__(original, wrapper)
        self._self_seam_owner = owner
        self._self_seam_name = name

"""TOML, which Python reads from 3.11 on, with every fraction as the Decimal that its digits say."""

from __future__ import annotations

import sys
from decimal import Decimal, InvalidOperation
from typing import Any

from spryng_instrument.errors import MissingExtraError


def read(text: str) -> dict[str, Any]:
    """What a text says.

    Raises:
        ValueError: it is no TOML.
        MissingExtraError: Python 3.10 needs a package for it.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ModuleNotFoundError as exc:
            raise MissingExtraError("cli", "TOML on Python 3.10") from exc
    try:
        return tomllib.loads(text, parse_float=Decimal)
    except InvalidOperation:
        raise ValueError("a number in it has too many digits") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

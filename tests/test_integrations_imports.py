"""Each integration stands by itself: it loads the framework that it is for, and no other."""

from __future__ import annotations

import subprocess
import sys

import pytest

FRAMEWORKS = {"starlette", "fastapi", "flask", "werkzeug", "django", "asgiref", "celery", "kombu", "openai", "httpx"}
LOADS = {
    "asgi": set(),
    "wsgi": set(),
    "baggage": set(),
    "executors": set(),
    "django": {"asgiref"},
    "celery": {"celery", "kombu", "django", "asgiref"},  # it looks for Django itself
}


@pytest.mark.parametrize("name", LOADS)
def test_imports_only_what_it_is_for(name: str) -> None:
    """Importing an integration loads its own framework at most, and Django's not before its settings are there."""
    code = f"import sys, spryng_instrument.integrations.{name}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert set(loaded) & FRAMEWORKS <= LOADS[name]
    assert not any(module.startswith("spryng_instrument.patch") for module in loaded)

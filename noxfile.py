"""Every check of the project: `nox` runs all, `nox -s tests-3.12` one. uv makes the environments and fetches packages.

Interpreters are those found on PATH; one that is missing is skipped by name.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.10", "3.13"]
"""Those that everything runs on; the older SDKs run on the ones between."""
OLD_HTTPX = ["httpx<0.28"]
"""What openai before 1.55.3 needs: it fails with httpx 0.28."""
OPENAI = {
    "1.3.0": OLD_HTTPX,
    "1.30.0": OLD_HTTPX,
    "1.55.0": OLD_HTTPX,
    "1.66.0": [],
    "1.109.1": [],
    "2.54.0": [],
    "3.0.0": [],
    "3.30.0": [],
}
"""Older SDKs of the matrix, with what each needs."""
ANY_SDK = [
    "journal",
    "pump",
    "sqlite",
    "prices",
    "pricelist",
    "reports",
    "settings",
    "layers",
    "cli",
    "context",
    "integrations_*",
]
ANY_SDK += ["processes", "periods", "run", "plugin", "api", "copying", "readme", "exporting", "completion", "tables"]
ANY_SDK += ["billing", "plans", "cli_billing", "budgets", "pricelist", "soak"]
"""Tests that do not touch the SDK, or only to have calls to count: another one would prove nothing new."""
ATTACKS = ["dashboard_browser", "chaos", "openapi", "published_clients"]
PROOFS = ["conformance", "books", "totals"]
"""Tests of what the engines answer: the same with any Python."""
SERVERS = ["server", "clickhouse", "dashboard", "closing", "postgres", "http", "under_load", "otlp", "cloudevents"]
"""Tests of the server and of the engines and services that messages go to; each list has first what takes the longest.
These lists have sessions of their own."""

ABOVE = {
    "langchain": ["langchain-openai"],
    "pydantic_ai": ["pydantic-ai-slim[openai]"],
    "openai_agents": ["openai-agents"],
    "instructor": ["instructor"],
    "litellm": ["litellm"],
    "llama_index": ["llama-index-llms-openai"],
}
"""What sits on the SDK, by the name that its tests begin with. Each chooses its own openai: in one environment some
would be years old, because litellm and llama-index want openai below 3."""

PARALLEL = ["-n", "4", "--dist", "loadfile"]  # two cores suffice: many tests wait for processes and servers

GROUPS = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, *packages: str, group: str = "test") -> None:
    session.install("-e", ".[all]", *nox.project.dependency_groups(GROUPS, group), *packages)


def files(names: list[str]) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


def ignoring(names: list[str]) -> list[str]:
    return [f"--ignore-glob={file}" for file in files(names)]


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, as linter and formatter."""
    session.install(*nox.project.dependency_groups(GROUPS, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict over the package, and over its public API as users write it."""
    install(session, group="types")
    session.run("mypy")


@nox.session
def fresh(session: nox.Session) -> None:
    """README's first command, as a newcomer types it, in an environment with nothing in it but pip."""
    session.install("pip")
    [command] = [line for line in Path("README.md").read_text().splitlines() if line.startswith("pip install -e")]
    session.run("sh", "-c", f"cd {session.invoked_from} && {command}", external=True)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The suite with the newest openai. SPRYNG_TEST_FULL=1 lets some tests go on for longer."""
    install(session, *nox.project.dependency_groups(GROUPS, "frameworks"))
    session.run("python", "-m", "pytest", *(session.posargs or [*PARALLEL, *ignoring([*ATTACKS, *PROOFS, *SERVERS])]))


@nox.session(python=["3.10", "3.13"])
def servers(session: nox.Session) -> None:
    """The server and every engine: PostgreSQL, whose programs must be there, and ClickHouse's engine from PyPI.

    On one Python, it is attacked as well, looked at in Chromium, which must be there, and compared engine by engine.
    """
    install(session, *nox.project.dependency_groups(GROUPS, "engines", "vendors", "attack", "browser"))
    names = [*ATTACKS, *PROOFS, *SERVERS] if session.python == "3.13" else SERVERS
    in_order = [*PARALLEL, "--no-loadscope-reorder", *files(names)]  # the longest first: no worker is left with it
    session.run("python", "-m", "pytest", *(session.posargs or in_order))


@nox.session
@nox.parametrize("python,openai", list(zip(cycle(["3.11", "3.12"]), OPENAI)))
def sdk(session: nox.Session, openai: str) -> None:
    """The suite with an older openai, but for what is the same with any."""
    install(session, f"openai=={openai}", *OPENAI[openai])
    same = [*ANY_SDK, *ATTACKS, *PROOFS, *SERVERS]
    if OPENAI[openai]:
        same.remove("http")  # which is sent with the httpx that comes with the SDK: here an old one
    ignored = [*ignoring(same), "-k", "not killed"]
    session.run("python", "-m", "pytest", *(session.posargs or [*PARALLEL, *ignored]))


@nox.session(python="3.12")
@nox.parametrize("library", list(ABOVE))
def above(session: nox.Session, library: str) -> None:
    """A framework that sits on the SDK: what it calls is metered. One that cannot be imported fails."""
    install(session, *ABOVE[library])
    session.env["SPRYNG_TEST_ABOVE"] = "1"
    session.run("python", "-m", "pytest", "tests/test_above_the_sdk.py", "-k", f"test_{library}", *session.posargs)

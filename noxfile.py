"""Every check of the project: `nox` runs all, `nox -s tests-3.12` one. uv makes the environments and fetches packages.

Interpreters are those found on PATH; one that is missing is skipped by name.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
OLD_HTTPX = ["httpx<0.28"]
"""What openai before 1.55.3 needs: it fails with httpx 0.28."""
OPENAI = {
    "1.3.0": OLD_HTTPX,
    "1.30.0": OLD_HTTPX,
    "1.40.0": OLD_HTTPX,
    "1.55.0": OLD_HTTPX,
    "1.66.0": [],
    "1.109.1": [],
    "2.0.0": [],
    "2.25.0": [],
    "2.54.0": [],
    "3.0.0": [],
    "3.30.0": [],
}
"""Older SDKs of the matrix, with what each needs."""
ANY_SDK = ["journal", "pump", "sqlite", "prices", "reports", "settings", "layers", "cli", "context", "integrations_*"]
ANY_SDK += ["processes", "run", "plugin", "api", "copying", "readme"]
"""Tests that do not touch the SDK, or only to have calls to count: another one would prove nothing new."""
SERVERS = ["conformance", "postgres", "clickhouse", "server", "http", "cloudevents", "otlp"]
ATTACKS = ["openapi", "published_clients", "chaos"]
"""Tests of the server and of the engines and services that messages go to; they have sessions of their own."""

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
    """The suite with the newest openai; on one Python with the tests that take their full time."""
    install(session, *nox.project.dependency_groups(GROUPS, "frameworks"))
    if session.python == "3.12":
        session.env["SPRYNG_TEST_FULL"] = "1"
    session.run("python", "-m", "pytest", *(session.posargs or [*PARALLEL, *ignoring([*SERVERS, *ATTACKS])]))


@nox.session(python=["3.10", "3.13"])
def servers(session: nox.Session) -> None:
    """The server and every engine: PostgreSQL, whose programs must be there, and ClickHouse's engine from PyPI.

    On one Python, it is attacked as well.
    """
    install(session, *nox.project.dependency_groups(GROUPS, "engines", "vendors", "attack"))
    names = SERVERS
    if session.python == "3.13":
        session.env["SPRYNG_TEST_FULL"] = "1"
        names = [*SERVERS, *ATTACKS]
    session.run("python", "-m", "pytest", *(session.posargs or [*PARALLEL, *files(names)]))


@nox.session(python="3.11")
@nox.parametrize("openai", list(OPENAI))
def sdk(session: nox.Session, openai: str) -> None:
    """The suite with an older openai, but for what is the same with any."""
    install(session, f"openai=={openai}", *OPENAI[openai])
    same = [*ANY_SDK, *SERVERS, *ATTACKS]
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

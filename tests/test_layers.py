"""The arrows between the modules of DESIGN: who may import whom, and what an import may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "spryng_instrument"

CAPTURE = [
    "errors",
    "periods",
    "toml",
    "checks",
    "message",
    "settings",
    "context",
    "integrations",
    "usage",
    "tallies",
    "endpoints",
    "api",
    "journal",
    "deferred",
    "store",
    "pump",
    "pricelist",
    "prices",
    "budgets",
    "alerts",
    "spending",
    "recorder",
    "streams",
    "bodies",
    "observe",
    "agents",
    "seams",
    "connections",
    "sockets",
    "surface",
    "patch",
]
READING = [
    "errors",
    "periods",
    "toml",
    "message",
    "settings",
    "usage",
    "tallies",
    "endpoints",
    "api",
    "journal",
    "deferred",
    "store",
    "pump",
    "tables",
    "ledger",
    "pricelist",
    "prices",
    "budgets",
    "alerts",
    "reports",
    "exporting",
    "organization",
    "differences",
    "reconcile",
    "billing",
    "copying",
    "server",
    "cli",
]


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it, but not those only for its types."""
    tree = ast.parse(path.read_text())
    found = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(inner for child in node.body for inner in ast.walk(child))
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spryng_instrument"):
            _, _, inner = (node.module or "").partition(".")
            found |= {inner.split(".")[0]} if inner else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("order", [CAPTURE, READING], ids=["capture", "reading"])
def test_imports_go_one_way(order: list[str]) -> None:
    """Each module imports only those before it in its half."""
    for position, name in enumerate(order):
        path = PACKAGE / f"{name}.py"
        files = [path] if path.exists() else sorted((PACKAGE / name).glob("*.py"))
        assert files, name
        for file in files:
            backwards = imports_of(file) & set(order[position + 1 :])
            assert not backwards, f"{file.name} imports {backwards}"


def test_the_halves_share_little() -> None:
    """Reports know nothing of how a message was captured."""
    for name in (
        "prices",
        "budgets",
        "alerts",
        "reports",
        "organization",
        "differences",
        "reconcile",
        "billing/bills",
        "billing/rating",
    ):
        assert not imports_of(PACKAGE / f"{name}.py") & {"patch", "observe", "recorder", "pump", "journal", "context"}


def test_what_is_private_stays_so() -> None:
    """No module of the package imports another one's name with an underscore before it."""
    taken = [
        f"{path.relative_to(PACKAGE)}: {alias.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spryng_instrument")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not taken


HEAVY = {"openai", "wrapt", "httpx", "httpx2", "asyncio", "ssl", "click", "rich", "genai_prices", "sqlite3", "psycopg"}


def test_import_is_light() -> None:
    """`import spryng_instrument` loads nothing that is slow to load."""
    code = "import sys, spryng_instrument; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not (HEAVY | {"msgspec"}) & set(loaded)
    assert "spryng_instrument.context" in loaded


def test_reports_are_light() -> None:
    """A notebook that imports the reports has neither the SDK nor the command line loaded, nor any engine's driver."""
    code = "import sys, spryng_instrument.reports; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not HEAVY & set(loaded)

"""`spryng run`: a command with its OpenAI calls recorded, and no change to its code. Needs no extra.

It replaces itself with the command, so that signals and the exit code are the command's own; what it adds are SPRYNG_
variables and a folder on PYTHONPATH, from where every Python that the command starts loads `autoload/sitecustomize.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from spryng_instrument.errors import SettingsError
from spryng_instrument.ledger import settings_of
from spryng_instrument.settings import MISSING_KEY_POLICIES, env_name

FOLDER = str(Path(__file__).resolve().parent / "autoload")


def main(argv: Sequence[str]) -> NoReturn:
    """Become the command of *argv*, instrumented. Exits with 2 for wrong options, 127 and 126 as a shell does."""
    options, command = _split(argv)
    parser = _parser()
    arguments = vars(parser.parse_args(options))
    if not command:
        parser.error("a command is missing, as in: spryng run -- python app.py")
    try:
        environ = environment(arguments, os.environ)
    except SettingsError as exc:
        parser.error(str(exc))
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], command, environ)
    except FileNotFoundError:
        _fail(127, f"{command[0]}: command not found")
    except OSError as exc:
        _fail(126, f"{command[0]}: {exc.strerror}; to run a Python file: spryng run -- python {command[0]}")


def environment(arguments: Mapping[str, object], environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the command: *environ*, the options as SPRYNG_ variables, and our folder on PYTHONPATH.

    Raises:
        SettingsError: an option or a SPRYNG_ variable cannot be used.
    """
    result = dict(environ)
    for name, value in arguments.items():
        if name not in ("destination", "journal") and value is not None:
            result[env_name(name)] = str(value)
    settings = settings_of(_text(arguments, "destination"), _text(arguments, "journal"), result)
    # Absolute: a worker may change its folder before it imports openai.
    result[env_name("destination")] = settings.destination
    result[env_name("journal")] = settings.journal
    folders = [folder for folder in result.get("PYTHONPATH", "").split(os.pathsep) if folder != FOLDER]
    result["PYTHONPATH"] = os.pathsep.join([FOLDER, *(folders if any(folders) else [])])
    return result


def _text(arguments: Mapping[str, object], name: str) -> str | None:
    value = arguments.get(name)
    return value if isinstance(value, str) else None


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our options, and the command: what follows `--`, or else the first word that is no option."""
    index = 0
    while index < len(argv) and argv[index].startswith("-"):
        if argv[index] == "--":
            return list(argv[:index]), list(argv[index + 1 :])
        takes_value = "=" not in argv[index] and argv[index] not in ("-h", "--help", "--capture-query")
        index += 2 if takes_value else 1
    return list(argv[:index]), list(argv[index:])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spryng run",
        usage="spryng run [options] -- command [arguments ...]",
        description="Run a command with the OpenAI calls of all its Python processes recorded, no change to its code: "
        "spryng run -- python app.py, or -- uvicorn app:app --workers 2, or -- gunicorn app. Whatever is not given "
        "here is taken from SPRYNG_ variables. Pythons started with -I, -E or -S are not instrumented.",
        allow_abbrev=False,
    )
    parser.add_argument("--destination", metavar="URL", help="the ledger")
    parser.add_argument("--journal", metavar="DIR", help="its journal folder")
    parser.add_argument("--default-key", metavar="KEY", help="the customer of calls outside any usage_context")
    parser.add_argument("--on-missing-key", choices=MISSING_KEY_POLICIES, help="what a call without a key does")
    parser.add_argument(
        "--capture-query", action="store_const", const="1", help="record the last user message of each call"
    )
    parser.add_argument(
        "--include-usage-hosts", metavar="HOST,...", help="hosts whose streams are asked for their usage"
    )
    return parser


def _fail(code: int, problem: str) -> NoReturn:
    sys.stderr.write(f"spryng run: {problem}\n")
    raise SystemExit(code)

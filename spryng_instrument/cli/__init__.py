"""The `spryng` command: where it starts, and what its exit codes mean.

0: done. 1: failed. 2: used wrongly. 3: a check found something wrong. 127: `spryng run` did not find its command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run `spryng`. `spryng run` needs no extra: it is for production, where applications run."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["run"]:
        from spryng_instrument.cli import autorun

        autorun.main(args[1:])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a key that the terminal cannot show is no reason to fail
    try:
        from spryng_instrument.cli.commands import commands
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.split(".")[0] not in ("click", "rich"):
            raise  # it is there, but broken: show its own error
        sys.exit(f"spryng needs {exc.name}: pip install 'spryng-instrument[cli]'")
    commands(args, prog_name="spryng")


if __name__ == "__main__":
    main()

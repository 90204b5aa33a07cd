"""The command that makes a shell complete the others: completion."""

from __future__ import annotations

import sys

import click
from click.shell_completion import get_completion_class

from spryng_instrument.cli.group import commands
from spryng_instrument.cli.tables import note

INSTALL = {
    "bash": """eval "$(spryng completion bash)"    # in ~/.bashrc""",
    "zsh": """eval "$(spryng completion zsh)"    # in ~/.zshrc, after compinit""",
    "fish": "spryng completion fish > ~/.config/fish/completions/spryng.fish",
}


@commands.command(
    help="Print what makes the shell complete commands, options, and names of the ledger.\n\n\b\n"
    + "\n".join(INSTALL.values())
)
@click.argument("shell", type=click.Choice(list(INSTALL)))
def completion(shell: str) -> None:
    complete = get_completion_class(shell)
    assert complete is not None
    click.echo(complete(commands, {}, "spryng", "_SPRYNG_COMPLETE").source())
    if sys.stdout.isatty():
        note(f"To have it in every {shell}: {INSTALL[shell]}")

"""Every command of `spryng`: what imports this has them all in the group."""

from spryng_instrument.cli import asking, billing, budgeting, completion, exporting, reconciling, serving
from spryng_instrument.cli.group import commands

__all__ = ["asking", "billing", "budgeting", "commands", "completion", "exporting", "reconciling", "serving"]

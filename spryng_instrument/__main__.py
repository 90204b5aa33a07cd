"""`python -m spryng_instrument` is `spryng`."""

from spryng_instrument.cli import main

main()

"""`python -m latentgen` is the command `latentgen`."""

from .cli import main

main()

"""`python -m cospadi` is the command `cospadi`."""

from cospadi.cli import main

main()

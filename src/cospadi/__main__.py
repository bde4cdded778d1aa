"""`python -m cospadi` is the command `cospadi`."""

from cospadi_cli import main

main()

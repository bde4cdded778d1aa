"""The console script `cospadi`, beside the package so that help and mistyped flags answer at once.

Importing the package registers its format with transformers, which takes seconds: a command does so when it needs it.
"""

from __future__ import annotations

is_command = False
"""Whether this process is the command, which `import cospadi` asks; those that it spawns only import this."""


def main() -> None:
    """Entry point."""
    global is_command
    is_command = True
    from cospadi.cli import main as run

    run()

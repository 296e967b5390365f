"""The command line: a module a command. `app.py` joins them."""

from moeless.cli.app import main

__all__ = ["main"]

"""The command line: `memfit COMMAND ...`."""

from . import run, training
from .app import main

__all__ = ["main", "run", "training"]

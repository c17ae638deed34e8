"""The command line: `memfit COMMAND ...`."""

from . import fit, run, training
from .app import main

__all__ = ["fit", "main", "run", "training"]

"""Parses the command line and calls the programs, one file a command.

May import the words without JAX, and `programs` only inside the functions that run a command.
"""

from sama_jax.cli.entry import main

__all__ = ["main"]

"""Parses the command line and calls the programs, one file a command.

May import the words, `attacks`, `texts`, `storage`, `devices`, `training`, `reporting` and
`programs`; what needs JAX is imported inside the functions that run a command.
"""

from sama_jax.cli.entry import main

__all__ = ["main"]

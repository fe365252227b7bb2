"""Parses the command line and calls the programs, one file a command.

May import the words, `attacks`, `texts`, `storage`, `devices`, `reporting` and `programs`;
what needs JAX is imported inside the functions that run a command.

The flag of a setting is a field of `config`, that of a file, device or output one of
`programs.jobs`; the command's file names the fields that it has as flags (`flags.flags_of`).
"""

from sama_jax.cli.entry import main

__all__ = ["main"]

"""The errors a user can meet, each with its documented exit code. Standard library only.

Every message is one line that says what was expected, what was found, where, and what to do; a
list of offending items (tensors, ids) may follow on lines of its own.
"""

import difflib
from collections.abc import Iterable


class SamaError(Exception):
    """Base of everything that is the input's fault, not the program's."""

    exit_code = 1


class UsageError(SamaError):
    """Flags, settings, or an output folder that belongs to another run (exit code 2)."""

    exit_code = 2


class DataError(SamaError):
    """The texts (exit code 3)."""

    exit_code = 3


class ModelError(SamaError):
    """A model folder or its tokenizer (exit code 4)."""

    exit_code = 4


class ValidityError(SamaError):
    """The run finished, but a validity gate failed under `--strict` (exit code 5)."""

    exit_code = 5


class OutOfMemory(SamaError):
    """A device, or the host, has too little memory (exit code 71, EX_OSERR of sysexits.h)."""

    exit_code = 71


class OutputError(SamaError):
    """The disk is full or a path cannot be written (exit code 74, EX_IOERR of sysexits.h)."""

    exit_code = 74


class Interrupted(SamaError):
    """Ctrl-C or SIGTERM; the same command continues (exit code 75, EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, else the list of the known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(sorted(known))}"

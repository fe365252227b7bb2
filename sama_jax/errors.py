"""The errors a user can meet, each with its exit code and what that means. Standard library only.

Every message is one line that says what was expected, what was found, where, and what to do; a
list of offending items (tensors, ids) may follow on lines of its own.
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class SamaError(Exception):
    """Base of everything that is the input's fault, not the program's."""

    exit_code: ClassVar[int] = 1
    meaning: ClassVar[str] = ""
    """One line for lists of exit codes."""


class UsageError(SamaError):
    """Wrong flags or settings, or an output folder that belongs to another run."""

    exit_code = 2
    meaning = "usage, settings, or an output folder of another run"


class DataError(SamaError):
    """Texts, or a file made of them, that cannot be used."""

    exit_code = 3
    meaning = "the texts, or a file made from them"


class ModelError(SamaError):
    """A model folder, a checkpoint or a tokenizer that cannot be used."""

    exit_code = 4
    meaning = "a model folder, a checkpoint or a tokenizer"


class ValidityError(SamaError):
    """A result that would mean nothing, or one with a note under `--strict`."""

    exit_code = 5
    meaning = "the result is void, or a validity gate failed under --strict"


class ParityError(SamaError):
    """Two frameworks that do not compute the same."""

    exit_code = 6
    meaning = "the two frameworks do not agree"


class OutOfMemory(SamaError):
    """A device, or the host, has too little memory (EX_OSERR of sysexits.h)."""

    exit_code = 71
    meaning = "out of memory, of a device or the host"


class OutputError(SamaError):
    """The disk is full or a path cannot be written (EX_IOERR of sysexits.h)."""

    exit_code = 74
    meaning = "disk full or not writable"


class Interrupted(SamaError):
    """Ctrl-C, SIGTERM, or a lost process; the same command continues (EX_TEMPFAIL)."""

    exit_code = 75
    meaning = "interrupted, or another process of the run was lost; the same command continues"


EXIT_CODES = {0: "done"} | {kind.exit_code: kind.meaning for kind in SamaError.__subclasses__()}
"""Exit code -> what it means, as every `--help` and docs/exit-codes.md list them."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest known name, else the list of known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(sorted(known))}"

"""`python -m sama_jax` is `sama-jax`, which also starts here."""

import sys

from sama_jax.isolation import isolate

isolate()  # before anything is imported that a file of the current folder could stand in for

import signal  # noqa: E402

# Ctrl-C while modules are imported ends the process, without Python's traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from sama_jax.cli.entry import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

"""`python -m sama_jax` is `sama-jax`, which also starts here."""

import sys

from sama_jax.isolation import isolate

isolate()  # before anything is imported that a file of the current folder could stand in for

from sama_jax.cli.entry import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

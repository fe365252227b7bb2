"""`python -m sama_jax` is `sama-jax`."""

import sys

from sama_jax.cli.entry import main

sys.exit(main())

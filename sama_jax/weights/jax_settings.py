"""Refuses settings of JAX and XLA under which no result can be had, or none that can be told apart.

Asked before anything is traced: under some of them not even the shapes of a model can be found.
"""

import os

import jax

from sama_jax.errors import UsageError
from sama_jax.untrusted import printable

_LETS_PASS = (None, "allow", "log")
_DEBUGGING = {
    "jax_disable_jit": False,
    "jax_no_tracing": False,
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_error_checking_behavior_nan": "ignore",
    "jax_transfer_guard": None,
    "jax_transfer_guard_host_to_device": None,
    "jax_transfer_guard_device_to_host": None,
    "jax_numpy_dtype_promotion": "standard",
}
"""Settings of JAX for finding faults, with their defaults: others end a run in its middle. NaN
stands for "no score" here, and programs are compiled apart from what calls them."""


def usable_settings() -> None:
    """Raises `UsageError` for settings of JAX and XLA that no command can run or be told under."""
    values = jax.config.values
    # Those that this version of JAX does not have are not set.
    wrong = [
        n
        for n, usual in _DEBUGGING.items()
        if n in values and values[n] not in (usual, *_LETS_PASS)
    ]
    if wrong:
        found = ", ".join(f"{name.upper()}={values[name]}" for name in wrong)
        raise UsageError(
            f"found {found}; sama_jax does not run under JAX's settings for finding faults: unset "
            + ", ".join(name.upper() for name in wrong)
        )
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("--"):
        raise UsageError(
            f"XLA_FLAGS is {printable(flags)}, the name of a file; write the flags into the "
            "variable itself (--xla_...), so that they are part of the run's identity"
        )

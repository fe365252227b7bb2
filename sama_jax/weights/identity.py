"""Names all that a model's numbers depend on: what runs, loss stores and trainings are keyed by.

One place, so that whatever changes a number also changes the key, and no stale number is ever read.
"""

import dataclasses
import os
from typing import Any

import jax

from sama_jax import rng
from sama_jax.config import settings_hash
from sama_jax.models.attention_mask import mask_of
from sama_jax.weights.jax_settings import usable_settings
from sama_jax.weights.model_folder import ModelFolder

NEUTRAL = frozenset({"remat"})
"""Fields of a model that change no number; every other field is part of the key."""
_NEUTRAL_FLAGS = (
    "--xla_force_host_platform_device_count",
    "--xla_dump_",
    "--xla_gpu_cuda_data_dir",
)
"""Beginnings of XLA's flags that change no number; any other one may choose other kernels."""
_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "LIBTPU_INIT_ARGS")
"""What changes numbers behind JAX's back, in libraries of the devices."""

LOSSES = 1
"""What this package computes as a loss. Raise it with any change of a mask, of a plan, or of a
network that changes numbers by more than rounding: no stored loss of another number is read."""
ARITHMETIC = ("backend", "losses", "matmul_precision", "random_bits", "xla_flags")
"""The names of what `arithmetic` returns."""


def model_identity(folder: ModelFolder) -> dict[str, str]:
    """Returns, by name, all that a model's losses depend on besides its tokens and masks.

    Weights and configuration, every field of the model but the `NEUTRAL` ones, and the arithmetic
    of this process.

    Raises:
      UsageError: random bits are set to be others than everybody's.
    """
    model: Any = folder.model
    options = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    architecture = options.pop("arch")
    return {
        "weights": folder.identity,
        "architecture": settings_hash(repr(architecture)),
        "attention": architecture.attention,
        "attention_mask": mask_of(architecture),
        **{name: str(value) for name, value in options.items() if name not in NEUTRAL},
        **arithmetic(),
    }


def arithmetic() -> dict[str, str]:
    """Returns what changes the numbers of any model in this process: devices, precision, bits.

    Raises:
      UsageError: random bits are set to be others than everybody's, or `usable_settings`.
    """
    usable_settings()
    return {
        "backend": jax.default_backend(),
        "losses": str(LOSSES),
        "matmul_precision": matmul_precision() or "default",
        "xla_flags": _flags(),
        "random_bits": rng.checked_bits(),
    }


def _flags() -> str:
    """Returns what is set for XLA and for libraries below it, but for what changes no number."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    set_apart = [f"{name}={os.environ[name]}" for name in _VARIABLES if os.environ.get(name)]
    return " ".join([*sorted(f for f in flags if not f.startswith(_NEUTRAL_FLAGS)), *set_apart])


def matmul_precision() -> str | None:
    """Returns the precision that products are set to, or None for JAX's default."""
    return jax.config.jax_default_matmul_precision  # pyright: ignore  # declared at run time

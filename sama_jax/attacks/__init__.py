"""Registers the attacks: queries and statistics, one file a family of attacks.

May import the words and `core`.
"""

# Registration order is the order of every table: SAMA first.
from sama_jax.attacks import sama  # isort: skip
from sama_jax.attacks import likelihood  # isort: skip
from sama_jax.attacks import partition  # isort: skip
from sama_jax.attacks import beyond  # isort: skip
from sama_jax.attacks import circulated  # isort: skip
from sama_jax.attacks import denoising  # isort: skip
from sama_jax.attacks import infill  # isort: skip
from sama_jax.attacks import perturbed  # isort: skip
from sama_jax.attacks import prefixed  # isort: skip
from sama_jax.attacks import its  # isort: skip
from sama_jax.attacks import corpus  # isort: skip
from sama_jax.attacks import ladder  # isort: skip
from sama_jax.attacks.registry import (
    Attack,
    Probes,
    Query,
    get,
    names,
    register,
    register_corpus,
    select,
)

__all__ = [
    "Attack",
    "Probes",
    "Query",
    "beyond",
    "circulated",
    "corpus",
    "denoising",
    "get",
    "infill",
    "its",
    "ladder",
    "likelihood",
    "names",
    "partition",
    "perturbed",
    "prefixed",
    "register",
    "register_corpus",
    "sama",
    "select",
]

"""The attacks: a registry and one file a family. Importing the package registers all of them.

May import the words and `core`.
"""

from importlib import import_module

from sama_jax.attacks.queries import Probes, Procedure, Query, View
from sama_jax.attacks.registry import Attack, get, names, register, register_corpus, select

__all__ = [
    "Attack",
    "Probes",
    "Procedure",
    "Query",
    "View",
    "get",
    "names",
    "register",
    "register_corpus",
    "select",
]

FAMILIES = (
    "sama",
    "likelihood",
    "partition",
    "sama_other_models",
    "next_token",
    "circulated_forms",
    "denoising",
    "infill",
    "perturbed",
    "prefixed",
    "prompted",
    "its",
    "corpus",
    "ladder",
)
"""The files of attacks. Their order is the order of every table."""

for _family in FAMILIES:
    import_module(f"sama_jax.attacks.{_family}")

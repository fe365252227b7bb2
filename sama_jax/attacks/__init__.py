"""The attacks: a registry and one file a family. Importing the package registers all of them."""

from sama_jax.attacks import likelihood, sama
from sama_jax.attacks.registry import Attack, Probes, names, register, select

__all__ = ["Attack", "Probes", "likelihood", "names", "register", "sama", "select"]

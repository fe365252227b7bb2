"""Membership-inference audits of fine-tuned diffusion language models (SAMA) in JAX.

The public API is small; everything else is reached through its module:

    sign_statistics   SAMA's weighted sign statistic, jitted and vmapped over texts
    audit             run an audit of model folders from Python
    types, config     what travels, and the settings

Importing this package starts no JAX backend.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "AuditSettings",
    "ProbePlan",
    "SamaSettings",
    "SignStatistics",
    "run_audit",
    "sign_statistics",
]

_HOMES = {
    "AuditSettings": "sama_jax.config",
    "SamaSettings": "sama_jax.config",
    "ProbePlan": "sama_jax.arrays",
    "SignStatistics": "sama_jax.arrays",
    "sign_statistics": "sama_jax.core.votes",
    "run_audit": "sama_jax.programs.audit",
}

if TYPE_CHECKING:
    from sama_jax.arrays import ProbePlan, SignStatistics
    from sama_jax.config import AuditSettings, SamaSettings
    from sama_jax.core.votes import sign_statistics
    from sama_jax.programs.audit import run_audit


def __getattr__(name: str) -> Any:
    """Loads a public name on first use, so that `import sama_jax` stays fast."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sama_jax' has no attribute '{name}'")

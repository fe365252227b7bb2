"""Membership-inference audits of fine-tuned diffusion language models (SAMA) in JAX.

The public API is small; everything else is reached through its module:

    run_audit, AuditJob, read_texts        an audit of model folders, from Python
    read_losses                            the token losses that it stored, as arrays
    AuditSettings, SamaSettings, preset    what its numbers depend on
    sign_statistics, ProbePlan, SignStatistics
                                           SAMA's weighted sign statistic on arrays of one's own,
                                           jitted and vmapped over texts

Importing this package starts no JAX backend.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = [
    "AuditJob",
    "AuditSettings",
    "ProbePlan",
    "SamaSettings",
    "SignStatistics",
    "preset",
    "read_losses",
    "read_texts",
    "run_audit",
    "sign_statistics",
]

_HOMES = {
    "AuditJob": "sama_jax.programs.jobs",
    "AuditSettings": "sama_jax.config",
    "ProbePlan": "sama_jax.arrays",
    "SamaSettings": "sama_jax.config",
    "SignStatistics": "sama_jax.arrays",
    "preset": "sama_jax.config",
    "read_losses": "sama_jax.programs.read_losses",
    "read_texts": "sama_jax.texts.read",
    "run_audit": "sama_jax.programs.audit",
    "sign_statistics": "sama_jax.core.votes",
}

# Not from `typing`: `python -m sama_jax` loads this file while the current folder is still the
# first place where modules are looked for (`isolation`).
TYPE_CHECKING = False
if TYPE_CHECKING:
    from sama_jax.arrays import ProbePlan, SignStatistics
    from sama_jax.config import AuditSettings, SamaSettings, preset
    from sama_jax.core.votes import sign_statistics
    from sama_jax.programs.audit import run_audit
    from sama_jax.programs.jobs import AuditJob
    from sama_jax.programs.read_losses import read_losses
    from sama_jax.texts.read import read_texts


def __getattr__(name: str) -> object:
    """Loads a public name on first use, so that `import sama_jax` stays fast."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sama_jax' has no attribute '{name}'")

"""Asks every gate of `sama_jax.validity` about an audit, at the moment when it can be answered."""

from sama_jax.programs.audit_inputs import Inputs, Tokenised
from sama_jax.programs.data_gates import data_gates
from sama_jax.programs.jobs import AuditJob
from sama_jax.validity.gate import Gate


def gates_before(job: AuditJob, inputs: Inputs, tokenised: Tokenised) -> list[Gate]:
    """Returns the gates about texts and tokens, before a model runs."""
    return data_gates(job, inputs, tokenised).gates

"""The public names: there, lazy, and the settings and jobs free of JAX and NumPy."""

import subprocess
import sys
from importlib import import_module

import pytest

import sama_jax

PLAIN = {"AuditJob", "AuditSettings", "SamaSettings", "preset"}


@pytest.mark.parametrize("name", sama_jax.__all__)
def test_a_public_name_is_that_of_its_module(name: str):
    home = getattr(sama_jax, name).__module__
    assert getattr(import_module(home), name) is getattr(sama_jax, name)


def test_what_the_readme_needs_is_public():
    assert {"AuditJob", "read_texts", "run_audit", "sign_statistics"} <= set(sama_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'run_audits'"):
        sama_jax.run_audits  # noqa: B018


def test_jobs_and_settings_import_neither_jax_nor_numpy():
    code = (
        "import sys, sama_jax\n"
        f"for name in {sorted(PLAIN)}: getattr(sama_jax, name)\n"
        "assert not {'jax', 'numpy'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)

"""The examples in docstrings give what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["sama_jax.core.votes", "sama_jax.texts.buckets"])
def test_the_examples_of_docstrings_are_true(name: str):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0

"""The identity of probes and procedures: losses in the store are found by it."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sama_jax import attacks
from sama_jax.attacks.queries import Passes, Probes, flatten
from sama_jax.config import AuditSettings, SamaSettings

LENGTH = 20
SAMA = SamaSettings(steps=3, subsets=4)
BERNOULLI = dataclasses.replace(AuditSettings().likelihood, estimator="bernoulli")
SETTINGS = AuditSettings(max_length=LENGTH, passes=4, sama=SAMA)
RUNS = (SETTINGS, dataclasses.replace(SETTINGS, likelihood=BERNOULLI))


def shipped() -> dict[Passes, bool]:
    """Returns what the attacks read, and whether its masks depend on a guide."""
    found = {}
    for settings in RUNS:
        for name in attacks.names():
            for query in flatten(attacks.get(name).queries(settings)):
                found[query.reads] = query.guides_probes
    return found


SHIPPED = shipped()


def other(value: Any, kind: Any) -> Any:
    """Returns another value of a field's type."""
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != value)
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2


def changed(whole: Any, prefix: str = "") -> dict[str, Any]:
    """Returns copies of a dataclass with one field changed, by the field's dotted name."""
    found = {}
    kinds = typing.get_type_hints(type(whole))
    for field in dataclasses.fields(whole):
        value, name = getattr(whole, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            inner = changed(value, f"{name}.")
        else:
            inner = {name: other(value, kinds[field.name])}
        found |= {k: dataclasses.replace(whole, **{field.name: v}) for k, v in inner.items()}
    return found


def masks(probes: Probes) -> tuple[np.ndarray, np.ndarray]:
    plan = jax.jit(probes.plan)(jax.random.key(1), jnp.arange(LENGTH) < 17)
    return np.asarray(plan.masks), np.asarray(plan.scored)


def test_every_kind_of_passes_is_looked_at():
    kinds = {k for base in Passes.__subclasses__() for k in base.__subclasses__()}
    shipped_kinds = {k for k in kinds if k.__module__.startswith("sama_jax")}
    assert shipped_kinds == {type(reads) for reads in SHIPPED}


@pytest.mark.parametrize("reads", SHIPPED, ids=lambda r: type(r).__name__)
def test_a_field_is_in_the_identity_or_changes_no_mask(reads: Passes):
    listed = type(reads).not_in_identity
    for name, another in changed(reads).items():
        if another.identity != reads.identity:
            assert name not in listed, name
            continue
        unused = (type(reads).__name__, name, getattr(reads, "estimator", None))
        harmless = name in listed or any(name.startswith(f"{n}.") for n in listed)
        assert harmless or unused == ("LikelihoodProbes", "eps", "exact"), name
        # A run has one maximum length, at which its noise is drawn; a guide brings the masks.
        if isinstance(reads, Probes) and not SHIPPED[reads] and name != "max_length":
            for before, after in zip(masks(reads), masks(another), strict=True):
                np.testing.assert_array_equal(before, after, err_msg=name)


def test_a_forgotten_field_would_be_seen():
    @dataclasses.dataclass(frozen=True)
    class Half(Probes):
        passes: int
        share: float

        hashed_as = ("half",)

        def plan(self, key, maskable): ...
        def slot_bounds(self, length): ...

    assert Half(2, 0.5).identity != Half(2, 0.4).identity
    assert Half(2, 0.5).identity != Half(3, 0.5).identity

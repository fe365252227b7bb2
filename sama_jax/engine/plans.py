"""Draws probe plans again from what they derive from, and remembers the last ones."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from sama_jax import rng
from sama_jax.arrays import ProbePlan, TextKeyData
from sama_jax.attacks.queries import Probes
from sama_jax.engine.text_table import TextTable, padded

PLAN_ROWS = 8
"""Texts whose plans and statistics are computed at once; one shape for all buckets."""
PLANS_KEPT = 64
"""Plans of as many calls are remembered at most; 0.8 MB each for SAMA at 512 tokens."""


@runtime_checkable
class PlanSource(Protocol):
    """Where the plans of a task come from."""

    def plans(
        self,
        texts: TextTable,
        rows: Sequence[int],
        guide: Float[np.ndarray, "b g l"] | None,
    ) -> ProbePlan:
        """Returns the plans of up to `PLAN_ROWS` texts, filled up to `PLAN_ROWS` (host)."""
        ...

    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        """Returns the most positions that each pass scores in a text of `length` tokens."""
        ...


class DrawnPlans(NamedTuple):
    """Plans that are drawn from each text's own key."""

    probes: Probes
    seed: int
    max_length: int

    def plans(
        self,
        texts: TextTable,
        rows: Sequence[int],
        guide: Float[np.ndarray, "b g l"] | None,
    ) -> ProbePlan:
        """Draws the plans of these rows of a table; `guide` is what guided masks depend on."""
        some = texts.take([*rows, *[-1] * (PLAN_ROWS - len(rows))])
        maskable = padded(some.maskable, self.max_length, np.bool_)
        more = () if guide is None else (guide,)
        drawn = draw(self.probes, np.uint32(self.seed), some.high, some.low, maskable, *more)
        return jax.tree.map(np.asarray, drawn)

    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        """Asks the probes."""
        return self.probes.slot_bounds(length)


class ReplayedPlans(NamedTuple):
    """Plans that were read from a file, matched with a run's texts."""

    identity: str
    plan: ProbePlan
    """Of all texts of the file."""
    row_of: list[int]
    """Row in `plan` of each text of the run."""

    def plans(
        self,
        texts: TextTable,
        rows: Sequence[int],
        guide: Float[np.ndarray, "b g l"] | None,
    ) -> ProbePlan:
        """Looks the plans of these rows up."""
        at = [self.row_of[row] for row in rows]
        fill = PLAN_ROWS - len(at)
        return jax.tree.map(
            lambda x: np.concatenate([x[at], np.zeros((fill, *x.shape[1:]), x.dtype)]), self.plan
        )

    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        """Counts what the file scores, whatever the length."""
        return np.asarray(self.plan.scored).sum(axis=-1).max(axis=0, initial=1)


# Sorting and random bits take LLVM two seconds to optimise and are as fast at its level 1: half of
# that, and an audit with all attacks draws 13 kinds of plans.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 1})
def draw(
    probes: Probes,
    seed: Any,
    high: UInt32[Array | np.ndarray, " b"],
    low: UInt32[Array | np.ndarray, " b"],
    maskable: Bool[Array | np.ndarray, "b l"],
    *guide: Float[Array | np.ndarray, "b g l"],
) -> ProbePlan:
    """Draws the plans of a batch of texts from the seed, their keys and what may be masked."""

    def one(high, low, maskable, *guide):
        return probes.plan(rng.text_key(seed, TextKeyData(high, low)), maskable, *guide)

    return jax.vmap(one)(high, low, maskable, *guide)


class PlanCache:
    """Remembers the plans of the batches that are being worked on.

    The passes of both models and then the score read a plan, and drawing takes 6 ms for 8 texts of
    96 tokens, as long as a pass of a small model.
    """

    def __init__(self) -> None:
        self._plans: dict[tuple[str, str, tuple[int, ...]], ProbePlan] = {}

    def get(self, view: str, identity: str, rows: Sequence[int]) -> ProbePlan | None:
        """Returns the plans of these rows, if they are remembered."""
        return self._plans.get((view, identity, tuple(rows)))

    def put(self, view: str, identity: str, rows: Sequence[int], plan: ProbePlan) -> ProbePlan:
        """Remembers plans, and forgets all others if there are too many."""
        if len(self._plans) >= PLANS_KEPT:
            self._plans.clear()
        self._plans[view, identity, tuple(rows)] = plan
        return plan

    def forget(self, rows: Iterable[int]) -> None:
        """Forgets the plans of texts that are done with."""
        done = set(rows)
        self._plans = {at: p for at, p in self._plans.items() if done.isdisjoint(at[2])}

"""SAMA: progressive masks, random subsets, sign votes (arXiv 2601.20125, ICLR 2026)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax import rng
from sama_jax.arrays import AnyArray, ProbePlan, Reading
from sama_jax.attacks.queries import Probes
from sama_jax.attacks.registry import register
from sama_jax.config import AuditSettings, SamaSettings
from sama_jax.core import masking, votes


@dataclass(frozen=True)
class ProgressiveProbes(Probes):
    """SAMA's plan: T densities, N subsets each, repeated R times (t = R T passes)."""

    settings: SamaSettings
    max_length: int

    hashed_as = ("progressive",)
    not_in_identity = (
        "max_length",
        "settings.subsets",
        "settings.subset_size",
        "settings.skip",
        "settings.weights",
        "settings.ties",
    )

    @property
    def passes(self) -> int:
        return self.settings.passes

    def _hashed(self) -> tuple[Any, ...]:
        # The votes' own switches change no mask and no loss.
        s = self.settings
        masks = (s.steps, s.min_density, s.max_density, s.schedule, s.nesting, s.loss_source)
        return masks, (s.repeats, s.exclude_special, s.exclude_position0_when_shifted)

    def plan(self, key: Key[Array, ""], maskable: Bool[Array, " l"]) -> ProbePlan:
        """Draws masks, scored positions, step weights and subsets of one text."""
        repeat_keys = rng.step_keys(key, self.settings.repeats)
        # A loop, not `vmap`: four repeats would take four times as long to compile.
        repeats = jax.lax.map(lambda k: self._repeat(k, maskable), repeat_keys)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), repeats)

    def _repeat(self, key: Key[Array, ""], maskable: Bool[Array, " l"]) -> ProbePlan:
        s = self.settings
        # Numbers of masked tokens come from a table: see `masking.count_table`.
        table = jnp.asarray(masking.count_table(s, self.max_length))
        counts = table[maskable.sum()]
        draw = masking.nested_masks if s.nesting == "nested" else masking.fresh_masks
        mask_key = rng.for_purpose(key, rng.Purpose.PROGRESSIVE_MASKS)
        masks = draw(mask_key, maskable, counts, self.max_length)
        new = masking.newly_masked(masks)
        recorded = (new if s.skip == "per_text" else masks).any(axis=1)
        subset_keys = rng.step_keys(rng.for_purpose(key, rng.Purpose.SUBSETS), s.steps)
        subsets = jax.vmap(lambda k, m: votes.sample_subsets(k, m, s.subsets, s.subset_size))
        return ProbePlan(
            masks=masks,
            scored=new if s.loss_source == "stored_first" else masks,
            weights=votes.step_weights(recorded, s.weights),
            subsets=subsets(subset_keys, masks),
        )

    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        """Bounds the scored positions of each pass over all texts up to `length`."""
        s = self.settings
        counts = masking.count_table(s, length)
        if s.loss_source == "stored_first" and s.nesting == "nested":
            counts = np.diff(counts, axis=1, prepend=0)
        return np.tile(counts.max(axis=0), s.repeats)


def progressive_probes(settings: AuditSettings) -> ProgressiveProbes:
    """Makes the probes of an audit."""
    return ProgressiveProbes(settings.sama, settings.max_length)


@register(
    "sama",
    probes=progressive_probes,
    needs_reference=True,
    access="masked logits + reference",
    source="arXiv 2601.20125; Stry233/SAMA attack/attacks/sama.py",
)
def sama(reading: Reading, settings: AuditSettings) -> Float[AnyArray, ""]:
    """Weighted share of random token subsets whose loss the target lowers."""
    return votes.of_reading(reading, settings.sama.ties).score

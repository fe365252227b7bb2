"""ITS: masks of tokens that attend little to each other (`Chrisqcwx/DLLM-MIA`).

The idea: the losses of tokens that depend on each other say the same thing twice, so tokens are
masked, and vote, in groups of low mutual attention in the reference. README and code of the source
differ in what a group is; both are here (docs/differences.md).
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sama_jax import rng
from sama_jax.arrays import Model, Params, ProbePlan, Reading
from sama_jax.attacks.queries import REFERENCE, Probes, Procedure, Query
from sama_jax.attacks.registry import register
from sama_jax.config import AuditSettings, ItsSettings, SamaSettings
from sama_jax.core import masking, votes


def independent_groups(
    key: Key[Array, ""],
    attention: Float[Array, "l l"],
    maskable: Bool[Array, " l"],
    counts: Int[Array, " t"],
    size: int,
    settings: ItsSettings,
    max_length: int,
) -> Int[Array, "t l"]:
    """Puts tokens into groups: the group of every token in each step, -1 for none.

    Step t takes `counts[t]` tokens.

    A group starts at the token that was taken least often so far (ties at random). Then, one by
    one, it takes a random one of the `least` tokens with the lowest weight a g + lambda c, where g
    is the attention between a token and the group, both ways, and c how often the token was taken.
    After `size` tokens the next group starts; groups of a step are disjoint. Counts must not exceed
    the maskable tokens.
    """
    length = maskable.shape[0]
    noise_key, pick_key = jax.random.split(rng.for_purpose(key, rng.Purpose.INDEPENDENT_GROUPS))
    steps = counts.shape[0]
    # Noise and bits at the fixed maximum length: the padded length changes nothing.
    noise = jax.vmap(lambda k: jax.random.normal(k, (max_length,))[:length])
    bits = jax.vmap(lambda k: jax.random.bits(k, (max_length,), jnp.uint32))
    both_ways = attention + attention.T
    candidates = min(settings.least, length)

    def step(taken: Float[Array, " l"], drawn: tuple[Array, ...]) -> tuple[Array, Array]:
        start, pick, count = drawn

        def take(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            group, tie = state
            free = maskable & (group < 0)
            first = jnp.argmin(jnp.where(free, taken + 0.01 * start, jnp.inf))
            weight = settings.attention * tie + settings.balance * taken
            _, lowest = jax.lax.top_k(-jnp.where(free, weight, jnp.inf), candidates)
            at = rng.bounded(pick[i], jnp.minimum(free.sum(), candidates).astype(jnp.int32))
            new = i % size == 0
            chosen = jnp.where(new, first, lowest[at])
            tie = jnp.where(new, 0.0, tie) + both_ways[chosen]
            return group.at[chosen].set(i // size), tie

        nothing = jnp.full(length, -1, jnp.int32), jnp.zeros(length, jnp.float32)
        group, _ = jax.lax.fori_loop(0, count, take, nothing)
        return taken + (group >= 0), group

    drawn = noise(rng.step_keys(noise_key, steps)), bits(rng.step_keys(pick_key, steps)), counts
    return jax.lax.scan(step, jnp.zeros(length, jnp.float32), drawn)[1]


@dataclass(frozen=True)
class AttentionGroups(Procedure):
    """One pass of the reference over the unmasked text; its attention makes the groups.

    Values are the number of a token's group in each step.
    """

    schedule: SamaSettings
    size: int
    settings: ItsSettings
    max_length: int

    hashed_as = ("independent groups",)
    not_in_identity = (
        "max_length",
        "schedule.nesting",
        "schedule.loss_source",
        "schedule.repeats",
        "schedule.exclude_special",
        "schedule.exclude_position0_when_shifted",
        "schedule.subsets",
        "schedule.subset_size",
        "schedule.skip",
        "schedule.weights",
        "schedule.ties",
    )
    passes = 1

    @property
    def rows(self) -> int:
        return self.schedule.steps

    def _hashed(self) -> tuple[Any, ...]:
        s = self.schedule
        return (s.steps, s.min_density, s.max_density, s.schedule), self.size, self.settings

    def run(
        self,
        model: Model,
        params: Params,
        keys: Key[Array, " b"],
        tokens: Int[Array, "b l"],
        valid: Bool[Array, "b l"],
        maskable: Bool[Array, "b l"],
    ) -> Float[Array, "t b l"]:
        width = min(tokens.shape[1], self.max_length)  # visible padding may be longer
        attention = model.attention(params, tokens, valid)[:, :width, :width]
        table = jnp.asarray(masking.count_table(self.schedule, self.max_length))

        def one(key: Array, matrix: Array, may: Array) -> Int[Array, "t l"]:
            counts = table[may.sum()]
            return independent_groups(
                key, matrix, may, counts, self.size, self.settings, self.max_length
            )

        groups = jax.vmap(one)(keys, attention, maskable[:, :width]).swapaxes(0, 1)
        values = jnp.where(groups >= 0, groups.astype(jnp.float32), jnp.nan)
        unread = ((0, 0), (0, 0), (0, tokens.shape[1] - width))
        return jnp.pad(values, unread, constant_values=jnp.nan)


@dataclass(frozen=True)
class GroupProbes(Probes):
    """Masks each step's groups. They vote themselves, or random subsets of their union do."""

    schedule: SamaSettings
    max_length: int
    groups_vote: bool

    # Masks come from the guide alone, whose identity is added to this one.
    not_in_identity = ("schedule", "max_length", "groups_vote")

    @property
    def identity(self) -> str:
        return "groups"

    @property
    def passes(self) -> int:
        return self.schedule.steps

    def plan(
        self, key: Key[Array, ""], maskable: Bool[Array, " l"], guide: Float[Array, "t l"]
    ) -> ProbePlan:
        masks = ~jnp.isnan(guide) & maskable[None, :]
        if self.groups_vote:
            subsets = jax.vmap(self._members)(masks, guide)
        else:
            s = self.schedule
            keys = rng.step_keys(rng.for_purpose(key, rng.Purpose.SUBSETS), s.steps)
            draw = jax.vmap(lambda k, m: votes.sample_subsets(k, m, s.subsets, s.subset_size))
            subsets = draw(keys, masks)
        return ProbePlan(masks, masks, masks.any(axis=1).astype(jnp.float32), subsets)

    def _members(self, mask: Bool[Array, " l"], group: Float[Array, " l"]) -> Int[Array, "n m"]:
        """Lists the positions of each group; all but a step's last group are full."""
        size = self.schedule.subset_size
        num = -(-int(self.slot_bounds(self.max_length).max()) // size)
        order = jnp.argsort(jnp.where(mask, group, jnp.inf), stable=True).astype(jnp.int32)
        order = jnp.where(jnp.arange(len(order)) < mask.sum(), order, -1)
        fill = max(0, num * size - len(order))
        return jnp.pad(order, (0, fill), constant_values=-1)[: num * size].reshape(num, size)

    def slot_bounds(self, length: int) -> Int[np.ndarray, " t"]:
        return masking.count_table(self.schedule, length).max(axis=0)


def _queries(settings: AuditSettings, *, groups_vote: bool) -> dict[str, Query]:
    # Densities of SAMA's published code, which ITS starts from.
    schedule = replace(
        settings.sama, steps=settings.budget, repeats=1, schedule="code_linear", nesting="fresh"
    )
    size = schedule.subset_size if groups_vote else settings.max_length
    groups = AttentionGroups(schedule, size, settings.its, settings.max_length)
    guide = Query(groups, roles=REFERENCE)
    voters = GroupProbes(schedule, settings.max_length, groups_vote)
    return {"text": Query(voters, guide=guide)}


def _votes(reading: Reading) -> Float[Array, ""]:
    """Averages over the steps the share of subsets whose loss the target lowers."""
    plan = reading.plan
    sums = votes.subset_sums(reading.reference - reading.target, plan.subsets)
    voters = (plan.subsets >= 0).any(axis=-1).sum(axis=1)
    shares = (sums > 0).sum(axis=1) / jnp.maximum(voters, 1)
    recorded = plan.weights.sum()
    return (plan.weights * shares).sum() / jnp.where(recorded > 0, recorded, jnp.nan)


@register(
    "its",
    queries=lambda settings: _queries(settings, groups_vote=True),
    access="masked logits + attention of the reference",
    source="Chrisqcwx/DLLM-MIA README.md",
)
def its(reading: Reading) -> Float[Array, ""]:
    """Share of groups of tokens of low mutual attention whose loss the target lowers.

    As its README has it: in each step, disjoint groups of `sama.subset_size` tokens are drawn, as
    many as the step masks, masked together, and vote. One pass of the reference more than SAMA.
    """
    return _votes(reading)


@register(
    "its:code",
    queries=lambda settings: _queries(settings, groups_vote=False),
    access="masked logits + attention of the reference",
    source="Chrisqcwx/DLLM-MIA attack/attacks/its.py",
    in_all=False,
)
def its_code(reading: Reading) -> Float[Array, ""]:
    """Share of random subsets whose loss the target lowers, of masks of low mutual attention.

    As its code has it: one group a step, which is the mask; SAMA's random subsets of it vote.
    """
    return _votes(reading)

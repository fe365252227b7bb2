"""Defines a mixture of experts: a router sends each token through a few gated MLPs out of many.

Parameters (e experts of width f):

    router/kernel [d, e]    router/expert_bias [e] where there is one (a buffer, never trained)
    experts/{gate,up}_proj/kernel [e, d, f]    experts/down_proj/kernel [e, f, d]

Source of the arithmetic: the authors' modelling code as kept in `ZHZisZZ/dllm`
(`dllm/pipelines/llada/models/modeling_lladamoe.py`, `dllm/pipelines/llada2/models/
modeling_llada2_moe.py`); docs/models.md lists the facts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Holds all that shapes an expert layer and its arithmetic."""

    count: int
    active: int
    """Experts that each token goes through."""
    width: int
    gate: Literal["softmax", "sigmoid"]
    """How the router weighs: `softmax_gate` (LLaDA-MoE, Qwen3) or `sigmoid_gate` (LLaDA2)."""
    bias: bool = False
    """A bias of the experts' scores, kept from balancing them in training."""
    normalise: bool = False
    """Whether a token's weights sum to one (softmax gate; those of the sigmoid gate always do)."""
    shared_width: int = 0
    """Of the MLP beside them that every token goes through; 0: there is none."""
    groups: int = 1
    kept_groups: int = 1
    """A token's experts come from this many of the `groups` (sigmoid gate only)."""
    scale: float = 1.0
    """Of the normalised weights (sigmoid gate only)."""

    def flops_per_token(self, model_width: int) -> int:
        """Counts operations of the router and of the experts that a token goes through."""
        width = self.active * self.width + self.shared_width
        return 2 * model_width * self.count + 6 * model_width * width


def softmax_gate(
    h: Float[Array, "n d"], kernel: Float[Array, "d e"], bias: Float[Array, " e"], experts: Experts
) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
    """Routes as LLaDA-MoE and Qwen3 do: experts of each token, and their weights in the activation
    dtype.

    Softmax over all experts in float32; the bias is added to the probabilities, and to the weights
    with them. Of equal scores the expert with the lower index is taken.
    """
    scores = jax.nn.softmax((h @ kernel.astype(h.dtype)).astype(jnp.float32), axis=-1)
    weight, index = jax.lax.top_k(scores + bias[None, :], experts.active)
    if experts.normalise:
        weight = weight / weight.sum(axis=-1, keepdims=True)
    return index, weight.astype(h.dtype)


def sigmoid_gate(
    h: Float[Array, "n d"], kernel: Float[Array, "d e"], bias: Float[Array, " e"], experts: Experts
) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
    """Routes as LLaDA2 does: experts of each token, and their weights in float32.

    The bias takes part in the choice of groups and experts, but not in the weights. A group counts
    by its two best experts. Of equal scores the lower index is taken.
    """
    wide, kernel = h.astype(jnp.float32), kernel.astype(jnp.float32)
    # Whole float32 products: a shorter format would send tokens elsewhere.
    scores = jax.nn.sigmoid(jnp.matmul(wide, kernel, precision=jax.lax.Precision.HIGHEST))
    grouped = (scores + bias[None, :]).reshape(len(h), experts.groups, -1)
    best_two, _ = jax.lax.top_k(grouped, 2)
    _, kept = jax.lax.top_k(best_two.sum(axis=-1), experts.kept_groups)
    is_kept = (kept[:, :, None] == jnp.arange(experts.groups)[None, None, :]).any(axis=1)
    choice = jnp.where(is_kept[:, :, None], grouped, -jnp.inf).reshape(scores.shape)
    _, index = jax.lax.top_k(choice, experts.active)
    weight = jnp.take_along_axis(scores, index, axis=1)
    if experts.active > 1:
        weight = weight / (weight.sum(axis=-1, keepdims=True) + 1e-20)
    return index, weight * experts.scale


_GATES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "softmax": softmax_gate,
    "sigmoid": sigmoid_gate,
}


def mix(
    x: Float[Array, "n d"],
    index: Int[Array, "n k"],
    weight: Float[Array, "n k"],
    gate: Float[Array, "e d f"],
    up: Float[Array, "e d f"],
    down: Float[Array, "e f d"],
) -> Float[Array, "n d"]:
    """Sums each token's weighted experts, added in the order of the experts, in weight's dtype.

    (Token, expert) pairs are sorted by expert and cut into tiles of one expert each; a scan takes
    one tile at a time, so only a tile's activations exist at once. The last tile of an expert is
    filled up with weight 0. The number of tiles is the most that any routing can need.

    On a CPU, 1024 tokens of width 64 through 8 of 64 experts of width 32 take 4 ms and 0.1 MiB; a
    scan over experts that computes all tokens for each takes 12 ms, and `jax.lax.ragged_dot`,
    which XLA expands there to all pairs of rows and experts, 168 ms and 132 MiB. Not measured on
    accelerators, which have kernels for `ragged_dot`.
    """
    num_experts, pairs, active = gate.shape[0], index.size, index.shape[1]
    # A quarter of the mean load: padding then costs a quarter of the work on average.
    tile = max(8, min(128, pairs // num_experts // 4))
    num_tiles = pairs // tile + min(num_experts, pairs)

    flat = index.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    load = jnp.bincount(flat, length=num_experts)
    tiles = (load + tile - 1) // tile
    last_tile, last_pair = jnp.cumsum(tiles), jnp.cumsum(load)
    number = jnp.arange(num_tiles)
    expert = jnp.searchsorted(last_tile, number, side="right", method="compare_all")
    expert = jnp.minimum(expert, num_experts - 1)  # tiles that this routing does not need
    place = (number - (last_tile - tiles)[expert])[:, None] * tile + jnp.arange(tile)[None, :]
    used = place < load[expert][:, None]
    pair = order[jnp.where(used, (last_pair - load)[expert][:, None] + place, 0)]

    def one_tile(total, work):
        expert, pair, used = work
        rows = x[pair // active]
        hidden = jax.nn.silu(rows @ gate[expert]) * (rows @ up[expert])
        share = jnp.where(used, weight.reshape(-1)[pair], 0)
        out = (hidden @ down[expert]).astype(weight.dtype) * share[:, None]
        return total.at[pair // active].add(out), None

    start = jnp.zeros(x.shape, weight.dtype)
    total, _ = jax.lax.scan(one_tile, start, (expert, pair, used))
    return total


class _Weight(nn.Module):
    """Holds a `kernel`, in the activation dtype; experts are stacked on its first axis."""

    shape: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self):
        init = nn.initializers.normal(0.02)
        return self.param("kernel", init, self.shape, jnp.float32).astype(self.dtype)


class _Router(nn.Module):
    """Holds the parameters of a gate, in the dtype that they are stored in."""

    width: int
    experts: Experts

    @nn.compact
    def __call__(self):
        count = self.experts.count
        init = nn.initializers.normal(0.02)
        kernel = self.param("kernel", init, (self.width, count), jnp.float32)
        if not self.experts.bias:
            return kernel, jnp.zeros(count)
        bias = self.param("expert_bias", nn.initializers.zeros, (count,), jnp.float32)
        return kernel, jax.lax.stop_gradient(bias.astype(jnp.float32))


class _GatedExperts(nn.Module):
    """Holds the gate, up and down projections of all experts."""

    width: int
    experts: Experts
    dtype: Any

    @nn.compact
    def __call__(self):
        count, inner = self.experts.count, self.experts.width
        return (
            _Weight((count, self.width, inner), self.dtype, name="gate_proj")(),
            _Weight((count, self.width, inner), self.dtype, name="up_proj")(),
            _Weight((count, inner, self.width), self.dtype, name="down_proj")(),
        )


class Moe(nn.Module):
    """Computes the expert layer, in the place of a block's MLP. Padding is routed like any token.

    A shared expert, which every token goes through, is an MLP beside it.
    """

    experts: Experts
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        width = x.shape[-1]
        flat = x.reshape(-1, width).astype(self.dtype)
        router = _Router(width, self.experts, name="router")()
        index, weight = _GATES[self.experts.gate](flat, *router, self.experts)
        weights = _GatedExperts(width, self.experts, self.dtype, name="experts")()
        return mix(flat, index, weight, *weights).astype(self.dtype).reshape(x.shape)

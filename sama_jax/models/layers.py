"""What the networks beside the Llama-like one share: layer norm, attention, scanned blocks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sama_jax.models import transformer
from sama_jax.models.transformer import Linear


class LayerNorm(nn.Module):
    """Layer norm, all of it in float32 as PyTorch's kernels do it; cast to `dtype` last."""

    eps: float
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        row = (1,) * (x.ndim - 1) + x.shape[-1:]
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        wide = wide * scale.astype(jnp.float32).reshape(row)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
            wide = wide + bias.astype(jnp.float32).reshape(row)
        return wide.astype(self.dtype)


def split_heads(x: Float[Array, "b l d"], heads: int) -> Float[Array, "b h l a"]:
    """Heads are contiguous parts of the last axis."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def attend(
    q: Float[Array, "b h k a"],
    k: Float[Array, "b h l a"],
    v: Float[Array, "b h l a"],
    allowed: Bool[Array, "b #k l"],
) -> tuple[Float[Array, "b k d"], Float[Array, "b h k l"]]:
    """`transformer.attend` with merged heads, and the weights."""
    out, weights = transformer.attend(q, k, v, allowed)
    out = out.swapaxes(1, 2)
    return out.reshape(*out.shape[:2], -1), weights


def all_positions(x: Float[Array, "b l d"]) -> Int[Array, "b l"]:
    """0..l-1 in every row."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])


def take(x: Float[Array, "b l d"], positions: Int[Array, "b k"] | None) -> Float[Array, "b k d"]:
    """Rows of `x` at `positions`; all of them if None."""
    if positions is None:
        return x
    return jnp.take_along_axis(x, positions[:, :, None], axis=1)


def add_weights(total: Float[Array, "b k l"] | None, weights: Float[Array, "b h k l"]) -> Any:
    """Sums mean-over-heads attention over layers; None where it is not wanted."""
    return None if total is None else total + weights.mean(axis=1)


def scanned(block: type[nn.Module], remat: bool, length: int, in_axes: tuple[Any, ...]) -> Any:
    """`block` stacked `length` times: (carry, ..) -> (carry, None), parameters on a first axis."""
    return nn.scan(
        nn.remat(block) if remat else block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,  # pyright: ignore
        length=length,
    )


class Projections(nn.Module):
    """Queries of some positions, keys and values of all, heads split."""

    width: int
    heads: int
    use_bias: bool
    dtype: Any

    def setup(self):
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(self.width, self.use_bias, self.dtype) for _ in range(4)
        )

    def heads_of(self, query, x):
        """[b, h, k, a], [b, h, l, a], [b, h, l, a]."""
        parts = (self.q_proj(query), self.k_proj(x), self.v_proj(x))
        return tuple(split_heads(part, self.heads) for part in parts)

    def merge(self, out):
        """The output projection."""
        return self.o_proj(out)

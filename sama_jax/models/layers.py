"""Defines the layers that several networks are made of: norms, linear layers, rotary embedding."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Norm(nn.Module):
    """Divides by the root mean square in float32, casts back to the input's dtype, and then scales.

    The order matters in bfloat16: scaling before the cast changes about a quarter of the outputs
    by one unit in the last place.
    """

    eps: float
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        out = wide.astype(x.dtype) * _row(scale.astype(self.dtype), x)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
            out = out + _row(bias.astype(self.dtype), x)
        return out


def _row(vector: Float[Array, " d"], like: Float[Array, "*b d"]) -> Float[Array, "*r d"]:
    """Broadcasts explicitly, so that rank promotion may be forbidden."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class LayerNorm(nn.Module):
    """Computes a layer norm in float32, as PyTorch's kernels do, and casts to `dtype` last."""

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


class Linear(nn.Module):
    """Computes `x @ kernel + bias`. Weights are drawn with standard deviation 0.02, LLaDA's
    `init_std`.

    Leading axes are flattened: XLA on a CPU takes 3.9 ms for the kernel's gradient from
    [32, 64, 128] and 1.8 ms from [2048, 128]; the product itself is the same.
    """

    features: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        init = nn.initializers.normal(0.02)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        out = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            out = out + bias.astype(self.dtype)[None, :]
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            out = (out.astype(jnp.float32) + flat @ a @ b).astype(self.dtype)
        return out.reshape(*x.shape[:-1], self.features)


class Embed(nn.Embed):
    """Looks rows up. An adapter changes what is looked up, not a tied head, as in PEFT's forward.

    Sums with an adapter are float32, here and in `Linear`, since PEFT keeps adapters in it.
    """

    def __call__(self, inputs: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        out = super().__call__(inputs)
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            out = (out.astype(jnp.float32) + jnp.take(a, inputs, axis=0) @ b).astype(out.dtype)
        return out


class LinearScaling(NamedTuple):
    """Stretches all rotary frequencies alike (`rope_type` linear in transformers)."""

    factor: float


class Llama3Scaling(NamedTuple):
    """Stretches slow rotary frequencies as Llama 3 does (`rope_type` llama3 in transformers)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    """Positions of the first training phase."""


class YarnScaling(NamedTuple):
    """Stretches slow rotary frequencies as YaRN does (`rope_type` yarn in transformers)."""

    factor: float
    beta_fast: float
    """Turns over the original length from which on a frequency stays as it is."""
    beta_slow: float
    """Turns up to which it is divided by the factor."""
    original_length: int
    """Positions of the first training phase."""
    attention: float
    """Of sines and cosines."""
    truncate: bool = True
    """Whether the blend begins and ends at whole places."""


Scaling = LinearScaling | Llama3Scaling | YarnScaling


def _kept(
    frequency: Float[Array, " a"], theta: float | Array, scaling: Scaling
) -> float | Float[Array, " a"]:
    """Returns how far frequencies stay: 1 for fast ones, 0 for slow ones, a blend between.

    Llama 3 blends by the number of turns, YaRN by the place of the frequency.
    """
    if isinstance(scaling, LinearScaling):
        return 0.0
    if isinstance(scaling, Llama3Scaling):
        turns = scaling.original_length * frequency / (2.0 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        return jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    size = 2 * len(frequency)

    def place(turns: float) -> float:
        wavelength = scaling.original_length / (turns * 2.0 * math.pi)
        return size * math.log(wavelength) / (2.0 * math.log(theta))

    first, last = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    ramp = (jnp.arange(len(frequency), dtype=jnp.float32) - first) / (last - first or 1e-3)
    return 1.0 - jnp.clip(ramp, 0.0, 1.0)


def rotate(
    x: Float[Array, "b h k a"],
    positions: Int[Array, "b k"],
    theta: float | Float[Array, ""],
    float32: bool,
    scaling: Scaling | None = None,
    table: str = "float32",
) -> Float[Array, "b h k a"]:
    """Rotates halves of each head by position (rotary embedding), not interleaved pairs.

    `float32`, `scaling` and `table` are the transformer's `rope_float32`, `rope_scaling` and
    `rope_table`.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) * 2.0 / x.shape[-1])
    if scaling is not None:
        kept = _kept(frequency, theta, scaling)
        frequency = frequency * (kept + (1.0 - kept) / scaling.factor)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if isinstance(scaling, YarnScaling):
        cos, sin = cos * scaling.attention, sin * scaling.attention
    cos, sin = cos.astype(table), sin.astype(table)
    wide = x.astype(jnp.float32) if float32 else x
    cos, sin = cos.astype(wide.dtype), sin.astype(wide.dtype)
    first, second = wide[..., :half], wide[..., half:]
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x.dtype)


def split_heads(x: Float[Array, "b l d"], heads: int) -> Float[Array, "b h l a"]:
    """Splits the last axis into heads, which are contiguous parts of it."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def all_positions(x: Float[Array, "b l d"]) -> Int[Array, "b l"]:
    """Returns 0..l-1 in every row."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])


def take(x: Float[Array, "b l d"], positions: Int[Array, "b k"] | None) -> Float[Array, "b k d"]:
    """Returns the rows of `x` at `positions`; all of them if None."""
    if positions is None:
        return x
    return jnp.take_along_axis(x, positions[:, :, None], axis=1)


def add_weights(
    total: Float[Array, "b k l"] | None, weights: Float[Array, "b h k l"]
) -> Float[Array, "b k l"] | None:
    """Sums mean-over-heads attention over layers; None where it is not wanted."""
    return None if total is None else total + weights.mean(axis=1)


def scanned(block: type[nn.Module], remat: bool, length: int, in_axes: tuple[Any, ...]) -> Any:
    """Stacks `block`, (carry, ..) -> (carry, None), `length` times: parameters get a first axis."""
    return nn.scan(
        nn.remat(block) if remat else block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,  # pyright: ignore  # nn.broadcast is no int, the annotation's only leaf
        length=length,
    )


class Projections(nn.Module):
    """Projects queries of some positions, and keys and values of all; heads are split."""

    width: int
    heads: int
    use_bias: bool
    dtype: Any

    def setup(self):
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(self.width, self.use_bias, self.dtype) for _ in range(4)
        )

    def heads_of(self, query: Float[Array, "b k d"], x: Float[Array, "b l d"]) -> Any:
        """Returns queries [b, h, k, a], and keys and values [b, h, l, a]."""
        parts = (self.q_proj(query), self.k_proj(x), self.v_proj(x))
        return tuple(split_heads(part, self.heads) for part in parts)

    def merge(self, out: Float[Array, "b h k a"]) -> Float[Array, "b k d"]:
        """Puts the heads beside each other, and projects them."""
        out = out.swapaxes(1, 2)
        return self.o_proj(out.reshape(*out.shape[:2], -1))

"""Defines MDLM, BD3-LM and SEDD: one diffusion transformer, its norms modulated by the noise level
(adaLN).

Reads top to bottom: architecture, layers, network, model. Parameter tree (`c`: width of
the condition; the rest as in `transformer.py`):

    embed/embedding [v, d]
    time/dense_0/{kernel [256, c], bias}, time/dense_1/{kernel [c, c], bias}
    blocks/...      each leaf of a block stacked to [n - 1, ...]; absent when n = 1
    last_block/...  attn_norm/scale [d], attn/{q,k,v,o}_proj/kernel [d, d],
                    mlp_norm/scale [d], mlp/{up,down}_proj/{kernel, bias},
                    modulation/{kernel [c, 6 d], bias}
    final_norm/scale [d], final_modulation/{kernel [c, 2 d], bias}
    lm_head/{kernel [d, v], bias}

Of a BD3-LM without adaLN, all of `time`, `modulation` and `final_modulation` are absent.

Sources of the arithmetic: `models/dit.py` and `diffusion.py` of kuleshov-group/mdlm (c112c52);
`model/transformer.py`, `graph_lib.py` and `noise_lib.py` of louaaron/
Score-Entropy-Discrete-Diffusion (0605786); `models/hf/modeling_bd3lm.py` and `diffusion.py` of
kuleshov-group/bd3lms (1c3e8f4).
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sama_jax.arrays import Params
from sama_jax.models.attention import attend
from sama_jax.models.attention_mask import places, visible
from sama_jax.models.layers import (
    LayerNorm,
    Linear,
    Projections,
    add_weights,
    all_positions,
    rotate,
    scanned,
    take,
)
from sama_jax.models.model import LinenModel, PlainArchitecture, flops, run

NORM_EPS = 1e-5
ROPE_THETA = 10000.0
TIME_WIDTH = 256
"""Cosines and sines of the noise level."""
MLP_RATIO = 4
MAX_SHARE = 1 - 1e-3
"""Share of masked tokens at time 1 of the log-linear schedule: 1 - exp(-sigma) = (1 - 1e-3) t."""
EXCLUDED = -1e6
"""Added to the mask token's logit: it is never predicted. MDLM's own number; exp of it is 0."""


@dataclass(frozen=True, kw_only=True)
class DitArchitecture(PlainArchitecture):
    """Holds all that shapes the network."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    condition_width: int
    timed: bool
    """True if the noise level is an input (SEDD); MDLM feeds 0 whatever it is."""
    block_length: int | None = None
    clean_context: bool = False
    modulated: bool = True
    """False: norms and gates know no condition, and there is no noise level."""

    @property
    def max_length(self) -> None:
        return None

    @property
    def mlp_width(self) -> int:
        return MLP_RATIO * self.width


def noise_level(
    tokens: Int[Array, "b l"], key_valid: Bool[Array, "b l"], mask_id: int
) -> Float[Array, " b"]:
    """Returns the sigma of a text: the level whose expected share of masked tokens is its own.

    Absorbing noise of total sigma masks a token with probability 1 - exp(-sigma), whatever the
    schedule that led there; the log-linear one ends at a share of 0.999 (sigma 6.9).
    """
    masked = jnp.sum((tokens == mask_id) & key_valid, axis=-1)
    share = masked / jnp.maximum(jnp.sum(key_valid, axis=-1), 1)
    return -jnp.log1p(-jnp.minimum(share, MAX_SHARE))


class TimeEmbedding(nn.Module):
    """Makes the condition of a noise level, in float32 whatever the dtype, as both sources do."""

    width: int

    @nn.compact
    def __call__(self, sigma: Float[Array, " c"]) -> Float[Array, "c w"]:
        half = TIME_WIDTH // 2
        frequency = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle = sigma[:, None] * frequency[None]
        x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        x = jax.nn.silu(Linear(self.width, True, jnp.float32, name="dense_0")(x))
        return jax.nn.silu(Linear(self.width, True, jnp.float32, name="dense_1")(x))


def split_modulation(vectors: Float[Array, "c p"], parts: int) -> list[Float[Array, "c 1 d"]]:
    """Returns `parts` vectors a condition, to broadcast over positions."""
    return jnp.split(vectors[:, None], parts, axis=-1)


UNMODULATED = (0.0, 0.0, 1.0)
"""Shift, scale and gate that change nothing."""


class Mlp(nn.Module):
    """Computes down(gelu(up(x))), gelu by its tanh approximation."""

    arch: DitArchitecture
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        up = Linear(self.arch.mlp_width, True, self.dtype, name="up_proj")(x)
        up = jax.nn.gelu(up, approximate=True)
        return Linear(self.arch.width, True, self.dtype, name="down_proj")(up)


class Block(nn.Module):
    """Maps (stream, attention so far) to the same; with `positions`, the stream there only.

    The stream stays float32 whatever the dtype, as under the sources' autocast.
    """

    arch: DitArchitecture
    dtype: Any

    @nn.compact
    def __call__(self, carry, condition, key_valid, positions=None):
        (x, total), arch = carry, self.arch
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = 2 * UNMODULATED
        if arch.modulated:
            vectors = Linear(6 * arch.width, True, self.dtype, name="modulation")(condition)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = split_modulation(vectors, 6)
        h = LayerNorm(NORM_EPS, False, jnp.float32, name="attn_norm")(x)
        h = h * (1 + scale_a) + shift_a
        attn = Projections(arch.width, arch.num_heads, False, self.dtype, name="attn")
        q, k, v = attn.heads_of(take(h, positions), h)
        keys, clean = all_positions(x), arch.clean_context
        queries = keys if positions is None else positions
        q = rotate(q, places(queries, x.shape[1], clean), ROPE_THETA, True)
        k = rotate(k, places(keys, x.shape[1], clean), ROPE_THETA, True)
        seen = visible(key_valid, queries, keys, arch.block_length, clean)
        out, weights = attend(q, k, v, seen)
        x = take(x, positions) + gate_a * attn.merge(out)
        h = LayerNorm(NORM_EPS, False, jnp.float32, name="mlp_norm")(x)
        h = h * (1 + scale_m) + shift_m
        x = x + gate_m * Mlp(arch, self.dtype, name="mlp")(h)
        return (x, add_weights(total, weights)), None


class Network(nn.Module):
    """Joins the layers; `trunk` returns the stream and the condition."""

    arch: DitArchitecture
    dtype: Any
    remat: bool = False

    def setup(self):
        arch = self.arch
        init = nn.initializers.normal(0.02)
        self.embed = nn.Embed(arch.vocab_size, arch.width, embedding_init=init)
        if arch.modulated:
            self.time = TimeEmbedding(arch.condition_width)
            self.final_modulation = Linear(2 * arch.width, True, self.dtype)
        if arch.num_layers > 1:
            axes = (nn.broadcast, nn.broadcast)
            stack = scanned(Block, self.remat, arch.num_layers - 1, axes)
            self.blocks = stack(arch, self.dtype)
        self.last_block = Block(arch, self.dtype)
        self.final_norm = LayerNorm(NORM_EPS, False, jnp.float32)
        self.lm_head = Linear(arch.vocab_size, True, self.dtype)

    def entering(self, tokens, key_valid, sigma):
        del key_valid
        condition = self.time(sigma) if self.arch.modulated else sigma[:, None]
        return self.embed(tokens).astype(jnp.float32), condition

    def _enter_last(self, tokens, key_valid, sigma, total):
        x, condition = self.entering(tokens, key_valid, sigma)
        carry = (x, total)
        if self.arch.num_layers > 1:
            carry, _ = self.blocks(carry, condition, key_valid)
        return carry, condition

    def trunk(self, tokens, key_valid, sigma):
        (x, _), condition = self._enter_last(tokens, key_valid, sigma, None)
        return x, condition

    def last_hidden(self, stream, key_valid, positions=None):
        x, condition = stream
        (x, _), _ = self.last_block((x, None), condition, key_valid, positions)
        return self.leaving((x, condition))

    def leaving(self, stream):
        x, condition = stream
        shift, scale, _ = UNMODULATED
        if self.arch.modulated:
            shift, scale = split_modulation(self.final_modulation(condition), 2)
        return self.final_norm(x) * (1 + scale) + shift

    def logits(self, hidden):
        return self.lm_head(hidden)

    def attention(self, tokens, key_valid, sigma):
        total = jnp.zeros((*tokens.shape, tokens.shape[1]), jnp.float32)
        carry, condition = self._enter_last(tokens, key_valid, sigma, total)
        (_, total), _ = self.last_block(carry, condition, key_valid)
        assert total is not None
        return total / self.arch.num_layers

    def __call__(self, tokens, key_valid, sigma):
        return self.logits(self.last_hidden(self.trunk(tokens, key_valid, sigma), key_valid))


@dataclass(frozen=True, kw_only=True)
class DitModel(LinenModel):
    """Implements `Model` over `Network`.

    `trunk`, `hidden` and `attention` take the noise level `sigma` [b] as an optional last argument.
    By default it is 0 where the network ignores time, one condition for the whole batch, else what
    the share of masked tokens implies (`noise_level`).
    """

    arch: DitArchitecture

    @property
    def network(self) -> Network:
        return Network(self.arch, self.dtype, self.remat)

    def init(self, key) -> Params:
        """Draws random float32 parameters."""
        tokens, key_valid = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
        return self.network.init(key, tokens, key_valid, jnp.zeros(1))["params"]

    def _sigma(self, tokens: Array, key_valid: Array, sigma: Array | None) -> Array:
        if not self.arch.timed:
            return jnp.zeros(1, jnp.float32)
        return noise_level(tokens, key_valid, self.mask_id) if sigma is None else sigma

    def trunk(
        self,
        params: Params,
        tokens: Int[Array, "b l"],
        key_valid: Bool[Array, "b l"],
        clean: Int[Array, "b l"] | None = None,
        sigma: Float[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "c w"]]:
        """Returns the float32 stream that enters the last block, and the condition (one, or one a
        text)."""
        sigma = self._sigma(tokens, key_valid, sigma)
        read = self.input_of(tokens, clean)
        return self._apply(params, read, self.key_valid_of(key_valid), sigma, method="trunk")

    def entering(
        self,
        params: Params,
        tokens: Int[Array, "b l"],
        key_valid: Bool[Array, "b l"],
        clean: Int[Array, "b l"] | None = None,
        sigma: Float[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "c w"]]:
        """Returns the float32 stream that enters the first block, and the condition."""
        sigma = self._sigma(tokens, key_valid, sigma)
        read = self.input_of(tokens, clean)
        return self._apply(params, read, self.key_valid_of(key_valid), sigma, method="entering")

    def through_block(
        self, kind: DitArchitecture, params: Params, stream: Any, key_valid: Bool[Array, "b n"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "c w"]]:
        """Returns the stream behind a block, and the condition."""
        x, condition = stream
        (x, _), _ = run(Block(kind, self.dtype), params, (x, None), condition, key_valid)
        return x, condition

    def state_of(self, stream: Any) -> Float[Array, "b l d"]:
        """Returns the stream without the condition."""
        return stream[0]

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "b l"],
        key_valid: Bool[Array, "b l"],
        clean: Int[Array, "b l"] | None = None,
        sigma: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Returns the final modulated hidden states that predict each token."""
        stream = self.trunk(params, tokens, key_valid, clean, sigma)
        return self._everywhere(params, stream, key_valid)

    def logits(self, params: Params, hidden: Float[Array, "*k d"]) -> Float[Array, "*k v"]:
        """Returns logits whose softmax is p(x0 = v) at a masked position.

        MDLM: the head's output without the mask token (SUBS). SEDD: its log scores, likewise; p is
        proportional to exp(log score) there, and what SEDD subtracts from all of them alike, log
        (e^sigma - 1) and log(v - 1), cancels and is left out. Both define the distribution at an
        unmasked position to be its own token; the values given here are those of a masked one.
        """
        raw = self._apply(params, hidden, method="logits")
        excluded = (jnp.arange(self.vocab_size) == self.mask_id) * jnp.asarray(EXCLUDED, raw.dtype)
        return raw + excluded.reshape((1,) * (raw.ndim - 1) + (-1,))

    def attention(
        self,
        params: Params,
        tokens: Int[Array, "b l"],
        key_valid: Bool[Array, "b l"],
        sigma: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b l l"]:
        """Returns the weights (query, key) averaged over heads and layers; those of padding queries
        hold no meaning."""
        sigma = self._sigma(tokens, key_valid, sigma)
        read, valid = self.input_of(tokens, None), self.key_valid_of(key_valid)
        return self._of_text(self._apply(params, read, valid, sigma, method="attention"))

    def flops_per_text(self, length: int, scored: float) -> float:
        """Counts operations of one forward pass; modulation, one product a text, is left out."""
        read = 2 * length if self.arch.clean_context else length
        return flops(self.arch, read, scored, 2, 2 * self.arch.width * self.vocab_size)

"""One Llama-like transformer for LLaDA, Dream, Qwen, Llama and their relatives (Flax Linen).

Reads top to bottom: architecture, layers, network, and the pure functions that the rest of the
package calls. Blocks are stacked and scanned; the last block is kept apart, because scoring needs
its queries and MLP at scored positions only.

Parameter tree (`n` layers, widths `d`, MLP `f`, heads `h`, key/value heads `g`, head size `a`):

    embed/embedding [v, d]
    first_blocks_0/..., ...   dense layers before a stack of layers with experts
    blocks/...      each leaf of a block stacked to [n - 1, ...]; absent when n = 1
    last_block/...  attn_norm/scale [d], attn/{q,k,v,o}_proj/kernel, attn/{q,k}_norm/scale,
                    mlp_norm/scale [d], mlp/{gate,up}_proj/kernel [d, f],
                    mlp/down_proj/kernel [f, d]; with experts moe/... (see moe.py) and, for a
                    shared one, shared/{gate,up,down}_proj/kernel
    final_norm/scale [d]
    lm_head/kernel  [d, v] ([d, head_rows]); absent when tied

Biases stand beside their kernels and scales where the architecture has them. A LoRA adapter adds
`lora_a` [d, r] and `lora_b` [r, f] (float32, scale included) beside kernels and the embedding.
Source of the arithmetic: LLaDA's modelling code as vendored in `Stry233/SAMA`
(`trainer/model/llada/modeling_llada.py`); of the other families' switches those that their readers
name; docs/models.md lists the facts.
"""

import functools
import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sama_jax.arrays import Params
from sama_jax.models.model import LinenModel
from sama_jax.models.moe import Experts, Moe

CPU_SCORE_BYTES = 8 * 2**20
"""Attention scores of a batch that a CPU computes at once; more are computed in parts, since they
leave the caches: 4 texts of 512 tokens have 32 MiB with 8 heads, which ran a 115M model at 91
instead of 115 GFLOP/s."""
CPU_PART_BYTES = 2 * 2**20
"""Scores of such a part, some heads or queries of a text: that model took 5 % longer with whole
texts."""


class Llama3Scaling(NamedTuple):
    """Llama 3's stretching of slow rotary frequencies (`rope_type` llama3 in transformers)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    """Positions of the first training phase."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that shapes the network and its arithmetic; a family's config is read into it."""

    vocab_size: int
    """Rows of the embedding table, unused ones included."""
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_width: int
    tied: bool
    norm_eps: float
    rope_theta: float
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    norm_bias: bool = False
    qk_norm: Literal["whole", "head"] | None = None
    """RMS norm of queries and keys: over the whole vector before heads are split, or by head."""
    scale_embedding: bool = False
    """Multiply embeddings by sqrt(width)."""
    scale_logits: bool = False
    """Multiply logits by 1 / sqrt(width)."""
    rope_scaling: Llama3Scaling | None = None
    rope_float32: bool = True
    """Rotate queries and keys in float32; else round sines and cosines to the activation dtype and
    rotate in it."""
    rope_table: str = "float32"
    """Sines and cosines are rounded to this dtype, whatever the activations are."""
    rotary_size: int | None = None
    """Leading channels of each head that are rotated; None: all of them."""
    block_length: int | None = None
    """Position i sees j if j // block_length <= i // block_length; 1: causal; None: every j."""
    head_rows: int | None = None
    """Tokens that the head predicts; None: all rows of the embedding."""
    experts: Experts | None = None
    """In the place of the MLP, but for the first `first_dense` layers."""
    first_dense: int = 0
    attention: Literal["xla", "cudnn"] = "xla"
    """What computes it where queries are as many as keys; cuDNN keeps no scores in memory."""
    heads_apart: bool = True
    """Whether a CPU may take some heads after the others; not where a mesh splits them."""

    @property
    def max_length(self) -> None:
        return None

    @property
    def stacked_layers(self) -> int:
        return self.num_layers - 1 - self.first_dense

    @property
    def active_width(self) -> int:
        return self.mlp_width if self.experts is None else self.experts.shared_width


class Norm(nn.Module):
    """RMS norm: float32 inside, cast back to the input's dtype, and only then scaled.

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
    """Explicit broadcasting, so that rank promotion may be forbidden."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Linear(nn.Module):
    """`x @ kernel + bias`. Weights drawn with standard deviation 0.02, as LLaDA's `init_std`.

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
    """Table look-up. An adapter changes what is looked up, not a tied head: as PEFT's forward does.

    Sums with an adapter are float32, here and in `Linear`, since PEFT keeps adapters in it.
    """

    def __call__(self, inputs: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        out = super().__call__(inputs)
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            out = (out.astype(jnp.float32) + jnp.take(a, inputs, axis=0) @ b).astype(out.dtype)
        return out


def _rescale(frequency: Float[Array, " a"], scaling: Llama3Scaling) -> Float[Array, " a"]:
    """Fast frequencies stay, slow ones are divided by the factor, those between are blended."""
    turns = scaling.original_length * frequency / (2.0 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequency * (keep + (1.0 - keep) / scaling.factor)


def rotate(
    x: Float[Array, "b h k a"],
    positions: Int[Array, "b k"],
    theta: float | Float[Array, ""],
    float32: bool,
    scaling: Llama3Scaling | None = None,
    table: str = "float32",
) -> Float[Array, "b h k a"]:
    """Rotary embedding, half rotation: halves of the head, not interleaved pairs."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) * 2.0 / x.shape[-1])
    if scaling is not None:
        frequency = _rescale(frequency, scaling)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle).astype(table), jnp.sin(angle).astype(table)
    wide = x.astype(jnp.float32) if float32 else x
    cos, sin = cos.astype(wide.dtype), sin.astype(wide.dtype)
    first, second = wide[..., :half], wide[..., half:]
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x.dtype)


def _rotate_part(
    x: Float[Array, "b h k a"], positions: Int[Array, "b k"], arch: Architecture
) -> Float[Array, "b h k a"]:
    """`rotate` on the leading `rotary_size` channels; the others pass."""
    size = arch.rotary_size or arch.head_size
    rope = (arch.rope_theta, arch.rope_float32, arch.rope_scaling, arch.rope_table)
    rotated = rotate(x[..., :size], positions, *rope)
    return jnp.concatenate([rotated, x[..., size:]], axis=-1)


def attend(
    q: Float[Array, "b h k a"],
    k: Float[Array, "b g l a"],
    v: Float[Array, "b g l a"],
    allowed: Bool[Array, "b l"] | Bool[Array, "b #k l"],
    kernel: Literal["xla", "cudnn"] = "xla",
    heads_apart: bool = False,
) -> tuple[Float[Array, "b h k a"], Float[Array, "b h k l"]]:
    """Attention and its weights. Key head j serves h/g queries; `allowed` names the keys that all
    queries see, or each of them. `kernel`, `heads_apart`: see `Architecture`.

    Scores and softmax are float32. Hidden keys get the dtype's minimum, so a query without any key
    stays finite, and exp underflows to an exact 0 everywhere else. Weights that nobody reads are
    not computed.
    """
    b, h, n, _ = q.shape
    if allowed.ndim == 2:
        allowed = allowed[:, None]
    out, weights = _attend(q, k, v, allowed)
    if kernel == "cudnn" and n == k.shape[2]:  # few queries cost little
        return _attend_by_cudnn(q, k, v, allowed), weights
    if b > 1 and 4 * b * h * n * k.shape[2] > CPU_SCORE_BYTES:
        rows = (q, k, v, allowed)
        out = jax.lax.platform_dependent(
            *rows,
            cpu=functools.partial(_attend_in_parts, heads_apart),
            default=lambda *args: _attend(*args)[0],
        )
    return out, weights


def _attend_in_parts(
    heads_apart: bool,
    q: Float[Array, "b h k a"],
    k: Float[Array, "b g l a"],
    v: Float[Array, "b g l a"],
    allowed: Bool[Array, "b #k l"],
) -> Float[Array, "b h k a"]:
    """Text by text; some heads after the others, or else some queries.

    Heads of one text lie together in memory, so nothing is copied: 4 texts of 512 tokens, 8 heads
    of size 64: 17.4 ms instead of 19.4 (two cores).
    """
    b, h, n, a = q.shape
    parts = query_parts(h, n, k.shape[2])
    if heads_apart and k.shape[1] % parts == 0:

        def some_heads(part: tuple[Array, Array, Array, Array]) -> Float[Array, "c k a"]:
            return _attend(*(x[None] for x in part))[0][0]

        groups = [x.reshape(b * parts, -1, *x.shape[2:]) for x in (q, k, v)]
        seen = jnp.repeat(allowed, parts, axis=0)
        return jax.lax.map(some_heads, (*groups, seen)).reshape(b, h, n, a)

    def split(x: Array) -> Array:
        """[.., n, c] -> [parts, .., n / parts, c]."""
        return jnp.moveaxis(x.reshape(*x.shape[:-2], parts, -1, x.shape[-1]), -3, 0)

    def text(row: tuple[Array, Array, Array, Array]) -> Float[Array, "h k a"]:
        q, k, v, allowed = row
        by_query = allowed.shape[0] > 1

        def some(part: tuple[Array, ...]) -> Float[Array, "h c a"]:
            seen = part[1] if by_query else allowed
            return _attend(part[0][None], k[None], v[None], seen[None])[0][0]

        out = jax.lax.map(some, (split(q), *([split(allowed)] if by_query else [])))
        return jnp.moveaxis(out, 0, 1).reshape(h, n, a)

    return jax.lax.map(text, (q, k, v, allowed))


def query_parts(heads: int, queries: int, length: int) -> int:
    """Parts of equal size of a text's queries, as few as keep the scores of one below
    `CPU_PART_BYTES`; no part below 32 queries. Heads, where they are taken apart, are as many."""
    found = [p for p in range(1, max(1, queries // 32) + 1) if queries % p == 0]
    whole = 4 * heads * queries * length
    return next((p for p in found if whole <= p * CPU_PART_BYTES), found[-1])


def _attend_by_cudnn(
    q: Float[Array, "b h k a"],
    k: Float[Array, "b g l a"],
    v: Float[Array, "b g l a"],
    allowed: Bool[Array, "b #k l"],
) -> Float[Array, "b h k a"]:
    """An 8B model on an H200: 11.1 ms a pass of 512 tokens instead of 12.4 (32 texts, bfloat16)."""
    mask = jnp.broadcast_to(allowed[:, None], (q.shape[0], 1, q.shape[2], k.shape[2]))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return out.swapaxes(1, 2)


def _attend(
    q: Float[Array, "b h k a"],
    k: Float[Array, "b g l a"],
    v: Float[Array, "b g l a"],
    allowed: Bool[Array, "b #k l"],
) -> tuple[Float[Array, "b h k a"], Float[Array, "b h k l"]]:
    """Exponentials are divided by their sum after the product with the values: at 256 positions
    that, and scaling inside exp, takes 5.5 ms where softmax takes 7.3 (XLA on a core of a CPU)."""
    b, h, n, a = q.shape
    g, length = k.shape[1:3]
    # The queries of one key head are rows of one product: a fifth axis slows XLA on a CPU down.
    rows = q.reshape(b, g, h // g * n, a)
    scores = jnp.einsum("bgra,bgla->bgrl", rows, k, preferred_element_type=jnp.float32)
    bias = jnp.where(allowed, jnp.float32(0), jnp.finfo(jnp.float32).min)
    if bias.shape[1] > 1:
        bias = jnp.tile(bias, (1, h // g, 1))
    scores = scores + bias[:, None]
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    powers = jnp.exp((scores - top) * (1.0 / math.sqrt(a)))
    total = powers.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bgrl,bgla->bgra", powers.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = (out / total).astype(v.dtype)
    return out.reshape(b, h, n, a), (powers / total).reshape(b, h, n, length)


class Attention(nn.Module):
    """Grouped-query self-attention of some positions (`query`) over all (`x`), and its weights."""

    arch: Architecture
    dtype: Any

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "b k d"],
        query_positions: Int[Array, "b k"],
        x: Float[Array, "b l d"],
        key_valid: Bool[Array, "b l"],
    ) -> tuple[Float[Array, "b k d"], Float[Array, "b h k l"]]:
        arch = self.arch
        dense = functools.partial(Linear, dtype=self.dtype)
        q = dense(arch.num_heads * arch.head_size, arch.qkv_bias, name="q_proj")(query)
        k = dense(arch.num_kv_heads * arch.head_size, arch.qkv_bias, name="k_proj")(x)
        v = dense(arch.num_kv_heads * arch.head_size, arch.qkv_bias, name="v_proj")(x)
        norm = functools.partial(Norm, arch.norm_eps, arch.norm_bias, self.dtype)
        if arch.qk_norm == "whole":
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        q, k, v = (t.reshape(*t.shape[:2], -1, arch.head_size).swapaxes(1, 2) for t in (q, k, v))
        if arch.qk_norm == "head":
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        b, length, _ = x.shape
        key_positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (b, length))
        allowed = key_valid
        if arch.block_length is not None:
            blocks = [p // arch.block_length for p in (query_positions, key_positions)]
            allowed = key_valid[:, None] & (blocks[1][:, None, :] <= blocks[0][:, :, None])
        out, weights = attend(
            _rotate_part(q, query_positions, arch),
            _rotate_part(k, key_positions, arch),
            v,
            allowed,
            arch.attention,
            arch.heads_apart,
        )
        merged = out.swapaxes(1, 2).reshape(*query.shape[:2], arch.num_heads * arch.head_size)
        return dense(arch.width, arch.o_bias, name="o_proj")(merged), weights


class Mlp(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x))."""

    arch: Architecture
    dtype: Any
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        arch, dense = self.arch, functools.partial(Linear, dtype=self.dtype)
        gate = dense(self.width, arch.mlp_bias, name="gate_proj")(x)
        up = dense(self.width, arch.mlp_bias, name="up_proj")(x)
        return dense(arch.width, arch.mlp_bias, name="down_proj")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm block. With `positions`, its output (not its keys) is computed there only.

    Carries the stream and, where it is wanted, the sum of attention over layers (else None).
    """

    arch: Architecture
    dtype: Any

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "b l d"], Float[Array, "b k l"] | None],
        key_valid: Bool[Array, "b l"],
        positions: Int[Array, "b k"] | None = None,
    ) -> tuple[Float[Array, "b k d"], Float[Array, "b k l"] | None]:
        (x, total), arch = carry, self.arch
        h = Norm(arch.norm_eps, arch.norm_bias, self.dtype, name="attn_norm")(x)
        if positions is None:
            b, length, _ = x.shape
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (b, length))
            kept, query = x, h
        else:
            kept, query = _take(x, positions), _take(h, positions)
        attention = Attention(arch, self.dtype, name="attn")
        out, weights = attention(query, positions, h, key_valid)
        kept = kept + out
        h = Norm(arch.norm_eps, arch.norm_bias, self.dtype, name="mlp_norm")(kept)
        return kept + self._mlp(h), None if total is None else total + weights.mean(axis=1)

    def _mlp(self, h: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        arch = self.arch
        if arch.experts is None:
            return Mlp(arch, self.dtype, arch.mlp_width, name="mlp")(h)
        out = Moe(arch.experts, self.dtype, name="moe")(h)
        if arch.experts.shared_width:
            out = out + Mlp(arch, self.dtype, arch.experts.shared_width, name="shared")(h)
        return out


def _take(x: Float[Array, "b l d"], positions: Int[Array, "b k"]) -> Float[Array, "b k d"]:
    return jnp.take_along_axis(x, positions[:, :, None], axis=1)


class _ScannedBlock(nn.Module):
    """`Block` in the form that `nn.scan` wants: carry in, (carry, None) out."""

    arch: Architecture
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, carry, key_valid):
        block = nn.remat(Block) if self.remat else Block
        return block(self.arch, self.dtype, name="block")(carry, key_valid), None


class Network(nn.Module):
    """The whole network; its methods are the halves that scoring and training need."""

    arch: Architecture
    dtype: Any
    remat: bool = False

    def setup(self):
        arch = self.arch
        self.embed = Embed(
            arch.vocab_size,
            arch.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(0.02),
        )
        dense = replace(arch, experts=None)
        self.first_blocks = [Block(dense, self.dtype) for _ in range(arch.first_dense)]
        if arch.stacked_layers:
            self.blocks = nn.scan(
                _ScannedBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast,),  # pyright: ignore
                length=arch.stacked_layers,
            )(arch, self.dtype, self.remat)
        self.last_block = Block(arch, self.dtype)
        self.final_norm = Norm(arch.norm_eps, arch.norm_bias, self.dtype)
        if not arch.tied:
            self.lm_head = Linear(arch.head_rows or arch.vocab_size, arch.head_bias, self.dtype)

    def _enter(self, tokens, key_valid, total):
        x = self.embed(tokens)
        if self.arch.scale_embedding:
            x = x * jnp.asarray(math.sqrt(self.arch.width), x.dtype)
        carry = (x, total)
        for block in self.first_blocks:
            carry = block(carry, key_valid)
        if self.arch.stacked_layers:
            carry, _ = self.blocks(carry, key_valid)
        return carry

    def trunk(self, tokens, key_valid):
        return self._enter(tokens, key_valid, None)[0]

    def last_hidden(self, stream, key_valid, positions=None):
        x, _ = self.last_block((stream, None), key_valid, positions)
        return self.final_norm(x)

    def logits(self, hidden):
        raw = self.embed.attend(hidden) if self.arch.tied else self.lm_head(hidden)
        if self.arch.scale_logits:
            raw = raw * jnp.asarray(1.0 / math.sqrt(self.arch.width), raw.dtype)
        return raw

    def attention(self, tokens, key_valid):
        total = jnp.zeros((*tokens.shape, tokens.shape[1]), jnp.float32)
        carry = self._enter(tokens, key_valid, total)
        _, total = self.last_block(carry, key_valid)
        assert total is not None
        return total / self.arch.num_layers

    def __call__(self, tokens, key_valid):
        return self.logits(self.last_hidden(self.trunk(tokens, key_valid), key_valid))


@dataclass(frozen=True, kw_only=True)
class TransformerModel(LinenModel):
    """The `Model` protocol over `Network`."""

    arch: Architecture
    lora: tuple[tuple[str, int], ...] = ()
    """Parameters that carry a LoRA adapter and its rank there: so that models are equal only if
    they can share compiled programs. The network itself looks for the leaves."""

    @property
    def lora_paths(self) -> re.Pattern[str]:
        """Parameters that may carry one: those of `Linear` and `Embed`."""
        return re.compile(
            r"embed/embedding|lm_head/kernel|\w*blocks?(_\d+)?/(attn|mlp|shared)/\w+_proj/kernel"
        )

    @property
    def network(self) -> Network:
        return Network(self.arch, self.dtype, self.remat)

    def init(self, key) -> Params:
        """Random float32 parameters."""
        return _flatten_scan(super().init(key))

    def _apply(self, params: Params, *args: Any, method: str) -> Any:
        return super()._apply(_unflatten_scan(params), *args, method=method)

    def with_cudnn(self) -> "TransformerModel | None":
        """The same model with cuDNN's attention, which takes bfloat16 and heads of up to 128
        channels, a multiple of 8."""
        size = self.arch.head_size
        if self.dtype != jnp.bfloat16 or size > 128 or size % 8:
            return None
        return replace(self, arch=replace(self.arch, attention="cudnn"))

    def with_split_heads(self) -> "TransformerModel":
        """Where a mesh splits heads, a CPU does not take some after the others."""
        return replace(self, arch=replace(self.arch, heads_apart=False))

    def flops_per_text(self, length: int, scored: float) -> float:
        """Floating-point operations of one forward pass: 2 a multiply-accumulate.

        Counts blocks at all `length` positions, the last block's queries and MLP and the
        vocabulary head at `scored` positions; norms and softmax are left out (under 2 %).
        """
        arch = self.arch
        kv = 4 * arch.width * arch.num_kv_heads * arch.head_size
        q_and_o = 4 * arch.width * arch.num_heads * arch.head_size
        q_and_o += 4 * arch.num_heads * arch.head_size * length
        dense = q_and_o + 6 * arch.width * arch.mlp_width
        rest = dense
        if arch.experts is not None:  # the active ones only
            rest = q_and_o + arch.experts.flops_per_token(arch.width)
        head = 2 * arch.width * (arch.head_rows or arch.vocab_size)
        full = (arch.num_layers - 1) * (kv + rest) * length
        full += arch.first_dense * (dense - rest) * length
        return full + kv * length + (rest + head) * scored


def _flatten_scan(params: Params) -> Params:
    """`blocks/block/...` of the scanned module -> the documented `blocks/...`."""
    if "blocks" not in params:
        return params
    return {**params, "blocks": params["blocks"]["block"]}


def _unflatten_scan(params: Params) -> Params:
    if "blocks" not in params:
        return params
    return {**params, "blocks": {"block": params["blocks"]}}

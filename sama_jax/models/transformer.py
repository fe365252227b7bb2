"""Defines one Llama-like transformer for LLaDA, Dream, Qwen, Llama and their relatives.

Reads top to bottom: architecture, blocks, network, and the pure functions that the rest of the
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
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sama_jax.arrays import Params
from sama_jax.models.attention import attend
from sama_jax.models.attention_mask import places, visible
from sama_jax.models.layers import (
    Embed,
    Linear,
    Norm,
    Scaling,
    add_weights,
    all_positions,
    rotate,
    scanned,
    take,
)
from sama_jax.models.model import LinenModel, run
from sama_jax.models.moe import Experts, Moe


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Holds all that shapes the network and its arithmetic; families read their config into it."""

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
    rope_scaling: Scaling | None = None
    rope_float32: bool = True
    """Rotate queries and keys in float32; else round sines and cosines to the activation dtype and
    rotate in it."""
    rope_table: str = "float32"
    """Sines and cosines are rounded to this dtype, whatever the activations are."""
    rotary_size: int | None = None
    """Leading channels of each head that are rotated; None: all of them."""
    block_length: int | None = None
    """Position i sees j if j // block_length <= i // block_length; 1: causal; None: every j."""
    clean_context: bool = False
    """Read the text without masks behind the text, and see that before each block."""
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


def _rotate_part(
    x: Float[Array, "b h k a"], positions: Int[Array, "b k"], arch: Architecture
) -> Float[Array, "b h k a"]:
    """Rotates the leading `rotary_size` channels; the others pass."""
    size = arch.rotary_size or arch.head_size
    rope = (arch.rope_theta, arch.rope_float32, arch.rope_scaling, arch.rope_table)
    rotated = rotate(x[..., :size], positions, *rope)
    return jnp.concatenate([rotated, x[..., size:]], axis=-1)


class Attention(nn.Module):
    """Computes grouped-query self-attention of some positions (`query`) over all (`x`), and its
    weights."""

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
        key_positions, length = all_positions(x), x.shape[1]
        out, weights = attend(
            _rotate_part(q, places(query_positions, length, arch.clean_context), arch),
            _rotate_part(k, places(key_positions, length, arch.clean_context), arch),
            v,
            visible(
                key_valid, query_positions, key_positions, arch.block_length, arch.clean_context
            ),
            arch.attention,
            arch.heads_apart,
        )
        merged = out.swapaxes(1, 2).reshape(*query.shape[:2], arch.num_heads * arch.head_size)
        return dense(arch.width, arch.o_bias, name="o_proj")(merged), weights


class Mlp(nn.Module):
    """Computes down(silu(gate(x)) * up(x))."""

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
    """Normalises before attention and MLP. With `positions`, output (not keys) is computed there
    only.

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
        at = all_positions(x) if positions is None else positions
        attention = Attention(arch, self.dtype, name="attn")
        out, weights = attention(take(h, positions), at, h, key_valid)
        kept = take(x, positions) + out
        h = Norm(arch.norm_eps, arch.norm_bias, self.dtype, name="mlp_norm")(kept)
        return kept + self._mlp(h), add_weights(total, weights)

    def _mlp(self, h: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        arch = self.arch
        if arch.experts is None:
            return Mlp(arch, self.dtype, arch.mlp_width, name="mlp")(h)
        out = Moe(arch.experts, self.dtype, name="moe")(h)
        if arch.experts.shared_width:
            out = out + Mlp(arch, self.dtype, arch.experts.shared_width, name="shared")(h)
        return out


class _ScannedBlock(nn.Module):
    """Gives `Block` the form that `nn.scan` wants: carry in, (carry, None) out.

    Its name is part of the keys that random parameters are drawn with, so it stays.
    """

    arch: Architecture
    dtype: Any

    @nn.compact
    def __call__(self, carry, key_valid):
        return Block(self.arch, self.dtype, name="block")(carry, key_valid), None


class Network(nn.Module):
    """Joins the layers; its methods are the parts that scoring, training and `stages` need."""

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
            stack = scanned(_ScannedBlock, self.remat, arch.stacked_layers, (nn.broadcast,))
            self.blocks = stack(arch, self.dtype)
        self.last_block = Block(arch, self.dtype)
        self.final_norm = Norm(arch.norm_eps, arch.norm_bias, self.dtype)
        if not arch.tied:
            self.lm_head = Linear(arch.head_rows or arch.vocab_size, arch.head_bias, self.dtype)

    def entering(self, tokens, key_valid):
        del key_valid
        x = self.embed(tokens)
        if self.arch.scale_embedding:
            x = x * jnp.asarray(math.sqrt(self.arch.width), x.dtype)
        return x

    def _enter_last(self, tokens, key_valid, total):
        carry = (self.entering(tokens, key_valid), total)
        for block in self.first_blocks:
            carry = block(carry, key_valid)
        if self.arch.stacked_layers:
            carry, _ = self.blocks(carry, key_valid)
        return carry

    def trunk(self, tokens, key_valid):
        return self._enter_last(tokens, key_valid, None)[0]

    def last_hidden(self, stream, key_valid, positions=None):
        x, _ = self.last_block((stream, None), key_valid, positions)
        return self.leaving(x)

    def leaving(self, stream):
        return self.final_norm(stream)

    def logits(self, hidden):
        raw = self.embed.attend(hidden) if self.arch.tied else self.lm_head(hidden)
        if self.arch.scale_logits:
            raw = raw * jnp.asarray(1.0 / math.sqrt(self.arch.width), raw.dtype)
        return raw

    def attention(self, tokens, key_valid):
        total = jnp.zeros((*tokens.shape, tokens.shape[1]), jnp.float32)
        carry = self._enter_last(tokens, key_valid, total)
        _, total = self.last_block(carry, key_valid)
        assert total is not None
        return total / self.arch.num_layers

    def __call__(self, tokens, key_valid):
        return self.logits(self.last_hidden(self.trunk(tokens, key_valid), key_valid))


@dataclass(frozen=True, kw_only=True)
class TransformerModel(LinenModel):
    """Implements `Model` over `Network`."""

    arch: Architecture
    lora: tuple[tuple[str, int], ...] = ()
    """Parameters that carry a LoRA adapter and its rank there: so that models are equal only if
    they can share compiled programs. The network itself looks for the leaves."""

    @property
    def lora_paths(self) -> re.Pattern[str]:
        """Matches the parameters that may carry one: those of `Linear` and `Embed`."""
        return re.compile(
            r"embed/embedding|lm_head/kernel|\w*blocks?(_\d+)?/(attn|mlp|shared)/\w+_proj/kernel"
        )

    @property
    def network(self) -> Network:
        return Network(self.arch, self.dtype, self.remat)

    def init(self, key) -> Params:
        """Draws random float32 parameters."""
        return _flatten_scan(super().init(key))

    def _apply(self, params: Params, *args: Any, method: str) -> Any:
        return super()._apply(_unflatten_scan(params), *args, method=method)

    def with_cudnn(self) -> "TransformerModel | None":
        """Returns the same model with cuDNN's attention, which takes bfloat16 and heads of up to
        128 channels, a multiple of 8."""
        size = self.arch.head_size
        if self.dtype != jnp.bfloat16 or size > 128 or size % 8:
            return None
        return replace(self, arch=replace(self.arch, attention="cudnn"))

    def with_split_heads(self) -> "TransformerModel":
        """Returns the same model for a mesh that splits heads: a CPU computes them together."""
        return replace(self, arch=replace(self.arch, heads_apart=False))

    def block_kind(self, number: int) -> Architecture:
        """Returns the architecture of a block: the first ones may be dense."""
        return replace(self.arch, experts=None) if number < self.arch.first_dense else self.arch

    def through_block(
        self, kind: Architecture, params: Params, stream: Any, key_valid: Bool[Array, "b l"]
    ) -> Float[Array, "b l d"]:
        """Returns the stream behind a block of a kind."""
        return run(Block(kind, self.dtype), params, (stream, None), key_valid)[0]

    def flops_per_text(self, length: int, scored: float) -> float:
        """Counts floating-point operations of one forward pass, 2 a multiply-accumulate.

        They are those of blocks at all `length` positions, the last block's queries and MLP and the
        vocabulary head at `scored` positions; norms and softmax are left out (under 2 %).
        """
        arch = self.arch
        length *= 2 if arch.clean_context else 1
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
    """Turns `blocks/block/...` of the scanned module into the documented `blocks/...`."""
    if "blocks" not in params:
        return params
    return {**params, "blocks": params["blocks"]["block"]}


def _unflatten_scan(params: Params) -> Params:
    if "blocks" not in params:
        return params
    return {**params, "blocks": {"block": params["blocks"]}}

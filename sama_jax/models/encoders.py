"""Defines BERT, RoBERTa and ModernBERT as masked language models.

Reads top to bottom: architectures, head, BERT, ModernBERT. Parameter trees (`f`:
MLP width; the rest as in `transformer.py`; every leaf of `blocks` is stacked over layers):

    embed/embedding [v, d], embed_norm/scale [d]
    blocks/..., last_block/...   attn_norm/scale [d], attn/{q,k,v,o}_proj/kernel [d, d],
                                 mlp_norm/scale [d], mlp/up_proj/kernel, mlp/down_proj/kernel
    head/dense/kernel [d, d], head/norm/scale [d], head/bias [v]

BERT adds positions/embedding, types/embedding and a bias beside every kernel and scale. ModernBERT
adds mlp/gate_proj/kernel, final_norm/scale, and `first_block`, which has no attn_norm. The head's
decoder is the embedding. RoBERTa is a BERT that counts positions differently. Source of the
arithmetic: transformers 5, `models/{bert,roberta,modernbert}`.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sama_jax.arrays import Params
from sama_jax.errors import ModelError
from sama_jax.models.attention import attend
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


@dataclass(frozen=True, kw_only=True)
class BertArchitecture(PlainArchitecture):
    """Holds all that shapes a BERT or a RoBERTa."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    norm_eps: float
    max_length: int
    """Tokens that the position table has rows for: no text can be longer."""
    token_types: int
    """Rows of the token type table; every token has type 0."""
    padding_id: int | None = None
    """RoBERTa's padding token, which is not counted: the first token that is another one has the
    row behind this number, and padding the row of this number. None: the row is the place."""

    @property
    def first_row(self) -> int:
        """Says which row of the position table the first token has."""
        return 0 if self.padding_id is None else self.padding_id + 1


@dataclass(frozen=True, kw_only=True)
class ModernBertArchitecture(PlainArchitecture):
    """Holds all that shapes a ModernBERT."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    norm_eps: float
    local: tuple[bool, ...]
    """By layer: whether a position sees only those at most `reach` away."""
    reach: int
    global_theta: float
    local_theta: float

    @property
    def max_length(self) -> None:
        return None

    @property
    def stacked_layers(self) -> int:
        return self.num_layers - 2


class Head(nn.Module):
    """Computes norm(gelu(dense(x))), then applies the embedding as decoder, and a bias."""

    arch: BertArchitecture | ModernBertArchitecture
    use_bias: bool
    dtype: Any

    def setup(self):
        self.dense = Linear(self.arch.width, self.use_bias, self.dtype)
        self.norm = LayerNorm(self.arch.norm_eps, self.use_bias, self.dtype)
        self.bias = self.param("bias", nn.initializers.zeros, (self.arch.vocab_size,), jnp.float32)

    def __call__(self, x, embed):
        logits = embed.attend(self.norm(jax.nn.gelu(self.dense(x), approximate=False)))
        return logits + self.bias.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _embed(arch: BertArchitecture | ModernBertArchitecture, rows: int, dtype: Any) -> nn.Embed:
    init = nn.initializers.normal(0.02)
    return nn.Embed(rows, arch.width, dtype=dtype, embedding_init=init)


# --- BERT ----------------------------------------------------------------------------------------


class BertBlock(nn.Module):
    """Maps (stream, attention so far) to the same, at `positions` if given; norms come after."""

    arch: BertArchitecture
    dtype: Any

    @nn.compact
    def __call__(self, carry, key_valid, positions=None):
        (x, total), arch = carry, self.arch
        attn = Projections(arch.width, arch.num_heads, True, self.dtype, name="attn")
        query = take(x, positions)
        q, k, v = attn.heads_of(query, x)
        out, weights = attend(q, k, v, key_valid[:, None])
        norm = LayerNorm(arch.norm_eps, True, self.dtype, name="attn_norm")
        x = norm(query + attn.merge(out))
        norm = LayerNorm(arch.norm_eps, True, self.dtype, name="mlp_norm")
        x = norm(x + BertMlp(arch, self.dtype, name="mlp")(x))
        return (x, add_weights(total, weights)), None


class BertMlp(nn.Module):
    """Computes down(gelu(up(x))), exact gelu."""

    arch: BertArchitecture
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        up = Linear(self.arch.mlp_width, True, self.dtype, name="up_proj")(x)
        up = jax.nn.gelu(up, approximate=False)
        return Linear(self.arch.width, True, self.dtype, name="down_proj")(up)


def counted_rows(tokens: Int[Array, "b l"], padding_id: int) -> Int[Array, "b l"]:
    """Returns which row of RoBERTa's position table each token has."""
    counted = (tokens != padding_id).astype(jnp.int32)
    return jnp.cumsum(counted, axis=1) * counted + padding_id


class BertNetwork(nn.Module):
    """Joins the layers of a BERT."""

    arch: BertArchitecture
    dtype: Any
    remat: bool = False

    def setup(self):
        arch = self.arch
        self.embed = _embed(arch, arch.vocab_size, self.dtype)
        self.positions = _embed(arch, arch.first_row + arch.max_length, self.dtype)
        self.types = _embed(arch, arch.token_types, self.dtype)
        self.embed_norm = LayerNorm(arch.norm_eps, True, self.dtype)
        if arch.num_layers > 1:
            stack = scanned(BertBlock, self.remat, arch.num_layers - 1, (nn.broadcast,))
            self.blocks = stack(arch, self.dtype)
        self.last_block = BertBlock(arch, self.dtype)
        self.head = Head(arch, True, self.dtype)

    def entering(self, tokens, key_valid):
        del key_valid
        if tokens.shape[1] > self.arch.max_length:
            raise ModelError(
                f"a batch has {tokens.shape[1]} positions, but the model has position embeddings "
                f"for {self.arch.max_length} only; lower --max-length"
            )
        x = self.embed(tokens) + self.types(jnp.zeros_like(tokens))
        padding = self.arch.padding_id
        rows = all_positions(x) if padding is None else counted_rows(tokens, padding)
        return self.embed_norm(x + self.positions(rows))

    def _enter_last(self, tokens, key_valid, total):
        carry = (self.entering(tokens, key_valid), total)
        if self.arch.num_layers > 1:
            carry, _ = self.blocks(carry, key_valid)
        return carry

    def trunk(self, tokens, key_valid):
        return self._enter_last(tokens, key_valid, None)[0]

    def last_hidden(self, stream, key_valid, positions=None):
        (x, _), _ = self.last_block((stream, None), key_valid, positions)
        return self.leaving(x)

    def leaving(self, stream):
        return stream

    def logits(self, hidden):
        return self.head(hidden, self.embed)

    def attention(self, tokens, key_valid):
        total = jnp.zeros((*tokens.shape, tokens.shape[1]), jnp.float32)
        (_, total), _ = self.last_block(self._enter_last(tokens, key_valid, total), key_valid)
        assert total is not None
        return total / self.arch.num_layers

    def __call__(self, tokens, key_valid):
        return self.logits(self.last_hidden(self.trunk(tokens, key_valid), key_valid))


@dataclass(frozen=True, kw_only=True)
class BertModel(LinenModel):
    """Implements `Model` over `BertNetwork`."""

    arch: BertArchitecture

    @property
    def network(self) -> BertNetwork:
        return BertNetwork(self.arch, self.dtype, self.remat)

    def through_block(
        self, kind: BertArchitecture, params: Params, stream: Any, key_valid: Bool[Array, "b l"]
    ) -> Float[Array, "b l d"]:
        """Returns the stream behind a block."""
        return run(BertBlock(kind, self.dtype), params, (stream, None), key_valid)[0][0]

    def flops_per_text(self, length: int, scored: float) -> float:
        """Counts operations of one forward pass."""
        return flops(self.arch, length, scored, 2, _head_flops(self.arch))


# --- ModernBERT ----------------------------------------------------------------------------------


class ModernBertBlock(nn.Module):
    """Maps (stream, attention so far) to the same, at `positions` if given; norms come first.

    `local` and `theta` are scalars of the layer, so that both kinds of layers are one scan.
    """

    arch: ModernBertArchitecture
    dtype: Any
    first: bool = False
    """The first block has no norm before attention: the embedding's is there already."""

    @nn.compact
    def __call__(self, carry, local, theta, key_valid, positions=None):
        (x, total), arch = carry, self.arch
        h = x
        if not self.first:
            h = LayerNorm(arch.norm_eps, False, self.dtype, name="attn_norm")(x)
        keys = all_positions(x)
        queries = keys if positions is None else positions
        attn = Projections(arch.width, arch.num_heads, False, self.dtype, name="attn")
        q, k, v = attn.heads_of(take(h, positions), h)
        near = jnp.abs(queries[:, :, None] - keys[:, None]) <= arch.reach
        allowed = key_valid[:, None] & (near | ~local)
        q, k = rotate(q, queries, theta, True), rotate(k, keys, theta, True)
        out, weights = attend(q, k, v, allowed)
        x = take(x, positions) + attn.merge(out)
        h = LayerNorm(arch.norm_eps, False, self.dtype, name="mlp_norm")(x)
        x = x + ModernBertMlp(arch, self.dtype, name="mlp")(h)
        return (x, add_weights(total, weights)), None


class ModernBertMlp(nn.Module):
    """Computes down(gelu(gate(x)) * up(x)), exact gelu."""

    arch: ModernBertArchitecture
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        gate = Linear(self.arch.mlp_width, False, self.dtype, name="gate_proj")(x)
        up = Linear(self.arch.mlp_width, False, self.dtype, name="up_proj")(x)
        gate = jax.nn.gelu(gate, approximate=False)
        return Linear(self.arch.width, False, self.dtype, name="down_proj")(gate * up)


class ModernBertNetwork(nn.Module):
    """Joins the layers of a ModernBERT, two or more."""

    arch: ModernBertArchitecture
    dtype: Any
    remat: bool = False

    def setup(self):
        arch = self.arch
        self.embed = _embed(arch, arch.vocab_size, self.dtype)
        self.embed_norm = LayerNorm(arch.norm_eps, False, self.dtype)
        self.first_block = ModernBertBlock(arch, self.dtype, first=True)
        if arch.num_layers > 2:
            axes = (0, 0, nn.broadcast)
            stack = scanned(ModernBertBlock, self.remat, arch.num_layers - 2, axes)
            self.blocks = stack(arch, self.dtype)
        self.last_block = ModernBertBlock(arch, self.dtype)
        self.final_norm = LayerNorm(arch.norm_eps, False, self.dtype)
        self.head = Head(arch, False, self.dtype)

    def _layers(self) -> tuple[Bool[Array, " n"], Float[Array, " n"]]:
        """Returns the kind and the rotary base of every layer."""
        local = jnp.array(self.arch.local)
        theta = jnp.where(local, self.arch.local_theta, self.arch.global_theta)
        return local, theta.astype(jnp.float32)

    def entering(self, tokens, key_valid):
        del key_valid
        return self.embed_norm(self.embed(tokens))

    def _enter_last(self, tokens, key_valid, total):
        local, theta = self._layers()
        carry = (self.entering(tokens, key_valid), total)
        carry, _ = self.first_block(carry, local[0], theta[0], key_valid)
        if self.arch.num_layers > 2:
            carry, _ = self.blocks(carry, local[1:-1], theta[1:-1], key_valid)
        return carry

    def _through_last(self, carry, key_valid, positions=None):
        local, theta = self._layers()
        return self.last_block(carry, local[-1], theta[-1], key_valid, positions)[0]

    def trunk(self, tokens, key_valid):
        return self._enter_last(tokens, key_valid, None)[0]

    def last_hidden(self, stream, key_valid, positions=None):
        return self.leaving(self._through_last((stream, None), key_valid, positions)[0])

    def leaving(self, stream):
        return self.final_norm(stream)

    def logits(self, hidden):
        return self.head(hidden, self.embed)

    def attention(self, tokens, key_valid):
        total = jnp.zeros((*tokens.shape, tokens.shape[1]), jnp.float32)
        carry = self._enter_last(tokens, key_valid, total)
        _, total = self._through_last(carry, key_valid)
        assert total is not None
        return total / self.arch.num_layers

    def __call__(self, tokens, key_valid):
        return self.logits(self.last_hidden(self.trunk(tokens, key_valid), key_valid))


@dataclass(frozen=True, kw_only=True)
class ModernBertModel(LinenModel):
    """Implements `Model` over `ModernBertNetwork`."""

    arch: ModernBertArchitecture

    @property
    def network(self) -> ModernBertNetwork:
        return ModernBertNetwork(self.arch, self.dtype, self.remat)

    def block_kind(self, number: int) -> tuple[bool, bool]:
        """Returns whether a block is the first, and whether it is local."""
        return number == 0, self.arch.local[number]

    def through_block(
        self, kind: tuple[bool, bool], params: Params, stream: Any, key_valid: Bool[Array, "b l"]
    ) -> Float[Array, "b l d"]:
        """Returns the stream behind a block of a kind."""
        first, local = kind
        theta = self.arch.local_theta if local else self.arch.global_theta
        near_only = jnp.array(local)  # `~` of Python's own would be an integer
        block = ModernBertBlock(self.arch, self.dtype, first)
        return run(block, params, (stream, None), near_only, theta, key_valid)[0][0]

    def flops_per_text(self, length: int, scored: float) -> float:
        """Counts operations of one forward pass. Local layers count all keys: all are computed."""
        return flops(self.arch, length, scored, 3, _head_flops(self.arch))


def _head_flops(arch: BertArchitecture | ModernBertArchitecture) -> int:
    return 2 * arch.width * (arch.width + arch.vocab_size)

"""The hidden states between blocks, for comparisons with another framework.

Scoring never needs them: the blocks are scanned there. Here the same block modules run one by one
over their slices of the stacked parameters, one compiled program for all blocks of a kind.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sama_jax.arrays import Params
from sama_jax.models import dit, encoders, transformer
from sama_jax.models.dit import DitArchitecture
from sama_jax.models.encoders import BertArchitecture, ModernBertArchitecture


def block_params(params: Params) -> Iterator[Params]:
    """Parameters of each block in turn: those apart in front, the stacked ones, the last."""
    for name in ("first_block", *(f"first_blocks_{i}" for i in range(len(params)))):
        if name in params:
            yield params[name]
    if "blocks" in params:
        for i in range(jax.tree.leaves(params["blocks"])[0].shape[0]):
            yield jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
    yield params["last_block"]


def stages(
    model: Any, params: Params, tokens: Int[Array, "b l"], key_valid: Bool[Array, "b l"]
) -> Iterator[tuple[str, Float[Array, "b l d"]]]:
    """What enters the first block (`embedding`), what each block gives (`block 1`, ..), and the
    final hidden states (`final norm`; BERT, which has none, gives its last block's again)."""
    stream = _enter(model, params, tokens, key_valid)
    yield "embedding", _state(stream)
    for number, weights in enumerate(block_params(params)):
        stream = _block(_kind(model, number), model.dtype, weights, stream, key_valid)
        yield f"block {number + 1}", _state(stream)
    yield "final norm", _leave(model, params, stream)


def _state(stream: Any) -> Float[Array, "b l d"]:
    """The stream without the condition that a diffusion transformer carries beside it."""
    return stream[0] if isinstance(stream, tuple) else stream


def _kind(model: Any, number: int) -> Any:
    """What of a block is static: blocks of one kind share a program."""
    arch = model.arch
    if isinstance(arch, ModernBertArchitecture):
        local = arch.local[number]
        return arch, number == 0, local, arch.local_theta if local else arch.global_theta
    if isinstance(arch, transformer.Architecture) and number < arch.first_dense:
        return replace(arch, experts=None)
    return arch


@partial(jax.jit, static_argnums=0)
def _enter(model: Any, params: Params, tokens: Array, key_valid: Array) -> Any:
    """The stream that enters the first block."""
    arch = model.arch
    if isinstance(arch, ModernBertArchitecture):
        network = model.network

        def embed(bound: Any, ids: Array) -> Array:
            return bound.embed_norm(bound.embed(ids))

        return network.apply({"params": params}, tokens, method=embed)
    # The last of one layer is the first: a network of one block enters it right away.
    single: dict[str, Any] = {"num_layers": 1}
    if isinstance(arch, transformer.Architecture):
        single["first_dense"] = 0
    return replace(model, arch=replace(arch, **single)).trunk(params, tokens, key_valid)


@partial(jax.jit, static_argnums=0)
def _leave(model: Any, params: Params, stream: Any) -> Array:
    """What stands behind the last block, before the head."""
    if isinstance(model.arch, BertArchitecture):
        return stream

    def norm(bound: Any, x: Any) -> Array:
        if not isinstance(model.arch, DitArchitecture):
            return bound.final_norm(x)
        shift, scale = dit.split_modulation(bound.final_modulation(x[1]), 2)
        return bound.final_norm(x[0]) * (1 + scale) + shift

    return model.network.apply({"params": params}, stream, method=norm)


@partial(jax.jit, static_argnums=(0, 1))
def _block(kind: Any, dtype: Any, weights: Params, stream: Any, key_valid: Array) -> Any:
    """One block."""
    tree = {"params": weights}
    if isinstance(kind, DitArchitecture):
        x, condition = stream
        block = dit.Block(kind, dtype)
        (x, _), _ = block.apply(tree, (x, None), condition, key_valid)  # pyright: ignore
        return x, condition
    if isinstance(kind, BertArchitecture):
        block = encoders.BertBlock(kind, dtype)
        (x, _), _ = block.apply(tree, (stream, None), key_valid)  # pyright: ignore
    elif isinstance(kind, tuple):
        arch, first, local, theta = kind
        local = jnp.array(local)  # `~` of Python's own would be an integer
        block = encoders.ModernBertBlock(arch, dtype, first)
        (x, _), _ = block.apply(tree, (stream, None), local, theta, key_valid)  # pyright: ignore
    else:
        block = transformer.Block(kind, dtype)
        x, _ = block.apply(tree, (stream, None), key_valid)  # pyright: ignore
    return x

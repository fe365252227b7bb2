"""Yields the hidden states between blocks, for comparisons with another framework.

Scoring never needs them: the blocks are scanned there. Here the same block modules run one by one
over their slices of the stacked parameters, one compiled program for all blocks of a kind.
"""

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from sama_jax.arrays import Model, Params
from sama_jax.models.model import LinenModel


def block_params(params: Params) -> Iterator[Params]:
    """Yields the parameters of each block: those apart in front, the stacked ones, the last."""
    for name in ("first_block", *(f"first_blocks_{i}" for i in range(len(params)))):
        if name in params:
            yield params[name]
    if "blocks" in params:
        for i in range(jax.tree.leaves(params["blocks"])[0].shape[0]):
            yield jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
    yield params["last_block"]


def stages(
    model: Model,
    params: Params,
    tokens: Int[Array, "b l"],
    key_valid: Bool[Array, "b l"],
    instead: Callable[[str, Array], Array] = lambda name, state: state,
    clean: Int[Array, "b l"] | None = None,
) -> Iterator[tuple[str, Float[Array, "b n d"]]]:
    """Yields what enters the first block (`embedding`), what each block gives (`block 1`, ..), and
    the final hidden states (`final norm`; BERT, which has none, gives its last block's again).

    `instead` is told the name and the state of each stage but the last; the next stage reads what
    it returns. Where the network reads the text without masks as well, which `clean` is, its states
    stand behind those of `tokens`.
    """
    assert isinstance(model, LinenModel)  # every family's is; the protocol knows no blocks

    def passed_on(name: str, stream: Any) -> Any:
        state = model.state_of(stream)
        given = instead(name, state)
        return jax.tree.map(lambda leaf: given if leaf is state else leaf, stream)

    stream = _enter(model, params, tokens, key_valid, clean)
    read_valid = model.key_valid_of(key_valid)
    yield "embedding", model.state_of(stream)
    stream = passed_on("embedding", stream)
    for number, weights in enumerate(block_params(params)):
        name = f"block {number + 1}"
        stream = _block(model, model.block_kind(number), weights, stream, read_valid)
        yield name, model.state_of(stream)
        stream = passed_on(name, stream)
    yield "final norm", _leave(model, params, stream)


@partial(jax.jit, static_argnums=0)
def _enter(
    model: LinenModel, params: Params, tokens: Array, key_valid: Array, clean: Array | None
) -> Any:
    return model.entering(params, tokens, key_valid, clean)


@partial(jax.jit, static_argnums=(0, 1))
def _block(
    model: LinenModel, kind: Hashable, weights: Params, stream: Any, key_valid: Array
) -> Any:
    return model.through_block(kind, weights, stream, key_valid)


@partial(jax.jit, static_argnums=0)
def _leave(model: LinenModel, params: Params, stream: Any) -> Array:
    return model.leaving(params, stream)

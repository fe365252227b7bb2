"""What every network's model promises: where its outputs are read, and its sizes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import NETWORKS

POSITIONS = np.array([[3, 0, 7, 3], [1, 2, 0, 5]], np.int32)


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_states_predict_the_token_at_their_position(name):
    """Shifted, they are the plain model's at the position before; at 0 they are its own."""
    plain = NETWORKS[name]
    shifted = replace(plain, shift=True)
    params = jax.jit(plain.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 64)
    valid = jnp.arange(8)[None] < jnp.array([[8], [6]])

    @jax.jit
    def read():
        stream = plain.trunk(params, tokens, valid)
        plain_at = plain.last_hidden(params, stream, valid, jnp.asarray(POSITIONS))
        shifted_at = shifted.last_hidden(params, stream, valid, jnp.asarray(POSITIONS))
        own = [m.output_at(params, stream, valid, jnp.asarray(POSITIONS)) for m in (plain, shifted)]
        everywhere = [m.hidden(params, tokens, valid) for m in (plain, shifted)]
        return plain_at, shifted_at, own, everywhere

    plain_at, shifted_at, own, (everywhere, shifted_everywhere) = jax.tree.map(np.asarray, read())

    def at(positions):
        return np.take_along_axis(everywhere, positions[..., None], axis=1)

    close = {"rtol": 0, "atol": 1e-5}
    before = np.maximum(POSITIONS - 1, 0)
    np.testing.assert_allclose(plain_at, at(POSITIONS), **close)
    np.testing.assert_allclose(shifted_at, at(before), **close)
    for found in own:
        np.testing.assert_allclose(found, at(POSITIONS), **close)
    np.testing.assert_array_equal(shifted_everywhere, at(np.array([[0, 0, 1, 2, 3, 4, 5, 6]] * 2)))
    assert np.abs(at(before) - at(POSITIONS)).max() > 0.1  # neighbours are not alike


@pytest.mark.parametrize("name", NETWORKS)
def test_an_architecture_knows_the_sizes_of_its_parameters(name):
    arch = NETWORKS[name].arch
    params = jax.eval_shape(NETWORKS[name].init, jax.random.key(0))
    blocks, table = params["blocks"], params["embed"]["embedding"]
    assert table.shape == (arch.vocab_size, arch.width)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(blocks)} == {arch.stacked_layers}
    kernels = {name: leaf.get("kernel") for name, leaf in blocks["attn"].items()}
    columns = {name: leaf.shape[-1] for name, leaf in kernels.items() if leaf is not None}
    heads, kv_heads = arch.num_heads * arch.head_size, arch.num_kv_heads * arch.head_size
    expected = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads, "o_proj": arch.width}
    assert columns == expected
    mlp = blocks["shared" if "moe" in blocks else "mlp"]
    assert mlp["up_proj"]["kernel"].shape[-1] == arch.active_width
    if arch.max_length is not None:
        assert params["positions"]["embedding"].shape == (arch.max_length, arch.width)

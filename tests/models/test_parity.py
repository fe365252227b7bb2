"""The network against a PyTorch one, through sharded safetensors folders, all parameters random."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F

from sama_jax.models import attention
from sama_jax.models.attention import attend
from sama_jax.models.layers import Norm, rotate
from sama_jax.models.transformer import TransformerModel
from sama_jax.weights import loading, model_folder

LENGTH = 256
# Where each of the four texts lies in its row: full, padded left, padded right, mostly padding.
SPANS = [(0, LENGTH), (57, LENGTH), (0, 171), (0, 9)]

VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"n_kv_heads": 2},
    "one_kv_head_and_qkv_bias": {"n_kv_heads": 1, "include_qkv_bias": True},
    "tied": {"weight_tying": True, "n_kv_heads": 3},
    "qk_norm": {"attention_layer_norm": True, "n_kv_heads": 2},
    "all_biases": {"include_bias": True, "bias_for_layer_norm": None, "attention_layer_norm": True},
    "linear_bias_only": {"include_bias": True, "bias_for_layer_norm": False},
    "block_groups": {"block_group_size": 2, "n_layers": 4, "n_kv_heads": 2},
    "scaled": {"input_emb_norm": True, "scale_logits": True, "bias_for_layer_norm": True},
    "other_numbers": {"rms_norm_eps": 1e-2, "rope_theta": 100.0, "embedding_size": 384},
    "one_layer": {"n_layers": 1},
}


class Pair(NamedTuple):
    """The same weights in both networks."""

    module: oracle.Llada
    model: TransformerModel
    params: Any


class Texts(NamedTuple):
    tokens: np.ndarray
    """What the networks read: a third of the valid positions holds the mask id."""
    answers: np.ndarray
    """The ids before masking."""
    valid: np.ndarray
    masked: np.ndarray


def open_pair(path: Path, variant: str, dtype: str = "float32") -> Pair:
    config = oracle.config(**VARIANTS[variant])
    seed = list(VARIANTS).index(variant)
    module = oracle.random_folder(path, config, seed, shards=3, dtype=getattr(torch, dtype))
    assert len(list(path.glob("*.safetensors"))) == 3
    folder = model_folder.open_folder(path, dtype=dtype)
    params = loading.load(folder, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    return Pair(module, folder.model, params)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair(variant, dtype)`, each written and loaded once."""
    return functools.cache(
        lambda variant, dtype="float32": open_pair(tmp_path_factory.mktemp(variant), variant, dtype)
    )


def make_texts() -> Texts:
    rng = np.random.default_rng(0)
    answers = rng.integers(0, oracle.PAD_ID, (len(SPANS), LENGTH)).astype(np.int32)
    index = np.arange(LENGTH)
    valid = np.stack([(start <= index) & (index < end) for start, end in SPANS])
    masked = valid & (rng.random(valid.shape) < 1 / 3)
    tokens = np.where(masked, oracle.MASK_ID, np.where(valid, answers, oracle.PAD_ID))
    return Texts(tokens.astype(np.int32), answers, valid, masked)


TEXTS = make_texts()


@functools.partial(jax.jit, static_argnums=0)
def forward(model: TransformerModel, params, tokens, key_valid):
    hidden = model.hidden(params, tokens, key_valid)
    return model.logits(params, hidden), [model.trunk(params, tokens, key_valid), hidden]


def ours(pair: Pair, tokens: np.ndarray, key_valid: np.ndarray):
    """Float32 logits and the two hidden states: into the last block, and the final one."""
    logits, hidden = forward(pair.model, pair.params, tokens, key_valid)
    return np.asarray(logits.astype(jnp.float32)), [np.asarray(h, np.float32) for h in hidden]


def theirs(pair: Pair, tokens: np.ndarray, key_valid: np.ndarray | None):
    """Float32 logits and hidden states of the oracle."""
    mask = None if key_valid is None else torch.from_numpy(key_valid)
    logits, hidden = pair.module(torch.from_numpy(tokens).long(), mask)
    return logits.float().numpy(), [h.float().numpy() for h in hidden]


def nll(logits: np.ndarray) -> np.ndarray:
    """Loss of every answer, from float32 logits, in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    total = np.log(np.exp(wide - top).sum(-1)) + top[..., 0]
    return total - np.take_along_axis(wide, TEXTS.answers[..., None], -1)[..., 0]


# Float32 against float32: sums of about 100 terms in another order, a dozen matrix products deep,
# stay within some 1e-6 of values of order one. A wrong formula is off by 1e-2 or more here.
LOGITS, NLL, BLOCKS = 1e-4, 1e-5, 1e-5


@pytest.mark.parametrize("padding", ["hidden", "visible"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_losses_equal_pytorch(pair, variant, padding, record_parity):
    both = pair(variant)
    if padding == "hidden":
        expected, _ = theirs(both, TEXTS.tokens, TEXTS.valid)
        actual, _ = ours(both, TEXTS.tokens, TEXTS.valid)
    else:  # PyTorch without any mask, as the published attack runs it
        expected, _ = theirs(both, TEXTS.tokens, None)
        actual, _ = ours(both, TEXTS.tokens, np.ones_like(TEXTS.valid))
    assert expected.std() > 0.05, "logits too flat to tell anything"
    difference = np.abs(actual - expected)[TEXTS.valid].max()
    loss_difference = np.abs(nll(actual) - nll(expected))[TEXTS.valid].max()
    record_parity("LLaDA", difference, loss_difference)
    assert difference < LOGITS
    assert loss_difference < NLL


def test_hiding_padding_changes_every_padded_text_and_only_those(pair):
    """The two modes above are different functions, and the comparison can see it."""
    hidden, _ = ours(pair("mha"), TEXTS.tokens, TEXTS.valid)
    visible, _ = ours(pair("mha"), TEXTS.tokens, np.ones_like(TEXTS.valid))
    change = np.abs(hidden - visible)
    np.testing.assert_array_equal(change[0], 0)
    for row in (1, 2, 3):
        assert change[row][TEXTS.valid[row]].max() > 100 * LOGITS


@pytest.mark.parametrize("variant", ["mha", "gqa"])
def test_hidden_padding_equals_the_text_alone(pair, variant):
    """Left padding shifts positions, but rotary attention depends on their differences only."""
    padded, _ = ours(pair(variant), TEXTS.tokens, TEXTS.valid)
    for row, (start, end) in enumerate(SPANS[1:], 1):
        alone, _ = theirs(pair(variant), TEXTS.tokens[row : row + 1, start:end], None)
        np.testing.assert_allclose(padded[row, start:end], alone[0], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("variant", ["gqa", "qk_norm", "block_groups", "scaled"])
def test_hidden_states_equal_pytorch(pair, variant):
    both = pair(variant)
    _, expected = theirs(both, TEXTS.tokens, TEXTS.valid)
    _, actual = ours(both, TEXTS.tokens, TEXTS.valid)
    for mine, state in zip(actual, expected[-2:]):
        # The stream grows with depth: measured in its own units.
        unit = np.sqrt((state[TEXTS.valid] ** 2).mean())
        error = np.abs(mine - state)[TEXTS.valid].max()
        assert error < BLOCKS * unit


@pytest.mark.parametrize("variant", ["gqa", "one_layer"])
def test_last_block_at_scored_positions_equals_hidden_there(pair, variant):
    model, params = pair(variant).model, pair(variant).params
    rng = np.random.default_rng(1)
    # Unordered and with repeats: each output belongs to its own slot.
    choice = [rng.choice(np.flatnonzero(v), 40) for v in TEXTS.valid]
    positions = np.stack(choice).astype(np.int32)
    _, (_, full) = ours(pair(variant), TEXTS.tokens, TEXTS.valid)

    @jax.jit
    def scored(tokens, valid, positions):
        return model.last_hidden(params, model.trunk(params, tokens, valid), valid, positions)

    actual = scored(TEXTS.tokens, TEXTS.valid, positions)
    expected = np.take_along_axis(full, positions[:, :, None], axis=1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=BLOCKS)


@pytest.mark.parametrize("variant", ["gqa", "one_layer"])
def test_attention_equals_pytorch_and_sums_to_one(pair, variant):
    both = pair(variant)
    expected = oracle.attention(
        both.module, torch.from_numpy(TEXTS.tokens).long(), torch.from_numpy(TEXTS.valid)
    ).numpy()
    actual = np.asarray(
        jax.jit(both.model.attention)(both.params, TEXTS.tokens, jnp.asarray(TEXTS.valid))
    )
    assert actual.dtype == np.float32
    assert expected.max() > 0.05, "attention too flat to tell anything"
    np.testing.assert_allclose(actual[TEXTS.valid], expected[TEXTS.valid], rtol=0, atol=1e-6)
    np.testing.assert_allclose(actual[TEXTS.valid].sum(axis=-1), 1, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(actual.sum(axis=1)[~TEXTS.valid], 0)


# bfloat16


@pytest.mark.parametrize("full_precision", [True, False])
def test_rotation_in_bfloat16_equals_pytorch_bit_for_bit(full_precision):
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.standard_normal((2, 4, LENGTH, 32), np.float32)).bfloat16()
    expected = oracle.rope(x, 1e4, full_precision).float().numpy()
    other = oracle.rope(x, 1e4, not full_precision).float().numpy()
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    actual = jax.jit(rotate, static_argnums=(2, 3))(
        jnp.asarray(x.float().numpy(), jnp.bfloat16), positions, 1e4, full_precision
    )
    _assert_same_bits(actual, expected, other)


@pytest.mark.parametrize("bias", [True, False])
def test_norm_in_bfloat16_casts_before_it_scales(bias):
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.standard_normal((512, 96), np.float32)).bfloat16()
    norm = oracle.RmsNorm(96, 1e-5, bias).bfloat16()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.2 * torch.from_numpy(rng.standard_normal(96, np.float32)))
        expected = norm(x).float().numpy()
        cast_last = (norm.weight.float() * oracle.RmsNorm(96, 1e-5, False)(x.float())).bfloat16()
        cast_last = cast_last if norm.bias is None else cast_last + norm.bias
    names = {"weight": "scale", "bias": "bias"}
    params = {
        names[n]: jnp.asarray(p.detach().float().numpy(), jnp.bfloat16)
        for n, p in norm.named_parameters()
    }
    layer = Norm(1e-5, bias, jnp.bfloat16)
    actual = jax.jit(layer.apply)({"params": params}, jnp.asarray(x.float().numpy(), jnp.bfloat16))
    _assert_same_bits(actual, expected, cast_last.float().numpy())


def _assert_same_bits(actual, expected: np.ndarray, other: np.ndarray) -> None:
    """Equal but for rare ties: the float32 values before the cast may differ by 2^-22 relative,
    which flips one rounding to 2^-8 in about 2^14. The `other` order of operations differs in
    every fifth element or more."""
    differs = np.mean(np.asarray(actual.astype(jnp.float32)) != expected)
    assert differs < 1e-3
    assert np.mean(other != expected) > 0.15


def test_attention_in_bfloat16_rounds_only_its_weights_and_its_output():
    """Scores, softmax and sums are float32, so that two roundings of u = 2^-8 bound the error:
    of the weights (u times the weighted sum of |v|) and of the output (u times itself). Scores
    reach tens here; rounded to bfloat16 they would be off by 0.1 and the weights by a tenth.
    """
    rng = np.random.default_rng(5)
    draw = lambda heads, scale: torch.from_numpy(  # noqa: E731
        scale * rng.standard_normal((len(SPANS), heads, LENGTH, 16), np.float32)
    ).bfloat16()
    q, k, v = draw(4, 3.0), draw(2, 3.0), draw(2, 1.0)
    wide = [t.double() if t is q else t.double().repeat_interleave(2, dim=1) for t in (q, k, v)]
    mask = torch.from_numpy(TEXTS.valid)[:, None, None, :]
    exact = F.scaled_dot_product_attention(*wide, attn_mask=mask).numpy()
    spread = F.scaled_dot_product_attention(*wide[:2], wide[2].abs(), attn_mask=mask).numpy()
    actual, _ = jax.jit(attend)(
        *(jnp.asarray(t.float().numpy(), jnp.bfloat16) for t in (q, k, v)), TEXTS.valid
    )
    error = np.abs(np.asarray(actual, np.float64) - exact)
    # 1e-5: float32 scores of tens are off by some 1e-6, and so are their weights, relatively.
    assert (error <= 2.0**-8 * (np.abs(exact) + 1.01 * spread) + 1e-5 * spread).all()


@pytest.mark.parametrize("padding", ["hidden", "visible"])
@pytest.mark.parametrize("variant", ["gqa", "all_biases"])
def test_bfloat16_losses_differ_by_no_more_than_its_rounding(pair, variant, padding):
    """Two bfloat16 runs differ from the exact result, each by its own roundings.

    Unit roundoff is u = 2^-8; a rounding is uniform, hence u / sqrt(3) in standard deviation. A
    block rounds 8 values in a row in its attention (norm, scale, projection, rotation, weights,
    output, projection, sum) and 7 in its MLP (norm, scale, projection, silu, product, projection,
    sum); final norm, scale and head add 3, biases at most 1 to each product. If each of these n
    roundings moved the whole stream independently, the hidden state would be off by
    e = u * sqrt(n / 3) relative, a logit by e times the spread of logits, and a loss, which is a
    difference of logits, by sqrt(2) of that; two runs, another sqrt(2). Branches are smaller than
    the stream, so this is a bound on the standard deviation, not an estimate of it; 5 standard
    deviations bound the largest of some 200 differences.
    """
    both = pair(variant, "bfloat16")
    visible = padding == "visible"
    expected, _ = theirs(both, TEXTS.tokens, None if visible else TEXTS.valid)
    actual, _ = ours(both, TEXTS.tokens, np.ones_like(TEXTS.valid) if visible else TEXTS.valid)
    roundings = 15 * both.model.num_layers + 3
    if variant == "all_biases":
        roundings += 7 * both.model.num_layers + 1
    relative = 2.0**-8 * np.sqrt(roundings / 3)
    deviation = 2 * relative * expected[TEXTS.valid].std()

    difference = (nll(actual) - nll(expected))[TEXTS.masked]
    assert np.sqrt(np.mean(difference**2)) < deviation
    assert np.abs(difference).max() < 5 * deviation
    # No drift to one side: a mean of n independent differences shrinks by sqrt(n).
    assert abs(difference.mean()) < 5 * deviation / np.sqrt(difference.size)

    top = np.sort(expected[TEXTS.valid], axis=-1)
    clear = top[:, -1] - top[:, -2] > 5 * deviation
    assert clear.mean() > 0.1, "too few clear cases to tell anything"
    same = actual[TEXTS.valid].argmax(-1) == expected[TEXTS.valid].argmax(-1)
    assert same[clear].all()
    assert same.mean() > 0.9


# What an output depends on


@functools.partial(jax.jit, static_argnums=0)
def gradient_sizes(model: TransformerModel, params, ids, key_valid, outputs):
    """Largest derivative, by the embedding at each position, of the summed hidden `outputs`."""

    def total(embedding):
        tree = {**params, "embed": {"embedding": embedding}}
        hidden = model.hidden(tree, ids[None], key_valid[None])[0]
        return jnp.sum(jnp.where(outputs[:, None], hidden, 0.0))

    return jnp.max(jnp.abs(jax.grad(total)(params["embed"]["embedding"])[ids]), axis=-1)


@pytest.mark.parametrize("row", range(len(SPANS)))
def test_gradient_is_zero_at_padding_and_nonzero_at_every_valid_position(pair, row):
    """Of all valid outputs, and of the first and the last alone: attention looks both ways."""
    both, valid = pair("gqa"), TEXTS.valid[row]
    # All ids are different, so the rows of the embedding stand for positions.
    ids = np.random.default_rng(4).permutation(300)[:LENGTH].astype(np.int32)
    first, last = np.flatnonzero(valid)[[0, -1]]
    index = np.arange(LENGTH)
    for outputs in (valid, index == first, index == last):
        gradient = np.asarray(gradient_sizes(both.model, both.params, ids, valid, outputs))
        np.testing.assert_array_equal(gradient[~valid], 0.0)
        assert (gradient[valid] > 0).all()


@pytest.mark.parametrize("heads_apart", [False, True])
@pytest.mark.parametrize("by_query", [False, True])
def test_attention_in_parts_is_attention(monkeypatch, by_query: bool, heads_apart: bool):
    """What a CPU does with large batches, against a plain softmax in float64."""
    b, h, g, n, length, a = 3, 4, 2, 128, 150, 8
    q, k, v = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 3),
            ((b, h, n, a), (b, g, length, a), (b, g, length, a)),
        )
    )
    allowed = np.arange(length) < np.array([150, 40, 1])[:, None]
    if by_query:
        allowed = allowed[:, None] & (np.arange(length) <= np.arange(n)[:, None])
    keys = np.repeat(np.asarray(k, np.float64), h // g, axis=1)
    scores = np.einsum("bhna,bhla->bhnl", np.asarray(q, np.float64), keys)
    seen = allowed[:, None] if by_query else allowed[:, None, None]
    powers = np.where(seen, np.exp(scores / np.sqrt(a)), 0.0)
    weights = powers / powers.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhnl,bhla->bhna", weights, np.repeat(np.asarray(v), h // g, axis=1))
    text = 4 * h * n * length
    for limit, part, parts in ((2**40, 0, None), (0, text, 1), (0, text / 2, 2), (0, 0, 4)):
        monkeypatch.setattr(attention, "CPU_SCORE_BYTES", limit)
        monkeypatch.setattr(attention, "CPU_PART_BYTES", part)
        jax.clear_caches()  # JAX keeps what it has traced of a branch
        assert parts in (None, attention.query_parts(h, n, length))
        split = jax.jit(lambda *args: attend(*args, heads_apart=heads_apart))
        out, read = split(q, k, v, jnp.asarray(allowed))
        np.testing.assert_allclose(out, expected, atol=1e-6)
        np.testing.assert_allclose(read, weights, atol=1e-6)


@pytest.mark.parametrize("by_query", [False, True])
def test_cudnn_is_asked_for_the_same_attention(monkeypatch, by_query: bool):
    """Its arguments, in bfloat16, given to the same function's other implementation."""
    asked, original = [], jax.nn.dot_product_attention

    def instead(*args, implementation, **kwargs):
        asked.append(implementation)
        return original(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    b, h, g, n, a = 3, 4, 2, 6, 8
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (b, heads, n, a), jnp.bfloat16)
        for key, heads in zip(keys, (h, g, g))
    )
    allowed = np.arange(n) >= np.array([0, 2, 5])[:, None]  # padding on the left
    if by_query:
        allowed = allowed[:, None] & np.tri(n, dtype=bool)
        allowed |= np.eye(n, dtype=bool)  # none sees nothing
    allowed = jnp.asarray(allowed)
    expected, _ = attend(q, k, v, allowed)
    found, _ = attend(q, k, v, allowed, "cudnn")
    assert asked == ["cudnn"]
    as_float = (np.asarray(x, np.float32) for x in (found, expected))
    np.testing.assert_allclose(*as_float, atol=0.02)  # bfloat16 keeps 8 bits of values below 4
    attend(q[:, :, :2], k, v, allowed if not by_query else allowed[:, :2], "cudnn")
    assert asked == ["cudnn"]  # few queries: by XLA

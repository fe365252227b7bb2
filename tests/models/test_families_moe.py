"""LLaDA-MoE and LLaDA2 against PyTorch, through sharded folders, all parameters random."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_moe
import pytest
import torch
from safetensors import safe_open

from sama_jax.arrays import Model
from sama_jax.errors import ModelError
from sama_jax.models.attention_mask import mask_of
from sama_jax.models.moe import Experts, Moe, mix, sigmoid_gate, softmax_gate
from sama_jax.models.registry import build_model, read_config
from sama_jax.weights import loading, model_folder, safetensors, saving, tensor_map

LENGTH = 256
# Where each of the four texts lies in its row: full, padded left, padded right, mostly padding.
SPANS = [(0, LENGTH), (57, LENGTH), (0, 171), (0, 9)]
# As in test_parity.py: float32 sums in another order; a wrong formula is off by 1e-2 or more.
LOGITS, NLL = 1e-4, 1e-5

MOE, TWO = oracle_moe.llada_moe_config, oracle_moe.llada2_config
VARIANTS: dict[str, dict[str, Any]] = {
    "moe": MOE(),
    "moe_everything": MOE(
        model_type="lladamoe",
        partial_rotary_factor=0.5,
        moe_router_enable_expert_bias=True,
        shared_expert_intermediate_size=40,
        moe_layer_freq=[0, 1, 1],
        attention_bias=True,
        qk_layernorm=False,
        tie_word_embeddings=True,
    ),
    "two": TWO(),
    "two_merged": TWO(model_type="llada2_moe_veomni"),
    "two_other": TWO(
        model_type="llada21_moe",
        first_k_dense_replace=0,
        num_shared_experts=0,
        num_experts_per_tok=1,
        use_bias=True,
        use_qkv_bias=True,
        use_qk_norm=False,
        tie_word_embeddings=True,
    ),
}


class Pair(NamedTuple):
    """The same weights in both networks."""

    path: Path
    module: oracle_moe.MoeModel
    model: Any
    params: Any


def open_pair(path: Path, variant: str, dtype: str = "float32") -> Pair:
    # Equal seeds for a layout of the other: the same weights.
    seed = list(VARIANTS).index(variant.removesuffix("_merged"))
    config = VARIANTS[variant]
    module = oracle_moe.random_folder(path, config, seed, shards=3, dtype=getattr(torch, dtype))
    folder = model_folder.open_folder(path, dtype=dtype)
    params = loading.load(folder, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return Pair(path, module, folder.model, params)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair(variant, dtype)`, each written and loaded once."""
    return functools.cache(
        lambda variant, dtype="float32": open_pair(tmp_path_factory.mktemp(variant), variant, dtype)
    )


def make_texts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens with a third masked, answers, valid), all [4, LENGTH]."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, oracle.PAD_ID, (len(SPANS), LENGTH)).astype(np.int32)
    index = np.arange(LENGTH)
    valid = np.stack([(start <= index) & (index < end) for start, end in SPANS])
    masked = valid & (rng.random(valid.shape) < 1 / 3)
    tokens = np.where(masked, oracle.MASK_ID, np.where(valid, answers, oracle.PAD_ID))
    return tokens.astype(np.int32), answers, valid


TOKENS, ANSWERS, VALID = make_texts()
# Scored positions, unordered and with repeats: each output belongs to its own slot.
SCORED = np.stack([np.random.default_rng(1).choice(np.flatnonzero(v), 40) for v in VALID]).astype(
    np.int32
)


class Outputs(NamedTuple):
    logits: np.ndarray
    hidden: np.ndarray
    scored: np.ndarray
    """Hidden states of the trimmed last block at `SCORED`."""


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Model, params, tokens, key_valid):
    hidden = model.hidden(params, tokens, key_valid)
    trunk = model.trunk(params, tokens, key_valid)  # compiled once: the same as in `hidden`
    scored = model.last_hidden(params, trunk, key_valid, jnp.asarray(SCORED))
    return model.logits(params, hidden).astype(jnp.float32), hidden, scored


def forward(both: Pair, tokens: np.ndarray, key_valid: np.ndarray) -> Outputs:
    return Outputs(*map(np.asarray, _forward(both.model, both.params, tokens, key_valid)))


def nll(logits: np.ndarray) -> np.ndarray:
    """Loss of every answer, from float32 logits, in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    total = np.log(np.exp(wide - top).sum(-1)) + top[..., 0]
    return total - np.take_along_axis(wide, ANSWERS[..., None], -1)[..., 0]


@pytest.mark.parametrize("padding", ["hidden", "visible"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_losses_equal_pytorch(pair, variant, padding, record_parity):
    both, valid = pair(variant), VALID if padding == "hidden" else np.ones_like(VALID)
    with torch.no_grad():
        expected, _ = both.module(torch.from_numpy(TOKENS).long(), torch.from_numpy(valid))
    expected = expected.numpy()
    actual = forward(both, TOKENS, valid).logits
    assert expected.std() > 0.05, "logits too flat to tell anything"
    difference = np.abs(actual - expected)[VALID].max()
    loss_difference = np.abs(nll(actual) - nll(expected))[VALID].max()
    record_parity("LLaDA-MoE" if "moe" in variant else "LLaDA2", difference, loss_difference)
    assert difference < LOGITS
    assert loss_difference < NLL


@pytest.mark.parametrize("variant", VARIANTS)
def test_last_block_at_scored_positions_equals_hidden_there(pair, variant):
    found = forward(pair(variant), TOKENS, VALID)
    expected = np.take_along_axis(found.hidden, SCORED[:, :, None], axis=1)
    np.testing.assert_allclose(found.scored, expected, rtol=0, atol=1e-5)


def test_llada2_sees_its_own_block_and_those_before(pair):
    changed = TOKENS.copy()
    changed[0, 100] = (changed[0, 100] + 1) % oracle.PAD_ID  # in the block of 96 to 127
    before, after = (forward(pair("two"), t, VALID).logits[0] for t in (TOKENS, changed))
    difference = np.abs(after - before).max(axis=-1)
    np.testing.assert_array_equal(difference[:96], 0.0)
    assert (difference[96:] > 1e-6).all()


def test_llada2_reads_blocks_behind_clean_text_as_it_is_trained(pair):
    both = pair("two")
    assert mask_of(both.model.arch) == "clean:32"
    texts = (torch.from_numpy(TOKENS).long(), torch.from_numpy(ANSWERS).long())
    expected = both.module.forward_behind(*texts, torch.from_numpy(VALID)).numpy()
    hidden = jax.jit(both.model.hidden)(both.params, TOKENS, VALID, ANSWERS)
    found = np.asarray(both.model.logits(both.params, hidden))
    assert np.abs(found - expected)[VALID].max() < LOGITS
    assert np.abs(found - forward(both, TOKENS, VALID).logits)[VALID].max() > 0.1


def test_llada2_that_was_trained_without_blocks_equals_pytorch_without_them(pair, monkeypatch):
    both = pair("two")
    folder = model_folder.open_folder(both.path, attention_mask="full")
    monkeypatch.setattr(both.module, "block", None)
    with torch.no_grad():
        expected, _ = both.module(torch.from_numpy(TOKENS).long(), torch.from_numpy(VALID))
    found = forward(both._replace(model=folder.model), TOKENS, VALID).logits
    assert np.abs(found - expected.numpy())[VALID].max() < LOGITS
    assert np.abs(found - forward(both, TOKENS, VALID).logits)[VALID].max() > 0.1


# Files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_folder_has_the_bytes_of_its_source(pair, variant, dtype, tmp_path):
    """The router's bias included, which stays float32 among bfloat16 weights."""
    both = pair(variant, dtype)
    dtypes = {path: str(leaf.dtype) for path, leaf in tensor_map.leaf_paths(both.params).items()}
    kept = {path for path, found in dtypes.items() if found != dtype}
    assert kept == {path for path in dtypes if "expert_bias" in path and dtype != "float32"}
    config = json.loads((both.path / "config.json").read_text())
    family = read_config(config, "").weights
    saving.save_folder(tmp_path, both.params, both.model, config, both.path, family)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    assert tensor_bytes(tmp_path) == tensor_bytes(both.path)


def tensor_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for file in safetensors.weight_files(folder):
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                found[name] = (str(tensor.dtype), tensor.shape, tensor.tobytes())
    return found


def test_stacked_and_separate_experts_are_the_same_parameters(pair):
    same = jax.tree.map(np.array_equal, pair("two").params, pair("two_merged").params)
    assert jax.tree.all(same)


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        model_folder.open_folder(path)
    return str(caught.value)


def test_other_layouts_of_experts_are_refused_by_name(pair, tmp_path):
    module = pair("moe").module
    fused = {"model.layers.1.mlp.w1": torch.zeros(16, 48, 64)}
    oracle.write_folder(tmp_path / "fused", VARIANTS["moe"], dict(module.state_dict()) | fused)
    message = refusal(tmp_path / "fused")
    assert "model.layers.1.mlp.w1: fused experts of dInfer are not read" in message
    stacked = oracle_moe.merged(dict(pair("two").module.state_dict()))
    oracle.write_folder(tmp_path / "stacked", VARIANTS["two"], stacked)
    assert "need model_type 'llada2_moe_veomni'" in refusal(tmp_path / "stacked")


def test_joined_rows_of_another_number_of_heads_are_refused(pair, tmp_path):
    tensors = dict(pair("two").module.state_dict())
    oracle.write_folder(tmp_path, VARIANTS["two"] | {"num_key_value_heads": 1}, tensors)
    message = refusal(tmp_path)
    assert "3 tensors do not fit" in message
    name = "model.layers.2.attention.query_key_value.weight"
    assert f"{name}: expected [144, 64], found [192, 64]" in message


def test_missing_expert_is_named(pair, tmp_path):
    tensors = dict(pair("moe").module.state_dict())
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    oracle.write_folder(tmp_path, VARIANTS["moe"], tensors)
    assert "missing    model.layers.1.mlp.experts.7.up_proj.weight [24, 64]" in refusal(tmp_path)


# Configs


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (MOE(), "lladamoe"),
        (MOE(model_type="lladamoe"), "lladamoe"),
        (MOE(architectures=None), "lladamoe"),
        (oracle.config(), "llada"),
        (oracle.config(architectures=None), "llada"),
        (TWO(), "llada2"),
        (TWO(model_type="llada21_moe"), "llada2"),
        (TWO(model_type="llada2_moe_veomni"), "llada2_merged"),
    ],
)
def test_family_follows_from_type_class_and_telling_fields(config, family):
    assert read_config(config, "config.json").family == family


def test_absent_fields_take_the_class_defaults():
    two = TWO()
    for name in ("head_dim", "n_group", "topk_group", "routed_scaling_factor", "mask_token_id"):
        del two[name]
    for name in ("use_bias", "rms_norm_eps", "rope_theta", "partial_rotary_factor"):
        del two[name]
    read = read_config(two, "config.json")
    arch, experts = read.arch, read.arch.experts
    assert (arch.head_size, arch.rotary_size, arch.rope_theta) == (16, 8, 10000.0)
    assert (arch.norm_eps, arch.o_bias, read.mask_id) == (1e-5, True, 156895)
    assert (experts.groups, experts.kept_groups, experts.scale) == (8, 4, 2.5)
    moe = MOE()
    for name in ("rms_norm_eps", "moe_router_enable_expert_bias", "partial_rotary_factor"):
        del moe[name]
    arch = read_config(moe, "config.json").arch
    assert (arch.norm_eps, arch.rotary_size, arch.experts.bias) == (1e-5, 16, False)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (MOE(architectures=["LLaDAModelLM"]), "architectures is ['LLaDAModelLM']"),
        (MOE(rope_theta=None), "rope_theta is None; expected a positive number"),
        ({k: v for k, v in MOE().items() if k != "rope_theta"}, "rope_theta is None"),
        (MOE(num_experts=0), "num_experts is 0"),
        ({k: v for k, v in MOE().items() if k != "num_experts"}, "num_experts is None"),
        (MOE(num_experts_per_tok=17), "17 active experts do not fit"),
        (MOE(num_attention_heads=3), "3 heads do not divide hidden_size 64"),
        (MOE(num_key_value_heads=3), "is not a multiple of num_key_value_heads 3"),
        (MOE(moe_layer_freq=[1, 0, 1]), "at the start only"),
        (MOE(moe_layer_freq=1), "expected 3 numbers"),
        (MOE(moe_layer_freq=[0, 0, 0]), "3 dense layers of 3 leave none"),
        (MOE(clip_qkv=8.0), "clip_qkv is 8.0, only None is supported"),
        (MOE(partial_rotary_factor=-1), "partial_rotary_factor -1 rotates -16"),
        (TWO(partial_rotary_factor=0.3), "rotates 7 of a head's 24 channels"),
        (TWO(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (TWO(score_function="softmax"), "score_function is 'softmax'"),
        (TWO(rotary_dim=24), "rotary_dim is 24, but partial_rotary_factor rotates 12"),
        (TWO(n_group=5), "32 experts do not make 5 groups"),
        (TWO(n_group=32), "32 experts do not make 32 groups of two or more"),
        (TWO(topk_group=9), "8 active experts do not fit into 9 of 8 groups"),
        (TWO(topk_group=1), "8 active experts do not fit into 1 of 8 groups of 4"),
        (TWO(first_k_dense_replace=3), "3 dense layers of 3 leave none"),
        (TWO(moe_intermediate_size=None), "moe_intermediate_size is None"),
    ],
)
def test_unusable_configs_are_refused(config, complaint):
    with pytest.raises(ModelError) as caught:
        read_config(config, "config.json")
    assert str(caught.value).startswith("config.json: ")
    assert complaint in str(caught.value)


LLADA_MOE_7B = MOE(
    vocab_size=157184,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=16,
    num_experts=64,
    num_experts_per_tok=8,
    expert_intermediate_size=1024,
    moe_layer_freq=[1] * 16,
)
LLADA2_MINI = TWO(
    vocab_size=157184,
    hidden_size=2048,
    num_hidden_layers=20,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    intermediate_size=5120,
    num_experts=256,
    moe_intermediate_size=512,
)


@pytest.mark.parametrize(
    ("config", "parameters", "tensors", "gflop"),
    # Sums over the documented sizes; operations a token of 512 with the active experts only:
    # attention, router, 8 (of 64) or 8 + 1 (of 256) experts, 1 dense layer of LLaDA2, head.
    [
        (LLADA_MOE_7B, 7_356_880_896, 3_219, 2.863),
        (LLADA2_MINI, 16_255_638_528 + 19 * 256, 14_813, 2.306),
    ],
    ids=["LLaDA-MoE-7B-A1B", "LLaDA2.0-mini"],
)
def test_published_sizes(config, parameters, tensors, gflop):
    family = read_config(config, "config.json")
    model = build_model(family, oracle.MASK_ID, jnp.bfloat16)
    leaves = tensor_map.leaf_paths(jax.eval_shape(model.init, jax.random.key(0)))
    assert sum(leaf.size for leaf in leaves.values()) == parameters
    named = {
        name
        for path in leaves
        for _, name, _ in tensor_map.sources(path, leaves, family.weights, model.num_layers)
    }
    assert len(named) == tensors
    once = dataclasses.replace(model.arch, clean_context=False)  # one copy of the text
    per_token = dataclasses.replace(model, arch=once).flops_per_text(512, 512.0) / 512
    assert per_token == pytest.approx(gflop * 1e9, rel=5e-4)


# The expert layer


def test_experts_with_equal_scores_are_taken_from_the_lowest_index():
    h, none = jnp.ones((3, 4)), jnp.zeros(16)
    softmax = Experts(count=16, active=3, width=1, gate="softmax")
    index, weight = softmax_gate(h, jnp.zeros((4, 16)), none, softmax)
    np.testing.assert_array_equal(index, [[0, 1, 2]] * 3)
    np.testing.assert_allclose(weight, 1 / 16)  # of all experts: never normalised
    sigmoid = Experts(count=16, active=3, width=1, gate="sigmoid", groups=8, kept_groups=2)
    index, weight = sigmoid_gate(h, jnp.zeros((4, 16)), none, sigmoid)
    np.testing.assert_array_equal(index, [[0, 1, 2]] * 3)
    np.testing.assert_allclose(weight, 1 / 3, rtol=1e-6)
    # Ties between groups and inside one, with some better expert elsewhere.
    bias = none.at[jnp.array([5, 9])].set(0.25)
    index, _ = sigmoid_gate(h, jnp.zeros((4, 16)), bias, sigmoid)
    np.testing.assert_array_equal(index, [[5, 9, 4]] * 3)


def test_the_best_expert_of_a_dropped_group_is_not_taken():
    """A group counts by its two best experts: one of a single good one loses."""
    scores = np.array([0.9, 0.1, 0.1, 0.1, 0.6, 0.5, 0.1, 0.1, 0.1, 0.1, 0.55, 0.54], np.float32)
    kernel = jnp.asarray(np.log(scores / (1 - scores)))[None, :]
    experts = Experts(
        count=12, active=4, width=1, gate="sigmoid", groups=3, kept_groups=2, scale=2.0
    )
    index, weight = sigmoid_gate(jnp.ones((1, 1)), kernel, jnp.zeros(12), experts)
    np.testing.assert_array_equal(index, [[4, 10, 11, 5]])
    chosen = scores[[4, 10, 11, 5]]
    np.testing.assert_allclose(weight[0], 2 * chosen / chosen.sum(), rtol=1e-6)
    # The bias moves the choice, not the weights.
    index, weight = sigmoid_gate(jnp.ones((1, 1)), kernel, jnp.zeros(12).at[1].set(2.0), experts)
    np.testing.assert_array_equal(index, [[1, 0, 4, 5]])
    chosen = scores[[1, 0, 4, 5]]
    np.testing.assert_allclose(weight[0], 2 * chosen / chosen.sum(), rtol=1e-6)


def naive_mix(x, index, share, gate, up, down):
    """Every expert on every token."""
    hidden = jax.nn.silu(jnp.einsum("nd,edf->nef", x, gate)) * jnp.einsum("nd,edf->nef", x, up)
    every = jnp.einsum("nef,efd->ned", hidden, down)
    return jnp.einsum("nkd,nk->nd", every[jnp.arange(len(x))[:, None], index], share)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(run, x, index, share, *weights):
    def loss(x, share, *weights):
        out = run(x, index, share, *weights)
        return jnp.sum(jnp.sin(out)), out

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)
    (_, out), gradient = grad(x, share, *weights)
    return out, gradient


@pytest.mark.parametrize("load", ["random", "one expert"])
def test_mixing_equals_every_expert_on_every_token(load):
    """Values and gradients, whatever the load."""
    rng = np.random.default_rng(2)
    tokens, count, active, d, f = 150, 12, 3, 8, 6
    x = rng.standard_normal((tokens, d), np.float32)
    shapes = ((count, d, f), (count, d, f), (count, f, d))
    weights = [rng.standard_normal(s, np.float32) for s in shapes]
    share = rng.random((tokens, active)).astype(np.float32)
    index = np.stack([rng.permutation(count)[:active] for _ in range(tokens)]).astype(np.int32)
    if load == "one expert":
        index = np.broadcast_to(np.array([7, 3, 11], np.int32), index.shape)
    expected, expected_gradient = value_and_gradient(naive_mix, x, index, share, *weights)
    out, gradient = value_and_gradient(mix, x, index, share, *weights)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)
    for mine, theirs in zip(gradient, expected_gradient):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4 * float(jnp.abs(theirs).max()))
    if load == "random":  # a batch by vmap, and a single token
        rows = lambda t: t.reshape(3, 50, *t.shape[1:])  # noqa: E731
        by_row = jax.jit(jax.vmap(mix, in_axes=(0, 0, 0, None, None, None)))
        split = by_row(rows(x), rows(index), rows(share), *weights)
        # Other shapes may take other kernels, which differ by a rounding: numbers reach 192, where
        # one unit in the last place is 1.5e-5.
        rounding = 2 * np.spacing(np.abs(out).max())
        np.testing.assert_allclose(split.reshape(out.shape), out, rtol=0, atol=rounding)
        one = jax.jit(mix)(x[:1], index[:1], share[:1], *weights)
        np.testing.assert_allclose(one, out[:1], rtol=0, atol=rounding)


def test_a_tile_at_a_time_is_all_that_exists():
    """64 experts: no buffer of tokens x experts x width, nor of all chosen pairs x inner width."""
    n, count, active, d, f = 512, 64, 8, 64, 128
    shapes = ((n, d), (n, active), (count, d, f), (count, d, f), (count, f, d))
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    index = jax.ShapeDtypeStruct((n, active), jnp.int32)
    compiled = jax.jit(mix).lower(args[0], index, *args[1:]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * active * f * 4 / 2


@pytest.mark.parametrize("variant", ["moe_everything", "two"])
def test_training_leaves_the_router_bias_alone(pair, variant):
    """Gradients are finite and reach every parameter of an expert layer but its buffer."""
    params = pair(variant).params["last_block"]["moe"]
    layer = Moe(pair(variant).model.arch.experts, jnp.float32)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 64, 64), np.float32))

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(jnp.sin(layer.apply({"params": params}, x)))

    for path, leaf in tensor_map.leaf_paths(gradient(params)).items():
        assert np.isfinite(leaf).all(), path
        assert bool(np.any(leaf)) == ("expert_bias" not in path), path

"""SDAR, Fast-dLLM v2, RND1 and Nemotron-Labs-Diffusion against transformers under their masks,
every parameter random."""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle_llama
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sama_jax.core import losses
from sama_jax.errors import ModelError
from sama_jax.models.attention_mask import mask_of
from sama_jax.models.layers import rotate
from sama_jax.models.registry import build_model, read_config
from sama_jax.models.transformer import TransformerModel
from sama_jax.weights import loading, model_folder, saving

LENGTH, ROWS, MASK_ID = 256, 300, 299
# Where each of the three texts lies in its row: full, padded left, padded right.
SPANS = [(0, LENGTH), (57, LENGTH), (0, 171)]
# As in test_families_llama.py: 3 layers, 4 query heads behind 2 key/value heads.
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

MOE = {
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "experts_implementation": "eager",
}


class Family(NamedTuple):
    """How transformers makes a folder of a family."""

    label: str
    origin: str
    """The class of transformers that computes the same, without its ending."""
    fields: dict[str, Any]
    """Of the origin's config."""
    written: dict[str, Any]
    """What the family's `config.json` says besides."""
    block: int | None
    """Of its attention; None: full."""
    shift: bool
    renamed: Mapping[str, str] = MappingProxyType({})
    """Beginnings of the origin's tensor names -> the family's."""


# The 16 frequencies of a head of 32 stay (4), are blended (6) or are divided (6).
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "beta_fast": 8.0,
    "beta_slow": 0.25,
    "original_max_position_embeddings": 384,
    "llama_4_scaling_beta": 0.1,
}

FAMILIES = {
    "sdar": Family(
        "SDAR",
        "Qwen3",
        {"head_dim": 32, "attention_bias": True, "rope_parameters": {"rope_theta": 1e6}},
        {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 4},
        block=4,
        shift=False,
    ),
    "fast_dllm": Family(
        "Fast-dLLM v2",
        "Qwen2",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}},
        {
            "model_type": "Fast_dLLM_Qwen",
            "architectures": ["Fast_dLLM_QwenForCausalLM"],
            "bd_size": 32,
        },
        block=32,
        shift=True,
    ),
    "rnd1": Family(
        "RND1",
        "Qwen3Moe",
        {**MOE, "rope_parameters": {"rope_theta": 1e6}},
        {"model_type": "rnd1", "architectures": ["RND1LM"]}
        # Its class writes what it does not use as false.
        | {"rope_scaling": False, "sliding_window": False, "is_causal": False},
        block=None,
        shift=True,
    ),
    "sdar_moe": Family(
        "SDAR, experts",
        "Qwen3Moe",
        {**MOE, "norm_topk_prob": False, "attention_bias": True},
        {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"]} | {"block_size": 8},
        block=8,
        shift=False,
    ),
    "nemotron": Family(
        "Nemotron-Labs-Diffusion",
        "Ministral3",
        {"head_dim": 32, "sliding_window": None, "rope_parameters": YARN},
        {"model_type": "nemotron_labs_diffusion", "block_size": 32}
        | {"architectures": ["NemotronLabsDiffusionModel"], "dlm_paradigm": "bidirectional"},
        block=32,
        shift=False,
        renamed={"model.": "encoder.", "lm_head.": "diffusion_head."},
    ),
}


class Pair(NamedTuple):
    """The same weights in both networks."""

    family: Family
    module: Any
    folder: model_folder.ModelFolder
    params: Any


def write(path: Path, name: str) -> torch.nn.Module:
    """A folder that transformers saved, with the fields of the family."""
    family = FAMILIES[name]
    made = {**SIZES, **family.fields}
    config = getattr(transformers, f"{family.origin}Config")(**made, attn_implementation="eager")
    module = getattr(transformers, f"{family.origin}ForCausalLM")(config)
    oracle_llama.randomise(module, config.tie_word_embeddings, list(FAMILIES).index(name))
    module.save_pretrained(path, max_shard_size="150KB")
    written = json.loads((path / "config.json").read_text())
    written |= {"mask_token_id": MASK_ID, **family.written}
    (path / "config.json").write_text(json.dumps(written))
    if family.renamed:
        rename(path, family.renamed)
    return module


def rename(path: Path, names: Mapping[str, str]) -> None:
    """Gives the tensors of a folder, and of its index, other beginnings of their names."""
    index = path / "model.safetensors.index.json"
    said = index.read_text()
    for old, new in names.items():
        said = said.replace(f'"{old}', f'"{new}')
    index.write_text(said)
    for file in path.glob("*.safetensors"):
        stored = load_file(file)
        for old, new in names.items():
            stored = {re.sub(f"^{re.escape(old)}", new, k): v for k, v in stored.items()}
        save_file(stored, file)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair(name)`, each written and loaded once."""

    @functools.cache
    def make(name: str) -> Pair:
        path = tmp_path_factory.mktemp(name)
        module = write(path, name)
        assert len(list(path.glob("*.safetensors"))) > 1
        folder = model_folder.open_folder(path, dtype="float32")
        params = loading.load(folder, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        return Pair(FAMILIES[name], module, folder, params)

    return make


def make_texts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of which a third is masked, what they were, and which are no padding."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, MASK_ID, (len(SPANS), LENGTH)).astype(np.int32)
    index = np.arange(LENGTH)
    valid = np.stack([(start <= index) & (index < end) for start, end in SPANS])
    masked = valid & (rng.random(valid.shape) < 1 / 3)
    return np.where(masked, MASK_ID, answers).astype(np.int32), answers, valid


TOKENS, ANSWERS, VALID = make_texts()


def seen(block: int | None) -> np.ndarray:
    """[text, query, key] what each position sees in training, of an input of twice the length: the
    tokens with masks see their block there and the clean text before it, the clean text sees
    blocks of its own. Without blocks: everything, of the text alone."""
    if block is None:
        return np.repeat(VALID[:, None, :], LENGTH, axis=1)
    place = np.arange(LENGTH) // block
    own, before = place[None] == place[:, None], place[None] < place[:, None]
    both = np.block([[own, before], [np.zeros_like(own), own | before]])
    return np.tile(VALID, 2)[:, None, :] & both


@torch.no_grad()
def theirs(both: Pair) -> np.ndarray:
    """Float32 logits of PyTorch at the tokens with masks, given what each position sees."""
    allowed = torch.from_numpy(seen(both.family.block))[:, None]
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    tokens = TOKENS if both.family.block is None else np.concatenate([TOKENS, ANSWERS], axis=1)
    read, place = torch.from_numpy(tokens).long(), torch.arange(tokens.shape[1]) % LENGTH
    out = both.module(read, attention_mask=bias, position_ids=place.expand(len(read), -1))
    return out.logits[:, :LENGTH].numpy()


@functools.partial(jax.jit, static_argnums=0)
def forward(model: TransformerModel, params, tokens, answers, valid, positions):
    """Logits everywhere, and losses as scoring computes them."""
    stream = model.trunk(params, tokens, valid, answers)
    nll = losses.scored_nll(model, params, answers, valid, stream, positions)
    raw = replace(model, shift=False)  # what PyTorch's logits are
    return model.logits(params, raw.hidden(params, tokens, valid, answers)), nll


def expected_nll(logits: np.ndarray, shift: bool) -> np.ndarray:
    """Losses of the answers from logits, in float64; shifted: from the position before."""
    wide = torch.from_numpy(logits).double().log_softmax(dim=-1).numpy()
    if shift:
        wide = np.concatenate([wide[:, :1], wide[:, :-1]], axis=1)
    return -np.take_along_axis(wide, ANSWERS[..., None], -1)[..., 0]


# A shifted loss at the first position of the text on the right would come from padding.
SCORED = VALID.copy()
SCORED[1, SPANS[1][0]] = False


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_losses_equal_pytorch(pair, name, record_parity):
    """Tolerances as in test_parity.py, for the same reason: float32 sums in another order."""
    both = pair(name)
    model = both.folder.model
    assert (model.mask_id, model.kind, model.shift) == (MASK_ID, "diffusion", both.family.shift)
    assert mask_of(model.arch) == (f"clean:{both.family.block}" if both.family.block else "full")
    # The length of a block is not that of a text; YaRN's first training phase is one.
    assert both.folder.family.max_length == (384 if name == "nemotron" else 512)
    expected = theirs(both)
    everywhere = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), VALID.shape)
    out = forward(model, both.params, TOKENS, ANSWERS, VALID, everywhere)
    logits, nll = map(np.asarray, out)
    assert expected.std() > 0.5, "logits too flat to tell anything"
    difference = np.abs(logits - expected)[VALID].max()
    loss_difference = np.abs(nll - expected_nll(expected, both.family.shift))[SCORED].max()
    record_parity(both.family.label, difference, loss_difference)
    assert difference < 1e-4
    assert loss_difference < 1e-5


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_folder_holds_every_tensor_bit_for_bit(pair, name, tmp_path):
    params, folder = pair(name).params, pair(name).folder
    layout = (folder.model, folder.config, folder.path, folder.family.weights)
    saving.save_folder(tmp_path, params, *layout)
    stored, saved = tensors(folder.path), tensors(tmp_path)
    assert saved.keys() == stored.keys()
    for key, array in stored.items():
        np.testing.assert_array_equal(saved[key], array)
    assert model_folder.open_folder(tmp_path).model == folder.model


# Configs

# Sizes in the published config; parameters by `total_size` of the tensor index, 2 bytes each.
PUBLISHED = {
    "SDAR-4B-Chat": (
        {"model_type": "sdar", "block_size": 4, "vocab_size": 151936, "hidden_size": 2560},
        {"intermediate_size": 9728, "num_hidden_layers": 36, "num_key_value_heads": 8},
        8_822_848_512 // 2,
    ),
    "Fast_dLLM_v2_7B": (
        {"model_type": "Fast_dLLM_Qwen", "vocab_size": 152064, "hidden_size": 3584},
        {"intermediate_size": 18944, "num_hidden_layers": 28, "num_key_value_heads": 4}
        | {"num_attention_heads": 28},
        15_231_233_024 // 2,
    ),
    # Sums over the sizes of their classes: embedding, head and layers (of RND1 with 128 experts).
    "Nemotron-Labs-Diffusion-8B": ({"model_type": "nemotron_labs_diffusion"}, {}, 8_489_553_920),
    "RND1-Base-0910": ({"model_type": "rnd1"}, {}, 30_532_122_624),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    first, second, parameters = PUBLISHED[name]
    model = build_model(read_config({**first, **second}, "here"), MASK_ID, jnp.bfloat16)
    leaves = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
    assert sum(leaf.size for leaf in leaves) == parameters


def test_fast_dllm_has_the_defaults_of_its_class():
    read = read_config({"model_type": "Fast_dLLM_Qwen"}, "here")
    assert (read.mask_id, read.arch.block_length, read.arch.width) == (151665, 32, 4096)


def test_sdar_says_how_long_its_blocks_are():
    config = {**SIZES, "model_type": "sdar"}
    with pytest.raises(ModelError, match=r"^here: block_size is None; expected the length of the"):
        read_config(config, "here")
    for stated in (0, -1, "4", 2**16 + 1):
        with pytest.raises(ModelError, match=f"^here: block_size is '?{stated}'?; expected"):
            read_config({**config, "block_size": stated}, "here")
    assert mask_of(read_config({**config, "block_size": 16}, "here").arch) == "clean:16"
    # A name of a mask, which `finetune` writes, goes before it.
    for stated in ({}, {"block_size": 16}):
        read = read_config({**config, **stated, "attention_mask": "block:8"}, "here")
        assert mask_of(read.arch) == "block:8"


@pytest.mark.parametrize("field", ["block_size", "bd_size"])
def test_blocks_of_a_family_that_has_none_are_refused(field):
    with pytest.raises(ModelError, match=f"not understood: {field} is 4"):
        read_config({**SIZES, "model_type": "a2d-qwen3", field: 4}, "here")


def test_a_block_is_a_context_length_in_lit_gpt_alone():
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "intermediate_size": 48, "vocab_size": 60}
    assert read_config({**sizes, "model_type": "smdm"}, "here").max_length > 2048
    config = {**sizes, "model_type": "smdm", "block_size": 2048}
    assert read_config(config, "here").max_length == 2048


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob is False, only True"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, only 1e-06"),
        ({"rope_theta": 1e4}, "rope_theta is 10000.0, only 1000000.0"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta 10000.0"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], only \[\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2, only 1"),
        ({"num_experts_per_tok": 17}, "17 active experts do not fit"),
        ({"block_size": 4}, "not understood: block_size is 4"),
    ],
)
def test_what_the_class_of_rnd1_would_not_follow_is_refused(changes, complaint):
    config = {**SIZES, **MOE, "model_type": "rnd1"}
    assert read_config(config, "here").arch.rope_theta == 1e6
    with pytest.raises(ModelError, match=f"^here: .*{complaint}"):
        read_config({**config, **changes}, "here")


def test_the_number_of_experts_is_read_by_either_name():
    """transformers 5 writes `num_local_experts` for its own Qwen3-MoE."""
    named = {**SIZES, **MOE, "model_type": "rnd1"}
    later = {("num_local_experts" if k == "num_experts" else k): v for k, v in named.items()}
    assert read_config(later, "here") == read_config(named, "here")
    assert read_config({**named, **later}, "here") == read_config(named, "here")
    with pytest.raises(ModelError, match="num_experts is 16, but num_local_experts is 8"):
        read_config({**named, "num_local_experts": 8}, "here")


def test_sdar_with_experts_has_no_defaults():
    config = {**SIZES, **MOE, "model_type": "sdar_moe", "block_size": 4, "rms_norm_eps": 1e-6}
    config |= {"rope_theta": 1e6, "tie_word_embeddings": False}
    read_config(config, "here")
    for field in ("norm_topk_prob", "num_experts", "rope_theta", "block_size", "head_dim"):
        with pytest.raises(ModelError, match=f"^here: .*{field}"):
            read_config({k: v for k, v in config.items() if k != field}, "here")


PUBLISHED_YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "llama_4_scaling_beta": 0.1},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "original_max_position_embeddings": 16384,
}
NEMOTRON = {"model_type": "nemotron_labs_diffusion", "max_position_embeddings": 262144}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mscale": 0.7},
        {"mscale": None, "mscale_all_dim": None},
        {"attention_factor": 1.3},
        {"rope_theta": 1e4, "original_max_position_embeddings": 64},
    ],
)
def test_yarn_turns_as_transformers_does(changes):
    wanted = {k: v for k, v in {**PUBLISHED_YARN, **changes}.items() if v is not None}
    read = read_config({**NEMOTRON, "rope_parameters": wanted}, "here")
    assert read.max_length == wanted["original_max_position_embeddings"]
    arch = read.arch
    config = transformers.Ministral3Config(head_dim=128, rope_parameters=dict(wanted))
    inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    positions = np.array([[0, 1, 7, 60]], np.int32)
    angle = positions[0][:, None] * inverse.double().numpy()
    x = np.zeros((1, 1, 4, 128), np.float32)
    x[..., :64] = 1  # what it becomes is cosines, then sines
    turned = rotate(
        jnp.asarray(x), jnp.asarray(positions), arch.rope_theta, True, arch.rope_scaling
    )
    expected = factor * np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    # 60 radians are rounded to 4e-6 of a turn.
    np.testing.assert_allclose(turned[0, 0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dlm_paradigm": "autoregressive"}, "dlm_paradigm is 'autoregressive'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"sliding_window": 4096}, "not understood: sliding_window is 4096"),
        ({"rope_parameters": {**PUBLISHED_YARN, "truncate": 1}}, "truncate is 1"),
        ({"rope_parameters": {**PUBLISHED_YARN, "beta_slow": 40}}, "beta_slow 40.0 is not below"),
        ({"rope_parameters": {**PUBLISHED_YARN, "rope_type": "linear"}}, "'default' or 'yarn'"),
        ({"rope_parameters": {**PUBLISHED_YARN, "longest": 1}}, "not understood: longest is 1"),
    ],
)
def test_what_is_not_read_of_nemotron_is_refused(changes, complaint):
    config = {**NEMOTRON, "rope_parameters": PUBLISHED_YARN}
    assert read_config(config, "here").arch.block_length == 32
    with pytest.raises(ModelError, match=f"^here: .*{complaint}"):
        read_config({**config, **changes}, "here")

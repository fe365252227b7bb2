"""MDLM, SEDD and the encoders against PyTorch, through sharded folders, all parameters random.

MDLM and SEDD against plain modules of ours (`oracle_dit.py`), the encoders against transformers'.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_dit
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

from sama_jax.arrays import ForwardBatch, Model
from sama_jax.core import losses
from sama_jax.errors import ModelError
from sama_jax.models.registry import build_model, read_config
from sama_jax.weights import loading, model_folder, saving

LENGTH, ROWS = 256, oracle_dit.MASK_ID + 1
MASK_ID = oracle_dit.MASK_ID
# Where each of the four texts lies in its row: full, padded left, padded right, mostly padding.
SPANS = [(0, LENGTH), (57, LENGTH), (0, 171), (0, 9)]
# As in test_parity.py: float32 sums in another order; a wrong formula is off by 1e-2 or more.
LOGITS, NLL = 1e-4, 1e-5

_ENCODER: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "attn_implementation": "eager",
    "pad_token_id": 0,
}
_BERT: dict[str, Any] = {**_ENCODER, "num_hidden_layers": 3, "intermediate_size": 96}
PAD = 7
"""Some tokens of the texts are RoBERTa's padding token, which it does not count."""
_MODERNBERT: dict[str, Any] = {
    **_ENCODER,
    "num_hidden_layers": 4,  # global, local, local, global
    "intermediate_size": 96,
    "local_attention": 32,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
_ROPE: Any = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 7000.0},
}
VARIANTS: dict[str, Any] = {
    "mdlm": lambda: oracle_dit.mdlm_config(),
    "sedd": lambda: oracle_dit.sedd_config(),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**_BERT, max_position_embeddings=LENGTH, type_vocab_size=3)
    ),
    "roberta": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**_BERT, max_position_embeddings=LENGTH + 1, type_vocab_size=1)
    ),
    "roberta_pad_inside": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(
            **_BERT | {"pad_token_id": PAD}, max_position_embeddings=LENGTH + PAD + 1
        )
    ),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**_MODERNBERT)
    ),
    "modernbert_layer_types": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **_MODERNBERT | {"num_hidden_layers": 3},
            norm_eps=1e-2,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=_ROPE,
        )
    ),
}
DIT = ("mdlm", "sedd")
ENCODERS = ("bert", "roberta", "roberta_pad_inside", "modernbert", "modernbert_layer_types")


class Pair(NamedTuple):
    """The same weights in both networks."""

    path: Path
    module: Any
    folder: model_folder.ModelFolder
    params: Any


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Every parameter, norm scales and biases included, at a spread that keeps logits near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                value = noise / parameter.shape[1] ** 0.5
            elif name.endswith("bias"):
                value = 0.2 * noise
            else:
                value = 1 + 0.2 * noise
            parameter.copy_(value)


def load(path: Path) -> tuple[model_folder.ModelFolder, Any]:
    folder = model_folder.open_folder(path, mask_id=MASK_ID, dtype="float32")
    return folder, loading.load(folder, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair(variant)`, each written in at least three shards and loaded once."""

    @functools.cache
    def make(variant: str) -> Pair:
        path, seed = tmp_path_factory.mktemp(variant), list(VARIANTS).index(variant)
        made = VARIANTS[variant]()
        if variant in DIT:
            module = oracle_dit.random_folder(path, made, seed, shards=3)
        else:
            module = made.eval()
            randomise(module, seed)
            module.save_pretrained(path, max_shard_size="100KB")
        assert len(list(path.glob("*.safetensors"))) >= 3
        return Pair(path, module, *load(path))

    return make


class Texts(NamedTuple):
    tokens: np.ndarray
    """What the networks read: valid positions hold the mask id at another rate in every text."""
    answers: np.ndarray
    valid: np.ndarray
    masked: np.ndarray


def make_texts() -> Texts:
    rng = np.random.default_rng(0)
    answers = rng.integers(3, MASK_ID, (len(SPANS), LENGTH)).astype(np.int32)
    index = np.arange(LENGTH)
    valid = np.stack([(start <= index) & (index < end) for start, end in SPANS])
    masked = valid & (rng.random(valid.shape) < np.array([[0.1], [0.3], [0.6], [0.9]]))
    tokens = np.where(masked, MASK_ID, np.where(valid, answers, 0)).astype(np.int32)
    return Texts(tokens, answers, valid, masked)


TEXTS = make_texts()
EVERYWHERE = np.ones_like(TEXTS.valid)
# Unordered and with repeats: each output belongs to its own slot.
POSITIONS = np.stack(
    [np.random.default_rng(1).choice(np.flatnonzero(v), 40) for v in TEXTS.valid]
).astype(np.int32)


class Output(NamedTuple):
    logits: Any
    hidden: Any
    at_positions: Any
    attention: Any


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Model, params, tokens, valid, positions) -> Output:
    """All that the tests read, in one program a variant."""
    hidden = model.hidden(params, tokens, valid)
    stream = model.trunk(params, tokens, valid)
    return Output(
        model.logits(params, hidden),
        hidden,
        model.last_hidden(params, stream, valid, positions),
        model.attention(params, tokens, valid),
    )


def ours(both: Pair, valid: np.ndarray, tokens: np.ndarray = TEXTS.tokens) -> Output:
    out = forward(both.folder.model, both.params, tokens, valid, POSITIONS)
    return jax.tree.map(np.array, out)  # torch wants its input writable


def log_shares(valid: np.ndarray, tokens: np.ndarray = TEXTS.tokens) -> np.ndarray:
    """sigma of each text by a loop: the level whose expected share of masked tokens is its own."""
    shares = [(t[v] == MASK_ID).mean() for t, v in zip(tokens, valid)]
    return np.array([np.log(1 / (1 - min(s, 0.999))) for s in shares], np.float32)


def dit(both: Pair, tokens: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's head output and attention."""
    out = both.module(torch.from_numpy(tokens).long(), torch.from_numpy(sigma))
    return out[0].numpy(), out[1].numpy()


@torch.no_grad()
def encoder(both: Pair, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """transformers' logits, and attention averaged over heads and layers."""
    out = both.module(
        input_ids=torch.from_numpy(TEXTS.tokens).long(),
        attention_mask=torch.from_numpy(valid).long(),
        output_attentions=True,
    )
    weights = torch.stack(out.attentions).mean(dim=(0, 2))
    return out.logits.numpy(), weights.numpy()


def nll(logits: np.ndarray, answers: np.ndarray = TEXTS.answers) -> np.ndarray:
    """Loss of every answer, from float32 logits, in float64."""
    log_p = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()
    return -np.take_along_axis(log_p, answers[..., None], -1)[..., 0]


# --- the encoders --------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["hidden", "visible"])
@pytest.mark.parametrize("variant", ENCODERS)
def test_encoder_logits_and_losses_equal_pytorch(pair, variant, padding, record_parity):
    both, valid = pair(variant), TEXTS.valid if padding == "hidden" else EVERYWHERE
    expected, weights = encoder(both, valid)
    actual = ours(both, valid)
    assert expected.std() > 0.3, "logits too flat to tell anything"
    difference = np.abs(actual.logits - expected)[valid].max()
    loss_difference = np.abs(nll(actual.logits) - nll(expected))[valid].max()
    kinds = {"bert": "BERT", "roberta": "RoBERTa", "modernbert": "ModernBERT"}
    record_parity(kinds[variant.split("_")[0]], difference, loss_difference)
    assert difference < LOGITS
    assert loss_difference < NLL
    np.testing.assert_allclose(actual.attention[valid], weights[valid], rtol=0, atol=1e-6)


def test_hiding_padding_changes_every_padded_text_and_only_those(pair):
    for variant in ENCODERS:
        hidden, visible = (ours(pair(variant), v).logits for v in (TEXTS.valid, EVERYWHERE))
        change = np.abs(hidden - visible)
        np.testing.assert_array_equal(change[0], 0)
        for row in (1, 2, 3):
            assert change[row][TEXTS.valid[row]].max() > 100 * LOGITS


@pytest.mark.parametrize("variant", ["bert", "roberta", "roberta_pad_inside"])
def test_a_text_longer_than_the_position_table_is_refused(pair, variant):
    tokens = jnp.zeros((1, LENGTH + 1), jnp.int32)
    both = pair(variant)
    assert both.folder.max_length == LENGTH
    with pytest.raises(ModelError, match=r"257 positions.*256 only.*--max-length"):
        both.folder.model.trunk(both.params, tokens, jnp.ones(tokens.shape, bool))
    model_folder.open_folder(both.path, mask_id=MASK_ID, longest=LENGTH)
    with pytest.raises(ModelError, match=r"for 256 tokens.*may have 257.*--max-length 256"):
        model_folder.open_folder(both.path, mask_id=MASK_ID, longest=LENGTH + 1)


@pytest.mark.parametrize("written", [None, "[MASK]", {"content": "[MASK]", "lstrip": True}])
def test_the_mask_id_is_the_tokenizers_where_the_config_has_none(pair, written, tmp_path):
    both = pair("bert")
    with pytest.raises(ModelError, match="--mask-id"):
        model_folder.open_folder(both.path)
    shutil.copytree(both.path, tmp_path / "bert")
    words = {"[UNK]": 0, "a": 1, "[MASK]": 17}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "bert/tokenizer.json"))
    settings = tmp_path / "bert/tokenizer_config.json"
    if written is not None:
        settings.write_text(json.dumps({"mask_token": written}))
    assert model_folder.open_folder(tmp_path / "bert").model.mask_id == 17
    assert model_folder.open_folder(tmp_path / "bert", mask_id=5).model.mask_id == 5


def test_modernbert_configs_of_version_4_and_5_are_the_same():
    old = {
        "model_type": "modernbert",
        "num_hidden_layers": 5,
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 7000.0,
        "local_rope_theta": 100.0,
    }
    kinds = ["full_attention", "sliding_attention"]
    new = {
        "model_type": "modernbert",
        "num_hidden_layers": 5,
        "layer_types": (3 * kinds)[:5],
        "rope_parameters": _ROPE,
    }
    read = read_config(old, "old")
    assert read == read_config(new, "new")
    assert read.arch.local == (False, True, False, True, False)  # the pattern, not only equality
    assert (read.arch.global_theta, read.arch.local_theta) == (7000.0, 100.0)


# --- MDLM and SEDD -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", DIT)
def test_dit_logits_and_losses_equal_pytorch(pair, variant, record_parity):
    """Without padding, which the published networks cannot hide."""
    both = pair(variant)
    sigma = log_shares(EVERYWHERE) if variant == "sedd" else np.zeros(len(SPANS), np.float32)
    head, weights = dit(both, TEXTS.tokens, sigma)
    actual = ours(both, EVERYWHERE)
    assert head.std() > 0.3, "logits too flat to tell anything"
    difference = np.abs(actual.logits - head)[..., :MASK_ID].max()
    assert difference < LOGITS
    np.testing.assert_allclose(actual.attention, weights, rtol=0, atol=1e-6)
    # Losses by the published parametrisations, all of their constants included.
    tokens, wide = torch.from_numpy(TEXTS.tokens).long(), torch.from_numpy(head).double()
    if variant == "sedd":
        score = oracle_dit.sedd_log_score(wide, tokens, torch.from_numpy(sigma).double())
        score[..., MASK_ID] = -torch.inf  # p(x0 = v) is proportional to exp(score) over v != mask
        log_p = torch.log(torch.exp(score) / torch.exp(score).sum(dim=-1, keepdim=True)).numpy()
    else:
        log_p = oracle_dit.mdlm_log_p(wide, tokens).numpy()
    expected = -np.take_along_axis(log_p, TEXTS.answers[..., None], -1)[..., 0]
    loss_difference = np.abs(nll(actual.logits) - expected)[TEXTS.masked].max()
    record_parity(variant.upper(), difference, loss_difference)
    assert loss_difference < NLL


@pytest.mark.parametrize("variant", DIT)
def test_dit_hidden_padding_equals_the_text_alone(pair, variant):
    """Its noise level included: the share of masked tokens is among the valid ones, also where
    the padding is made of mask tokens."""
    both = pair(variant)
    padded = ours(both, TEXTS.valid, np.where(TEXTS.valid, TEXTS.tokens, MASK_ID)).logits
    for row, (start, end) in enumerate(SPANS):
        alone = TEXTS.tokens[row : row + 1, start:end]
        sigma = log_shares(np.ones(alone.shape, bool), alone)
        head, _ = dit(both, alone, sigma if variant == "sedd" else np.zeros(1, np.float32))
        error = np.abs(padded[row, start:end] - head[0])[..., :MASK_ID]
        assert error.max() < LOGITS


def test_sigma_can_be_given_and_matters_only_where_the_network_knows_time(pair):
    given = np.array([0.0, 0.3, 1.7, 6.9], np.float32)
    for variant in DIT:
        both = pair(variant)
        model, params = both.folder.model, both.params
        hidden = jax.jit(model.hidden)(params, TEXTS.tokens, EVERYWHERE, None, given)
        actual = np.asarray(jax.jit(model.logits)(params, hidden))[..., :MASK_ID]
        sigma = given if variant == "sedd" else np.zeros_like(given)
        head, _ = dit(both, TEXTS.tokens, sigma)
        np.testing.assert_allclose(actual, head[..., :MASK_ID], rtol=0, atol=LOGITS)
        default = ours(both, EVERYWHERE).logits[..., :MASK_ID]
        assert (np.abs(actual - default).max() > 100 * LOGITS) == (variant == "sedd")


@pytest.mark.parametrize("variant", DIT)
def test_the_mask_token_has_no_probability(pair, variant):
    p = np.asarray(jax.nn.softmax(ours(pair(variant), TEXTS.valid).logits, axis=-1))
    np.testing.assert_array_equal(p[..., MASK_ID], 0.0)
    np.testing.assert_allclose(p.sum(axis=-1), 1.0, atol=1e-5)


def test_scoring_gives_every_pass_the_noise_level_of_its_own_mask(pair):
    """`loss_batch` hands the condition from trunk to last block within a pass."""
    both, rng = pair("sedd"), np.random.default_rng(2)
    masks = TEXTS.valid & (rng.random((2, *TEXTS.valid.shape)) < [[[0.2]], [[0.7]]])
    batch = ForwardBatch(
        tokens=TEXTS.answers,
        valid=EVERYWHERE,
        masks=masks,
        positions=losses.scored_positions(masks, LENGTH),
        group=np.zeros(2, np.int32),
        passes=np.int32(2),
    )
    score = jax.jit(losses.loss_batch, static_argnums=(0, 1))
    values = np.asarray(score(both.folder.model, (LENGTH,), both.params, batch))
    for mask, positions, value in zip(masks, batch.positions, values):
        tokens = np.where(mask, MASK_ID, TEXTS.answers).astype(np.int32)
        head, _ = dit(both, tokens, log_shares(EVERYWHERE, tokens))
        head[..., MASK_ID] = -np.inf
        expected = np.take_along_axis(nll(head), np.maximum(positions, 0), axis=1)
        used = positions >= 0
        assert np.abs(value - expected)[used].max() < NLL
        assert np.isnan(value[~used]).all()


# --- all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_last_block_at_scored_positions_equals_hidden_there(pair, variant):
    out = ours(pair(variant), TEXTS.valid)
    expected = np.take_along_axis(out.hidden, POSITIONS[:, :, None], axis=1)
    np.testing.assert_allclose(out.at_positions, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_gives_back_every_learned_tensor_bit_for_bit(pair, variant, tmp_path):
    both = pair(variant)
    family, config = both.folder.family.weights, both.folder.config
    saving.save_folder(tmp_path, both.params, both.folder.model, config, both.path, family)
    source = {n: t for f in both.path.glob("*.safetensors") for n, t in load_file(f).items()}
    source = {n: t for n, t in source.items() if not n.endswith("inv_freq")}
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == source.keys()
    for name, tensor in source.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)
    again = model_folder.open_folder(tmp_path, mask_id=MASK_ID, dtype="float32")
    assert again.family == both.folder.family


def test_bert_files_with_older_names_and_more_tensors_are_read(pair, tmp_path):
    """As converted from TensorFlow: gamma and beta, pooler, next sentence, position ids, copies."""
    both = pair("bert")
    tensors = {n: t.contiguous() for n, t in both.module.state_dict().items()}
    tensors = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in tensors.items()}
    tensors = {n.replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in tensors.items()}
    tensors |= {
        "bert.pooler.dense.weight": torch.randn(64, 64),
        "bert.pooler.dense.bias": torch.randn(64),
        "cls.seq_relationship.weight": torch.randn(2, 64),
        "cls.seq_relationship.bias": torch.randn(2),
        "bert.embeddings.position_ids": torch.arange(LENGTH)[None],
    }
    assert {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} <= tensors.keys()
    config = {**both.folder.config, "architectures": ["BertForPreTraining"]}
    own = {n: t.clone() for n, t in tensors.items()}
    oracle.write_folder(tmp_path / "same", config, own)
    _, params = load(tmp_path / "same")
    jax.tree.map(np.testing.assert_array_equal, params, both.params)
    for copy in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"):
        other = {**own, copy: own[copy] + 1}
        oracle.write_folder(tmp_path / copy, config, other)
        with pytest.raises(ModelError, match=f"{copy}.*tied, but differs"):
            load(tmp_path / copy)


def test_modernbert_may_store_its_tied_decoder(pair, tmp_path):
    both = pair("modernbert")
    tensors = {n: t.clone() for n, t in both.module.state_dict().items()}
    assert "decoder.weight" in tensors
    oracle.write_folder(tmp_path, both.folder.config, tensors)
    _, params = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, both.params)


@pytest.mark.parametrize(
    ("variant", "name"),
    [("mdlm", "backbone.blocks.1.attn_qkv.weight"), ("modernbert", "model.layers.2.mlp.Wi.weight")],
)
def test_a_fused_tensor_of_another_size_is_named(pair, variant, name, tmp_path):
    both = pair(variant)
    tensors = {n: t for f in both.path.glob("*.safetensors") for n, t in load_file(f).items()}
    tensors[name] = tensors[name][:-2]
    torch_tensors = {n: torch.from_numpy(t) for n, t in tensors.items()}
    oracle.write_folder(tmp_path, both.folder.config, torch_tensors)
    with pytest.raises(ModelError, match=r"shape .*expected \[192, 64\], found \[190, 64\]"):
        load(tmp_path)


PUBLISHED = {
    "mdlm": ({"model_type": "mdlm", "cond_dim": 128}, 169_627_218),
    "bd3lm": ({"model_type": "bd3lm", "cond_dim": 128, "block_size": 16}, 169_627_218),
    "sedd_medium": (
        {
            "tokens": 50257,
            "model": {"hidden_size": 1024, "cond_dim": 128, "n_blocks": 24, "n_heads": 16},
            "graph": {"type": "absorb"},
            "noise": {"type": "loglinear"},
        },
        424_477_010,
    ),
    "bert": ({"model_type": "bert"}, 109_514_298),
    "roberta_base": (
        {"model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1},
        124_697_433,
    ),
    "modernbert_base": ({"model_type": "modernbert"}, 149_655_232),
    "modernbert_large": (
        {
            "model_type": "modernbert",
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "intermediate_size": 2624,
        },
        395_881_664,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Parameters of the published models, counted from their configs (class defaults else)."""
    config, expected = PUBLISHED[name]
    family = read_config(config, name)
    model = build_model(family, 0, jnp.dtype("float32"))
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == expected


@pytest.mark.parametrize(
    ("name", "gflop", "saved"), [("mdlm", 0.266, 33.15), ("bert", 0.237, 25.25)]
)
def test_operations_of_a_pass(name, gflop, saved):
    """Per position at length 512, and the share saved by reading 2.65 % of the positions; by the
    formulas 2 D^2 a projection, 2 D F an MLP matrix, 4 D L scores, 2 D V (and D^2) the head."""
    model = build_model(read_config(PUBLISHED[name][0], name), 0, jnp.dtype("float32"))
    whole = model.flops_per_text(512, 512)
    assert whole / 512e9 == pytest.approx(gflop, abs=5e-4)
    part = model.flops_per_text(512, 0.0265 * 512)
    assert 100 * (1 - part / whole) == pytest.approx(saved, abs=0.01)


def _sedd(**changes: Any) -> dict[str, Any]:
    return {**oracle_dit.sedd_config(), **changes}


REFUSED = {
    "graph.type is 'uniform'": _sedd(graph={"type": "uniform"}),
    "noise.type is 'geometric'": _sedd(noise={"type": "geometric"}),
    "noise is None; expected an object": _sedd(noise=None),
    "n_blocks is None": _sedd(model={"hidden_size": 64, "cond_dim": 24, "n_heads": 4}),
    "tokens is '50257'": _sedd(tokens="50257"),
    "n_heads 5 must divide hidden_dim 64": oracle_dit.mdlm_config(n_heads=5),
    "DiffusionGemma puts random tokens": {
        "model_type": "diffusion_gemma",
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "canvas_length": 256,
        "text_config": {"sliding_window": 512, "final_logit_softcapping": 30.0},
    },
    "causal is True": oracle_dit.bd3lm_config(causal=True),
    "time_conditioning is True": oracle_dit.bd3lm_config(time_conditioning=True),
    "block_size is 0": oracle_dit.bd3lm_config(block_size=0),
    "cross_attn is 1": oracle_dit.bd3lm_config(cross_attn=1),
    "time_conditioning is 'no'": oracle_dit.mdlm_config(time_conditioning="no"),
    "architectures is": {"model_type": "bert", "architectures": ["BertModel"]},
    "position_embedding_type is 'relative_key'": {
        "model_type": "bert",
        "position_embedding_type": "relative_key",
    },
    "is_decoder is True": {"model_type": "bert", "is_decoder": True},
    "hidden_act is 'relu'": {"model_type": "bert", "hidden_act": "relu"},
    "pad_token_id is None; expected an integer from 0 to 510": {
        "model_type": "roberta",
        "pad_token_id": None,
    },
    "pad_token_id is 511": {"model_type": "roberta", "pad_token_id": 511},
    "add_cross_attention is True": {"model_type": "roberta", "add_cross_attention": True},
    "norm_bias is True": {"model_type": "modernbert", "norm_bias": True},
    "decoder_bias is False": {"model_type": "modernbert", "decoder_bias": False},
    "num_hidden_layers is 1": {"model_type": "modernbert", "num_hidden_layers": 1},
    "expected 22 of full_attention": {"model_type": "modernbert", "layer_types": ["full"]},
    "rope_type is 'yarn'": {
        "model_type": "modernbert",
        "rope_parameters": {"full_attention": {"rope_type": "yarn"}},
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_supported_is_refused_by_name(message):
    with pytest.raises(ModelError) as error:
        read_config(json.loads(json.dumps(REFUSED[message])), "config.json")
    assert str(error.value).startswith("config.json")
    assert message in str(error.value)


def test_kinds_and_mask_ids():
    read = {name: read_config(config, name) for name, (config, _) in PUBLISHED.items()}
    assert {n: f.kind for n, f in read.items()} == {
        "mdlm": "diffusion",
        "bd3lm": "diffusion",
        "sedd_medium": "diffusion",
        "bert": "masked",
        "roberta_base": "masked",
        "modernbert_base": "masked",
        "modernbert_large": "masked",
    }
    assert {read[name].mask_id for name in ("mdlm", "bd3lm", "sedd_medium")} == {50257}
    timed = read_config(oracle_dit.mdlm_config(time_conditioning=True), "mdlm").arch.timed
    assert (timed, read["mdlm"].arch.timed, read["sedd_medium"].arch.timed) == (True, False, True)
    assert read_config({"model_type": "mdlm", "mask_token_id": 7}, "mdlm").mask_id == 7
    assert read_config({"model_type": "mdlm", "mask_token_id": None}, "mdlm").mask_id == 50257
    assert not any(f.shift for f in read.values())


@pytest.mark.parametrize("name", ["sedd_medium", "bd3lm", "bert", "modernbert_base"])
def test_bfloat16_and_recomputed_blocks_keep_shapes_and_types(name):
    """By tracing alone: the scanned carry keeps its dtype, and `remat` the parameter tree."""
    family = read_config(PUBLISHED[name][0], name)
    model = build_model(family, 0, jnp.dtype("bfloat16"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    again = jax.eval_shape(dataclasses.replace(model, remat=True).init, jax.random.key(0))  # pyright: ignore
    assert jax.tree.map(lambda x: x.shape, again) == jax.tree.map(lambda x: x.shape, params)
    stored = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    out = jax.eval_shape(
        functools.partial(forward, model), stored, TEXTS.tokens, TEXTS.valid, POSITIONS
    )
    assert out.logits.dtype == jnp.bfloat16
    assert out.logits.shape == (*TEXTS.tokens.shape, model.vocab_size)
    assert out.at_positions.shape == (*POSITIONS.shape, model.arch.width)
    assert (out.attention.dtype, out.attention.shape) == (jnp.float32, (4, LENGTH, LENGTH))

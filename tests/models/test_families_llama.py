"""Dream, A2D, iLLaDA, SMDM and causal Qwen and Llama against PyTorch, every parameter random."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_llama
import pytest
import torch
from safetensors import safe_open
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sama_jax.core import losses
from sama_jax.errors import ModelError
from sama_jax.models.registry import read_config
from sama_jax.models.transformer import TransformerModel
from sama_jax.weights import loading, model_folder, saving

LENGTH, ROWS, MASK_ID = 256, 300, 299
# Where each of the three texts lies in its row: full, padded left, padded right.
SPANS = [(0, LENGTH), (57, LENGTH), (0, 171)]

# 3 layers; 4 query heads behind 2 key/value heads; in Qwen3 heads are wider than width / heads.
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# Wavelengths of the 8 frequencies of a head of 16: 6 to 20000. Below 64 they stay, above 256 they
# are divided, one (199) is blended.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
OURS: dict[str, dict[str, Any]] = {
    "dream": {
        **SIZES,
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "mask_token_id": MASK_ID,
    },
    "illada": {
        **SIZES,
        "model_type": "illada",
        "architectures": ["ILLaDAForCausalLM"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
    },
    "smdm": {
        "model_type": "smdm",
        "n_layer": 3,
        "n_head": 4,
        "n_query_groups": 4,
        "n_embd": 64,
        "intermediate_size": 96,
        "vocab_size": MASK_ID,
        "norm_eps": 1e-5,
    },
}
OURS["smdm_gqa"] = {**OURS["smdm"], "n_query_groups": 2}
LLAMA = (LlamaConfig, LlamaForCausalLM)
QWEN2 = (Qwen2Config, Qwen2ForCausalLM)
QWEN3 = (Qwen3Config, Qwen3ForCausalLM)
THEIRS: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
    "llama": (LLAMA, {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "qwen2": (QWEN2, {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3": (QWEN3, {"head_dim": 32, "attention_bias": True}),
    "a2d-llama": (LLAMA, {"rope_parameters": LLAMA3, "num_key_value_heads": None}),
    "a2d-qwen2": (QWEN2, {}),
    "a2d-qwen3": (QWEN3, {"head_dim": 32, "tie_word_embeddings": True}),
}
CAUSAL = ("llama", "qwen2", "qwen3")
FAMILIES = [*OURS, *THEIRS]
LABELS = {
    **{"dream": "Dream", "illada": "iLLaDA", "smdm": "SMDM", "smdm_gqa": "SMDM"},
    **{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"},
    **{"a2d-llama": "A2D Llama", "a2d-qwen2": "A2D Qwen2", "a2d-qwen3": "A2D Qwen3"},
}


class Pair(NamedTuple):
    """The same weights in both networks."""

    name: str
    module: Any
    folder: model_folder.ModelFolder
    params: Any


class Texts(NamedTuple):
    tokens: np.ndarray
    """What diffusion models read: a third of the valid positions holds the mask id."""
    answers: np.ndarray
    """The ids before masking; what causal models read."""
    valid: np.ndarray


def make_texts() -> Texts:
    rng = np.random.default_rng(0)
    answers = rng.integers(0, MASK_ID, (len(SPANS), LENGTH)).astype(np.int32)
    index = np.arange(LENGTH)
    valid = np.stack([(start <= index) & (index < end) for start, end in SPANS])
    masked = valid & (rng.random(valid.shape) < 1 / 3)
    return Texts(np.where(masked, MASK_ID, answers).astype(np.int32), answers, valid)


TEXTS = make_texts()


def write_ours(path: Path, name: str, dtype: torch.dtype) -> torch.nn.Module:
    config = OURS[name]
    module = (oracle_llama.Smdm if "smdm" in name else oracle_llama.Decoder)(config)
    oracle_llama.randomise(module, config.get("tie_word_embeddings", False), FAMILIES.index(name))
    module = module.to(dtype)
    oracle.write_folder(path, config, dict(module.state_dict()), shards=3)
    return module


def write_theirs(path: Path, name: str) -> torch.nn.Module:
    """Saved by transformers itself; an A2D folder differs from its origin in two fields."""
    (config_class, model_class), changes = THEIRS[name]
    config = config_class(**{**SIZES, **changes}, attn_implementation="eager")
    module = model_class(config)
    oracle_llama.randomise(module, config.tie_word_embeddings, FAMILIES.index(name))
    module.save_pretrained(path, max_shard_size="150KB")
    if name.startswith("a2d"):
        written = json.loads((path / "config.json").read_text())
        kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[written["model_type"]]
        written |= {"model_type": name, "architectures": [f"A2D{kind}LMHeadModel"]}
        (path / "config.json").write_text(json.dumps(written))
    return module


def name_mask(path: Path, **tokenizer_config: Any) -> None:
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def open_pair(path: Path, name: str, dtype: str = "float32") -> Pair:
    if name in OURS:
        module = write_ours(path, name, getattr(torch, dtype))
    else:
        module = write_theirs(path, name)
    if "illada" in name or "a2d" in name:  # their configs hold no mask id
        name_mask(path, added_tokens_decoder={str(MASK_ID): {"content": "<|mask|>"}})
    assert len(list(path.glob("*.safetensors"))) > 1
    folder = model_folder.open_folder(path, dtype=dtype)
    params = loading.load(folder, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    return Pair(name, module, folder, params)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair(name, dtype)`, each written and loaded once."""
    return functools.cache(
        lambda name, dtype="float32": open_pair(tmp_path_factory.mktemp(name), name, dtype)
    )


def inputs(name: str) -> np.ndarray:
    return TEXTS.answers if name in CAUSAL else TEXTS.tokens


@torch.no_grad()
def theirs(pair: Pair) -> np.ndarray:
    """Float32 logits of PyTorch."""
    tokens, valid = torch.from_numpy(inputs(pair.name)).long(), torch.from_numpy(TEXTS.valid)
    if pair.name in OURS:
        return pair.module(tokens, valid).float().numpy()
    if pair.name in CAUSAL:
        return pair.module(tokens, attention_mask=valid.long()).logits.numpy()
    # A2D's own code: 0 where the key is valid, the lowest number elsewhere, for every query.
    mask = torch.zeros(len(SPANS), 1, LENGTH, LENGTH)
    mask = mask.masked_fill(~valid[:, None, None, :], torch.finfo(torch.float32).min)
    return pair.module(tokens, attention_mask=mask).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def forward(model: TransformerModel, params, tokens, answers, valid, positions):
    """Logits everywhere, and losses as scoring computes them: from the last block there alone."""
    stream = model.trunk(params, tokens, valid)
    nll = losses.scored_nll(model, params, answers, valid, stream, positions)
    raw = replace(model, shift=False)  # what PyTorch's logits are
    return model.logits(params, raw.hidden(params, tokens, valid)), nll


def ours(pair: Pair, tokens: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    everywhere = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), TEXTS.valid.shape)
    model = pair.folder.model
    assert isinstance(model, TransformerModel)
    logits, nll = forward(model, pair.params, tokens, answers, TEXTS.valid, everywhere)
    return np.asarray(logits.astype(jnp.float32)), np.asarray(nll)


def expected_nll(logits: np.ndarray, shifted: bool) -> np.ndarray:
    """Losses of the answers from logits, in float64; shifted: from the position before."""
    wide = torch.from_numpy(logits).double().log_softmax(dim=-1).numpy()
    if shifted:
        wide = np.concatenate([wide[:, :1], wide[:, :-1]], axis=1)
    return -np.take_along_axis(wide, TEXTS.answers[..., None], -1)[..., 0]


SHIFTED = ("dream", *CAUSAL)
# A shifted loss at the first position of the text on the right would come from padding.
SCORED = TEXTS.valid.copy()
SCORED[1, SPANS[1][0]] = False


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_losses_equal_pytorch(pair, name, record_parity):
    """Tolerances as in test_parity.py, for the same reason: float32 sums in another order."""
    both = pair(name)
    assert both.folder.model.mask_id == (0 if name in CAUSAL else MASK_ID)
    assert both.folder.model.kind == ("autoregressive" if name in CAUSAL else "diffusion")
    expected = theirs(both)
    logits, nll = ours(both, inputs(name), TEXTS.answers)
    assert logits.shape == expected.shape
    assert expected.std() > 0.5, "logits too flat to tell anything"
    difference = np.abs(logits - expected)[TEXTS.valid].max()
    loss_difference = np.abs(nll - expected_nll(expected, name in SHIFTED))[SCORED].max()
    record_parity(LABELS[name], difference, loss_difference)
    assert difference < 1e-4
    assert loss_difference < 1e-5


def tensors(path: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as handle:
            found |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return found


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


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_losses_do_not_depend_on_later_tokens(pair, name):
    _, before = ours(pair(name), TEXTS.answers, TEXTS.answers)
    changed = TEXTS.answers.copy()
    changed[:, 100:] = (changed[:, 100:] + 1) % MASK_ID
    _, after = ours(pair(name), changed, TEXTS.answers)
    # The token at 100 is predicted from the output at 99.
    early = SCORED & (np.arange(LENGTH) <= 100)
    np.testing.assert_array_equal(after[early], before[early])
    assert (after != before)[SCORED & ~early].all()


@pytest.mark.parametrize("name", ["llama", "dream"])
def test_last_block_at_scored_positions_equals_hidden_there(pair, name):
    model, params = pair(name).folder.model, pair(name).params
    rng = np.random.default_rng(1)
    # Unordered and with repeats: each output belongs to its own slot.
    choice = [rng.choice(np.flatnonzero(v), 40) for v in TEXTS.valid]
    positions = np.stack(choice).astype(np.int32)

    @jax.jit
    def both(tokens, valid, positions):
        stream = model.trunk(params, tokens, valid)
        scored = model.last_hidden(params, stream, valid, positions)
        return scored, model.hidden(params, tokens, valid)

    scored, full = both(inputs(name), TEXTS.valid, positions)
    expected = np.take_along_axis(np.asarray(full), positions[:, :, None], axis=1)
    np.testing.assert_allclose(scored, expected, rtol=0, atol=1e-5)


def test_attention_of_a_causal_model_equals_pytorch(pair):
    both = pair("qwen3")
    tokens, valid = torch.from_numpy(TEXTS.answers).long(), torch.from_numpy(TEXTS.valid)
    with torch.no_grad():
        out = both.module(tokens, attention_mask=valid.long(), output_attentions=True)
    expected = torch.stack(out.attentions).mean(dim=(0, 2)).numpy()
    attention = jax.jit(both.folder.model.attention)
    actual = np.asarray(attention(both.params, TEXTS.answers, TEXTS.valid))
    np.testing.assert_allclose(actual[TEXTS.valid], expected[TEXTS.valid], rtol=0, atol=1e-6)


def test_bfloat16_losses_of_dream_differ_by_no_more_than_its_rounding(pair):
    """As in test_parity.py: n roundings of 2^-8 in a row move a loss by at most
    2 * 2^-8 * sqrt(n / 3) times the spread of logits in standard deviation; n is 15 a block and 3
    at the end, here 3 more a block for the biases of Q, K and V, and 2 for a rotation whose
    products round apart."""
    both = pair("dream", "bfloat16")
    expected = theirs(both)
    _, nll = ours(both, inputs("dream"), TEXTS.answers)
    deviation = 2 * 2.0**-8 * np.sqrt((20 * 3 + 3) / 3) * expected[TEXTS.valid].std()
    difference = (nll - expected_nll(expected, True))[SCORED]
    assert np.sqrt(np.mean(difference**2)) < deviation
    assert np.abs(difference).max() < 5 * deviation
    assert abs(difference.mean()) < 5 * deviation / np.sqrt(difference.size)


# Configs


@pytest.mark.parametrize("classes", [QWEN2, QWEN3, LLAMA], ids=lambda c: c[0].model_type)
@pytest.mark.parametrize("prefix", ["", "a2d-"])
def test_absent_fields_take_the_defaults_of_the_config_class(classes, prefix):
    config = classes[0]()
    kind = prefix + config.model_type
    full = {**config.to_dict(), "model_type": kind, "architectures": None}
    assert read_config({"model_type": kind}, "here").arch == read_config(full, "here").arch


def test_rotary_parameters_of_transformers_4_and_5_are_read_alike():
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    old = {"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": scaling}
    new = {"model_type": "llama", "rope_parameters": LLAMA3}
    plain = read_config({"model_type": "llama"}, "here").arch
    assert read_config(old, "here").arch == read_config(new, "here").arch != plain


def test_illada_is_known_by_its_class_and_has_no_default_sizes():
    config = {**OURS["illada"], "model_type": "llada"}
    assert read_config(config, "here").arch == read_config(OURS["illada"], "here").arch
    for field in ("rope_theta", "rms_norm_eps", "hidden_size"):
        with pytest.raises(ModelError, match=f"here: .*{field}"):
            read_config({k: v for k, v in config.items() if k != field}, "here")


REFUSED = {
    "window": ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
    "layers": ("a2d-qwen3", {"layer_types": ["sliding_attention"]}, "sliding_attention"),
    "gelu": ("dream", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "mrope": ("dream", {"use_mrope": True}, "use_mrope is True"),
    "longrope": ("llama", {"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope'"),
    "llama3": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3"}},
        "factor is None; expected a pos",
    ),
    "theta": ("llama", {"rope_theta": -1}, "rope_theta is -1"),
    "nested": ("qwen3", {"rope_parameters": {"full_attention": {}}}, "not one set"),
    "partial": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "heads": ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
    "size": ("qwen2", {"hidden_size": 0}, "hidden_size is 0"),
    "class": ("llama", {"architectures": ["LlamaForTokenClassification"]}, "LlamaForCausalLM"),
    "smdm norm": ("smdm", {"_norm_class": "LayerNorm"}, "_norm_class is 'LayerNorm'"),
    "smdm size": ("smdm", {"n_head": 5}, "n_head 5"),
    "smdm absent": ("smdm", {"n_layer": None}, "n_layer is None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    name, changes, message = REFUSED[case]
    config = {**OURS[name]} if name in OURS else {**SIZES, "model_type": name}
    read_config(config, "here")
    with pytest.raises(ModelError, match=message) as refused:
        read_config({**config, **changes}, "here")
    assert str(refused.value).startswith("here: ")


# Mask ids


def test_mask_id_comes_from_the_config_or_the_tokenizer(pair, tmp_path):
    path = pair("a2d-qwen2").folder.path
    ids = {"<|mask|>": 7, "<[MASK]>": 9, "<|other|>": 8}
    decoder = {str(i): {"content": name} for name, i in ids.items()}

    def opened(**tokenizer_config) -> int:
        name_mask(path, **tokenizer_config)
        return model_folder.open_folder(path).model.mask_id

    assert opened(added_tokens_decoder=decoder, mask_token="<|other|>") == 8
    assert opened(added_tokens_decoder=decoder, mask_token={"content": "<[MASK]>"}) == 9
    assert opened(added_tokens_decoder={"7": decoder["7"], "8": decoder["8"]}) == 7
    with pytest.raises(ModelError, match=r"several mask tokens.*--mask-id"):
        opened(added_tokens_decoder=decoder)
    with pytest.raises(ModelError, match=r"mask token id is None.*--mask-id"):
        opened()
    assert model_folder.open_folder(path, mask_id=5).model.mask_id == 5


def test_config_and_tokenizer_must_agree_on_the_mask(pair):
    path = pair("dream").folder.path
    (path / "added_tokens.json").write_text(json.dumps({"<|mask|>": 7}))
    with pytest.raises(ModelError, match=f"{MASK_ID} by config.json.*7 by the tokenizer"):
        model_folder.open_folder(path)
    (path / "added_tokens.json").write_text(json.dumps({"<|mask|>": MASK_ID}))
    assert model_folder.open_folder(path).model.mask_id == MASK_ID

"""What PEFT can do to a model besides plain LoRA: the same logits as PEFT's own, and the gates."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle_llama
import oracle_moe
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from checkpoints_convert import convert
from sama_jax.errors import ModelError
from sama_jax.weights import loading, model_folder

ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROWS, RESIZED, LENGTH = 300, 320, 12
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = np.random.default_rng(0).integers(0, ROWS, (2, LENGTH)).astype(np.int32)

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft",
    "ignore:.*is_gradient_checkpointing:FutureWarning",
)


def base_model(path: Path, tied: bool) -> Qwen2ForCausalLM:
    module = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    oracle_llama.randomise(module, tied, seed=1)
    module.save_pretrained(path)
    return module.eval()


def lora(**changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], **changes})


def train(wrapped: torch.nn.Module, seed: int = 0) -> None:
    """Gives whatever would be trained other values, as large as the weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_" in name:
                parameter.copy_((0.1 if "B" in name else 1) / parameter.shape[-1] ** 0.5 * noise)
            else:
                parameter.add_(0.1 * noise)


def adapt(
    base: Path, path: Path, config: peft.LoraConfig, *, resize: int = 0, seed: int = 0
) -> torch.nn.Module:
    module = Qwen2ForCausalLM.from_pretrained(base)
    if resize:
        module.resize_token_embeddings(resize)
        with torch.no_grad():
            module.get_input_embeddings().weight[ROWS:] += 0.1
    wrapped = peft.get_peft_model(module, config).eval()
    train(wrapped, seed)
    wrapped.save_pretrained(path)
    return wrapped


@torch.no_grad()
def theirs(wrapped: torch.nn.Module) -> np.ndarray:
    return wrapped(torch.from_numpy(TOKENS).long()).logits.numpy()


def ours(base: Path, *adapters: Path, merge: bool = False) -> np.ndarray:
    folder = model_folder.open_folder(base, adapter=list(adapters), merge=merge)
    params = loading.load(folder, ONE_DEVICE)
    model = replace(folder.model, shift=False)  # pyright: ignore  what PyTorch's logits are

    @jax.jit
    def forward(params: Any, tokens: Any, valid: Any) -> Any:
        return model.logits(params, model.hidden(params, tokens, valid))

    return np.asarray(forward(params, jnp.asarray(TOKENS), jnp.ones(TOKENS.shape, bool)))


TOKEN_IDS = [int(TOKENS[0, 2]), int(TOKENS[1, 5]), 299]
OPTIONS: dict[str, tuple[bool, dict[str, Any], int]] = {
    "DoRA of linear layers, the head and the embedding": (
        False,
        {"use_dora": True, "target_modules": ["q_proj", "up_proj", "embed_tokens", "lm_head"]},
        0,
    ),
    "rank-stabilised DoRA": (False, {"use_dora": True, "use_rslora": True}, 0),
    "EVA": (False, {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()}, 0),
    "modules saved whole": (
        False,
        {"modules_to_save": ["lm_head", "embed_tokens", "model.norm", "k_proj"]},
        0,
    ),
    "an embedding saved whole under a tied head": (True, {"modules_to_save": ["embed_tokens"]}, 0),
    "a tied head saved whole": (True, {"modules_to_save": ["lm_head"]}, 0),
    "an embedding saved whole and its head tied": (
        True,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        0,
    ),
    "LoRA of an embedding and its head tied": (
        True,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        0,
    ),
    "LoRA of an embedding and of its tied head": (
        True,
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        0,
    ),
    "trained tokens": (False, {"trainable_token_indices": TOKEN_IDS}, 0),
    "trained tokens of embedding and head": (
        False,
        {"trainable_token_indices": {"embed_tokens": TOKEN_IDS, "lm_head": [7, 3]}},
        0,
    ),
    "trained tokens of tied tables": (True, {"trainable_token_indices": TOKEN_IDS}, 0),
    "trained tokens that untie": (
        True,
        {"trainable_token_indices": {"embed_tokens": TOKEN_IDS, "lm_head": [7, 3]}},
        0,
    ),
    "a larger vocabulary": (False, {}, RESIZED),
    "a larger vocabulary, tied": (True, {}, RESIZED),
    "a smaller vocabulary, saved whole": (
        False,
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        299,
    ),
    "a parameter of a linear layer": (False, {"target_parameters": ["up_proj.weight"]}, 0),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_adapter_with_options_gives_the_logits_of_peft(tmp_path, name):
    tied, options, resize = OPTIONS[name]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    plain = theirs(base_model(base, tied))
    expected = theirs(adapt(base, adapter, lora(**options), resize=resize))
    found = ours(base, adapter)
    assert np.abs(found[..., :299] - plain[..., :299]).max() > 0.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    if not resize:
        np.testing.assert_allclose(ours(base, adapter, merge=True), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changed_its_base_is_read_where_peft_saved_what_makes_it_whole(
    tmp_path, start
):
    base, whole, part, first = (tmp_path / n for n in ("base", "whole", "part", "first"))
    base_model(base, tied=False)
    wrapped = peft.get_peft_model(
        Qwen2ForCausalLM.from_pretrained(base), lora(init_lora_weights=start)
    )
    config = wrapped.peft_config["default"]
    config.init_lora_weights = True
    wrapped.save_pretrained(first)
    config.init_lora_weights = start
    train(wrapped.eval())
    expected = theirs(wrapped)
    wrapped.save_pretrained(part)
    wrapped.save_pretrained(whole, path_initial_model_for_weight_conversion=str(first))
    np.testing.assert_allclose(ours(base, whole), expected, rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="path_initial_model_for_weight_conversion"):
        model_folder.open_folder(base, adapter=part)


def test_several_adapters_are_stacked_in_their_order(tmp_path):
    base, first, second, dora = (tmp_path / n for n in ("base", "first", "second", "dora"))
    base_model(base, tied=False)
    adapt(base, first, lora(target_modules=["q_proj", "up_proj"]), seed=1)
    adapt(base, second, lora(r=5, target_modules=["q_proj", "lm_head"]), seed=2)
    adapt(base, dora, lora(use_dora=True), seed=3)
    both = peft.PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base), first)
    both.load_adapter(str(second), "second")
    both.base_model.set_adapter(["default", "second"])
    kept = model_folder.open_folder(base, adapter=[first, second])
    assert dict(kept.model.lora)["blocks/attn/q_proj/kernel"] == 3 + 5  # pyright: ignore
    np.testing.assert_allclose(ours(base, first, second), theirs(both), rtol=0, atol=1e-5)
    found = {}
    for order in ((first, dora), (dora, first)):
        model = Qwen2ForCausalLM.from_pretrained(base)
        for path in order:
            model = peft.PeftModel.from_pretrained(model, path).merge_and_unload()
        found[order] = ours(base, *order)
        np.testing.assert_allclose(found[order], theirs(model), rtol=0, atol=1e-5)
    assert np.abs(found[first, dora] - found[dora, first]).max() > 0.01
    names = {model_folder.open_folder(base, adapter=list(order)).identity for order in found}
    assert len(names | {kept.identity, model_folder.open_folder(base).identity}) == 4


@pytest.mark.parametrize("name", ["a larger vocabulary, tied", "a tied head saved whole"])
def test_a_merged_folder_says_what_the_adapter_changed_in_its_config(tmp_path, name):
    tied, options, resize = OPTIONS[name]
    base, adapter, out = (tmp_path / n for n in ("base", "adapter", "out"))
    base_model(base, tied)
    expected = theirs(adapt(base, adapter, lora(**options), resize=resize))
    convert.to_hf(base, out, adapter=adapter, quiet=True)
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == (resize or ROWS)
    assert config["tie_word_embeddings"] == bool(resize)
    np.testing.assert_allclose(ours(out), expected, rtol=0, atol=1e-5)


# Stacked experts


class Stacked(torch.nn.Module):
    """All experts of a layer, their parameters in the order of dFactory's class."""

    def __init__(self, experts: torch.nn.ModuleList):
        super().__init__()
        for part in ("gate_proj", "up_proj", "down_proj"):
            weights = torch.stack([getattr(one, part).weight for one in experts])
            setattr(self, part, torch.nn.Parameter(weights.detach().clone()))

    def forward(self, h: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found = 0
        for e, (gate, up, down) in enumerate(zip(self.gate_proj, self.up_proj, self.down_proj)):
            inner = torch.nn.functional.silu(h @ gate.T) * (h @ up.T)
            found = found + (inner @ down.T).float() * weights[..., e, None]
        return found


class StackedLayer(torch.nn.Module):
    """What `oracle_moe.Llada2Experts` computes, from stacked experts."""

    def __init__(self, of: oracle_moe.Llada2Experts):
        super().__init__()
        self.gate, self.experts = of.gate, Stacked(of.experts)
        self.shared_experts = of.shared_experts

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        out = self.experts(h, self.gate(h)).to(h.dtype)
        return out + self.shared_experts(h)


@pytest.mark.parametrize("parts", [["gate_proj", "up_proj", "down_proj"], ["up_proj"]])
def test_parameters_of_stacked_experts(tmp_path, parts):
    config = oracle_moe.llada2_config(model_type="llada2_moe_veomni", num_hidden_layers=2)
    module = oracle_moe.random_folder(tmp_path / "base", config, seed=0)
    for layer in module.model["layers"]:
        if isinstance(layer.mlp, oracle_moe.Llada2Experts):
            layer.mlp = StackedLayer(layer.mlp)
    wanted = [f"mlp.experts.{part}" for part in parts]
    wrapped = peft.get_peft_model(
        module, lora(target_modules=["dense"], target_parameters=wanted)
    ).eval()
    train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    tokens = torch.from_numpy(TOKENS).long()
    with torch.no_grad():
        expected = wrapped(tokens)[0].numpy()
    found, plain = ours(tmp_path / "base", tmp_path / "adapter"), ours(tmp_path / "base")
    assert np.abs(plain - expected).max() > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# Gates


def spoil(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    found = load_file(path / WEIGHTS)
    save_file({n: change(n, t) for n, t in found.items()}, path / WEIGHTS, {"format": "pt"})


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "magnitudes": ({"use_dora": True}, "lora_magnitude_vector"),
    "whole tensors": ({"modules_to_save": ["model.norm"]}, "model.norm.weight"),
    "trained tokens": ({"trainable_token_indices": TOKEN_IDS}, "trainable_tokens_delta"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(tmp_path, kind, value):
    options, name = KINDS[kind]
    base_model(tmp_path / "base", tied=False)
    adapt(tmp_path / "base", tmp_path / "adapter", lora(**options))
    spoil(tmp_path / "adapter", lambda n, t: t.fill_(value) if name in n else t)
    with pytest.raises(ModelError, match=rf"values .*{name}: it is not finite"):
        model_folder.open_folder(tmp_path / "base", adapter=tmp_path / "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_changes_nothing_is_known_as_that(tmp_path, kind):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base_model(base, tied=False)
    module = Qwen2ForCausalLM.from_pretrained(base)
    peft.get_peft_model(module, lora(**KINDS[kind][0])).save_pretrained(adapter)
    assert model_folder.open_folder(base, adapter=adapter).adapter_is_nothing
    spoil(adapter, lambda n, t: t * 1.01 if KINDS[kind][1] in n else t)
    found = model_folder.open_folder(base, adapter=adapter)
    assert not found.adapter_is_nothing
    assert found.adapter_identity != model_folder.open_folder(base).adapter_identity


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a token behind the table": (
        {"trainable_token_indices": [5, ROWS]},
        "token 300 of 300 rows",
    ),
    "a token that stands twice": (
        {"trainable_token_indices": [5, 5]},
        "expected distinct token ids",
    ),
    "rows of another number of tokens": (
        {"trainable_token_indices": [5]},
        r"trainable_tokens_delta: expected \[1, 32\], found \[2, 32\]",
    ),
    "a module that was to be saved": (
        {"modules_to_save": ["model.norm"]},
        "missing    the tensors of model.norm",
    ),
    "no magnitudes": ({"use_dora": True}, "missing    lora_magnitude"),
    "a switch that is none": ({"use_dora": "no"}, "use_dora is 'no'"),
    "names that are none": ({"modules_to_save": 5}, "modules_to_save is 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_together_is_refused_by_name(tmp_path, name):
    fields, told = REFUSED[name]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base_model(base, tied=False)
    adapt(base, adapter, lora(trainable_token_indices=[5, 6]) if "token" in name else lora())
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | fields))
    with pytest.raises(ModelError, match=told):
        model_folder.open_folder(base, adapter=adapter)


def test_a_resized_embedding_whose_head_was_not_saved_is_refused(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base_model(base, tied=False)
    adapt(base, adapter, lora(target_modules=["q_proj", "embed_tokens"]), resize=RESIZED)
    with pytest.raises(ModelError, match=r"lm_head.weight has 300 rows: all of them must be saved"):
        model_folder.open_folder(base, adapter=adapter)

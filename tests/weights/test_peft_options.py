"""What PEFT can do to a model besides plain LoRA: the same logits as PEFT's own, and the gates."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle_llama
import peft
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

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

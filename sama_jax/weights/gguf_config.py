"""Makes the fields of a `config.json` from the metadata of a GGUF file.

Sources: the converters of llama.cpp (`conversion/{base,llama,qwen,dream,llada}.py` of
`ggml-org/llama.cpp`), and the constants of its package `gguf`.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from sama_jax.errors import ModelError
from sama_jax.gguf_header import Header
from sama_jax.models.families.family import UNLIMITED
from sama_jax.models.families.fields import Fields
from sama_jax.models.registry import read_config
from sama_jax.untrusted import open_file, shown

EMBEDDING = "token_embd.weight"
ROPE_FREQS = "rope_freqs.weight"
"""By what each rotary frequency is divided. So the converters write `rope_type` llama3."""
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all published Llama 3 models have, whose factors differ."""
_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "dream": ("Dream", "DreamModel"),
    "llada": ("llada", "LLaDAModelLM"),
}
"""Architecture by the metadata -> `model_type` and class by a `config.json`."""
_LLADA_FIXED = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "include_bias": False,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
}
"""What llama.cpp computes for the architecture llada, whose metadata has no field for it."""
_TOKENS = {
    "mask_token_id": "mask",
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "pad_token_id": "padding",
}


def model_config(header: Header, told: dict[str, Any] | None, where: str) -> dict[str, Any]:
    """Returns the `config.json` of a GGUF file.

    Args:
      header: of the file.
      told: the `config.json` beside it. It may say that the network is used in another way (as
        `a2d-llama`, say), not that it is another network.
      where: names `told` in messages.

    Raises `ModelError` for metadata that is not understood, or that `told` contradicts.
    """
    made = _from_metadata(header)
    if told is None:
        return made
    ours, theirs = read_config(made, str(header.path)), read_config(told, where)
    own: Any = ours.arch
    if ours.weights is not theirs.weights:
        header.refuse(f"is a {ours.family}, but {where} tells of a {theirs.family}")
    # What a position may see is the one thing that the metadata does not decide.
    seen = {"block_length", "clean_context"}
    wanted = dataclasses.replace(own, **{name: getattr(theirs.arch, name) for name in seen})
    names = [field.name for field in dataclasses.fields(wanted)]
    pairs = [(name, getattr(theirs.arch, name), getattr(wanted, name)) for name in names]
    if ours.max_length != UNLIMITED:
        pairs.append(("the longest text", theirs.max_length, ours.max_length))
    wrong = [f"{name} is {a}, but {b} there" for name, a, b in pairs if not _same(a, b)]
    if wrong:
        raise ModelError(
            f"{where}: does not fit {header.path.name}: {'; '.join(wrong)}; correct it, or remove "
            "it: then what the file says of itself counts"
        )
    return told


def _same(a: Any, b: Any) -> bool:
    """Compares fields; numbers as float32, as the file holds them."""
    if isinstance(a, float) and isinstance(b, float):
        return bool(np.float32(a) == np.float32(b))
    return a == b


def _from_metadata(header: Header) -> dict[str, Any]:
    name = header.get("general.architecture", str) or ""
    if name not in _CLASSES:
        header.refuse(
            f"its architecture is {shown(name)}; of GGUF files {', '.join(_CLASSES)} are read"
        )
    fields, diffusion = _fields(header, f"{name}."), name in ("dream", "llada")
    width, layers, heads, inner, kv_heads, size = fields.sizes(
        *("embedding_length", "block_count", "attention.head_count", "feed_forward_length"),
        *("attention.head_count_kv", "attention.key_length"),
        null=("attention.head_count_kv", "attention.key_length"),
    )
    rows, size = _rows(header), size or width // heads
    sizes = (width, layers, heads, kv_heads or heads, size, inner)
    fields.only(
        {
            "vocab_size": rows,
            "attention.value_length": size,
            "rope.dimension_count": size,
            # Left out, dream and llada see both sides, the others one.
            "attention.causal": not diffusion,
            "rope.scaling.type": "none",
            "expert_count": 0,
        }
    )
    for field in ("finetuned", "original_context_length"):  # of no effect without scaling
        fields.get(f"rope.scaling.{field}")
    # Their default in llama.cpp is that of Dream, whose outputs are for the next position.
    _fields(header, "diffusion.").only({"shift_logits": name == "dream"})
    theta = fields.positive("rope.freq_base", 10000.0)
    config = {
        "model_type": _CLASSES[name][0],
        "architectures": [_CLASSES[name][1]],
        "vocab_size": rows,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(header, theta, size),
        "rms_norm_eps": fields.positive("attention.layer_norm_rms_epsilon"),
        **(_llada if name == "llada" else _decoder)(header, sizes, fields.get("context_length")),
    }
    fields.refuse_rest()
    for field, token in _TOKENS.items():
        value = header.get(f"tokenizer.ggml.{token}_token_id", int)
        if value is not None or (diffusion and token == "mask"):  # null is not the class default
            config[field] = value
    return config


def _fields(header: Header, prefix: str) -> Fields:
    """Returns the metadata below a prefix; of a list of numbers its beginning, for messages."""
    found = {k[len(prefix) :]: v for k, v in header.metadata.items() if k.startswith(prefix)}
    plain = {k: v[:8].tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()}
    return Fields(plain, str(header.path))


def _rows(header: Header) -> int:
    """Returns how many tokens the embedding has."""
    tensor = header.tensors.get(EMBEDDING)
    if tensor is None or len(tensor.shape) != 2:
        header.refuse(f"has no {EMBEDDING} of two axes; is it a part of a model?")
    return tensor.shape[0]


def _decoder(header: Header, sizes: tuple[int, ...], length: Any) -> dict[str, Any]:
    """Returns the fields of transformers' decoders."""
    width, layers, heads, kv_heads, size, inner = sizes
    biases = {"attention_bias": "attn_q", "mlp_bias": "ffn_gate"}
    if header.metadata["general.architecture"] in ("qwen2", "dream"):  # always there
        biases = {}
    return {
        **{field: f"blk.0.{name}.bias" in header.tensors for field, name in biases.items()},
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "max_position_embeddings": length,
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }


def _llada(header: Header, sizes: tuple[int, ...], length: Any) -> dict[str, Any]:
    """Returns the fields of LLaDA's own class; what its converter knows of no tensor is off."""
    width, layers, heads, kv_heads, size, inner = sizes
    if size * heads != width:
        header.refuse(f"its heads of {size} do not make its width of {width}, as LLaDA's do")
    return {
        "d_model": width,
        "mlp_hidden_size": inner,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "embedding_size": _rows(header),
        "max_sequence_length": length,
        "include_qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "weight_tying": "output.weight" not in header.tensors,
        **_LLADA_FIXED,
    }


def _rope_scaling(header: Header, theta: float, size: int) -> dict[str, Any] | None:
    """Returns the `rope_scaling` that a tensor of factors stands for; None if there is no tensor.

    Raises `ModelError` for other factors than those of Llama 3.
    """
    if (tensor := header.tensors.get(ROPE_FREQS)) is None:
        return None
    if tensor.kind != 0 or tensor.shape != (size // 2,):
        header.refuse(f"{ROPE_FREQS} is {list(tensor.shape)}; expected float32 [{size // 2}]")
    with open_file(header.path) as file:
        file.seek(tensor.start)
        content = file.read(2 * size)
    if len(content) < 2 * size:
        header.refuse(f"{ROPE_FREQS} reaches behind its end; download it again")
    found = np.frombuffer(content, "<f4").astype(float)
    factor = float(str(found.max().astype(np.float32)))
    low, high, length = LLAMA3.values()
    turns = length * theta ** (-np.arange(len(found)) * 2.0 / size) / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    # The converter computes in float32, whose rounding moves a factor by up to some 1e-6 of it.
    if not (factor > 0 and np.allclose(found, 1 / (keep + (1 - keep) / factor), rtol=1e-5, atol=0)):
        header.refuse(
            f"{ROPE_FREQS} holds factors of rotary frequencies that are not Llama 3's ({LLAMA3}); "
            "others are not supported"
        )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}

"""Writes small GGUF files with llama.cpp's own package, as its converters do. Not a test."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from fuzz import seeds
from safetensors.numpy import load_file

NAMES = {
    "embed_tokens": "token_embd",
    "wte": "token_embd",
    "norm": "output_norm",
    "ln_f": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "ff_norm": "ffn_norm",
    **{f"{p}_proj": f"attn_{p}" for p in "qkv"},
    **{f"{p}_norm": f"attn_{p}_norm" for p in "qk"},
    "o_proj": "attn_output",
    "attn_out": "attn_output",
    "gate_proj": "ffn_gate",
    "ff_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "ff_out": "ffn_down",
}
"""Module by the published names -> llama.cpp's."""
PAIRED = ("llama", "llada")


def name_of(published: str) -> str:
    """llama.cpp's name of a published tensor."""
    parts = published.split(".")
    layers = [part for part in parts if part.isdigit()]
    if not layers and parts[-2] == "ff_out":
        return "output.weight"
    block = f"blk.{layers[0]}." if layers else ""
    return f"{block}{NAMES.get(parts[-2], parts[-2])}.{parts[-1]}"


def paired(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads as the converters write them: first and second half in turns."""
    size = len(values) // heads
    rows = [
        h * size + j + s * size // 2 for h in range(heads) for j in range(size // 2) for s in (0, 1)
    ]
    return values[rows]


def write(
    path: Path,
    folder: Path,
    architecture: str,
    *,
    fields: dict[str, Any] | None = None,
    kinds: dict[str, str] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> Path:
    """Writes a model folder of a decoder or LLaDA, in float32, as a GGUF file.

    `fields` replace those of the metadata (None: leave out); `kinds` quantise tensors, by
    llama.cpp's names; `tensors` are added; `tokenizer` replaces fields of tiny's tokenizer.
    """
    config = json.loads((folder / "config.json").read_text())
    heads = config.get("num_attention_heads") or config["n_heads"]
    kv_heads = config.get("num_key_value_heads") or config["n_kv_heads"]
    writer = gguf.GGUFWriter(path, architecture)
    known = {
        "block_count": config.get("num_hidden_layers") or config["n_layers"],
        "embedding_length": config.get("hidden_size") or config["d_model"],
        "feed_forward_length": config.get("intermediate_size") or config["mlp_hidden_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "context_length": config.get("max_position_embeddings", 64),
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-5)),
        "rope.freq_base": float(config.get("rope_theta", 10000.0)),
    }
    if "head_dim" in config:
        known |= {"attention.key_length": config["head_dim"]}
        known |= {"attention.value_length": config["head_dim"]}
    below = {f"{architecture}.{name}": value for name, value in known.items()}
    _write_fields(writer, below | vocabulary(**(tokenizer or {})) | (fields or {}))
    for published, values in load_file(folder / "model.safetensors").items():
        name = name_of(published)
        if architecture in PAIRED and ".attn_q." in name:
            values = paired(values, heads)
        if architecture in PAIRED and ".attn_k." in name:
            values = paired(values, kv_heads)
        _add(writer, name, values, (kinds or {}).get(name, "F32"))
    for name, values in (tensors or {}).items():
        _add(writer, name, values, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    """Adds a tensor; of types that the package cannot write, random bytes."""
    number = gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        writer.add_tensor(name, values)
        return
    try:
        stored = gguf.quantize(values, number)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[number]
        shape = (len(values), values.shape[1] // block * size)
        stored = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    writer.add_tensor(name, stored, raw_dtype=number)


def vocabulary(**changes: Any) -> dict[str, Any]:
    """The metadata of tiny's tokenizer, with two rows of the embedding that it does not use."""
    model = json.loads(seeds.tiny.tokenizer().to_str())["model"]
    tokens = list(model["vocab"])
    types = [3 if token == "<|endoftext|>" else 1 for token in tokens]
    spare = [f"[PAD{i}]" for i in range(len(tokens), seeds.tiny.VOCAB)]
    found = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens + spare,
        "token_type": types + [5] * len(spare),
        "merges": [" ".join(pair) for pair in model["merges"]],
        "eos_token_id": 0,
        "mask_token_id": seeds.tiny.MASK_ID,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}


def _write_fields(writer: gguf.GGUFWriter, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if value is None:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](name, value)

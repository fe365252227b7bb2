"""Makes the good inputs that the fuzz spoils, and small files that expand."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from sama_jax.models.registry import build_model, read_config
from sama_jax.weights import saving

DECODER: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "mask_token_id": tiny.MASK_ID,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {
    **DECODER,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "rope_scaling": None,
    "partial_rotary_factor": 1,
}
ENCODER: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "mask_token_id": tiny.MASK_ID,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llada": tiny.config(),
    "dream": {**DECODER, "model_type": "Dream", "architectures": ["DreamModel"]},
    "illada": {**DECODER, "model_type": "illada", "architectures": ["ILLaDAForCausalLM"]},
    "a2d_qwen3": {**DECODER, "model_type": "a2d-qwen3", "attention_bias": True},
    "qwen2": {**DECODER, "model_type": "qwen2", "rope_parameters": {"rope_theta": 1e4}},
    "llama": {**DECODER, "model_type": "llama", "rope_parameters": LLAMA3},
    "smdm": {
        "model_type": "smdm",
        "n_layer": 2,
        "n_head": 2,
        "n_query_groups": 1,
        "n_embd": 16,
        "intermediate_size": 24,
        "vocab_size": tiny.VOCAB - 1,
        "norm_eps": 1e-5,
    },
    "llada_moe": {
        **EXPERTS,
        "model_type": "llada",
        "architectures": ["LLaDAMoEModelLM"],
        "expert_intermediate_size": 8,
        "dense_intermediate_size": 24,
        "shared_expert_intermediate_size": None,
        "moe_layer_freq": [0, 1],
        "moe_router_enable_expert_bias": False,
        "qk_layernorm": True,
        "attention_bias": False,
    },
    "llada2": {
        **EXPERTS,
        "model_type": "llada2_moe",
        "architectures": ["LLaDA2MoeModelLM"],
        "first_k_dense_replace": 1,
        "num_shared_experts": 1,
        "moe_intermediate_size": 8,
        "n_group": 2,
        "topk_group": 1,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
    },
    "mdlm": {
        "model_type": "mdlm",
        "architectures": ["MDLM"],
        "vocab_size": tiny.VOCAB,
        "model_length": 64,
        "hidden_dim": 16,
        "cond_dim": 8,
        "n_blocks": 2,
        "n_heads": 2,
        "time_conditioning": False,
    },
    "bd3lm": {
        "model_type": "bd3lm",
        "architectures": ["BD3LM"],
        "vocab_size": tiny.VOCAB,
        "model_length": 64,
        "block_size": 4,
        "cross_attn": True,
        "adaln": False,
        "hidden_dim": 16,
        "cond_dim": 8,
        "n_blocks": 2,
        "n_heads": 2,
    },
    "sedd": {
        "tokens": tiny.MASK_ID,
        "graph": {"type": "absorb", "file": "data"},
        "noise": {"type": "loglinear", "sigma_min": 1e-4},
        "model": {"hidden_size": 16, "cond_dim": 8, "length": 64, "n_blocks": 2, "n_heads": 2},
    },
    "bert": {**ENCODER, "model_type": "bert", "max_position_embeddings": 64, "type_vocab_size": 2},
    "roberta": {**ENCODER, "model_type": "roberta", "max_position_embeddings": 66},
    "modernbert": {
        **ENCODER,
        "model_type": "modernbert",
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7000.0}},
    },
}


def model(path: Path, config: dict[str, Any]) -> Path:
    """A model folder of any family with random weights and a tokenizer."""
    family = read_config(config, str(path))
    made = build_model(family, family.mask_id or 0, jnp.dtype("float32"))
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0)))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda s: draw.normal(0, 0.2, s.shape).astype(s.dtype), shapes)
    path.mkdir(parents=True)
    saving.save_folder(path, params, made, config, path, family.weights)
    tiny.tokenizer().save(str(path / "tokenizer.json"))
    return path


def adapter(path: Path, rank: int = 2) -> Path:
    """A LoRA adapter of `tiny`'s model as PEFT saves it."""
    from safetensors.numpy import save_file

    path.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 4,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"blocks\.0\.q_proj": rank},
        "alpha_pattern": {"v_proj": 3},
        "base_model_name_or_path": "base",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(0)
    tensors = {}
    for name in ("q_proj", "v_proj"):
        start = f"base_model.model.model.transformer.blocks.0.{name}"
        tensors[f"{start}.lora_A.weight"] = draw.normal(size=(rank, 16)).astype(np.float32)
        tensors[f"{start}.lora_B.weight"] = draw.normal(size=(16, rank)).astype(np.float32)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def _tokenizer_files(root: Path) -> None:
    """Folders without `tokenizer.json`."""
    model = json.loads(tiny.tokenizer().to_str())["model"]
    for name in ("Qwen2Tokenizer", "BertTokenizer"):
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        if name == "BertTokenizer":
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny.SYLLABLES, *"abcde", "##a"]
            (folder / "vocab.txt").write_text("\n".join(words))
        else:
            (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
            lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
            (folder / "merges.txt").write_text("\n".join(lines))


def tokenizers(root: Path) -> None:
    """A folder for each model of a tokenizer, with the files that stand beside it."""
    _tokenizer_files(root)
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[UNK]", "[MASK]", "[CLS]", *tiny.SYLLABLES, *"abcdefghij", "##a", "##ka"]
    vocab = {word: i for i, word in enumerate(words)}
    kinds = {
        "bpe": tiny.tokenizer(),
        "wordpiece": Tokenizer(models.WordPiece(vocab, unk_token="[UNK]")),
        "wordlevel": Tokenizer(models.WordLevel(vocab, unk_token="[UNK]")),
        "unigram": Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(words)], 0)),
    }
    for name, made in kinds.items():
        if name != "bpe":
            made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
            made.normalizer = normalizers.Sequence([  # pyright: ignore
                normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("zz", "z")
            ])  # fmt: skip
            made.add_special_tokens(["[MASK]", "[CLS]"])
            made.post_processor = processors.TemplateProcessing(  # pyright: ignore
                single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", 2)]
            )
        folder = root / name
        folder.mkdir(parents=True)
        made.save(str(folder / "tokenizer.json"))
        added = {"0": {"content": "[UNK]"}, "1": {"content": "[MASK]", "special": True}}
        about = {"mask_token": {"content": "[MASK]"}, "added_tokens_decoder": added}
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": "[MASK]"}))
        (folder / "added_tokens.json").write_text(json.dumps({"[MASK]": 1}))


EXPERIMENT = """\
summary: one line
models: {target: target, reference: reference}
data: {data: texts.jsonl}
runs:
- {name: first, attacks: [sama, loss], set: [sama.steps=2], max_length: 32}
- {name: second, attacks: [loss, ratio], preset: paper, passes: 8, seed: 3, models: demo}
compare: [[loss, sama], [loss, ratio]]
"""


# --- small files that expand ----------------------------------------------------------------------


def _repeated(block: bytes, count: int, wbits: int) -> bytes:
    """A deflate stream of `count` blocks; each was compressed alone, so that making it is quick."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    first = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + again * (count - 1) + packer.flush(zlib.Z_FINISH)


def gzip_bomb(gigabytes: int) -> bytes:
    """A gzip file of a few MB."""
    import gzip

    return gzip.compress(b'{"text": "' + b"a" * 2**24 + b'"}\n') * (64 * gigabytes)


def zstd_bomb(gigabytes: int) -> bytes:
    """A zstd file of some hundred kB."""
    import zstandard

    return zstandard.compress(b'{"text": "' + b"a" * 2**26 + b'"}\n') * (16 * gigabytes)


def npz_bomb(gigabytes: int) -> bytes:
    """An npz whose arrays claim, and hold, gigabytes of zeros."""
    import io
    import struct
    import zipfile

    block, count = b"\0" * 2**24, 64 * gigabytes
    text = f"{{'descr': '|b1', 'fortran_order': False, 'shape': ({count}, 1, {2**24}), }}\n"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    raw = _repeated(block, count, -15)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)
    size, crc = len(header) + count * 2**24, 0
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name in ("ids", "tokens", "masks", "scored", "subsets", "weights"):
            file.writestr(f"{name}.npy", head + raw)
        for info in file.filelist:  # stored so far; what the reader sees is compressed
            info.compress_type, info.file_size, info.CRC = zipfile.ZIP_DEFLATED, size, crc
    made = bytearray(buffer.getvalue())
    at = made.find(b"PK\x03\x04")
    while at >= 0:  # the local headers say the same
        made[at + 8 : at + 10] = struct.pack("<H", 8)
        made[at + 14 : at + 18] = struct.pack("<I", crc)
        made[at + 22 : at + 26] = struct.pack("<I", min(size, 2**32 - 1))
        at = made.find(b"PK\x03\x04", at + 30)
    return bytes(made)


def parquet_bomb(path: Path, rows: int) -> None:
    """A parquet file of a few kB whose every row is the same text of a megabyte."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = pa.array(np.zeros(rows, np.int32))
    column = pa.DictionaryArray.from_arrays(index, pa.array(["a" * 10**6]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd")

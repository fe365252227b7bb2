"""Folders that `verify` reads on both sides, and what its tests do with them."""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints_convert import verify

ROOT = Path(__file__).parents[1]

MASK_ID = oracle.MASK_ID

LLADA = oracle.config(d_model=48, n_heads=4, n_kv_heads=2, mlp_hidden_size=64)

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}

GROUPED = {**SIZES, "num_key_value_heads": 2}


def run(*args: Any) -> int:
    """The command, as `__main__` wires it."""
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args([str(a) for a in args]))


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, at a spread that keeps states and logits near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))
    return module.eval()


def add_tokenizer(path: Path) -> Path:
    tiny.tokenizer(298).save(str(path / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(words))
    return path


def save(path: Path, module: Any, **changes: Any) -> Path:
    """A folder of a transformers model, its config in another family's words."""
    transformers.utils.logging.disable_progress_bar()
    module.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "mask_token_id": MASK_ID, **changes}))
    return add_tokenizer(path)


def make_folder(path: Path, family: str, seed: int = 0) -> Path:
    """A folder of each kind of PyTorch side."""
    if family == "llada":
        changes = {"attention_layer_norm": True, "include_qkv_bias": True, "scale_logits": True}
        oracle.random_folder(path, {**LLADA, **changes}, seed)
        return add_tokenizer(path)
    if family == "dream":
        made = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED))
        words = {"model_type": "Dream", "architectures": ["DreamModel"]}
        return save(path, randomise(made, seed), **words)
    if family == "lladamoe":
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        moe |= {"norm_topk_prob": False, "head_dim": 12}
        made = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**GROUPED, **moe))
        words = {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "qk_layernorm": True}
        words |= {"expert_intermediate_size": 16, "norm_topk_prob": True, "num_experts": 4}
        words |= {"rope_theta": 10000.0, "moe_layer_freq": [1, 1, 1]}
        return save(path, randomise(made, seed), **words)
    if family == "bert":
        made = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
        return save(path, randomise(made, seed))
    if family == "roberta":
        sizes = {**SIZES, "pad_token_id": 1, "type_vocab_size": 1}
        made = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes))
        return save(path, randomise(made, seed))
    assert family == "modernbert"
    config = transformers.ModernBertConfig(
        **SIZES,
        local_attention=8,
        pad_token_id=0,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
    )
    return save(path, randomise(transformers.ModernBertForMaskedLM(config), seed))


def perturbed(source: Path, path: Path, pattern: str, size: float = 1e-2) -> Path:
    """A copy whose weights of one block have noise of relative `size`."""
    path.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    hit = [n for n in tensors if re.search(pattern, n)]
    assert hit
    for name in hit:
        noise = torch.randn(tensors[name].shape, generator=generator)
        tensors[name] = tensors[name] + size * tensors[name].std() * noise
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def change(path: Path, out: Path, **arrays: Any) -> Path:
    """A copy with other arrays; None leaves one out."""
    found = {**np.load(path, allow_pickle=False), **arrays}
    np.savez(out, **{k: v for k, v in found.items() if v is not None})
    return out


def script() -> dict[str, Any]:
    """The script of docs/verify.md, as its users get it."""
    page = (ROOT / "docs/verify.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    found: dict[str, Any] = {"__name__": "verify_pytorch"}
    exec(compile(code, "verify_pytorch.py", "exec"), found)
    return found


class Audit:
    """Two folders, and what the script saved of them."""

    def __init__(
        self,
        path: Path,
        family: str | Path,
        load: Any = None,
        pattern: str = "norm|proj|dense|query",
    ):
        self.target, self.reference = path / "target", path / "reference"
        self.plan, self.losses = path / "plan.npz", path / "losses.npz"
        if isinstance(family, Path):
            shutil.copytree(family, self.reference)
        elif family == "llada":
            oracle.random_folder(self.reference, LLADA, 0)
            add_tokenizer(self.reference)
        else:
            make_folder(self.reference, family)
        perturbed(self.reference, self.target, pattern, 0.1)
        texts = tiny.write_texts(path / "texts.jsonl", tiny.texts(3, words=(12, 30)))
        found = script()
        if load is not None:
            found["load"] = load
        flags = [
            "--target",
            self.target,
            "--reference",
            self.reference,
            "--texts",
            texts,
            "--plan",
            self.plan,
            "--losses",
            self.losses,
            "--mask-id",
            MASK_ID,
            "--max-length",
            64,
            "--steps",
            4,
            "--subsets",
            16,
        ]
        found["main"]([str(f) for f in flags])

    def verify(self, **changes: Path) -> int:
        paths = {n: getattr(self, n) for n in ("target", "reference", "plan", "losses")} | changes
        return run(
            paths["target"],
            *(f for n in ("reference", "plan", "losses") for f in (f"--{n}", paths[n])),
        )


def load_oracle(path: str, trust: bool):
    """In the place of LLaDA's own class, as the page says."""
    assert not trust
    config = json.loads((Path(path) / "config.json").read_text())
    module = oracle.Llada(config)
    module.load_state_dict(load_file(Path(path) / "model.safetensors"))
    return lambda ids: module(ids)

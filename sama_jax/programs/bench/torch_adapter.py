"""Adds LoRA adapters to weights of the PyTorch side, without the package's own reader."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from sama_jax.errors import ModelError


def merge_adapter(tensors: Mapping[str, torch.Tensor], adapter: Path) -> None:
    """Adds a LoRA adapter of linear layers to the weights: W + scale B A."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    if any(config.get(n) for n in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora")):
        raise ModelError(
            f"{adapter}: the PyTorch side reads plain LoRA with one rank and alpha only; merge it "
            "with PEFT, or compare with --against"
        )
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    found = load_file(adapter / "adapter_model.safetensors")
    for name, a in found.items():
        if ".lora_A." not in name:
            if ".lora_B." not in name:
                raise ModelError(f"{adapter}: {name} is not of a linear layer's plain LoRA")
            continue
        base = name.split(".lora_A.")[0].removeprefix("base_model.model.")
        weight = tensors.get(f"{base}.weight")
        if weight is None:
            raise ModelError(f"{adapter}: {name} has no weight {base}.weight in the model")
        delta = scale * found[name.replace(".lora_A.", ".lora_B.")].float() @ a.float()
        with torch.no_grad():
            weight.copy_((weight.float() + delta).to(weight.dtype))

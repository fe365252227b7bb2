"""Writes model folders in the Hugging Face layout."""

import json
from pathlib import Path
from typing import Any

from sama_jax.arrays import Model, Params
from sama_jax.errors import OutputError
from sama_jax.models.families.weight_table import Table
from sama_jax.storage.files import write_atomic
from sama_jax.weights import quantised, safetensors
from sama_jax.weights.folder_files import CONFIG, copy_companions, with_dtype
from sama_jax.weights.tensor_map import export_tensors

MAX_SHARD_BYTES = 5 * 10**9


def save_folder(
    out: Path,
    params: Params,
    model: Model,
    config: dict[str, Any],
    tokenizer_from: Path,
    weights: Table,
) -> None:
    """Writes a model folder that `open_folder` and the PyTorch code read.

    `config.json` comes last and atomically: a folder without it is not finished. Other files
    (tokenizer, generation settings) are copied from `tokenizer_from`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG).unlink(missing_ok=True)
        if tokenizer_from != out:
            copy_companions(tokenizer_from, out)
        tensors = export_tensors(params, weights, model.num_layers)
        safetensors.save_weights(out, tensors, MAX_SHARD_BYTES)
        dtypes = [str(a.dtype) for a in tensors.values()]
        commonest = max(sorted(set(dtypes)), key=dtypes.count)
        config = {**with_dtype(config, commonest), **weights.saved_config}
        config.pop(quantised.FIELD, None)  # of the weights that training began with
        write_atomic(out / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise OutputError(f"{out}: cannot write the model folder ({error})") from None

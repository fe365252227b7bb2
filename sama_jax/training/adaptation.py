"""Turns a causal model into the start of a diffusion model (A2D): attention opened, a mask token.

The weights stay as they are. Attention sees both sides, the output at a token predicts that token
and no longer the next one, and a mask token joins the vocabulary; training does the rest.
Source: `dllm/pipelines/a2d` of `ZHZisZZ/dllm` (ca17675), whose classes read what is written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sama_jax.arrays import Params
from sama_jax.errors import ModelError, UsageError
from sama_jax.models.registry import known_families
from sama_jax.storage import files
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.untrusted import shown
from sama_jax.weights.folder_files import object_if_there
from sama_jax.weights.special_tokens import tokenizer_mask

MASK = "<|mask|>"
"""What dllm calls the token that it adds."""
ROWS = 64
"""New rows of an embedding come in multiples of this, so that it still splits over devices."""


def mask_token(base: Path, tokenizer: TextTokenizer) -> int:
    """Returns the id of the mask token that a tokenizer has, or that `MASK` will get: the next one.

    Raises `ModelError` if the folder's files name several.
    """
    known = [tokenizer_mask(base), tokenizer.token_id(MASK), tokenizer.max_id + 1]
    return next(i for i in known if i is not None)


def diffusion_config(config: Mapping[str, Any], mask_id: int, where: str) -> dict[str, Any]:
    """Returns the `config.json` of the diffusion model that a causal model becomes.

    Raises `UsageError` where there is no diffusion model of this architecture.
    """
    known, name = known_families(), f"a2d-{config['model_type']}"
    if name not in known:
        raise UsageError(
            f"{where}: model_type is {shown(config['model_type'])}; --as diffusion makes a "
            "diffusion model of a causal one: "
            + ", ".join(sorted(n.removeprefix("a2d-") for n in known if n.startswith("a2d-")))
        )
    # Code that the folder brings is of the causal model.
    kept = {k: v for k, v in config.items() if k not in ("auto_map", "is_causal", "_name_or_path")}
    rows = config["vocab_size"]
    if mask_id >= rows:
        rows = -(-(mask_id + 1) // ROWS) * ROWS
    return kept | {
        "model_type": name,
        "architectures": list(known[name].architectures),
        "vocab_size": rows,
        "mask_token_id": mask_id,
    }


def with_rows(params: Params, rows: int) -> Params:
    """Adds rows to the embedding, and outputs to the head, up to `rows`.

    All of them are the mean of those that are there: no token is nearer to a new one than chance.
    """

    def grown(path: tuple[Any, ...], leaf: Float[Array, "..."]) -> Float[Array, "..."]:
        name = tuple(step.key for step in path[-2:])
        axis = {("embed", "embedding"): 0, ("lm_head", "kernel"): -1, ("lm_head", "bias"): -1}
        if name not in axis or leaf.shape[axis[name]] >= rows:
            return leaf
        mean = leaf.mean(axis=axis[name], keepdims=True, dtype=jnp.float32).astype(leaf.dtype)
        new = jnp.repeat(mean, rows - leaf.shape[axis[name]], axis=axis[name])
        return jnp.concatenate([leaf, new], axis=axis[name])

    return jax.tree_util.tree_map_with_path(grown, params)


def add_mask_token(out: Path, mask_id: int, rows: int) -> TextTokenizer:
    """Adds the mask token to the tokenizer's files that were copied to `out`, and reads them.

    Raises `ModelError` if there is no `tokenizer.json`, or the token does not get `mask_id`.
    """
    made = object_if_there(out / "tokenizer.json")
    if not made:
        raise ModelError(
            f"{out}: the base has no tokenizer.json to add a mask token to; save its tokenizer "
            "with transformers' PreTrainedTokenizerFast first"
        )
    beside = object_if_there(out / "tokenizer_config.json")
    token = {"content": MASK, "lstrip": False, "normalized": False, "rstrip": False}
    token |= {"single_word": False, "special": True}
    if tokenizer_mask(out) is None:
        made["added_tokens"] = [*(made.get("added_tokens") or []), {"id": mask_id, **token}]
        beside["mask_token"] = MASK
        if "added_tokens_decoder" in beside:
            beside["added_tokens_decoder"] |= {str(mask_id): token}
    files.write_json(out / "tokenizer.json", made)
    files.write_json(out / "tokenizer_config.json", beside)
    read = TextTokenizer.from_folder(out, rows)
    if tokenizer_mask(out) != mask_id:
        raise ModelError(f"{out}: the tokenizer's mask token did not get the id {mask_id}")
    return read

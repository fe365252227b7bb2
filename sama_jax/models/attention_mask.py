"""Names the masks of attention that a diffusion model may be trained with, and computes them.

full       every token sees every other
block:N    a token sees all tokens of its own block of N and of the blocks before it, counted
           from the start of the text, as LLaDA2 and dllm's block-diffusion samplers do
causal     a token sees itself and what is before it; the same as block:1
"""

import re

from jaxtyping import Array, Bool, Int

NAMES = "full, causal, or block:N for blocks of N tokens"
LONGEST_BLOCK = 2**16
FIELD = "attention_mask"
"""The field of a `config.json` that states the mask, in these words; `finetune` writes it."""


def block_length_of(name: str) -> int | None:
    """Returns the length of a mask's blocks: 1 for `causal`, None for `full`.

    Raises `ValueError` for a name that is none of the three.
    """
    if name in ("full", "causal"):
        return 1 if name == "causal" else None
    block = re.fullmatch(r"block:([1-9]\d{0,4})", name)
    if block is None or int(block[1]) > LONGEST_BLOCK:
        raise ValueError(f"attention mask '{name}'; expected {NAMES} (N up to {LONGEST_BLOCK:,})")
    return int(block[1])


def mask_name(block_length: int | None) -> str:
    """Returns the name of the mask whose blocks have this length."""
    return {None: "full", 1: "causal"}.get(block_length, f"block:{block_length}")


def visible(
    key_valid: Bool[Array, "b l"],
    queries: Int[Array, "b k"],
    keys: Int[Array, "b l"],
    block_length: int | None,
) -> Bool[Array, "b #k l"]:
    """Returns which valid keys each query sees, given the positions of both; one row for all
    queries where they see the same."""
    if block_length is None:
        return key_valid[:, None]
    blocks = queries // block_length, keys // block_length
    return key_valid[:, None] & (blocks[1][:, None, :] <= blocks[0][:, :, None])

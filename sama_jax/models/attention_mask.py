"""Names the masks of attention that a diffusion model may be trained with, and computes them.

full       every token sees every other
block:N    a token sees all tokens of its own block of N and of the blocks before it, counted
           from the start of the text, as LLaDA2 and dllm's block-diffusion samplers do
clean:N    the same, but what is before its block is the text without any masks, as block-diffusion
           models are trained: the network's input is the text with masks and, behind it, the text
causal     a token sees itself and what is before it; the same as block:1
"""

import re

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sama_jax.arrays import Architecture

NAMES = "full, causal, or block:N or clean:N for blocks of N tokens"
LONGEST_BLOCK = 2**16
FIELD = "attention_mask"
"""The field of a `config.json` that states the mask, in these words; `finetune` writes it."""


def block_length_of(name: str) -> int | None:
    """Returns the length of a mask's blocks: 1 for `causal`, None for `full`.

    Raises `ValueError` for a name that is none of the four.
    """
    if name in ("full", "causal"):
        return 1 if name == "causal" else None
    block = re.fullmatch(r"(?:block|clean):([1-9]\d{0,4})", name)
    if block is None or int(block[1]) > LONGEST_BLOCK:
        raise ValueError(f"attention mask '{name}'; expected {NAMES} (N up to {LONGEST_BLOCK:,})")
    return int(block[1])


def has_clean_context(name: str) -> bool:
    """Returns whether a mask, by its name, shows the text without masks before each block."""
    return name.startswith("clean:")


def mask_name(block_length: int | None, clean_context: bool = False) -> str:
    """Returns the name of the mask whose blocks have this length."""
    if clean_context and block_length is not None:
        return f"clean:{block_length}"
    return {None: "full", 1: "causal"}.get(block_length, f"block:{block_length}")


def mask_of(arch: Architecture) -> str:
    """Returns the name of the mask that a network of this architecture attends by."""
    return mask_name(arch.block_length, arch.clean_context)


def places(positions: Int[Array, "b k"], length: int, clean_context: bool) -> Int[Array, "b k"]:
    """Returns where in its text each of these positions of an input of `length` stands."""
    return positions % (length // 2) if clean_context else positions


def visible(
    key_valid: Bool[Array, "b l"],
    queries: Int[Array, "b k"],
    keys: Int[Array, "b l"],
    block_length: int | None,
    clean_context: bool = False,
) -> Bool[Array, "b #k l"]:
    """Returns which valid keys each query sees, given the positions of both; one row for all
    queries where they see the same.

    With `clean_context` the second half of the positions is the text without masks. A token of the
    first half sees its own block there, and in the second half the blocks before it; one of the
    second half sees there what `block:N` shows.
    """
    if clean_context:
        half = key_valid.shape[1] // 2
        own, block = (p % half // (block_length or half) for p in (queries, keys))
        reader, read = (queries >= half)[:, :, None], (keys >= half)[:, None, :]
        own, block = own[:, :, None], block[:, None, :]
        context = block < own + reader.astype(own.dtype)
        return key_valid[:, None] & jnp.where(read, context, ~reader & (block == own))
    if block_length is None:
        return key_valid[:, None]
    blocks = queries // block_length, keys // block_length
    return key_valid[:, None] & (blocks[1][:, None, :] <= blocks[0][:, :, None])

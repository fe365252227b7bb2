"""Reads rotary parameters, which configs state in three places.

transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters` with all of
them. Some files have both; which one counts depends on the version and the field (transformers 5
takes `original_max_position_embeddings` from beside a section first), so they must agree.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from sama_jax.models.families.family import UNLIMITED
from sama_jax.models.families.fields import Fields
from sama_jax.models.layers import LinearScaling, Llama3Scaling, Scaling, YarnScaling
from sama_jax.untrusted import shown

SCALED = ("linear", "dynamic", "yarn", "llama3")
"""The values of `rope_type` besides `default` that are read of what transformers' Llama and Qwen
classes know; `longrope` and `proportional` are not."""


class Rope(NamedTuple):
    """Holds the rotary parameters of all layers."""

    theta: float
    scaling: Scaling | None
    share: float
    """Of a head's channels, that are rotated."""
    max_length: int
    """Tokens up to which the model does nothing else: behind them `dynamic` changes the base, and
    `llama_4_scaling_beta` the queries."""


def read_rope(config: Fields, *, kinds: Collection[str] = (), share: float = 1.0) -> Rope:
    """Reads them from wherever they stand; a theta that stands nowhere is the class default.

    Args:
      config: a whole `config.json`.
      kinds: the values of `rope_type` besides `default` that the family may have.
      share: the class default of `partial_rotary_factor`.
    """
    said: dict[str, Any] = {}
    for section in ("rope_scaling", "rope_parameters"):
        inside = config.get(section) or {}
        if not isinstance(inside, dict) or any(isinstance(v, dict) for v in inside.values()):
            config.refuse(f"{section} is {shown(inside)}: not one set for all layers")
        for name, value in inside.items():
            _add(config, said, "rope_type" if name == "type" else name, value)
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        value = config.get(name)
        if config.states(name) and not (value is None and name in said):
            _add(config, said, name, value)
    longest = config.get("max_position_embeddings")
    defaults = {
        "rope_theta": config.get("rope_theta"),
        "partial_rotary_factor": share,
        "original_max_position_embeddings": longest,
        "max_position_embeddings": longest,
        "llama_4_scaling_beta": config.get("llama_4_scaling_beta"),
    }
    rope = Fields(said, config.where, defaults)
    theta, rotated = rope.positive("rope_theta"), rope.get("partial_rotary_factor")
    scaling, max_length = _scaling(rope, kinds)
    rope.refuse_rest(all_matter=True)
    return Rope(theta, scaling, rotated, max_length)


def _add(config: Fields, said: dict[str, Any], name: str, value: Any) -> None:
    if name in said and said[name] != value:
        config.refuse(
            f"{name} is {shown(said[name])} in one place and {shown(value)} in another (beside "
            "rope_scaling and rope_parameters, or in one of them); which one counts depends on the "
            "version of transformers: remove the wrong one"
        )
    said[name] = value


def _scaling(rope: Fields, kinds: Collection[str]) -> tuple[Scaling | None, int]:
    """Reads one of the `kinds` and for how many tokens it holds; the others change what positions
    mean otherwise."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None, UNLIMITED
    if not isinstance(kind, str) or kind not in kinds:
        known = " or ".join(f"'{name}'" for name in ("default", *kinds))
        rope.refuse(f"rope_type is {shown(kind)}; expected {known}, others are not supported")
    if kind == "yarn":
        limit = rope.get("llama_4_scaling_beta")
        scaling = _yarn(rope)
        return scaling, UNLIMITED if limit is None else scaling.original_length
    factor = rope.positive("factor")
    if kind == "dynamic":  # the plain base up to there, another one for each longer text
        return None, rope.size("max_position_embeddings")
    return LinearScaling(factor) if kind == "linear" else _llama3(rope, factor), UNLIMITED


def _llama3(rope: Fields, factor: float) -> Llama3Scaling:
    low, high = map(rope.positive, ("low_freq_factor", "high_freq_factor"))
    if not low < high:
        rope.refuse(f"rope_type llama3: low_freq_factor {low} is not below high_freq_factor {high}")
    return Llama3Scaling(factor, low, high, rope.size("original_max_position_embeddings"))


def _yarn(rope: Fields) -> YarnScaling:
    """Reads YaRN's fields by the defaults of transformers' `modeling_rope_utils.py` (5.24)."""
    factor = rope.positive("factor")
    fast, slow = (
        turns if rope.get(name) is None else rope.positive(name)
        for name, turns in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if not slow < fast:
        rope.refuse(f"rope_type yarn: beta_slow {slow} is not below beta_fast {fast}")

    def size(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scales = [rope.get(name) for name in ("mscale", "mscale_all_dim")]
    attention = size(1.0)
    if all(scales):
        attention = size(rope.positive("mscale")) / size(rope.positive("mscale_all_dim"))
    if rope.get("attention_factor") is not None:
        attention = rope.positive("attention_factor")
    length = rope.size("original_max_position_embeddings")
    whole = rope.with_defaults({"truncate": True}).flag("truncate")
    return YarnScaling(factor, fast, slow, length, attention, whole)

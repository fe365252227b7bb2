"""Defines what a family of models is to the registry."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from sama_jax.arrays import Architecture, Model
from sama_jax.models.families.fields import Fields
from sama_jax.models.families.weight_table import Table

Kind = Literal["diffusion", "autoregressive", "masked"]
"""How a model was trained to predict: noise levels from both sides, next token, or a fixed share of
masked tokens. Attacks name the kinds that they are defined for."""


UNLIMITED = 2**20
"""Tokens of a text for a model whose config sets no limit."""


class FamilyConfig(NamedTuple):
    """Holds what a `config.json` says, in our words."""

    family: str
    """Its name, for messages."""
    arch: Architecture
    """The network's own architecture class."""
    weights: Table
    """Where each parameter comes from."""
    network: Callable[..., Model]
    """The class of models over that architecture, such as `TransformerModel`."""
    mask_id: int | None
    """None where the config names none; then the tokenizer or `--mask-id` must."""
    shift: bool
    """True if the raw output at position i - 1 predicts the token at i."""
    kind: Kind = "diffusion"
    block_group_size: int = 1
    max_length: int = UNLIMITED
    """Tokens that the model was made for; the registry reads the usual fields, and the least
    counts."""


class Family(NamedTuple):
    """One entry of the registry."""

    model_type: str
    """What a `config.json` says it is."""
    read: Callable[[Fields], FamilyConfig]
    """The fields of a `config.json` -> architecture. Raises `ModelError`."""
    architectures: tuple[str, ...]
    """Class names that a config's `architectures` may hold."""
    matches: Callable[[dict[str, Any]], bool] | None = None
    """Knows a config that names another `model_type`, or none; it goes before `model_type`."""

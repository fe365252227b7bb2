"""Defines what a family of models is to the registry."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from sama_jax.arrays import Architecture, Model
from sama_jax.errors import ModelError
from sama_jax.models.families.weight_table import Table

Kind = Literal["diffusion", "autoregressive", "masked"]
"""How a model was trained to predict: noise levels from both sides, next token, or a fixed share of
masked tokens. Attacks name the kinds that they are defined for."""


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


class Family(NamedTuple):
    """One entry of the registry."""

    model_type: str
    """What a `config.json` says it is."""
    read: Callable[[dict[str, Any], str], FamilyConfig]
    """(parsed config.json, its path for messages) -> architecture. Raises `ModelError`."""
    architectures: tuple[str, ...]
    """Class names that a config's `architectures` may hold."""
    matches: Callable[[dict[str, Any]], bool] | None = None
    """Knows a config that names another `model_type`, or none; it goes before `model_type`."""


def check_sizes(config: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    """Raises `ModelError` unless all these fields are positive integers."""
    wrong = [n for n in names if type(config.get(n)) is not int or config[n] < 1]
    if wrong:
        found = "; ".join(f"{name} is {config.get(name)!r}" for name in wrong)
        raise ModelError(f"{where}: expected positive integers, but {found}")

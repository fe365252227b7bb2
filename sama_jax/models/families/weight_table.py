"""Defines the words that every weight table is written in."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Fused(NamedTuple):
    """A parameter that is part of a larger source tensor, such as Q in a fused QKV.

    The source's first axis is viewed as `view` (its product is the axis' length) and `pick` selects
    from it: rows 0..h-1 of [h + 2 g] heads, or part 0 of every group.
    """

    view: tuple[int, ...]
    pick: tuple[slice | int, ...]


class Rule(NamedTuple):
    """Source tensor of one parameter.

    `{i}` in the name makes the parameter a stack over layers (axis 0); `{e}` one over experts (the
    axis behind it).
    """

    source: str
    transpose: bool = False
    """PyTorch keeps linear weights as [out, in], our kernels are [in, out]."""
    fused: Fused | None = None
    joined: tuple[str, ...] = ()
    """Instead of `fused`: the source's first axis holds the rows of these modules, which stand
    beside each other in our tree, in this order: Q, K and V of unequal numbers of heads."""
    buffer: bool = False
    """Not trained, such as the bias that balances experts: loaded in its stored dtype."""


class Table(NamedTuple):
    """All that the converter knows about a family's tensors."""

    rule: Callable[[str, int], Rule]
    """(our parameter path, number of layers) -> where it comes from."""
    hub_prefix: str
    """What the published checkpoints put before the canonical names."""
    tied_head: tuple[str, str] | None = None
    """(head, embedding): a tied model may still store its head, if it equals the embedding."""
    copies: tuple[tuple[str, str], ...] = ()
    """Other (copy, original) that a file may hold if they are equal."""
    canonical: Callable[[str, int], str] = lambda name, block_group_size: name
    """Further renaming after `clean_name`, such as block groups to blocks."""
    ignored: re.Pattern[str] | None = None
    """Stored buffers that hold nothing learned, such as rotary frequencies."""
    refused: tuple[tuple[str, str], ...] = ()
    """(regular expression of a canonical name, advice): other layouts, known but not read."""
    saved_config: Mapping[str, Any] = MappingProxyType({})
    """Fields of `config.json` that describe how we write the tensors."""
    rows_fields: tuple[str, ...] = ()
    """Fields that say how many tokens embedding and head have, where another number is possible."""
    tied_field: str | None = None
    """The field that ties a head of its own to the embedding; None: a tied model has no head."""

    def name_of(self, stored: str, block_group_size: int = 1) -> str:
        """Returns a stored name without wrappers and prefixes: what the rules name."""
        return self.canonical(clean_name(stored), block_group_size)


def plain_rule(
    top: Mapping[str, str], blocks: str, block: Mapping[str, str]
) -> Callable[[str, int], Rule]:
    """Returns the rule of a family that stores one tensor a parameter, kernels transposed.

    `top` and `block` map our modules, such as `final_norm` and `attn/q_proj`, to the family's;
    those of `block` stand behind `blocks` and the number of their layer.
    """

    def rule(path: str, num_layers: int) -> Rule:
        module, _, leaf = path.rpartition("/")
        transpose, suffix = leaf == "kernel", "bias" if leaf == "bias" else "weight"
        if module in top:
            return Rule(f"{top[module]}.{suffix}", transpose)
        stack, _, inside = module.partition("/")
        layer = "{i}" if stack == "blocks" else str(num_layers - 1)
        return Rule(f"{blocks}.{layer}.{block[inside]}.{suffix}", transpose)

    return rule


_WRAPPERS = re.compile(
    r"^(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.|_module\.|_forward_module\.|model\."
    r"|base_model\.model\.)+"
)
_INFIXES = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def clean_name(name: str) -> str:
    """Removes what DataParallel, torch.compile, FSDP, Opacus, DeepSpeed, PEFT and Hub classes add.

    Of a layer that PEFT has changed, `base_layer` and `lora_A` stay, which no family knows.
    """
    return _INFIXES.sub("", _WRAPPERS.sub("", name))

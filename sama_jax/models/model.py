"""Implements what all Linen networks share of the protocols `Model` and `Architecture`."""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sama_jax.arrays import Architecture, Params
from sama_jax.models.families.family import Kind


class PlainArchitecture:
    """Implements `Architecture` for networks whose heads all have their own keys and values, with
    one dense MLP a block, and all blocks but the last stacked."""

    width: int
    num_layers: int
    num_heads: int

    @property
    def attention(self) -> str:
        return "xla"

    @property
    def block_length(self) -> None:
        return None

    @property
    def clean_context(self) -> bool:
        return False

    @property
    def stacked_layers(self) -> int:
        return self.num_layers - 1

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads

    @property
    def active_width(self) -> int:
        return self.mlp_width  # pyright: ignore  # a field or a property of the derived class


@dataclass(frozen=True, kw_only=True)
class LinenModel:
    """Implements `Model` over a Linen network with the methods `trunk`, `last_hidden`, `logits` and
    `attention`, and `entering` and `leaving`, which `stages` needs.

    Hashable, so it can be a static argument.
    """

    arch: Architecture
    mask_id: int
    shift: bool = False
    kind: Kind = "diffusion"
    dtype: Any = jnp.float32
    """Of activations; parameters are cast to it where they are used."""
    remat: bool = False
    """Recompute each block in the backward pass, trading a third more time for memory."""

    @property
    def lora_paths(self) -> re.Pattern[str]:
        """Matches the parameters that may carry a LoRA adapter: none."""
        return re.compile("(?!)")

    @property
    def vocab_size(self) -> int:
        return self.arch.vocab_size

    @property
    def num_layers(self) -> int:
        return self.arch.num_layers

    @property
    def network(self) -> nn.Module:
        """Makes the network itself."""
        raise NotImplementedError

    def init(self, key) -> Params:
        """Draws random float32 parameters."""
        tokens, key_valid = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
        return self.network.init(key, tokens, key_valid)["params"]

    def trunk(
        self,
        params: Params,
        tokens: Int[Array, "b l"],
        key_valid: Bool[Array, "b l"],
        clean: Int[Array, "b l"] | None = None,
    ) -> Any:
        """Returns what enters the last block."""
        read = self.input_of(tokens, clean)
        return self._apply(params, read, self.key_valid_of(key_valid), method="trunk")

    def last_hidden(
        self,
        params: Params,
        stream: Any,
        key_valid: Bool[Array, "b l"],
        positions: Int[Array, "b k"],
    ) -> Float[Array, "b k d"]:
        """Returns the final hidden states that predict the tokens at `positions`."""
        source = jnp.maximum(positions - 1, 0) if self.shift else positions
        return self.output_at(params, stream, key_valid, source)

    def output_at(
        self,
        params: Params,
        stream: Any,
        key_valid: Bool[Array, "b l"],
        positions: Int[Array, "b k"],
    ) -> Float[Array, "b k d"]:
        """Returns the final hidden states at `positions` themselves."""
        valid = self.key_valid_of(key_valid)
        return self._apply(params, stream, valid, positions, method="last_hidden")

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "b l"],
        key_valid: Bool[Array, "b l"],
        clean: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Returns the final hidden states that predict each token."""
        return self._everywhere(params, self.trunk(params, tokens, key_valid, clean), key_valid)

    def input_of(
        self, tokens: Int[Array, "b l"], clean: Int[Array, "b l"] | None
    ) -> Int[Array, "b n"]:
        """Returns what the network reads: the text, and behind it, if it wants that, the text
        without masks (as it stands if that is not known)."""
        if not self.arch.clean_context:
            return tokens
        return jnp.concatenate([tokens, tokens if clean is None else clean], axis=1)

    def key_valid_of(self, key_valid: Bool[Array, "b l"]) -> Bool[Array, "b n"]:
        """Returns which positions of the network's input hold a token."""
        return jnp.tile(key_valid, (1, 2)) if self.arch.clean_context else key_valid

    def _everywhere(
        self, params: Params, stream: Any, key_valid: Bool[Array, "b l"]
    ) -> Float[Array, "b l d"]:
        """Computes `last_hidden` at every position."""
        if self.arch.clean_context:
            b, length = key_valid.shape
            everywhere = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (b, length))
            out = self.output_at(params, stream, key_valid, everywhere)
        else:
            out = self._apply(params, stream, key_valid, method="last_hidden")
        return jnp.concatenate([out[:, :1], out[:, :-1]], axis=1) if self.shift else out

    def logits(self, params: Params, hidden: Float[Array, "*k d"]) -> Float[Array, "*k v"]:
        """Returns vocabulary logits in the activation dtype; no caller needs whole batches."""
        return self._apply(params, hidden, method="logits")

    def attention(
        self, params: Params, tokens: Int[Array, "b l"], key_valid: Bool[Array, "b l"]
    ) -> Float[Array, "b l l"]:
        """Returns the weights (query, key) averaged over heads and layers, float32.

        Rows sum to 1; those of padding queries hold no meaning. One layer's [b, h, l, l] at a time.
        """
        read, valid = self.input_of(tokens, None), self.key_valid_of(key_valid)
        return self._of_text(self._apply(params, read, valid, method="attention"))

    def _of_text(self, weights: Float[Array, "b n n"]) -> Float[Array, "b l l"]:
        """Returns attention between the tokens of a text, wherever in the input they are read."""
        if not self.arch.clean_context:
            return weights
        half = weights.shape[1] // 2
        return weights[:, :half, :half] + weights[:, :half, half:]

    def flops_per_text(self, length: int, scored: float) -> float:
        """Counts floating-point operations of a pass that reads `scored` of `length` positions."""
        raise NotImplementedError

    def with_cudnn(self) -> "LinenModel | None":
        """Returns the same model with cuDNN's attention: there is none for most networks."""
        return None

    def with_split_heads(self) -> "LinenModel":
        """Returns the same model for a mesh that splits its attention heads over devices."""
        return self

    def entering(
        self,
        params: Params,
        tokens: Int[Array, "b l"],
        key_valid: Bool[Array, "b l"],
        clean: Int[Array, "b l"] | None = None,
    ) -> Any:
        """Returns the stream that enters the first block."""
        read = self.input_of(tokens, clean)
        return self._apply(params, read, self.key_valid_of(key_valid), method="entering")

    def block_kind(self, number: int) -> Hashable:
        """Returns what is static of block `number` (from 0): equal kinds share a program."""
        del number
        return self.arch

    def through_block(
        self, kind: Any, params: Params, stream: Any, key_valid: Bool[Array, "b n"]
    ) -> Any:
        """Returns the stream behind a block of a kind, whose parameters stand alone; `key_valid` is
        that of the network's input."""
        raise NotImplementedError

    def leaving(self, params: Params, stream: Any) -> Float[Array, "b l d"]:
        """Returns the final hidden states of the stream behind the last block."""
        return self._apply(params, stream, method="leaving")

    def state_of(self, stream: Any) -> Float[Array, "b l d"]:
        """Returns the stream without what accompanies it."""
        return stream

    def _apply(self, params: Params, *args: Any, method: str) -> Any:
        return self.network.apply({"params": params}, *args, method=method)


def run(module: nn.Module, params: Params, *args: Any) -> Any:
    """Returns what a module with these parameters computes."""
    return module.apply({"params": params}, *args)


def flops(arch: Architecture, length: int, scored: float, mlp_matrices: int, head: int) -> float:
    """Counts the operations of one pass, 2 a multiply-accumulate; the last block and the `head`
    (operations a position) at `scored` positions only. Norms, softmax and conditioning are left
    out."""
    kv = 4 * arch.width**2
    rest = 4 * arch.width**2 + 2 * mlp_matrices * arch.width * arch.mlp_width
    rest += 4 * arch.width * length
    return (arch.num_layers - 1) * (kv + rest) * length + kv * length + (rest + head) * scored

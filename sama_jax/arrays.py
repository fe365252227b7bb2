"""What travels between the layers: NamedTuples of arrays, and what a `Model` is.

Axes: `b` texts, `t` forward passes (steps) of a plan, `l` positions of a padded text, `k` slots
for scored positions, `n` subsets, `m` tokens of a subset, `d` width, `v` vocabulary rows.
"""

import itertools
import re
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

AnyArray = Array | np.ndarray
"""An array of the device or of the host: what is made on the host travels in the same tuples."""
Params = Any
"""A nested dict of arrays, as `Model.init` returns it."""


class Piece(NamedTuple):
    """A part of a conversation as a template has written it."""

    text: str
    scored: bool
    """Whether it may be masked and scored: an answer and the token that ends it."""
    words: bool
    """Whether it was written by who speaks, and not by the template."""


class Rendered(NamedTuple):
    """A conversation as one text, in the order of its pieces (host)."""

    pieces: tuple[Piece, ...]
    adds: bool
    """Whether the tokenizer adds its begin and end tokens, as the template spells none."""
    form: str = ""
    """Names how records became texts (`conversations.Form.name`)."""

    def __str__(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Returns where the scored pieces stand, as [start, end) of characters."""
        ends = list(itertools.accumulate(len(piece.text) for piece in self.pieces))
        places = zip(self.pieces, [0, *ends], ends)
        return [(start, end) for piece, start, end in places if piece.scored]

    def lower(self) -> "Rendered":
        """Returns the same with its answers in lower case; prompts and marks stay."""
        return self._replace(
            pieces=tuple(
                piece._replace(text=piece.text.lower()) if piece.scored and piece.words else piece
                for piece in self.pieces
            )
        )


class Encoded(NamedTuple):
    """Tokens of one text, cut at the maximum length (host)."""

    ids: Int[np.ndarray, " n"]
    special: Bool[np.ndarray, " n"]
    """Tokens that the tokenizer added (begin, end), not those written in the text."""
    truncated: bool
    zlib_bytes: int
    """Bytes of the zlib-compressed UTF-8 of the part of the text that the kept tokens cover."""
    characters: int
    """Characters of that part."""
    prompt: Bool[np.ndarray, " n"] | None = None
    """Tokens that always stay visible, since an answer is all that is scored; None: a plain text.

    Of a conversation, sizes and `truncated` speak of its answers alone.
    """
    prompt_cut: int = 0
    """Tokens of prompts that are cut off a conversation."""

    @property
    def own_tokens(self) -> int:
        """Counts the tokens that are no prompt's."""
        return len(self.ids) if self.prompt is None else int((~self.prompt).sum())


class SharedTokens(NamedTuple):
    """How the tokens of a text by two tokenizers make up the spans that both share (host).

    A span is masked as a whole, and its loss is the sum of its tokens'.
    """

    target: Int[np.ndarray, " n"]
    """Span of each token of the target; -1: it belongs to none, and stays visible."""
    reference_ids: Int[np.ndarray, " r"]
    reference: Int[np.ndarray, " r"]
    """Span of each token of the reference."""

    def of(self, role: str) -> Int[np.ndarray, "..."]:
        """Returns the span of each token of a role."""
        return self.target if role == "target" else self.reference


class ProbePlan(NamedTuple):
    """What is done to one text: which positions each forward pass masks and reads.

    The whole interface between an attack and the machinery: passes are run as the plan says, and
    a statistic is a function of the losses that come back and of the plan.
    """

    masks: Bool[AnyArray, "*b t l"]
    """Positions replaced by the mask token in a pass."""
    scored: Bool[AnyArray, "*b t l"]
    """Positions (among the masked) whose loss is read in a pass."""
    weights: Float[AnyArray, "*b t"]
    """Weight of a pass in the statistic; 0: the pass is not recorded."""
    subsets: Int[AnyArray, "*b t n m"]
    """Positions that vote together, -1 unused. Plans without votes have n = 0."""

    @classmethod
    def without_votes(
        cls,
        masks: Bool[AnyArray, "t l"],
        scored: Bool[AnyArray, "t l"],
        weights: Float[AnyArray, " t"],
    ) -> "ProbePlan":
        """Makes the plan of one text for a statistic that draws no subsets."""
        return cls(masks, scored, weights, jnp.zeros((masks.shape[0], 0, 1), jnp.int32))


class ForwardBatch(NamedTuple):
    """Input of one call of the scorer: `b` texts under `t` masks each."""

    tokens: Int[AnyArray, "b l"]
    valid: Bool[AnyArray, "b l"]
    masks: Bool[AnyArray, "t b l"]
    positions: Int[AnyArray, "t b k"]
    """Scored positions of each pass in ascending order, -1 in unused slots."""
    group: Int[AnyArray, " t"]
    """Index into the scorer's slot sizes; pass `t` uses the first `slots[group[t]]` of `k`."""
    passes: Int[AnyArray | np.int32, ""]
    """Passes to run, at most `t`: one program serves plans of any number."""


class Reading(NamedTuple):
    """All that a statistic may read about one text. Losses are NaN where nothing was scored."""

    target: Float[AnyArray, "*b t l"]
    """Token losses of the target in nats, pass by pass."""
    reference: Float[AnyArray, "*b t l"]
    plan: ProbePlan
    num_tokens: Int[AnyArray, "*b"]
    zlib_bytes: Int[AnyArray, "*b"]
    """Bytes of the zlib-compressed UTF-8 text (the part that was scored), default level.

    In a view of the text this is still the original text's size. The same holds for `characters`.
    """
    characters: Int[AnyArray, "*b"]
    """Characters of the same part."""
    target_more: dict[str, Float[AnyArray, "*b t l"]] = {}  # noqa: RUF012
    """Other quantities than the loss, by channel (`losses.CHANNELS`)."""
    reference_more: dict[str, Float[AnyArray, "*b t l"]] = {}  # noqa: RUF012
    views: dict[str, "Reading"] = {}  # noqa: RUF012
    """Readings of other views of the text, by the names that the attack gave its queries."""


class SignStatistics(NamedTuple):
    """SAMA's weighted sign statistic of one text."""

    score: Float[AnyArray, "*b"]
    """Weighted mean of the step votes, in [0, 1]; higher means more likely a member."""
    step_votes: Float[AnyArray, "*b t"]
    """Share of subsets that vote "member" in each step."""
    step_weights: Float[AnyArray, "*b t"]
    """Weights normalised to sum 1 (all 0 for a text without a recorded step)."""
    tie_rate: Float[AnyArray, "*b"]
    """Weighted share of subsets whose two sums are equal."""


class TextKeyData(NamedTuple):
    """First 64 bits of the SHA-256 of a text's token ids: what its randomness derives from."""

    high: UInt[AnyArray | np.uint32, "*b"]
    low: UInt[AnyArray | np.uint32, "*b"]


@runtime_checkable
class Architecture(Protocol):
    """The sizes of a network, and what decides its arithmetic. Hashable; each network has its own
    class, with further fields."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        ...

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        ...

    @property
    def num_layers(self) -> int:
        """Blocks of the network."""
        ...

    @property
    def stacked_layers(self) -> int:
        """Blocks whose parameters are stacked and scanned; the others stand apart."""
        ...

    @property
    def num_heads(self) -> int:
        """Query heads of a block."""
        ...

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads of a block; it divides `num_heads`."""
        ...

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        ...

    @property
    def mlp_width(self) -> int:
        """Inner channels of the MLP."""
        ...

    @property
    def active_width(self) -> int:
        """Inner channels of the MLP that all tokens of a stacked block go through: with experts
        that of the shared one, 0 where there is none."""
        ...

    @property
    def max_length(self) -> int | None:
        """Tokens that the network has position embeddings for; None: it has no such table."""
        ...

    @property
    def block_length(self) -> int | None:
        """Position i sees j if j // block_length <= i // block_length; 1: causal; None: every j."""
        ...

    @property
    def clean_context(self) -> bool:
        """Whether a token sees its own block alone with masks, and the text without any before it:
        the network then reads both, one behind the other."""
        ...

    @property
    def attention(self) -> str:
        """What computes attention: `xla` or `cudnn`."""
        ...


@runtime_checkable
class Model(Protocol):
    """A masked or causal language model as pure functions over a tree of parameters.

    The model alone knows where its output for a token stands: `last_hidden` and `hidden` at a
    position predict the token at that position, whatever the network's own alignment is.
    `hidden` is `last_hidden(trunk(..))` at every position. Scoring calls the two halves, because
    the last block needs queries and MLP only at scored positions.
    """

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        ...

    @property
    def num_layers(self) -> int:
        """Blocks of the network."""
        ...

    @property
    def arch(self) -> Architecture:
        """The network's sizes."""
        ...

    @property
    def dtype(self) -> Any:
        """NumPy dtype of the activations; losses are float32 whatever it is."""
        ...

    @property
    def mask_id(self) -> int:
        """The token that stands for a masked one."""
        ...

    @property
    def kind(self) -> str:
        """`diffusion`, `autoregressive` or `masked`: which attacks are defined for it."""
        ...

    @property
    def shift(self) -> bool:
        """True if the raw output at position i - 1 predicts the token at i (Dream, causal models).

        Only for what is told about a model: its methods take care of it.
        """
        ...

    @property
    def lora_paths(self) -> re.Pattern[str]:
        """Paths of the parameters that may carry a LoRA adapter."""
        ...

    def init(self, key: Any) -> Params:
        """Draws random parameters in float32."""
        ...

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "b l"],
        key_valid: Bool[Array, "b l"],
        clean: Int[Array, "b l"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Returns the final normalised hidden states that predict each token."""
        ...

    def trunk(
        self,
        params: Params,
        tokens: Int[Array, "b l"],
        key_valid: Bool[Array, "b l"],
        clean: Int[Array, "b l"] | None = None,
    ) -> Any:
        """Returns the stream [b, l, d] that enters the last block, and what else that needs.

        Scoring only hands it to `last_hidden`; a network conditioned on time adds its condition.
        `clean` is the text without masks, for models that read it before each block
        (`Architecture.clean_context`); None: `tokens` are all that is known. Others ignore it.
        """
        ...

    def last_hidden(
        self,
        params: Params,
        stream: Any,
        key_valid: Bool[Array, "b l"],
        positions: Int[Array, "b k"],
    ) -> Float[Array, "b k d"]:
        """Returns the final hidden states that predict the tokens at `positions` (in 0..l-1).

        A shifted model's come from the positions before. Nothing predicts the token at 0 there:
        it takes the output at 0, which predicts something else (docs/differences.md), as every
        published reader of Dream does.
        """
        ...

    def output_at(
        self,
        params: Params,
        stream: Any,
        key_valid: Bool[Array, "b l"],
        positions: Int[Array, "b k"],
    ) -> Float[Array, "b k d"]:
        """Returns the final hidden states at `positions`, whichever token they predict.

        For what compares alignments; losses are read from `last_hidden`.
        """
        ...

    def logits(self, params: Params, hidden: Float[Array, "*k d"]) -> Float[Array, "*k v"]:
        """Returns vocabulary logits in the activation dtype."""
        ...

    def attention(
        self, params: Params, tokens: Int[Array, "b l"], key_valid: Bool[Array, "b l"]
    ) -> Float[Array, "b l l"]:
        """Returns attention weights (query, key), averaged over heads and layers, in float32."""
        ...

    def flops_per_text(self, length: int, scored: float) -> float:
        """Counts the operations of one pass that reads `scored` of `length` positions."""
        ...

    def with_cudnn(self) -> "Model | None":
        """Returns the model with cuDNN's attention; None if no device can compute that."""
        ...

    def with_split_heads(self) -> "Model":
        """Returns the model for a mesh that splits its attention heads over devices."""
        ...

"""Holds settings: frozen dataclasses, named presets, `key=value` overrides, hashes. No JAX.

Each setting is written once, as a field: its type, choices and default are also those of its flag,
and a `Flag` in its annotation says how the flag is shown.

A setting that changes a number is part of a hash (`settings_hash`) which names plans in the loss
store and is written into every result. Sources: arXiv 2601.20125 for `paper`, the published code
(`Stry233/SAMA`, commit 5ac7aa4, `attack/attacks/sama.py`) for `official`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

from sama_jax.errors import UsageError, nearest
from sama_jax.ranges import (
    Between,
    Count,
    CountOrNone,
    Flag,
    Length,
    Seed,
    Share,
    Weight,
    check,
    near,
    shown,
)

Schedule = Literal["paper", "code_linear", "geometric"]
Nesting = Literal["nested", "fresh"]
LossSource = Literal["recomputed", "stored_first"]
Weights = Literal["inverse_step", "inverse_rank", "uniform"]
Skip = Literal["keep", "per_text"]
Ties = Literal["zero", "half"]
Estimator = Literal["exact", "bernoulli"]
Padding = Literal["hidden", "visible"]
Dtype = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "xla", "cudnn"]

PLAN_NUMBERS = 2**24
"""Most positions in the subsets of one text: the plans of 8 texts then take 512 MiB."""
LOSS_NUMBERS = 2**25
"""Most losses of one text under one attack: those of 8 texts then take 1 GiB."""

LEAST_NOISE = 0.3
"""Noise multiplier below which epsilon of one step is above 10, and costly to compute."""

Settings = TypeVar("Settings")
"""One of the frozen dataclasses below."""


@dataclass(frozen=True, kw_only=True)
class SamaSettings:
    """Sets SAMA's probes and votes. Each switch of the published code and the paper is a field."""

    steps: Count = 16
    """T, mask densities a text is probed at (per repeat)."""
    subsets: Count = 128
    """N, random subsets that vote in each step."""
    subset_size: Count = 10
    """m, tokens in a subset; a step with fewer masked tokens votes with all of them."""
    min_density: Share = 0.05
    max_density: Share = 0.50
    schedule: Schedule = "paper"
    """`paper`: (t-1)/(T-1), ends included; `code_linear`: t/(T+1), ends excluded; `geometric`."""
    nesting: Nesting = "nested"
    """`nested`: each mask contains the one before; `fresh`: independent. Open in the paper."""
    loss_source: LossSource = "recomputed"
    """`stored_first` keeps a token's loss from the step that masked it first (published code)."""
    weights: Weights = "inverse_step"
    """`inverse_step`: 1/t; `inverse_rank`: 1/rank among recorded steps (published code)."""
    skip: Skip = "keep"
    """`per_text`: a step that masks nothing new is not recorded. (The published code decides this
    by batch, which makes a score depend on its batch mates: only a replayed plan can do that.)"""
    ties: Ties = "zero"
    repeats: Count = 1
    exclude_special: bool = False
    """Never masks tokens that the tokenizer added (begin, end)."""
    exclude_position0_when_shifted: bool = False
    """Never masks position 0 of a model whose logits are shifted: its loss is meaningless there."""

    def __post_init__(self):
        check(self)
        numbers = self.passes * self.subsets * self.subset_size
        if numbers > PLAN_NUMBERS:
            raise UsageError(
                f"steps times repeats times subsets times subset_size is {numbers:,}, expected at "
                f"most {PLAN_NUMBERS:,}"
            )
        if not 0 < self.min_density <= self.max_density <= 1:
            raise UsageError(
                "expected 0 < min_density <= max_density <= 1, got "
                f"{self.min_density} and {self.max_density}"
            )

    @property
    def passes(self) -> int:
        """Returns the forward passes of each model on one text."""
        return self.steps * self.repeats


_OF_PRESET = cast(SamaSettings, None)
"""Stands for the settings of the preset until the preset is known."""

PRESETS: dict[str, SamaSettings] = {
    "default": SamaSettings(),
    # Whether the paper's masks are nested is not known; see docs/differences.md.
    "paper": SamaSettings(nesting="fresh", repeats=4),
    "official": SamaSettings(
        schedule="code_linear",
        loss_source="stored_first",
        weights="inverse_rank",
        skip="per_text",
    ),
    "official-yaml": SamaSettings(
        steps=4,
        subset_size=8,
        schedule="code_linear",
        loss_source="stored_first",
        weights="inverse_rank",
        skip="per_text",
    ),
}


@dataclass(frozen=True, kw_only=True)
class LikelihoodSettings:
    """Sets the Monte-Carlo likelihood bound that Loss, ZLIB and Ratio read."""

    passes: CountOrNone = 0
    """Forward passes a text; 0 takes the run's budget."""
    estimator: Estimator = "exact"
    """`exact`: k of L tokens masked, k spread evenly over 1..L, weight L/k (LLaDA's evaluation);
    `bernoulli`: each token with probability p, weight 1/p (published code)."""
    eps: Share = 1e-3
    """Smallest Bernoulli probability."""

    def __post_init__(self):
        check(self)
        if not 0 < self.eps < 1:
            raise UsageError(f"likelihood.eps must lie between 0 and 1, got {self.eps}")


@dataclass(frozen=True, kw_only=True)
class TailSettings:
    """Sets Min-K%, Min-K%++ and the other means over the lowest values of a text."""

    fraction: Share = 0.2
    """Share of a text's tokens that count, the lowest ones; at least one token."""
    parts: Count = 4
    """Disjoint masks that together cover a text once: each masks one part in `parts`."""

    def __post_init__(self):
        check(self)
        if self.fraction == 0:
            raise UsageError("expected tail.fraction > 0, got 0")


@dataclass(frozen=True, kw_only=True)
class PrefixSettings:
    """Sets ReCaLL and CON-ReCall, which put other texts, visible, before the scored one."""

    shots: Count = 7
    """Texts of each class that make a prefix."""
    tokens: Count = 256
    """Longest prefix; what is too much is cut off at its beginning."""
    gamma: Weight = 1.0
    """Weight of the member prefix in CON-ReCall."""

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, kw_only=True)
class ComplementSettings:
    """Sets `complement`: disjoint masks cover a text once; the lowest differences count."""

    parts: CountOrNone = 0
    """Masks; 0 takes the run's budget of passes."""
    fraction: Share = 0.2
    """Share of the tokens, those with the lowest differences, that the score averages."""

    def __post_init__(self):
        check(self)
        if self.fraction == 0:
            raise UsageError("expected complement.fraction > 0, got 0")


@dataclass(frozen=True, kw_only=True)
class ItsSettings:
    """Sets ITS, which masks tokens that attend little to each other (`Chrisqcwx/DLLM-MIA`)."""

    attention: Weight = 1.0
    """a, weight of the attention between tokens."""
    balance: Weight = 0.1
    """lambda, weight of how often a token was masked already."""
    least: Count = 3
    """A token is drawn among this many of the lowest weights."""

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """Sets all that the numbers of an audit depend on, besides models and texts."""

    preset: Annotated[str, Flag(f"SAMA's settings by a name: {', '.join(PRESETS)}")] = "default"
    sama: SamaSettings = _OF_PRESET
    """Left out: those of the preset."""
    likelihood: LikelihoodSettings = field(default_factory=LikelihoodSettings)
    tail: TailSettings = field(default_factory=TailSettings)
    prefix: PrefixSettings = field(default_factory=PrefixSettings)
    complement: ComplementSettings = field(default_factory=ComplementSettings)
    its: ItsSettings = field(default_factory=ItsSettings)
    passes: Annotated[int, Between(0, 65535), Flag("forward passes of every attack", "Q")] = 0
    """Passes that each attack other than SAMA may spend on a text. 0: as many as SAMA."""
    max_length: Length = 512
    seed: Seed = 42
    dtype: Annotated[Dtype, Flag("auto: float32 on CPUs, else as the target is stored")] = "auto"
    attention: Attention = "auto"
    """`auto`: cuDNN's on one NVIDIA GPU in bfloat16 (`model_folder.with_attention`), else `xla`,
    what XLA makes of it."""
    padding: Annotated[Padding, Flag("visible: for set-ups that attend to it")] = "hidden"
    pad_to: Annotated[
        int, Between(0, 65535), Flag("length of visible padding; 0: max_length", "TOKENS")
    ] = 0

    def __post_init__(self):
        if self.sama is _OF_PRESET:
            object.__setattr__(self, "sama", preset(self.preset))
        check(self)
        parts = self.complement.parts, self.tail.parts
        most = max(self.sama.passes, self.budget, self.likelihood_passes, *parts)
        if most * self.max_length > LOSS_NUMBERS:
            raise UsageError(
                f"{most} passes over {self.max_length} tokens are more than {LOSS_NUMBERS:,} "
                "losses of a text: lower the passes of an attack, or max_length"
            )
        if self.pad_to and self.padding == "hidden":
            raise UsageError("pad_to has no effect while padding is hidden; add --padding visible")
        if self.pad_to and self.pad_to < self.max_length:
            raise UsageError(
                f"pad_to ({self.pad_to}) is smaller than max_length ({self.max_length})"
            )

    @classmethod
    def of(
        cls,
        preset: str = "default",
        *,
        passes: int | None = None,
        overrides: Sequence[str] = (),
        **fields: Any,
    ) -> "AuditSettings":
        """Returns the settings of a preset, with changes; flags, experiments and Python use it.

        Args:
          preset: one of `PRESETS`.
          passes: the budget of every attack, SAMA's steps included.
          overrides: `key=value`, applied last and together (see `override`).
          fields: other fields of this class, such as `max_length`; none of the overrides'.

        Raises:
          UsageError: an unknown name, a value that does not fit, or a setting given twice.
        """
        if any(text.partition("=")[0].strip() == "preset" for text in overrides):
            raise UsageError("setting preset is a name only; choose one with --preset")
        _require_once(overrides, [*fields, *(["passes"] if passes is not None else [])])
        settings = cls(preset=preset, **fields)
        return override(settings, [*_budget(settings.sama, passes), *overrides])

    @property
    def preset_label(self) -> str:
        """Returns the name of the preset, and says whether its settings were changed."""
        unchanged = self.sama == PRESETS.get(self.preset)
        return self.preset if unchanged else f"{self.preset}, changed"

    @property
    def budget(self) -> int:
        """Returns the forward passes of every attack; `passes` may be 0, which means SAMA's."""
        return self.passes or self.sama.passes

    @property
    def likelihood_passes(self) -> int:
        """Returns the passes of the likelihood estimate; 0 means the budget."""
        return self.likelihood.passes or self.budget


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Sets a low-rank adapter (LoRA, arXiv 2106.09685), by the names that PEFT gives them."""

    r: Annotated[int, Between(0, 65535)] = 0
    """Rank; 0: all weights are trained, and there is no adapter."""
    alpha: Annotated[float, Between(0, 1e6)] = 16
    """The adapter is scaled by alpha / r."""
    targets: str = "all"
    """Names of linear layers, joined by `+`, or `all` linear layers of the blocks."""
    rslora: bool = False
    """Scales by alpha / sqrt(r) instead (arXiv 2312.03732)."""

    def __post_init__(self):
        check(self)
        if self.alpha == 0:
            raise UsageError("lora.alpha must be positive, got 0")
        if not all(self.targets.split("+")):
            raise UsageError(
                f"lora.targets is {shown(self.targets)}; expected 'all', or names of linear layers "
                "such as q_proj+v_proj"
            )


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Sets differentially private training (DP-SGD, arXiv 1607.00133); the unit is one text.

    Give `epsilon`, for the noise that it takes, or `noise`; with neither, training is not private.
    """

    epsilon: Annotated[float, Between(0, 100)] = 0
    noise: Annotated[float, Between(0, 1e4)] = 0
    """Noise multiplier: the standard deviation over the largest norm of a text's gradient."""
    delta: Annotated[float, Between(0, 1)] = 1e-5
    clip: Annotated[float, Between(0, 1e9)] = 1.0
    """Largest norm of a text's gradient; a longer one is scaled down to it."""

    def __post_init__(self):
        check(self)
        if self.epsilon and self.noise:
            raise UsageError("dp.epsilon and dp.noise: the one follows from the other; give one")
        if 0 < self.noise < LEAST_NOISE:
            raise UsageError(f"dp.noise is {self.noise}; expected at least {LEAST_NOISE}")
        if not self.clip or not 0 < self.delta < 1:
            raise UsageError(
                "expected dp.clip above 0 and dp.delta between 0 and 1, got "
                f"{self.clip} and {self.delta}"
            )

    @property
    def is_private(self) -> bool:
        """Tells whether training is private at all."""
        return bool(self.epsilon or self.noise)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Sets masked-diffusion training (LLaDA, `GUIDELINES.md`): loss, optimiser, schedule."""

    epochs: Annotated[float, Between(0, 1e6), Flag("passes over the texts")] = 4.0
    batch_size: Annotated[int, Between(1, 65535), Flag("sequences in a step", "ROWS")] = 16
    accumulate: Annotated[
        int, Between(1, 65535), Flag("pieces of a step that are computed one by one, for memory")
    ] = 1
    learning_rate: Annotated[
        float, Between(0, 1000), Flag("peak learning rate", "RATE", "--lr")
    ] = 5e-5
    weight_decay: Annotated[float, Between(0, 1000)] = 0.1
    warmup_steps: Annotated[int, Between(-1, 10**9)] = -1
    """-1: a tenth of all steps, at most 500."""
    grad_clip: Annotated[float, Between(0, 1e9)] = 1.0
    max_length: Annotated[
        int, Between(2, 65535), Flag("tokens that a text is cut at", "TOKENS")
    ] = 512
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        Flag("of activations; parameters and optimiser state are float32"),
    ] = "float32"
    train_on_padding: Annotated[bool, Flag("learn padding, as the published trainer does")] = False
    """Pads to `max_length`; padding is seen, masked and learned."""
    windows: bool = False
    """Cuts long texts into consecutive windows instead of truncating them."""
    eps: Share = 1e-3
    seed: Annotated[int, Between(0, 2**32 - 1), Flag("of parameters, order and masks")] = 42
    checkpoint_every: Annotated[int, Between(1, 10**9)] = 200
    """Optimiser steps between checkpoints."""
    lora: Annotated[
        LoraSettings,
        Flag(
            "train a low-rank adapter in the place of all weights; OUT is then a folder of PEFT, "
            "for audit --adapter; besides: targets=q_proj+v_proj, rslora",
            "r=8,alpha=16",
        ),
    ] = LoraSettings()
    dp: Annotated[
        PrivacySettings,
        Flag(
            "train with differential privacy for each text, with --batch-size texts in a step on "
            "average; or noise=M in the place of epsilon",
            "epsilon=E,delta=1e-5,clip=1",
        ),
    ] = PrivacySettings()
    snapshot_every: Annotated[
        int,
        Between(0, 10**9),
        Flag(
            "also write the model every N steps, into OUT/snapshots (0: never)", "N", "--snapshots"
        ),
    ] = 0

    def __post_init__(self):
        check(self)
        for name in ("epochs", "learning_rate", "grad_clip"):
            if getattr(self, name) == 0:
                raise UsageError(f"{name} must be positive, got 0")
        if not 0 < self.eps < 1:
            raise UsageError(f"eps must lie between 0 and 1, got {self.eps}")
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"accumulate is {self.accumulate}; expected a divisor of batch_size, which is "
                f"{self.batch_size}"
            )
        if self.dp.is_private and self.windows:
            raise UsageError(
                "dp with windows: the unit of privacy is one text, and windows make several of "
                "it; leave windows out"
            )

    @classmethod
    def of(cls, *, overrides: Sequence[str] = (), **fields: Any) -> "TrainSettings":
        """Returns the settings of these fields and of `key=value` overrides, each given once."""
        _require_once(overrides, fields, groups={"lora", "dp"} & fields.keys())
        return override(cls(**fields), overrides)


def preset(name: str) -> SamaSettings:
    """Returns the SAMA settings of a named preset. Raises `UsageError`."""
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError(f"unknown preset {shown(name)}{near(name, PRESETS)}")
    return PRESETS[name]


def _budget(sama: SamaSettings, passes: int | None) -> list[str]:
    """Returns `--passes Q` as overrides: the budget of every attack, SAMA's steps included."""
    if passes is None:
        return []
    if type(passes) is not int or passes < 1:
        raise UsageError(f"--passes must be at least 1, got {shown(passes)}")
    if passes % sama.repeats:
        raise UsageError(
            f"--passes {passes}: the preset repeats its steps {sama.repeats} times; give a "
            f"multiple of {sama.repeats}"
        )
    return [f"passes={passes}", f"sama.steps={passes // sama.repeats}"]


def _require_once(
    assignments: Sequence[str], fields: Iterable[str], groups: Collection[str] = ()
) -> None:
    """Raises `UsageError` for a setting that is given twice: one of the values would be lost.

    A setting inside one of `groups`, which are given as a whole, counts as its group.
    """
    paths = [text.partition("=")[0].strip() for text in assignments]
    tops = [path.partition(".")[0] for path in paths]
    names = [*fields, *(top if top in groups else path for path, top in zip(paths, tops))]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"setting {shown(name)} is given twice; give it once")


def override(settings: Settings, assignments: Sequence[str]) -> Settings:
    """Returns settings with `key=value` applied; dots reach into groups: `sama.steps=8`.

    All are applied together, so that their order does not matter where one limits another.
    """
    values = dataclasses.asdict(cast(Any, settings))
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise UsageError(f"expected key=value, got '{assignment}'")
        _assign(settings, values, path.strip().split("."), text.strip(), path.strip())
    return from_dict(type(settings), values)


def _assign(settings: Any, values: dict[str, Any], path: list[str], text: str, full: str) -> None:
    hints = get_type_hints(type(settings))
    if path[0] not in hints:
        prefix = full[: len(full) - len(".".join(path))]
        known = [prefix + name for name in setting_names(settings)]
        raise UsageError(f"unknown setting '{full}'{nearest(full, known)}")
    group = getattr(settings, path[0])
    if dataclasses.is_dataclass(group):
        if len(path) == 1:
            inside = ", ".join(setting_names(group))
            raise UsageError(f"'{full}' is a group of settings; set one of: {inside}")
        _assign(group, values[path[0]], path[1:], text, full)
    elif len(path) > 1:
        raise UsageError(f"unknown setting '{full}': '{path[0]}' is not a group")
    else:
        values[path[0]] = _parse(text, hints[path[0]], full)


def _parse(text: str, kind: Any, name: str) -> Any:
    if kind is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise UsageError(f"setting {name} must be true or false, got '{text}'")
    if kind not in (int, float):  # a word: `_check` knows which
        return text
    try:
        if "_" in text:  # Python reads 1_2 as 12
            raise ValueError
        return kind(text)
    except ValueError:
        raise UsageError(f"setting {name} must be of type {kind.__name__}, got '{text}'") from None


def setting_names(settings: Any) -> list[str]:
    """Returns all dotted names below a settings object."""
    names = []
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        inner = setting_names(value) if dataclasses.is_dataclass(value) else None
        names += [f"{f.name}.{n}" for n in inner] if inner else [f.name]
    return names


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """Returns the dataclass that `dataclasses.asdict` was made of. Raises `UsageError`."""
    hints = get_type_hints(kind)
    unknown = [k for k in values if k not in hints]
    if unknown:
        raise UsageError(f"unknown settings {unknown}: written by another version of sama_jax")
    groups = {k: from_dict(hints[k], v) for k, v in values.items() if isinstance(v, dict)}
    return kind(**(values | groups))


def settings_hash(*parts: Any) -> str:
    """Returns 16 hex digits of dataclasses, dicts and plain values, equal in every process."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        return value

    text = json.dumps([plain(p) for p in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

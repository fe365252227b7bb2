"""What the programs are told to do: one dataclass a program, its fields also flags. No JAX.

The types of texts come from a module that imports JAX; they stand here as names alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sama_jax.config import AuditSettings, Flag
from sama_jax.devices import processes
from sama_jax.errors import UsageError
from sama_jax.untrusted import shown

if TYPE_CHECKING:
    import sama_jax.texts.read

Parallel = Literal["auto", "pmap", "sharded"]
Residency = Literal["auto", "together", "in-turn"]
MASKS = "full|block:N|clean:N|causal"


def _at_least_one(job: Any, *names: str) -> None:
    """Raises `UsageError` unless these fields are None or whole numbers above 0."""
    for name in names:
        value = getattr(job, name)
        if value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"{name} must be a whole number of at least 1, got {shown(value)}")


_PATHS = ("target", "out", "reference", "adapter", "split", "plan", "save_plan", "save_losses")
_PATHS += ("store",)
_set = object.__setattr__  # of a frozen dataclass, while it is made


def _path(given: Any) -> Any:
    """Makes a `Path` of a str, and of each in a sequence; the word "none" is left to the flags."""
    if isinstance(given, list | tuple):
        return type(given)(map(_path, given))
    if isinstance(given, str):
        return Path(given)
    if given is None or isinstance(given, Path):
        return given
    raise UsageError(f"expected a path, got {shown(given)}")


@dataclass(frozen=True, kw_only=True)
class AuditJob:
    """What to audit, and where the results go."""

    target: Annotated[Path, Flag("fine-tuned model", "DIR")]
    texts: "sama_jax.texts.read.Texts"
    out: Annotated[Path, Flag("results, or a run to continue", "DIR")]
    reference: Annotated[
        Path | Sequence[Path] | None,
        Flag("its base model; repeatable: the mean of several; none: attacks without one", "DIR"),
    ] = None
    """None: only attacks that read the target alone can be computed."""
    reference_tokenizer: Annotated[
        Literal["target", "own"],
        Flag("own: another one than the target's; losses are then summed over spans of the text"),
    ] = "target"
    attacks: Sequence[str] = ("all",)
    """Names; of `all`, those that cannot be computed here are left out and listed."""
    settings: AuditSettings = field(default_factory=AuditSettings)
    primary: Annotated[
        str | None, Flag("attack whose result is the headline (default: sama)", "NAME")
    ] = None
    family: Sequence[str] = ()
    """Attacks that are declared besides, corrected for their number; empty: the usual ones."""
    margin: Annotated[float | None, Flag('AUC of "nothing above" (default: 0.55)', "AUC")] = None
    adapter: Annotated[
        Path | Sequence[Path] | None,
        Flag("PEFT's adapter for --target (default: reference); repeatable, in their order", "DIR"),
    ] = None
    """Adapters on top of `target`, which is then usually the reference's folder."""
    mask_id: Annotated[int | None, Flag("replaces the mask token id of config.json")] = None
    attention_mask: Annotated[
        str | None,
        Flag("what both models were trained to see (default: as their folders say)", MASKS),
    ] = None
    reference_attention_mask: Annotated[
        str | None, Flag("where the reference was trained with another one", MASKS)
    ] = None
    prefixes: "sama_jax.texts.read.Texts | None" = None
    """Texts for the prefixes of ReCaLL and its kin; label 1: members. None: from `texts`."""
    control: "sama_jax.texts.read.Texts | None" = None
    """Known members besides, which the primary attack must find before "nothing above" is said."""
    pipeline_control: Annotated[
        bool, Flag("train the reference on 32 non-members, which must then be found")
    ] = False
    """Another control, which needs no known members, but shows less."""
    second_seed: Annotated[
        bool, Flag("score 100 texts once more, under other masks: are scores mostly luck?")
    ] = False
    split: Annotated[Path | None, Flag("split.json that drew these texts, to check", "F")] = None
    """What `sama-jax split` wrote: shows that the classes were drawn at random."""
    limit: Annotated[int | None, Flag("only the first N texts", "N")] = None

    windows: Annotated[bool, Flag("cut documents into windows of --max-length tokens")] = False
    """Each window is scored as a text; a document has the mean, and that of the largest."""
    stride: Annotated[
        int | None, Flag("tokens from one window to the next (default: their length)", "N")
    ] = None
    top_windows: Annotated[int, Flag("windows that count for the scores NAME@topK", "K")] = 3

    batch_size: Annotated[
        int | None,
        Flag("texts a device works on at once (default: by their length, as many as fit)", "ROWS"),
    ] = None
    parallel: Annotated[
        Parallel, Flag("pmap: models whole on every device; sharded: split over a mesh")
    ] = "auto"
    mesh: Annotated[
        str | None, Flag("rows over N devices, models over M (default: chosen)", "data=N,model=M")
    ] = None
    fully_sharded: Annotated[bool, Flag("split parameters over data, too")] = False
    models: Annotated[
        Residency, Flag("both in memory, or all of the target's passes first, then the reference's")
    ] = "auto"
    peers: processes.Peers = field(default_factory=processes.Peers)
    """The other processes of this run, if there are any."""

    plan: Annotated[Path | None, Flag("replay the probes of a plan file", "F")] = None
    """Replay file whose masks and subsets SAMA uses instead of its own."""
    save_plan: Annotated[Path | None, Flag("write SAMA's probes for a replay", "F")] = None
    save_losses: Annotated[Path | None, Flag("write SAMA's losses (npz)", "F")] = None
    store: Annotated[Path | None, Flag("loss store (default: OUT/losses)", "DIR")] = None
    include_text: Annotated[bool, Flag("copy texts into the results")] = False
    include_votes: Annotated[bool, Flag("write the votes of steps and tie rates")] = False
    figures: Annotated[bool, Flag("a report without pictures")] = True
    """Draws them, which takes a second or two."""

    strict: Annotated[bool, Flag("exit 5 if a validity gate fails")] = False
    dry_run: Annotated[bool, Flag("check the inputs, print the estimate, write nothing")] = False
    quiet: Annotated[bool, Flag("no progress, no table")] = False
    command: str = ""
    """What the results name as the command that made them."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """The flags of that command, for `audit.yaml`; without any, none is written."""

    def __post_init__(self):
        _at_least_one(self, "limit", "batch_size", "stride", "top_windows")
        for name in _PATHS:
            _set(self, name, _path(getattr(self, name)))
        for name in ("attacks", "family"):
            given = getattr(self, name)
            _set(self, name, (given,) if isinstance(given, str) else given)

    @property
    def references(self) -> list[Path]:
        """The references, as they were given."""
        given = () if self.reference is None else self.reference
        return [given] if isinstance(given, Path) else list(given)


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """What to plan."""

    model: Annotated[Path, Flag("model folder or config.json", "DIR|FILE")]
    topology: Annotated[
        str,
        Flag(
            "such as v5e:4x4, v6e:2x4, v5p:2x2x2, v4:2x2x4; cpu:8 for 8 simulated CPU devices",
            "NAME",
        ),
    ]
    mesh: Annotated[
        str | None, Flag("default: the fewest parts of the model that fit", "data=N,model=M")
    ] = None
    rows: Annotated[int | None, Flag("texts at once on each group of M chips", "N")] = None
    """Texts that each place along `data` works on at once; None: as an audit, or what fits."""
    settings: AuditSettings = field(default_factory=AuditSettings)
    attacks: Sequence[str] = ("sama",)
    texts: Annotated[int, Flag("number of texts", "N")] = 1000
    utilisation: Annotated[
        float, Flag("share of the chips' peak that is reached, for the time", "U")
    ] = 0.4
    models: int = 2
    """Resident at once: target and reference, or one after the other."""
    quiet: Annotated[bool, Flag("no progress")] = False


@dataclass(frozen=True, kw_only=True)
class BenchJob:
    """What to measure."""

    model: Annotated[Path, Flag("model folder", "DIR")]
    texts: "Sequence[sama_jax.texts.read.Text]"
    settings: AuditSettings
    windows: Annotated[
        bool, Flag("join the texts, cut them into pieces of --max-length tokens")
    ] = False
    limit: Annotated[int | None, Flag("only the first N texts, or pieces", "N")] = None
    batch_size: Annotated[int | None, Flag("texts a device works on at once", "ROWS")] = None
    torch: bool = False
    """Measures plain PyTorch in the same run."""
    rounds: Annotated[int, Flag("medians over N rounds are reported", "N")] = 5
    compile_cache: Path | None = None
    quiet: Annotated[bool, Flag("no progress")] = False

    def __post_init__(self):
        _at_least_one(self, "limit", "batch_size", "rounds")

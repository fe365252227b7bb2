"""What the programs are told to do: one dataclass a program, its fields also flags. No JAX.

The types of texts come from a module that imports JAX; they stand here as names alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sama_jax.config import AuditSettings
from sama_jax.devices import processes

if TYPE_CHECKING:
    import sama_jax.texts.data


@dataclass(frozen=True, kw_only=True)
class AuditJob:
    """What to audit, and where the results go."""

    target: Path
    reference: Path
    texts: "sama_jax.texts.data.Texts"
    out: Path
    attacks: Sequence[str] = ("all",)
    """Names; of `all`, those that cannot be computed here are left out and listed."""
    settings: AuditSettings = field(default_factory=AuditSettings)
    limit: int | None = None
    batch_size: int | None = None
    """Rows a device works on at once; None: from the padded length."""
    parallel: str = "auto"
    """`pmap`: every device holds the models; `sharded`: they are split over a mesh."""
    mesh: str | None = None
    """`data=N,model=M`; None: chosen."""
    fully_sharded: bool = False
    models: str = "auto"
    """`together`, or `in-turn`: all of the target's passes, then all of the reference's."""
    mask_id: int | None = None
    adapter: Path | None = None
    """LoRA adapter on top of `target`, which is then usually the reference's folder."""
    store: Path | None = None
    prefixes: "sama_jax.texts.data.Texts | None" = None
    """Texts for the prefixes of ReCaLL and its kin; label 1: members. None: from `texts`."""
    plan: Path | None = None
    """Replay file whose masks and subsets SAMA uses instead of its own."""
    save_plan: Path | None = None
    save_losses: Path | None = None
    include_text: bool = False
    include_votes: bool = False
    strict: bool = False
    dry_run: bool = False
    figures: bool = True
    """Draw them: a second or two."""
    quiet: bool = False
    command: str = ""
    peers: processes.Peers = field(default_factory=processes.Peers)
    """The other processes of this run, if there are any."""


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """What to plan."""

    model: Path
    """A model folder or a `config.json`."""
    topology: str
    """`v5e:4x4` and the like, or `cpu:8`: so many simulated devices of this machine."""
    mesh: str | None = None
    """`data=N,model=M`; None: the one with the fewest parts of the model that fits."""
    rows: int | None = None
    """Texts that each place along `data` works on at once; None: as an audit, or what fits."""
    settings: AuditSettings = field(default_factory=AuditSettings)
    attacks: Sequence[str] = ("sama",)
    texts: int = 1000
    utilisation: float = 0.4
    """Share of the chips' peak that the job is assumed to reach."""
    models: int = 2
    """Resident at once: target and reference, or one after the other."""
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class BenchJob:
    """What to measure."""

    model: Path
    texts: "Sequence[sama_jax.texts.data.Text]"
    settings: AuditSettings
    windows: bool = False
    """Join the texts and cut them into pieces of exactly `max_length` tokens."""
    limit: int | None = None
    batch_size: int | None = None
    torch: bool = False
    rounds: int = 5
    compile_cache: Path | None = None
    quiet: bool = False

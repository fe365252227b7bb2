"""What a report says, as plain values: `report.md` and `report.html` write the same.

No text of the audited collection and no id is in it.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sama_jax.core import metrics as measure
from sama_jax.core.metrics import AttackMetrics
from sama_jax.reporting.results import num_texts
from sama_jax.reporting.tables import MISSING, is_number
from sama_jax.storage.run_folder import Row

CITATION = (
    "The attack SAMA is from arXiv 2601.20125 (ICLR 2026). Cite that paper for the method; this "
    "report was made with `sama_jax`, an independent implementation that its authors have not "
    "reviewed."
)
LIMITS = (
    "AUC and TPR speak about membership only if members and non-members come from the same "
    "source; where they differ in topic, time or length, a score can tell them apart without the "
    "model.",
    "Only the declared attacks are corrected for their number; whatever else stands out in the "
    "table was picked after seeing the numbers, and may do so by chance.",
    "The score of one text is evidence, not a verdict, and its threshold holds for this split "
    "only.",
)
COLUMNS = (
    "TPR is the share of members found by a threshold that flags new non-members at most at the "
    "stated rate (FPR). Intervals are 95 %, each for one attack alone: AUC by "
    f"{measure.AUC_CI_METHOD}; TPR by binomials, mixed over the thresholds that these non-members "
    "leave possible. Attacks that read the same forward passes share their seconds. "
    f"{MISSING} means that there is no number; the notes say why."
)
"""What the columns of the table of attacks mean."""


class Fact(NamedTuple):
    """One line of a list: a name with a value, or a sentence."""

    name: str
    """Empty for a sentence."""
    value: str
    verbatim: bool = False
    """Whether the value is a path, a hash or a command rather than words of ours."""


class Note(NamedTuple):
    """A sentence, and the attacks that it holds for."""

    attacks: list[str]
    """Empty: all of them."""
    text: str


class Picture(NamedTuple):
    """A figure of report.html, and the numbers that it shows."""

    name: str
    title: str
    says: str
    """What is drawn, for those who see it and for those who cannot."""
    svg: str
    header: list[str]
    rows: list[list[str]]


def audited(rows: Sequence[Row], manifest: Mapping[str, Any]) -> list[Fact]:
    """Says which models and how many texts were audited."""
    facts = [
        Fact(role, plain(manifest[role]), True)
        for role in ("target", "adapter", "reference")
        if manifest.get(role)
    ]
    facts += references(manifest)
    labels = [row.get("label") for row in rows]
    counts = {"members": 1, "non-members": 0, "without a label": None}
    shares = [f"{labels.count(v)} {word}" for word, v in counts.items() if labels.count(v)]
    facts.append(Fact("texts", f"{len(rows)}" + (f" ({', '.join(shares)})" if shares else "")))
    truncated = sum(bool(row.get("truncated")) for row in rows)
    if truncated:
        said = f"{num_texts(truncated)} cut at the maximum length: only the start was scored"
        facts.append(Fact("", said))
    cut = [count for row in rows if (count := row.get("prompt_cut", 0))]
    if cut:
        said = f"{len(cut)}, by {sum(cut):,} tokens in all"
        facts.append(Fact("prompts cut at their beginning", said))
    unscored = sum(
        not any(is_number(s) for s in (row.get("scores") or {}).values()) for row in rows
    )
    if unscored:
        said = f"{num_texts(unscored)} without any score (see `status` in `scores.jsonl`)"
        facts.append(Fact("", said))
    return facts


def references(manifest: Mapping[str, Any]) -> list[Fact]:
    """Says what is unusual about a run's reference: none, several, or one of another tokenizer."""
    if manifest.get("target") and not manifest.get("reference"):
        return [Fact("no reference", "only attacks that read the target alone were computed")]
    if isinstance(manifest.get("reference"), list):
        count = len(manifest["reference"])
        return [Fact("", f"{count} references: each of their losses is the mean of {count}")]
    if own := manifest.get("reference_tokenizer"):
        return [Fact("tokenizer of the reference", own)]
    return []


def attack_notes(attacks: Mapping[str, AttackMetrics]) -> list[Note]:
    """Gives each note about attacks once, with the attacks that it holds for."""
    holders: dict[str, list[str]] = {}
    for name, found in attacks.items():
        for note in found.get("notes") or []:
            holders.setdefault(note, []).append(name)
    return [
        Note(names if len(names) < len(attacks) else [], note) for note, names in holders.items()
    ]


def settings(manifest: Mapping[str, Any]) -> list[Fact]:
    """Says how the run was made."""
    names = ("preset", "preset_hash", "seed", "dtype", "attention_mask", "device", "versions")
    facts = references(manifest)
    facts += [
        Fact(name.replace("_", " "), plain(manifest[name]), True)
        for name in names
        if manifest.get(name) not in (None, "", {}, [])
    ]
    command = manifest.get("command")
    if command:
        words = command if isinstance(command, str) else shlex.join(map(str, command))
        facts.append(Fact("command", words, True))
    return facts or [Fact("", "not recorded")]


def plain(value: Any) -> str:
    """Writes a manifest value on one line: `key value, key value` for mappings."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return str(value)

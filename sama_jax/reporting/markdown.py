"""The text of report.md. No text of the audited collection and no id is printed."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sama_jax.core import metrics as measure
from sama_jax.core.metrics import AttackMetrics
from sama_jax.reporting.results import Metrics, Paired, headline, num_texts, paired_text
from sama_jax.reporting.tables import MISSING, header, is_number, table_rows
from sama_jax.reporting.verdict import Declared
from sama_jax.storage.run_folder import Row
from sama_jax.untrusted import printable
from sama_jax.validity.gate import Gate

_CITATION = """\
The attack SAMA is from arXiv 2601.20125 (ICLR 2026). Cite that paper for the method; this report
was made with `sama_jax`, an independent implementation that its authors have not reviewed."""

_LIMITS = """\
- AUC and TPR speak about membership only if members and non-members come from the same source;
  where they differ in topic, time or length, a score can tell them apart without the model.
- Only the declared attacks are corrected for their number; whatever else stands out in the table
  was picked after seeing the numbers, and may do so by chance.
- The score of one text is evidence, not a verdict, and its threshold holds for this split only."""


def markdown(
    rows: Sequence[Row], metrics: Metrics, manifest: Mapping[str, Any], figures: bool = True
) -> str:
    """Writes the text of report.md; with `figures`, it links the pictures in `figures/`."""
    attacks = metrics["attacks"]
    parts = ["# Membership-inference audit", _escape(headline(metrics)), "## What was audited"]
    parts.append(_bullets(_audited(rows, manifest)))
    parts += ["## Results", _markdown_table(table_rows(metrics, rows, manifest.get("cost")))]
    parts.append(
        "TPR is the share of members found by a threshold that flags new non-members at most at "
        "the stated rate (FPR). Intervals are 95 %, each for one attack alone: AUC by "
        f"{measure.AUC_CI_METHOD}; TPR by binomials, mixed over the thresholds that these "
        "non-members leave possible. Attacks that read the same forward passes share their "
        "seconds. "
        f"{MISSING} means that there is no number; the notes say why."
    )
    if declared := metrics["verdict"].get("declared"):
        parts += ["## What was declared before the first pass", _declared_table(metrics, declared)]
    if metrics["validity"]:
        parts += ["## Whether it can be trusted", _gates_table(metrics["validity"])]
    if figures and any(a.get("auc") is not None for a in attacks.values()):
        parts.append("![ROC of each attack](figures/roc.png)")
    scores = (s for row in rows for s in (row.get("scores") or {}).values())
    if figures and any(map(is_number, scores)):
        parts.append("![Scores of each attack](figures/scores.png)")
    if compared := metrics.get("paired"):
        parts += ["## Differences on the same texts", _paired_table(compared)]
    notes = _attack_notes(attacks) + [_escape(note) for note in manifest.get("notes") or []]
    if notes:
        parts += ["## Notes", _bullets(notes)]
    parts += ["## What this does not show", _LIMITS, "## Settings"]
    parts += [_bullets(_settings(manifest)), "## How to cite", _CITATION]
    return "\n\n".join(part for part in parts if part) + "\n"


def _audited(rows: Sequence[Row], manifest: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{role}: {_code(_plain(manifest[role]))}"
        for role in ("target", "reference")
        if manifest.get(role)
    ]
    labels = [row.get("label") for row in rows]
    counts = {"members": 1, "non-members": 0, "without a label": None}
    shares = [f"{labels.count(v)} {word}" for word, v in counts.items() if labels.count(v)]
    lines.append(f"texts: {len(rows)}" + (f" ({', '.join(shares)})" if shares else ""))
    truncated = sum(bool(row.get("truncated")) for row in rows)
    if truncated:
        lines.append(f"{num_texts(truncated)} cut at the maximum length: only the start was scored")
    unscored = sum(
        not any(is_number(s) for s in (row.get("scores") or {}).values()) for row in rows
    )
    if unscored:
        lines.append(f"{num_texts(unscored)} without any score (see `status` in `scores.jsonl`)")
    return lines


def _attack_notes(attacks: Mapping[str, AttackMetrics]) -> list[str]:
    """Writes each note once, with the attacks that it holds for."""
    holders: dict[str, list[str]] = {}
    for name, found in attacks.items():
        for note in found.get("notes") or []:
            holders.setdefault(note, []).append(name)
    return [
        f"{', '.join(map(_code, names)) if len(names) < len(attacks) else 'All attacks'}: {note}"
        for note, names in holders.items()
    ]


def _settings(manifest: Mapping[str, Any]) -> list[str]:
    names = ("preset", "preset_hash", "seed", "dtype", "device", "versions")
    lines = [
        f"{name.replace('_', ' ')}: {_code(_plain(manifest[name]))}"
        for name in names
        if manifest.get(name) not in (None, "", {}, [])
    ]
    command = manifest.get("command")
    if command:
        words = command if isinstance(command, str) else shlex.join(map(str, command))
        lines.append(f"command: {_code(words)}")
    return lines or ["not recorded"]


def _markdown_table(cells: list[list[str]]) -> str:
    if not cells:
        return "No attack has scores."
    names = header()
    lines = [names, ["---"] + ["---:"] * (len(names) - 1)]
    lines += [[_cell(row[0]), *row[1:]] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _declared_table(metrics: Metrics, declared: Mapping[str, Declared]) -> str:
    verdict = metrics["verdict"]
    lines = [
        f"Primary attack {_code(verdict.get('primary', ''))}, one-sided level "
        f"{verdict.get('alpha')}, margin {verdict.get('margin')}. Intervals hold for all declared "
        "attacks at once (95 %); p-values are from permuted labels, corrected by step-down max-T.",
        "",
        "| declared attack | AUC (simultaneous interval) | p | corrected p |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, found in declared.items():
        low, high = found["simultaneous_ci"]
        lines.append(
            f"| {_cell(name)} | {found['auc']:.3f} ({low:.3f}–{high:.3f}) | {found['p']:.4f} | "
            f"{found['adjusted_p']:.4f} |"
        )
    if excess := verdict.get("excess"):
        low, high = excess["ci"]
        lines += [
            "",
            f"The best baseline that sees no model has an AUC of {excess['baseline_auc']:.3f}; the "
            f"primary attack's is {excess['difference']:+.3f} ({low:+.3f} to {high:+.3f}) beyond.",
        ]
    return "\n".join(lines)


def _gates_table(gates: Sequence[Gate]) -> str:
    """Writes all gates, those that void or weaken the result first."""
    order = ("void", "warn", "not run", "pass")
    lines = ["| gate | | what was found |", "| --- | --- | --- |"]
    for one in sorted(gates, key=lambda one: order.index(one["status"])):
        said = _escape(f"{one['sentence']} {one['remedy']}".strip())
        lines.append(f"| {_cell(one['name'])} | {one['status']} | {said} |")
    return "\n".join(lines)


def _cell(name: str) -> str:
    """Writes a name as code in a table's cell."""
    return _code(name).replace("|", "\\|")


def _paired_table(compared: Mapping[str, Paired]) -> str:
    lines = ["| attacks | AUC difference (95 % interval) |", "| --- | ---: |"]
    for name, entry in compared.items():
        shown = paired_text(entry["difference"], entry["ci"])
        lines.append(f"| {_cell(name)} | {shown} |")
    return "\n".join(lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(value: Any) -> str:
    """Writes a manifest value on one line: `key value, key value` for mappings."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)


def _code(text: str) -> str:
    """Writes inline code that shows `text` literally, but for bars, which tables need escaped."""
    text = printable(" ".join(str(text).split()), len(text))
    runs = [len(run) for run in "".join(c if c == "`" else " " for c in text).split()]
    fence = "`" * (max(runs, default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _escape(text: str) -> str:
    """Writes free text on one line, with nothing that Markdown or HTML would interpret."""
    line = printable(" ".join(str(text).split()), len(text))
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!~" else c for c in line)

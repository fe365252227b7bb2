"""The text of report.md. No text of the audited collection and no id is printed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sama_jax.reporting import content
from sama_jax.reporting.content import Fact, Note
from sama_jax.reporting.results import Metrics, Paired, headline, paired_text
from sama_jax.reporting.tables import header, is_number, table_rows
from sama_jax.reporting.verdict import Declared
from sama_jax.storage.run_folder import Row
from sama_jax.untrusted import printable
from sama_jax.validity.gate import Gate


def markdown(
    rows: Sequence[Row], metrics: Metrics, manifest: Mapping[str, Any], figures: bool = True
) -> str:
    """Writes the text of report.md; with `figures`, it links the pictures in `figures/`."""
    attacks = metrics["attacks"]
    parts = ["# Membership-inference audit", _escape(headline(metrics)), "## What was audited"]
    parts.append(_bullets(map(_fact, content.audited(rows, manifest))))
    parts += ["## Results", _markdown_table(table_rows(metrics, rows, manifest.get("cost")))]
    parts.append(content.COLUMNS)
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
    notes = [_note(note) for note in content.attack_notes(attacks)]
    notes += [_escape(note) for note in manifest.get("notes") or []]
    if notes:
        parts += ["## Notes", _bullets(notes)]
    parts += ["## What this does not show", _bullets(content.LIMITS), "## Settings"]
    parts += [_bullets(map(_fact, content.settings(manifest)))]
    parts += ["## How to cite", content.CITATION]
    return "\n\n".join(part for part in parts if part) + "\n"


def _fact(fact: Fact) -> str:
    value = _code(fact.value) if fact.verbatim else fact.value
    return f"{fact.name}: {value}" if fact.name else value


def _note(note: Note) -> str:
    """Writes a note behind the attacks that it holds for."""
    return f"{', '.join(map(_code, note.attacks)) or 'All attacks'}: {note.text}"


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

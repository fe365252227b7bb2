"""Compares runs on the same texts: several targets, by attack, each difference paired."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict

from markupsafe import Markup
from rich.table import Table

from sama_jax.errors import UsageError
from sama_jax.reporting.html import source, templates
from sama_jax.reporting.results import Metrics, attack_names, paired, paired_text
from sama_jax.reporting.tables import MISSING
from sama_jax.storage.run_folder import Row
from sama_jax.validity.gate import voids

_SAME = ("data", "tokens", "tokenizer")
"""Parts of a run's identity without which its texts are others."""
_READ = ("attention", "attention_mask", "dtype", "mask_id", "padding")
"""How a target is read. Targets may differ in all else: their weights, adapters, architectures."""
NOTE = (
    "Intervals are 95 %, each for one number alone. A difference is that of AUCs on the texts that "
    "both runs scored; nothing corrects for how many are shown, and two targets that were trained "
    "once each may differ by the luck of training."
)


class Finished(NamedTuple):
    """A run to be compared."""

    name: str
    rows: Sequence[Row]
    manifest: Mapping[str, Any]
    metrics: Metrics


class Cell(TypedDict):
    """One attack in one run."""

    auc: float | None
    ci: list[float] | None
    difference: float | None
    """AUC of this run minus that of the first; None: this is the first, or they share no texts."""
    difference_ci: list[float] | None
    """None also where both runs put the texts in the same order."""


class Line(TypedDict):
    """One run."""

    name: str
    verdict: str
    void: list[str]
    """Gates that void it; its numbers then mean nothing."""
    differs: list[str]
    """What else than the target is not as in the first run."""
    attacks: dict[str, Cell]


def compare(runs: Sequence[Finished]) -> list[Line]:
    """Compares runs with the first, in every attack that all of them have.

    Raises:
      UsageError: fewer than two runs, other texts, or no attack in common.
    """
    if len(runs) < 2:
        raise UsageError(f"a comparison is of at least two runs, got {len(runs)}")
    first = runs[0]
    for run in runs[1:]:
        _require_same_texts(first, run)
    common = [a for a in attack_names(first.rows) if all(a in attack_names(r.rows) for r in runs)]
    if not common:
        raise UsageError(
            f"{', '.join(run.name for run in runs)}: have no attack in common; add one with "
            "`sama-jax audit --attacks NAME` on the same --out"
        )
    return [
        {
            "name": run.name,
            "verdict": run.metrics["verdict"]["kind"],
            "void": [gate["name"] for gate in voids(run.metrics["validity"])],
            "differs": _differs(first, run),
            "attacks": {attack: _cell(first, run, attack) for attack in common},
        }
        for run in runs
    ]


def _require_same_texts(first: Finished, run: Finished) -> None:
    """Raises `UsageError` unless both runs read the same tokens of the same texts."""
    a, b = (one.manifest.get("run") or {} for one in (first, run))
    other = [name for name in _SAME if a.get(name) != b.get(name)]
    ids = [[(row["id"], row.get("label")) for row in one.rows] for one in (first, run)]
    if other or ids[0] != ids[1]:
        raise UsageError(
            f"{first.name} and {run.name}: are not of the same texts "
            f"({', '.join(other) or 'ids or labels'} differ); compare runs on one file of texts, "
            "with one --max-length and one tokenizer"
        )


def _differs(first: Finished, run: Finished) -> list[str]:
    a, b = (one.manifest.get("run") or {} for one in (first, run))
    names = sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
    read = {f"target.{name}" for name in _READ}
    return [name for name in names if not name.startswith("target.") or name in read]


def _cell(first: Finished, run: Finished, attack: str) -> Cell:
    own = run.metrics["attacks"].get(attack)
    cell: Cell = {"auc": None, "ci": None, "difference": None, "difference_ci": None}
    if own is None or own["auc"] is None:
        return cell
    cell["auc"], cell["ci"] = own["auc"], own["auc_ci"]
    base = first.metrics["attacks"].get(attack)
    if run is first or base is None or base["auc"] is None:
        return cell
    joined: list[Any] = [
        {**row, "scores": {"run": _score(row, attack), "first": _score(before, attack)}}
        for row, before in zip(run.rows, first.rows)
    ]
    found = paired(joined, "run", "first")
    cell["difference"], cell["difference_ci"] = found["difference"], found["ci"]
    return cell


def _score(row: Row, attack: str) -> float | None:
    return (row.get("scores") or {}).get(attack)


# --- showing it -----------------------------------------------------------------------------------


def first_lines(
    lines: Sequence[Line], without: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Says what has to be known before the numbers are read.

    Args:
      lines: of the runs.
      without: name -> why it has no result, of what would be a run.
    """
    said = [f"no result: {name} ({reason})" for name, reason in without.items()]
    said += [
        f"void: {line['name']} ({', '.join(line['void'])}); its numbers mean nothing"
        for line in lines
        if line["void"]
    ]
    return said + [
        f"{line['name']} differs from {lines[0]['name']} in more than its target: "
        f"{', '.join(line['differs'])}"
        for line in lines
        if line["differs"]
    ]


def cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of the table: one row a run and attack."""
    header = ["attack", "run", "AUC", f"minus {lines[0]['name']}"]
    rows = []
    for attack in lines[0]["attacks"]:
        for line in lines:
            cell = line["attacks"][attack]
            rows.append([attack, line["name"], _auc(cell), _difference(cell)])
    return header, rows


def _auc(cell: Cell) -> str:
    if cell["auc"] is None:
        return MISSING
    ci = cell["ci"]
    return f"{cell['auc']:.3f}" + (f" ({ci[0]:.3f}–{ci[1]:.3f})" if ci else "")


def _difference(cell: Cell) -> str:
    if cell["difference"] is None:
        return ""
    return paired_text(cell["difference"], cell["difference_ci"])


def table(lines: Sequence[Line]) -> Table:
    """Returns the table for a terminal."""
    header, rows = cells(lines)
    made = Table(*header)
    for row in rows:
        made.add_row(*row)
    return made


def page(lines: Sequence[Line], without: Mapping[str, str] = MappingProxyType({})) -> str:
    """Returns one HTML file that loads and runs nothing: a figure and the table."""
    from sama_jax.reporting import svg  # Matplotlib: a second to import

    environment = templates()
    style = source(environment, "report.css")
    header, rows = cells(lines)
    series = {
        attack: [(line["attacks"][attack]["auc"], line["attacks"][attack]["ci"]) for line in lines]
        for attack in lines[0]["attacks"]
    }
    figures = [svg.draw_runs([line["name"] for line in lines], series)]
    return environment.get_template("comparison.html.j2").render(
        style=Markup(style),
        notes=first_lines(lines, without),
        header=header,
        rows=rows,
        verdicts=[(line["name"], line["verdict"]) for line in lines],
        figures=[one._replace(svg=Markup(one.svg)) for one in figures],
        note=NOTE,
    )

"""The report of a finished run: metrics, tables, figures, Markdown.

Reads a run folder and nothing else: `scores.jsonl` (one object a text), `metrics.json` (computed
here if absent) and `manifest.json`. Writes `report.md` and `figures/`. No text of the audited
collection and no id is printed. `rows` are always the parsed lines of `scores.jsonl`.
"""

import io
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from sama_jax.core import metrics as measure
from sama_jax.errors import UsageError
from sama_jax.storage.files import write_atomic

Row = dict[str, Any]
Metrics = dict[str, Any]

COLUMNS = (
    "attack",
    "AUC (95 % interval)",
    "TPR at 10 % FPR",
    "TPR at 1 % FPR",
    "passes (a model and text)",
    "seconds",
)
MISSING = "–"
MAIN_ATTACK = "sama"
"""The attack that the paired differences compare the others with."""

# Okabe and Ito's palette, told apart with every common colour blindness; a line style as well
# once the colours are used up.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_MEMBER, _NONMEMBER = "#D55E00", "#0072B2"

_CITATION = """\
The attack SAMA is from arXiv 2601.20125 (ICLR 2026). Cite that paper for the method; this report
was made with `sama_jax`, an independent implementation that its authors have not reviewed."""

_LIMITS = """\
- AUC and TPR speak about membership only if members and non-members come from the same source;
  where they differ in topic, time or length, a score can tell them apart without the model.
- The strongest of several attacks is picked after seeing the numbers, which flatters it a little.
- The score of one text is evidence, not a verdict, and its threshold holds for this split only."""


# ---------------------------------------------------------------------------------------------
# Metrics and tables


def compute_metrics(rows: list[Row], seed: int) -> Metrics:
    """The content of metrics.json from the rows alone.

    `attacks` holds `metrics.summarize` of each attack in the order of the rows, over the labelled
    texts that have a score (a note counts the others); it is empty if no text has a label.
    `paired` holds, if SAMA is one of several attacks, `"sama - NAME"` -> AUC `difference` and
    `ci` on the texts that both scored.
    """
    labelled = [row for row in rows if row.get("label") is not None]
    if not labelled:
        return {"attacks": {}}
    names, attacks = attack_names(rows), {}
    for name in names:
        scores, labels, dropped = measure.usable(*_column(labelled, name))
        attacks[name] = measure.summarize(scores, labels, seed=seed)
        if dropped:
            attacks[name]["notes"].append(f"{_texts(dropped)} with a label but no score left out.")
    content: Metrics = {"attacks": attacks}
    paired = _paired(labelled, names, seed)
    return content | ({"paired": paired} if paired else {})


def _paired(labelled: list[Row], names: list[str], seed: int) -> dict[str, Any]:
    paired = {}
    for other in (name for name in names if name != MAIN_ATTACK and MAIN_ATTACK in names):
        a, labels = _column(labelled, MAIN_ATTACK)
        b, _ = _column(labelled, other)
        both = np.isfinite(a) & np.isfinite(b)
        classes = labels[both]
        if set(classes.tolist()) != {0, 1}:
            continue
        difference, low, high = measure.paired_difference(a[both], b[both], classes, seed=seed)
        paired[f"{MAIN_ATTACK} - {other}"] = {
            "difference": difference,
            "ci": [low, high],
            "n_members": int((classes == 1).sum()),
            "n_nonmembers": int((classes == 0).sum()),
        }
    return paired


def attack_names(rows: Iterable[Row]) -> list[str]:
    """All attacks of the rows, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.get("scores") or {}))


def table_rows(
    metrics: Metrics, rows: Sequence[Row] = (), cost: dict[str, Any] | None = None
) -> list[list[str]]:
    """One list of cells an attack, in the order of `COLUMNS`; `MISSING` where there is no number.

    `cost` is the manifest's: `cost["seconds"]` maps an attack to its seconds.
    """
    attacks = metrics.get("attacks") or {}
    seconds = (cost or {}).get("seconds")
    seconds = seconds if isinstance(seconds, dict) else {}
    return [
        [
            name,
            _auc_cell(attacks.get(name, {})),
            _tpr_cell(attacks.get(name, {}), "0.1"),
            _tpr_cell(attacks.get(name, {}), "0.01"),
            _passes_cell(rows, name),
            f"{seconds[name]:.1f}" if _is_number(seconds.get(name)) else MISSING,
        ]
        for name in (attacks or attack_names(rows))
    ]


def metrics_table(
    metrics: Metrics, rows: Sequence[Row] = (), cost: dict[str, Any] | None = None
) -> Table:
    """`table_rows` for the terminal."""
    table = Table(
        box=None, padding=(0, 1), pad_edge=False, collapse_padding=True, header_style="bold"
    )
    for i, column in enumerate(COLUMNS):
        # Headers break before their parenthesis so that 80 columns hold every cell unbroken.
        header = column.replace("passes (a model and text)", "passes a\nmodel\nand text")
        table.add_column(
            header.replace(" (", "\n("),
            justify="right" if i else "left",
            vertical="bottom",
            no_wrap=i == 0,  # a name cut in two cannot be copied
        )
    for cells in table_rows(metrics, rows, cost):
        table.add_row(*(Text(cell) for cell in cells))  # Text: brackets are not markup
    return table


def headline(metrics: Metrics) -> str:
    """Two plain sentences: what the strongest attack achieved, and what that does not show."""
    attacks = metrics.get("attacks") or {}
    measured = {name: a for name, a in attacks.items() if a.get("auc") is not None}
    caution = (
        "A low result is not proof of safety, because a stronger attack may exist, and scores of "
        "texts outside this split are not calibrated."
    )
    if not measured:
        return (
            "Without labelled members and non-members nothing can be said about how well the "
            f"attacks work here. {caution}"
        )
    name = max(measured, key=lambda n: measured[n]["auc"])
    return f"{_finding(name, measured[name], len(measured))} {caution}"


def _finding(name: str, summary: dict[str, Any], num_attacks: int) -> str:
    subject = f"The strongest attack, {name}," if num_attacks > 1 else f"The attack {name}"
    low, high = summary["auc_ci"]
    interval = f"AUC {summary['auc']:.3f}, 95 % interval {low:.3f} to {high:.3f}"
    if high < 0.5:
        return (
            f"{subject} ranks members below non-members ({interval}), "
            "so the labels may be swapped or the reference may fit the members better."
        )
    if low <= 0.5:
        return f"{subject} cannot be told from guessing on these texts ({interval})."
    tpr = summary["tpr_at_fpr"].get("0.1")
    share = ""
    if tpr is not None:
        share = (
            f" and finds {tpr['tpr'] * 100:.0f} % of the members "
            "while flagging at most 10 % of the non-members"
        )
    return f"{subject} tells members from non-members better than guessing ({interval}){share}."


def _auc_cell(summary: dict[str, Any]) -> str:
    if summary.get("auc") is None:
        return MISSING
    low, high = summary["auc_ci"]
    return f"{summary['auc']:.3f} ({low:.3f}–{high:.3f})"


def _tpr_cell(summary: dict[str, Any], fpr: str) -> str:
    result = (summary.get("tpr_at_fpr") or {}).get(fpr)
    if result is None:
        return MISSING
    low, high = (100 * x for x in result["ci"])
    digits = 0 if low >= 10 else 1
    return f"{100 * result['tpr']:.1f} % ({low:.{digits}f}–{high:.{digits}f})"


def _passes_cell(rows: Iterable[Row], name: str) -> str:
    scored = [row for row in rows if (row.get("scores") or {}).get(name) is not None]
    found = [(row.get("passes") or {}).get(name) for row in scored]
    passes = [p for p in found if p is not None]
    if not passes:
        return MISSING
    return "–".join(f"{p:g}" for p in sorted({min(passes), max(passes)}))


def _column(rows: Sequence[Row], name: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores of one attack (NaN where missing) and labels, -1 for texts without one."""
    scores = [(row.get("scores") or {}).get(name) for row in rows]
    labels = [-1 if row.get("label") is None else int(row["label"]) for row in rows]
    return np.array(scores, dtype=np.float64), np.array(labels, dtype=np.int64)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _texts(count: int) -> str:
    return "1 text" if count == 1 else f"{count} texts"


# ---------------------------------------------------------------------------------------------
# Figures


def write_figures(folder: Path, rows: list[Row]) -> list[Path]:
    """Writes `figures/roc.png` (if there are both classes) and `figures/scores.png`.

    Returns the paths written; none if no text has a score.
    """
    columns = {}
    for name in attack_names(rows):
        scores, labels, _ = measure.usable(*_column(rows, name))
        if scores.size:
            columns[name] = (scores, labels)
    written = []
    both = {n: c for n, c in columns.items() if {0, 1} <= set(c[1].tolist())}
    for name, draw, content in (("roc", _draw_roc, both), ("scores", _draw_scores, columns)):
        if content:
            path = Path(folder) / "figures" / f"{name}.png"
            _save(draw(content), path)
            written.append(path)
    return written


def _new_figure(
    width: float, height: float, layout: Literal["constrained"] | None = None
) -> Figure:
    """A figure of its own: pyplot would add global state and may open a window."""
    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    # No software tag: the same scores give the same file under every matplotlib patch release.
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    write_atomic(path, image.getvalue())


def _draw_roc(columns: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]) -> Figure:
    """Log-log ROC, drawn as the steps that `metrics.tpr_at_fpr` reads (no interpolation)."""
    labelled = {name: (s[y >= 0], y[y >= 0]) for name, (s, y) in columns.items()}
    n_nonmembers = max(int((y == 0).sum()) for _, y in labelled.values())
    n_members = max(int((y == 1).sum()) for _, y in labelled.values())
    left, bottom = 1 / (2 * n_nonmembers), 1 / (2 * n_members)
    figure = _new_figure(6.4, 5.6, "constrained")
    axes = figure.add_subplot()
    for i, (name, (scores, labels)) in enumerate(labelled.items()):
        fpr, tpr, _ = measure.roc_points(scores, labels)
        axes.plot(
            np.maximum(fpr, left),  # a rate of 0 lies on the edge of a logarithmic axis
            np.maximum(tpr, bottom),
            drawstyle="steps-post",
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=_STYLES[i // len(_COLOURS) % len(_STYLES)],
            linewidth=1.8,
            label=f"{name}, AUC {measure.auc(scores, labels):.3f}",
        )
    ends = np.geomspace(min(left, bottom), 1, 2)
    axes.plot(ends, ends, color="0.45", linestyle=(0, (5, 3)), linewidth=1, label="guessing")
    floor = f"1 of {n_nonmembers} non-members"
    axes.axvspan(left, 1 / n_nonmembers, color="0.93", zorder=0)
    axes.axvline(1 / n_nonmembers, color="0.6", linewidth=1, linestyle=":", label=floor)
    axes.set(xscale="log", yscale="log", xlim=(left, 1), ylim=(bottom, 1.05))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g} %"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("false-positive rate (share of non-members flagged)")
    axes.set_ylabel("true-positive rate (share of members found)")
    axes.set_title("ROC of each attack, both axes logarithmic", fontsize=11)
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    _legend(axes, len(labelled))
    return figure


def _legend(axes: Axes, num_attacks: int) -> None:
    """Below the diagonal where it fits; beside the axes if it would cover curves."""
    if num_attacks <= 7:
        axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    else:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7, borderaxespad=0)


def _draw_scores(columns: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]) -> Figure:
    """One histogram an attack; bars are shares of a class, so unequal classes compare."""
    num_columns = 2 if len(columns) == 4 else min(3, len(columns))
    num_rows = math.ceil(len(columns) / num_columns)
    width, height = max(4.5, 3.4 * num_columns), 2.7 * num_rows + 0.5
    figure = _new_figure(width, height)
    # Margins in inches. Matplotlib's layout would draw everything twice more: 8 s for 34 attacks
    # instead of 2.
    left, right, bottom, top, between, below = 0.7, 0.15, 0.95, 0.35, 0.55, 0.8
    panel = (width - left - right + between) / num_columns - between
    panel_height = (height - bottom - top + below) / num_rows - below
    figure.subplots_adjust(
        left / width, bottom / height, 1 - right / width, 1 - top / height,
        between / panel, below / panel_height,
    )  # fmt: skip
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axes, (name, (scores, labels)) in zip(grid, columns.items()):
        _draw_histogram(axes, name, scores, labels)
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    for axes in grid[len(columns) :]:
        axes.set_visible(False)
    for axes in grid[::num_columns]:
        axes.set_ylabel("share of class" if len(handles) > 1 else "share of texts")
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=9)
    return figure


def _draw_histogram(
    axes: Axes, name: str, scores: NDArray[np.float64], labels: NDArray[np.int64]
) -> None:
    low, high, clipped = _score_range(scores)
    edges = np.linspace(low, high, int(np.clip(math.sqrt(scores.size), 10, 40)) + 1).tolist()
    scores = np.clip(scores, low, high)
    styles = (
        (0, "non-members", {"histtype": "stepfilled", "color": _NONMEMBER, "alpha": 0.45}),
        (1, "members", {"histtype": "step", "color": _MEMBER, "linewidth": 1.8}),
        (-1, "texts without a label", {"histtype": "step", "color": "0.3", "linewidth": 1.4}),
    )
    for label, word, style in styles:
        of = scores[labels == label]
        if of.size:
            axes.hist(of, edges, weights=np.full(of.size, 1 / of.size), label=word, **style)
    title = name
    if {0, 1} <= set(labels.tolist()):
        known = labels >= 0
        title += f", AUC {measure.auc(scores[known], labels[known]):.3f}"
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("score (ends hold outliers)" if clipped else "score", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.locator_params(nbins=5)


def _score_range(scores: NDArray[np.float64]) -> tuple[float, float, bool]:
    """Ends of the histogram; a few extreme scores must not squeeze the rest into one bar."""
    low, high = float(scores.min()), float(scores.max())
    q1, q3 = (float(x) for x in np.quantile(scores, [0.25, 0.75]))
    fences = max(low, q1 - 3 * (q3 - q1)), min(high, q3 + 3 * (q3 - q1))  # Tukey's "far out"
    outside = float(((scores < fences[0]) | (scores > fences[1])).mean())
    if 0 < outside <= 0.05 and fences[0] < fences[1]:  # more than that is no outlier: show it
        return *fences, True
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # constant scores still need a width
        margin = max(0.5, 0.01 * abs(low))
        return low - margin, high + margin, False
    return low, high, False


# ---------------------------------------------------------------------------------------------
# Markdown and the folder


def markdown(
    rows: list[Row], metrics: Metrics, manifest: dict[str, Any], figures: bool = True
) -> str:
    """The text of report.md; with `figures`, links `figures/roc.png` and `figures/scores.png`."""
    attacks = metrics.get("attacks") or {}
    parts = ["# Membership-inference audit", _escape(headline(metrics)), "## What was audited"]
    parts.append(_bullets(_audited(rows, manifest)))
    parts += ["## Results", _markdown_table(table_rows(metrics, rows, manifest.get("cost")))]
    parts.append(
        "TPR is the share of members found while at most the stated share of non-members is "
        f"flagged (FPR). Intervals are 95 %: AUC by {measure.AUC_CI_METHOD}, TPR exact "
        "(Clopper-Pearson). Attacks that read the same forward passes share their seconds. "
        f"{MISSING} means that there is no number; the notes say why."
    )
    if figures and any(a.get("auc") is not None for a in attacks.values()):
        parts.append("![ROC of each attack](figures/roc.png)")
    scores = (s for row in rows for s in (row.get("scores") or {}).values())
    if figures and any(map(_is_number, scores)):
        parts.append("![Scores of each attack](figures/scores.png)")
    if metrics.get("paired"):
        parts += ["## Differences on the same texts", _paired_table(metrics["paired"])]
    notes = _attack_notes(attacks) + [_escape(note) for note in manifest.get("notes") or []]
    if notes:
        parts += ["## Notes", _bullets(notes)]
    parts += ["## What this does not show", _LIMITS, "## Settings"]
    parts += [_bullets(_settings(manifest)), "## How to cite", _CITATION]
    return "\n\n".join(part for part in parts if part) + "\n"


def _audited(rows: list[Row], manifest: dict[str, Any]) -> list[str]:
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
        lines.append(f"{_texts(truncated)} cut at the maximum length: only the start was scored")
    unscored = sum(
        not any(_is_number(s) for s in (row.get("scores") or {}).values()) for row in rows
    )
    if unscored:
        lines.append(f"{_texts(unscored)} without any score (see `status` in `scores.jsonl`)")
    return lines


def _attack_notes(attacks: dict[str, Any]) -> list[str]:
    """Each note once, with the attacks that it holds for."""
    holders: dict[str, list[str]] = {}
    for name, summary in attacks.items():
        for note in summary.get("notes") or []:
            holders.setdefault(note, []).append(name)
    return [
        f"{', '.join(map(_code, names)) if len(names) < len(attacks) else 'All attacks'}: {note}"
        for note, names in holders.items()
    ]


def _settings(manifest: dict[str, Any]) -> list[str]:
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
    lines = [list(COLUMNS), ["---"] + ["---:"] * (len(COLUMNS) - 1)]
    lines += [[_code(row[0]).replace("|", "\\|"), *row[1:]] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _paired_table(paired: dict[str, Any]) -> str:
    lines = ["| attacks | AUC difference (95 % interval) |", "| --- | ---: |"]
    for name, entry in paired.items():
        low, high = entry["ci"]
        attacks = _code(name).replace("|", "\\|")
        lines.append(f"| {attacks} | {entry['difference']:+.3f} ({low:+.3f} to {high:+.3f}) |")
    return "\n".join(lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(value: Any) -> str:
    """A manifest value on one line: `key value, key value` for mappings."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)


def _code(text: str) -> str:
    """Inline code that shows `text` literally; a table needs its bars escaped besides."""
    text = " ".join(str(text).split())
    runs = [len(run) for run in "".join(c if c == "`" else " " for c in text).split()]
    fence = "`" * (max(runs, default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _escape(text: str) -> str:
    """Free text on one line with nothing that Markdown or HTML would interpret."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!~" else c for c in " ".join(str(text).split()))


def write_report(folder: Path, *, figures: bool = True) -> Path:
    """Writes the figures, if wanted, and `report.md` of a run folder; returns the report's path.

    Works without labels (scores only). Raises `UsageError` if `folder` is not a finished run and
    `OutputError` if it cannot be written.
    """
    folder = Path(folder)
    manifest, rows = _read(folder, "manifest.json"), _read(folder, "scores.jsonl")
    if (folder / "metrics.json").exists():
        metrics = _read(folder, "metrics.json")
    else:
        metrics = compute_metrics(rows, int(manifest.get("seed") or 0))
    if figures:
        write_figures(folder, rows)
    path = folder / "report.md"
    write_atomic(path, markdown(rows, metrics, manifest, figures))
    return path


def _read(folder: Path, name: str) -> Any:
    """A parsed `.json` (object) or `.jsonl` (list of objects) file of a run folder."""
    try:
        text = (folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise UsageError(
                f"{folder / name} cannot be read ({error}); "
                "repeat the audit that made the folder to write it anew"
            ) from None
        raise UsageError(
            f"{folder} is not a finished run: it has no {name}; "
            f"run `sama-jax audit --out {folder}` (or the same command again) first"
        ) from None
    # Not splitlines(): it also splits at separators that JSON allows inside a string.
    lines = text.split("\n") if name.endswith(".jsonl") else [text]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            value = error
        if isinstance(value, dict):
            found.append(value)
        elif value is not None or name.endswith(".json"):
            raise UsageError(
                f"{folder / name} line {number} is not a JSON object; "
                "repeat the audit that made the folder to write it anew"
            )
    return found if name.endswith(".jsonl") else found[0]

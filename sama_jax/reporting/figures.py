"""Writes the pictures of report.md: ROC curves and histograms of scores, as PNG files."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sama_jax.reporting.plots import Columns, draw_histogram, draw_roc, new_figure
from sama_jax.reporting.results import columns_of
from sama_jax.storage.files import write_atomic
from sama_jax.storage.run_folder import Row


def write_figures(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Writes `figures/roc.png` (if there are both classes) and `figures/scores.png`.

    Returns the paths of the files; none if no text has a score.
    """
    columns = columns_of(rows)
    written = []
    both = {n: c for n, c in columns.items() if {0, 1} <= set(c[1].tolist())}
    for name, draw, content in (("roc", _draw_roc, both), ("scores", _draw_scores, columns)):
        if content:
            path = folder / "figures" / f"{name}.png"
            with matplotlib.rc_context():
                matplotlib.rcdefaults()  # whatever a `matplotlibrc` of the current folder says
                _save(draw(content), path)
            written.append(path)
    return written


def _save(figure: Figure, path: Path) -> None:
    # No software tag: the same scores give the same file under every matplotlib patch release.
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    write_atomic(path, image.getvalue())


def _draw_roc(columns: Columns) -> Figure:
    figure = new_figure(6.4, 5.6, "constrained")
    axes = figure.add_subplot()
    draw_roc(axes, columns, log=True)
    axes.set_title("ROC of each attack, both axes logarithmic", fontsize=11)
    _legend(axes, len(columns))
    return figure


def _legend(axes: Axes, num_attacks: int) -> None:
    """Puts the legend below the diagonal, or outside the axes if it would cover curves."""
    if num_attacks <= 7:
        axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    else:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7, borderaxespad=0)


def _draw_scores(columns: Columns) -> Figure:
    """Draws a histogram for each attack; bars are shares of a class, so unequal classes compare."""
    num_columns = 2 if len(columns) == 4 else min(3, len(columns))
    num_rows = math.ceil(len(columns) / num_columns)
    width, height = max(4.5, 3.4 * num_columns), 2.7 * num_rows + 0.5
    figure = new_figure(width, height)
    # Margins in inches. Matplotlib's layout would draw everything twice more: 8 s for 34 attacks
    # instead of 2.
    left, right, bottom, top, between, below = 0.7, 0.15, 0.95, 0.35, 0.55, 0.8
    panel = (width - left - right + between) / num_columns - between
    panel_height = (height - bottom - top + below) / num_rows - below
    figure.subplots_adjust(
        left=left / width,
        bottom=bottom / height,
        right=1 - right / width,
        top=1 - top / height,
        wspace=between / panel,
        hspace=below / panel_height,
    )
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    handles: dict[str, Artist] = {}
    for axes, (name, (scores, labels)) in zip(grid, columns.items()):
        draw_histogram(axes, name, scores, labels)
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    for axes in grid[len(columns) :]:
        axes.set_visible(False)
    for axes in grid[::num_columns]:
        axes.set_ylabel("share of class" if len(handles) > 1 else "share of texts")
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=9)
    return figure

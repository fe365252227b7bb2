"""Draws the figures of report.html as SVG that follows the page's colours, light or dark."""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sama_jax.core import conformal
from sama_jax.core import metrics as measure
from sama_jax.core.spread import QUANTILES, Spread
from sama_jax.reporting import plots
from sama_jax.reporting.content import Picture
from sama_jax.reporting.plots import Columns
from sama_jax.untrusted import printable

_INK = {
    "#000000": "currentColor",
    "#ffffff": "var(--paper)",
    "#737373": "var(--faint)",
    "#999999": "var(--faint)",
    "#e6e6e6": "var(--line)",
    "#ededed": "var(--band)",
}
"""Matplotlib's greys -> colours of the page. Series keep theirs, which are seen on both."""
MOST = 8
"""Attacks that one figure shows: as many as are usually declared."""


def draw(columns: Columns, primary: str | None, spread: Spread | None) -> list[Picture]:
    """Draws whatever the scores of a run allow for.

    Args:
      columns: finite scores and labels of the attacks to be shown.
      primary: the attack whose p-values are shown.
      spread: loss differences by density; None: not known.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a `matplotlibrc` of the current folder says
        return list(_draw(dict(list(columns.items())[:MOST]), primary, spread))


def _draw(columns: Columns, primary: str | None, spread: Spread | None) -> Iterator[Picture]:
    both = {name: c for name, c in columns.items() if {0, 1} <= set(c[1].tolist())}
    if both:
        yield _roc(both, log=False)
        yield _roc(both, log=True)
    for name, column in columns.items():
        yield _histogram(name, *column)
    if primary in both:
        yield _p_values(primary, *both[primary])
    if spread is not None:
        yield _densities(spread)


def _svg(figure: Figure, name: str) -> str:
    """Writes a figure as an `svg` element without fixed colours, size or foreign references."""
    image = io.StringIO()
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    text = image.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # A rule for `*` would hold for the whole page.
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"font: ([0-9.]+)px[^;\"]*", r"font-size: \1px", text)
    # Matplotlib numbers the parts of each figure anew; a page must not hold an id twice.
    own = hashlib.sha256(name.encode()).hexdigest()[:8]
    text = re.sub(r"( id=\"|href=\"#|url\(#)", rf"\g<1>{own}-", text)
    for grey, colour in _INK.items():
        text = text.replace(grey, colour)
    # Text without a colour of its own would be black on a dark page.
    return text.replace("<svg ", '<svg fill="currentColor" aria-hidden="true" ', 1)


def _figure(height: float = 3.4) -> tuple[Figure, Axes]:
    """Makes axes as wide as a phone shows them without shrinking the letters."""
    figure = plots.new_figure(4.6, height, "constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


# --- one function a figure -----------------------------------------------------------------------


def _roc(columns: Columns, *, log: bool) -> Picture:
    figure, axes = _figure(3.6)
    floor = plots.draw_roc(axes, columns, log=log)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_fontsize(9)
    axes.legend(loc="lower right", fontsize=7, framealpha=0)
    rates = (0.01, 0.05, 0.1, 0.2, 0.5)
    rows = []
    for name, (scores, labels) in columns.items():
        fpr, tpr, _ = measure.roc_points(scores[labels >= 0], labels[labels >= 0])
        found = [tpr[fpr <= rate].max() for rate in rates]
        rows.append([name, *(f"{100 * share:.1f} %" for share in found)])
    kind = "logarithmic" if log else "linear"
    more = " Left of the dotted line fewer than one non-member would be flagged." if log else ""
    return Picture(
        f"roc-{kind}",
        f"ROC, {kind} axes",
        "Share of members found against share of non-members flagged, as the threshold falls. "
        f"The dashed diagonal is guessing; one of {floor} non-members is the smallest rate.{more}",
        _svg(figure, f"roc-{kind}"),
        ["attack", *(f"found at {100 * rate:g} % flagged" for rate in rates)],
        rows,
    )


def _histogram(
    name: str, scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> Picture:
    figure, axes = _figure(2.6)
    plots.draw_histogram(axes, name, scores, labels)
    axes.set_title("")
    axes.legend(fontsize=7, framealpha=0)
    axes.set_ylabel("share of class", fontsize=9)
    rows = []
    for label, word in ((1, "members"), (0, "non-members"), (-1, "texts without a label")):
        own = scores[labels == label]
        if own.size:
            ends = np.quantile(own, [0, 0.25, 0.5, 0.75, 1])
            rows.append([word, str(own.size), *(f"{end:.4g}" for end in ends)])
    return Picture(
        f"scores-{name}",
        f"Scores of {name}",
        "A higher score means member. Each class's bars sum to one.",
        _svg(figure, f"scores-{name}"),
        ["class", "texts", "lowest", "lower quarter", "median", "upper quarter", "highest"],
        rows,
    )


def _p_values(name: str, scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Picture:
    """Draws each member's p-value among the non-members, and each non-member's among the others."""
    members, others = scores[labels == 1], scores[labels == 0]
    own = conformal.p_values(members, others)
    # A non-member stands among the non-members itself: its rank is its p-value.
    rest = (conformal.p_values(others, others) * (len(others) + 1) - 1) / len(others)
    edges = np.linspace(0, 1, 21).tolist()
    figure, axes = _figure(2.6)
    for values, word, style in (
        (rest, "non-members", plots.NONMEMBER_STYLE),
        (own, "members", plots.MEMBER_STYLE),
    ):
        axes.hist(values, edges, weights=np.full(values.size, 1 / values.size), label=word, **style)
    axes.set_xlabel("p-value", fontsize=9)
    axes.set_ylabel("share of class", fontsize=9)
    axes.legend(fontsize=7, framealpha=0)
    bounds = (0.01, 0.05, 0.1, 0.5)
    rows = [
        [word, *(f"{100 * (values <= bound).mean():.1f} %" for bound in bounds)]
        for word, values in (("members", own), ("non-members", rest))
    ]
    return Picture(
        "p-values",
        f"p-values of single texts, {name}",
        "Share of the non-members that score at least as high as a text. Those of non-members are "
        "spread evenly; those of members gather at the left where the attack works. They describe "
        "these texts: a verdict on a new one takes non-members that served nothing else.",
        _svg(figure, "p-values"),
        ["class", *(f"p at most {bound:g}" for bound in bounds)],
        rows,
    )


def _densities(spread: Spread) -> Picture:
    shares = 100 * np.array(spread["densities"])
    figure, axes = _figure(3.0)
    colours = {"members": plots.MEMBER, "non-members": plots.NONMEMBER}
    order = np.argsort(shares, kind="stable")
    rows, said = [], []
    for name, found in spread["classes"].items():
        ends = np.array(found["by_pass"])[order]
        colour = colours.get(name, "#737373")
        axes.fill_between(shares[order], ends[:, 1], ends[:, 3], color=colour, alpha=0.25, lw=0)
        dashes = "-" if name == "members" else "--"
        axes.plot(shares[order], ends[:, 2], dashes, color=colour, lw=1.8, label=name)
        for outer in (0, len(QUANTILES) - 1):
            axes.plot(shares[order], ends[:, outer], color=colour, lw=0.7, ls=":")
        rows += [
            [name, f"{share:.1f} %", *(f"{end:+.3f}" for end in line)]
            for share, line in zip(shares[order], ends)
        ]
        said.append(f"{name} {found['within']:.3f}")
    axes.axhline(0, color="#999999", lw=0.8)
    axes.set_xlabel("share of tokens masked (%)", fontsize=9)
    axes.set_ylabel("reference − target (nats a token)", fontsize=9)
    axes.legend(fontsize=7, framealpha=0)
    classes = spread["classes"]
    margin = ""
    if {"members", "non-members"} <= classes.keys():
        gap = classes["members"]["mean"] - classes["non-members"]["mean"]
        margin = f" The classes' means differ by {gap:+.3f}."
    return Picture(
        "densities",
        "Loss differences by density of the mask",
        "How much better the target predicts the masked tokens than the reference does: median "
        "(line), middle half (band) and middle 90 % (dotted) of the texts. Between the passes of "
        f"one text the difference has a standard deviation of ({', '.join(said)}).{margin} Where "
        "the first is larger than the second, one mask says little about one text.",
        _svg(figure, "densities"),
        ["class", "masked", *(f"{100 * q:g} % quantile" for q in QUANTILES)],
        rows,
    )


def draw_runs(
    names: Sequence[str], series: Mapping[str, Sequence[tuple[float | None, list[float] | None]]]
) -> Picture:
    """Draws the AUC of each attack in several runs, with its interval.

    Args:
      names: of the runs, in their order.
      series: attack -> AUC and interval of each run; None where there is none. The first `MOST`
        are drawn.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure, axes = _figure()
        for number, (attack, found) in enumerate(list(series.items())[:MOST]):
            known = [(i, auc, ci or [auc, auc]) for i, (auc, ci) in enumerate(found) if auc]
            places = [i + 0.05 * (number - min(len(series), MOST) / 2) for i, _, _ in known]
            aucs, ends = [auc for _, auc, _ in known], np.array([ci for *_, ci in known])
            spans = np.abs(ends.reshape(-1, 2).T - np.array(aucs))
            axes.errorbar(places, aucs, spans, fmt="o-", ms=3.5, lw=1.2, capsize=2, label=attack)
        axes.axhline(0.5, color="#999999", lw=0.8)
        axes.set_xticks(range(len(names)), [printable(name, 20) for name in names], fontsize=7)
        axes.set_ylabel("AUC", fontsize=9)
        axes.legend(fontsize=7, framealpha=0)
        drawn = _svg(figure, "runs")
    return Picture(
        "runs",
        "AUC by run",
        "The AUC of each attack with its 95 % interval; the line at 0.5 is guessing. The table "
        "below has the numbers.",
        drawn,
        [],
        [],
    )

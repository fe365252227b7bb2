"""The page of report.html: one file, no network, nothing that runs but the sorting of a table.

Jinja escapes whatever comes from models, texts and flags. No text of the audited collection and no
id is printed.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sama_jax.core.metrics import tpr_name
from sama_jax.core.spread import Spread
from sama_jax.reporting import content
from sama_jax.reporting.content import Picture
from sama_jax.reporting.results import Metrics, columns_of, headline, paired_text
from sama_jax.reporting.tables import MISSING, header, table_rows
from sama_jax.storage.run_folder import Row
from sama_jax.untrusted import printable
from sama_jax.validity.blind import NAME as BLIND
from sama_jax.validity.gate import voids, warnings

_KINDS = {
    "found": "Found",
    "nothing above the margin": "Nothing above the margin",
    "undecided": "Undecided",
    "unlabelled": "No labels",
    "no conclusion": "No conclusion",
}
_STATUS = ("void", "warn", "not run", "pass")
"""Gates in the order in which they are told."""


def html(
    rows: Sequence[Row],
    metrics: Metrics,
    manifest: Mapping[str, Any],
    figures: Iterable[Picture] = (),
    written: str = "",
    tokens: str = "",
) -> str:
    """Writes the page of a run.

    Args:
      rows: lines of scores.jsonl.
      metrics: of these rows.
      manifest: the run's.
      figures: pictures, in their order; their SVG is trusted.
      written: the day of writing; empty: not told.
      tokens: file beside the page that shows texts token by token; empty: there is none.
    """
    environment = templates(finalize=_shown)
    script, style = (source(environment, name) for name in ("report.js", "report.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    gates = sorted(metrics["validity"], key=lambda one: _STATUS.index(one["status"]))
    return environment.get_template("report.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        script_digest=digest,
        kind=_KINDS[metrics["verdict"]["kind"]],
        verdict=metrics["verdict"],
        primary=metrics["verdict"].get("primary"),
        declared=metrics["verdict"].get("declared", {}),
        headline=headline(metrics),
        voids=voids(gates),
        warnings=warnings(gates),
        gates=gates,
        blind=next((one for one in gates if one["name"] == BLIND), None),
        facts=content.audited(rows, manifest),
        figures=[figure._replace(svg=Markup(figure.svg)) for figure in figures],
        header=header(),
        table=table_rows(metrics, rows, manifest.get("cost")),
        missing=MISSING,
        columns_mean=content.COLUMNS,
        tpr_name=tpr_name("0.01"),
        paired=_paired(metrics),
        attack_notes=content.attack_notes(metrics["attacks"]),
        notes=manifest.get("notes") or [],
        cost=manifest.get("cost") or {},
        not_computed=manifest.get("not_computed") or {},
        limits=content.LIMITS,
        settings=content.settings(manifest),
        identity={name: content.plain(value) for name, value in _run(manifest).items()},
        citation=content.CITATION,
        written=written,
        tokens=tokens,
    )


def summary(rows: Sequence[Row], metrics: Metrics, cost: Mapping[str, Any]) -> str:
    """Writes the verdict and the table of attacks as a piece of HTML, for a notebook."""
    cell = Markup("<td>{}</td>").format
    lines = [Markup("").join(map(cell, line)) for line in table_rows(metrics, rows, cost)]
    names = Markup("").join(map(Markup("<th>{}</th>").format, header()))
    body = Markup("").join(map(Markup("<tr>{}</tr>").format, [names, *lines]))
    return Markup("<p>{}</p><table>{}</table>").format(_shown(headline(metrics)), body)


def templates(**options: Any) -> Environment:
    """Returns the templates of this folder, which escape whatever is put into them."""
    return Environment(
        loader=PackageLoader("sama_jax.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


def shown_figures(rows: Sequence[Row], metrics: Metrics, spread: Spread | None) -> list[Picture]:
    """Draws the figures of the attacks that were declared; without any, of the first ones."""
    from sama_jax.reporting import svg  # Matplotlib: a second to import

    declared = metrics["verdict"].get("declared", {})
    columns = columns_of(rows)
    chosen = {name: columns[name] for name in declared if name in columns} or columns
    return svg.draw(chosen, metrics["verdict"].get("primary"), spread)


def source(environment: Environment, name: str) -> str:
    """Reads a file beside this one as it is: a brace in it is no template's."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _paired(metrics: Metrics) -> dict[str, str]:
    compared = metrics.get("paired", {})
    return {name: paired_text(one["difference"], one["ci"]) for name, one in compared.items()}


def _run(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    return manifest.get("run") or {}


def _shown(value: Any) -> Any:
    """Escapes what would move a reader's eye or cursor; Jinja escapes what HTML would interpret."""
    if isinstance(value, str) and not isinstance(value, Markup):
        line = " ".join(value.split())
        return printable(line, len(line))
    return value

"""Makes one line a document of the lines of its windows."""

import itertools
from collections.abc import Sequence
from typing import Any

WINDOWS = "windows.jsonl"
"""What `scores.jsonl` would be if windows were documents."""


def document_rows(windows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins the lines of windows that follow each other: one line a document.

    A document's score is the mean of its windows' scores; beside it, as `NAME@topK`, stands the
    mean of the K largest, for text of which only a part was trained on. A window without a score
    counts for neither. Tokens and passes are summed. Only groups of several documents are kept.
    """
    found = []
    for name, lines in itertools.groupby(windows, key=lambda row: row["document"]):
        rows = list(lines)
        first = next((row for row in rows if row.get("status") == "ok"), rows[0])
        kept = {k: first[k] for k in ("label", "group", "status", "control") if k in first}
        row = {"id": name, **kept, "n_tokens": sum(r["n_tokens"] for r in rows)}
        row |= {"truncated": any(r["truncated"] for r in rows), "windows": len(rows)}
        baselines = [r["baseline"] for r in rows if "baseline" in r]
        if baselines:
            row["baseline"] = sum(baselines) / len(baselines)
        row |= _scores(rows, rows[0]["top"])
        found.append(row)
    members: dict[Any, int] = {}
    for row in found:
        members[row.get("group")] = members.get(row.get("group"), 0) + 1
    alone = {group for group, count in members.items() if count == 1}
    return [{k: v for k, v in row.items() if k != "group" or v not in alone} for row in found]


def _scores(rows: Sequence[dict[str, Any]], top: int) -> dict[str, Any]:
    """Returns scores, passes and reasons of a document."""
    found: dict[str, dict[str, Any]] = {"scores": {}, "passes": {}}
    undefined: dict[str, str] = {}
    for name in rows[0]["scores"]:
        values = [r["scores"][name] for r in rows if r["scores"].get(name) is not None]
        passes = sum(r["passes"].get(name, 0) for r in rows)
        for rule, used in ((name, values), (f"{name}@top{top}", sorted(values)[-top:])):
            found["scores"][rule] = sum(used) / len(used) if used else None
            found["passes"][rule] = passes
            reasons = [r["undefined"][name] for r in rows if name in r.get("undefined", {})]
            if not used and reasons:
                undefined[rule] = reasons[0]
    return {**found, **({"undefined": undefined} if undefined else {})}

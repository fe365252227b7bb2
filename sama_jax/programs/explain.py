"""Says which tokens of a text give it away, from the losses that an audit has stored.

No forward pass: what every pass of the audit read of a token is averaged. The texts have to be
given again, since an audit keeps none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from sama_jax import rng
from sama_jax.core.segments import Segment, maximal_segments
from sama_jax.engine.evidence import differences_by_token, gather_evidence
from sama_jax.engine.readings import Readings
from sama_jax.errors import DataError, UsageError, nearest
from sama_jax.programs.read_losses import readings_of
from sama_jax.programs.stored import Stored, open_stored
from sama_jax.reporting.tokens import Explained, Explanation
from sama_jax.storage.documents import WINDOWS
from sama_jax.storage.run_folder import SCORES, read_rows
from sama_jax.texts.read import Text
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.texts.windows import windows_of
from sama_jax.weights import hub


def explain(
    run: Path,
    texts: Sequence[Text],
    *,
    ids: Sequence[str] = (),
    top: int = 5,
    tokenizer: Path | None = None,
) -> Explanation:
    """Explains texts of a finished audit.

    Args:
      run: its folder.
      texts: those that it read, in any order; others are passed over.
      ids: texts, or documents of an audit by windows; empty: the `top` with the largest scores.
      top: how many texts are explained where none is named.
      tokenizer: model folder whose tokenizer is taken, the target's unless given.

    Raises:
      UsageError: an id that the run does not know, or another tokenizer.
      DataError: a text is not given, or not as the run read it; no attack read both models.
    """
    stored = open_stored(run)
    primary = stored.manifest["protocol"]["primary"]
    scores = _scores(stored, primary)
    rows = _chosen_rows(stored, ids, top, scores)
    spelled = TextTokenizer.from_folder(
        hub.resolve(tokenizer or Path(stored.manifest["target"])), None
    )
    if spelled.fingerprint != stored.manifest["run"]["tokenizer"]:
        raise UsageError(
            f"{spelled.where}: is not the tokenizer that the audit read; give --tokenizer the "
            "model folder that was audited"
        )
    if stored.manifest["run"].get("reference_tokenizer"):
        raise UsageError(
            f"{stored.path}: compared spans of two tokenizers, not tokens; explain an audit with a "
            "reference of the target's tokenizer"
        )
    given = _given(stored, texts, spelled)
    readings = readings_of(stored, stored.manifest.get("attacks") or ["all"])
    usual = _usual(readings, stored.rows)
    found = []
    for row in rows:
        known = stored.rows[row]
        pieces = _pieces(stored, row, given, spelled)
        differences = differences_by_token(readings, row)[: len(pieces)]
        spans = _densest(differences, usual)
        label, score = known.get("label"), scores.get(known["id"])
        found.append(Explained(known["id"], label, score, pieces, differences, spans))
    return Explanation(primary, usual, found)


def _scores(stored: Stored, primary: str) -> dict[str, float | None]:
    """Returns what the primary attack gave each text, or each window of a document."""
    windows = bool(stored.rows) and "document" in stored.rows[0]
    rows = read_rows(stored.path, WINDOWS if windows else SCORES)
    return {row["id"]: cast(dict[str, Any], row)["scores"].get(primary) for row in rows}


def _chosen_rows(
    stored: Stored, ids: Sequence[str], top: int, scores: dict[str, float | None]
) -> list[int]:
    """Returns the rows of the texts that are asked for. Raises `UsageError`."""
    names = [row["id"] for row in stored.rows]
    if not ids:
        scored = [i for i, name in enumerate(names) if scores.get(name) is not None]
        return sorted(scored, key=lambda i: (-cast(float, scores[names[i]]), i))[:top]
    found = []
    for one in ids:
        rows = [i for i, row in enumerate(stored.rows) if one in (row["id"], row.get("document"))]
        if not rows:
            raise UsageError(f"{stored.path}: has no text of the id '{one}'{nearest(one, names)}")
        found += rows
    return list(dict.fromkeys(found))


def _given(stored: Stored, texts: Sequence[Text], tokenizer: TextTokenizer) -> dict[str, Text]:
    """Returns the texts by their ids; of an audit by windows, the windows."""
    length, windows = stored.settings.max_length, stored.manifest["run"].get("windows")
    if windows:
        texts = windows_of(texts, tokenizer, length, windows["stride"] or length)
    return {text.id: text for text in texts}


def _usual(readings: Readings, rows: Sequence[dict[str, Any]]) -> float:
    """Returns what a token gains without being trained on. Raises `DataError`."""
    found = gather_evidence(readings)
    gains, labels = found.reference - found.target, np.array([row.get("label") for row in rows])
    known = np.isfinite(gains)
    if not known.any():
        raise DataError(
            "no attack of this run read the losses of both models; run the audit with "
            "--attacks sama on the same --out first"
        )
    others = known & (labels == 0)
    return float(gains[others].mean() if others.any() else np.median(gains[known]))


def _densest(differences: Float[np.ndarray, " n"], usual: float) -> list[Segment]:
    """Finds the stretches that gained more than the text does as a whole, or than is usual.

    Where a model was trained on all of a text, all of it gains; against the usual alone, the text
    would be one stretch. `total` is what a stretch gained beyond the usual.
    """
    read = differences[np.isfinite(differences)]
    level = max(usual, float(read.mean())) if len(read) else usual
    gains = np.nan_to_num(differences - usual)
    found = maximal_segments(differences - level)
    return [one._replace(total=float(gains[one.start : one.end].sum())) for one in found]


def _pieces(
    stored: Stored, row: int, given: dict[str, Text], tokenizer: TextTokenizer
) -> list[str]:
    """Spells the tokens of a text that the run read. Raises `DataError`."""
    name, view = stored.rows[row]["id"], stored.tables["text"].row(row)
    if name not in given:
        raise DataError(f"the text '{name}' is not in the files that were given; give --data F")
    text = given[name]
    (encoded,) = tokenizer.encode([text.content], stored.settings.max_length)
    if view is None or rng.text_key_data(encoded.ids) != view.key:
        raise DataError(
            f"the text '{name}' is not the one that the run read: it was changed, or is read "
            "otherwise; give the same file and the same --template"
        )
    return tokenizer.pieces(text.content, encoded)

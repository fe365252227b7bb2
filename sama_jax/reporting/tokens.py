"""Shows texts token by token, coloured by how much the target gained: on a terminal, as a page."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.text import Text

from sama_jax.core.segments import Segment
from sama_jax.errors import UsageError
from sama_jax.reporting.html import source, templates
from sama_jax.untrusted import open_file, printable

PAGE = "tokens.html"
"""Name of the page in the folder of a run that was asked to include texts."""
HEADING = "Which tokens give a text away"
SPANS = 5
"""Stretches that are listed of a text."""
LEAST_TOKENS = 2
"""A stretch of a single token is luck more often than not, and is not listed."""
END = 60
"""Characters of a longer stretch that are told at either end."""
LEVELS = 4
"""Steps of colour on either side."""
LEAST_NATS = 0.5
"""The strongest colour stands for at least as much."""
_GAINED = ("", "on #ffe3b3", "on #ffc266", "bold on #ff9933", "bold on #ff7722")
_LOST = ("", "on #dbe9ff", "on #b3d1ff", "on #80b3ff", "on #4d94ff")
"""Styles of a terminal, dark letters on these grounds. Orange and blue differ for all eyes."""


class Explained(NamedTuple):
    """One text with what each of its tokens gave."""

    id: str
    label: int | None
    score: float | None
    """Of the primary attack."""
    pieces: list[str]
    """What each token stands for; joined, the part of the text that was read."""
    differences: Float[np.ndarray, " n"]
    """Reference minus target in nats, mean over the passes that read the token; NaN: none did."""
    spans: list[Segment]
    """Stretches that gained more than the rest of the text, the strongest first; `total` is the
    nats of their tokens beyond the usual."""


class Explanation(NamedTuple):
    """Some texts of a run, explained."""

    primary: str
    usual: float
    """Mean difference of a token in texts that were not trained on; without labels, the median
    over all texts. In nats."""
    texts: list[Explained]

    @property
    def strongest(self) -> float:
        """Returns the nats that the strongest colour stands for."""
        gains = [abs(one.differences - self.usual) for one in self.texts]
        known = np.concatenate([np.zeros(1), *(one[np.isfinite(one)] for one in gains)])
        return max(LEAST_NATS, float(np.quantile(known, 0.95)))


def level(gain: float, strongest: float) -> int:
    """Returns the step of colour of a token: 1 to `LEVELS`, below 0 for a loss; 0 near nothing."""
    if not np.isfinite(gain):
        return 0
    return int(np.sign(gain) * min(LEVELS, int(abs(gain) / strongest * (LEVELS + 1))))


def listed(one: Explained) -> Iterator[tuple[Segment, str]]:
    """Yields the strongest stretches of a text, with their words."""
    long = [span for span in one.spans if span.end - span.start >= LEAST_TOKENS]
    for span in long[:SPANS]:
        words = "".join(one.pieces[span.start : span.end])
        short = len(words) <= 2 * END
        yield span, words if short else f"{words[:END]} [...] {words[-END:]}"


def legend(found: Explanation) -> str:
    """Says what the colours mean."""
    return (
        f"orange: the target predicts the token better than the reference, by up to "
        f"{found.strongest:.2f} nats more than the usual {found.usual:.2f}; blue: worse; "
        "underlined: no pass read it"
    )


def title(one: Explained, primary: str) -> str:
    """Names a text: its id, label and score."""
    label = {1: ", member", 0: ", non-member"}.get(one.label, "") if one.label is not None else ""
    score = "" if one.score is None else f", {primary} {one.score:.4f}"
    read = int(np.isfinite(one.differences).sum())
    return f"{one.id}{label}{score}; {read} of {len(one.pieces)} tokens were read"


def terminal(found: Explanation) -> RenderableType:
    """Returns the texts for a terminal: the strongest stretches first, then the text in colour."""
    parts: list[RenderableType] = [Text(legend(found)), Text("")]
    for one in found.texts:
        parts.append(Text(_safe(title(one, found.primary)), style="bold"))
        for span, words in listed(one):
            gain = f"  +{span.total:.2f} nats in {span.end - span.start} tokens: "
            parts.append(Text(gain + repr(words)))
        line = Text()
        for piece, gain in zip(one.pieces, one.differences - found.usual):
            line.append(_safe(piece), style=_style(gain, found.strongest))
        parts += [line, Text("")]
    return Group(*parts)


def _style(gain: float, strongest: float) -> str:
    if not np.isfinite(gain):
        return "underline"
    step = level(gain, strongest)
    ground = _GAINED[step] if step > 0 else _LOST[-step]
    return f"black {ground}" if ground else ""


def _safe(text: str) -> str:
    """Returns what may be printed: line breaks stay, what would move a cursor is escaped."""
    return "\n".join(printable(line, len(line)) for line in text.split("\n"))


def require_page(path: Path | None) -> None:
    """Raises `UsageError` if a page would replace a file that is none of these pages."""
    if path is None or not os.path.lexists(path):
        return
    try:
        with open_file(path) as file:
            ours = f"<h1>{HEADING}</h1>".encode() in file.read(2**16)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UsageError(f"{path}: exists and was not written by this command; give a new name")


def page(found: Explanation, verdict: str) -> str:
    """Returns one HTML file that loads and runs nothing. It holds the texts.

    Args:
      found: the texts.
      verdict: what the run shows as a whole, in sentences.
    """
    environment = templates()
    style = source(environment, "report.css")
    texts: list[dict[str, Any]] = [_shown(one, found) for one in found.texts]
    return environment.get_template("tokens.html.j2").render(
        heading=HEADING,
        style=Markup(style),
        verdict=verdict,
        legend=legend(found),
        texts=texts,
    )


def _shown(one: Explained, found: Explanation) -> dict[str, Any]:
    gains = one.differences - found.usual
    tokens = [
        {
            "piece": _safe(piece),
            "step": level(gain, found.strongest),
            "read": bool(np.isfinite(gain)),
            "difference": float(difference),
        }
        for piece, gain, difference in zip(one.pieces, gains, one.differences)
    ]
    spans = [(f"{s.total:+.2f}", s.end - s.start, _safe(words)) for s, words in listed(one)]
    return {"title": _safe(title(one, found.primary)), "tokens": tokens, "spans": spans}

"""Makes a calibration file from the held-out non-members of a finished run.

With it, `apply` says of other texts whether held-out non-members would score like that.
"""

import datetime
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from sama_jax import attacks as attack_suite
from sama_jax.attacks.registry import Attack
from sama_jax.config import AuditSettings
from sama_jax.core import conformal, metrics
from sama_jax.errors import DataError, UsageError, ValidityError, nearest
from sama_jax.programs.stored import settings_of
from sama_jax.reporting import results
from sama_jax.storage.calibration_file import Calibration, write_calibration
from sama_jax.storage.run_folder import Row, read_manifest, read_rows, read_unchanged_rows
from sama_jax.storage.text_index import INDEX, read_index
from sama_jax.validity.gate import voids

BEST = "best"
"""In the place of an attack's name: the one that is strongest on a third of the texts."""
OF_TEXTS = frozenset({"data", "texts", "tokens"})
"""What a run's identity says of its texts, which may differ; all else must not."""


class FinishedRun(NamedTuple):
    """What a calibration, or its use, needs to know of a run."""

    rows: list[Row]
    keys: list[str]
    """Of each text the hash of its tokens."""
    identity: dict[str, Any]
    settings: AuditSettings
    codes: dict[str, str]
    """Attack -> what names the code that made its scores."""

    @property
    def groups(self) -> Int[np.ndarray, " n"]:
        """The group of each text; -1: none."""
        return np.array([row.get("group", -1) for row in self.rows], dtype=np.int64)


class Measured(NamedTuple):
    """What the threshold did to texts that neither chose the attack nor calibrated it."""

    flagged: int
    nonmembers: int
    found: int
    members: int


def read_run(path: Path) -> FinishedRun:
    """Reads a finished audit.

    Raises:
      UsageError: it is none, its texts are windows, or its scores were changed.
      DataError: its files are damaged.
    """
    manifest = read_manifest(path)
    if manifest is None or "settings" not in manifest or manifest.get("finished") is not True:
        raise UsageError(f"{path}: expected the output folder of a finished audit (its --out)")
    settings = settings_of(path, manifest)
    if manifest["run"].get("windows") is not None:
        raise UsageError(
            f"{path}: was made with --windows, and single texts are judged whole: audit them "
            "without it, as far as --max-length reaches"
        )
    rows = read_unchanged_rows(path, manifest)
    known, views = read_index(path / INDEX, manifest["run"])
    if [row["id"] for row in rows] != [row["id"] for row in known] or "text" not in views:
        raise DataError(
            f"{path}: scores.jsonl and {INDEX} hold other texts; run the audit's own command again"
        )
    identity = {k: v for k, v in manifest["run"].items() if k not in OF_TEXTS}
    identity["device"] = str(manifest.get("device")).split(" x ")[-1]  # not how many
    keys = [view["store_key"] if view else "" for view in views["text"]]
    return FinishedRun(rows, keys, identity, settings, manifest.get("codes") or {})


def identity_of(path: Path, run: FinishedRun, attack: str) -> dict[str, Any]:
    """Returns what must be equal for two runs' scores of an attack to be compared.

    Raises `UsageError` if the run does not say by which code they were made.
    """
    if not run.codes.get(attack):
        raise UsageError(
            f"{path}: does not say by which code its scores of {attack} were made; repeat the "
            "audit's own command, which scores what is stored again"
        )
    return run.identity | {f"code of {attack}": run.codes[attack]}


def require_sound(path: Path, but_for: Collection[str] = ()) -> None:
    """Raises `ValidityError` if the result of a run is void: nothing follows from its scores.

    Gates of the names `but_for` are not asked.
    """
    gates = results.metrics_of(read_rows(path), read_manifest(path) or {})["validity"]
    if failed := voids(one for one in gates if one["name"] not in but_for):
        raise ValidityError(
            f"{path}: its result is void: {failed[0]['name']}: {failed[0]['sentence']}"
        )


def require_alone(name: str, run: FinishedRun) -> Attack:
    """Returns an attack of the run. Raises `UsageError` if its scores depend on other texts."""
    names = results.attack_names(run.rows)
    if name not in names:
        raise UsageError(f"attack '{name}' has no scores in this run{nearest(name, names)}")
    attack = attack_suite.get(name)
    if attack.corpus is not None:
        raise UsageError(
            f"attack '{name}' reads all texts of a run at once, so its scores of other texts "
            "cannot be compared with these; take another one, as --attack sama"
        )
    reads_prefixes = any(
        query.view is not None and query.view.context is not None
        for query in attack.queries(run.settings).values()
    )
    if reads_prefixes and run.identity.get("prefixes") is None:
        raise UsageError(
            f"attack '{name}' took its prefixes from the texts of the run, so its scores of other "
            "texts cannot be compared with these; audit with --prefixes"
        )
    return attack


def run_calibrate(
    folder: Path,
    out: Path,
    *,
    attack: str = results.MAIN_ATTACK,
    fpr: float = 0.01,
    guarantee: float | None = None,
    seed: int = 0,
) -> tuple[Calibration, Measured | None]:
    """Writes the calibration file of a run.

    One text of each group is used. With attack `best` the texts are split in three by their
    hashes: one part chooses the attack, one calibrates, and the third is measured.

    Raises:
      UsageError: not a finished run, or not an attack whose scores can be compared.
      ValidityError: the result of the run is void.
      DataError: too few non-members for the rate.
    """
    run = read_run(folder)
    require_sound(folder)
    names = [f"group {g}" if g >= 0 else key for g, key in zip(run.groups, run.keys)]
    part = conformal.thirds(names, seed) if attack == BEST else np.ones(len(run.rows), int)
    name = _strongest(run, part == 0) if attack == BEST else attack
    require_alone(name, run)
    values, labels = results.column(run.rows, name)

    def chosen(label: int, of_part: int) -> Int[np.ndarray, " k"]:
        places = np.flatnonzero(np.isfinite(values) & (labels == label) & (part == of_part))
        keys = [run.keys[i] for i in places]
        return places[conformal.one_of_each(run.groups[places], keys, seed)]

    used = chosen(0, 1)
    rank = conformal.rank_of(len(used), fpr, guarantee)
    if rank == 0:
        raise DataError(
            f"{folder}: {len(used)} held-out non-members calibrate no threshold at a "
            f"false-positive rate of {metrics.percent(fpr)}"
            + (f" with probability {guarantee:g}" if guarantee else "")
            + "; expected at least "
            f"{_needed(fpr, guarantee)}: audit more of them, or give a larger --fpr"
        )
    content: Calibration = {
        "attack": name,
        "identity": identity_of(folder, run, name),
        "scores": sorted(values[used].tolist()),
        "lengths": sorted(run.rows[i].get("n_tokens", 0) for i in used),
        "keys": sorted(run.keys[i] for i in used),
        "groups": len(used) if (run.groups >= 0).any() else None,
        "fpr": fpr,
        "guarantee": guarantee,
        "rank": rank,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_calibration(out, content)
    if attack != BEST:
        return content, None
    flagged = [flags(content, values[chosen(label, 2)]) for label in (0, 1)]
    return content, Measured(*(n for one in flagged for n in (int(one.sum()), len(one))))


def flags(content: Calibration, scores: Float[np.ndarray, " m"]) -> Bool[np.ndarray, " m"]:
    """Tells which scores the threshold of a calibration flags."""
    p = conformal.p_values(scores, np.array(content["scores"]))
    return p <= content["rank"] / (len(content["scores"]) + 1)


def _needed(fpr: float, guarantee: float | None) -> int:
    """Returns how many non-members calibrate a threshold at all."""
    if guarantee is None:
        return int(np.ceil(1 / fpr - 1 - 1e-9))
    return int(np.ceil(np.log1p(-guarantee) / np.log1p(-fpr)))  # the highest of n: Beta(1, n)


def _strongest(run: FinishedRun, texts: np.ndarray) -> str:
    """Returns the attack with the highest AUC on some texts, of those that stand alone."""
    found: dict[str, float] = {}
    rows = [row for row, chosen in zip(run.rows, texts) if chosen]
    for name in results.attack_names(run.rows):
        try:
            require_alone(name, run)
            found[name] = results.auc(rows, name)
        except (UsageError, DataError):
            continue
    if not found:
        raise DataError("no attack has scores of members and non-members to choose it by")
    return max(found, key=lambda name: found[name])


def told(content: Calibration, measured: Measured | None) -> Sequence[str]:
    """Says in sentences what a calibration is."""
    rate = metrics.percent(content["fpr"])
    kept = "on average"
    if content["guarantee"] is not None:
        kept = f"with probability {content['guarantee']:g}"
    lines = [
        f"Calibrated {content['attack']} on {len(content['scores'])} held-out non-members: a score "
        f"that fewer than {content['rank']} of them reach is flagged, which flags {kept} at most "
        f"{rate} of non-members from the same source."
    ]
    if measured is not None:
        shares = [_share(*measured[:2], "non-members"), _share(*measured[2:], "members")]
        lines.append(
            f"Of texts that neither chose nor calibrated, {' and '.join(s for s in shares if s)} "
            "were flagged (95 % intervals)."
        )
    return lines


def _share(count: int, total: int, what: str) -> str:
    if total == 0:
        return f"no {what}"
    low, high = scipy.stats.binomtest(count, total).proportion_ci(0.95, method="exact")
    return f"{count} of {total} {what} ({100 * low:.1f} to {100 * high:.1f} %)"

"""Joins the parts of a run whose processes had no disk in common: copy, index, score.

Every part is the output folder of one process. What they computed stands in files of its own for
each process, keyed by content, so joining is copying; scores that no process could make alone are
then made from the losses, as `sama-jax score` does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sama_jax import attacks as attack_suite
from sama_jax.engine.costs import sum_costs
from sama_jax.engine.text_table import table_from_description
from sama_jax.errors import DataError, UsageError
from sama_jax.programs.audit import AuditResult
from sama_jax.programs.rescore import run_score
from sama_jax.programs.stored import store_of
from sama_jax.storage.files import copy_file, only_writer, require_new, write_json, writing
from sama_jax.storage.protocol import Protocol, write_protocol
from sama_jax.storage.run_folder import MANIFEST, noted, read_manifest
from sama_jax.storage.text_index import INDEX, read_index, write_index
from sama_jax.terminal import console
from sama_jax.validity.gate import worst_of

_OWN = ("session", "store", "cost")
"""Of a manifest, what belongs to one process."""


def run_merge(out: Path, parts: Sequence[Path], *, quiet: bool = False) -> AuditResult:
    """Writes `out`, a new folder, from the output folders of all processes of one audit.

    Raises:
      DataError: a part is not the output of an audit, or of none of them is the index written.
      UsageError: the parts belong to different runs, `out` is not empty, or passes are missing;
        then the audit's own command with `--out OUT` computes them.
    """
    say = console(quiet)
    manifests = [_manifest(part) for part in parts]
    _require_one_run(parts, manifests)
    require_new(out)
    indexes = [part / INDEX for part in parts if (part / INDEX).is_file()]
    if not indexes:
        raise DataError(f"{parts[0]}: has no {INDEX}; no process of this run has finished")
    found = [read_index(index, manifests[0]["run"]) for index in indexes]
    rows = found[0][0]
    for index, (other, _) in zip(indexes, found):
        if other != rows:
            raise DataError(f"{index}: lists other texts than {indexes[0]}; copy both again")
    views: dict[str, Any] = {}
    for index, (_, known) in zip(indexes, found):
        for view, made in known.items():
            if views.setdefault(view, made) != made:
                raise DataError(f"{index}: has other views than {indexes[0]}; copy both again")
    for view in views.values():  # before anything is copied
        table_from_description(view, str(indexes[0]))
    with only_writer(out):
        require_new(out)  # again: another merge may have had it meanwhile
        _write(out, parts, manifests, rows, views)
    say.print(f"{len(parts)} parts copied to {out}")
    attacks = manifests[0]["attacks"]
    names = [a for a in attacks if not attack_suite.select([a])[0].needs_texts]
    for name in sorted(set(attacks) - set(names)):
        say.print(
            f"not computed: {name} (it reads the texts themselves: run the audit with --out {out})"
        )
    return run_score(out, names, quiet=quiet)


def _write(
    out: Path,
    parts: Sequence[Path],
    manifests: Sequence[dict[str, Any]],
    rows: list[dict[str, Any]],
    views: dict[str, Any],
) -> None:
    """Writes what all parts hold as one run that is not finished; its manifest is the last."""
    for number, (part, manifest) in enumerate(zip(parts, manifests)):
        store = store_of(part, manifest)
        _copy(part / "parts", "scores-*.jsonl", out / "parts", number, len(parts))
        _copy(store, "losses-*.bin", out / "losses", number, len(parts))
    write_index(out / INDEX, manifests[0]["run"], rows, views)
    costs = [m["cost"] for m in manifests if m.get("cost")]
    manifest = {k: v for k, v in manifests[0].items() if k not in _OWN}
    found = [*(m.get("notes") or [] for m in manifests), *(noted(part) for part in parts)]
    notes = dict.fromkeys(note for some in found for note in some)
    gates = worst_of(m.get("gates") or [] for m in manifests)
    manifest |= {"finished": False, "cost": sum_costs(costs), "notes": list(notes), "gates": gates}
    if manifest.get("protocol"):
        write_protocol(out, Protocol.from_dict(manifest["protocol"]))
    write_json(out / MANIFEST, manifest)


def _require_one_run(parts: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> None:
    """Raises `UsageError` unless all parts are of one run, and were declared one protocol."""
    for part, manifest in zip(parts, manifests):
        if manifest["run"] != manifests[0]["run"]:
            changed = sorted(
                k for k, v in manifest["run"].items() if manifests[0]["run"].get(k) != v
            )
            raise UsageError(
                f"{part}: belongs to another run than {parts[0]}; differences: {', '.join(changed)}"
            )
        if manifest.get("protocol") != manifests[0].get("protocol"):
            raise UsageError(
                f"{part}: was declared another protocol than {parts[0]} (--primary, --family, "
                "--margin); merge parts of one command"
            )


def _manifest(part: Path) -> dict[str, Any]:
    manifest = read_manifest(part)
    if manifest is None or not {"attacks", "run", "settings", "store_keys"} <= manifest.keys():
        raise DataError(f"{part}: expected the output folder of one process of an audit")
    return manifest


def _copy(source: Path, pattern: str, out: Path, number: int, count: int) -> None:
    """Files of one part, under numbers that no other part's have: 0 stays free for later work."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(sorted(source.glob(pattern))):
        copy_file(file, out / pattern.replace("*", f"{1 + number + i * count:05d}"))

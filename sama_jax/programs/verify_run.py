"""Verifies that a finished run is as it was written, and that its scores give its metrics."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from sama_jax.errors import DataError, UsageError
from sama_jax.reporting import results
from sama_jax.storage import checksums
from sama_jax.storage.protocol import PROTOCOL, Protocol, read_protocol
from sama_jax.storage.run_folder import MANIFEST, METRICS, read_manifest, read_rows
from sama_jax.untrusted import printable, read_json, shown

NAMED = 20
"""Files that a message names."""
DIGITS = 1e-9
"""Relative difference of a number that was computed on another machine."""


class Verified(NamedTuple):
    """A run folder that is as it was written."""

    files: int
    manifest: str
    """SHA-256 of its manifest, which names all others: file it with someone."""
    metrics: results.Metrics


def verify_run(folder: Path) -> Verified:
    """Checks every file of a finished run against its manifest, and its metrics against its scores.

    Raises:
      UsageError: not a finished run, or one whose files nobody recorded.
      DataError: what was changed, is gone or is new.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("finished") is not True:
        raise UsageError(f"{folder}: expected the output folder of a finished audit (its --out)")
    if not manifest.get("files"):
        raise UsageError(
            f"{folder / MANIFEST}: records no files; repeat the audit's own command, which does"
        )
    if changed := checksums.changed(folder, read_json(folder / MANIFEST)):
        listed = "".join(f"\n  {printable(name, 200)}" for name in changed[:NAMED])
        raise DataError(
            f"{folder}: {len(changed)} files are not as the run has written them (changed, gone or "
            f"new):{listed}"
        )
    metrics = results.metrics_of(read_rows(folder), manifest)
    for where, was, now in differences(read_json(folder / METRICS), metrics):
        raise DataError(
            f"{folder / METRICS}: {where} is {shown(was)}, but the scores give {shown(now)}"
        )
    if manifest.get("protocol") and read_protocol(folder) != Protocol.from_dict(
        manifest["protocol"]
    ):
        raise DataError(f"{folder / PROTOCOL}: differs from the protocol in {MANIFEST}")
    return Verified(len(manifest["files"]), checksums.sha256(folder / MANIFEST), metrics)


def differences(was: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the places at which two values of JSON differ, with both values.

    Numbers may differ by rounding, as those from another machine do.
    """
    if isinstance(was, dict) and isinstance(now, dict):
        for name in sorted({*was, *now}):
            yield from differences(was.get(name), now.get(name), f"{where}.{name}".lstrip("."))
    elif isinstance(was, list) and isinstance(now, list | tuple) and len(was) == len(now):
        for i, (a, b) in enumerate(zip(was, now)):
            yield from differences(a, b, f"{where}[{i}]")
    elif not _same(was, now):
        yield where, was, now


def _same(was: Any, now: Any) -> bool:
    if isinstance(was, float) and isinstance(now, float):
        return abs(was - now) <= DIGITS * max(1.0, abs(was), abs(now))
    return cast(bool, was == now)

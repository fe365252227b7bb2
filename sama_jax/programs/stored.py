"""Opens what a finished audit has left, for those who read its losses again."""

from pathlib import Path
from typing import Any, NamedTuple

from sama_jax import __version__
from sama_jax.config import AuditSettings, from_dict
from sama_jax.engine.text_table import TextTable, table_from_description
from sama_jax.errors import DataError, UsageError
from sama_jax.programs.run_identity import flat_settings, store_keys_of
from sama_jax.storage.run_folder import MANIFEST, read_manifest
from sama_jax.storage.text_index import INDEX, read_index


class Stored(NamedTuple):
    """What an audit has left for those who read its losses again."""

    path: Path
    manifest: dict[str, Any]
    settings: AuditSettings
    rows: list[dict[str, Any]]
    """What the index says of each text."""
    tables: dict[str, TextTable]


def open_stored(store: Path) -> Stored:
    """Reads an audit's manifest and index; `store` is its folder, or the `losses` folder in it.

    Raises:
      DataError: it is none, or damaged.
      UsageError: another version has made it.
    """
    path = store if (store / INDEX).is_file() else store.parent
    manifest = read_manifest(path)
    if manifest is None or "settings" not in manifest:
        raise DataError(f"{store}: expected the output folder of a finished audit, or its losses")
    settings = settings_of(path, manifest)
    rows, views = read_index(path / INDEX, manifest["run"])
    tables = {v: table_from_description(found, str(path / INDEX)) for v, found in views.items()}
    return Stored(path, manifest, settings, rows, tables)


def settings_of(path: Path, manifest: dict[str, Any]) -> AuditSettings:
    """Returns the settings of a run. Raises `DataError` unless its manifest agrees with itself."""
    try:
        settings = from_dict(AuditSettings, manifest["settings"])
    except (UsageError, TypeError, ValueError) as error:
        raise DataError(f"{path / MANIFEST}: its settings cannot be read ({error})") from None
    run = manifest.get("run", {})
    other = [name for name, value in flat_settings(settings).items() if run.get(name) != value]
    if run.get("version", __version__) != __version__:
        raise UsageError(
            f"{path}: was made by sama_jax {run['version']}, this is {__version__}: scores of two "
            "versions would stand side by side; audit into a new --out with --store "
            f"{store_of(path, manifest)}, which reads the stored losses"
        )
    if manifest.get("store_keys") != store_keys_of(run):
        other.append("store_keys")
    if other or not isinstance(run.get("texts"), int):
        raise DataError(
            f"{path / MANIFEST}: is damaged or made by another version "
            f"({', '.join(other[:3]) or 'texts'}); run the audit into a new folder"
        )
    return settings


def store_of(path: Path, manifest: dict[str, Any]) -> Path:
    """Returns where the losses are. Raises `DataError` if they are not there."""
    given, own = manifest.get("store"), path / "losses"
    found = [store for store in (Path(given) if given else own, own) if store.is_dir()]
    if not found:
        raise DataError(f"{path}: its losses are not at {given or own}; copy them to {own}")
    return found[0]

"""Runs experiments: YAML files that name models, texts, settings and attacks, run as audits.

A file is a mapping with

    summary   one line
    models    `demo` (made here, see `sama-jax demo`), `demo:llama` or `demo:bert` (the same of a
              next-token or a masked language model), or {target: DIR, reference: DIR}
    data      with models of one's own: {data: FILE} or {members: FILE, nonmembers: FILE}, and
              {prefixes: FILE} where attacks want them
    runs      list of {name, attacks: [..], models, data, set: [key=value, ..]} with any setting
              that is no group (preset, passes, max_length, seed, ..); `models` and `data` of a
              run go before those of the file
    compare   list of [attack, attack]: AUC of the second minus the first, paired, in every run
              that has both
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.table import Table

from sama_jax import config
from sama_jax.errors import DataError, UsageError, nearest
from sama_jax.programs import audit, demo
from sama_jax.programs.jobs import AuditJob
from sama_jax.reporting import results, tables
from sama_jax.storage.files import write_json
from sama_jax.storage.run_folder import Row
from sama_jax.terminal import Terminal
from sama_jax.texts.read import Texts, read_split, read_texts

_FIELDS = {"summary", "models", "data", "runs", "compare"}
_SETTINGS = {name for name in config.setting_names(config.AuditSettings()) if "." not in name}
_RUN_FIELDS = {"name", "attacks", "models", "data", "set"} | _SETTINGS
_DEMOS = {"demo": "llada", **{f"demo:{name}": name for name in demo.NETWORKS if name != "llada"}}
"""What `models` may be called -> the network of the demo."""


def _folders() -> list[Path]:
    """Returns where experiments are shipped: in the package, or next to it in a clone."""
    here = Path(__file__).parents[1]
    return [here / "experiments", here.parent / "experiments"]


def available() -> dict[str, str]:
    """Returns the summaries of the experiments that are shipped, by name."""
    files = [f for folder in _folders() for f in sorted(folder.glob("*.yaml"))]
    return {file.stem: read(file)["summary"] for file in files}


def find(name: str) -> Path:
    """Returns the file of an experiment's name, or the path itself. Raises `UsageError`."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UsageError(f"{name}: no such file; expected the YAML of an experiment")
        return Path(name)
    for folder in _folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise UsageError(f"unknown experiment '{name}'{nearest(name, available())}")


def read(path: Path) -> dict[str, Any]:
    """Reads and checks an experiment. Raises `DataError`."""
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # YAML's own has several lines
        raise DataError(f"{path}: not readable as YAML ({reason})") from None
    if not isinstance(found, dict) or not isinstance(found.get("runs"), list):
        raise DataError(f"{path}: expected a mapping with a list `runs`")
    _known(found, _FIELDS, str(path))
    for number, run in enumerate(found["runs"]):
        if not isinstance(run, dict) or not run.get("name") or not run.get("attacks"):
            raise DataError(f"{path}: run {number} needs a name and attacks")
        _known(run, _RUN_FIELDS, f"{path}, run {run['name']}")
    full = {"summary": "", "models": "demo", "compare": [], **found}
    for models in (full["models"], *(run["models"] for run in full["runs"] if "models" in run)):
        folders = isinstance(models, dict) and {"target", "reference"} <= set(models)
        if not folders and models not in list(_DEMOS):
            raise DataError(
                f"{path}: models are {models!r}; expected {', '.join(_DEMOS)}, or target and "
                "reference folders"
            )
    for pair in full["compare"]:
        if not any({*pair} <= {*run["attacks"]} or "all" in run["attacks"] for run in full["runs"]):
            raise DataError(f"{path}: compare {pair}: no run has both attacks")
    return full


def _known(found: dict[str, Any], fields: set[str], where: str) -> None:
    """Raises `DataError` for a field that nothing reads."""
    for name in found:
        if name not in fields:
            raise DataError(f"{where}: unknown field '{name}'{nearest(str(name), sorted(fields))}")


def run_experiment(name: str, runs: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Runs every run of an experiment, prints its tables, writes `experiment.json`.

    Results go to the folder of its name in `runs`; the demo's models are made, or found, in
    `runs/demo`, so that experiments share them. Runs are audits: what is finished is kept, losses
    that two of them read are computed once, and the same command continues.
    """
    path = find(name)
    plan, terminal = read(path), Terminal(quiet=quiet)
    out = runs / path.stem
    terminal.say(f"{path.stem}: {plan['summary']}")
    result: dict[str, Any] = {"experiment": path.stem, "runs": {}}
    for run in plan["runs"]:
        terminal.say(f"run {run['name']}")
        models, files = (run.get(k, plan.get(k)) for k in ("models", "data"))
        given = _inputs(models, files or {}, runs, quiet)
        job = AuditJob(
            target=given.target,
            reference=given.reference,
            texts=given.texts,
            prefixes=given.prefixes,
            out=out / run["name"],
            store=out / "losses",
            attacks=run["attacks"],
            settings=run_settings(run, given.settings),
            quiet=quiet,
            command=f"sama-jax experiment {name}",
        )
        done = audit.run_audit(job)
        assert done is not None
        pairs = [pair for pair in plan["compare"] if set(pair) <= set(done.metrics["attacks"])]
        compared = [_compare(done.rows, a, b, job.settings.seed) for a, b in pairs]
        result["runs"][run["name"]] = {"metrics": done.metrics["attacks"], "compare": compared}
        terminal.show(tables.metrics_table(done.metrics, done.rows, done.cost))
        if compared:
            terminal.show(_comparison_table(compared))
    write_json(out / "experiment.json", result)
    terminal.say(f"results: {out}")
    return result


class _Inputs(NamedTuple):
    """What a run works on, and the settings that go with it."""

    target: Path
    reference: Path
    texts: Texts
    prefixes: Texts | None
    settings: config.AuditSettings


def _inputs(models: Any, files: dict[str, str], runs: Path, quiet: bool) -> _Inputs:
    """Makes or finds the models, and reads the texts. Raises `DataError`."""
    if isinstance(models, str):
        made = demo.prepare(runs / "demo", network=_DEMOS[models], quiet=quiet)
        texts = read_split(made.members, made.nonmembers)
        prefixes = read_texts(made.prefixes)
        return _Inputs(made.target, made.base, texts, prefixes, demo.audit_settings())
    if "data" in files:
        texts = read_texts(Path(files["data"]))
    elif {"members", "nonmembers"} <= set(files):
        texts = read_split(Path(files["members"]), Path(files["nonmembers"]))
    else:
        raise DataError("data: expected a file `data`, or files `members` and `nonmembers`")
    prefixes = read_texts(Path(files["prefixes"])) if "prefixes" in files else None
    folders = Path(models["target"]), Path(models["reference"])
    return _Inputs(*folders, texts, prefixes, config.AuditSettings())


def run_settings(run: dict[str, Any], base: config.AuditSettings) -> config.AuditSettings:
    """Returns the settings of a run: those of its models, its own, and its preset's."""
    own = {name: run[name] for name in _SETTINGS & set(run)}
    fields = {**vars(base), "passes": None, **own}
    del fields["sama"]  # the preset's
    return config.AuditSettings.of(overrides=run.get("set", []), **fields)


def _compare(rows: Sequence[Row], first: str, second: str, seed: int) -> dict[str, Any]:
    """Returns the AUC of `second` minus `first` on texts that both scored, with its interval."""
    found = results.paired(rows, second, first, seed)
    return {"from": first, "to": second, "difference": found["difference"], "ci": found["ci"]}


def _comparison_table(compared: list[dict[str, Any]]) -> Table:
    """Returns the table of what was compared, a line a pair."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("from", "to", "AUC gained (95 % interval, paired)"):
        table.add_column(column)
    for row in compared:
        low, high = row["ci"]
        gained = f"{row['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        table.add_row(row["from"], row["to"], gained)
    return table

"""Experiments: YAML files that name models, texts, settings and attacks, run as audits.

A file is a mapping with

    summary   one line
    models    `demo` (made here, see `sama-jax demo`), `demo:llama` or `demo:bert` (the same of a
              next-token or a masked language model), or {target: DIR, reference: DIR}
    data      with models of one's own: {data: FILE} or {members: FILE, nonmembers: FILE}, and
              {prefixes: FILE} where attacks want them
    runs      list of {name, attacks: [..], models, data, preset, passes, max_length, seed,
              set: [key=value, ..]}; `models` and `data` of a run go before those of the file
    compare   list of [attack, attack]: AUC of the second minus the first, paired, in every run
              that has both
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from sama_jax import config
from sama_jax.errors import DataError, UsageError, nearest
from sama_jax.programs import audit, demo
from sama_jax.reporting import results, tables
from sama_jax.storage.files import write_json
from sama_jax.storage.run_folder import Row
from sama_jax.terminal import console
from sama_jax.texts import data

_FIELDS = {"summary", "models", "data", "runs", "compare"}
_RUN_FIELDS = {
    "name", "attacks", "models", "data", "preset", "passes", "max_length", "seed", "set"
}  # fmt: skip
_DEMOS = {"demo": "llada", **{f"demo:{name}": name for name in demo.NETWORKS if name != "llada"}}
"""What `models` may be called -> the network of the demo."""


def _folders() -> list[Path]:
    """Where experiments are shipped: inside the package, or beside it in a clone."""
    here = Path(__file__).parents[1]
    return [here / "experiments", here.parent / "experiments"]


def available() -> dict[str, str]:
    """Name -> summary of the experiments that are shipped."""
    files = [f for folder in _folders() for f in sorted(folder.glob("*.yaml"))]
    return {file.stem: read(file)["summary"] for file in files}


def find(name: str) -> Path:
    """The file of an experiment's name, or the path itself."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UsageError(f"{name}: no such file; expected the YAML of an experiment")
        return Path(name)
    for folder in _folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise UsageError(f"unknown experiment '{name}'{nearest(name, available())}")


def read(path: Path) -> dict[str, Any]:
    """A parsed and checked experiment."""
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
    plan, say = read(path), console(quiet)
    out = runs / path.stem
    say.print(f"{path.stem}: {plan['summary']}")
    result: dict[str, Any] = {"experiment": path.stem, "runs": {}}
    for run in plan["runs"]:
        say.print(f"run {run['name']}")
        models, files = (run.get(k, plan.get(k)) for k in ("models", "data"))
        target, reference, texts, prefixes, base = _models(models, files or {}, runs, quiet)
        job = audit.AuditJob(
            target=target,
            reference=reference,
            texts=texts,
            prefixes=prefixes,
            out=out / run["name"],
            store=out / "losses",
            attacks=run["attacks"],
            settings=_settings(run, base),
            quiet=quiet,
            command=f"sama-jax experiment {name}",
        )
        done = audit.run_audit(job)
        assert done is not None
        pairs = [pair for pair in plan["compare"] if set(pair) <= set(done.metrics["attacks"])]
        compared = [_compare(done.rows, a, b, job.settings.seed) for a, b in pairs]
        result["runs"][run["name"]] = {"metrics": done.metrics["attacks"], "compare": compared}
        if not quiet:
            Console().print(tables.metrics_table(done.metrics, done.rows, done.cost))
            _print_comparison(compared)
    write_json(out / "experiment.json", result)
    say.print(f"results: {out}")
    return result


def _models(
    models: Any, files: dict[str, str], runs: Path, quiet: bool
) -> tuple[Path, Path, data.Texts, data.Texts | None, config.AuditSettings]:
    """Target, reference, texts, prefixes, and the settings that go with them."""
    if isinstance(models, str):
        made = demo.prepare(runs / "demo", network=_DEMOS[models], quiet=quiet)
        texts = data.read_split(made.members, made.nonmembers)
        prefixes = data.read_texts(made.prefixes)
        return made.target, made.base, texts, prefixes, demo.audit_settings()
    if "data" in files:
        texts = data.read_texts(Path(files["data"]))
    elif {"members", "nonmembers"} <= set(files):
        texts = data.read_split(Path(files["members"]), Path(files["nonmembers"]))
    else:
        raise DataError("data: expected a file `data`, or files `members` and `nonmembers`")
    prefixes = data.read_texts(Path(files["prefixes"])) if "prefixes" in files else None
    folders = Path(models["target"]), Path(models["reference"])
    return *folders, texts, prefixes, config.AuditSettings()


def _settings(run: dict[str, Any], base: config.AuditSettings) -> config.AuditSettings:
    """Returns the settings of a run: those of its models, its own, and its preset's."""
    own = {name: run[name] for name in ("preset", "max_length", "seed") if name in run}
    fields = {**vars(base), **own}
    del fields["sama"]  # the preset's
    return config.AuditSettings.of(passes=run.get("passes"), overrides=run.get("set", []), **fields)


def _compare(rows: Sequence[Row], first: str, second: str, seed: int) -> dict[str, Any]:
    """AUC of `second` minus `first` on the texts that both scored, with its interval."""
    found = results.paired(rows, second, first, seed)
    return {"from": first, "to": second, "difference": found["difference"], "ci": found["ci"]}


def _print_comparison(compared: list[dict[str, Any]]) -> None:
    if not compared:
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("from", "to", "AUC gained (95 % interval, paired)"):
        table.add_column(column)
    for row in compared:
        low, high = row["ci"]
        gained = f"{row['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        table.add_row(row["from"], row["to"], gained)
    Console().print(table)

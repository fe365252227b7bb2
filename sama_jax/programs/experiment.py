"""Runs experiments: every run of a file is an audit, in every regime that its models name.

`experiment_file` says what a file holds. Runs in a laboratory are repeated in each of its regimes;
seeds of one regime are joined in a summary.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from sama_jax import config
from sama_jax.core.pooling import pool
from sama_jax.errors import ValidityError
from sama_jax.programs import audit, demo, laboratory, smol
from sama_jax.programs.experiment_file import (
    DEMOS,
    FIELD_NAMES,
    FORM,
    SMOL,
    base_settings,
    find,
    read,
    regimes_of,
    run_settings,
)
from sama_jax.programs.forms import form_of
from sama_jax.programs.jobs import AuditJob
from sama_jax.reporting import results, tables
from sama_jax.storage.files import write_json
from sama_jax.storage.run_folder import Row
from sama_jax.terminal import Terminal
from sama_jax.texts.read import Texts, read_split, read_texts


def run_experiment(name: str, runs: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Runs every run of an experiment, prints its tables, writes `experiment.json`.

    Results go to the folder of its name in `runs`; the demo's models are made, or found, in
    `runs/demo`, those of `smol` in `runs/smol-models`, those of a laboratory in `runs/laboratory`,
    so that experiments share them. Runs are audits: what is finished is kept, losses that two of
    them read are computed once, and the same command continues. Raises `ValidityError` if results
    are void, once all runs are made; in a laboratory only if all of them are.
    """
    path = find(name)
    plan, terminal = read(path), Terminal(quiet=quiet)
    out = runs / path.stem
    terminal.say(f"{path.stem}: {plan['summary']}")
    result: dict[str, Any] = {"experiment": path.stem, "runs": {}}
    cases = list(_cases(plan))
    for number, case in enumerate(cases, 1):
        terminal.say(f"run {case.name}" + (f" ({number} of {len(cases)})" if case.regime else ""))
        given = _inputs(case.models, case.files, runs, quiet)
        job = AuditJob(
            target=given.target,
            reference=given.reference,
            adapter=given.adapter,
            texts=given.texts,
            prefixes=given.prefixes,
            out=out / case.name,
            store=out / "losses",
            attacks=case.run["attacks"],
            settings=run_settings(case.run, given.settings),
            figures=case.regime is None,
            quiet=quiet,
            command=f"sama-jax experiment {name}",
        )
        found = result["runs"][case.name] = _run(job, plan["compare"], terminal)
        if case.regime is not None:
            found["regime"] = {"setting": case.regime.setting, "seed": case.regime.seed}
            found["run"], found["utility"] = case.run["name"], given.utility
        write_json(out / "experiment.json", result)
    if any(case.regime for case in cases):
        result["summary"] = summarise(result["runs"])
        write_json(out / "experiment.json", result)
        terminal.show(_summary_table(result["summary"]))
    terminal.say(f"results: {out}")
    void = [name for name, found in result["runs"].items() if "void" in found]
    if void and (len(void) == len(cases) or not any(case.regime for case in cases)):
        raise ValidityError(f"{out}: void: {', '.join(void)}; see the report of each")
    return result


class _Case(NamedTuple):
    """One audit of an experiment."""

    name: str
    """Of its folder, below that of the experiment."""
    run: dict[str, Any]
    models: Any
    files: dict[str, Any]
    regime: laboratory.Regime | None


def _cases(plan: dict[str, Any]) -> Iterator[_Case]:
    """Yields the audits of an experiment, all of a regime one after the other."""
    runs = [(run, regimes_of(run.get("models", plan["models"]))) for run in plan["runs"]]
    for run, regimes in runs:
        models, files = (run.get(k, plan[k]) for k in ("models", "data"))
        if not regimes:
            yield _Case(run["name"], run, models, files, None)
    for regime in dict.fromkeys(regime for _, regimes in runs for regime in regimes):
        for run, regimes in runs:
            if regime in regimes:
                yield _Case(f"{regime.name}/{run['name']}", run, regime, {}, regime)


def _run(job: AuditJob, compare: Sequence[Sequence[str]], terminal: Terminal) -> dict[str, Any]:
    """Audits, prints the tables, and returns what experiment.json says of it."""
    try:
        done = audit.run_audit(job)
    except ValidityError as error:  # the other runs may be sound
        terminal.say(f"void: {error}")
        return {"void": str(error)}
    assert done is not None
    pairs = [pair for pair in compare if set(pair) <= set(done.metrics["attacks"])]
    compared = [_compare(done.rows, a, b) for a, b in pairs]
    terminal.show(tables.metrics_table(done.metrics, done.rows, done.cost))
    if compared:
        terminal.show(_comparison_table(compared))
    return {"metrics": done.metrics["attacks"], "compare": compared}


class _Inputs(NamedTuple):
    """What a run works on, and the settings that go with it."""

    target: Path
    reference: Path
    adapter: Path | None
    texts: Texts
    prefixes: Texts | None
    settings: config.AuditSettings
    utility: dict[str, float] | None = None
    """Held-out losses of the models; known only of those that are made here."""


def _inputs(models: Any, files: dict[str, Any], runs: Path, quiet: bool) -> _Inputs:
    """Makes or finds the models, and reads the texts."""
    if isinstance(models, str | laboratory.Regime):
        utility = None
        if isinstance(models, laboratory.Regime):
            made = laboratory.prepare(models, runs / "laboratory", quiet=quiet)
            utility = laboratory.utility(made)
        elif models in SMOL:
            made = smol.prepare(runs / "smol-models", causal=SMOL[models], quiet=quiet)
        else:
            made = demo.prepare(runs / "demo", network=DEMOS[models], quiet=quiet)
        texts, prefixes = read_split(made.members, made.nonmembers), read_texts(made.prefixes)
        settings = base_settings(models)
        return _Inputs(made.target, made.base, None, texts, prefixes, settings, utility)
    named = [files.get(name) for name in FIELD_NAMES]
    reference = Path(models["reference"])
    adapter = Path(models["adapter"]) if "adapter" in models else None
    target = Path(models.get("target", reference))
    template, loss_on, end_tokens = (files.get(name) for name in FORM)
    adapters = [] if adapter is None else [adapter]
    form = form_of(template, loss_on, end_tokens or 0, target, adapters)
    if "data" in files:
        texts = read_texts(Path(files["data"]), *named, form=form)
    else:
        texts = read_split(Path(files["members"]), Path(files["nonmembers"]), *named, form=form)
    prefixes = None
    if "prefixes" in files:
        prefixes = read_texts(Path(files["prefixes"]), *named, labels_needed=False, form=form)
    return _Inputs(target, reference, adapter, texts, prefixes, base_settings(models))


# --- tables --------------------------------------------------------------------------------------


def summarise(runs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Joins the runs of a laboratory over seeds.

    Returns:
      for each regime and run `setting`, `run`, `seeds` (those that are not void), `void` (those
      that are), `utility` (means of the held-out losses), `auc` and `compare`: attack, or
      `"B - A"`, -> `mean`, `low`, `high` (`core.pooling`).
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for found in runs.values():
        if "regime" in found:
            groups.setdefault((found["regime"]["setting"], found["run"]), []).append(found)
    lines = []
    for (setting, run), all_found in groups.items():
        sound = [found for found in all_found if "void" not in found]
        line: dict[str, Any] = {"setting": setting, "run": run, "auc": {}, "compare": {}}
        line["seeds"] = [found["regime"]["seed"] for found in sound]
        line["void"] = [found["regime"]["seed"] for found in all_found if "void" in found]
        given = [found["utility"] for found in all_found]
        line["utility"] = {k: sum(u[k] for u in given) / len(given) for k in given[0]}
        for attack in sound[0]["metrics"] if sound else ():
            known = [found["metrics"].get(attack) or {} for found in sound]
            if all(one.get("auc_ci") for one in known):
                joined = pool([m["auc"] for m in known], [m["auc_ci"] for m in known])
                line["auc"][attack] = joined._asdict()
        for pairs in zip(*(found["compare"] for found in sound)):
            differences = [pair["difference"] for pair in pairs]
            ends = [pair["ci"] or [pair["difference"]] * 2 for pair in pairs]
            name = f"{pairs[0]['to']} - {pairs[0]['from']}"
            line["compare"][name] = pool(differences, ends)._asdict()
        lines.append(line)
    return lines


def _summary_table(summary: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a table with a line a regime, run and attack or difference."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("regime", "run", "seeds", "attack", "AUC, or gain (95 % interval)"):
        table.add_column(column)
    for line in summary:
        seeds = f"{len(line['seeds'])}" + (f", {len(line['void'])} void" if line["void"] else "")
        named = line["setting"], line["run"], seeds
        for name, one in line["auc"].items():
            shown = f"{one['mean']:.3f} ({one['low']:.3f}–{one['high']:.3f})"
            table.add_row(*named, name, shown)
        for name, one in line["compare"].items():
            shown = results.paired_text(one["mean"], (one["low"], one["high"]))
            table.add_row(*named, name, shown)
        if not line["auc"]:
            table.add_row(*named, tables.MISSING, tables.MISSING)
    return table


def _compare(rows: Sequence[Row], first: str, second: str) -> dict[str, Any]:
    """Returns the AUC of `second` minus `first` on texts that both scored, with its interval."""
    found = results.paired(rows, second, first)
    return {"from": first, "to": second, "difference": found["difference"], "ci": found["ci"]}


def _comparison_table(compared: list[dict[str, Any]]) -> Table:
    """Returns the table of what was compared, a line a pair."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("from", "to", "AUC gained (95 % interval, paired)"):
        table.add_column(column)
    for row in compared:
        gained = results.paired_text(row["difference"], row["ci"])
        table.add_row(row["from"], row["to"], gained)
    return table

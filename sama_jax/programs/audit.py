"""Audits a fine-tuned model: texts and two model folders in, a folder of scores and a report out.

Batches are independent and their results are appended as they are made, so a run can be cut off
at any moment and continued by the same command.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jax.sharding import Mesh
from rich.console import Console

from sama_jax.devices import mesh
from sama_jax.devices.matmul_rate import matmul_rate
from sama_jax.devices.placement import Placement, choose_placement, device_bytes
from sama_jax.devices.sharding import parameter_shardings
from sama_jax.engine.batching import BatchShapes, distinct_rows
from sama_jax.engine.costs import cost_of, sum_costs
from sama_jax.engine.estimate import estimate
from sama_jax.engine.evidence import Evidence, gather_evidence
from sama_jax.engine.loop import Filled, Setup, fill_store
from sama_jax.engine.readings import Readings
from sama_jax.engine.roles import ModelRole, make_probe, resident_bytes
from sama_jax.engine.scores import score_corpus, score_rows
from sama_jax.engine.tasks import SPANS
from sama_jax.engine.views import make_plain_views
from sama_jax.errors import DataError, UsageError
from sama_jax.programs import pipeline_control
from sama_jax.programs.audit_gates import gates_after, require_valid
from sama_jax.programs.audit_inputs import (
    Chosen,
    Inputs,
    Tokenised,
    choose_attacks,
    read_inputs,
    tokenise,
    view_sources,
    wanted_attacks,
)
from sama_jax.programs.audit_models import kind_notes
from sama_jax.programs.audit_records import (
    OpenRun,
    open_run,
    require_open,
    require_outputs,
    require_sama,
    save_replay,
    text_rows,
    update_index,
    write_densities,
)
from sama_jax.programs.data_gates import data_gates
from sama_jax.programs.finished import finished_run
from sama_jax.programs.jobs import AuditJob
from sama_jax.programs.second_seed import score_again
from sama_jax.storage.calibration_file import withdraw_stale
from sama_jax.storage.files import write_atomic, write_json
from sama_jax.storage.run_folder import METRICS, Row, RunFolder, noted
from sama_jax.terminal import console
from sama_jax.validity.gate import Gate, told, voids, warnings, worst_of
from sama_jax.weights import model_folder
from sama_jax.weights.adapter_tokenizer import require_adapters_ids

if TYPE_CHECKING:
    from sama_jax.reporting.results import Metrics


class AuditResult(NamedTuple):
    """What `run_audit` returns; the same is in the output folder."""

    rows: list[Row]
    metrics: "Metrics"
    cost: dict[str, Any]
    out: Path

    def columns(self) -> dict[str, list[Any]]:
        """Returns id, label and the score of each attack as columns, as a data frame takes them.

        `pandas.DataFrame(result.columns())` and `pyarrow.table(result.columns())` make tables;
        a label or a score that is missing is None.
        """
        names = [name for row in self.rows[:1] for name in row.get("scores") or {}]
        return {
            "id": [row["id"] for row in self.rows],
            "label": [row.get("label") for row in self.rows],
            **{n: [(row.get("scores") or {}).get(n) for row in self.rows] for n in names},
        }

    def _repr_html_(self) -> str:
        """Shows the verdict and the table of attacks in a notebook."""
        from sama_jax.reporting.html import summary

        return summary(self.rows, self.metrics, self.cost)


def run_audit(job: AuditJob) -> AuditResult | None:
    """Runs or continues an audit.

    Returns:
      the results; None for a dry run, and where another process or `merge` writes them.

    Raises:
      SamaError: one of `sama_jax.errors`; `Interrupted` when a signal stopped it in good order.
    """
    quiet = job.quiet or job.peers.rank > 0
    say = console(quiet)
    require_outputs(job)
    wanted = wanted_attacks(job)
    inputs = read_inputs(job)
    adapters = inputs.roles["target"].folder.adapters
    require_adapters_ids(adapters, inputs.tokenizer, inputs.texts)
    chosen = choose_attacks(job, wanted, inputs)
    tokenised = tokenise(job, inputs, chosen.prefixes, quiet=quiet)
    done = None if job.dry_run else finished_run(job, inputs, chosen, tokenised)
    if done is not None:
        say.print(f"{job.out}: finished before, and nothing has changed since")
        require_valid(job.out, done.metrics["validity"], done.notes, strict=job.strict)
        return AuditResult(done.rows, done.metrics, done.cost, job.out)
    data = data_gates(job, inputs, tokenised)
    tasks = inputs.tasks_of(chosen.attacks, job.settings, tokenised.replayed)
    require_sama(job, tasks)
    announce(say, data.gates, inputs, chosen, tokenised, job.settings.max_length)
    sources = view_sources(job, inputs, chosen.prefixes)
    tables = make_plain_views(tasks, tokenised.table, sources)
    placed = place(job, inputs)
    devices = describe(placed, len(inputs.roles))
    say.print(devices)
    setup = make_setup(job, inputs, tokenised, placed)._replace(sources=sources, quiet=quiet)
    halves = None
    if job.pipeline_control:
        halves = pipeline_control.require_possible(job, inputs, tokenised, placed.device_bytes)
    if job.dry_run:
        require_open(job, inputs, chosen, tokenised)
        left = {view: distinct_rows(tables.get(view, tables["text"])) for view in tasks.views}
        rate = matmul_rate(setup.shapes.product, setup.shapes.model.dtype)
        if halves is not None:
            say.print(pipeline_control.estimate(halves, setup))
        say.print(estimate(tasks, tables, left, inputs.roles, setup.shapes, rate))
        return None
    with open_run(job, inputs, chosen, tokenised, devices) as run:
        earlier = run.folder.manifest.get("gates") or []
        run.folder.write_manifest(gates=worst_of([earlier, data.gates]))
        run.folder.keep_note(*inputs.tokenizer.doubts(tokenised.encoded), *kind_notes(inputs.roles))
        primary = run.folder.manifest["protocol"]["primary"]
        if halves is not None:
            texts = chosen, halves, primary
            made = pipeline_control.run_pipeline_control(job, inputs, *texts, setup, say)
            run.folder.write_manifest(gates=worst_of([run.folder.manifest["gates"], [made]]))
        again = score_again(job, inputs, chosen, primary, setup, say)
        rows = text_rows(job, inputs, tokenised, chosen.prefixes, data.blind, again)
        readings = Readings(tasks, job.settings, tables, inputs.store_keys, run.folder.store)
        setup = setup._replace(shared=run.shared)
        filled = fill_store(setup, readings, run.folder, inputs.ids, say)
        return publish(job, run, inputs, chosen, tokenised, filled, rows, say)


def announce(
    say: Console,
    gates: Sequence[Gate],
    inputs: Inputs,
    chosen: Chosen,
    tokenised: Tokenised,
    max_length: int,
) -> None:
    """Says what was noticed about texts and attacks before anything is computed."""
    for one in [*voids(gates), *warnings(gates)]:
        say.print(f"{one['status']}: {told(one)}")
    if inputs.references.count == 0:
        say.print("no reference: only attacks that read the target alone can be computed")
    truncated = sum(tokenised.truncated)
    if truncated:
        say.print(f"{truncated} of {len(inputs.texts)} texts are cut at {max_length} tokens")
    cut = [e.prompt_cut for e in tokenised.encoded if e.prompt_cut]
    if cut:
        say.print(
            f"{len(cut)} of {len(inputs.texts)} prompts are cut at their beginning, by "
            f"{sum(cut):,} tokens in all, so that they fit into {max_length} with their responses"
        )
    if chosen.prefixes.taken:
        say.print(f"{len(chosen.prefixes.taken)} texts serve as prefixes and are not evaluated")
    for name, reason in chosen.left_out.items():
        say.print(f"not computed: {name} ({reason})")


# --- devices -------------------------------------------------------------------------------------


class Placed(NamedTuple):
    """Where the models of a run are."""

    placement: Placement
    device_bytes: int
    """Memory of the smallest device of all processes."""


def place(job: AuditJob, inputs: Inputs) -> Placed:
    """Decides what each device holds. Raises `UsageError` if nothing fits."""
    # The smallest everywhere, or processes would split the work differently.
    room = min(job.peers.gather("memory", device_bytes()))
    folders = [role.folder for role in inputs.roles.values()]

    def splits(grid: Mesh) -> None:
        for folder in folders:
            parameter_shardings(grid, folder.abstract_params, folder.model.arch)

    placement = choose_placement(
        job.parallel,
        job.mesh,
        job.models,
        model_folder.num_bytes(folders),
        max(model_folder.num_bytes([f]) for f in folders),
        splits,
        fully_sharded=job.fully_sharded,
        room=room,
    )
    return Placed(placement, room)


def describe(placed: Placed, count: int) -> str:
    """Says in one line what each device holds of so many models."""
    layout = placed.placement.layout
    where = f"{len(layout.devices)} x {layout.devices[0].device_kind}, {layout.describe()}"
    return f"devices: {where}; {_turns(count, together=placed.placement.together)}"


def _turns(count: int, *, together: bool) -> str:
    if count == 1:
        return "one model"
    every = "both" if count == 2 else f"all {count}"
    return f"{every} models together" if together else "one model after the other"


def make_setup(job: AuditJob, inputs: Inputs, tokenised: Tokenised, placed: Placed) -> Setup:
    """Gathers how the passes are made: models, devices, processes."""
    layout, in_turn = placed.placement.layout, not placed.placement.together
    roles: list[ModelRole] = list(inputs.roles.values())
    shapes = BatchShapes(
        roles[0].folder.model,
        min(role.folder.max_length for role in roles),
        job.settings,
        layout,
        resident_bytes(roles, layout, in_turn=in_turn),
        placed.device_bytes,
        job.batch_size,
        tuple(role.folder.model for role in roles[1:]),
    )
    return Setup(
        inputs.roles,
        shapes,
        in_turn=in_turn,
        peers=job.peers,
        probes={
            name: make_probe(role.folder, inputs.tokenizer_of(name), tokenised.ids_of(name))
            for name, role in inputs.roles.items()
        },
        include_votes=job.include_votes,
    )


# --- results -------------------------------------------------------------------------------------

_HINT = (
    "each process has written its own part, since --out is not on a disk that all of them share: "
    "copy the folders to one machine, then sama-jax merge OUT PART_DIR..."
)


def publish(
    job: AuditJob,
    run: OpenRun,
    inputs: Inputs,
    chosen: Chosen,
    tokenised: Tokenised,
    filled: Filled,
    rows: list[dict[str, Any]],
    say: Console,
) -> AuditResult | None:
    """Joins the scores of all processes, and writes scores, metrics and report.

    Returns:
      the results; None in a process that leaves them to another one or to `merge`.

    Raises:
      ValidityError: the result is void; under --strict, something was noticed.
    """
    folder, readings = run.folder, filled.readings
    cost = cost_of(readings.tasks, filled.costs, folder.manifest.get("cost"))
    if job.peers.count > 1:
        costs = job.peers.gather("passes", cost)
        mesh.disconnect()
        if not run.shared:
            update_index(folder, rows, readings.tables)
            notes, _ = _ask_gates(folder, inputs, tokenised, readings, cost)
            say.print(_HINT)
            require_valid(job.out, [], notes, strict=job.strict)
            return None
        if job.peers.rank > 0:
            return None
        folder.refresh()
        everything = range(len(rows))
        score_rows(readings, folder, inputs.ids, everything, include_votes=job.include_votes)
        cost = sum_costs(costs)
    score_corpus(readings, folder, inputs.ids, [t.scored for t in inputs.texts], inputs.labels)
    update_index(folder, rows, readings.tables)
    joined = folder.join(rows, [attack.name for attack in chosen.attacks])
    # SciPy's statistics and scikit-learn: two seconds to import.
    from sama_jax.reporting import report, results

    notes, found = _ask_gates(folder, inputs, tokenised, readings, cost)
    metrics = results.metrics_of(joined, folder.manifest)
    write_json(job.out / METRICS, metrics)
    write_densities(job.out, found, inputs.labels)
    withdraw_stale(job.out, joined, void=bool(voids(metrics["validity"])))
    save_replay(job, readings, inputs, tokenised)
    if job.include_text:
        write_tokens(job, metrics, say)
    folder.write_manifest(finished=True)
    folder.log("finished", texts=len(joined))
    report.write_report(job.out, figures=job.figures, metrics=metrics)
    folder.record_files()
    require_valid(job.out, metrics["validity"], notes, strict=job.strict)
    return AuditResult(joined, metrics, folder.manifest["cost"], job.out)


def _ask_gates(
    folder: RunFolder,
    inputs: Inputs,
    tokenised: Tokenised,
    readings: Readings,
    cost: dict[str, Any],
) -> tuple[list[str], Evidence]:
    """Writes cost, notes and all gates into the manifest; returns the notes and what was read."""
    notes, found = noted(folder.path), gather_evidence(readings)
    asked = gates_after(inputs, tokenised, found, readings.tables.get(SPANS.name))
    gates = worst_of([folder.manifest["gates"], asked])
    folder.write_manifest(notes=notes, cost=cost, gates=gates)
    return notes, found


def write_tokens(job: AuditJob, metrics: "Metrics", say: Console) -> None:
    """Writes the texts of the largest scores token by token, which only --include-text asks for."""
    from sama_jax.programs.explain import explain
    from sama_jax.reporting import tokens
    from sama_jax.reporting.results import headline

    given = [*job.texts.texts, *(job.control.texts if job.control else [])]
    try:
        found = explain(job.out, given)
    except (DataError, UsageError) as error:  # no attack has read both models token by token
        say.print(f"no {tokens.PAGE}: {error}")
        return
    write_atomic(job.out / tokens.PAGE, tokens.page(found, headline(metrics)), private=True)

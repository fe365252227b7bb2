"""Fills the loss store: runs what is missing through both models, and scores what is complete.

The loop in `run_batches` overlaps host and device one deep. While a call runs on the devices, the
host stores what the call before it gave, scores a finished batch, and prepares the next call.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from sama_jax.arrays import Params
from sama_jax.devices.matmul_rate import matmul_rate
from sama_jax.devices.processes import Peers
from sama_jax.devices.runner import Runner
from sama_jax.devices.strategy import Layout
from sama_jax.engine.batching import Batch, BatchShapes, distinct_rows, same_tokens
from sama_jax.engine.costs import Costs
from sama_jax.engine.estimate import estimate
from sama_jax.engine.forward import Call, Job, Programs, calls_of, jobs_of, values_of
from sama_jax.engine.other_readings import VERSION, can_tell
from sama_jax.engine.readings import Readings
from sama_jax.engine.roles import ModelRole, Probe, load, pad_id
from sama_jax.engine.scores import score_rows
from sama_jax.engine.tasks import Task, Tasks, stages
from sama_jax.engine.views import ViewSources, make_view
from sama_jax.errors import ModelError, UsageError
from sama_jax.storage.loss_store import make_record
from sama_jax.storage.run_folder import RunFolder
from sama_jax.terminal import ProgressBar
from sama_jax.untrusted import printable


class Setup(NamedTuple):
    """How the passes of a run are made: models, devices, processes."""

    roles: Mapping[str, ModelRole]
    shapes: BatchShapes
    in_turn: bool = False
    """Whether only one model at a time is in memory."""
    peers: Peers = Peers()
    shared: bool = True
    """Whether all processes of the run see the same output folder."""
    sources: ViewSources | None = None
    """What guided views are made from; None where there are none."""
    probes: Mapping[str, Probe] = MappingProxyType({})
    """What each role is checked on when it is loaded; without it its weights alone are."""
    include_votes: bool = False
    quiet: bool = False

    @property
    def layout(self) -> Layout:
        """The devices and what each holds."""
        return self.shapes.layout

    @property
    def pad_id(self) -> int | None:
        """The token of visible padding, or None where padding is hidden."""
        return pad_id(self.roles["target"].folder, self.shapes.settings)


class Filled(NamedTuple):
    """What `fill_store` gives back, besides what is stored."""

    readings: Readings
    """With the views that were made on the way."""
    costs: Costs


def fill_store(
    setup: Setup,
    readings: Readings,
    folder: RunFolder,
    ids: Sequence[str],
    say: Console,
    held: Mapping[str, Params] | None = None,
) -> Filled:
    """Computes what is missing, batch by batch, and scores each batch when it is complete.

    Args:
      setup: models, devices and processes.
      readings: the run's texts, tasks and store.
      folder: where scores and the log are appended.
      ids: of the texts, in the order of the tables.
      say: where to say what happens.
      held: weights by their key in the store, if they are on the devices already.

    Raises:
      UsageError: the processes of the run cannot do it together.
      ModelError: a model is read at the wrong position.
    """
    run = _Run(setup, folder, ids, Programs(setup.layout), Costs())
    _agree(setup, readings)
    _say_damage(readings, say)
    readings = make_ready_views(setup, readings)
    left = {view: pending(readings, view) for view in readings.tasks.views}
    if any(left.values()):
        rate = matmul_rate(setup.shapes.product, setup.shapes.model.dtype)
        line = estimate(readings.tasks, readings.tables, left, setup.roles, setup.shapes, rate)
        say.print(line)
    turns = [[role] for role in setup.roles] if setup.in_turn else [[*setup.roles]]
    params, unchecked = held or {}, _unchecked(setup, readings)
    for stage in stages(readings.tasks):
        if any(task.view not in readings.tables for task in stage):
            setup.peers.gather("guides", None)
            readings.store.refresh()
            readings = make_ready_views(setup, readings)
        for turn in turns:
            roles = roles_read(setup.roles, turn, readings.tasks)
            for view in dict.fromkeys(task.view for task in stage):
                tasks = [task for task in stage if task.view == view]
                rows = own_rows(setup, readings, tasks, list(roles))
                keys = {r.store_key for r in roles.values()}
                if (rows or keys & unchecked) and not keys <= params.keys():
                    params = {}  # frees the other model before this one is loaded
                    given = list(roles.values()), setup.layout, say
                    params, noticed, judged = load(*given, probes=setup.probes, quiet=setup.quiet)
                    for note in noticed:
                        folder.keep_note(note)
                    if not noticed:  # else the next run says it, too
                        _note_checked(setup, readings, judged & unchecked)
                    unchecked -= keys
                if rows:
                    run_batches(run, readings, tasks, roles, rows, params)
        turns.reverse()  # the model that is in memory goes first
    if run.costs.programs:
        say.print(f"{run.costs.programs} programs compiled in {run.costs.compile_seconds:.1f} s")
    score_rows(readings, folder, ids, range(len(ids)), include_votes=setup.include_votes)
    return Filled(readings, run.costs)


class _Run(NamedTuple):
    """What stays the same while the store is filled."""

    setup: Setup
    folder: RunFolder
    ids: Sequence[str]
    programs: Programs
    costs: Costs


# --- what is left --------------------------------------------------------------------------------


def _say_damage(readings: Readings, say: Console) -> None:
    if readings.store.damaged_bytes:
        damaged = f"{readings.store.damaged_bytes:,} bytes of the loss store are damaged"
        say.print(f"note: {damaged}; what is missing is computed anew")


CHECKED = f"readings-{VERSION}"
"""Plan of the empty record that says of a model and the texts of a run that it is read rightly."""


def _unchecked(setup: Setup, readings: Readings) -> set[str]:
    """Returns the keys of the models that these texts can judge, and have not judged before.

    Losses may have been stored by runs of too few texts to tell whether a model is read rightly.
    """
    return {
        setup.roles[name].store_key
        for name, probe in setup.probes.items()
        if can_tell(probe.texts)
        and not readings.store.exists(setup.roles[name].store_key, CHECKED, probe.digest)
    }


def _note_checked(setup: Setup, readings: Readings, keys: Collection[str]) -> None:
    """Notes in the store that the run's texts have judged these models, once for all processes."""
    if setup.peers.rank > 0:
        return
    nothing = make_record(np.full((1, 0), -1), np.zeros((1, 0)))
    digests = {setup.roles[name].store_key: one.digest for name, one in setup.probes.items()}
    for key in sorted(keys):
        readings.store.append(key, CHECKED, [digests[key]], [nothing])


def _agree(setup: Setup, readings: Readings) -> None:
    """Tells the processes of a run what each of them has stored, so that none computes it again.

    Afterwards all of them see the same records, since none has begun to append.
    """
    if setup.peers.count == 1:
        return
    keys = [] if setup.shared else readings.store.keys()
    for other in setup.peers.gather("records", keys):
        readings.store.note_elsewhere(tuple(key) for key in other)
    unmade = [view for view in readings.tasks.views if view not in readings.tables]
    if unmade and not setup.shared:
        raise UsageError(
            f"attacks on {unmade[0]} read losses of all texts on the way, but --out is not "
            "on a disk that all processes share; use one that is, or leave them out"
        )


def make_ready_views(setup: Setup, readings: Readings) -> Readings:
    """Makes the guided views whose guides have been read for every text."""
    for name, view in readings.tasks.views.items():
        if view is None or name in readings.tables:
            continue
        guides = [t.guide for t in readings.tasks.of_view(name) if t.guide is not None]
        if any(_incomplete(readings, guide) for guide in guides):
            continue
        assert setup.sources is not None, "views need texts"
        values = _guide_values(readings, guides[0]) if guides else None
        table = make_view(view, readings.tables["text"], setup.sources, values)
        readings = readings.with_view(name, table)
    return readings


def _incomplete(readings: Readings, guide: Task) -> bool:
    """Tells whether a guide's values are missing for any text, in any process."""
    table = readings.tables.get(guide.view)
    if table is None:
        return True
    rows = np.flatnonzero(table.readable)
    return any(readings.lacks(guide, table.store_keys[row]) for row in rows)


def _guide_values(readings: Readings, guide: Task) -> list[Float[np.ndarray, "t l"]]:
    """Reads the values of a guide, one text after the other."""
    role = next(iter(guide.channels))
    return [readings.values(guide, [row], role)[0] for row in range(readings.num_texts)]


def pending(
    readings: Readings,
    view: str,
    tasks: Sequence[Task] | None = None,
    roles: Collection[str] | None = None,
) -> list[int]:
    """Returns the first text of each distinct sequence of tokens that has values missing.

    Args:
      readings: the run's texts and what is stored.
      view: where to look; one that is not made yet cannot have been read, so all texts count.
      tasks: what is read; None: all of the view's.
      roles: from which models; None: all.
    """
    table = readings.tables.get(view)
    if table is None:
        return distinct_rows(readings.tables["text"])
    tasks = readings.tasks.of_view(view) if tasks is None else tasks
    models = readings.store_keys if roles is None else roles
    wanted = [(task, role) for task in tasks for role in task.channels if role in models]
    return [
        row
        for row in distinct_rows(table)
        if any(readings.missing(task, role, table.store_keys[row]) for task, role in wanted)
    ]


def own_rows(
    setup: Setup, readings: Readings, tasks: Sequence[Task], roles: Collection[str]
) -> list[int]:
    """Returns the `pending` texts of some tasks of one view that this process works on.

    On a mesh all processes work on all of them; else each has every n-th batch of texts, with all
    of their views, whatever has been stored before.
    """
    rows, count = pending(readings, tasks[0].view, tasks, roles), setup.peers.count
    if count == 1 or setup.layout.works_on_all_batches:
        return rows
    texts = readings.tables["text"]
    batches = setup.shapes.batches(texts, distinct_rows(texts))
    owner = {row: i % count for i, batch in enumerate(batches) for row in batch.texts}
    return [row for row in rows if owner.get(row, row % count) == setup.peers.rank]


def roles_read(
    roles: Mapping[str, ModelRole], turn: Collection[str], tasks: Tasks
) -> dict[str, ModelRole]:
    """Returns the models of one turn that any task reads."""
    read = {role for task in tasks.all for role in task.channels}
    return {name: roles[name] for name in turn if name in read and name in roles}


# --- doing it ------------------------------------------------------------------------------------


class _Started(NamedTuple):
    """A call that runs on the devices."""

    call: Call
    runner: Runner
    out: jax.Array
    begun: float


def run_batches(
    run: _Run,
    readings: Readings,
    tasks: Sequence[Task],
    roles: Mapping[str, ModelRole],
    rows: Collection[int],
    params: Mapping[str, Params],
) -> None:
    """Runs some tasks of one view on some texts, batch by batch.

    One call runs at a time, since two would share the same cores or memory; what the call before it
    gave is stored meanwhile.
    """
    setup, view = run.setup, tasks[0].view
    table = readings.tables[view]
    batches = setup.shapes.batches(table, rows)
    _log_buckets(run.folder, view, batches)
    calls = (
        call
        for batch in batches
        for call in calls_of(
            list(jobs_of(batch, tasks, roles, readings)), readings, setup.layout, setup.pad_id
        )
    )
    title, done = "audit" if view == "text" else f"audit, {view}", len(run.ids) - len(rows)
    with ProgressBar(title, len(run.ids), "texts", quiet=setup.quiet, done=done) as bar:
        running: _Started | None = None
        outputs: list[np.ndarray] = []
        same = same_tokens(table)
        for call in calls:
            if running is not None:
                _wait(running, run.costs)
            started = _start(run, call, params, bar)
            if running is not None:
                _finish(run, readings, running, outputs, same, bar)
            running = started
        if running is not None:
            _wait(running, run.costs)
            _finish(run, readings, running, outputs, same, bar)


def _start(run: _Run, call: Call, params: Mapping[str, Params], bar: ProgressBar) -> _Started:
    """Hands a call to the devices, and compiles its program first if there is none."""
    runner, role = run.programs.runner(call), call.job.role
    weights, length = params[role.store_key], call.job.batch.length
    if not runner.is_compiled(*call.args):
        bar.note(f"compiling for {length} tokens")
        begun = time.monotonic()
        runner.compile(weights, *call.args)
        seconds = time.monotonic() - begun
        run.costs.programs += 1
        run.costs.compile_seconds += seconds
        run.folder.log("compile", length=length, compile_seconds=round(seconds, 2))
    bar.note(f"{role.name}, {length} tokens")
    begun = time.monotonic()
    return _Started(call, runner, runner.start(weights, *call.args), begun)


def _wait(running: _Started, costs: Costs) -> None:
    """Waits until a call has ended; its seconds are its task's."""
    running.out.block_until_ready()
    costs.seconds[running.call.job.task.identity] += time.monotonic() - running.begun


def _finish(
    run: _Run,
    readings: Readings,
    ended: _Started,
    outputs: list[np.ndarray],
    same: Mapping[str, Sequence[int]],
    bar: ProgressBar,
) -> None:
    """Stores what a call gave, and scores its batch if it was the last one.

    Args:
      run: where it goes.
      readings: the run's texts and what is stored.
      ended: the call.
      outputs: of the calls of the same job before it; this one's is added.
      same: key in the store -> the rows of the texts with the same tokens.
      bar: the progress.
    """
    call, batch = ended.call, ended.call.job.batch
    outputs.append(ended.runner.fetch(ended.out)[: call.passes * len(call.job.channels)])
    if call.ends_job:
        table = readings.tables[call.job.task.view]
        values, positions = values_of(call, outputs, table)
        held = run.setup.layout.held(len(call.job.batch.rows))
        require_finite(call.job, values, np.where(held[:, None], positions, -1), run.ids)
        _store(run, readings, call.job, values, positions)
        outputs.clear()
    if call.ends_batch:
        keys = readings.tables[call.job.task.view].store_keys
        # In the batch's order: scores then find the plans that its passes have drawn.
        rows = [other for row in batch.texts for other in same[keys[row]]]
        votes = run.setup.include_votes
        score_rows(readings, run.folder, run.ids, rows, include_votes=votes)
        readings.plans.forget(batch.texts)
        bar.advance(len(batch.texts))


def require_finite(
    job: Job,
    values: Float[np.ndarray, "c t b k"],
    positions: Int[np.ndarray, "t b k"],
    ids: Sequence[str],
) -> None:
    """Raises `ModelError` unless a model gave a number wherever it was read.

    A loss that is none would count as a vote against membership, so nothing of it is stored.
    """
    used = (positions >= 0) & (job.batch.rows >= 0)[None, :, None]
    broken = used & ~np.isfinite(values)
    if broken.any():
        channel, step, place, slot = (int(x[0]) for x in np.nonzero(broken))
        text = printable(ids[int(job.batch.rows[place])])
        raise ModelError(
            f"{job.role.folder.path}: the {job.role.name} gives {job.channels[channel]} "
            f"{values[channel, step, place, slot]} at position {positions[step, place, slot]} of "
            f"text '{text}' ({int(broken.sum())} of {int(used.sum()) * len(values)} values are not "
            "finite); its weights, its adapter or its config.json are broken, or --dtype overflows"
        )


def _store(
    run: _Run,
    readings: Readings,
    job: Job,
    values: Float[np.ndarray, "c t b k"],
    positions: Int[np.ndarray, "t b k"],
) -> None:
    """Stores the values of the channels that are missing, each channel in one write."""
    layout, size = run.setup.layout, len(job.batch.rows)
    owned, held = layout.owned(size), layout.held(size)
    keys, task = readings.tables[job.task.view].store_keys, job.task
    count = sum(bool(owned[place]) for place, missing in job.missing.items() if missing)
    run.costs.passes_run += count * task.passes
    run.costs.tokens[task.identity] += count * task.passes * job.batch.length
    model, store = job.role.store_key, readings.store
    for number, channel in enumerate(job.channels):
        new = [place for place, missing in job.missing.items() if channel in missing]
        plan, names = task.stored(channel), {place: keys[job.batch.rows[place]] for place in new}
        store.note_elsewhere((model, plan, names[place]) for place in new if not held[place])
        here = [place for place in new if held[place]]
        records = [make_record(positions[:, place], values[number, :, place]) for place in here]
        store.append(model, plan, [names[place] for place in here], records)


def _log_buckets(folder: RunFolder, view: str, batches: Sequence[Batch]) -> None:
    counts: dict[str, int] = {}
    for batch in batches:
        name = str(batch.length)
        counts[name] = counts.get(name, 0) + len(batch.texts)
    folder.log("buckets", view=view, texts=counts)

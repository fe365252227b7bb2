"""Scoring: what attacks ask for, run through two models into the loss store, and scored from it.

The part of an audit that knows nothing of files of texts, flags or reports. A batch is padded,
masked and run for every task and model that misses it; its losses are stored in one write; then
every attack whose readings are complete is scored.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sama_jax import rng
from sama_jax.arrays import ForwardBatch, Params, TextKeyData
from sama_jax.attacks.registry import Attack, CorpusReading, Procedure
from sama_jax.config import AuditSettings, settings_hash
from sama_jax.core import losses, votes
from sama_jax.devices import memory, parallel, processes
from sama_jax.engine.reading import PLAN_ROWS, ROLES, Item, Reader, Task, passes
from sama_jax.errors import UsageError
from sama_jax.storage.loss_store import make_record
from sama_jax.storage.run_folder import RunFolder
from sama_jax.terminal import ByteBar, ProgressBar, binary_size, duration
from sama_jax.texts import data
from sama_jax.weights import model_folder

TOKENS_A_STEP = 1536
"""Tokens a device works on at once on a CPU: 16 rows of 96. Larger batches ran slower there."""
ACCELERATOR_TOKENS = 16384
PROGRAM_FLOPS = {"cpu": 3e11, "accelerator": 1e15}
"""What a device computes while a program compiles (some 3 s on a CPU, 5 s for an accelerator): a
bucket that saves less padding than that joins the next one."""
FORWARD_ROWS = ForwardBatch(0, 0, masks=1, positions=1, group=None, passes=None)  # pyright: ignore
"""Axis of the rows in each field of a `ForwardBatch`."""


Prepare = Callable[[tuple[int, ...]], tuple[ForwardBatch, np.ndarray]]
"""Slot sizes -> what `Work._forward` makes of a batch and a task, once for both models."""
Read = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Waits for what was started: values [c, t, b, k] and positions [t, b, k]."""


class _Overlap:
    """Host work beside device work: what is put off is done while the next call runs.

    One call at a time: two would share the same cores or memory.
    """

    def __init__(self, seconds: dict[str, float]):
        self._seconds = seconds
        self._running: tuple[jax.Array, str, float] | None = None
        self._due: list[Callable[[], None]] = []

    def launch(self, start: Callable[[], jax.Array], name: str) -> jax.Array:
        """Starts a call when the one before has ended; its seconds go to `name`."""
        self.wait()
        begun = time.monotonic()
        out = start()
        self._running = out, name, begun
        self._do_due()
        return out

    def put_off(self, work: Callable[[], None]) -> None:
        """`work` may read what was launched last."""
        self._due.append(work)

    def wait(self) -> None:
        """Until nothing runs."""
        if self._running is not None:
            out, name, begun = self._running
            self._running = None
            out.block_until_ready()
            self._seconds[name] += time.monotonic() - begun

    def settle(self) -> None:
        """Until nothing runs and nothing is due."""
        self.wait()
        self._do_due()

    def _do_due(self) -> None:
        while self._due:
            self._due.pop(0)()


class Role(NamedTuple):
    """One of the two models."""

    name: str
    folder: model_folder.ModelFolder
    store_key: str


def attention_of(folder: model_folder.ModelFolder) -> str:
    """What computes attention; only Llama-like networks have a choice."""
    return getattr(folder.model.arch, "attention", "xla")


def model_key(folder: model_folder.ModelFolder, settings: AuditSettings) -> str:
    """Names a model's losses: weights and everything about the arithmetic that changes them."""
    model = folder.model
    pad = (settings.padding, settings.pad_to or settings.max_length)
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore
    arithmetic = (str(model.dtype), precision, attention_of(folder))
    return settings_hash(
        folder.identity,
        model.mask_id,
        model.shift,
        pad if settings.padding == "visible" else None,
        arithmetic,
    )


class Work:
    """Which passes are missing, and doing them.

    `make_items(view)` makes the items of a view that depends on a guide, once that has run;
    `check(role, params)` looks at a model that has been loaded. `device_bytes`: memory of a device,
    the same in every process; None: what this process' devices have.
    """

    def __init__(
        self,
        reader: Reader,
        roles: list[Role],
        settings: AuditSettings,
        *,
        make_items: Callable[[str], list[Item | None]] | None = None,
        check: Callable[[Role, Params], None] | None = None,
        batch_size: int | None = None,
        include_votes: bool = False,
        layout: parallel.Layout | None = None,
        in_turn: bool = False,
        device_bytes: int | None = None,
        peers: processes.Peers | None = None,
        quiet: bool = False,
    ):
        self.reader, self.settings = reader, settings
        self.roles = {r.name: r for r in roles}
        self.make_items, self.check = make_items, check
        self.batch_size, self.include_votes, self.quiet = batch_size, include_votes, quiet
        self.layout, self.in_turn = layout or parallel.local_layout(), in_turn
        self.device_bytes = device_bytes or parallel.device_bytes()
        self.peers = peers or processes.Peers()
        self.seconds = {t.identity: 0.0 for t in reader.tasks.values()}
        self._overlap = _Overlap(self.seconds)
        self.tokens = {t.identity: 0 for t in reader.tasks.values()}
        self.compile_seconds = 0.0
        self.programs = self.tasks_run = 0
        self.passes_run = 0
        """Forward passes of a text, all models together, that were really made."""

    # --- what is left ----------------------------------------------------------------------------

    def _tasks(self, view: str) -> list[Task]:
        """Tasks of one view, guides first."""
        tasks = [t for t in self.reader.tasks.values() if t.view == view]
        guides = {t.guide.identity for t in self.reader.tasks.values() if t.guide is not None}
        return sorted(tasks, key=lambda t: t.identity not in guides)

    def _items(self, view: str) -> list[Item | None]:
        """Items of a view; those of the text where they depend on a guide that has not run."""
        return self.reader.items.get(view, self.reader.items["text"])

    def pending(
        self, view: str = "text", *, everything: bool = False, roles: Sequence[str] = ROLES
    ) -> list[int]:
        """First text of each distinct token sequence of which some values (of the models `roles`)
        are not stored yet."""
        seen, rows = set(), []
        tasks = self._tasks(view)
        everything = everything or view not in self.reader.items  # it cannot have been read
        for row, item in enumerate(self._items(view)):
            if item is None or item.store_key in seen or not item.maskable.any():
                continue
            seen.add(item.store_key)
            if everything or any(
                self.reader.missing(t, role, item)
                for t in tasks
                for role in t.channels
                if role in roles
            ):
                rows.append(row)
        return rows

    def batches(self, rows: list[int], view: str = "text") -> list[data.BatchPlan]:
        """Batches of `rows`; a device works on `rows_of(length)` of them at once.

        All texts together decide on a text's bucket, so that a resumed run, which has fewer left,
        pads it to the same length and computes the same bits.
        """
        items = self._items(view)
        distinct = self.pending(view, everything=True)
        lengths = np.array([items[r].length for r in distinct], np.int32)  # pyright: ignore
        wanted, batches = set(rows), []
        buckets = self._buckets(int(lengths.max(initial=1)))
        for length, whole in _by_length(
            data.plan_batches(lengths, buckets, self._rows_of, self._pays)
        ):
            left = [r for r in (distinct[i] for i in whole) if r in wanted]
            index = np.array([*left, -1], np.int32)
            full = np.full(len(left), length, np.int32)
            batches += [
                data.BatchPlan(length, index[b.rows])
                for b in data.plan_batches(full, (length,), self._rows_of)
            ]
        return batches

    def _buckets(self, longest: int) -> tuple[int, ...]:
        if self.settings.padding == "visible":
            fixed = self.settings.pad_to or self.settings.max_length
            return (max(fixed, longest),)
        limit = self.settings.max_length
        if longest > limit:  # a view with a prefix, which fits into the models' context
            room = min(r.folder.max_length for r in self.roles.values())
            limit = max(longest, min(limit + self.settings.prefix.tokens, room))
        return data.bucket_lengths(limit)

    @property
    def _on_cpu(self) -> bool:
        return self.layout.devices[0].platform == "cpu"

    @property
    def _tokens_a_step(self) -> int:
        return TOKENS_A_STEP if self._on_cpu else ACCELERATOR_TOKENS

    def _rows_of(self, length: int) -> int:
        if self.batch_size is not None:
            return self.batch_size * self.layout.row_parts
        rows = min(64, self._tokens_a_step // length)
        # Plans are drawn and scores computed for PLAN_ROWS texts at once. Not below 4: a single row
        # takes other kernels, and small batches waste both cores.
        rows = rows // PLAN_ROWS * PLAN_ROWS or 4
        rows = min(rows, self._rows_that_fit(length))
        rows -= rows % PLAN_ROWS if rows > PLAN_ROWS else 0
        return rows * self.layout.row_parts

    def _rows_that_fit(self, length: int) -> int:
        """By the closed form, beside the models; at least one, which may yet fit.

        As if every position were scored, so that it is the same whichever attacks are asked for.
        """
        model, load = self.roles["target"].folder.model, self._load_of(0, length, length)
        sizes = self._parameter_bytes, self.device_bytes
        return max(1, memory.largest_rows(model.arch, model.dtype, load, *sizes))

    def _load_of(self, rows: int, length: int, slots: int) -> memory.Load:
        """What a device works on with `rows` rows of its own."""
        parts, platform = self.layout.mesh.shape["model"], self.layout.devices[0].platform
        return memory.Load(rows, length, slots, parts=parts, platform=platform)

    def _pays(self, count: int, length: int, larger: int) -> bool:
        """Whether a bucket saves the operations that its program costs: SAMA's of both models,
        whatever the attacks are, so that a text is padded the same whichever are asked for."""
        model, passes = self.roles["target"].folder.model, 2 * self.settings.sama.passes
        saved = model.flops_per_text(larger, 0.0) - model.flops_per_text(length, 0.0)
        platform = "cpu" if self._on_cpu else "accelerator"
        return count * passes * saved >= PROGRAM_FLOPS[platform] * len(self.layout.devices)

    def _slot_sizes(self, task: Task, length: int) -> np.ndarray:
        most = min(length, self.settings.max_length)
        return losses.slot_sizes(task.slot_bounds(most), most)

    def slots(self, length: int, channels: tuple[str, ...] | None = None) -> tuple[int, ...]:
        """All sizes that passes of plans need in a bucket, or those passes that read just these
        channels: one program serves them all, and each size costs a second of compiling."""
        plans = [t for t in self.reader.tasks.values() if t.slot_bounds is not None]
        if channels is not None:
            plans = [t for t in plans if channels in t.channels.values()]
        return tuple(sorted({int(s) for t in plans for s in self._slot_sizes(t, length)}))

    def _slots_of(self, task: Task, length: int, channels: tuple[str, ...]) -> tuple[int, ...]:
        """Sizes of the program that reads some of a task's channels: some, if a run continues."""
        whole = channels in task.channels.values()
        return self.slots(length, channels if whole else None)

    def estimate(self, *, everything: bool = False) -> str:
        """One line: passes, tokens, time and memory of what is left."""
        texts, passes, tokens, flops = 0, 0, 0, 0.0
        shapes: set[tuple[int, int]] = set()
        for view in self.reader.views:
            rows = self.pending(view, everything=everything)
            texts = max(texts, len(rows))
            for batch in self.batches(rows, view):
                real = int((batch.rows >= 0).sum())
                shapes.add((len(batch.rows), batch.length))
                for task in self._tasks(view):
                    for role in task.channels:
                        passes += real * task.passes
                        tokens += real * task.passes * batch.length
                        flops += len(batch.rows) * self._flops(task, role, batch.length)
        product = _matmul_rate(self.roles["target"].folder.model, self._tokens_a_step)
        rate = 0.5 * product * len(self.layout.devices)
        memory, device = self.memory(shapes).total, self.device_bytes
        return (
            f"{texts} texts, {passes} forward passes, {tokens:,} tokens with padding, "
            f"{flops / 1e12:.2f} TFLOP: about {duration(flops / rate)} after compiling, "
            f"{binary_size(memory)} of a device's {binary_size(device)}"
        )

    def memory(self, shapes: Iterable[tuple[int, int]]) -> memory.Footprint:
        """Bytes on one device in the largest of batches of these (rows, length); closed form."""
        model = self.roles["target"].folder.model
        found = memory.Footprint(0, 0, memory.Temporaries(0, 0, 0, 0, 0, 0))
        for rows, length in shapes:
            slots = max(self.slots(length), default=length)
            load = self._load_of(rows // self.layout.row_parts, length, slots)
            some = memory.Footprint(
                0, memory.input_bytes(load), memory.temporaries(model.arch, model.dtype, load)
            )
            found = max(found, some, key=lambda f: f.total)
        return found._replace(parameters=self._parameter_bytes)

    @functools.cached_property
    def _parameter_bytes(self) -> int:
        """Of the models that are resident at once, on one device; adapters are left out."""
        bases = {
            (f.base_identity, str(f.model.dtype)): memory.parameter_bytes(
                f.abstract_params,
                f.model.dtype,
                self.layout.shardings(f.abstract_params, f.model.arch),
            )
            for f in (role.folder for role in self.roles.values())
        }
        return max(bases.values()) if self.in_turn else sum(bases.values())

    def _flops(self, task: Task, role: str, length: int) -> float:
        model = self.roles[role].folder.model
        if task.slot_bounds is None:
            return task.passes * model.flops_per_text(length, float(length))
        return sum(model.flops_per_text(length, float(s)) for s in self._slot_sizes(task, length))

    # --- doing it --------------------------------------------------------------------------------

    def run(
        self, folder: RunFolder, ids: list[str], say: Any, held: dict[str, Params] | None = None
    ) -> None:
        """Computes what is missing, batch by batch, then scores what only needed the store.

        `held`: weights by store key; None: they are loaded if something is missing.
        """
        self.reader.store = folder.store
        self._agree(folder)
        self._make_due()
        if any(self._left(view) for view in self.reader.views):
            say.print(self.estimate())
        turns: list[list[str]] = [[r] for r in ROLES] if self.in_turn else [[*ROLES]]
        held = held or {}
        # One round, unless something waits for a guide: a view for that of all texts, a task, in
        # turn, for that of the other model.
        run_before = -1
        while self.tasks_run > run_before:
            run_before = self.tasks_run
            views = [v for v in self.reader.views if v in self.reader.items]
            for turn in turns:
                if any(self._left(view, turn) for view in views):
                    params = held or self._load(turn, say)
                    for view in views:
                        self._run_view(view, turn, params, folder, ids)
                    held = {} if self.in_turn else params
                    params = {}  # frees this model before the next one is loaded
            if len(views) < len(self.reader.views):
                self.peers.gather("guides", None)
                folder.store.refresh()
                self._make_due()
                run_before = -1 if len(self.reader.items) > len(views) else run_before
            elif not self.in_turn:
                break
        if self.programs:
            say.print(f"{self.programs} programs compiled in {self.compile_seconds:.1f} s")
        self._score_rows(folder, ids, range(len(ids)))

    def _agree(self, folder: RunFolder) -> None:
        """What any process has stored before need not be computed by any of them.

        Afterwards all of them see the same records, since none has begun to append.
        """
        if self.peers.count > 1:
            keys = [] if folder.shared else folder.store.keys()
            for other in self.peers.gather("records", keys):
                folder.store.elsewhere |= {tuple(key) for key in other}
            unmade = [v for v in self.reader.views if v not in self.reader.items]
            if unmade and not folder.shared:
                raise UsageError(
                    f"attacks on {unmade[0]} read losses of all texts on the way, but --out is not "
                    "on a disk that all processes share; use one that is, or leave them out"
                )

    def _make_due(self) -> None:
        """Makes the views whose guide has been read."""
        for view in self.reader.views:
            if view not in self.reader.items and self._guided_already(view):
                self._make(view)

    def _left(self, view: str, roles: Sequence[str] = ROLES) -> list[int]:
        """`pending` texts that this process works on.

        On a mesh all processes work on all; else each has every n-th batch of texts, with all of
        their views, whatever has been stored before.
        """
        rows = self.pending(view, roles=roles)
        if self.peers.count == 1 or self.layout.kind == "sharded":
            return rows
        plan, count = self.batches(self.pending(everything=True), "text"), self.peers.count
        owner = {int(row): i % count for i, batch in enumerate(plan) for row in batch.rows}
        return [r for r in rows if owner.get(r, r % count) == self.peers.rank]

    def _guided_already(self, view: str) -> bool:
        """Whether the guides of a view that is not made yet were read by an earlier run."""
        guides = [t.guide for t in self._tasks(view) if t.guide is not None]
        return not any(
            self.reader.missing(guide, role, item)
            for guide in guides
            for item in self._items(guide.view)
            if item is not None and item.maskable.any()
            for role in guide.channels
        )

    def _make(self, view: str) -> None:
        assert self.make_items is not None
        self.reader.items[view] = self.make_items(view)

    def _run_view(
        self,
        view: str,
        roles: list[str],
        params: dict[str, Params],
        folder: RunFolder,
        ids: list[str],
    ) -> None:
        rows = self._left(view, roles)
        if not rows:
            return
        batches = self.batches(rows, view)
        self._log_buckets(view, batches, folder)
        items = self._items(view)
        same = _group([item and item.store_key for item in items])
        title = "audit" if view == "text" else f"audit, {view}"
        with ProgressBar(title, len(ids), "texts", quiet=self.quiet,
                         done=len(ids) - len(rows)) as bar:  # fmt: skip
            for batch in batches:
                for task in self._tasks(view):
                    if task.guide is not None:
                        self._overlap.settle()
                        if not self._guide_ready(task, batch):
                            continue
                    prepared = functools.cache(partial(self._forward, batch, task))
                    for role in _distinct(task, self.roles, roles):
                        self._run_task(batch, task, role, prepared, params, folder, bar)
                real = [int(r) for r in batch.rows if r >= 0]
                # In the batch's order: scores then find the plans that its passes have drawn.
                texts = [s for r in real for s in same[items[r].store_key]]  # pyright: ignore
                self._overlap.put_off(partial(self._end_batch, folder, ids, real, texts, bar))
            self._overlap.settle()

    def _end_batch(
        self, folder: RunFolder, ids: list[str], rows: list[int], texts: list[int], bar: ProgressBar
    ) -> None:
        """Scores `texts`, which are `rows` and those with the same tokens."""
        self._score_rows(folder, ids, texts)
        self.reader.forget_plans(rows)
        bar.advance(len(rows))

    def _guide_ready(self, task: Task, batch: data.BatchPlan) -> bool:
        assert task.guide is not None
        items = self._items(task.guide.view)
        found = [items[r] for r in batch.rows if r >= 0]
        return not any(
            self.reader.missing(task.guide, role, item)
            for role in task.guide.channels
            for item in found
            if item is not None and item.maskable.any()
        )

    def _log_buckets(self, view: str, batches: list[data.BatchPlan], folder: RunFolder) -> None:
        counts: dict[int, int] = {}
        for batch in batches:
            counts[batch.length] = counts.get(batch.length, 0) + int((batch.rows >= 0).sum())
        folder.log("buckets", view=view, texts={str(k): v for k, v in counts.items()})

    def _load(self, wanted: list[str], say: Any) -> dict[str, Params]:
        """Weights of the models that are needed; what both have in common is held once."""
        needed = {r for t in self.reader.tasks.values() for r in t.channels}
        roles = {self.roles[r].store_key: self.roles[r] for r in wanted if r in needed}
        start = time.monotonic()
        folders = [r.folder for r in roles.values()]
        total = model_folder.num_bytes(folders)
        with ByteBar("weights", total, quiet=self.quiet, least=10**9) as told:
            loaded = model_folder.load_together(folders, self.layout.shardings, told)
        seconds = time.monotonic() - start
        for role, params in zip(roles.values(), loaded):
            folder = role.folder
            say.print(
                f"{role.name}: {folder.path}, {folder.num_params:,} parameters in "
                f"{folder.model.dtype}"
            )
            if self.check is not None:
                self.check(role, params)
        say.print(f"weights loaded in {seconds:.1f} s")
        return dict(zip(roles, loaded))

    def _run_task(
        self,
        batch: data.BatchPlan,
        task: Task,
        role: Role,
        prepared: Prepare,
        params: dict[str, Params],
        folder: RunFolder,
        bar: ProgressBar,
    ) -> None:
        """Starts what is missing of one batch; it is stored while the next one runs."""
        items = self._items(task.view)
        real = np.flatnonzero(batch.rows >= 0)
        left = {
            int(i): self.reader.missing(task, role.name, items[batch.rows[i]])  # pyright: ignore
            for i in real
        }
        channels = tuple(c for c in task.channels[role.name] if any(c in m for m in left.values()))
        if not channels:
            return
        if task.slot_bounds is None:
            read = self._procedure(batch, task, role, params, folder, bar)
        else:
            read = self._plan(batch, task, role, channels, prepared, params, folder, bar)
        self.tasks_run += 1

        def store() -> None:
            values, positions = read()
            self._store(batch, task, role, channels, left, values, positions, folder)

        self._overlap.put_off(store)

    def _store(
        self,
        batch: data.BatchPlan,
        task: Task,
        role: Role,
        channels: tuple[str, ...],
        left: dict[int, tuple[str, ...]],
        values: np.ndarray,
        positions: np.ndarray,
        folder: RunFolder,
    ) -> None:
        """Values [c, t, b, k] of the channels that are missing, by row (`left`), in one write."""
        items = self._items(task.view)
        owned, held = (f(len(batch.rows)) for f in (self.layout.owned, self.layout.held))
        count = sum(bool(m) and bool(owned[i]) for i, m in left.items())
        self.passes_run += count * task.passes
        self.tokens[task.identity] += count * task.passes * batch.length
        for number, channel in enumerate(channels):
            new = [i for i, missing in left.items() if channel in missing]
            if not held.all():
                plan = task.stored(channel)
                names = [items[batch.rows[i]].store_key for i in new if not held[i]]  # pyright: ignore
                folder.store.elsewhere |= {(role.store_key, plan, name) for name in names}
                new = [i for i in new if held[i]]
            records = [make_record(positions[:, i], values[number, :, i]) for i in new]
            names = [items[batch.rows[i]].store_key for i in new]  # pyright: ignore
            folder.store.append(role.store_key, task.stored(channel), names, records)

    def _plan(
        self,
        batch: data.BatchPlan,
        task: Task,
        role: Role,
        channels: tuple[str, ...],
        prepared: Prepare,
        params: dict[str, Params],
        folder: RunFolder,
        bar: ProgressBar,
    ) -> Read:
        """Starts a batch under a probe plan."""
        slots = self._slots_of(task, batch.length, channels)
        forward, positions = prepared(slots)
        # Target and reference share programs where their networks are the same.
        runner = _runner(role.folder.model, slots, self.layout, channels)
        weights, started = params[role.store_key], []
        for chunk in _chunks(forward):
            if not runner.is_compiled(chunk):
                bar.note(f"compiling for {batch.length} tokens")
                self._compile(partial(runner.compile, weights, chunk), batch, folder)
            bar.note(f"{role.name}, {batch.length} tokens")
            out = self._overlap.launch(partial(runner.start, weights, chunk), task.identity)
            started.append((out, int(chunk.passes)))

        def read() -> tuple[np.ndarray, np.ndarray]:
            found = []
            for out, count in started:
                rows = runner.fetch(out)
                found.append(rows.reshape(-1, len(channels), *rows.shape[1:])[:count])
            return np.concatenate(found).swapaxes(0, 1), positions

        return read

    def _compile(
        self, compile_: Callable[[], None], batch: data.BatchPlan, folder: RunFolder
    ) -> None:
        """Makes a program; its seconds are no task's."""
        self._overlap.wait()
        start = time.monotonic()
        compile_()
        seconds = time.monotonic() - start
        self.programs += 1
        self.compile_seconds += seconds
        folder.log("compile", length=batch.length, compile_seconds=round(seconds, 2))

    def _padded(self, batch: data.BatchPlan, view: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and where they are valid, [b, l]; a prefix stands before its text."""
        items = self._items(view)
        tokens = np.zeros((len(batch.rows), batch.length), np.int32)
        valid = np.zeros(tokens.shape, bool)
        for i, row in enumerate(batch.rows):
            item = items[row] if row >= 0 else None
            if item is not None:
                before = np.zeros(0, np.int32) if item.before is None else item.before
                tokens[i, : item.length] = np.concatenate([before, item.ids])  # pyright: ignore
                valid[i, : item.length] = True
        if self.settings.padding == "visible":
            tokens = np.where(valid, tokens, self._pad_id()).astype(np.int32)
            valid = np.ones_like(valid)
        return tokens, valid

    def _forward(
        self, batch: data.BatchPlan, task: Task, slots: tuple[int, ...]
    ) -> tuple[ForwardBatch, np.ndarray]:
        """The scorer's input for one batch and plan (host arrays), and the scored positions
        [t, b, k] in the text's own coordinates."""
        items = self._items(task.view)
        tokens, valid = self._padded(batch, task.view)
        length = max(batch.length, self.settings.max_length)
        masks = np.zeros((task.passes, len(batch.rows), length), bool)
        scored = np.zeros_like(masks)
        offset = np.zeros(len(batch.rows), np.int32)
        for start in range(0, len(batch.rows), PLAN_ROWS):
            chunk = [int(r) for r in batch.rows[start : start + PLAN_ROWS] if r >= 0]
            if chunk:
                drawn = self.reader.plan(task, chunk)
                part = slice(start, start + len(chunk))
                width = drawn.masks.shape[-1]
                masks[:, part, :width] = drawn.masks[: len(chunk)].swapaxes(0, 1)
                scored[:, part, :width] = drawn.scored[: len(chunk)].swapaxes(0, 1)
        for i, row in enumerate(batch.rows):
            item = items[row] if row >= 0 else None
            if item is not None and item.before is not None:
                offset[i] = len(item.before)
                masks[:, i] = np.roll(masks[:, i], offset[i], axis=-1)
        own = losses.scored_positions(scored, slots[-1])
        positions = np.where(own >= 0, own + offset[None, :, None], -1).astype(np.int32)
        group = np.searchsorted(np.array(slots), self._slot_sizes(task, batch.length))
        forward = ForwardBatch(
            tokens,  # pyright: ignore
            valid,  # pyright: ignore
            masks[..., : batch.length],  # pyright: ignore
            positions,  # pyright: ignore
            group.astype(np.int32),  # pyright: ignore
            np.int32(task.passes),  # pyright: ignore
        )
        return forward, own

    def _procedure(
        self,
        batch: data.BatchPlan,
        task: Task,
        role: Role,
        params: dict[str, Params],
        folder: RunFolder,
        bar: ProgressBar,
    ) -> Read:
        """Starts a batch under a procedure."""
        assert task.query.procedure is not None
        items = self._items(task.view)
        tokens, valid = self._padded(batch, task.view)
        high, low = (np.zeros(len(batch.rows), np.uint32) for _ in range(2))
        maskable = np.zeros(tokens.shape, bool)
        for i, row in enumerate(batch.rows):
            item = items[row] if row >= 0 else None
            if item is not None:
                high[i], low[i] = item.key
                maskable[i, : len(item.maskable)] = item.maskable
        runner = _procedure_runner(role.folder.model, task.query.procedure, self.layout)
        args = (np.uint32(self.settings.seed), high, low, tokens, valid, maskable)
        weights = params[role.store_key]
        if not runner.is_compiled(*args):
            bar.note(f"compiling for {batch.length} tokens")
            self._compile(partial(runner.compile, weights, *args), batch, folder)
        bar.note(f"{role.name}, {batch.length} tokens")
        out = self._overlap.launch(partial(runner.start, weights, *args), task.identity)

        def read() -> tuple[np.ndarray, np.ndarray]:
            dense = runner.fetch(out)
            positions = losses.scored_positions(~np.isnan(dense), dense.shape[-1])
            values = np.take_along_axis(dense, np.maximum(positions, 0), axis=-1)
            return np.where(positions >= 0, values, np.nan)[None], positions

        return read

    def _pad_id(self) -> int:
        config = self.roles["target"].folder.config
        return int(config.get("pad_token_id", config.get("eos_token_id", 0)) or 0)

    # --- scores ----------------------------------------------------------------------------------

    def _score_rows(self, folder: RunFolder, ids: list[str], rows: Any) -> None:
        score_rows(self.reader, folder, ids, rows, include_votes=self.include_votes)

    def cost(self, folder: RunFolder) -> dict[str, Any]:
        """Seconds and tokens by attack (attacks on one task share its passes), over all parts of
        a resumed run."""
        before = folder.manifest.get("cost") or {}
        found: dict[str, dict[str, Any]] = {"seconds": {}, "tokens": {}}
        for attack in self.reader.attacks:
            tasks = [self.reader.task(attack.name, q) for q in self.reader.queries[attack.name]]
            tasks += [t.guide for t in tasks if t.guide is not None]
            names = {t.identity for t in tasks}
            for kind, spent in (("seconds", self.seconds), ("tokens", self.tokens)):
                old = (before.get(kind) or {}).get(attack.name, 0)
                found[kind][attack.name] = round(old + sum(spent[n] for n in names), 2)
        return {
            **{kind: (before.get(kind) or {}) | values for kind, values in found.items()},
            "compile_seconds": round(self.compile_seconds, 2),
            "programs": self.programs,
            "passes_run": self.passes_run,
        }


def sum_costs(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`Work.cost` of several processes, added up; programs are those of the first."""
    total: dict[str, Any] = dict(costs[0]) if costs else {}
    for kind in ("seconds", "tokens"):
        names = dict.fromkeys(name for cost in costs for name in cost.get(kind, {}))
        total[kind] = {n: round(sum(c[kind].get(n, 0) for c in costs), 2) for n in names}
    total["passes_run"] = sum(cost.get("passes_run", 0) for cost in costs)
    return total


def score_rows(
    reader: Reader, folder: RunFolder, ids: list[str], rows: Any, *, include_votes: bool = False
) -> None:
    """Appends the scores that the store allows for and the folder lacks."""
    settings = reader.settings
    plain = [a for a in reader.attacks if a.corpus is None]
    todo: dict[int, list[Attack]] = {}
    for row in rows:
        left = [a for a in plain if not folder.has_scores(ids[row], [a.name])]
        due = [a for a in left if not reader.usable(a, row) or reader.ready(a, row)]
        # A view that is not made yet is not missing.
        due = [a for a in due if all(_made(reader, a))]
        if due:
            todo[row] = due
    order = list(todo)
    for start in range(0, len(order), PLAN_ROWS):
        chunk = order[start : start + PLAN_ROWS]
        wanted = [a for a in plain if any(a in todo[r] for r in chunk)]
        scores = reader.statistics(wanted, chunk)
        details = _votes(reader, chunk) if include_votes and _has_sama(wanted) else None
        lines = []
        for i, row in enumerate(chunk):
            line: dict[str, Any] = {"id": ids[row], "scores": {}, "passes": {}}
            for attack in todo[row]:
                usable = reader.usable(attack, row)
                value = float(scores[attack.name][i])
                finite = usable and bool(np.isfinite(value))
                line["scores"][attack.name] = value if finite else None
                count = max(passes(attack, settings).values())
                line["passes"][attack.name] = count if usable else 0
                if not finite:
                    line.setdefault("undefined", {})[attack.name] = attack.undefined
            if details is not None and reader.usable(wanted[0], row):
                line["votes"] = details[i]
            lines.append(line)
        folder.append_scores(lines)


def _made(reader: Reader, attack: Attack) -> Iterator[bool]:
    for query in reader.queries[attack.name].values():
        yield query.view_name in reader.items


def _has_sama(attacks: list[Attack]) -> bool:
    return any(a.name == "sama" for a in attacks)


def _votes(reader: Reader, rows: list[int]) -> list[dict[str, Any]]:
    """SAMA's step votes, weights and tie rates."""
    task = reader.task("sama")
    reading = reader.reading(task, next(iter(reader.queries["sama"].values())), rows)
    details = votes.sign_statistics(
        jnp.asarray(reading.target),
        jnp.asarray(reading.reference),
        reading.plan,
        ties=reader.settings.sama.ties,
    )
    return [
        {
            "step_votes": np.asarray(details.step_votes[i]).tolist(),
            "step_weights": np.asarray(details.step_weights[i]).tolist(),
            "tie_rate": float(details.tie_rate[i]),
        }
        for i in range(len(rows))
    ]


def score_corpus(
    reader: Reader,
    folder: RunFolder,
    ids: list[str],
    texts: list[str] | None,
    labels: np.ndarray | None,
) -> None:
    """Appends the scores of attacks that look at all texts together, where they are new.

    They are computed each time, since a text that has become a prefix changes those of others.
    """
    for attack in reader.attacks:
        if attack.corpus is None or (attack.needs_texts and texts is None):
            continue
        usable = [r for r in range(len(ids)) if reader.usable(attack, r)]
        parts = np.zeros((len(usable), 0), np.float32)
        if attack.statistic is not None and usable:
            chunks = [usable[s : s + PLAN_ROWS] for s in range(0, len(usable), PLAN_ROWS)]
            found = [reader.statistics([attack], c)[attack.name] for c in chunks]
            parts = np.concatenate(found).reshape(len(usable), -1)
        corpus = CorpusReading(
            parts,
            None if texts is None else [texts[r] for r in usable],
            None if labels is None else labels[usable],
        )
        values = np.full(len(ids), np.nan)
        if usable:
            values[usable] = attack.corpus(corpus, reader.settings)
        count = max(passes(attack, reader.settings).values())
        lines = []
        for text_id, value in zip(ids, values):
            score = float(value) if np.isfinite(value) else None
            if folder.has_scores(text_id, [attack.name], [score]):
                continue
            line: dict[str, Any] = {
                "id": text_id,
                "scores": {attack.name: score},
                "passes": {attack.name: 0 if score is None else count},
            }
            if score is None:
                line["undefined"] = {attack.name: attack.undefined}
            lines.append(line)
        if lines:
            folder.append_scores(lines)


@functools.lru_cache(maxsize=64)
def _runner(
    model: Any, slots: tuple[int, ...], layout: parallel.Layout, channels: tuple[str, ...]
) -> parallel.Runner:
    """One scorer a network and set of slot sizes, kept for the whole process like any jit cache."""
    model = layout.adapt(model)

    def score(params: Params, batch: ForwardBatch) -> jax.Array:
        return losses.score_batch(model, slots, params, batch, channels)

    return parallel.Runner(score, layout, (FORWARD_ROWS,))


@functools.lru_cache(maxsize=64)
def _procedure_runner(model: Any, procedure: Procedure, layout: parallel.Layout) -> parallel.Runner:
    model = layout.adapt(model)

    def run(params, seed, high, low, tokens, valid, maskable):
        keys = jax.vmap(lambda h, lo: rng.text_key(seed, TextKeyData(h, lo)))(high, low)
        return procedure.run(model, params, keys, tokens, valid, maskable)

    return parallel.Runner(run, layout, (None, 0, 0, 0, 0, 0))


def _chunks(forward: ForwardBatch) -> Iterator[ForwardBatch]:
    """A plan's passes in calls of `losses.PASSES_A_CALL`, the last one filled up."""
    total, size = len(forward.group), losses.PASSES_A_CALL
    for start in range(0, total, size):
        stop = min(start + size, total)
        fill = size - (stop - start)

        def part(x: Any, start: int = start, stop: int = stop, fill: int = fill) -> Any:
            return np.pad(x[start:stop], ((0, fill), *[(0, 0)] * (x.ndim - 1)))

        yield forward._replace(
            masks=part(forward.masks),
            positions=part(forward.positions),
            group=part(forward.group),
            passes=np.int32(stop - start),  # pyright: ignore
        )


def _distinct(task: Task, roles: dict[str, Role], among: list[str]) -> list[Role]:
    """The task's models, each once even if target and reference are the same."""
    return list({roles[r].store_key: roles[r] for r in task.channels if r in among}.values())


def _group(names: list[Any]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    return groups


def _by_length(batches: list[data.BatchPlan]) -> list[tuple[int, list[int]]]:
    """Padded lengths in the order of the batches, and the rows of each."""
    rows: dict[int, list[int]] = {}
    for batch in batches:
        rows.setdefault(batch.length, []).extend(int(r) for r in batch.rows if r >= 0)
    return list(rows.items())


def _matmul_rate(model: Any, tokens: int) -> float:
    """Floating-point operations a second of one matrix product at the model's shape."""
    a = jnp.ones((tokens, model.arch.width), model.dtype)
    b = jnp.ones((model.arch.width, model.arch.mlp_width), model.dtype)
    product = jax.jit(jnp.dot)
    product(a, b).block_until_ready()
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        product(a, b).block_until_ready()
        runs += 1
    return 2.0 * a.size * b.shape[1] * runs / (time.perf_counter() - start)

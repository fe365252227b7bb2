"""Our side of the benchmark: the audit's own code on the texts (`python -m`, asked by a `Side`)."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sama_jax import attacks
from sama_jax.arrays import Encoded, Params
from sama_jax.devices.compile_cache import use_compile_cache
from sama_jax.devices.matmul_rate import matmul_rate
from sama_jax.devices.placement import device_bytes
from sama_jax.devices.strategy import local_layout
from sama_jax.engine.batching import BatchShapes, distinct_rows
from sama_jax.engine.loop import Setup, fill_store
from sama_jax.engine.plans import PLAN_ROWS
from sama_jax.engine.readings import Readings
from sama_jax.engine.roles import ModelRole, attention_of, model_key, resident_bytes
from sama_jax.engine.tasks import ROLES, tasks_of
from sama_jax.engine.text_table import original_view, table_of
from sama_jax.programs.bench import matmul_products
from sama_jax.programs.bench.memory import DeviceMemory, HostMemory
from sama_jax.programs.bench.side import PLAN, SCALE, End, Loaded, Round, Task, cores, run_side
from sama_jax.storage.run_folder import RunFolder
from sama_jax.terminal import console
from sama_jax.weights import loading, model_folder

CHECKED = 8
"""Texts whose losses and scores the two frameworks compare under the same masks and subsets."""


class Ours:
    """Audits the texts with SAMA, once a round."""

    def __init__(self, task: Task):
        self.task, self.settings, self.ids = task, task.settings, task.tokens()
        self.compile_seconds, self.rounds = 0.0, 0
        use_compile_cache(task.compile_cache)
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        # Tracing, lowering and compiling of everything, votes and plans included.
        if event.startswith("/jax/core/compile/"):
            self.compile_seconds += duration_secs

    def load(self) -> Loaded:
        """Loads the target, makes the reference from it, and starts to measure memory."""
        folder = model_folder.open_folder(
            self.task.model, dtype=self.settings.dtype, attention=self.settings.attention
        )
        self.layout = local_layout()
        target = loading.load(folder, self.layout.shardings)
        jax.block_until_ready(target)
        key, self.model = model_key(folder, self.settings), folder.model
        self.keys = {"target": key, "reference": key + "r"}
        roles = {name: ModelRole(name, folder, key) for name, key in self.keys.items()}
        self.params = {self.keys["target"]: target, self.keys["reference"]: soften(target)}
        encoded = [Encoded(t, np.zeros(len(t), bool), False, 1, 1) for t in self.ids]
        shift = folder.model.shift
        self.table = table_of([original_view(e, self.settings, shift=shift) for e in encoded])
        self.tasks = tasks_of(attacks.select(["sama"]), self.settings, self.keys)
        shapes = BatchShapes(
            folder.model,
            folder.max_length,
            self.settings,
            self.layout,
            resident_bytes(list(roles.values()), self.layout),
            device_bytes(),
            self.task.batch_size,
        )
        self.setup = Setup(roles, shapes, quiet=True)
        device = self.layout.devices[0]
        self.kind = "cpu" if device.platform == "cpu" else "accelerator"
        self.memory = HostMemory() if self.kind == "cpu" else DeviceMemory(device)
        return Loaded(
            cores(),
            str(device.device_kind),
            device.platform,
            jnp.dtype(folder.model.dtype).name,
            attention_of(folder),
        )

    def round(self) -> Round:
        """Audits all texts into a new folder."""
        self.rounds += 1
        self.compile_seconds = 0.0
        out = self.task.scratch / f"round-{self.rounds}"
        ids = [str(i) for i in range(len(self.ids))]
        start, cpu = time.perf_counter(), time.process_time()
        folder = RunFolder(out, {}, {}, None)
        try:
            tables = {"text": self.table}
            readings = Readings(self.tasks, self.settings, tables, self.keys, folder.store)
            say = console(quiet=True)
            filled = fill_store(self.setup, readings, folder, ids, say, self.params)
        finally:
            folder.close()
        self.seconds = seconds = time.perf_counter() - start
        if self.rounds == 1:
            self.programs = filled.costs.programs
        self.readings = filled.readings
        rows = distinct_rows(self.table)
        batches = self.setup.shapes.batches(self.table, rows)
        self.tokens_a_batch = batches[0].rows.size * batches[0].length
        padded = sum(b.rows.size * b.length for b in batches)
        return Round(
            seconds,
            time.process_time() - cpu,
            compile_seconds=self.compile_seconds,
            host_seconds=seconds - sum(filled.costs.seconds.values()),
            padding=1 - sum(map(len, self.ids)) / padded,
        )

    def write_plan(self) -> None:
        """Writes masks, subsets, losses and scores of the first texts, for the other side."""
        rows = list(range(min(CHECKED, len(self.ids))))
        task, n = self.tasks.first("sama"), len(rows)
        plan = self.readings.plan(task, rows)
        losses = {role: self.readings.values(task, rows, role)[:n] for role in ROLES}
        scores = self.readings.statistics(self.tasks.attacks, rows)["sama"]
        arrays = {"masks": plan.masks[:n], "subsets": plan.subsets[:n], "scores": scores, **losses}
        np.savez(self.task.scratch / PLAN, allow_pickle=False, **arrays)

    def products(self) -> dict[str, float]:
        """Measures matrix products for a share of the last round's time."""
        self.memory.stop()  # theirs is not the audit's
        arch, vocab = self.model.arch, self.model.vocab_size
        shapes = matmul_products.shapes(
            self.kind, self.tokens_a_batch, arch.width, arch.mlp_width, vocab
        )
        rate = partial(
            matmul_rate,
            dtype=self.model.dtype,
            seconds=matmul_products.SLICE_SECONDS,
            at_once=matmul_products.AT_ONCE[self.kind],
        )
        return matmul_products.mean_rates(shapes, self.seconds, rate)

    def end(self) -> End:
        """Counts operations, and times subsets and votes alone."""
        peak_memory = self.memory.stop()
        flops = head = votes = 0.0
        task = self.tasks.first("sama")
        for start in range(0, len(self.ids), PLAN_ROWS):
            rows = list(range(start, min(start + PLAN_ROWS, len(self.ids))))
            begin = time.perf_counter()  # in a round it happens while devices work
            self.readings.statistics(self.tasks.attacks, rows)
            votes += time.perf_counter() - begin
            scored = np.asarray(self.readings.plan(task, rows).scored).sum(axis=-1)
            for row, counts in zip(rows, scored):
                n = len(self.ids[row])
                flops += 2 * sum(self.model.flops_per_text(n, float(c)) for c in counts)
                head += 4.0 * self.model.arch.width * self.model.vocab_size * counts.sum()
        return End(peak_memory, flops, head, votes, self.programs)


def soften(params: Params) -> Params:
    """Returns another model of the same size that shares most of the weights: the reference."""
    part = "final_norm" if "final_norm" in params else "last_block"
    return {**params, part: jax.tree.map(lambda x: x * np.asarray(SCALE, x.dtype), params[part])}


if __name__ == "__main__":
    run_side(Ours)

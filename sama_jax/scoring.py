"""Scoring: texts under plans through two models into the loss store, and out of it as scores.

The part of an audit that knows nothing of files of texts, flags or reports. A batch is padded,
masked and run for every plan and model that misses it; its losses are stored in one write; then
its statistics are computed from the store.
"""

import functools
import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sama_jax import data, losses, model_folder, parallel, replay, rng, votes
from sama_jax.attacks.registry import Attack, Probes
from sama_jax.config import AuditSettings, settings_hash
from sama_jax.errors import UsageError
from sama_jax.progress import ProgressBar, duration
from sama_jax.run_folder import RunFolder
from sama_jax.store import Record, make_record
from sama_jax.types import ForwardBatch, Params, ProbePlan, Reading, TextKeyData

PLAN_ROWS = 8
"""Texts whose plans and statistics are computed at once; one shape for all buckets."""
TOKENS_A_STEP = 1024
"""Tokens a device works on at once on a CPU: 8 rows of 128. Larger batches ran slower there."""
ACCELERATOR_TOKENS = 16384


class Item(NamedTuple):
    """A text with what its randomness and its place in the store derive from."""

    encoded: data.Encoded
    maskable: np.ndarray  # bool [n]
    key: TextKeyData
    store_key: str


class Plan(NamedTuple):
    """A probe plan of the run and the attacks that read it."""

    identity: str
    passes: int
    slot_bounds: Any  # length -> int [t]
    draw: Any  # rows -> ProbePlan of PLAN_ROWS texts at max_length (host)
    attacks: list[Attack]
    statistics: Any  # (plan, target, reference, num_tokens, zlib_bytes) -> {attack: [rows]}

    @property
    def needs_reference(self) -> bool:
        return any(a.needs_reference for a in self.attacks)


class Role(NamedTuple):
    """One of the two models."""

    name: str
    folder: model_folder.ModelFolder
    store_key: str


def prepare(encoded: data.Encoded, settings: AuditSettings, shift: bool) -> Item:
    maskable = np.ones(len(encoded.ids), bool)
    if settings.sama.exclude_special:
        maskable &= ~encoded.special
    if settings.sama.exclude_position0_when_shifted and shift:
        maskable[:1] = False
    key = rng.text_key_data(encoded.ids)
    name = f"{int(key.high):08x}{int(key.low):08x}"
    if not maskable.all():
        name += "-" + hashlib.sha256(maskable.tobytes()).hexdigest()[:8]
    return Item(encoded, maskable, key, name)


def model_key(folder: model_folder.ModelFolder, settings: AuditSettings) -> str:
    """Names a model's losses: weights and everything about the arithmetic that changes them."""
    model = folder.model
    pad = (settings.padding, settings.pad_to or settings.max_length)
    arithmetic = (str(model.dtype), jax.config.jax_default_matmul_precision)  # pyright: ignore
    return settings_hash(
        folder.identity,
        model.mask_id,
        model.shift,
        pad if settings.padding == "visible" else None,
        arithmetic,
    )


# --- plans ---------------------------------------------------------------------------------------


def make_plans(
    chosen: list[Attack],
    settings: AuditSettings,
    items: list[Item],
    texts: list[data.Text],
    replayed: Path | None,
) -> list[Plan]:
    """The distinct plans of the run: attacks that read the same probes share one."""
    grouped: dict[str, tuple[Probes, list[Attack]]] = {}
    for attack in chosen:
        probes = attack.probes(settings)
        identity = settings_hash(probes.identity, settings.seed)
        grouped.setdefault(identity, (probes, []))[1].append(attack)
    plans = []
    for identity, (probes, members) in grouped.items():
        # Statistics never see the seed; without it they are compiled once for all seeds.
        statistics = _statistics(tuple(members), replace(settings, seed=0))
        if replayed is not None and members[0].name == "sama":
            plans.append(_replayed_plan(replayed, settings, items, texts, members, statistics))
            continue
        draw = partial(_draw, probes, items, settings)
        plans.append(Plan(identity, probes.passes, probes.slot_bounds, draw, members, statistics))
    if replayed is not None and not any(p.identity.startswith("plan-") for p in plans):
        raise UsageError("--plan replays SAMA's probes, but sama is not among the attacks")
    return plans


@functools.lru_cache(maxsize=32)
def _drawer(probes: Probes) -> Any:
    """Jitted: plans of a batch of texts from the seed, their key data and maskable positions."""

    def one(seed, high, low, maskable):
        return probes.plan(rng.text_key(seed, TextKeyData(high, low)), maskable)

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0)))


def _draw(
    probes: Probes, items: list[Item], settings: AuditSettings, rows: Sequence[int]
) -> ProbePlan:
    high, low = np.zeros(PLAN_ROWS, np.uint32), np.zeros(PLAN_ROWS, np.uint32)
    maskable = np.zeros((PLAN_ROWS, settings.max_length), bool)
    for i, row in enumerate(rows):
        high[i], low[i] = items[row].key
        maskable[i, : len(items[row].maskable)] = items[row].maskable
    return jax.tree.map(np.asarray, _drawer(probes)(np.uint32(settings.seed), high, low, maskable))


def _replayed_plan(
    path: Path,
    settings: AuditSettings,
    items: list[Item],
    texts: list[data.Text],
    members: list[Attack],
    statistics: Any,
) -> Plan:
    loaded = replay.load_plan(path, settings.max_length)
    row_of = replay.match(loaded, [t.id for t in texts], [i.encoded.ids for i in items], path)
    bounds = loaded.plan.scored.sum(axis=-1).max(axis=0, initial=1)  # pyright: ignore

    def draw(rows: Sequence[int]) -> ProbePlan:
        at = [row_of[r] for r in rows]
        fill = PLAN_ROWS - len(at)
        return jax.tree.map(
            lambda x: np.concatenate([x[at], np.zeros((fill, *x.shape[1:]), x.dtype)]), loaded.plan
        )

    passes = loaded.plan.masks.shape[1]
    return Plan(loaded.identity, passes, lambda _: bounds, draw, members, statistics)


@functools.lru_cache(maxsize=32)
def _statistics(members: tuple[Attack, ...], settings: AuditSettings) -> Any:
    """Jitted: every attack's score of a batch of texts from their readings."""

    def one(reading: Reading) -> dict[str, jax.Array]:
        return {a.name: a.statistic(reading, settings) for a in members}

    return jax.jit(jax.vmap(one))


# --- the work ------------------------------------------------------------------------------------


class Work:
    """Which passes are missing, and doing them."""

    def __init__(
        self,
        items: list[Item],
        plans: list[Plan],
        roles: list[Role],
        settings: AuditSettings,
        *,
        batch_size: int | None = None,
        include_votes: bool = False,
        quiet: bool = False,
    ):
        self.items, self.plans, self.roles, self.settings = items, plans, roles, settings
        self.batch_size, self.include_votes, self.quiet = batch_size, include_votes, quiet
        self._encoded = [i.encoded for i in items]
        self._same_tokens = _group([i.store_key for i in items])
        self.devices = tuple(jax.local_devices())
        self.seconds = dict.fromkeys((p.identity for p in plans), 0.0)
        self.compile_seconds = 0.0
        self.programs = 0
        if self.settings.padding == "visible":
            self.buckets = (self.settings.pad_to or self.settings.max_length,)
        else:
            self.buckets = data.bucket_lengths(self.settings.max_length)

    def _needed(self, plan: Plan) -> list[Role]:
        return self.roles if plan.needs_reference else self.roles[:1]

    def pending(self, folder: RunFolder | None) -> list[int]:
        """First text of each distinct token sequence of which some losses are not stored yet."""
        seen, rows = set(), []
        for row, item in enumerate(self.items):
            if item.store_key in seen or not item.maskable.any():
                continue
            seen.add(item.store_key)
            if folder is None or not all(
                folder.store.has(r.store_key, p.identity, item.store_key)
                for p in self.plans
                for r in self._needed(p)
            ):
                rows.append(row)
        return rows

    def batches(self, rows: list[int]) -> list[data.BatchPlan]:
        """Batches of `rows`; a device works on `rows_of(length)` of them at once.

        All texts together decide on a text's bucket, so that a resumed run, which has fewer left,
        pads it to the same length and computes the same bits.
        """
        distinct = self.pending(None)
        lengths = np.array([len(self.items[r].encoded.ids) for r in distinct], np.int32)
        wanted, batches = set(rows), []
        for length, whole in _by_length(data.plan_batches(lengths, self.buckets, self._rows_of)):
            left = [r for r in (distinct[i] for i in whole) if r in wanted]
            index = np.array([*left, -1], np.int32)
            full = np.full(len(left), length, np.int32)
            batches += [
                data.BatchPlan(length, index[b.rows])
                for b in data.plan_batches(full, (length,), self._rows_of)
            ]
        return batches

    def _rows_of(self, length: int) -> int:
        if self.batch_size is not None:
            return self.batch_size * len(self.devices)
        budget = TOKENS_A_STEP if self.devices[0].platform == "cpu" else ACCELERATOR_TOKENS
        # Not below 4: a single row takes other kernels, and small batches waste both cores.
        return max(4, min(64, budget // length)) * len(self.devices)

    def slots(self, length: int) -> tuple[int, ...]:
        """All sizes that the plans' passes need in a bucket: one program serves every plan."""
        sizes = [losses.slot_sizes(p.slot_bounds(length), length) for p in self.plans]
        return tuple(sorted({int(s) for group in sizes for s in group}))

    def estimate(self, rows: list[int]) -> str:
        """One line: passes, tokens and time of what is left."""
        passes, tokens, flops = 0, 0, 0.0
        for batch in self.batches(rows):
            real = int((batch.rows >= 0).sum())
            for plan in self.plans:
                scored = losses.slot_sizes(plan.slot_bounds(batch.length), batch.length)
                for role in self._needed(plan):
                    passes += real * plan.passes
                    tokens += real * plan.passes * batch.length
                    model = role.folder.model
                    flops += len(batch.rows) * sum(
                        model.flops_per_text(batch.length, float(s)) for s in scored
                    )
        rate = 0.5 * _matmul_rate(self.roles[0].folder.model) * len(self.devices)
        return (
            f"{len(rows)} texts, {passes} forward passes, {tokens:,} tokens with padding, "
            f"{flops / 1e12:.2f} TFLOP: about {duration(flops / rate)} after compiling"
        )

    def run(self, folder: RunFolder, ids: list[str], say: Any) -> None:
        """Computes what is missing, batch by batch, then scores what only needed the store."""
        rows = self.pending(folder)
        if rows:
            say.print(self.estimate(rows))
            params = self._load(say)
            batches = self.batches(rows)
            self._log_buckets(batches, folder)
            with ProgressBar("audit", len(self.items), "texts", quiet=self.quiet,
                             done=len(self.items) - len(rows)) as bar:  # fmt: skip
                for batch in batches:
                    self._batch(batch, params, folder, bar)
                    real = [int(r) for r in batch.rows if r >= 0]
                    self._score(folder, ids, real)
                    bar.advance(len(real))
        wanted = [a.name for p in self.plans for a in p.attacks]
        left = [r for r, name in enumerate(ids) if not folder.has_scores(name, wanted)]
        for start in range(0, len(left), PLAN_ROWS):
            self._score(folder, ids, left[start : start + PLAN_ROWS])
        if rows:
            say.print(f"{self.programs} programs compiled in {self.compile_seconds:.1f} s")

    def _log_buckets(self, batches: list[data.BatchPlan], folder: RunFolder) -> None:
        counts: dict[int, int] = {}
        for batch in batches:
            counts[batch.length] = counts.get(batch.length, 0) + int((batch.rows >= 0).sum())
        folder.log("buckets", texts={str(k): v for k, v in counts.items()})

    def _load(self, say: Any) -> dict[str, Params]:
        """Weights of the models that are needed; one copy if both are the same."""
        needed = self.roles if any(p.needs_reference for p in self.plans) else self.roles[:1]
        params: dict[str, Params] = {}
        for role in needed:
            if role.store_key in params:
                continue
            start, folder = time.monotonic(), role.folder
            sharding = parallel.parameter_sharding(self.devices)
            params[role.store_key] = model_folder.load(folder, sharding)
            say.print(
                f"{role.name}: {folder.path}, {folder.num_params:,} parameters in "
                f"{folder.model.dtype} ({time.monotonic() - start:.1f} s)"
            )
        return params

    def _batch(
        self, batch: data.BatchPlan, params: dict[str, Params], folder: RunFolder, bar: ProgressBar
    ) -> None:
        """All missing losses of one batch, each (plan, model) stored in one write."""
        real = np.flatnonzero(batch.rows >= 0)
        keys = [self.items[r].store_key for r in batch.rows[real]]
        for plan in self.plans:
            for role in {r.store_key: r for r in self._needed(plan)}.values():
                new = [
                    i
                    for i, key in zip(real, keys)
                    if not folder.store.has(role.store_key, plan.identity, key)
                ]
                if not new:
                    continue
                start = time.monotonic()
                forward, positions = self._forward(batch, plan)
                # Target and reference share programs where their networks are the same.
                runner = _runner(role.folder.model, self.slots(batch.length), self.devices)
                if not runner.is_compiled(forward):
                    bar.note(f"compiling for {batch.length} tokens")
                    start += self._compile(runner, params[role.store_key], forward, folder)
                bar.note(f"{role.name}, {batch.length} tokens")
                out = runner(params[role.store_key], forward)
                self.seconds[plan.identity] += time.monotonic() - start
                records = [make_record(positions[:, i], out[:, i]) for i in new]
                names = [self.items[batch.rows[i]].store_key for i in new]
                folder.store.append(role.store_key, plan.identity, names, records)

    def _compile(
        self, runner: parallel.Runner, params: Params, forward: ForwardBatch, folder: RunFolder
    ) -> float:
        """Makes a program; returns the seconds it took."""
        start = time.monotonic()
        runner.compile(params, forward)
        seconds = time.monotonic() - start
        self.programs += 1
        self.compile_seconds += seconds
        length = int(forward.tokens.shape[1])
        folder.log("compile", length=length, compile_seconds=round(seconds, 2))
        return seconds

    def _forward(self, batch: data.BatchPlan, plan: Plan) -> tuple[ForwardBatch, np.ndarray]:
        """The scorer's input for one batch and plan (host arrays), and its positions [t, b, k]."""
        slots, length = self.slots(batch.length), batch.length
        padded = data.pad_batch(self._encoded, batch)
        tokens, valid = np.asarray(padded.tokens), np.asarray(padded.valid)
        if self.settings.padding == "visible":
            tokens = np.where(valid, tokens, self._pad_id()).astype(np.int32)
            valid = np.ones_like(valid)
        width = min(length, self.settings.max_length)
        masks = np.zeros((plan.passes, len(batch.rows), length), bool)
        scored = np.zeros_like(masks)
        for start in range(0, len(batch.rows), PLAN_ROWS):
            chunk = [int(r) for r in batch.rows[start : start + PLAN_ROWS] if r >= 0]
            if chunk:
                drawn = plan.draw(chunk)
                part = slice(start, start + len(chunk))
                masks[:, part, :width] = drawn.masks[: len(chunk), :, :width].swapaxes(0, 1)
                scored[:, part, :width] = drawn.scored[: len(chunk), :, :width].swapaxes(0, 1)
        positions = losses.scored_positions(scored, slots[-1])
        sizes = losses.slot_sizes(plan.slot_bounds(length), length)
        group = np.searchsorted(np.array(slots), sizes).astype(np.int32)
        return ForwardBatch(tokens, valid, masks, positions, group), positions  # pyright: ignore

    def _pad_id(self) -> int:
        config = self.roles[0].folder.config
        return int(config.get("pad_token_id", config.get("eos_token_id", 0)) or 0)

    # --- scores ----------------------------------------------------------------------------------

    def _score(self, folder: RunFolder, ids: list[str], rows: list[int]) -> None:
        """Appends the scores of `rows` and of the texts with the same tokens."""
        rows = sorted({same for r in rows for same in self._same_tokens[self.items[r].store_key]})
        for start in range(0, len(rows), PLAN_ROWS):
            chunk = rows[start : start + PLAN_ROWS]
            lines = [{"id": ids[r], "scores": {}, "passes": {}} for r in chunk]
            for plan in self.plans:
                self._score_plan(folder, plan, chunk, lines)
            folder.append_scores(lines)

    def _score_plan(
        self, folder: RunFolder, plan: Plan, rows: list[int], lines: list[dict[str, Any]]
    ) -> None:
        drawn = plan.draw(rows)
        target, reference = (self.read_losses(folder, plan, rows, role) for role in self.roles)
        tokens, zlib_bytes = np.zeros(PLAN_ROWS, np.int32), np.ones(PLAN_ROWS, np.int32)
        for i, row in enumerate(rows):
            tokens[i] = self.items[row].maskable.sum()
            zlib_bytes[i] = self.items[row].encoded.zlib_bytes
        reading = Reading(target, reference, drawn, tokens, zlib_bytes)  # pyright: ignore
        scores = {k: np.asarray(v) for k, v in plan.statistics(reading).items()}
        details = None
        if self.include_votes and any(a.name == "sama" for a in plan.attacks):
            ties = self.settings.sama.ties
            details = votes.sign_statistics(
                jnp.asarray(target), jnp.asarray(reference), drawn, ties=ties
            )
        for i, (row, line) in enumerate(zip(rows, lines)):
            usable = bool(self.items[row].maskable.any())
            for name, values in scores.items():
                finite = usable and bool(np.isfinite(values[i]))
                line["scores"][name] = float(values[i]) if finite else None
                line["passes"][name] = plan.passes if usable else 0
            if details is not None and usable:
                line["votes"] = {
                    "step_votes": np.asarray(details.step_votes[i]).tolist(),
                    "step_weights": np.asarray(details.step_weights[i]).tolist(),
                    "tie_rate": float(details.tie_rate[i]),
                }

    def read_losses(
        self, folder: RunFolder, plan: Plan, rows: Sequence[int], role: Role
    ) -> np.ndarray:
        """Stored losses of up to PLAN_ROWS texts: float32 [PLAN_ROWS, t, max_length]."""
        out = np.full((PLAN_ROWS, plan.passes, self.settings.max_length), np.nan, np.float32)
        for i, row in enumerate(rows):
            key = self.items[row].store_key
            if folder.store.has(role.store_key, plan.identity, key):
                record: Record = folder.store.read(role.store_key, plan.identity, key)
                out[i] = record.dense(self.settings.max_length)
        return out

    def cost(self, folder: RunFolder) -> dict[str, Any]:
        """Seconds by attack (attacks on one plan share its passes), added up over resumed parts."""
        before = (folder.manifest.get("cost") or {}).get("seconds") or {}
        seconds = {
            a.name: round(before.get(a.name, 0.0) + self.seconds[p.identity], 2)
            for p in self.plans
            for a in p.attacks
        }
        return {
            "seconds": before | seconds,
            "compile_seconds": round(self.compile_seconds, 2),
            "programs": self.programs,
        }


@functools.lru_cache(maxsize=32)
def _runner(model: Any, slots: tuple[int, ...], devices: tuple[Any, ...]) -> parallel.Runner:
    """One scorer a network and set of slot sizes, kept for the whole process like any jit cache."""
    return parallel.Runner(partial(losses.score_batch, model, slots), devices)


def _group(names: list[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    return groups


def _by_length(batches: list[data.BatchPlan]) -> list[tuple[int, list[int]]]:
    """Padded lengths in the order of the batches, and the rows of each."""
    rows: dict[int, list[int]] = {}
    for batch in batches:
        rows.setdefault(batch.length, []).extend(int(r) for r in batch.rows if r >= 0)
    return list(rows.items())


def _matmul_rate(model: Any) -> float:
    """Floating-point operations a second of one matrix product at the model's shape."""
    a = jnp.ones((1024, model.arch.width), model.dtype)
    b = jnp.ones((model.arch.width, model.arch.mlp_width), model.dtype)
    product = jax.jit(jnp.dot)
    product(a, b).block_until_ready()
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        product(a, b).block_until_ready()
        runs += 1
    return 2.0 * a.size * b.shape[1] * runs / (time.perf_counter() - start)

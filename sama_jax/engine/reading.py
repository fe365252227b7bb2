"""What attacks read, out of the loss store: items, tasks, plans drawn again, statistics.

No model and no device list: forward passes fill the store (`scoring`), scores come out of it here,
so that a new statistic on an old store costs no pass.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sama_jax import rng
from sama_jax.arrays import Encoded, ProbePlan, Reading, TextKeyData
from sama_jax.attacks.registry import (
    Attack,
    Query,
    View,
    ViewText,
    ViewTools,
    flatten,
    key_name,
)
from sama_jax.config import AuditSettings, settings_hash
from sama_jax.errors import DataError, UsageError
from sama_jax.storage import replay
from sama_jax.storage.files import read_json_lines, write_atomic
from sama_jax.storage.loss_store import LossStore

PLAN_ROWS = 8
"""Texts whose plans and statistics are computed at once; one shape for all buckets."""
PLANS_KEPT = 64
"""Calls of `Reader.plan` that are remembered at most; 0.8 MB each for SAMA at 512 tokens."""
ROLES = ("target", "reference")


class Item(NamedTuple):
    """One view of a text: what its randomness and its place in the store derive from."""

    key: TextKeyData
    """Draws the plan."""
    maskable: np.ndarray  # bool [n]
    zlib_bytes: int
    characters: int
    store_key: str
    ids: np.ndarray | None = None
    """int32 [n]; None where only the store is at hand."""
    before: np.ndarray | None = None
    """int32 [p], visible tokens before the text."""

    @property
    def length(self) -> int:
        """Tokens of a forward pass."""
        return len(self.maskable) + (0 if self.before is None else len(self.before))


def text_item(encoded: Encoded, settings: AuditSettings, shift: bool) -> Item:
    """The text itself."""
    maskable = _maskable(encoded.ids, encoded.special, settings, shift)
    key = rng.text_key_data(encoded.ids)
    name = key_name(key)
    if not maskable.all():
        name += "-" + hashlib.sha256(maskable.tobytes()).hexdigest()[:8]
    return Item(key, maskable, encoded.zlib_bytes, encoded.characters, name, encoded.ids)


def view_item(made: ViewText, original: Item, settings: AuditSettings, shift: bool) -> Item:
    """Another view of the text of `original`."""
    special = np.zeros(len(made.ids), bool) if made.special is None else made.special
    maskable = _maskable(made.ids, special, settings, shift)
    if made.same_masks and len(maskable) == len(original.maskable):
        maskable = original.maskable
    own = rng.text_key_data(made.ids)
    name, key = key_name(own), original.key if made.same_masks else own
    if not maskable.all():
        name += "-" + hashlib.sha256(maskable.tobytes()).hexdigest()[:8]
    if key != own:
        name += "~" + key_name(key)
    if made.before is not None and len(made.before):
        name += "+" + hashlib.sha256(made.before.astype("<i4").tobytes()).hexdigest()[:16]
    sizes = original.zlib_bytes, original.characters
    return Item(key, maskable, *sizes, name, made.ids, made.before)


def _maskable(
    ids: np.ndarray, special: np.ndarray, settings: AuditSettings, shift: bool
) -> np.ndarray:
    maskable = np.ones(len(ids), bool)
    if settings.sama.exclude_special:
        maskable &= ~special
    if settings.sama.exclude_position0_when_shifted and shift:
        maskable[:1] = False
    return maskable


def view_tools(
    original: Item,
    settings: AuditSettings,
    *,
    encode: Callable[[str], Encoded],
    contexts: dict[str, np.ndarray],
    joined: dict[str, str],
    room: int,
    guide: np.ndarray | None,
) -> ViewTools:
    """The tools of one text; its generator depends on the seed and the token ids alone."""
    seed = [settings.seed, int(original.key.high), int(original.key.low)]
    return ViewTools(encode, contexts, joined, room, guide, np.random.default_rng(seed))


# --- tasks ---------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One thing to be read under one view: the queries of all attacks that ask for it."""

    view: str
    identity: str
    """Names the losses in the store; other channels add `:channel`."""
    query: Query
    channels: dict[str, tuple[str, ...]]
    """Role -> what is read from it."""
    guide: "Task | None"
    draw: Any
    """Rows -> ProbePlan of PLAN_ROWS texts at max_length (host); None for a procedure."""
    slot_bounds: Any
    """Length -> int [t]."""
    passes: int
    rows: int
    """The t of a reading."""

    def stored(self, channel: str) -> str:
        """The plan's name in the store for one channel."""
        return self.identity if channel == "nll" else f"{self.identity}:{channel}"


class Reader:
    """Items and tasks of a run, and the readings of its attacks.

    `items` maps a view's name to one item a text (None where the text has no such view).
    `role_keys` maps a role to the name of its losses in the store.
    """

    def __init__(
        self,
        attacks: Sequence[Attack],
        settings: AuditSettings,
        items: dict[str, list[Item | None]],
        role_keys: dict[str, str],
        store: LossStore | None,
        replayed: replay.Replayed | None = None,
    ):
        self.attacks, self.settings, self.items = list(attacks), settings, items
        self.role_keys, self.store = role_keys, store
        self._replayed = replayed
        self._plans: dict[tuple[str, str, tuple[int, ...]], ProbePlan] = {}
        self.tasks: dict[tuple[str, str], Task] = {}
        self._of: dict[tuple[str, str], Task] = {}
        self.queries = {a.name: a.queries(settings) for a in self.attacks}
        self.views: dict[str, View | None] = {"text": None}
        for attack in self.attacks:
            for name, query in self.queries[attack.name].items():
                self._of[attack.name, name] = self._task(query, attack)
                self.views.setdefault(query.view_name, query.view)
        # Tasks are merged while they are collected; the last word is in `tasks`.
        self._of = {k: self.tasks[t.view, t.identity] for k, t in self._of.items()}
        if replayed is not None and not any(i.startswith("plan-") for _, i in self.tasks):
            raise UsageError("--plan replays SAMA's probes, but sama is not among the attacks")

    @property
    def num_texts(self) -> int:
        return len(self.items["text"])

    def task(self, attack: str, name: str | None = None) -> Task:
        """The task behind one of an attack's queries, its first by default."""
        return self._of[attack, name or next(iter(self.queries[attack]))]

    def _task(self, query: Query, attack: Attack) -> Task:
        guide = None if query.guide is None else self._task(query.guide, attack)
        view, settings = query.view_name, self.settings
        if self._replayed is not None and attack.name == "sama":
            identity, rows = self._replayed.identity, self._replayed.plan.masks.shape[1]
            bounds = self._replayed.plan.scored.sum(axis=-1).max(axis=0, initial=1)
            draw, slots, passes = self._draw_replayed, lambda _: bounds, rows
        else:
            identity = settings_hash(query.identity, settings.seed)
            if guide is not None and query.guides_probes:
                roles = [self.role_keys.get(r) for r in guide.channels]
                identity = settings_hash(identity, *roles)
            if query.probes is not None:
                passes = rows = query.probes.passes
                draw = partial(self._draw, query, view, guide if query.guides_probes else None)
                slots = query.probes.slot_bounds
            else:
                assert query.procedure is not None
                passes, rows = query.procedure.passes, query.procedure.rows
                draw = slots = None
        roles = ROLES if query.models == "both" else (query.models,)
        known = self.tasks.get((view, identity))
        channels = dict(known.channels) if known else {}
        for role in roles:
            wanted = channels.get(role, ()) + query.channels
            channels[role] = tuple(dict.fromkeys(wanted))
        task = Task(view, identity, query, channels, guide, draw, slots, passes, rows)
        self.tasks[view, identity] = task
        return task

    # --- plans -----------------------------------------------------------------------------------

    def plan(self, task: Task, rows: Sequence[int]) -> ProbePlan:
        """`task.draw(rows)`, remembered until `forget_plans`.

        The passes of both models and then the score read it, and drawing takes 6 ms for 8 texts of
        96 tokens, as long as a pass of a small model.
        """
        at = task.view, task.identity, tuple(rows)
        if at not in self._plans:
            if len(self._plans) >= PLANS_KEPT:
                self._plans.clear()
            self._plans[at] = task.draw(rows)
        return self._plans[at]

    def forget_plans(self, rows: Sequence[int]) -> None:
        """Those of texts that are done with."""
        done = set(rows)
        self._plans = {at: p for at, p in self._plans.items() if done.isdisjoint(at[2])}

    def _draw(self, query: Query, view: str, guide: Task | None, rows: Sequence[int]) -> ProbePlan:
        length = self.settings.max_length
        high, low = np.zeros(PLAN_ROWS, np.uint32), np.zeros(PLAN_ROWS, np.uint32)
        maskable = np.zeros((PLAN_ROWS, length), bool)
        for i, row in enumerate(rows):
            item = self.items[view][row]
            if item is not None:
                high[i], low[i] = item.key
                maskable[i, : len(item.maskable)] = item.maskable
        args = [np.uint32(self.settings.seed), high, low, maskable]
        if guide is not None:
            args.append(self.values(guide, rows, next(iter(guide.channels)), "nll"))
        return jax.tree.map(np.asarray, _drawer(query.probes)(*args))

    def _draw_replayed(self, rows: Sequence[int]) -> ProbePlan:
        assert self._replayed is not None
        at = [self._replayed.row_of[r] for r in rows]
        fill = PLAN_ROWS - len(at)
        return jax.tree.map(
            lambda x: np.concatenate([x[at], np.zeros((fill, *x.shape[1:]), x.dtype)]),
            self._replayed.plan,
        )

    # --- the store -------------------------------------------------------------------------------

    def missing(
        self, task: Task, role: str, item: Item, *, readable: bool = False
    ) -> tuple[str, ...]:
        """Channels of a task that are not stored yet for an item, or (`readable`) not here."""
        if self.store is None:
            return task.channels[role]
        key, known = self.role_keys[role], self.store.has if readable else self.store.exists
        return tuple(
            c for c in task.channels[role] if not known(key, task.stored(c), item.store_key)
        )

    def values(self, task: Task, rows: Sequence[int], role: str, channel: str) -> np.ndarray:
        """Stored values of up to PLAN_ROWS texts: float32 [PLAN_ROWS, t, max_length]."""
        out = np.full((PLAN_ROWS, task.rows, self.settings.max_length), np.nan, np.float32)
        key, name = self.role_keys.get(role, ""), task.stored(channel)
        for i, row in enumerate(rows):
            item = self.items[task.view][row]
            if item is not None and self.store and self.store.has(key, name, item.store_key):
                record = self.store.read(key, name, item.store_key)
                out[i] = record.dense(self.settings.max_length)
        return out

    # --- readings and scores ---------------------------------------------------------------------

    def usable(self, attack: Attack, row: int) -> bool:
        """Whether a text has every view that an attack reads, each with something to mask."""
        views = {"text", *(q.view_name for q in flatten(self.queries[attack.name]))}
        found = [self.items.get(v, [None] * self.num_texts)[row] for v in views]
        return all(item is not None and item.maskable.any() for item in found)

    def ready(self, attack: Attack, row: int) -> bool:
        """Whether all that a usable text's score needs is stored."""
        tasks = [self.task(attack.name, name) for name in self.queries[attack.name]]
        tasks += [t.guide for t in tasks if t.guide is not None]
        for task in tasks:
            items = self.items.get(task.view)
            item = None if items is None else items[row]
            if item is None or any(
                self.missing(task, role, item, readable=True) for role in task.channels
            ):
                return False
        return True

    def reading(self, task: Task, query: Query, rows: Sequence[int]) -> Reading:
        """A batch of PLAN_ROWS readings of one task (host)."""
        tokens, zlib_bytes, characters = np.zeros((3, PLAN_ROWS), np.int32)
        for i, row in enumerate(rows):
            item = self.items[task.view][row]
            if item is not None:
                tokens[i] = item.maskable.sum()
                zlib_bytes[i], characters[i] = item.zlib_bytes, item.characters
        shape = (PLAN_ROWS, task.rows, self.settings.max_length)
        losses = {}
        for role in ROLES:
            reads = role in task.channels and query.models in ("both", role)
            losses[role] = {
                c: self.values(task, rows, role, c) if reads else np.full(shape, np.nan, np.float32)
                for c in query.channels
            }
        if task.draw is not None:
            plan = self.plan(task, rows)
        else:
            read = ~np.isnan(losses["target"]["nll"]) | ~np.isnan(losses["reference"]["nll"])
            ones = np.ones(shape[:2], np.float32)
            plan = ProbePlan(read, read, ones, np.zeros((*shape[:2], 0, 1), np.int32))  # pyright: ignore
        first, *rest = query.channels
        return Reading(
            losses["target"][first],  # pyright: ignore
            losses["reference"][first],  # pyright: ignore
            plan,
            tokens,  # pyright: ignore
            zlib_bytes,  # pyright: ignore
            characters,  # pyright: ignore
            {c: losses["target"][c] for c in rest},  # pyright: ignore
            {c: losses["reference"][c] for c in rest},  # pyright: ignore
        )

    def statistics(self, attacks: Sequence[Attack], rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Every attack's statistic of up to PLAN_ROWS texts, [rows] or [rows, parts]."""
        cache: dict[tuple[str, str, Query], Reading] = {}

        def read(attack: Attack, name: str) -> Reading:
            task, query = self.task(attack.name, name), self.queries[attack.name][name]
            at = (task.view, task.identity, replace(query, view=None, guide=None))
            if at not in cache:
                cache[at] = self.reading(task, query, rows)
            return cache[at]

        found = {}
        # Statistics never see the seed; without it they are compiled once for all seeds.
        settings = replace(self.settings, seed=0)
        for attack in attacks:
            if attack.statistic is None:
                continue
            first, *rest = self.queries[attack.name]
            reading = read(attack, first)._replace(views={n: read(attack, n) for n in rest})
            out = _statistic(attack, settings)(reading)
            found[attack.name] = np.asarray(out)[: len(rows)]
        return found


@functools.lru_cache(maxsize=64)
def _drawer(probes: Any) -> Any:
    """Jitted: plans of a batch of texts from the seed, their key data and maskable positions."""

    def one(seed, high, low, maskable, *guide):
        return probes.plan(rng.text_key(seed, TextKeyData(high, low)), maskable, *guide)

    def batch(seed, *rest):
        return jax.vmap(one, in_axes=(None, *[0] * len(rest)))(seed, *rest)

    # Sorting and random bits take LLVM two seconds to optimise and are as fast at its level 1: half
    # of that, and an audit with all attacks draws 13 kinds of plans.
    return jax.jit(batch, compiler_options={"xla_backend_optimization_level": 1})


@functools.lru_cache(maxsize=256)
def _statistic(attack: Attack, settings: AuditSettings) -> Any:
    """Jitted: an attack's statistic of a batch of texts from their readings.

    One program an attack, so that a score's bits do not depend on which others are computed.
    """
    assert attack.statistic is not None
    statistic = attack.statistic
    return jax.jit(jax.vmap(lambda reading: statistic(reading, settings)))


def passes(attack: Attack, settings: AuditSettings) -> dict[str, int]:
    """Forward passes of each model that an attack needs for one text by itself."""
    count: dict[str, int] = dict.fromkeys(ROLES, 0)
    for query in flatten(attack.queries(settings)):
        for role in ROLES if query.models == "both" else (query.models,):
            count[role] += query.passes
    return count


def load_replayed(path: Path, settings: AuditSettings, ids: list[str], items: list[Item]) -> Any:
    """A replay file matched with the run's texts."""
    loaded = replay.load_plan(path, settings.max_length)
    row_of = replay.match(loaded, ids, [i.ids for i in items], path)  # pyright: ignore
    return replay.Replayed(loaded.identity, loaded.plan, row_of)


# --- the index of a run --------------------------------------------------------------------------

INDEX = "texts.jsonl"
"""What the plans of a run's texts derive from, so that scores need no texts; no text is in it."""


def write_index(
    path: Path, rows: list[dict[str, Any]], items: dict[str, list[Item | None]]
) -> None:
    """One line a text: id, label, status, and its items by view."""
    lines = []
    for i, row in enumerate(rows):
        known = {k: row[k] for k in ("id", "label", "n_tokens", "truncated", "status") if k in row}
        known["views"] = {view: _describe(found[i]) for view, found in items.items()}
        lines.append(json.dumps(known, ensure_ascii=False))
    write_atomic(path, "".join(line + "\n" for line in lines))


def _describe(item: Item | None) -> dict[str, Any] | None:
    if item is None:
        return None
    return {
        "key": key_name(item.key),
        "store_key": item.store_key,
        "tokens": len(item.maskable),
        "not_masked": np.flatnonzero(~item.maskable).tolist(),
        "zlib_bytes": item.zlib_bytes,
        "characters": item.characters,
    }


def read_index(path: Path) -> tuple[list[dict[str, Any]], dict[str, list[Item | None]]]:
    """The rows and items of `write_index`. Raises `DataError`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the output folder of a finished audit")
    rows, _ = read_json_lines(path)
    items: dict[str, list[Item | None]] = {}
    try:
        for row in rows:
            for view, found in row.pop("views").items():
                items.setdefault(view, []).append(found and _item(found))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not the index of an audit ({error})") from None
    return rows, items


def _item(found: dict[str, Any]) -> Item:
    maskable = np.ones(found["tokens"], bool)
    maskable[found["not_masked"]] = False
    high, low = int(found["key"][:8], 16), int(found["key"][8:], 16)
    key = TextKeyData(np.uint32(high), np.uint32(low))  # pyright: ignore
    return Item(key, maskable, found["zlib_bytes"], found["characters"], found["store_key"])

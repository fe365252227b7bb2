"""Asks whether a run would find texts that its own reference was made to learn.

Half of some non-members are learnt by a copy of the reference, in memory; then the copy is audited
as a target, by the primary attack and with the run's settings. An audit whose pipeline does not
find even these says nothing by finding nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from sama_jax import attacks as attack_suite
from sama_jax.arrays import Params
from sama_jax.attacks.references import References
from sama_jax.config import settings_hash
from sama_jax.devices.matmul_rate import matmul_rate
from sama_jax.engine.estimate import USED
from sama_jax.engine.loop import Setup
from sama_jax.engine.roles import ModelRole, load
from sama_jax.errors import DataError, UsageError
from sama_jax.programs.audit_inputs import Chosen, Inputs, Tokenised
from sama_jax.programs.jobs import AuditJob
from sama_jax.programs.part import (
    Part,
    known_part,
    make_part,
    require_one_process,
    score_part,
    shuffled,
)
from sama_jax.storage.run_folder import Row
from sama_jax.storage.shapes import fits
from sama_jax.terminal import ProgressBar, binary_size, duration
from sama_jax.texts.read import Text, content_id
from sama_jax.training import few
from sama_jax.training.loop import device
from sama_jax.training.sequences import tokens_of
from sama_jax.validity import bounds
from sama_jax.validity.gate import Gate
from sama_jax.validity.overlap import relate
from sama_jax.validity.scores import pipeline_control
from sama_jax.weights import loading, model_folder

FOLDER = "pipeline_control"
FLAG = "--pipeline-control"
TEXTS = 32
"""Texts that are learnt, and as many that are not."""


class Halves(NamedTuple):
    """Texts of the control, labelled 1 if they are to be learnt and else 0."""

    texts: list[Text]

    @property
    def learnt(self) -> list[Text]:
        """The texts to learn."""
        return [text for text in self.texts if text.label == 1]


def choose_halves(texts: Sequence[Text], readable: Sequence[bool], seed: int) -> Halves:
    """Chooses non-members of different documents, by the seed and their content alone.

    Texts of one group, copies and near duplicates are one document.

    Args:
      texts: of the run.
      readable: whether each can be scored and learnt.
      seed: of the run.

    Raises:
      DataError: too few are there for the control to pass.
    """
    usable = [text for text, can in zip(texts, readable) if text.label == 0 and can]
    usable.sort(key=lambda text: (content_id(text.text), text.id))
    pool: dict[int, Text] = {}
    for text, unit in zip(usable, relate(usable).units.tolist()):
        pool.setdefault(unit, text)
    order = shuffled(pool.values(), seed)
    count = min(TEXTS, len(order) // 2)
    if count < bounds.CONTROL_TEXTS:
        raise DataError(
            f"{FLAG}: needs {2 * bounds.CONTROL_TEXTS} non-members of different documents, half of "
            f"them to learn, found {len(order)}; give more, or known members by --control FILE"
        )
    halves = [text._replace(label=int(i < count)) for i, text in enumerate(order[: 2 * count])]
    return Halves(halves)


def require_possible(job: AuditJob, inputs: Inputs, tokenised: Tokenised, room: int) -> Halves:
    """Returns the texts of the control, before anything is computed.

    Args:
      job: of the run.
      inputs: its texts and models.
      tokenised: the texts.
      room: bytes of memory of a device.

    Raises:
      UsageError: several processes, no or several references, or too little memory to train one.
      DataError: too few non-members.
    """
    require_one_process(job, FLAG)
    if inputs.references != References():
        raise UsageError(
            f"{FLAG}: makes a target of the reference, so it needs exactly one, with the target's "
            "tokenizer; give one, or known members by --control FILE instead"
        )
    needed = few.BYTES * inputs.roles["reference"].folder.num_params
    if needed > room:
        raise UsageError(
            f"{FLAG}: trains the reference on one device, where its parameters, gradients and "
            f"moments take {binary_size(needed)} of {binary_size(room)}; give known members by "
            "--control FILE instead"
        )
    # A next-token model learns nothing of one token.
    long = [len(one.ids) > 1 for one in tokenised.encoded]
    readable = (tokenised.table.readable & long).tolist()
    return choose_halves(inputs.texts, readable, job.settings.seed)


def estimate(halves: Halves, setup: Setup) -> str:
    """Says what the training may take: three times the operations of as many passes."""
    shapes = setup.shapes
    length = shapes.settings.max_length
    flops = 3 * few.STEPS * few.BATCH * shapes.model.flops_per_text(length, float(length))
    seconds = flops / (USED * matmul_rate(shapes.product, shapes.model.dtype))
    return (
        f"pipeline control: a copy of the reference learns {len(halves.learnt)} non-members, in at "
        f"most {few.STEPS} steps: at most about {duration(seconds)} after compiling"
    )


def run_pipeline_control(
    job: AuditJob,
    inputs: Inputs,
    chosen: Chosen,
    halves: Halves,
    primary: str,
    setup: Setup,
    say: Console,
) -> Gate:
    """Makes the control, or reads the one that the run's folder holds, and judges it."""
    part = _part(job, inputs, chosen, halves, primary)
    if (known := known_part(part)) and fits(known[1].get("learnt"), _LEARNT):
        return _judge(known[0], primary, known[1]["learnt"])
    say.print(estimate(halves, setup))
    learnt = _learn(part, job.quiet)
    told = {"before": learnt.before, "after": learnt.after, "steps": learnt.steps}
    if not np.isfinite(learnt.after):
        return pipeline_control(primary, np.zeros(0), np.zeros(0, np.int64), **told)
    say.print(f"the reference has learnt {len(halves.learnt)} texts in {learnt.steps} steps")
    held = _place(part, learnt.params, setup, say)
    rows = score_part(part, setup, say, held=held, about={"learnt": told})
    return _judge(rows, primary, told)


_LEARNT = {"before": float, "after": float, "steps": int}


def _part(job: AuditJob, inputs: Inputs, chosen: Chosen, halves: Halves, primary: str) -> Part:
    """Makes the reference the target, under a name of its own in the store."""
    reference = inputs.roles["reference"]
    name = settings_hash(reference.store_key, few.RECIPE, [text.id for text in halves.learnt])
    roles = {"target": ModelRole("target", reference.folder, name), "reference": reference}
    small = inputs._replace(texts=halves.texts, roles=roles)
    attack = attack_suite.get(primary)
    path = job.out / FOLDER
    return make_part(path, job, small, chosen.prefixes, attack, recipe=few.RECIPE)


def _judge(rows: Sequence[Row], primary: str, told: dict[str, Any]) -> Gate:
    scores = [(row.get("scores") or {}).get(primary) for row in rows]
    labels = np.array([row.get("label") for row in rows], np.int64)
    return pipeline_control(primary, np.array(scores, np.float64), labels, **told)


def _learn(part: Part, quiet: bool) -> few.Learnt:
    """Trains a float32 copy of the reference on one device."""
    reference = part.inputs.roles["reference"].folder
    model = reference.model
    options = {"mask_id": model.mask_id, "attention_mask": reference.asked_mask}
    folder = model_folder.open_folder(reference.path, dtype="float32", **options)
    plain = dataclasses.replace(folder.model, dtype=model.dtype)  # pyright: ignore  a protocol
    encoded = zip(part.inputs.texts, part.tokenised.encoded)
    sequences = [tokens_of(one) for text, one in encoded if text.label == 1]
    params = loading.load(folder, device())
    with ProgressBar("pipeline control", few.STEPS, "steps", quiet=quiet) as bar:
        bar.note("compiling the training step (once)")

        def advance(steps: int) -> None:
            bar.note("")
            bar.advance(steps)

        return few.learn(plain, params, sequences, part.job.settings.seed, advance)


def _place(part: Part, learnt: Params, setup: Setup, say: Console) -> dict[str, Params]:
    """Puts what was learnt where the run keeps its models, in the form of the reference there."""
    target, reference = (part.inputs.roles[name] for name in ("target", "reference"))
    loaded = load([reference], setup.layout, say, quiet=setup.quiet).params
    there = loaded[reference.store_key]
    placed = jax.tree.map(
        lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding), learnt, there
    )
    return {target.store_key: placed, reference.store_key: there}

"""The likelihood bound of texts under one model, with its standard error."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sama_jax.arrays import Encoded, Reading
from sama_jax.attacks.likelihood import likelihood_probes
from sama_jax.attacks.queries import TARGET, Query
from sama_jax.attacks.registry import Attack
from sama_jax.config import AuditSettings
from sama_jax.devices.placement import device_bytes
from sama_jax.devices.strategy import local_layout
from sama_jax.engine.batching import BatchShapes
from sama_jax.engine.loop import Setup, fill_store
from sama_jax.engine.plans import PLAN_ROWS
from sama_jax.engine.readings import Readings
from sama_jax.engine.roles import ModelRole, make_probe, model_key, pad_id, resident_bytes
from sama_jax.engine.tasks import tasks_of
from sama_jax.engine.text_table import TextView, original_view, table_of
from sama_jax.errors import UsageError
from sama_jax.programs.audit_inputs import require_context
from sama_jax.programs.run_identity import run_identity
from sama_jax.storage.files import write_atomic
from sama_jax.storage.run_folder import RunFolder, json_lines, noted
from sama_jax.terminal import console
from sama_jax.texts.read import Text, Texts
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights import model_folder

RESULT = "nll.jsonl"


def bound_and_error(reading: Reading, settings: AuditSettings) -> Float[Array, " 2"]:
    """Returns mean and standard error, in nats a token, of the estimates of a text's NLL.

    The numbers of masked tokens are spread evenly over the passes, which the error treats as
    independent draws: it is an upper estimate.
    """
    del settings
    plan, losses = reading.plan, jnp.where(reading.plan.scored, reading.target, 0.0)
    estimates = plan.weights * losses.sum(axis=1)
    used = plan.weights > 0
    count = used.sum()
    mean = estimates.sum() / jnp.where(count > 0, count, jnp.nan)
    squares = jnp.where(used, (estimates - mean) ** 2, 0.0).sum()
    error = jnp.sqrt(squares / jnp.where(count > 1, count * (count - 1), jnp.nan))
    return jnp.stack([mean, error])


_NLL = Attack(
    "nll",
    lambda settings: {"text": Query(likelihood_probes(settings), roles=TARGET)},
    bound_and_error,
    access="loss",
    source="ML-GSAI/LLaDA get_log_likelihood.py",
    summary="Likelihood bound.",
    corpus=lambda found, settings: found.parts[:, 0],
)


def run_nll(
    model: Path,
    texts: Texts,
    out: Path,
    settings: AuditSettings,
    *,
    mask_id: int | None = None,
    attention_mask: str | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Writes `nll.jsonl` into `out`, one line a text; the same command continues.

    A line holds `id`, `n_tokens`, `truncated`, `status`, `nll` (nats a token), `standard_error`,
    and `nll_total` (nats).

    Raises:
      ModelError: the model is damaged, or is surely not read as it was trained.
      UsageError: the model is autoregressive, or `out` belongs to another run.
    """
    say = console(quiet)
    longest = settings.pad_to or settings.max_length
    options: dict[str, Any] = {"dtype": settings.dtype, "attention": settings.attention}
    options |= {"mask_id": mask_id, "attention_mask": attention_mask, "longest": longest}
    folder = model_folder.open_folder(model, **options)
    if (kind := folder.model.kind) not in _NLL.kinds:
        raise UsageError(
            f"{model}: nll is defined for {' and '.join(_NLL.kinds)} models, this one is {kind}; "
            "it has no mask token"
        )
    tokenizer = TextTokenizer.from_folder(folder.path, folder.model.vocab_size)
    encoded = tokenizer.encode([t.content for t in texts.texts], settings.max_length)
    require_context(encoded, [folder], settings)
    views = [original_view(e, settings, shift=folder.model.shift) for e in encoded]
    role = ModelRole("target", folder, model_key(folder, settings, pad_id(folder, settings)))
    roles, keys, layout = {"target": role}, {"target": role.store_key}, local_layout()
    tasks, tables = tasks_of([_NLL], settings, keys), {"text": table_of(views)}
    sizes = resident_bytes([role], layout), device_bytes()
    shapes = BatchShapes(folder.model, folder.max_length, settings, layout, *sizes)
    probe = make_probe(folder, tokenizer, [view.ids for view in views])
    setup = Setup(roles, shapes, probes={"target": probe}, quiet=quiet)
    run = run_identity(texts.texts, encoded, tokenizer, roles, settings)
    run["nll"] = tasks.first("nll").identity
    output = RunFolder(out, run, {"model": str(model)}, None)
    try:
        output.keep_note(*tokenizer.doubts(encoded))
        readings = Readings(tasks, settings, tables, keys, output.store)
        readings = fill_store(setup, readings, output, [t.id for t in texts.texts], say).readings
        rows = _rows(readings, texts.texts, encoded, views)
        write_atomic(out / RESULT, json_lines(rows))
        notes = noted(out)  # also of an earlier part of the run
        output.write_manifest(finished=True, notes=notes)
    finally:
        output.close()
    for note in notes:  # a note is no progress, so it is not quiet
        console().print(f"note: {note}")
    return rows


def _rows(
    readings: Readings,
    texts: Sequence[Text],
    encoded: Sequence[Encoded],
    views: Sequence[TextView],
) -> list[dict[str, Any]]:
    """Returns the lines of the results."""
    rows: list[dict[str, Any]] = []
    for start in range(0, len(views), PLAN_ROWS):
        chunk = list(range(start, min(start + PLAN_ROWS, len(views))))
        found = readings.statistics([_NLL], chunk)["nll"]
        for i, (mean, error) in zip(chunk, found):
            rows.append(_row(texts[i], encoded[i].truncated, views[i], mean, error))
    return rows


def _row(
    text: Text, truncated: bool, view: TextView, mean: np.floating, error: np.floating
) -> dict[str, Any]:
    """Returns one line of the results."""
    tokens = int(view.maskable.sum())

    def number(value: Any) -> float | None:
        return float(value) if np.isfinite(value) else None

    return {
        "id": text.id,
        "n_tokens": tokens,
        "truncated": truncated,
        "status": "ok" if tokens else "empty",
        "nll": number(mean),
        "standard_error": number(error),
        "nll_total": number(mean * tokens),
    }

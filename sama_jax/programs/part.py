"""Scores some texts of a run on the side, in a folder of their own inside the run's.

So the checks of a run that cost passes are made by what makes its own passes, and stay with it.
"""

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from sama_jax.arrays import Params
from sama_jax.attacks.code import codes
from sama_jax.attacks.registry import Attack
from sama_jax.engine.loop import Setup, fill_store
from sama_jax.engine.readings import Readings
from sama_jax.engine.scores import score_corpus
from sama_jax.engine.views import make_plain_views
from sama_jax.errors import UsageError
from sama_jax.programs.audit_inputs import Inputs, Prefixes, Tokenised, tokenise, view_sources
from sama_jax.programs.audit_records import text_rows
from sama_jax.programs.jobs import AuditJob
from sama_jax.programs.run_identity import run_identity
from sama_jax.storage.run_folder import Row, RunFolder, read_manifest, read_unchanged_rows
from sama_jax.texts.read import Text, content_id


class Part(NamedTuple):
    """Some texts of a run, and what scores them."""

    path: Path
    job: AuditJob
    inputs: Inputs
    tokenised: Tokenised
    prefixes: Prefixes
    attack: Attack
    run: dict[str, Any]
    """What must be equal for a folder that is there to be taken as it is."""


def make_part(
    path: Path, job: AuditJob, inputs: Inputs, prefixes: Prefixes, attack: Attack, **more: Any
) -> Part:
    """Prepares the texts of `inputs`; `more` is what their scores depend on besides."""
    job = replace(job, include_text=False)
    tokenised = tokenise(job, inputs, prefixes, quiet=True)
    run = run_identity(
        inputs.texts, tokenised.encoded, inputs.tokenizer, inputs.roles, job.settings
    )
    plan = tokenised.replayed and tokenised.replayed.identity
    if inputs.reference_tokenizer is not None:
        run["reference_tokenizer"] = inputs.reference_tokenizer.fingerprint
    run |= {"attack": attack.name, "code": codes().get(attack.name), "plan": plan, **more}
    return Part(path, job, inputs, tokenised, prefixes, attack, run)


def shuffled(texts: Iterable[Text], seed: int) -> list[Text]:
    """Puts texts into an order that depends on the seed and their content alone."""
    return sorted(
        texts, key=lambda t: hashlib.sha256(f"{seed} {content_id(t.text)}".encode()).digest()
    )


def known_part(part: Part) -> tuple[list[Row], dict[str, Any]] | None:
    """Returns the rows and the manifest of a part that is finished already; None if it is not.

    Raises `UsageError` if its scores were changed.
    """
    manifest = read_manifest(part.path)
    if manifest is None or not manifest.get("finished") or manifest.get("run") != part.run:
        return None
    return read_unchanged_rows(part.path, manifest), manifest


def score_part(
    part: Part,
    setup: Setup,
    say: Console,
    held: Mapping[str, Params] | None = None,
    about: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Scores a part into its folder; what a go that was stopped has left there is lost.

    Args:
      part: what is scored.
      setup: how the run makes its passes.
      say: where to say what happens.
      held: weights by their key in the store, if they are on the devices already.
      about: what the manifest says besides.
    """
    shutil.rmtree(part.path, ignore_errors=True)
    inputs, settings, keys = part.inputs, part.job.settings, part.inputs.store_keys
    tasks = inputs.tasks_of([part.attack], settings, part.tokenised.replayed)
    sources = view_sources(part.job, inputs, part.prefixes)
    tables = make_plain_views(tasks, part.tokenised.table, sources)
    setup = setup._replace(roles=inputs.roles, sources=sources, probes={}, include_votes=False)
    texts = text_rows(part.job, inputs, part.tokenised, part.prefixes)
    folder = RunFolder(part.path, part.run, dict(about or {}), None)
    try:
        readings = Readings(tasks, settings, tables, keys, folder.store)
        filled = fill_store(setup, readings, folder, inputs.ids, say, held=held)
        strings = [text.scored for text in inputs.texts]
        score_corpus(filled.readings, folder, inputs.ids, strings, inputs.labels)
        rows = folder.join(texts, [part.attack.name])
        folder.write_manifest(finished=True)
        folder.record_files()
    finally:
        folder.close()
    return rows


def require_one_process(job: AuditJob, flag: str) -> None:
    """Raises `UsageError` where several processes would have to make a part together."""
    if job.peers.count > 1:
        raise UsageError(
            f"{flag} needs a run of one process, this one has {job.peers.count}; give it to the "
            "same command with one process, before or afterwards: each keeps what is stored"
        )

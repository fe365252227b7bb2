"""Scores some texts of a run once more under other masks: how much of a score is luck of them?"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from rich.console import Console

from sama_jax import attacks as attack_suite
from sama_jax.engine.loop import Setup
from sama_jax.errors import UsageError
from sama_jax.programs.audit_inputs import Chosen, Inputs
from sama_jax.programs.jobs import AuditJob
from sama_jax.programs.part import known_part, make_part, require_one_process, score_part, shuffled
from sama_jax.storage.run_folder import Row
from sama_jax.texts.read import Text
from sama_jax.validity import bounds

FOLDER = "second_seed"
FLAG = "--second-seed"


def choose_texts(texts: Sequence[Text], taken: Collection[str], seed: int) -> list[Text]:
    """Chooses `bounds.SECOND_TEXTS` texts by the seed and their content, half of each class.

    Where a class has fewer, or there are none, others take their places.
    """
    free = shuffled((t for t in texts if t.id not in taken and not t.control), seed)
    half = bounds.SECOND_TEXTS // 2
    first = [t for label in (1, 0) for t in [t for t in free if t.label == label][:half]]
    chosen = {text.id for text in first}
    return (first + [t for t in free if t.id not in chosen])[: bounds.SECOND_TEXTS]


def score_again(
    job: AuditJob, inputs: Inputs, chosen: Chosen, primary: str, setup: Setup, say: Console
) -> dict[str, float]:
    """Scores some texts by the primary attack under the next seed, or reads what a go has left.

    Returns:
      id -> score; empty unless it was asked for, now or before.

    Raises:
      UsageError: several processes, or an attack whose scores depend on the other texts.
    """
    path = job.out / FOLDER
    if not job.second_seed and not path.is_dir():
        return {}
    attack = attack_suite.get(primary)
    if attack.corpus is not None:
        raise UsageError(
            f"{FLAG}: {primary} reads all texts at once, so its scores of some cannot be compared; "
            "leave the flag out, or declare another --primary"
        )
    settings = replace(job.settings, seed=(job.settings.seed + 1) % 2**32)
    texts = choose_texts(inputs.texts, chosen.prefixes.taken, job.settings.seed)
    again, small = replace(job, settings=settings, plan=None), inputs._replace(texts=texts)
    part = make_part(path, again, small, chosen.prefixes, attack)
    if known := known_part(part):
        return _scores(known[0], primary)
    if not job.second_seed:  # it was stopped, or is of another time
        return {}
    require_one_process(job, FLAG)
    say.print(f"second seed: {len(texts)} texts once more, under other masks")
    return _scores(score_part(part, setup, say), primary)


def _scores(rows: Sequence[Row], primary: str) -> dict[str, float]:
    found = {row["id"]: (row.get("scores") or {}).get(primary) for row in rows}
    return {name: score for name, score in found.items() if score is not None}

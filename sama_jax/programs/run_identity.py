"""Derives what an output folder of an audit or of `nll` belongs to: all that changes a number."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sama_jax import __version__, isolation
from sama_jax.arrays import Encoded
from sama_jax.config import AuditSettings, settings_hash
from sama_jax.engine.roles import ModelRole, loss_identity, pad_id
from sama_jax.engine.tasks import ROLES
from sama_jax.texts.read import Text
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights.identity import ARITHMETIC, arithmetic


def run_identity(
    texts: Sequence[Text],
    encoded: Sequence[Encoded],
    tokenizer: TextTokenizer,
    roles: Mapping[str, ModelRole],
    settings: AuditSettings,
) -> dict[str, Any]:
    """Returns, by name, what must be equal for a folder to be continued.

    Texts with ids, labels and groups, their tokens and form, the tokenizer, everything about the
    models and the arithmetic that changes a loss, and all settings. Attacks may be added, so they
    are not in.
    """
    pad = pad_id(roles["target"].folder, settings)
    found = {name: loss_identity(role.folder, settings, pad) for name, role in roles.items()}
    common = arithmetic()
    return {
        "version": __version__,  # another one may compute other scores of the same losses
        "data": digest(texts),
        "texts": len(texts),
        "tokens": token_digest(encoded),
        "form": form_of(texts),
        "tokenizer": tokenizer.fingerprint,
        **{f"{n}.{k}": v for n, one in found.items() for k, v in one.items() if k not in common},
        **common,
        **flat_settings(settings),
    }


def store_keys_of(run: Mapping[str, Any]) -> dict[str, str]:
    """Returns role -> the name of that model's losses in the store, from a run's identity alone."""
    common = {name: run.get(name) for name in ARITHMETIC}
    own: dict[str, dict[str, Any]] = {}
    for name, value in run.items():
        role, _, field = name.partition(".")
        if field and role.startswith(ROLES):
            own.setdefault(role, {})[field] = value
    return {role: settings_hash(fields | common) for role, fields in own.items()}


def flat_settings(settings: AuditSettings) -> dict[str, Any]:
    """Returns all settings by their dotted names."""
    values = asdict(settings)
    flat = {k: v for k, v in values.items() if not isinstance(v, dict)}
    groups = {g: inner for g, inner in values.items() if isinstance(inner, dict)}
    return flat | {f"{g}.{k}": v for g, inner in groups.items() for k, v in inner.items()}


def form_of(texts: Sequence[Text]) -> str:
    """Names how records became these texts: by which template, and what of it is scored."""
    found = {"plain texts" if t.rendered is None else t.rendered.form for t in texts}
    return " and ".join(sorted(found))


def source_digest() -> str:
    """Hashes the files of this package, which make a report of the same scores: 16 hex digits."""
    found, package = hashlib.sha256(), Path(isolation.HOME) / "sama_jax"
    for path in sorted(p for p in package.rglob("*") if p.suffix in _SOURCES):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


_SOURCES = {".py", ".j2", ".css", ".js"}


def digest(texts: Sequence[Text]) -> str:
    """Hashes ids, labels, groups and texts, of conversations their parts: 16 hex digits."""
    found = hashlib.sha256()
    for text in texts:
        known = (text.id, text.label, text.group, text.text, *(["control"] * text.control))
        if text.document is not None:
            known += ("of", text.document)
        if text.rendered is not None:
            known += (list(map(tuple, text.rendered.pieces)), text.rendered.adds)
        found.update(repr(known).encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:16]


def token_digest(encoded: Sequence[Encoded]) -> str:
    """Hashes the tokens of all texts, which are special and which a prompt's: 16 hex digits."""
    found = hashlib.sha256()
    for one in encoded:
        found.update(len(one.ids).to_bytes(8, "little"))
        found.update(one.ids.astype("<i4").tobytes() + one.special.tobytes())
        if one.prompt is not None:
            found.update(b"prompt" + one.prompt.tobytes())
    return found.hexdigest()[:16]

"""Asks what texts, tokens and labels say about an audit before a model runs."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sama_jax.programs.audit_inputs import MANY_TEXTS, Inputs, Tokenised
from sama_jax.programs.jobs import AuditJob
from sama_jax.terminal import ProgressBar
from sama_jax.texts.read import Text, content_id
from sama_jax.validity import bounds, data, overlap
from sama_jax.validity.blind import STEPS, Blind, blind
from sama_jax.validity.gate import Gate


class DataGates(NamedTuple):
    """What stands about the texts before a model runs."""

    gates: list[Gate]
    blind: Blind | None
    """The best baseline that sees no model, its scores for every text of the run; None without
    texts of both classes."""


def data_gates(job: AuditJob, inputs: Inputs, tokenised: Tokenised) -> DataGates:
    """Asks all gates about the texts that are scored: those taken as prefixes are left out."""
    scored = np.flatnonzero(tokenised.table.exists).tolist()
    models = {name: role.folder.model for name, role in inputs.roles.items()}
    gates = [data.empty_texts([int(tokenised.table.num_tokens[i]) for i in scored])]
    # A next-token model masks nothing: its `mask_id` is an ordinary word's.
    if models["target"].kind != "autoregressive":
        readings = {name: tokenised.ids_of(name) for name in models}
        masks = [
            data.mask_tokens([readings[name][i] for i in scored], model.mask_id)
            for name, model in models.items()
        ]
        gates.insert(0, max(masks, key=lambda one: one["statistic"] or 0))
    marks = template_marks([inputs.texts[i] for i in scored])
    if marks is not None:
        unknown = [name for name in marks if inputs.tokenizer.token_id(name) is None]
        gates.append(data.template_marks(unknown))
    labelled = [i for i in scored if inputs.texts[i].label is not None]
    # By their content, so that no draw depends on the order of the file.
    labelled.sort(key=lambda i: (content_id(inputs.texts[i].text), inputs.texts[i].id))
    texts = [inputs.texts[i] for i in labelled]
    strings = [text.words for text in texts]
    labels = np.array([text.label for text in texts], np.int64)
    if len(set(labels.tolist())) < 2:
        everything = [inputs.texts[i].words for i in scored]
        gates.append(data.duplicates(everything, np.full(len(scored), -1)))
        return DataGates(gates, None)
    encoded = [tokenised.encoded[i] for i in labelled]
    ids = [one.ids for one in encoded]
    related = overlap.relate(texts, job.prefixes.texts if job.prefixes else ())
    gates += [
        data.too_few(labels[_first_windows(texts)]),
        data.duplicates(strings, labels),
        data.contradictions(strings, labels),
        data.equal_after_cutting(strings, ids, labels),
        data.near_duplicates(related.near_other),
        data.repeated_sources(labels, related.units, [text.group for text in texts]),
        data.overlap(_overlap_shares(texts)),
        *([data.prefixes(related.near_prefix)] if job.prefixes else []),
        data.truncation(np.array(tokenised.truncated)[labelled], labels),
        data.random_split(job.split is not None),
    ]
    quiet = job.quiet or job.peers.rank > 0 or len(texts) < MANY_TEXTS // 10
    with ProgressBar("baselines without a model", STEPS, "steps", quiet=quiet) as bar:
        lengths = [one.own_tokens for one in encoded]
        found = blind(strings, lengths, labels, related.units, seed=0, advance=bar.advance)
    scores = np.full(len(inputs.texts), np.nan)
    scores[labelled] = found.scores
    return DataGates([*gates, found.gate], found._replace(scores=scores))


def template_marks(texts: Sequence[Text]) -> list[str] | None:
    """Lists the marks around turns, such as `<|im_end|>`; None where there are no conversations."""
    rendered = [text.rendered for text in texts if text.has_prompt and text.rendered is not None]
    if not rendered:
        return None
    frames = {piece.text for one in rendered for piece in one.pieces if not piece.words}
    return sorted({mark for frame in frames for mark in re.findall(r"<\|[\w./-]{1,40}\|>", frame)})


def _first_windows(texts: Sequence[Text]) -> list[int]:
    """Returns the rows of the texts that are no windows, and of one window a document."""
    first: dict[str, int] = {}
    for row, text in enumerate(texts):
        first.setdefault(text.id if text.document is None else text.document, row)
    return list(first.values())


def _overlap_shares(texts: Sequence[Text]) -> np.ndarray:
    """Returns the share of each non-member's runs of 13 words that stand in a member."""
    words = overlap.words_of(map(overlap.compared, texts))
    sets = overlap.thinned([overlap.shingles(one, bounds.OVERLAP_WORDS) for one in words])
    members, others = (
        [one for one, text in zip(sets, texts) if text.label == label] for label in (1, 0)
    )
    return overlap.shared(others, members)

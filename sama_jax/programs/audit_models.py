"""Opens the models of an audit, and checks that their losses can be compared."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sama_jax.engine.roles import ModelRole, model_key, pad_id
from sama_jax.errors import ModelError, UsageError, ValidityError
from sama_jax.programs.jobs import AuditJob
from sama_jax.texts.read import Text
from sama_jax.texts.same_ids import require_same_ids
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights import model_folder
from sama_jax.weights.model_folder import ModelFolder


class Models(NamedTuple):
    """Target and references of an audit: checked, no weights loaded."""

    roles: dict[str, ModelRole]
    tokenizer: TextTokenizer
    reference_tokenizer: TextTokenizer | None


def open_models(job: AuditJob, texts: list[Text]) -> Models:
    """Opens the folders of all models and their tokenizers.

    Raises:
      ModelError: a folder is damaged, or its losses would mean something else than the target's.
      UsageError: mask tokens differ, or flags contradict each other.
      ValidityError: two of the models are the same.
    """
    settings = job.settings
    options: dict[str, Any] = {
        "mask_id": job.mask_id,
        "dtype": settings.dtype,
        "longest": settings.pad_to or settings.max_length,
        "attention": settings.attention,
        "attention_mask": job.attention_mask,
    }
    target = model_folder.open_folder(job.target, adapter=job.adapter, **options)
    if settings.dtype == "auto":  # each folder's own would look like a difference of the models
        options["dtype"] = str(target.model.dtype)
    if job.reference_attention_mask and not job.references:
        raise UsageError("--reference-attention-mask is of a reference, and there is none")
    options["attention_mask"] = job.reference_attention_mask or job.attention_mask
    if own := job.reference_tokenizer == "own":
        require_spans(job, texts)
        options["mask_id"] = None  # it is the target's
    references = [model_folder.open_folder(path, **options) for path in job.references]
    for reference in references:
        require_one_kind(target, reference)
    tokenizer = TextTokenizer.from_folder(target.path, target.model.vocab_size)
    theirs = None
    for reference in references:
        theirs = TextTokenizer.from_folder(reference.path, reference.model.vocab_size)
        if not own:
            require_same_tokens(target, tokenizer, reference, theirs, texts)
    pad = pad_id(target, settings)
    roles = {"target": ModelRole("target", target, model_key(target, settings, pad))}
    # In an order of their own, so that the order in which they are given changes nothing.
    keyed = sorted(((model_key(f, settings, pad), f) for f in references), key=lambda one: one[0])
    for number, (key, folder) in enumerate(keyed, 1):
        name = "reference" if number == 1 else f"reference{number}"
        roles[name] = ModelRole(name, folder, key)
    require_different(roles)
    return Models(roles, tokenizer, theirs if own else None)


def require_spans(job: AuditJob, texts: Sequence[Text]) -> None:
    """Raises `UsageError` where a run cannot compare the losses of spans."""
    flag, padding = "--reference-tokenizer own", job.settings.padding
    obstacles = {
        f"needs one --reference, found {len(job.references)}": len(job.references) != 1,
        "reads plain texts: leave --template out": any(t.rendered is not None for t in texts),
        f"needs --padding hidden, found {padding}": padding != "hidden",
        "has no probes of tokens: leave --plan and --save-plan out": job.plan or job.save_plan,
        "has no losses of tokens: leave --save-losses out": job.save_losses,
    }
    if found := next((what for what, there in obstacles.items() if there), None):
        raise UsageError(f"{flag} {found}")


FILL_MASKS = {"diffusion", "masked"}
"""Kinds of models whose losses are of masked tokens, given all others."""


def kind_notes(roles: Mapping[str, ModelRole]) -> list[str]:
    """Says where a reference fills masks, but was trained on others than the target."""
    target, *references = roles.values()
    kind = target.folder.model.kind
    return [
        f"{one.name}: it is a {one.folder.model.kind} model, the target a {kind} one; masked "
        "models are trained with 15 % of a text masked, and predict worse beyond that"
        for one in references
        if one.folder.model.kind != kind
    ]


def require_one_kind(target: ModelFolder, reference: ModelFolder) -> None:
    """Raises `ModelError` if the models predict in different ways: losses then mean two things."""
    kinds = {target.model.kind, reference.model.kind}
    if len(kinds) > 1 and not kinds <= FILL_MASKS:
        raise ModelError(
            f"{target.path} and {reference.path}: the target is a {target.model.kind} model, the "
            f"reference an {reference.model.kind} one, so their losses cannot be compared; give a "
            "reference of the target's kind, such as the converted model before its fine-tuning"
        )


def require_different(roles: Mapping[str, ModelRole]) -> None:
    """Raises an error if two models of an audit are one: nothing could differ.

    `ValidityError` if one of them is the target, `UsageError` if a reference is given twice.
    """
    target, *references = roles.values()
    if target.folder.adapter_is_nothing:
        raise ValidityError(
            f"{target.folder.path}: its adapter is zero, or changes nothing else, so the target is "
            "the model that it was put on: it was never trained, or not saved; give the trained "
            "adapter"
        )
    seen: dict[str, ModelRole] = {}
    for reference in references:
        if reference.store_key == target.store_key:
            raise ValidityError(
                f"{target.folder.path} and {reference.folder.path}: target and reference are the "
                "same model, byte for byte, so no attack could find anything; give the fine-tuned "
                "model as --target (or its --adapter), and what it was made from as --reference"
            )
        if other := seen.get(reference.store_key):
            raise UsageError(
                f"{other.folder.path} and {reference.folder.path}: the same reference is given "
                "twice, byte for byte; give each --reference once"
            )
        seen[reference.store_key] = reference


def require_same_tokens(
    target: ModelFolder,
    ours: TextTokenizer,
    reference: ModelFolder,
    theirs: TextTokenizer,
    texts: Sequence[Text],
) -> None:
    """Checks that two models read texts alike.

    Raises:
      ModelError: the tokenizers give other ids, or ids without an embedding.
      UsageError: the models have different mask tokens.
    """
    require_same_ids(ours, theirs, texts)
    if target.model.mask_id != reference.model.mask_id:
        raise UsageError(
            f"target and reference have different mask ids ({target.model.mask_id} and "
            f"{reference.model.mask_id}); give the right one with --mask-id"
        )

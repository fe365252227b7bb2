"""Fine-tunes a model folder, or pre-trains a small model from scratch.

Checks what was asked for, opens the output folder, and hands both to `training.loop`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sama_jax import rng
from sama_jax.config import TrainSettings
from sama_jax.errors import ModelError, UsageError
from sama_jax.models.attention_mask import FIELD
from sama_jax.models.registry import FamilyConfig, build_model, read_config
from sama_jax.texts.read import PLAIN, Fields
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.training import adaptation, loop, lora, new_tokenizer, runs
from sama_jax.training.interruption import interruptible
from sama_jax.weights import hub, loading, model_folder
from sama_jax.weights.identity import arithmetic, model_identity


def finetune(
    base: Path,
    data: Path,
    out: Path,
    settings: TrainSettings,
    heldout: Path | None = None,
    quiet: bool = False,
    *,
    as_diffusion: bool = False,
    attention_mask: str | None = None,
    fields: Fields = PLAIN,
) -> dict[str, Any]:
    """Trains the model folder `base` on the texts of `data`, into folder `out`.

    All parameters are trained and `out` is a model folder; with `settings.lora` an adapter of
    `base` is, and `out` is an adapter folder of PEFT.

    A causal `base` becomes a diffusion model with `as_diffusion` (`training.adaptation`). A
    diffusion model attends as `attention_mask` names it, and the new `config.json` says so. Of
    conversations (`fields.form`) the responses are learned, and prompts only seen.

    The objective is that of the model's kind (`step.loss_of_kind`). The same call continues an
    interrupted run and returns at once from a finished one. Weights are kept and written in
    float32, whatever `base` stores.

    Returns:
      `steps`, `tokens`, `texts`, `loss` (mean of the last ten steps), `nll_before`, `nll_after`
      (nats a token, by `step.HELD_OUT`), `nll_on`, `seconds`, `tokens_per_second`; of a private
      training (`settings.dp`) `privacy`, by `training.privacy.Plan.told`.

    Raises:
      UsageError: `out` belongs to another run.
      DataError, ModelError: inputs.
      Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
    """
    with interruptible(out) as stop:
        given_base, base = str(base), hub.resolve(base)
        if settings.lora.r:
            _require_own_config(as_diffusion, attention_mask)
        # Weights that stay may be as coarse as activations, which they are cast to anyway.
        dtype = settings.dtype if settings.lora.r else "float32"
        options: dict[str, Any] = {"dtype": dtype, "longest": settings.max_length}
        if not as_diffusion:  # else it is the mask of what the base becomes
            options["attention_mask"] = attention_mask
        folder = model_folder.open_folder(base, **options)
        if not as_diffusion:
            _require_trainable(folder.family, settings, str(base))
        start = _start(folder, base, {} if attention_mask is None else {FIELD: attention_mask})
        if as_diffusion:
            start = _as_diffusion(start, folder, settings)
        if settings.lora.r:
            start = start._replace(adapter=_adapter(folder, settings, given_base))
        identity = _identity(start, folder, settings)
        if as_diffusion:
            identity |= {"as": "diffusion", "mask_token_id": start.config["mask_token_id"]}
        given = out, identity, settings, data, heldout, quiet, fields
        with runs.open_run(*given) as run:
            if run.finished:
                return run.manifest["result"]
            if start.adapter is None:
                runs.copy_companions(base, out)
            if as_diffusion:
                ids = start.config["mask_token_id"], start.config["vocab_size"]
                start = start._replace(tokenizer=adaptation.add_mask_token(out, *ids))
            return loop.train(start, run, settings, stop)


def _require_own_config(as_diffusion: bool, attention_mask: str | None) -> None:
    """Raises `UsageError` for what the `config.json` of a new model would say: adapters have none.

    Whoever reads one has its base as it was.
    """
    if as_diffusion or attention_mask is not None:
        flag, way = "--attention-mask", f"write it as {FIELD} into the base's config.json"
        if as_diffusion:
            flag, way = "--as diffusion", "make the diffusion model first, without --lora"
        raise UsageError(
            f"{flag} with --lora: an adapter changes no config.json, so that who reads it would "
            f"have another base; {way}"
        )


def _adapter(folder: model_folder.ModelFolder, settings: TrainSettings, base: str) -> lora.Adapter:
    """Plans an adapter of a folder; its names are those of PyTorch's modules."""
    if folder.family.block_group_size != 1:
        raise ModelError(
            f"{base}: keeps its blocks in groups, whose modules have other names; convert it with "
            "checkpoints-convert to-hf first"
        )
    table, layers = folder.family.weights, folder.model.num_layers
    return lora.plan(settings.lora, folder.abstract_params, table, layers, base)


def _start(folder: model_folder.ModelFolder, base: Path, stated: dict[str, Any]) -> loop.Start:
    """Returns what a training of this folder starts from; `stated` is added to its config."""
    return loop.Start(
        folder.model,
        folder.family.weights,
        folder.config | stated,
        TextTokenizer.from_folder(base, folder.model.vocab_size),
        lambda: loading.load(folder, loop.device()),
        str(base),
    )


def _identity(
    start: loop.Start, folder: model_folder.ModelFolder, settings: TrainSettings
) -> dict[str, Any]:
    """Returns all that the new folder depends on besides settings and texts."""
    return {
        "command": "finetune",
        **model_identity(folder),
        "tokenizer": start.tokenizer.fingerprint,
        # The ids above are those of the texts; here is what else stands in the new folder.
        "tokenizer_files": runs.tokenizer_files(folder.path),
        "config": _digest(start.config),
        "pad_id": folder.pad_id if settings.train_on_padding else None,
    }


def _as_diffusion(
    start: loop.Start, folder: model_folder.ModelFolder, settings: TrainSettings
) -> loop.Start:
    """Makes a causal start that of a diffusion model; its tokenizer still lacks the mask token."""
    where, mask_id = str(folder.path), adaptation.mask_token(folder.path, start.tokenizer)
    config = adaptation.diffusion_config(start.config, mask_id, where)
    family = read_config(config, where)
    _require_trainable(family, settings, where)
    return start._replace(
        model=build_model(family, mask_id, start.model.dtype),
        weights=family.weights,
        config=config,
        params=lambda: adaptation.with_rows(start.params(), config["vocab_size"]),
    )


def pretrain(
    config: Path,
    data: Path,
    out: Path,
    settings: TrainSettings,
    tokenizer: Path | None = None,
    heldout: Path | None = None,
    quiet: bool = False,
    *,
    fields: Fields = PLAIN,
) -> dict[str, Any]:
    """Trains a model from random weights, into folder `out`.

    Args:
      config: the `config.json` of a supported family; with no tokenizer given, its two last ids
        below `vocab_size` are the end of text and the mask token, and may be left out.
      tokenizer: `tokenizer.json`, or None to train a byte-level BPE on the texts.
      fields: how the records of the files are read.

    Returns and raises what `finetune` does.
    """
    with interruptible(out) as stop:
        if settings.lora.r or settings.dp.is_private:
            raise UsageError(
                "lora and dp are for finetune: a new model has no base, and its tokenizer would "
                "not be private; leave them out"
            )
        full, tokenizer_name = _new_config(config, tokenizer)
        family = read_config(full, str(config))
        _require_trainable(family, settings, str(config))
        identity = {
            "command": "pretrain",
            **arithmetic(),
            "base": _digest(full),
            "tokenizer": tokenizer_name,
        }
        given = out, identity, settings, data, heldout, quiet, fields
        with runs.open_run(*given) as run:
            if run.finished:
                return run.manifest["result"]
            model = build_model(family, family.mask_id or 0, jnp.dtype("float32"))
            sizes = full["vocab_size"], model.vocab_size
            placed = new_tokenizer.place_tokenizer(tokenizer, run, *sizes)
            key = rng.run_key(settings.seed, rng.Purpose.INITIAL_WEIGHTS)
            # Outside jit, initialisers run one by one: 20 s instead of 2.
            init = jax.jit(model.init)
            where = str(config)
            start = loop.Start(model, family.weights, full, placed, lambda: init(key), where)
            return loop.train(start, run, settings, stop)


def _new_config(path: Path, tokenizer: Path | None) -> tuple[dict[str, Any], str]:
    """Reads the config of a new model: with its special ids, and the tokenizer's fingerprint."""
    config = new_tokenizer.read_new_config(path)
    kind = read_config(config, str(path)).kind
    if tokenizer is None:
        name, ids = "trained here", new_tokenizer.trained_ids(kind, config["vocab_size"])
    else:
        given = TextTokenizer.from_file(tokenizer, None)
        name, ids = given.fingerprint, new_tokenizer.given_ids(kind, given)
    full = new_tokenizer.with_token_ids(config, ids, str(path))
    if kind != "autoregressive" and full.get("mask_token_id") is None:
        raise ModelError(
            f"{path}: has no mask_token_id, and the tokenizer has none of the tokens "
            f"{', '.join(new_tokenizer.MASK_TOKENS)}; add one of them"
        )
    return full, name


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _require_trainable(family: FamilyConfig, settings: TrainSettings, where: str) -> None:
    """Raises where settings ask for what this kind of model cannot do."""
    if settings.train_on_padding and family.kind != "diffusion":
        raise UsageError(
            f"{where}: train_on_padding is defined for diffusion models, this one is "
            f"{family.kind}; leave it out"
        )
    limit = family.arch.max_length
    if limit is not None and settings.max_length > limit:
        raise ModelError(
            f"{where}: has position embeddings for {limit} tokens, but max_length is "
            f"{settings.max_length}; lower it"
        )

"""Names the two models of an audit, and loads them."""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from rich.console import Console

from sama_jax.arrays import Params
from sama_jax.config import AuditSettings, settings_hash
from sama_jax.core.frequencies import frequency_losses
from sama_jax.devices import memory
from sama_jax.devices.strategy import Layout
from sama_jax.engine import other_readings, output_position
from sama_jax.errors import ModelError
from sama_jax.models.attention_mask import mask_of
from sama_jax.terminal import ByteBar
from sama_jax.texts.tokenizer import TextTokenizer
from sama_jax.weights import loading, model_folder
from sama_jax.weights.finite import not_finite
from sama_jax.weights.identity import model_identity
from sama_jax.weights.special_tokens import possible_masks


class ModelRole(NamedTuple):
    """One of the two models: `target` or `reference`."""

    name: str
    folder: model_folder.ModelFolder
    store_key: str
    """Names its losses in the store."""


def attention_of(folder: model_folder.ModelFolder) -> str:
    """Names what computes attention; only Llama-like networks have a choice."""
    return folder.model.arch.attention


def pad_id(target: model_folder.ModelFolder, settings: AuditSettings) -> int | None:
    """Returns the token of visible padding, for both models, or None where padding is hidden."""
    if settings.padding != "visible":
        return None
    return target.pad_id or 0


def loss_identity(
    folder: model_folder.ModelFolder, settings: AuditSettings, pad: int | None
) -> dict[str, str]:
    """Returns, by name, all that a model's losses depend on besides its texts and plans.

    Args:
      folder: the model.
      settings: of the audit.
      pad: what `pad_id` gives for the target.
    """
    length = settings.pad_to or settings.max_length
    visible = {"padding": "hidden" if pad is None else f"token {pad} up to {length}"}
    return model_identity(folder) | visible


def model_key(
    folder: model_folder.ModelFolder, settings: AuditSettings, pad: int | None = None
) -> str:
    """Names a model's losses in the store."""
    return settings_hash(loss_identity(folder, settings, pad))


def resident_bytes(roles: Sequence[ModelRole], layout: Layout, *, in_turn: bool = False) -> int:
    """Returns the bytes of parameters on one device: of the larger model alone, if in turn.

    Adapters are left out, and weights that both models have in common count once.
    """
    bases = {
        (f.base_identity, str(f.model.dtype)): memory.parameter_bytes(
            f.abstract_params, f.model.dtype, layout.shardings(f.abstract_params, f.model.arch)
        )
        for f in (role.folder for role in roles)
    }
    return max(bases.values()) if in_turn else sum(bases.values())


class Probe(NamedTuple):
    """Tokens that a model is checked on when it is loaded."""

    position: Int[np.ndarray, " n"]
    """Of `output_position.TEXT`."""
    texts: Sequence[Int[np.ndarray, "..."]] = ()
    """Of texts of the audit, in any order; empty: other readings are not tried."""
    frequencies: float = math.nan
    """Loss of those texts by how frequent their tokens are."""
    other_masks: Collection[int] = ()
    """What could stand for a masked token besides the model's own mask."""

    @property
    def digest(self) -> str:
        """Returns 16 hex digits over the texts that a model is judged by."""
        read = self.texts[: other_readings.MOST_TEXTS]
        return settings_hash([np.asarray(ids).tolist() for ids in read])


def make_probe(
    folder: model_folder.ModelFolder,
    tokenizer: TextTokenizer,
    texts: Sequence[Int[np.ndarray, "..."]],
) -> Probe:
    """Gathers the tokens that a model is checked on when it is loaded.

    Args:
      folder: the model; its files name the tokens that could be masks.
      tokenizer: the model's.
      texts: its token ids of a run's texts; short ones are passed over, and long ones cut.
    """
    position = tokenizer.encode([output_position.TEXT], output_position.MAX_TOKENS)[0].ids
    shortest, longest = other_readings.SHORTEST, other_readings.LONGEST
    texts = [ids[:longest] for ids in texts if len(ids) >= shortest]
    frequencies = frequency_losses(texts)[: other_readings.MOST_TEXTS]
    found = float(np.nanmean(frequencies)) if np.isfinite(frequencies).any() else math.nan
    return Probe(position, texts, found, possible_masks(folder.path, folder.family))


class Loaded(NamedTuple):
    """Weights on devices, and what was noticed about them."""

    params: Mapping[str, Params]
    """By the models' keys in the store."""
    notes: list[str]
    judged: set[str]
    """Keys in the store of the models of which the probe's texts could tell how they are read."""


def load(
    roles: Sequence[ModelRole],
    layout: Layout,
    say: Console,
    *,
    probes: Mapping[str, Probe] = MappingProxyType({}),
    quiet: bool = False,
) -> Loaded:
    """Loads models, what they have in common once, and checks whether they are read rightly.

    Args:
      roles: the models; those with one key in the store are one model.
      layout: where parameters go.
      say: where to say what was loaded.
      probes: what each role is checked on; without it only its weights are.
      quiet: show no progress.

    Raises:
      ModelError: weights are not finite, or a model is not read as it was trained.
    """
    distinct = {role.store_key: role for role in roles}
    folders = [role.folder for role in distinct.values()]
    start, notes, judged = time.monotonic(), [], set()
    with ByteBar("weights", model_folder.num_bytes(folders), quiet=quiet, least=10**9) as told:
        loaded = loading.load_together(folders, layout.shardings, told)
    seconds = time.monotonic() - start
    for role, params in zip(distinct.values(), loaded):
        folder = role.folder
        say.print(
            f"{role.name}: {folder.path}, {folder.num_params:,} parameters in {folder.model.dtype}"
        )
        probe = probes.get(role.name)
        warnings, could_tell = _check(role, params, probe)
        judged |= {role.store_key} if could_tell else set()
        if probe is not None and folder.model.kind == "diffusion" and not could_tell:
            mask = mask_of(folder.model.arch)
            told = "these texts cannot tell whether it was trained so"
            say.print(f"{role.name}: attention mask {mask}; {told}")
        for warning in warnings:
            notes.append(f"{role.name}: {warning}")
            say.print(f"note: {notes[-1]}")
    say.print(f"weights loaded in {seconds:.1f} s")
    return Loaded(dict(zip(distinct, loaded)), notes, judged)


def _check(role: ModelRole, params: Params, probe: Probe | None) -> tuple[list[str], bool]:
    """Returns what is odd about a loaded model, and whether the probe's texts could tell.

    Raises `ModelError` if it cannot be used.
    """
    if names := not_finite(params):
        raise ModelError(
            f"{role.folder.path}: the weights of the {role.name} hold NaN or infinity, at {names}; "
            "save or convert the model again, or choose a --dtype that does not overflow"
        )
    if probe is None:
        return [], False
    model = role.folder.model
    rest = probe.texts, probe.frequencies, probe.other_masks
    try:
        position = output_position.check(model, params, probe.position)
        asked = role.folder.asked_mask is not None
        reading = other_readings.check(model, params, *rest, asked_mask=asked)
    except ModelError as error:
        raise ModelError(f"{role.folder.path}: the {role.name}: {error}") from None
    found = [position, reading.warning]
    return [warning for warning in found if warning is not None], reading.told

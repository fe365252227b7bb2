"""Which family a folder's `config.json` belongs to, and the network to build. No files, no devices.

A family is one reader `config dict -> FamilyConfig`. Fields that a config leaves out take the
default of the family's own config class, never the value of its best-known checkpoint.
"""

from typing import Any

from sama_jax.arrays import Model
from sama_jax.errors import ModelError, nearest
from sama_jax.models.dit import MDLM, SEDD, DitArchitecture, DitModel, is_sedd
from sama_jax.models.encoders import (
    BERT,
    MODERNBERT,
    BertArchitecture,
    EncoderModel,
    ModernBertArchitecture,
)
from sama_jax.models.families.decoders import DECODERS, is_illada
from sama_jax.models.families.family import Family, FamilyConfig
from sama_jax.models.families.llada import LLADA
from sama_jax.models.families.llada_moe import LLADA2, LLADA_MOE, is_lladamoe
from sama_jax.models.families.smdm import SMDM
from sama_jax.models.transformer import Architecture, TransformerModel

FAMILIES: dict[str, Family] = {
    "llada": LLADA,
    **DECODERS,
    "smdm": SMDM,
    "mdlm": MDLM,
    "sedd": SEDD,
    "bert": BERT,
    "modernbert": MODERNBERT,
    "lladamoe": LLADA_MOE,
    "llada2_moe": LLADA2,
    "llada2_moe_veomni": LLADA2,
    "llada21_moe": LLADA2,
}
"""`model_type` of a config -> the family."""

_NETWORKS: dict[type, Any] = {
    Architecture: TransformerModel,
    DitArchitecture: DitModel,
    BertArchitecture: EncoderModel,
    ModernBertArchitecture: EncoderModel,
}
"""Architecture class -> the `Model` over it."""


def build_model(family: FamilyConfig, mask_id: int, dtype: Any) -> Model:
    """The pure functions of a family's network; `dtype` is that of the activations."""
    network = _NETWORKS[type(family.arch)]
    return network(
        arch=family.arch, mask_id=mask_id, shift=family.shift, kind=family.kind, dtype=dtype
    )


def read_config(config: dict[str, Any], where: str) -> FamilyConfig:
    """The family of a parsed `config.json`, by `model_type` and `architectures` together.

    `where` is the file's path, for messages. Raises `ModelError` for what is not known: the two
    fields are both needed, since LLaDA-MoE's Hub config also says `llada`.
    """
    kind = "sedd" if is_sedd(config) else config.get("model_type")
    kind = "lladamoe" if is_lladamoe(config) else kind
    kind = "illada" if is_illada(config) else kind
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelError(
            f"{where}: model_type is {kind!r}, which is not a supported family"
            + nearest(str(kind), FAMILIES)
        )
    architectures = config.get("architectures") or []
    listed = architectures if isinstance(architectures, list) else [architectures]
    if architectures and not any(name in listed for name in FAMILIES[kind].architectures):
        raise ModelError(
            f"{where}: model_type is '{kind}' but architectures is {architectures}; "
            f"expected one of {list(FAMILIES[kind].architectures)}"
        )
    try:
        return FAMILIES[kind].read(config, where)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{where}: a field has an unusable value ({error})") from None

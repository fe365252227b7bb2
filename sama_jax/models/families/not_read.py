"""Refuses, with the reason, models that are known and that masks cannot probe.

Source: `models/diffusion_gemma` of transformers 5.23 (Apache-2.0).
"""

from typing import NoReturn

from sama_jax.models.families.family import Family
from sama_jax.models.families.fields import Fields


def refuse_diffusion_gemma(config: Fields) -> NoReturn:
    """Raises `ModelError`: DiffusionGemma learns to mend random tokens, and has no mask token."""
    config.refuse(
        "model_type is 'diffusion_gemma', which is not read: DiffusionGemma puts random tokens in "
        "the place of a text's own and has no mask token, so that what is masked and scored here "
        "would say nothing about it (docs/models.md, DiffusionGemma)"
    )


_DIFFUSION_GEMMA = ("DiffusionGemmaForBlockDiffusion", "DiffusionGemmaModel")
FAMILIES = (Family("diffusion_gemma", refuse_diffusion_gemma, _DIFFUSION_GEMMA),)

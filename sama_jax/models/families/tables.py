"""Where each parameter comes from: one table a family, keyed by our path."""

from sama_jax.models.families.decoders_weights import DECODER
from sama_jax.models.families.dit_weights import MDLM, SEDD
from sama_jax.models.families.encoders_weights import BERT, MODERNBERT
from sama_jax.models.families.llada_moe_weights import LLADA2, LLADA2_MERGED, LLADA_MOE
from sama_jax.models.families.llada_weights import LLADA
from sama_jax.models.families.smdm_weights import smdm_table
from sama_jax.models.families.weight_table import Fused, Rule, Table, clean_name

__all__ = ["TABLES", "Fused", "Rule", "Table", "canonical_name"]


class _Tables(dict[str, Table]):
    """A table by its name, or by a name with sizes where tensors cannot be split without them."""

    def __missing__(self, family: str) -> Table:
        name, _, sizes = family.partition("/")
        if name != "smdm" or not sizes:
            raise KeyError(family)
        table = self[family] = smdm_table(*map(int, sizes.split("x")))
        return table


TABLES = _Tables(
    {
        "llada": LLADA,
        "decoder": DECODER,
        "mdlm": MDLM,
        "sedd": SEDD,
        "bert": BERT,
        "modernbert": MODERNBERT,
        "lladamoe": LLADA_MOE,
        "llada2": LLADA2,
        "llada2_merged": LLADA2_MERGED,
    }
)
"""Family name (as `sama_jax.models.registry` gives it) -> its table.

`smdm/14x1x128`: 14 key/value heads, each behind 1 query head, of size 128.
"""


def canonical_name(family: str, name: str, block_group_size: int = 1) -> str:
    """A stored tensor name without wrappers and prefixes: what a table's rules name."""
    return TABLES[family].canonical(clean_name(name), block_group_size)

"""Rules that say how each parameter is split over the `model` axis of a mesh."""

import re
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sama_jax.arrays import Architecture, Params
from sama_jax.errors import UsageError


class Rule(NamedTuple):
    """How the parameters whose whole path matches `pattern` are split."""

    pattern: str
    spec: tuple[str | None, ...] = ()
    """Says what splits each of the last axes; the ones before count layers and experts and are
    never split."""
    heads: str | None = None
    """Field of the architecture that `model` must divide, so that no head is cut in two."""
    or_replicated: bool = False
    """What does not divide is held whole by every device; else it is an error."""


_COLUMN, _ROW, _VECTOR = (None, "model"), ("model", None), ("model",)

RULES = (
    # A product's output is split (column), and the next one sums over what is split (row).
    Rule(r".*/lora_[ab]"),  # rank 8 to 64: small
    Rule(r".*/attn/q_proj/kernel", _COLUMN, heads="num_heads"),
    Rule(r".*/attn/q_proj/bias", _VECTOR, heads="num_heads"),
    Rule(r".*/attn/[kv]_proj/kernel", _COLUMN, heads="num_kv_heads", or_replicated=True),
    Rule(r".*/attn/[kv]_proj/bias", _VECTOR, heads="num_kv_heads", or_replicated=True),
    Rule(r".*/attn/o_proj/kernel", _ROW, heads="num_heads"),
    Rule(r".*/(mlp|shared|moe/experts)/(gate|up)_proj/kernel", _COLUMN),
    Rule(r".*/(mlp|shared)/(gate|up)_proj/bias", _VECTOR),
    Rule(r".*/(mlp|shared|moe/experts)/down_proj/kernel", _ROW),
    # Vocabulary rows. BERT's 30,522 and GPT-2's 50,258 have few divisors; such models are small.
    Rule(r"embed/embedding", _ROW, or_replicated=True),
    Rule(r"lm_head/kernel", _COLUMN, or_replicated=True),
    Rule(r"(lm_head|head)/bias", _VECTOR, or_replicated=True),
    # Held whole: what is added after a sum over devices, norms, routers, conditions, small tables.
    Rule(r".*/(o|down)_proj/bias"),
    Rule(r"(.*/)?\w*norm/(scale|bias)"),
    Rule(r".*/moe/router/(kernel|expert_bias)"),
    Rule(r"(positions|types)/embedding"),
    Rule(r"head/dense/(kernel|bias)"),
    Rule(r"time/dense_[01]/(kernel|bias)"),
    Rule(r"(.*/|final_)modulation/(kernel|bias)"),
)
"""The first that matches counts."""


def parameter_shardings(
    mesh: Mesh | AbstractMesh,
    abstract_params: Params,
    arch: Architecture,
    *,
    fully_sharded: bool = False,
) -> Params:
    """Returns a tree of `NamedSharding`, by `RULES`, for a tree of arrays or `ShapeDtypeStruct`.

    Args:
      mesh: with the axes `data` and `model`.
      arch: the network's architecture, for its numbers of heads.
      fully_sharded: split matrices over `data` as well; a device fetches each layer when it needs
        it.

    Raises:
      UsageError: one line a parameter that no rule covers or whose rule does not divide.
    """
    problems: list[str] = []

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = "/".join(str(k.key) for k in path)
        try:
            spec = _spec(name, tuple(leaf.shape), mesh.shape["model"], arch)
        except ValueError as error:
            problems.append(f"  {name} {tuple(leaf.shape)}: {error}")
            spec = ()
        if fully_sharded:
            spec = _over_data(spec, leaf.shape, mesh.shape["data"])
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree_util.tree_map_with_path(place, abstract_params)
    if problems:
        raise UsageError(
            f"{len(problems)} parameters cannot be split over model={mesh.shape['model']}; choose "
            "another --mesh\n" + "\n".join(problems)
        )
    return shardings


def _spec(
    name: str, shape: tuple[int, ...], size: int, arch: Architecture
) -> tuple[str | None, ...]:
    """Returns the partition of one parameter; ValueError if there is none."""
    rule = next((r for r in RULES if re.fullmatch(r.pattern, name)), None)
    if rule is None:
        raise ValueError("no sharding rule matches this path")
    if "model" not in rule.spec:
        return ()
    spec = (None,) * (len(shape) - len(rule.spec)) + rule.spec
    axis = spec.index("model")
    count, what = shape[axis], f"axis {axis}"
    if rule.heads is not None:
        count = getattr(arch, rule.heads)
        what = f"{rule.heads} {count}"
    if count % size == 0 and shape[axis] % size == 0:
        return spec
    if rule.or_replicated:
        return ()
    raise ValueError(f"{what} is not divisible by model={size}")


def _over_data(
    spec: tuple[str | None, ...], shape: tuple[int, ...], size: int
) -> tuple[str | None, ...]:
    """Puts `data` on the longest of a matrix's two axes that is whole and that it divides.

    Not on the axis of layers: a scan over it would fetch all layers at once.
    """
    whole = spec or (None,) * len(shape)
    last = range(max(len(shape) - 2, 0), len(shape))
    free = [i for i in last if whole[i] is None and shape[i] % size == 0]
    if len(shape) < 2 or not free:
        return spec
    longest = max(free, key=lambda i: shape[i])
    return tuple("data" if i == longest else s for i, s in enumerate(whole))


def split_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Splits a matrix, or a stack of them, over `model` along its longest axis that this divides.

    Everything else is held whole. For storing and moving parameters: it ignores what they do.
    """
    size = mesh.shape["model"]
    axes = [i for i, n in enumerate(shape) if n % size == 0 and len(shape) > 1]
    if not axes:
        return NamedSharding(mesh, PartitionSpec())
    longest = max(axes, key=lambda i: shape[i])
    return NamedSharding(
        mesh, PartitionSpec(*("model" if i == longest else None for i in range(len(shape))))
    )

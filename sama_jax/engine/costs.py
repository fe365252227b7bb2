"""Counts what a run spends, and says what each attack cost."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sama_jax.engine.tasks import Tasks


@dataclass
class Costs:
    """What a run has spent so far."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of device work, by the identity of the task."""
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Tokens of forward passes with their padding, by the identity of the task."""
    compile_seconds: float = 0.0
    programs: int = 0
    passes_run: int = 0
    """Forward passes of a text, all models together, that were really made."""


def cost_of(tasks: Tasks, costs: Costs, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns seconds and tokens by attack, over all parts of a resumed run.

    Attacks on one task share its passes, so each of them has its whole cost.

    Args:
      tasks: of the run.
      costs: of this part of it.
      before: what this function gave for the parts before, if there are any.
    """
    before = before or {}
    found: dict[str, dict[str, float]] = {"seconds": {}, "tokens": {}}
    for attack in tasks.attacks:
        names = {task.identity for task in tasks.needed_by(attack.name)}
        for kind, spent in (("seconds", costs.seconds), ("tokens", costs.tokens)):
            old = (before.get(kind) or {}).get(attack.name, 0)
            new = sum(spent[name] for name in names if name in spent)
            found[kind][attack.name] = round(old + new, 2)
    return {
        **{kind: (before.get(kind) or {}) | values for kind, values in found.items()},
        "compile_seconds": round(costs.compile_seconds, 2),
        "programs": costs.programs,
        "passes_run": costs.passes_run,
    }


def sum_costs(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Adds up `cost_of` of several processes; programs are those of the first."""
    total: dict[str, Any] = dict(costs[0]) if costs else {}
    for kind in ("seconds", "tokens"):
        names = dict.fromkeys(name for cost in costs for name in cost.get(kind, {}))
        total[kind] = {n: round(sum(c[kind].get(n, 0) for c in costs), 2) for n in names}
    total["passes_run"] = sum(cost.get("passes_run", 0) for cost in costs)
    return total

"""Lists the attacks: what each reads, its passes before and after sharing, its source."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from sama_jax import attacks as attack_suite
from sama_jax.attacks.queries import Probes, Query, flatten
from sama_jax.config import AuditSettings
from sama_jax.engine.tasks import passes
from sama_jax.terminal import Terminal


def describe(names: Sequence[str], settings: AuditSettings) -> dict[str, Any]:
    """Returns an entry an attack, the passes of all, alone and shared, and what `all` omits."""
    chosen = attack_suite.select(names)
    entries = []
    alone, shared = 0, {}
    for attack in chosen:
        count = passes(attack, settings)
        for query in flatten(attack.queries(settings)):
            for role in query.roles:
                shared[role, query.view_name, query.identity] = query.passes
        alone += sum(count.values())
        entries.append(
            {
                "name": attack.name,
                "access": attack.access,
                "models": list(attack.kinds),
                "passes": count,
                "reads": _reads(attack.queries(settings)),
                "summary": attack.summary,
                "source": attack.source,
            }
        )
    return {
        "attacks": entries,
        "passes_before_sharing": alone,
        "passes_after_sharing": sum(shared.values()),
        "not_in_all": [n for n in attack_suite.names() if not attack_suite.get(n).in_all],
    }


def _reads(queries: dict[str, Query]) -> list[str]:
    """Returns views and quantities, such as `text: nll, mean`, or procedures; guides first."""
    return [
        f"{q.view_name}: "
        + (", ".join(q.channels) if isinstance(q.reads, Probes) else type(q.reads).__name__)
        for q in flatten(queries)
    ]


def print_table(found: dict[str, Any]) -> None:
    """Prints the entries on standard output, in three columns that 80 characters hold."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("attack", no_wrap=True)
    table.add_column("passes", no_wrap=True, justify="right")
    table.add_column("what it measures\n[dim]what it needs; what it reads; source[/dim]")
    for entry in found["attacks"]:
        count = entry["passes"]
        reads = [f"reads {'; '.join(entry['reads'])}"] if entry["reads"] else []
        about = "\n" + "; ".join([entry["access"], *reads, entry["source"]])
        table.add_row(
            entry["name"],
            f"{count['target']} + {count['reference']}",
            Text.assemble(entry["summary"], (about, "dim")),  # brackets are not markup
        )
    Terminal().show(table)
    before, after = found["passes_before_sharing"], found["passes_after_sharing"]
    share = f" ({100 * after / before:.0f} %)" if before else ""
    print(
        f"{len(found['attacks'])} attacks; forward passes a text (target + reference): {before} "
        f"one by one, {after} shared{share}"
    )
    print(f"only by name, not part of 'all': {', '.join(found['not_in_all'])}")

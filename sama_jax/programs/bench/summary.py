"""Turns what the sides measured into the JSON object of docs/performance.md. Pure."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from sama_jax.programs.bench.side import Agreement, End, Round


class Measured(NamedTuple):
    """All that was measured."""

    cold: Round
    """The first round of our side, which compiles."""
    rounds: list[Round]
    products: list[dict[str, float]]
    """Floating-point operations a second by shape, after each round."""
    end: End
    agreement: Agreement | None = None
    """PyTorch's side, as the next two; None and empty without it."""
    torch_rounds: Sequence[Round] = ()
    torch_end: End | None = None


def to_json(found: Measured, texts: int) -> dict[str, Any]:
    """Returns what describes our side and, under `torch`, PyTorch's against it."""
    matmuls = {s: statistics.median(p[s] for p in found.products) for s in found.products[0]}
    peak, flops, seconds = max(matmuls.values()), found.end.flops, _median(found.rounds, "seconds")
    memory, compiling = found.end.peak_memory_bytes, found.cold.compile_seconds
    result = {
        **_rates(found.rounds, texts, flops, memory, peak, compiling),
        "matmul_peak": matmuls,
        "flops": flops,
        "programs": found.end.programs,
        "cpu_seconds": _median(found.rounds, "cpu_seconds"),
        "shares": {
            "padding": found.cold.padding,
            "head": found.end.head_flops / flops,
            "votes": found.end.vote_seconds / seconds,
            "host": _median(found.rounds, "host_seconds") / seconds,
        },
    }
    if found.agreement is None or found.torch_end is None:
        return result
    memory = found.torch_end.peak_memory_bytes
    theirs = _rates(found.torch_rounds, texts, flops, memory, peak, 0.0)
    return {
        **result,
        "agreement": found.agreement._asdict(),
        "torch": theirs | _against(result, theirs, found.torch_rounds, seconds),
    }


def _against(
    ours: dict[str, Any], theirs: dict[str, Any], rounds: Sequence[Round], seconds: float
) -> dict[str, Any]:
    """Returns PyTorch's shares and ratios; above 1 ours is faster, or needs more."""
    votes, median = _median(rounds, "vote_seconds"), _median(rounds, "seconds")
    cpu = _median(rounds, "cpu_seconds")
    return {
        "shares": {"votes": votes / median},
        "ratio": ours["texts_per_second"] / theirs["texts_per_second"],
        "ratio_with_compiling": ours["texts_per_second_with_compiling"]
        / theirs["texts_per_second"],
        "ratio_without_its_votes": (median - votes) / seconds,
        "memory_ratio": ratio(ours["peak_memory_bytes"], theirs["peak_memory_bytes"]),
        # Less disturbed by whatever else the machine does.
        "cpu_seconds": cpu,
        "cpu_ratio": cpu / ours["cpu_seconds"],
    }


def _rates(
    rounds: Sequence[Round],
    texts: int,
    flops: float,
    memory: int | None,
    peak: float,
    compile_seconds: float,
) -> dict[str, Any]:
    median = _median(rounds, "seconds")
    return {
        "seconds": [round(r.seconds, 3) for r in rounds],
        "texts_per_second": texts / median,
        "texts_per_second_with_compiling": texts / (median + compile_seconds),
        "compile_seconds": compile_seconds,
        "flops_per_second": flops / median,
        "share_of_matmul_peak": flops / median / peak,
        "peak_memory_bytes": memory,
    }


def ratio(part: int | None, whole: int | None) -> float | None:
    """Returns `part / whole`; None where the system does not say what memory is in use."""
    return None if part is None or whole is None else part / whole


def _median(rounds: Sequence[Round], field: str) -> float:
    return statistics.median(r._asdict()[field] for r in rounds)

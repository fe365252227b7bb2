"""Prints results of the benchmark on standard output."""

from typing import Any

from rich.table import Table

from sama_jax.programs.bench import growth
from sama_jax.terminal import results_console

_ROWS = (
    # title, field, unit, format, PyTorch's field that compares the two
    ("texts a second", "texts_per_second", 1, ".3f", "ratio"),
    (
        "the same, compiling included",
        "texts_per_second_with_compiling",
        1,
        ".3f",
        "ratio_with_compiling",
    ),
    ("CPU seconds a round", "cpu_seconds", 1, ".1f", "cpu_ratio"),
    ("GFLOP/s (of what is needed)", "flops_per_second", 1e9, ".1f", None),
    ("% of the matmul peak", "share_of_matmul_peak", 0.01, ".0f", None),
    ("peak memory above the weights, MiB", "peak_memory_bytes", 2**20, ".0f", "memory_ratio"),
    ("programs", "programs", 1, ".0f", None),
    ("compiling, s", "compile_seconds", 1, ".1f", None),
)


def print_table(found: dict[str, Any]) -> None:
    """Prints the result of `run_bench`."""
    model, machine, other = found["model"], found["machine"], found.get("torch")
    where = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    print(
        f"{model['layers']} layers, width {model['width']}, vocabulary {model['vocabulary']} "
        f"({100 * model['head_share_of_full_pass']:.0f} % of a full pass), {model['dtype']}; "
        f"{found['texts']} texts of {found['tokens_a_text']:.0f} tokens, preset {found['preset']}; "
        f"{found['threads']} threads, {where}; median of {found['rounds']} rounds"
    )
    columns = ("", "sama_jax", "PyTorch", "ratio") if other else ("", "sama_jax")
    table = _table(columns)
    for title, name, unit, form, ratio in _ROWS:
        cells = [_cell(found.get(name), unit, form)]
        if other:
            known = ratio is not None and other[ratio] is not None
            cells += [_cell(other.get(name), unit, form), _cell(other[ratio]) if known else ""]
        table.add_row(title, *cells)
    results_console().print(table)
    shape, peak = max(found["matmul_peak"].items(), key=lambda item: item[1])
    each = ", ".join(f"{k} {v / 1e9:.0f}" for k, v in found["matmul_peak"].items())
    print(f"matmul peak: {peak / 1e9:.0f} GFLOP/s at {shape}; {each}")
    print("shares: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in found["shares"].items()))
    if other:
        print(
            f"PyTorch: votes {100 * other['shares']['votes']:.1f} %, ratio without them "
            f"{other['ratio_without_its_votes']:.2f}; largest difference of a loss "
            f"{found['agreement']['largest_loss_difference']:.1e} nats, of a score "
            f"{found['agreement']['largest_score_difference']:.1e}"
        )


def print_growth(points: list[dict[str, Any]]) -> None:
    """Prints the result of `run_growth`: each axis against its first point."""
    table = _table(("", "seconds", "GFLOP", "MiB", "time x", "FLOP x", "time / FLOP"))
    for axis in growth.AXES:
        found = [p for p in points if p["axis"] == axis]
        for point in found:
            time_x = point["seconds"] / found[0]["seconds"]
            flops_x = point["flops"] / found[0]["flops"]
            table.add_row(
                f"{point[axis]} {axis}",
                f"{point['seconds']:.2f}",
                f"{point['flops'] / 1e9:.0f}",
                _cell(point["peak_memory_bytes"], 2**20, ".0f"),
                f"{time_x:.2f}",
                f"{flops_x:.2f}",
                f"{time_x / flops_x:.2f}",
            )
    results_console().print(table)


def _table(columns: tuple[str, ...]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    return table


def _cell(value: float | None, unit: float = 1, form: str = ".2f") -> str:
    return "-" if value is None else format(value / unit, form)

"""The peak rate of a device: which matrix products are measured, and for how long."""

import statistics
from collections.abc import Callable

Shape = tuple[int, int, int]
"""(m, k, n) of an [m, k] times a [k, n] matrix."""
SQUARES = {"cpu": (512, 1024, 2048), "accelerator": (2048, 4096, 8192)}
"""Sizes of square products that are tried along with the model's own shapes."""
SLICE_SECONDS = 0.3
"""One shape is measured for this long, then the next one, and so on in turn."""
SHARE = 0.05
"""Share of a round's seconds that each shape is measured for, at least one slice. Short slices
would overstate the peak by about 10 %: slices of one product ran at 96 to 141 GFLOP/s (deciles of
330) on two shared cores, and the best shape counts."""
MOST_SECONDS = 3.0
"""Seconds a shape at most in a round: without it, seven shapes make one of 200 s 70 s longer."""
AT_ONCE = {"cpu": 1, "accelerator": 16}
"""Products handed over before the host waits."""
_LARGEST_RESULT = {"cpu": 2**28, "accelerator": 2**30}
"""Bytes of the float32 result of a shape, at most."""


def shapes(kind: str, rows: int, width: int, mlp_width: int, vocab_size: int) -> list[Shape]:
    """Returns the squares and the model's own products for `rows` tokens that are small enough.

    Args:
      kind: `cpu` or `accelerator`.
    """
    own = [
        (rows, width, width),
        (rows, width, mlp_width),
        (rows, mlp_width, width),
        (rows, width, vocab_size),
    ]
    own = [s for s in own if 4 * s[0] * s[2] <= _LARGEST_RESULT[kind]]
    return list(dict.fromkeys([*((n, n, n) for n in SQUARES[kind]), *own]))


def mean_rates(
    shapes: list[Shape], round_seconds: float, rate: Callable[[Shape], float]
) -> dict[str, float]:
    """Returns the mean rate of each shape, over slices in turn, by its name such as `8x16x8`.

    Args:
      round_seconds: what the round took that the rates are compared with.
      rate: measures a shape for `SLICE_SECONDS`.
    """
    turns = max(1, round(min(SHARE * round_seconds, MOST_SECONDS) / SLICE_SECONDS))
    found = [[rate(shape) for shape in shapes] for _ in range(turns)]
    means = map(statistics.mean, zip(*found))
    return {"x".join(map(str, shape)): mean for shape, mean in zip(shapes, means)}

"""Measures bounds on epsilon: on mechanisms whose epsilon is known, and on a small model.

    python experiments/statistics/canaries.py mechanisms [NAME ...] [--repetitions N] [--canaries M]
    python experiments/statistics/canaries.py model DEMO OUT [--epochs N]

`mechanisms` counts how often the bound exceeds the truth, which 5 % may: of randomised `response`
and of `laplace` noise. 200 repetitions with 400 canaries take some ten minutes of one core each.
`model` wants the folder of a finished `sama-jax demo`; it fine-tunes the demo's base on the demo's
members with canaries among them, audits the canaries, and bounds epsilon from their scores, as
they are and with noise: some minutes. Both print Markdown.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sama_jax.cli import main as sama_jax
from sama_jax.core.epsilon import epsilon_bound
from sama_jax.programs.calibrate import read_run
from sama_jax.storage.canary_file import read_key

Mechanism = Callable[[np.random.Generator, np.ndarray, float], np.ndarray]
"""Gives the scores of canaries, of which it knows whether they are included, at an epsilon."""


def randomised_response(rng: np.random.Generator, coins: np.ndarray, epsilon: float) -> np.ndarray:
    """Tells the truth about a canary with probability e^epsilon / (1 + e^epsilon)."""
    return np.where(rng.random(len(coins)) < 1 / (1 + np.exp(-epsilon)), coins, ~coins) * 1.0


def laplace(rng: np.random.Generator, coins: np.ndarray, epsilon: float) -> np.ndarray:
    """Adds noise of scale 1 / epsilon to 0 or 1."""
    noise = rng.laplace(size=len(coins))
    return noise if epsilon == 0 else coins + noise / epsilon


MECHANISMS: dict[str, Mechanism] = {"response": randomised_response, "laplace": laplace}
EPSILONS = (0.0, 1.0, 2.0, 4.0)


def mechanism_table(names: Sequence[str], times: int, canaries: int) -> Iterator[list[object]]:
    """Yields a row for each mechanism and true epsilon."""
    yield ["mechanism", "true epsilon", "bound above it", "mean bound", "largest possible, mean"]
    for name in names:
        for epsilon in EPSILONS:
            rng, found = np.random.default_rng([8, len(name), int(epsilon)]), []
            for seed in range(times):
                coins = rng.integers(0, 2, canaries).astype(bool)
                scores = MECHANISMS[name](rng, coins, epsilon)
                found.append(epsilon_bound(scores[coins], scores[~coins], seed=seed))
            bounds, largest = np.array(found).T
            yield [name, epsilon, np.mean(bounds > epsilon), bounds.mean(), largest.mean()]


def model_table(demo: Path, out: Path, epochs: int) -> Iterator[list[object]]:
    """Yields the bound from the scores of canaries, and from scores with noise."""
    canaries, data, target, run = (out / x for x in ("canaries", "train.jsonl", "target", "audit"))
    base, length = str(demo / "base"), "96"
    known = ["--canaries", str(canaries)]
    if not canaries.exists():
        _run("canary", "make", "--reference", base, "--out", str(canaries), "--length", "48",
             "--seed", "1")  # fmt: skip
        _run("canary", "insert", str(demo / "corpus/finetune.jsonl"), *known, "--out", str(data))
    _run("canary", "check", *known, "--model", base, "--max-length", length, "--data", str(data))
    _run("finetune", "--base", base, "--data", str(data), "--out", str(target), "--epochs",
         str(epochs), "--lr", "1e-3", "--max-length", length, "--quiet")  # fmt: skip
    _run("audit", "--target", str(target), "--reference", base, "--data",
         str(canaries / "canaries.jsonl"), "--out", str(run), "--max-length", length,
         "--no-figures", "--quiet", allowed=(0, 5))  # fmt: skip
    _run("canary", "audit", str(run), *known, "--out", str(out / "epsilon.json"))
    of_id = {row["id"]: row.get("scores") or {} for row in read_run(run).rows}
    key = read_key(canaries)
    included = np.array([one.included for one in key.canaries])
    noises = "noise, standard deviations of the scores"
    yield ["attack", noises, "epsilon at least, mean", "above 0", "possible"]
    for attack in ("sama", "loss", "ratio"):
        scores = np.array([of_id[one.sha256[:16]][attack] for one in key.canaries], float)
        for noise in (0, 1, 10):
            draws = np.random.default_rng(9).normal(size=(20 if noise else 1, len(scores)))
            noisy = scores + noise * scores.std() * draws
            found = [epsilon_bound(x[included], x[~included], seed=key.seed) for x in noisy]
            bounds, (largest, *_) = np.array(found).T
            yield [attack, noise, bounds.mean(), np.mean(bounds > 0), largest]


def _run(*command: str, allowed: tuple[int, ...] = (0,)) -> None:
    """Runs a command in this process; ends with its exit code where that is not `allowed`.

    That of an audit may be 5: a gate finds that no model predicts random tokens.
    """
    print(f"\n    sama-jax {' '.join(command)}\n", flush=True)
    if (code := sama_jax(command)) not in allowed:
        raise SystemExit(code)


def main() -> None:
    """Prints the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("mechanisms")
    one.add_argument("names", nargs="*", default=list(MECHANISMS), metavar="NAME")
    one.add_argument("--repetitions", type=int, default=200)
    one.add_argument("--canaries", type=int, default=400)
    two = parts.add_parser("model")
    two.add_argument("demo", type=Path)
    two.add_argument("out", type=Path)
    two.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    rows = (
        mechanism_table(args.names, args.repetitions, args.canaries)
        if args.part == "mechanisms"
        else model_table(args.demo, args.out, args.epochs)
    )
    for place, row in enumerate(rows):
        cells = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row)
        print(f"| {' | '.join(cells)} |", flush=True)
        if place == 0:
            print("|" + " --- |" * len(row))


if __name__ == "__main__":
    main()
